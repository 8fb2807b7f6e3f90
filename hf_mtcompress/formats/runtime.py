"""What every saved form is once it is loaded: arrays of model inputs to logits by task."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hf_mtcompress.data.readers import Reader
from hf_mtcompress.digests import content_digest
from hf_mtcompress.records import FormName
from hf_mtcompress.tasks import Task


class Runtime(ABC):
    """A loaded artefact, whatever it runs on.

    Attributes:
        form: what kind of folder it is.
        folder: where it was loaded from.
        tasks: the tasks by name.
        reader: what makes its inputs of rows.
    """

    form: FormName
    folder: Path
    tasks: dict[str, Task]
    reader: Reader

    @abstractmethod
    def logits(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All logits of a batch.

        Args:
            batch: model inputs by name, as `reader` makes them.

        Returns:
            By task: (rows, labels), or (rows, tokens, labels) for word-level tasks.
        """

    def digest(self) -> str:
        """Digest of the files it was loaded from, for caches of its answers."""
        return content_digest(self.folder)
