"""How long the blocks of an encoder take on this machine, measured once, so that a choice can be made by the clock.

A few shapes of the same architecture are saved in the form that will be deployed and timed in turns. Their times are
explained by a sum: what is not in the layers, what every layer costs, what an attention block with so many heads and a
feed-forward block with so many neurons cost. Numbers in between are interpolated.

Reference:
    Kurtic et al.: ZipLM: Inference-Aware Structured Pruning of Language Models. NeurIPS 2023, whose table holds the
    time of each block at each size. Deviation: whole models are timed rather than blocks alone, because runtimes fuse
    operators over the borders of blocks and small blocks alone stay in the caches; the blocks' shares are solved for.
"""

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from scipy.optimize import nnls
from tqdm.auto import tqdm

from hf_mtcompress.artifacts import write_text
from hf_mtcompress.environment import environment_facts
from hf_mtcompress.errors import ArtifactError
from hf_mtcompress.evaluation.benchmark import benchmark
from hf_mtcompress.formats.onnx.export import export_onnx
from hf_mtcompress.formats.onnx.quantize import quantize_onnx
from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.surgery import cut, keep_layers
from hf_mtcompress.recipe import BenchmarkConfig

Runtime = Literal["torch", "onnx", "onnx_int8"]
"""Float torch, ONNX Runtime in float, ONNX Runtime in 8 bits."""

Shape = Sequence[tuple[int, int]]
"""Heads and neurons of every layer."""

_HEAD_SHARES = (0.0, 1 / 12, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1.0)
_WIDTH_SHARES = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
_REFERENCE = "torch"


@dataclass(frozen=True)
class BlockTimes:
    """Milliseconds at one batch size.

    Attributes:
        rest: what is not in the layers: embeddings, heads of the tasks, the call itself.
        layer: what a layer costs beside its blocks.
        heads: of one attention block, by number of heads; 0 for none.
        feed_forward: of one feed-forward block, by width; 0 for none.
        largest_error: of the shapes that were measured, relative to their time.
        reference: of the uncut model in torch float32, measured in the same turns.
    """

    rest: float
    layer: float
    heads: dict[int, float]
    feed_forward: dict[int, float]
    largest_error: float
    reference: float

    def covers(self, heads: int, width: int) -> bool:
        """Whether blocks of these sizes were measured, or larger ones."""
        return heads <= max(self.heads) and width <= max(self.feed_forward)

    def of(self, shape: Shape) -> float:
        """Milliseconds of one call of a model of this shape."""
        return self.rest + sum(
            self.layer + _between(self.heads, heads) + _between(self.feed_forward, width) for heads, width in shape
        )


@dataclass(frozen=True)
class LatencyTable:
    """Times of an architecture's blocks on one machine.

    Attributes:
        runtime: what runs the model.
        tokens: of every row; 0 for images.
        threads: of the runtime.
        batches: times by batch size.
        environment: the machine and versions of packages.
        busy: what shows that the machine was busy, so that times are rough; None where they hold.
    """

    runtime: Runtime
    tokens: int
    threads: int
    batches: dict[int, BlockTimes]
    environment: dict[str, Any]
    busy: str | None = None

    def milliseconds(self, shape: Shape, batch_size: int) -> float:
        """Predicted time of one call.

        Raises:
            ValueError: this batch size was not measured.
        """
        if batch_size not in self.batches:
            raise ValueError(f"batch_size: expected one that was measured, {sorted(self.batches)}, found {batch_size}")
        return self.batches[batch_size].of(shape)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON."""
        write_text(Path(path), json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LatencyTable":
        """Read a table.

        Raises:
            ArtifactError: the file holds none.
        """
        path = Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            batches = {}
            for size, times in values.pop("batches").items():
                heads, widths = (
                    {int(key): ms for key, ms in times.pop(name).items()} for name in ("heads", "feed_forward")
                )
                batches[int(size)] = BlockTimes(heads=heads, feed_forward=widths, **times)
            return cls(batches=batches, **values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f"expected a latency table in '{path.name}', found none that can be read; delete it "
                "and it is measured again"
            ) from error


def measure_latency(
    model: MultiTaskModel,
    processor: Any,
    samples: Sequence[Any],
    *,
    runtime: Runtime = "onnx_int8",
    tokens: int = 64,
    batch_sizes: Sequence[int] = (1, 32),
    threads: int | None = None,
    repetitions: int = 20,
    wait: float = 30.0,
    progress: bool = True,
) -> LatencyTable:
    """Time about twenty shapes of a model's architecture and split the times into blocks.

    Args:
        model: of the largest shape that is asked for; every layer alike. It is not changed.
        processor: its tokenizer or image processor.
        samples: texts or images to run on.
        runtime: what the model will be deployed on.
        tokens: of every row.
        batch_sizes: rows in a call.
        threads: of the runtime; default: all cores, less those that other processes keep busy.
        repetitions: turns of each shape at each batch size (see `BenchmarkConfig`); the fastest call counts.
        wait: seconds to wait for a quiet machine.
        progress: whether to show a progress bar.

    Raises:
        ValueError: the layers of the model differ.
        MissingExtraError: the extra `onnx` is not installed.
    """
    full = find_anatomy(model.encoder).sizes
    if len(set(full)) != 1:
        raise ValueError(f"model: expected layers that are all alike, found {full}; use the model before it was pruned")
    layers, (heads, width) = len(full), full[0]
    shapes = shapes_to_measure(layers, heads, width)
    config = BenchmarkConfig(
        tokens=tokens, batch_sizes=tuple(batch_sizes), repetitions=repetitions, threads=threads, wait=wait
    )
    with TemporaryDirectory() as scratch:
        folders = {_REFERENCE: Path(scratch) / "reference"}
        model.save_pretrained(folders[_REFERENCE])
        processor.save_pretrained(folders[_REFERENCE])
        for shape in tqdm(shapes, desc="shapes to time", unit="model", disable=not progress):
            if runtime == "torch" and shape == (layers, heads, width):
                continue
            folders[_label(shape)] = save_shape(
                model, processor, [shape[1:]] * shape[0], Path(scratch) / _label(shape), runtime
            )
        found = benchmark(folders, reference=_REFERENCE, config=config, samples=samples)
    times = found.minimum_ms
    if runtime == "torch":
        times[_label((layers, heads, width))] = times[_REFERENCE]
    return LatencyTable(
        runtime=runtime,
        tokens=int(found.conditions["tokens"]),
        threads=int(found.conditions["threads"]),
        batches={
            size: split_times(
                {shape: times[_label(shape)][size] for shape in shapes}, reference=times[_REFERENCE][size]
            )
            for size in batch_sizes
        },
        environment=environment_facts(),
        # A shape or two whose times are odd do little to the sum of blocks; a busy machine bends all.
        busy=found.busy,
    )


def save_shape(model: MultiTaskModel, processor: Any, shape: Shape, folder: Path, runtime: Runtime) -> Path:
    """Save the first layers, heads and neurons of a model in the form that a runtime takes.

    What it answers is of no use; how long it takes does not depend on that.
    """
    smaller = copy.deepcopy(model).eval()
    keep_layers(smaller.encoder, range(len(shape)))
    cut(
        smaller.encoder,
        {layer: list(range(heads)) for layer, (heads, _) in enumerate(shape)},
        {layer: list(range(width)) for layer, (_, width) in enumerate(shape)},
    )
    smaller.refresh_config()
    if runtime == "torch":
        smaller.save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder
    if runtime == "onnx":
        return export_onnx(smaller, processor, folder)
    with TemporaryDirectory() as scratch:
        return quantize_onnx(export_onnx(smaller, processor, Path(scratch)), folder)


def shapes_to_measure(layers: int, heads: int, width: int) -> list[tuple[int, int, int]]:
    """Layers, heads and neurons of the models that tell the times of all blocks apart."""
    some_heads = sorted({round(share * heads) for share in _HEAD_SHARES})
    widths = sorted({round(share * width) for share in _WIDTH_SHARES})
    half_heads, half_width = max(heads // 2, 1), max(round(width / 2), 1)
    found = [(layers, heads, width), (layers, 0, 0)]
    found += [(layers, count, half_width) for count in some_heads]
    found += [(layers, half_heads, count) for count in widths]
    # Fewer layers tell what a layer costs from what is not in the layers.
    for count in {max(layers // 2, 1), 1}:
        found += [(count, heads, width), (count, half_heads, half_width)]
    return list(dict.fromkeys(found))


def split_times(measured: Mapping[tuple[int, int, int], float], reference: float) -> BlockTimes:
    """Solve for the times of blocks.

    Least squares of the relative errors, with no block faster than a smaller one.

    Args:
        measured: milliseconds by layers, heads and neurons.
        reference: milliseconds of what they are compared with.
    """
    heads = sorted({shape[1] for shape in measured} - {0})
    widths = sorted({shape[2] for shape in measured} - {0})

    # Unknowns: rest, layer, and what each step to the next larger size of a block adds, none below 0.
    def row(shape: tuple[int, int, int]) -> list[float]:
        count, own_heads, own_width = shape
        return [
            1.0,
            float(count),
            *(float(count) * (own_heads >= step) for step in heads),
            *(float(count) * (own_width >= step) for step in widths),
        ]

    times = np.asarray(list(measured.values()))
    matrix = np.asarray([row(shape) for shape in measured])
    found, _ = nnls(matrix / times[:, None], np.ones(len(times)))
    errors = np.abs(matrix @ found / times - 1.0)
    after = 2 + len(heads)

    def column(sizes: Sequence[int], steps: np.ndarray) -> dict[int, float]:
        return {0: 0.0} | {size: float(total) for size, total in zip(sizes, np.cumsum(steps), strict=True)}

    return BlockTimes(
        rest=float(found[0]),
        layer=float(found[1]),
        heads=column(heads, found[2:after]),
        feed_forward=column(widths, found[after:]),
        largest_error=float(errors.max()),
        reference=reference,
    )


def block_costs(times: BlockTimes, heads: int, width: int) -> tuple[Callable[[int], float], Callable[[int], float]]:
    """What so many heads, and so many neurons, of one layer cost; for `select_within_time`.

    Raises:
        ValueError: the layers are larger than those that were measured.
    """
    if not times.covers(heads, width):
        raise ValueError(
            f"latency: expected a table of at least {heads} heads and {width} neurons, found one of "
            f"{max(times.heads)} and {max(times.feed_forward)}"
        )
    return (lambda count: _between(times.heads, count)), (lambda count: _between(times.feed_forward, count))


def _between(column: Mapping[int, float], size: int) -> float:
    """Of the sizes around it, straight between them."""
    return float(np.interp(size, list(column), list(column.values())))


def _label(shape: tuple[int, int, int]) -> str:
    return "-".join(map(str, shape))
