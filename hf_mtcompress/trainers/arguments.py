"""Training arguments: those of transformers and a few of our own."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

from transformers import TrainingArguments

from hf_mtcompress.data.mixing import Strategy
from hf_mtcompress.errors import TrainingError
from hf_mtcompress.losses.gradients import COMBINATIONS
from hf_mtcompress.trainers.surgery import SCOPE_WORDS

_WORDS: dict[str, Collection[str]] = {
    "mixing": get_args(Strategy),
    "batches": ("one_source", "mixed"),
    "normalize_losses": ("chance", "none"),
    "gradient_combination": COMBINATIONS,
    "surgery_scope": tuple(SCOPE_WORDS),
    "measure_on": ("train", "validation"),
}
_COUNTS = ("mixing_cap", "task_patience", "measure_interference")


@dataclass
class MultiTaskTrainingArguments(TrainingArguments):
    """`TrainingArguments` plus mixing and fusion. Plain `TrainingArguments` work too, with these defaults."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "mixing_weights",
        "mixing_targets",
        "fusion_options",
    ]

    mixing: str = field(
        default="proportional",
        metadata={
            "help": "How sources of rows are mixed: proportional, temperature, annealed, uniform, round_robin, "
            "weights, loss (by training loss) or score_gap (by distance to the best known validation score)."
        },
    )
    mixing_temperature: float = field(
        default=2.0, metadata={"help": "Temperature of mixing='temperature'; 1 is proportional, large is uniform."}
    )
    mixing_cap: int | None = field(
        default=None, metadata={"help": "Rows of a source beyond this number do not count for how often it is drawn."}
    )
    mixing_weights: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "By task, for mixing='weights'; tasks that share rows add up; 0 leaves rows out."},
    )
    mixing_targets: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "By task, for mixing='score_gap': the best known score, such as a single-task model's."},
    )
    batches: str = field(
        default="one_source",
        metadata={"help": "'one_source': every batch holds rows of one source; 'mixed': of several."},
    )
    fusion: str = field(
        default="sum",
        metadata={
            "help": "How losses become one: sum, product, uncertainty, dwa, random, famo or gradient_norm (weights "
            "fixed after a short measuring phase)."
        },
    )
    fusion_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Options of that fusion, such as {"rate": 0.02}.'}
    )
    gradient_combination: str | None = field(
        default=None,
        metadata={
            "help": "Combine the tasks' gradients by mean, pcgrad, mgda, cagrad, upgrad, aligned_mtl, imtl_g or "
            "nash_mtl instead of adding them up. Needs the extra 'surgery'."
        },
    )
    surgery_scope: str = field(
        default="features",
        metadata={"help": "Where those gradients are compared: features (cheap), last_block or full (dear)."},
    )
    task_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop a task when its score did not get better for so many evaluations: its head is frozen, its "
            "loss counts no more, and rows that no other task reads leave the mix with the next epoch."
        },
    )
    measure_interference: int | None = field(
        default=None,
        metadata={
            "help": "Compare the tasks' gradients every so many optimizer steps; `trainer.interference()` reports them."
        },
    )
    measure_on: str = field(
        default="train",
        metadata={
            "help": "Where measure_interference compares them: train (a batch of each source, where surgery_scope "
            "says) or validation (100 rows of each source of eval_dataset, at all layers of the encoder: dearer, and "
            "what grouping tasks goes by)."
        },
    )
    head_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Of the heads, which start from nothing; default: learning_rate, which the encoder has."},
    )
    l1_penalty: float = field(
        default=0.0,
        metadata={
            "help": "Pull the linear weights of the encoder towards 0 by learning rate * l1_penalty after each step, "
            "and leave them there; for trimming."
        },
    )
    l2_penalty: float = field(
        default=0.0,
        metadata={
            "help": "Add l2_penalty / 2 times the sum of the squares of the encoder's linear weights to the loss; "
            "weight_decay is not part of the loss."
        },
    )
    normalize_losses: str = field(
        default="chance",
        metadata={"help": "'chance' divides each task's loss by that of an uninformed guess; 'none' leaves it."},
    )


@dataclass
class DistillationTrainingArguments(MultiTaskTrainingArguments):
    """Adds what distillation needs."""

    criteria: list[str] | str = field(
        default="logits,hidden",
        metadata={
            "help": "Criteria among logits, hidden, relations, embedding and feature_map: a list, or with commas."
        },
    )
    temperature: float = field(default=2.0, metadata={"help": "Softens the logits that are compared; above 0."})
    label_weight: float = field(
        default=0.5, metadata={"help": "Share of the loss on true labels, in [0, 1]; the rest is the criteria's."}
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder for what the teacher says of the training rows. It is asked once, whatever the epochs, and "
            "other runs with the same teacher and rows find its answers there. Default: it runs beside the student."
        },
    )
    cache_precision: str = field(default="float16", metadata={"help": "Of the numbers in it: float16 or float32."})
    every_task: bool = field(
        default=False,
        metadata={
            "help": "Let the teacher answer every task on every text that the task can read, not only on its own rows."
        },
    )
    probe_rows: int = field(
        default=64,
        metadata={
            "help": "Labelled rows of each source on which the teacher must be better than a guess; 0 trusts it."
        },
    )


def names_in(value: Sequence[str] | str) -> list[str]:
    """Names that stand in a list or between commas, or both, as a command line has them."""
    return [name.strip() for part in ([value] if isinstance(value, str) else value) for name in part.split(",")]


def check_arguments(args: TrainingArguments, tasks: Collection[str]) -> None:
    """Look for values that would train something else than was meant, or stop the training late.

    Args:
        args: ours, or plain ones, of which nothing is wrong.
        tasks: names of the model's tasks.

    Raises:
        TrainingError: all of them at once.
    """
    problems = []
    for key, words in _WORDS.items():
        value = getattr(args, key, None)
        if value is not None and value not in words:
            problems.append(f"{key}: expected one of {', '.join(words)}, found {value!r}")
    for key in _COUNTS:
        value = getattr(args, key, None)
        if value is not None and (not isinstance(value, int) or value < 1):
            problems.append(f"{key}: expected a whole number of at least 1, found {value!r}; leave it out for none")
    temperature = getattr(args, "mixing_temperature", 1.0)
    if not _is_number(temperature) or temperature <= 0:
        problems.append(f"mixing_temperature: expected a number above 0, found {temperature!r}")
    for key, least in (("mixing_weights", "at least 0"), ("mixing_targets", "above 0")):
        given = getattr(args, key, None)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            problems.append(f"{key}: expected numbers by task, found {given!r}")
            continue
        if unknown := [name for name in given if name not in tasks]:
            problems.append(f"{key}: expected task names among {list(tasks)}, found {unknown}")
        wrong = {
            name: value
            for name, value in given.items()
            if not _is_number(value) or value < 0 or (value == 0 and least == "above 0")
        }
        if wrong:
            problems.append(f"{key}: expected numbers {least}, found {wrong}")
    if getattr(args, "mixing", None) == "weights":
        weights = getattr(args, "mixing_weights", None)
        if not weights or (isinstance(weights, Mapping) and not any(weights.values())):
            problems.append(
                f"mixing_weights: expected weights by task, not all 0, with mixing='weights', found {weights!r}"
            )
    if problems:
        raise TrainingError("; ".join(problems))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
