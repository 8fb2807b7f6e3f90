"""Answers in the words of the tasks, from every saved form."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from hf_mtcompress.data.preprocessing import max_length_of
from hf_mtcompress.errors import DataError, TaskError
from hf_mtcompress.formats.runtime import Runtime
from hf_mtcompress.formats.runtimes import open_runtime
from hf_mtcompress.tasks import Task, TokenClassification

_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_PROGRESS_FROM = 20
"""Batches from which on a progress bar is worth a line."""


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
    def processor(self) -> Any:
        """The tokenizer or image processor."""
        return self.runtime.processor

    @property
    def max_length(self) -> int | None:
        """Longest input in tokens; longer ones are cut. None for images."""
        return None if self._takes_images else max_length_of(self.processor, self.runtime.max_length)

    def logits(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All logits of a batch of model inputs; see `Runtime.logits`."""
        return self.runtime.logits(batch)

    def predict(
        self,
        inputs: Sequence[Any],
        batch_size: int = 32,
        *,
        tasks: Sequence[str] | None = None,
        progress: bool | None = None,
    ) -> list[dict[str, Any]]:
        """Answer all tasks for each input, which is encoded once.

        Args:
            inputs: texts, lists of words, `(text, second text)` tuples or PIL images, all of one kind. Where a task
                labels words, texts are split at white space.
            batch_size: inputs per call; inputs of like length go together.
            tasks: names of the tasks to answer; default: all.
            progress: show a progress bar; default: when there are many batches.

        Returns:
            One dict by task for each input. Single label: `{"label", "score"}`; several labels: a list of these;
            regression: a number; words: `{"labels"}` with one label for each word (up to `max_length`) and, for BIO
            labels, `spans` of `{"label", "start", "end", "text"}` counted in words, `end` exclusive.

        Raises:
            DataError: the inputs are not what the tasks take.
            TaskError: no such task.
        """
        if isinstance(inputs, str):
            raise DataError("expected a list of inputs, found one string; put it into a list")
        chosen = self._choose(tasks)
        rows = list(inputs)
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

    @property
    def _takes_images(self) -> bool:
        return "pixel_values" in self.processor.model_input_names

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
        if self._takes_images:
            image_task = next(iter(tasks.values()))
            for start in range(0, len(rows), batch_size):
                part = rows[start : start + batch_size]
                for row in part:
                    if isinstance(row, str) or not hasattr(row, "convert"):  # anything that behaves like a PIL image
                        raise DataError(
                            f"expected PIL images, found {type(row).__name__}; open them with PIL.Image.open"
                        )
                pixels = image_task.encode([part], self.processor, None)["pixel_values"]
                yield list(range(start, start + len(part))), {"pixel_values": np.stack(pixels)}, [{} for _ in part]
            return
        encoded, extras = self._encode_texts(rows, tasks)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        order = sorted(range(len(rows)), key=lambda index: -lengths[index])
        names = [name for name in _TEXT_INPUTS if name in encoded]
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            features = [{name: encoded[name][index] for name in names} for index in indices]
            batch = self.processor.pad(features, return_tensors="np")
            yield indices, {name: batch[name] for name in names}, [extras[index] for index in indices]

    def _encode_texts(
        self, rows: list[Any], tasks: Mapping[str, Task]
    ) -> tuple[dict[str, list[Any]], list[dict[str, Any]]]:
        word_task = next((task for task in tasks.values() if isinstance(task, TokenClassification)), None)
        kinds = {_kind_of(row) for row in rows}
        if len(kinds) != 1 or "unknown" in kinds:
            raise DataError(
                "expected texts, lists of words or (text, text) tuples, all of one kind, found "
                f"{sorted({type(row).__name__ for row in rows})}; convert the inputs"
            )
        kind = kinds.pop()
        if kind == "pair":
            if word_task is not None:
                raise DataError(
                    f"task '{word_task.name}': expected one text, found pairs; "
                    "name the tasks that take pairs: tasks=[...]"
                )
            columns = [[row[0] for row in rows], [row[1] for row in rows]]
            return next(iter(tasks.values())).encode(columns, self.processor, self.max_length), [{} for _ in rows]
        if word_task is None:
            return next(iter(tasks.values())).encode([rows], self.processor, self.max_length), [{} for _ in rows]
        words = [row.split() if isinstance(row, str) else list(row) for row in rows]
        encoded = word_task.encode([words], self.processor, self.max_length)
        extras = [{"word_ids": ids, "words": row} for ids, row in zip(encoded["word_ids"], words, strict=True)]
        return encoded, extras


def load_predictor(folder: str | Path, threads: int | None = None) -> Predictor:
    """Open a saved model of any form for prediction.

    Args:
        folder: what a step saved: a multi-task folder (float or quantized by bitsandbytes), a folder of plain
            transformers folders, or one with a graph for ONNX Runtime or OpenVINO.
        threads: threads within an operation; None leaves the runtime's choice.

    Raises:
        ArtifactError: the folder is none of these, incomplete, or of a newer format.
        MissingExtraError: the form needs a package that is not installed.
    """
    return Predictor(open_runtime(Path(folder), threads))


def _kind_of(row: Any) -> str:
    if isinstance(row, str):
        return "text"
    if isinstance(row, tuple) and len(row) == 2 and all(isinstance(part, str) for part in row):
        return "pair"
    if isinstance(row, list) and all(isinstance(part, str) for part in row):
        return "words"
    return "unknown"
