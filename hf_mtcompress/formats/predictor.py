"""Answers in the words of the tasks, from every saved form."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from hf_mtcompress.data.alignment import words_of
from hf_mtcompress.data.preprocessing import columns_for
from hf_mtcompress.data.readers import WORD_IDS, Reader, lengths_of
from hf_mtcompress.errors import TaskError
from hf_mtcompress.formats.folders import find_model
from hf_mtcompress.formats.runtime import Runtime
from hf_mtcompress.formats.runtimes import open_runtime
from hf_mtcompress.tasks import Task

_PROGRESS_FROM = 20
"""Batches from which on a progress bar is worth a line."""
_ONE = (str, bytes, os.PathLike, Mapping, Image.Image)
"""Inputs that are no list of some."""


class Predictor:
    """Answers all tasks of one saved model.

    Args:
        runtime: the loaded model; `load_predictor` makes it from a folder.

    Example:
        >>> predictor = load_predictor("runs/nlu/student")  # doctest: +SKIP
        >>> predictor.predict(["wake me at seven"])  # doctest: +SKIP
        [{'intent': {'label': 'alarm', 'score': 0.98}, 'slots': {'labels': ['O', 'O', 'O', 'B-time'], ...}}]
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    @property
    def tasks(self) -> dict[str, Task]:
        """The tasks by name."""
        return self.runtime.tasks

    @property
    def reader(self) -> Reader:
        """What makes its inputs of rows; `reader.max_length` is the longest input in tokens."""
        return self.runtime.reader

    def logits(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All logits of a batch of model inputs; see `Runtime.logits`."""
        return self.runtime.logits(batch)

    def __call__(self, inputs: Any, **options: Any) -> Any:
        """As `predict`; one text, picture or `{"text", "text_pair"}` that is in no list gets one answer, in no list."""
        answers = self.predict(inputs, **options)
        return answers[0] if isinstance(inputs, _ONE) else answers

    def predict(
        self,
        inputs: Sequence[Any] | Mapping[str, Any] | os.PathLike[str] | Image.Image | np.ndarray | Tensor,
        batch_size: int = 32,
        *,
        tasks: Sequence[str] | str | None = None,
        progress: bool | None = None,
    ) -> list[dict[str, Any]]:
        """Answer all tasks for each input, which is encoded once.

        Args:
            inputs: texts, lists of words, `(text, second text)` tuples or pictures, all of one kind. Pictures are
                paths, addresses, bytes, PIL images, arrays or tensors (`picture_of`). A list of words is read as the
                text that it makes; the words of a text are what stands between white space. One input in no list is a
                list of one.
            batch_size: inputs per call; inputs of like length go together.
            tasks: names of the tasks to answer, or one name; default: all.
            progress: show a progress bar; default: when there are many batches.

        Returns:
            One dict by task for each input. Single label: `{"label", "score"}`; several labels: a list of these;
            regression: a number; words: `{"labels"}` with one label for each word, None for those that the model did
            not read (beyond `max_length`, or of characters that its tokenizer drops), and, for BIO labels, `spans` of
            `{"label", "start", "end", "text"}` counted in words, `end` exclusive.

        Raises:
            DataError: the inputs are not what the tasks take.
            TaskError: no such task.
        """
        chosen = self._choose([tasks] if isinstance(tasks, str) else tasks)
        # The rows of one picture are no pictures.
        given: Any = inputs
        one = isinstance(inputs, _ONE) or getattr(inputs, "ndim", 0) in (2, 3)
        rows: list[Any] = [given] if one else list(given)
        answers: list[dict[str, Any]] = [{} for _ in rows]
        total = -(-len(rows) // batch_size)
        with tqdm(
            total=len(rows), desc="Predicting", disable=not (progress or (progress is None and total >= _PROGRESS_FROM))
        ) as bar:
            for indices, batch, extras in self._batches(rows, chosen, batch_size):
                logits = self.logits(batch)
                for place, index in enumerate(indices):
                    answers[index] = {
                        name: task.decode(logits[name][place], extras[place]) for name, task in chosen.items()
                    }
                bar.update(len(indices))
        return answers

    def _choose(self, names: Sequence[str] | None) -> dict[str, Task]:
        unknown = [name for name in names or () if name not in self.tasks]
        if unknown:
            raise TaskError(f"expected tasks among {list(self.tasks)}, found {unknown}; check the spelling")
        return self.tasks if names is None else {name: self.tasks[name] for name in names}

    def _batches(
        self, rows: list[Any], tasks: Mapping[str, Task], batch_size: int
    ) -> Iterator[tuple[list[int], dict[str, np.ndarray], list[dict[str, Any]]]]:
        """Indices of rows, their model inputs, and what decoding needs beside the logits."""
        if not rows:
            return
        reader = self.reader
        words = any(task.reads_words for task in tasks.values())
        columns = columns_for(rows, tasks.values(), reader)
        encoded = {} if reader.on_read else reader.encode(columns, words=words)
        word_ids = encoded.pop(WORD_IDS, None)
        order = list(range(len(rows)))
        if (lengths := lengths_of(encoded)) is not None:
            order.sort(key=lambda index: -lengths[index])
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            if reader.on_read:
                part = reader.encode([[column[index] for index in indices] for column in columns])
            else:
                part = {name: [values[index] for index in indices] for name, values in encoded.items()}
            batch = reader.collate([{name: part[name][place] for name in part} for place in range(len(indices))])
            extras: list[dict[str, Any]] = [{} for _ in indices]
            if word_ids is not None:
                extras = [{"word_ids": word_ids[index], "words": words_of(columns[0][index])} for index in indices]
            yield indices, {name: tensor.numpy() for name, tensor in batch.items()}, extras


def load_predictor(
    folder: str | os.PathLike[str], threads: int | None = None, *, revision: str | None = None
) -> Predictor:
    """Open a saved model of any form for prediction.

    Args:
        folder: what a step saved: a multi-task folder (float or quantized by bitsandbytes), a folder of plain
            transformers folders, or one with a graph for ONNX Runtime or OpenVINO; a folder around one of these; or
            the Hub id of a pushed repository.
        threads: threads within an operation; None leaves the runtime's choice.
        revision: of the repository.

    Raises:
        ArtifactError: the folder is none of these, holds several models, is incomplete, or of a newer format.
        MissingExtraError: the form needs a package that is not installed.
    """
    return Predictor(open_runtime(find_model(folder, revision), threads))
