"""Training arguments: those of transformers and a few of our own."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments


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

    criteria: str = field(
        default="logits,hidden",
        metadata={"help": "Comma-separated criteria among logits, hidden, relations, embedding and feature_map."},
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
