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
    """How often each source of rows is drawn. Probability is proportional to rows ** (1 / temperature)."""

    strategy: Literal["proportional", "temperature", "uniform", "round_robin"] = "proportional"
    """By number of rows, by a root of it, all alike, or in turns."""
    temperature: float = 2.0
    """Used by `temperature`: 1 is proportional, larger is more even."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FusionConfig:
    """How the losses of the tasks become one: the sum of weight * loss / normaliser."""

    kind: Literal["sum"] = "sum"
    """Always `sum`."""
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
