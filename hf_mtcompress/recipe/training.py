"""How a model is trained: the encoder to start from, mixing, fusion and the optimizer."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """The pretrained encoder that all tasks share."""

    path: str
    """Hub id or local folder."""
    hub_id: str | None = None
    """Name for the card where `path` is a local folder."""
    revision: str | None = None
    """Branch, tag or commit of the Hub."""
    max_length: int | None = None
    """Longest input in tokens; default: what the tokenizer says, at most 512."""
    image_size: int | None = None
    """Side of the square input in pixels; default: what the image processor says."""
    trust_remote_code: bool = False
    """Whether code that comes with the checkpoint may run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixingConfig:
    """How often each source of rows is drawn."""

    strategy: Literal[
        "proportional", "temperature", "annealed", "uniform", "round_robin", "weights", "loss", "score_gap"
    ] = "proportional"
    """By number of rows; by their root; by a root that grows more even from epoch to epoch; all alike; in turns; by
    `weights`; by training loss; by distance to the best known validation score."""
    temperature: float = 2.0
    """Used by `temperature`, rows ** (1 / temperature): 1 is proportional, larger is more even."""
    cap: int | None = None
    """Rows of a source beyond this number do not count for how often it is drawn."""
    weights: dict[str, float] | None = None
    """By task, for `weights`; those of tasks that share rows add up, and rows of weight 0 are left out."""
    targets: dict[str, float] | None = None
    """By task, for `score_gap`: the best known score, such as that of a model of its own; default: 1."""
    batches: Literal["one_source", "mixed"] = "one_source"
    """Whether a batch holds rows of one source or of several."""
    task_patience: int | None = None
    """Stop a task when its validation score did not get better for so many evaluations; the others go on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FusionConfig:
    """How the losses of the tasks become one: the sum of weight * factor * loss / normaliser."""

    kind: Literal["sum", "product", "uncertainty", "dwa", "random", "famo", "gradient_norm"] = "sum"
    """How the factor is learned: not at all; one over the loss; by uncertainty; by how fast losses fall from epoch to
    epoch; at random; by how fast logs of losses fall; measured once from gradient norms, then fixed."""
    rate: float | None = None
    """Step size of `uncertainty` and `famo`."""
    temperature: float | None = None
    """Of `dwa`: larger is more even."""
    share: float | None = None
    """Share of the steps in which `gradient_norm` measures."""
    combination: Literal["mean", "pcgrad", "mgda", "cagrad", "upgrad", "aligned_mtl", "imtl_g", "nash_mtl"] | None = (
        None
    )
    """Combine the tasks' gradients instead of adding them up; needs the extra `surgery`, and several tasks in a step:
    on the same rows, with `batches: mixed`, or with `gradient_accumulation_steps`."""
    scope: Literal["features", "last_block", "full"] = "features"
    """Where gradients are compared for `combination`: at the encoder's output (cheap), in its last layer, or in all
    layers (a backward pass for each task)."""
    measure_every: int | None = None
    """Compare the tasks' gradients every so many optimizer steps, for the report on how they get along."""
    measure_on: Literal["train", "validation"] = "train"
    """On which rows: a batch of each source, where `scope` says; or 100 validation rows of each, at all layers, which
    is dearer and what `group-tasks` goes by."""
    normalize: Literal["chance", "none"] = "chance"
    """`chance` divides a loss by what an uninformed guess costs: log(labels), or the variance of a regression label."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Optimisation; `None` takes the recipe's `training` section, then the default of `TrainingArguments`."""

    epochs: float | None = None
    """Passes over the training rows."""
    max_steps: int | None = None
    """Optimizer steps, instead of `epochs`."""
    learning_rate: float | None = None
    """Highest learning rate."""
    head_learning_rate: float | None = None
    """Of the heads, which start from nothing; default: `learning_rate`."""
    batch_size: int | None = None
    """Rows per device and step."""
    eval_batch_size: int | None = None
    """Rows per device in evaluation."""
    gradient_accumulation_steps: int | None = None
    """Batches whose gradients make one optimizer step."""
    warmup_steps: float | None = None
    """Steps, or a fraction of all steps below 1."""
    weight_decay: float | None = None
    """Decay of the weights, not of biases and norms."""
    l1_penalty: float | None = None
    """Pulls the encoder's linear weights towards 0 by the learning rate times this after each step, and leaves them
    there: exact zeros, and weights that can be trimmed with less harm."""
    l2_penalty: float | None = None
    """Adds half of this times the sum of the squares of the encoder's linear weights to the loss. `weight_decay` pulls
    at heads and embeddings too, and past the optimizer."""
    lr_scheduler_type: str | None = None
    """How the learning rate changes, such as `linear` or `cosine`."""
    bf16: bool | None = None
    """Whether to compute in bfloat16."""
    save_steps: int | None = None
    """Checkpoint every so many steps; default: once an epoch."""
    keep: Literal["best", "last"] | None = None
    """Which weights are kept: the best validation average (default), or the last."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Any other field of `transformers.TrainingArguments`."""
