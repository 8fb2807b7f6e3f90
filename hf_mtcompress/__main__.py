"""`python -m hf_mtcompress`."""

import sys

from hf_mtcompress.cli import main

sys.exit(main())
