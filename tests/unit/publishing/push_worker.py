"""Pushes in a process of its own, because huggingface_hub reads its environment when it is imported.

One line of JSON in (arguments of `push_folder`, and what the check answers), one line out.
"""

import json
import logging
import sys
import time
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars

from hf_mtcompress.errors import PublishingError
from hf_mtcompress.publishing.hub import push_folder


def main() -> None:
    disable_progress_bars()
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
    # Retries wait for seconds; what is tested is what they come to.
    time.sleep = lambda seconds: None
    for line in sys.stdin:
        order = json.loads(line)
        answers = order.pop("check_answers", [])
        checked: list[str] = []

        def check(folders: list[Path], checked: list[str] = checked, answers: list[str] = answers) -> list[str]:
            checked += [folder.as_posix() for folder in folders]
            return answers

        try:
            result = push_folder(Path(order.pop("folder")), order.pop("repo_id"), check=check, **order)
            answer = {
                "files": {file.path: file.bytes for file in result.files},
                "commit_url": result.commit_url,
                "removed": result.removed,
                "kept": result.kept,
                "replaced": result.replaced,
                "other_card": result.other_card,
                "checked": checked,
            }
        except PublishingError as error:
            answer = {"refused": str(error), "checked": checked}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
