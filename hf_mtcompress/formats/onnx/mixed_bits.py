"""Bits for each part of a graph: how much each suffers from few bits, measured, and the best choice within a size.

One part at a time is stored in few bits, all others in float, and the graph runs on real rows in ONNX Runtime, so that
what is measured is what the deployed kernels do. Differences of several parts are taken to add up, which holds well
while they are small (as in HAWQ and its followers); what the chosen graph really does is measured on the same rows.

References:
    Dong et al. 2020, "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks", NeurIPS (sensitivities
    that add up, and the front of all choices).
"""

import copy
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_mtcompress.environment import require_extra
from hf_mtcompress.errors import ArtifactError, RecipeError
from hf_mtcompress.formats.onnx.graphs import copy_processor, float_settings, random_feed, run_graph
from hf_mtcompress.formats.onnx.prepare import load_prepared, matrices_of, parts_of, weight_of
from hf_mtcompress.formats.onnx.quantize import block_size_problems, write_parts, write_quantized_settings
from hf_mtcompress.records.forms import ONNX_MODEL
from hf_mtcompress.tasks import Task

MIXED_BITS = (4, 8, 16, 32)
"""What a part may be stored in."""
_COLUMNS = ("divergence", "tasks", "saved_bytes")
_LONGEST_FRONT = 4000
"""Choices that are kept while parts are added; of more, those that lie close together are thinned."""


@dataclass(frozen=True)
class PartSensitivity:
    """What few bits in one part do to the answers.

    Attributes:
        name: the part, such as `layer 0 attention`.
        weights: numbers in its matrices.
        divergence: by bits, how far answers of the main tasks move; see `answer_divergence`. Nothing for 32 bits.
        tasks: the same by bits and task.
        saved_bytes: by bits, how much smaller the file gets.
    """

    name: str
    weights: int
    divergence: dict[int, float]
    tasks: dict[int, dict[str, float]]
    saved_bytes: dict[int, int]

    def to_dict(self) -> dict[str, Any]:
        """For records and files; see `Sensitivity.to_dict`."""
        columns = (self.divergence, self.tasks, self.saved_bytes)
        return {
            "part": self.name,
            "weights": self.weights,
            "bits": {
                str(bits): {key: column[bits] for key, column in zip(_COLUMNS, columns, strict=True)}
                for bits in self.divergence
            },
        }


@dataclass(frozen=True)
class Sensitivity:
    """Sensitivities of all parts of a graph.

    Attributes:
        parts: in the order of the model.
        float_bytes: size of the graph with all parts in float32.
        block_size: of the 4 bits that were tried.
        rows: that the answers were compared on.
    """

    parts: list[PartSensitivity]
    float_bytes: int
    block_size: int
    rows: int

    def to_dict(self) -> dict[str, Any]:
        """For records and files: JSON has no numbers as keys."""
        return {
            "float_bytes": self.float_bytes,
            "block_size": self.block_size,
            "rows": self.rows,
            "parts": [part.to_dict() for part in self.parts],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Sensitivity":
        """What `to_dict` wrote."""
        parts = []
        for part in values["parts"]:
            by_bits = {int(bits): found for bits, found in part["bits"].items()}
            columns = [{bits: found[key] for bits, found in by_bits.items()} for key in _COLUMNS]
            parts.append(PartSensitivity(part["part"], part["weights"], *columns))
        return cls(parts, values["float_bytes"], values["block_size"], values["rows"])


@dataclass(frozen=True)
class BitChoice:
    """Bits for every part.

    Attributes:
        bits: by part.
        size_bytes: of the graph, as sizes add up.
        divergence: of the answers, as sensitivities add up.
    """

    bits: dict[str, int]
    size_bytes: int
    divergence: float


def answer_divergence(task: Task, found: np.ndarray, expected: np.ndarray) -> float:
    """How far answers are from those of the float graph, as a mean over rows (or tokens), at least 0.

    - one label of several: Kullback-Leibler divergence of the probabilities, in nats.
    - any number of labels: the sum of that of every label.
    - regression: squared difference over twice the variance of the float answers, which is the divergence of two normal
      distributions of that variance.

    Args:
        task: whose logits these are.
        found: (items, labels); items are rows, or tokens of word-level tasks.
        expected: the same of the float graph.
    """
    own, wanted = (torch.from_numpy(np.asarray(logits, dtype=np.float64)) for logits in (found, expected))
    if task.problem == "regression":
        spread = wanted.var(dim=0, correction=0).clamp(min=1e-6)
        return float(((own - wanted) ** 2 / (2 * spread)).mean())
    if task.problem == "multi_label_classification":
        own, wanted = (torch.stack([-logits, logits], dim=-1) / 2 for logits in (own, wanted))
        return float(_divergence(own, wanted).sum(-1).mean())
    return float(_divergence(own, wanted).mean())


def _divergence(own: Tensor, wanted: Tensor) -> Tensor:
    log_own, log_wanted = (nn.functional.log_softmax(logits, dim=-1) for logits in (own, wanted))
    return nn.functional.kl_div(log_own, log_wanted, reduction="none", log_target=True).sum(-1).clamp(min=0)


def measure_sensitivity(
    source_folder: str | os.PathLike[str],
    batches: Sequence[Mapping[str, np.ndarray]],
    bits: Sequence[int] = (4, 8),
    *,
    block_size: int = 64,
    progress: bool = True,
) -> Sensitivity:
    """Store one part at a time in few bits, and see how far the answers of all tasks move.

    Args:
        source_folder: what `export_onnx` wrote.
        batches: real rows as model inputs, padded or not.
        bits: 4, 8 and 16, or some of them.
        block_size: of 4 bits.
        progress: show a progress bar.

    Returns:
        A mean over the main tasks, and the divergence of each, by part and bits.

    Raises:
        ArtifactError: the source is no float ONNX folder.
        RecipeError: there are no rows, or other numbers of bits.
        MissingExtraError: the extra `onnx` is not installed.
    """
    source_folder = Path(source_folder)
    require_extra("onnx")
    _check_bits(bits, block_size)
    if not batches:
        raise RecipeError("mixed.rows: expected at least one row, found none; give training rows")
    tasks = float_settings(source_folder).build_tasks()
    source = source_folder / ONNX_MODEL
    expected = _answers(source, batches)
    tried = [number for number in bits if number < 32]
    found = []
    with TemporaryDirectory() as scratch:
        model = load_prepared(source, Path(scratch), random_feed(source))
        parts = parts_of(model)
        target = Path(scratch) / "tried.onnx"
        whole = _size_of(model, target, parts)
        numbers = _weights_of(model, parts)
        bar = tqdm(total=len(parts) * len(tried), desc="Measuring sensitivities", disable=not progress, leave=False)
        with bar:
            for part in parts:
                divergences, of_tasks, saved = {}, {}, {}
                for number in tried:
                    write_parts(copy.deepcopy(model), target, parts, {part: number}, block_size)
                    of_tasks[number] = _compare(tasks, _answers(target, batches), expected, batches)
                    divergences[number] = _mean_of_main(tasks, of_tasks[number])
                    saved[number] = whole - target.stat().st_size
                    bar.update()
                found.append(PartSensitivity(part, numbers[part], divergences, of_tasks, saved))
    return Sensitivity(found, whole, block_size, sum(len(next(iter(batch.values()))) for batch in batches))


def best_choices(sensitivity: Sensitivity, bits: Sequence[int] = MIXED_BITS) -> list[BitChoice]:
    """The choices of bits that no other choice beats in both size and divergence, from the smallest to the largest.

    Exact while there are at most 4,000 of them. Of more, the range of sizes is divided into 2,000, and of each division
    the smallest and the best stay; so the smallest and the best of all are always among them.

    Args:
        sensitivity: what `measure_sensitivity` found.
        bits: that may be chosen; 32 is float. Others must have been measured; where one gave numbers that are not
            finite, it is left out.

    Raises:
        RecipeError: a part is left without any.
    """
    front = [BitChoice({}, sensitivity.float_bytes, 0.0)]
    for part in sensitivity.parts:
        options = [
            (number, part.saved_bytes.get(number, 0), part.divergence.get(number, 0.0))
            for number in bits
            if number == 32 or math.isfinite(part.divergence.get(number, math.nan))
        ]
        if not options:
            raise RecipeError(f"mixed.choices: expected bits in which '{part.name}' gives numbers, found none; add 32")
        grown = [
            BitChoice({**choice.bits, part.name: number}, choice.size_bytes - saved, choice.divergence + moved)
            for choice in front
            for number, saved, moved in options
        ]
        grown.sort(key=lambda choice: (choice.size_bytes, choice.divergence))
        front = []
        for choice in grown:
            if not front or choice.divergence < front[-1].divergence:
                front.append(choice)
        front = _thinned(front)
    return front


def _thinned(front: list[BitChoice]) -> list[BitChoice]:
    if len(front) <= _LONGEST_FRONT:
        return front
    smallest, step = front[0].size_bytes, 2 * (front[-1].size_bytes - front[0].size_bytes) / _LONGEST_FRONT
    kept: dict[tuple[int, bool], BitChoice] = {}
    for choice in front:
        place = int((choice.size_bytes - smallest) / step)
        kept.setdefault((place, False), choice)
        kept[place, True] = choice
    return sorted({id(choice): choice for choice in kept.values()}.values(), key=lambda choice: choice.size_bytes)


def choose_within_size(choices: Sequence[BitChoice], size_mb: float) -> BitChoice:
    """The choice that moves answers least among those of at most `size_mb` megabytes (10**6 bytes).

    Raises:
        RecipeError: even the smallest is larger.
    """
    within = [choice for choice in choices if choice.size_bytes <= size_mb * 1e6]
    if not within:
        smallest = min(choice.size_bytes for choice in choices) / 1e6
        raise RecipeError(
            f"mixed.size_mb: expected at least {smallest:.2f}, the size with every part in the fewest bits of "
            f"mixed.choices, found {size_mb:g}; allow fewer bits, prune the model first, or give it more"
        )
    return min(within, key=lambda choice: choice.divergence)


def quantize_mixed(
    source_folder: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    bits: Mapping[str, int],
    *,
    block_size: int = 64,
    rows: Sequence[Mapping[str, np.ndarray]] = (),
) -> Path:
    """Write an ONNX folder again with each part of the model in bits of its own.

    Args:
        source_folder: what `export_onnx` wrote.
        folder: where to write; made when it is not there.
        bits: 32, 16, 8 or 4 by part, as `BitChoice.bits`; parts that are not named stay in float32.
        block_size: of 4 bits.
        rows: model inputs; where there are some, the divergence on them is measured and kept in the settings.

    Returns:
        `folder`.

    Raises:
        ArtifactError: the source is no float ONNX folder, or the result gives numbers that are not finite.
        RecipeError: a part that the graph does not have, or other numbers of bits.
        MissingExtraError: the extra `onnx` is not installed.
    """
    source_folder, folder = Path(source_folder), Path(folder)
    require_extra("onnx")
    _check_bits(list(bits.values()), block_size)
    settings = float_settings(source_folder)
    source = source_folder / ONNX_MODEL
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ONNX_MODEL
    sample = random_feed(source)
    with TemporaryDirectory() as scratch:
        model = load_prepared(source, Path(scratch), sample)
        parts = parts_of(model)
        if unknown := sorted(set(bits) - set(parts)):
            raise RecipeError(f"bits: expected parts among {', '.join(parts)}, found {', '.join(unknown)}")
        exceptions = write_parts(model, path, parts, bits, block_size)
    if not all(np.isfinite(array).all() for array in run_graph(path, sample).values()):
        path.unlink()
        raise ArtifactError("expected finite numbers from the graph, found others; choose more bits")
    copy_processor(source_folder, folder)
    quantization: dict[str, Any] = {"parts": {part: bits.get(part, 32) for part in parts}}
    if 4 in bits.values():
        quantization["block_size"] = block_size
    if exceptions:
        quantization["exceptions"] = exceptions
    if rows:
        tasks = settings.build_tasks()
        moved = _compare(tasks, _answers(path, rows), _answers(source, rows), rows)
        quantization["divergence"] = {"mean": _mean_of_main(tasks, moved), "tasks": moved}
    write_quantized_settings(settings, folder, "mixed", quantization)
    return folder


def _check_bits(bits: Sequence[int], block_size: int) -> None:
    problems: list[str] = []
    if unknown := sorted(set(bits) - set(MIXED_BITS)):
        problems.append(f"choices: expected some of {', '.join(map(str, MIXED_BITS))}, found {unknown}; leave them out")
    problems += block_size_problems(block_size)
    if problems:
        raise RecipeError(problems)


def _answers(path: Path, batches: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    # It imports onnxruntime, which is of the extra "onnx".
    from hf_mtcompress.formats.onnx.session import open_session, run_session

    session = open_session(path, None)
    return [run_session(session, batch) for batch in batches]


def _compare(
    tasks: Mapping[str, Task],
    found: Sequence[Mapping[str, np.ndarray]],
    expected: Sequence[Mapping[str, np.ndarray]],
    batches: Sequence[Mapping[str, np.ndarray]],
) -> dict[str, float]:
    """Divergence of each task over all batches."""
    moved = {}
    for name, task in tasks.items():
        own, wanted = (_joined(answers, task.logits_name, batches) for answers in (found, expected))
        moved[name] = answer_divergence(task, own, wanted)
    return moved


def _mean_of_main(tasks: Mapping[str, Task], moved: Mapping[str, float]) -> float:
    """Over the main tasks, which the gate judges; over all where there is none."""
    main = [name for name, task in tasks.items() if task.role == "main"] or list(tasks)
    return sum(moved[name] for name in main) / len(main)


def _joined(
    answers: Sequence[Mapping[str, np.ndarray]], output: str, batches: Sequence[Mapping[str, np.ndarray]]
) -> np.ndarray:
    """(items, labels) of all batches: rows, or the tokens that are no padding."""
    parts = []
    for answer, batch in zip(answers, batches, strict=True):
        logits = answer[output]
        parts.append(logits[batch["attention_mask"].astype(bool)] if logits.ndim == 3 else logits)
    return np.concatenate(parts)


def _size_of(model: Any, path: Path, parts: Mapping[str, Sequence[str]]) -> int:
    write_parts(copy.deepcopy(model), path, parts, {})
    return path.stat().st_size


def _weights_of(model: Any, parts: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Numbers in the matrices of each part, each matrix once."""
    sizes = matrices_of(model)
    weights = {node.name: weight_of(node) for node in model.graph.node if node.op_type in ("MatMul", "Gather")}
    return {
        part: sum(sizes.get(weight, 0) for weight in {weights[name] for name in names}) for part, names in parts.items()
    }
