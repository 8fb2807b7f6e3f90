"""What a recipe would do, told before it is done: rows, batches, steps, expected parameters and sizes."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from hf_mtcompress.compression.vocabulary import count_tokens, trim_tokenizer
from hf_mtcompress.data.preprocessing import group_tasks
from hf_mtcompress.data.sources import Sources
from hf_mtcompress.errors import DataError, RecipeError
from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.model.configuration import MultiTaskConfig
from hf_mtcompress.model.marking import read_mark, write_mark
from hf_mtcompress.model.surgery import apply_structure
from hf_mtcompress.recipe import (
    DistillStep,
    EncoderConfig,
    ExportStep,
    FinetuneStep,
    PretrainStep,
    PruneStep,
    QuantizeStep,
    Recipe,
    StepConfig,
    TrimVocabularyStep,
    TrimWeightsStep,
)
from hf_mtcompress.recipe.lineage import Lineage
from hf_mtcompress.steps.pruning import recoveries
from hf_mtcompress.steps.rows import texts_to_keep
from hf_mtcompress.steps.run_context import RunContext, recipe_reader
from hf_mtcompress.steps.saved_models import encoder_config, lineage_with_saved_models
from hf_mtcompress.steps.training import merged_training

_MOVES = (
    "answers can change with the other rows of a call, whose activations are rounded together; `calibration` or "
    "`backend: openvino` fixes their ranges"
)
"""What to know of 8 bits whose ranges are found in each call."""


def describe_plan(recipe: Recipe, sources: Sources) -> dict[str, Any]:
    """The plan of a recipe as plain values.

    Sizes are estimates from shapes alone: four bytes a parameter in float32; with onnxruntime two in 16 bits, one in 8,
    and in 4 bits half a byte with its share of the scale of a block; with bitsandbytes or torchao one or half a byte
    for linear layers and four for the rest; trimmed to a sparsity or a pattern, four bytes for each weight that is left
    and a bit for its place. Measured sizes are in the record. The tokens that a vocabulary is cut to are counted, with
    the tokenizer of the recipe's encoder.

    Args:
        recipe: what is wanted.
        sources: its data.

    Returns:
        `{"rows": by task and role, "groups": tasks encoded together, "steps": one dict a step}`.

    Raises:
        RecipeError: a saved model cannot be read, or a step cannot do with its models what it says.
    """
    groups = group_tasks(sources.tasks, sources.role("train"))
    steps = []
    for step, found, _, shape in _shapes(recipe, sources):
        own = sources.of(found.begins.tasks)
        steps.append(
            {
                "step": step.name,
                "kind": step.kind,
                "from": found.parent,
                "layers": shape.layers,
                "parameters": round(shape.parameters),
                "estimated_mb": round(shape.megabytes(step) * _copies(step, len(own.tasks)), 1),
                **({"tokens": shape.tokens} if isinstance(step, TrimVocabularyStep) else {}),
                **_training_size(step, recipe, _training_rows(own)),
                **({"note": _MOVES} if _finds_ranges_in_calls(step) else {}),
            }
        )
    return {
        "rows": {name: {role: len(rows) for role, rows in splits.items()} for name, splits in sources.splits.items()},
        "groups": [list(group) for group in groups],
        "steps": steps,
    }


def layer_problems(recipe: Recipe) -> list[str]:
    """Steps that remove, keep or name layers which are not there by then."""
    counting = [step for step in recipe.steps if _counts_layers(step)]
    if not counting:
        return []
    problems: list[str] = []
    for step, found, before, _ in _shapes(recipe, None):
        name, count, origin = f"steps.{step.name}", before.layers, found.origin or recipe.encoder.path
        match step:
            case PruneStep(layers=layers) if layers and layers >= count:
                problems.append(
                    f"{name}.layers: expected at most {count - 1} layers to remove from the {count} of '{origin}', "
                    f"found {layers}; it is the number to remove, not to keep"
                )
            case DistillStep(student=student) | PretrainStep(student=student) if student is not None and student.layers:
                wanted = student.layers
                if isinstance(wanted, int) and wanted > count:
                    problems.append(
                        f"{name}.student.layers: expected at most the {count} layers of '{origin}' to keep, found "
                        f"{wanted}"
                    )
                elif not isinstance(wanted, int) and max(wanted) >= count:
                    problems.append(
                        f"{name}.student.layers: expected numbers of the {count} layers of '{origin}', counted from 0, "
                        f"found {list(wanted)}"
                    )
            case QuantizeStep(float_layers=layers) if layers and max(layers) >= count:
                problems.append(
                    f"{name}.float_layers: expected numbers of the {count} layers of '{origin}', counted from 0, found "
                    f"{list(layers)}"
                )
            case _:
                continue
        if problems:
            return problems  # what follows is built on a step that cannot be
    return problems


def _counts_layers(step: StepConfig) -> bool:
    match step:
        case PruneStep():
            return bool(step.layers)
        case DistillStep(student=student) | PretrainStep(student=student):
            return student is not None and bool(student.layers)
        case QuantizeStep():
            return bool(step.float_layers)
        case _:
            return False


def _shapes(recipe: Recipe, sources: Sources | None) -> Iterator[tuple[StepConfig, Lineage, "_Shape", "_Shape"]]:
    """Every step with its lineage, and the shape of its model before and after.

    Without `sources` the tokens of a vocabulary that is cut are not counted.
    """
    lineage = lineage_with_saved_models(recipe)
    encoder = encoder_config(recipe.encoder, "encoder.path")
    trusted = recipe.encoder.trust_remote_code
    shapes: dict[str, _Shape] = {recipe.encoder.path: _shape_of(encoder, trust_remote_code=trusted)}
    for step in recipe.steps:
        found = lineage[str(step.name)]
        origin = found.origin or recipe.encoder.path
        if origin not in shapes:
            shapes[origin] = _shape_of(AutoConfig.from_pretrained(origin, trust_remote_code=False))
        start = shapes[origin]
        if isinstance(step, TrimVocabularyStep) and sources is not None:
            left = _tokens_left(step, recipe, sources.of(found.begins.tasks))
            shapes[str(step.name)] = start.with_tokens(min(start.tokens, left))
        yield step, found, start, shapes.setdefault(str(step.name), start.after(step, recipe.encoder))


def _training_rows(sources: Sources) -> int:
    train = sources.role("train")
    return sum(len(train[group[0]]) for group in group_tasks(sources.tasks, train))


class _Shape:
    """Parameter counts of an encoder by part."""

    def __init__(
        self, layers: int, attention: float, feed_forward: float, embedding: float, rest: float, tokens: int
    ) -> None:
        self.layers = layers
        self.tokens = tokens
        self.attention = attention
        self.feed_forward = feed_forward
        self.embedding = embedding
        self.rest = rest

    @property
    def parameters(self) -> float:
        return self.attention + self.feed_forward + self.embedding + self.rest

    def with_layers(self, layers: int) -> "_Shape":
        share = layers / self.layers
        kept = self.attention * share, self.feed_forward * share
        return _Shape(layers, *kept, self.embedding, self.rest, self.tokens)

    def narrower(self, heads: float, feed_forward: float) -> "_Shape":
        """Without a fraction of the heads and of the feed-forward neurons."""
        kept = self.attention * (1 - heads), self.feed_forward * (1 - feed_forward)
        return _Shape(self.layers, *kept, self.embedding, self.rest, self.tokens)

    def with_tokens(self, tokens: int) -> "_Shape":
        """With a smaller vocabulary."""
        embedding = self.embedding * tokens / self.tokens
        return _Shape(self.layers, self.attention, self.feed_forward, embedding, self.rest, tokens)

    def after(self, step: StepConfig, encoder: EncoderConfig) -> "_Shape":
        """What a step makes of it; `encoder` is the recipe's."""
        match step:
            case DistillStep(student=student) | PretrainStep(student=student) if student is not None:
                if student.path is not None:
                    return self
                if student.config is not None:
                    config = encoder_config(encoder, "encoder.path", student.config)
                    write_mark(config, None)  # whatever was cut from the encoder, the student is whole
                    return _shape_of(config, trust_remote_code=encoder.trust_remote_code)
                layers = student.layers or ()
                kept = self.with_layers(layers if isinstance(layers, int) else len(layers))
                return kept.narrower(student.heads, student.feed_forward)
            case PruneStep(width=width) if width:
                # Heads go with the width, so that matrices between states and heads lose it twice.
                kept = 1 - width
                sizes = self.attention * kept**2, self.feed_forward * kept, self.embedding * kept, self.rest * kept
                return _Shape(self.layers, *sizes, self.tokens)
            case PruneStep():
                less = self.with_layers(self.layers - step.layers) if step.layers else self
                if step.compute:
                    # Layers that go count towards it; what else goes of which kind is not known beforehand.
                    further = max(1 - (1 - step.compute) * self.layers / less.layers, 0.0)
                    return less.narrower(further, further)
                if step.latency:
                    # What goes is known when blocks are timed; if all parts take their share of it, as much as this.
                    return less.narrower(step.latency, step.latency)
                return less.narrower(step.heads, step.feed_forward)
            case _:
                return self

    def _graph_bytes(self, step: QuantizeStep) -> float:
        linear = self.attention + self.feed_forward
        kept = linear * min(len(set(step.float_layers)) / self.layers, 1.0)
        if step.bits == "mixed":
            # Without a size it is known when parts are measured and tried; as an estimate, what 8 bits take.
            return step.mixed.size_mb * 1e6 if step.mixed and step.mixed.size_mb else self.parameters
        # A scale in float32 and a zero point of 4 bits for each block.
        block = (4 + 36 / step.block_size) / 8
        if step.bits != 4:
            saved = self.embedding * (1 - block) if step.embedding_bits == 4 else 0.0
            return (self.parameters - kept) * step.bits / 8 + kept * 4 - saved
        tables = self.embedding * (block if step.embedding_bits != 8 else 1)
        return (linear - kept) * block + kept * 4 + tables + self.rest

    def megabytes(self, step: StepConfig) -> float:
        linear = self.attention + self.feed_forward
        match step:
            case QuantizeStep(backend="onnxruntime" | "openvino"):
                return self._graph_bytes(step) / 1e6
            case QuantizeStep(bits=bits, embeddings=embeddings):
                few = linear + (self.embedding if embeddings else 0)
                assert bits != "mixed"
                return (few * bits / 8 + (self.parameters - few) * 4) / 1e6
            case TrimWeightsStep(storage="sparse") if (trimmed := _trimmed(step)) is not None:
                among = linear + (self.embedding if step.embeddings else 0.0)
                return (self.parameters * 4 - among * max(4 * trimmed - 1 / 8, 0.0)) / 1e6
            case _:
                return self.parameters * 4 / 1e6


def _copies(step: StepConfig, tasks: int) -> float:
    """How often the weights are written, in float32."""
    if not isinstance(step, ExportStep):
        return 1
    # Of transformers.js each task has its graph in 32, 8 and 4 bits.
    by_format = {"vanilla": tasks, "onnx": 1 + (tasks if step.per_task else 0), "transformers_js": tasks * 44 / 32}
    return sum(by_format.get(name, 1) for name in step.formats)


def _shape_of(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> _Shape:
    """Of a saved model, cut as its config says."""
    if isinstance(config, MultiTaskConfig):
        config, structure = config.encoder_config(), (config.structure or {}).get("main")
    else:
        mark = read_mark(config)
        structure = None if mark is None else mark.structure
    with torch.device("meta"):
        model: PreTrainedModel = AutoModel.from_config(config, trust_remote_code=trust_remote_code)
        if structure:
            apply_structure(model, structure)
    anatomy = find_anatomy(model)
    table = model.get_input_embeddings()
    embedding, tokens = (
        (table.weight.numel(), table.num_embeddings) if isinstance(table, torch.nn.Embedding) else (0, 0)
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    layers = sum(parameter.numel() for layer in anatomy.layers for parameter in layer.module.parameters())
    feed_forward = sum(
        parameter.numel()
        for layer in anatomy.layers
        for part in (*layer.feed_forward.inputs.values(), layer.feed_forward.output)
        for parameter in part.parameters()
    )
    return _Shape(
        len(anatomy.layers), layers - feed_forward, feed_forward, embedding, total - layers - embedding, tokens
    )


def _finds_ranges_in_calls(step: StepConfig) -> bool:
    match step:
        case QuantizeStep(backend="onnxruntime", bits=8 | "mixed", calibration=None):
            return True
        case _:
            return False


def _trimmed(step: TrimWeightsStep) -> float | None:
    """Fraction of the weights that a step trims; None where only the weights could tell."""
    if step.pattern is not None:
        kept, group = map(int, step.pattern.split(":"))
        return 1 - kept / group
    return step.sparsity


def _tokens_left(step: TrimVocabularyStep, recipe: Recipe, sources: Sources) -> int:
    reader = recipe_reader(recipe)
    tokenizer = reader.processor
    counts = count_tokens(tokenizer, texts_to_keep(step, RunContext(recipe, Path(), sources, reader)))
    try:
        return len(trim_tokenizer(tokenizer, counts, minimum_count=step.minimum_count, size=step.size).rows)
    except DataError as error:
        raise RecipeError(f"steps.{step.name}.{error}") from error


def _training_size(step: StepConfig, recipe: Recipe, rows: int) -> dict[str, Any]:
    """Optimizer steps of the training in a step; None where it has none."""
    match step:
        case PruneStep():
            trainings = recoveries(step, recipe.training)
        case TrimWeightsStep() | QuantizeStep():
            trainings = [] if step.recover is None else [step.recover]
        case _:
            trainings = [step]
    steps, batch = 0, 0
    for training in trainings:
        if not isinstance(training, FinetuneStep | PretrainStep | DistillStep):
            return {"formats": list(step.formats)} if isinstance(step, ExportStep) else {}
        merged = merged_training(training, recipe.training)
        batch = (merged.batch_size or 8) * (merged.gradient_accumulation_steps or 1)
        epochs = merged.epochs if merged.epochs is not None else 3.0
        steps += merged.max_steps if merged.max_steps is not None else math.ceil(math.ceil(rows / batch) * epochs)
    return {"optimizer_steps": steps, "batch_size": batch} if trainings else {}


def plan_text(plan: dict[str, Any], output: Path) -> str:
    """The plan for a reader."""
    lines = ["Rows"]
    for name, splits in plan["rows"].items():
        lines.append(f"  {name}: " + ", ".join(f"{role} {count:,}" for role, count in splits.items()))
    lines.append("Encoded together")
    lines += [f"  {' + '.join(group)}" for group in plan["groups"]]
    lines.append(f"Steps (result in {output})")
    for number, step in enumerate(plan["steps"], 1):
        training = (
            f", {step['optimizer_steps']:,} steps of {step['batch_size']} rows" if "optimizer_steps" in step else ""
        )
        tokens = f"{step['tokens']:,} tokens, " if "tokens" in step else ""
        lines.append(
            f"  {number}. {step['step']} ({step['kind']}{' from ' + step['from'] if step['from'] else ''}): "
            f"{step['layers']} layers, {tokens}about {step['parameters'] / 1e6:.1f} M parameters, "
            f"{step['estimated_mb']:.1f} MB{training}"
        )
        if "note" in step:
            lines.append(f"     {step['note']}")
    return "\n".join(lines)
