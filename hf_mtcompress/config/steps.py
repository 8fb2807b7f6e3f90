"""The steps of a recipe, one frozen class each, joined in the union `StepConfig`."""

from dataclasses import dataclass
from typing import Literal

from hf_mtcompress.config.training import TrainingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig:
    """Where a student comes from: layers of the teacher, or another checkpoint."""

    layers: int | tuple[int, ...] | None = None
    """How many layers (evenly spaced, the last one kept), or which ones, counted from 0."""
    path: str | None = None
    """Another pretrained encoder, instead of layers of the teacher."""


AdapterTargets = Literal["attention", "feed_forward", "all"]
"""Linear layers that an adapter adds to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """Low-rank layers that a task adds to a frozen encoder (LoRA)."""

    rank: int = 8
    """Width between the two matrices whose product is added to a layer."""
    alpha: float = 16.0
    """The product is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of a layer's inputs that the adapter does not see while it is trained."""
    targets: AdapterTargets = "attention"
    """Which layers: projections and output of the attention, inputs and output of the feed-forward part, or both."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneStep(TrainingConfig):
    """Train all tasks on their labels.

    ```yaml
    - {kind: finetune, name: teacher, epochs: 3, learning_rate: 5.0e-5}
    - {kind: finetune, name: adapted, epochs: 3, learning_rate: 5.0e-4, adapters: {rank: 8}}
    ```
    """

    kind: Literal["finetune"] = "finetune"
    """Always `finetune`."""
    name: str | None = None
    """Name of the step and of its folder in the run; default: the kind, made unique by a number."""
    source: str | None = None
    """The finetune, distill or prune step to start from; default: the latest of them, else the recipe's encoder."""
    adapters: AdapterConfig | None = None
    """Freeze the encoder and give each task an adapter of its own, trained with its head; `{}` takes the defaults."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillStep(TrainingConfig):
    """Train a student to answer like its teacher.

    ```yaml
    - {kind: distill, name: student, teacher: teacher, student: {layers: 3}, criteria: [logits, hidden], epochs: 6}
    ```
    """

    kind: Literal["distill"] = "distill"
    """Always `distill`."""
    name: str | None = None
    """Name of the step and of its folder in the run; default: the kind, made unique by a number."""
    source: str | None = None
    """The finetune, distill or prune step that is trained on; default: the latest. Not together with `student`."""
    teacher: str
    """A step of this recipe, or the path of a saved multi-task or stock model."""
    student: StudentConfig | None = None
    """The model to make and train, instead of going on from a step."""
    criteria: tuple[Literal["logits", "hidden"], ...] = ("logits", "hidden")
    """What the student imitates: the teacher's answers, its hidden states."""
    temperature: float = 2.0
    """Softens the answers that are imitated; 1 leaves them as they are."""
    label_weight: float = 0.5
    """Share of the loss on the true labels; the rest is the criteria's."""
    hidden_weight: float = 1.0
    """Weight of `hidden` beside `logits`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneStep:
    """Remove the least important heads, feed-forward neurons and layers, then recover.

    ```yaml
    - {kind: prune, from: student, heads: 0.3, feed_forward: 0.5, recover: {kind: distill, teacher: teacher, epochs: 2}}
    ```
    """

    kind: Literal["prune"] = "prune"
    """Always `prune`."""
    name: str | None = None
    """Name of the step and of its folder in the run; default: the kind, made unique by a number."""
    source: str | None = None
    """The finetune, distill or prune step to start from; default: the latest of them."""
    heads: float = 0.0
    """Fraction of all attention heads to remove."""
    feed_forward: float = 0.0
    """Fraction of all feed-forward neurons to remove."""
    layers: int = 0
    """Number of whole layers to remove."""
    importance: Literal["first_order", "magnitude"] = "first_order"
    """What counts as important: how much the loss would change (measured on data), or how large the weights are."""
    rows: int = 512
    """Training rows that the importance is measured on."""
    multiple_of: int = 32
    """Feed-forward widths are rounded to multiples of this, which is what kernels like."""
    recover: FinetuneStep | DistillStep | None = None
    """Training after the cut: a finetune or distill section without `name`, `from` and `student`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeStep:
    """Store weights in 8 or 4 bits.

    ```yaml
    - {kind: quantize, from: pruned, backend: onnxruntime, bits: 8}
    ```
    """

    kind: Literal["quantize"] = "quantize"
    """Always `quantize`."""
    name: str | None = None
    """Name of the step and of its folder in the run; default: the kind, made unique by a number."""
    source: str | None = None
    """The finetune, distill or prune step to start from; default: the latest of them."""
    backend: Literal["bitsandbytes", "onnxruntime"]
    """`onnxruntime` exports a graph and is fast on CPUs; `bitsandbytes` stays in torch."""
    bits: Literal[8, 4] = 8
    """4 needs `bitsandbytes`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportStep:
    """Write the model in forms that need less than this package: plain transformers folders, ONNX in float32.

    ```yaml
    - {kind: export, formats: [vanilla, onnx]}
    ```
    """

    kind: Literal["export"] = "export"
    """Always `export`."""
    name: str | None = None
    """Name of the step and of its folder in the run; default: the kind, made unique by a number."""
    source: str | None = None
    """The finetune, distill or prune step to start from; default: the latest of them."""
    formats: tuple[Literal["vanilla", "onnx"], ...] = ("vanilla",)
    """`vanilla`: one plain transformers folder for each task; `onnx`: one graph with all heads."""


StepConfig = FinetuneStep | DistillStep | PruneStep | QuantizeStep | ExportStep
"""Every step of a recipe, told apart by `kind`."""

FLOAT_STEPS = ("finetune", "distill", "prune")
"""Kinds of steps that leave a model in float, from which others may start; quantized and exported ones are leaves."""
