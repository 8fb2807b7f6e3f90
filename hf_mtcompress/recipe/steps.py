"""The steps of a recipe, one frozen class each, joined in the union `StepConfig`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from hf_mtcompress.recipe.criteria import (
    CriterionConfig,
    EmbeddingCriterionConfig,
    FeatureMapCriterionConfig,
    HiddenCriterionConfig,
    LogitsCriterionConfig,
    RelationsCriterionConfig,
)
from hf_mtcompress.recipe.data import DataConfig
from hf_mtcompress.recipe.schedules import OneShotSchedule, ScheduleConfig
from hf_mtcompress.recipe.tasks import WeightSchedule
from hf_mtcompress.recipe.timing import TimingConfig
from hf_mtcompress.recipe.training import TrainingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig:
    """Where a student comes from: layers of the teacher, another checkpoint, or nothing but a shape."""

    layers: int | tuple[int, ...] | None = None
    """How many layers of the teacher, or which ones, counted from 0."""
    choose: Literal["spaced", "first", "last", "redundancy", "leave_one_out"] = "spaced"
    """Which layers, where `layers` is a number: evenly spaced with the last one kept; the first or last ones; those
    that change their input most, or those without which the tasks' losses grow most, measured on training rows."""
    heads: float = 0.0
    """Fraction of the attention heads of those layers to leave out, the smallest first."""
    feed_forward: float = 0.0
    """Fraction of the feed-forward neurons of those layers to leave out, the smallest first."""
    path: str | None = None
    """Another pretrained encoder, instead of layers of the teacher."""
    config: dict[str, Any] | None = None
    """Fields of the teacher's config to change, such as `{hidden_size: 192}`, for a student with fresh weights; the
    teacher's embeddings are carried over where they fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """One of several teachers whose answers are averaged."""

    path: str
    """A step of this recipe, or the folder or Hub id of a saved model."""
    weight: float = 1.0
    """Above 0, beside the weights of the others."""


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
    drop_auxiliary: bool = False
    """Take auxiliary tasks out of the model once it is trained, with branches and encoders that only they read; steps
    that build on it have the main tasks alone."""


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
    teacher: str | None = None
    """A step of this recipe, or the folder or Hub id of a saved model: multi-task, stock (of one task) or ONNX. Where
    its tokenizer is another, each reads the texts for itself."""
    teachers: dict[str, str] | tuple[TeacherConfig, ...] | None = None
    """Several, instead of `teacher`: one for each task by its name, or a list whose answers are averaged."""
    student: StudentConfig | None = None
    """The model to make and train, instead of going on from a step."""
    criteria: tuple[CriterionConfig, ...] = (LogitsCriterionConfig(), HiddenCriterionConfig())
    """What the student imitates: words (logits, hidden, relations, embedding, feature_map), or sections with more."""
    label_weight: float | WeightSchedule = 0.5
    """Share of the loss on the true labels; the rest is the criteria's. `{from: 0, to: 1}` goes from the teacher to the
    labels."""
    teacher_cache: bool | str = False
    """Ask the teacher once about all rows and keep its answers: true in the folder of the run, or a folder that several
    runs share. Images must not be augmented at random."""
    cache_precision: Literal["float16", "float32"] = "float16"
    """Of the numbers in the cache."""
    unlabelled: bool = True
    """Whether rows of a task's `unlabelled` source are trained on too; the teacher labels them."""
    every_task: bool = False
    """Let the teacher answer every task on every text that the task can read, not only on the task's own rows."""
    drop_auxiliary: bool = False
    """Take auxiliary tasks out of the model once it is trained, with branches and encoders that only they read; steps
    that build on it have the main tasks alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainStep(TrainingConfig):
    """Train a student to encode like its teacher, on texts or images without labels; a distill step comes after it.

    ```yaml
    - {kind: pretrain, name: general, teacher: teacher, student: {layers: 3}, criteria: [relations], epochs: 2}
    ```
    """

    kind: Literal["pretrain"] = "pretrain"
    """Always `pretrain`."""
    name: str | None = None
    """Name of the step and of its folder in the run; default: the kind, made unique by a number."""
    source: str | None = None
    """The step that is trained on; default: the latest. Not together with `student`."""
    teacher: str
    """A step of this recipe, or the folder or Hub id of a saved multi-task model or of a pretrained encoder."""
    student: StudentConfig | None = None
    """The model to make and train, instead of going on from a step."""
    criteria: tuple[
        HiddenCriterionConfig | RelationsCriterionConfig | EmbeddingCriterionConfig | FeatureMapCriterionConfig, ...
    ] = (RelationsCriterionConfig(),)
    """What the student imitates: words (relations, hidden, embedding, feature_map), or sections with more."""
    data: DataConfig | None = None
    """Rows to train on, their train split; default: the training rows and `unlabelled` rows of the tasks."""
    column: str = "text"
    """Column of `data` with the texts or images."""
    teacher_cache: bool | str = False
    """As in a distill step."""
    cache_precision: Literal["float16", "float32"] = "float16"
    """Of the numbers in the cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneStep:
    """Remove the least important heads, feed-forward neurons and layers, then repair and recover.

    ```yaml
    - {kind: prune, from: student, heads: 0.3, feed_forward: 0.5, recover: {kind: distill, teacher: teacher, epochs: 2}}
    - {kind: prune, from: student, compute: 0.5, importance: fisher, rearrange: true, repair: true}
    - {kind: prune, from: student, latency: 0.6, timing: {runtime: onnx_int8, batch_sizes: [1]}, importance: fisher}
    - {kind: prune, from: student, width: 0.25, recover: {kind: distill, teacher: teacher, epochs: 4}}
    - {kind: prune, compute: 0.5, schedule: {kind: gradual}, recover: {kind: distill, teacher: teacher, epochs: 4}}
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
    width: float = 0.0
    """Fraction of the numbers in the hidden states to remove, and as many heads; alone in its step, and before layers
    are cut unevenly. What is left loads with plain transformers, and needs a recovery of some length."""
    compute: float = 0.0
    """Instead of `heads` and `feed_forward`: fraction of the multiply-adds of the encoder's layers to remove; heads,
    neurons and `layers` count together."""
    length: int | None = None
    """Tokens of a row that `compute` is counted at; default: the mean of the rows that importance is measured on."""
    latency: float = 0.0
    """Instead of `heads`, `feed_forward` and `compute`: fraction of the time of a call to remove, as it is measured on
    this machine; whole blocks may go, and layers unless `layers` says how many."""
    timing: TimingConfig = field(default_factory=TimingConfig)
    """On what `latency` is measured."""
    importance: Literal["first_order", "fisher", "magnitude", "activation", "random"] = "first_order"
    """What counts as important: how much the loss would change (on data; `fisher` puts heads and neurons on one
    scale), how large the weights are, how much flows through a part, or chance."""
    combine: Literal["mean", "sum", "max", "max_min"] = "mean"
    """How the tasks' importance becomes one: the mean or largest of their shares, the sum as it is, or so that the task
    that loses most loses least."""
    rearrange: bool = False
    """Swap heads and neurons within each layer where that hurts the losses less; with `importance: fisher`."""
    repair: bool = False
    """After the cut, solve the output projections anew so that hidden states stay near those before; no training."""
    rows: int = 512
    """Training rows that the importance is measured on, and the repair; validation rows that `candidates` are scored
    on."""
    candidates: int = 1
    """With `importance: random`: try so many random cuts and keep the one with the best validation average."""
    schedule: ScheduleConfig = field(default_factory=OneShotSchedule)
    """When it is removed: all at once (`{kind: one_shot}`), in rounds with a part of the recovery after each
    (`iterative`), or step by step during the recovery (`gradual`)."""
    multiple_of: int = 32
    """Feed-forward widths are rounded to multiples of this, which is what kernels like."""
    shape: Literal["free", "vanilla"] = "free"
    """`vanilla` for what plain transformers can load: whole layers go, all feed-forward parts get the same width, and
    heads stay; `compute` and `latency` then choose that width."""
    recover: FinetuneStep | DistillStep | None = None
    """Training after the cut: a finetune or distill section without `name`, `from` and `student`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrimVocabularyStep:
    """Keep the tokens that texts use, in tokenizer and word embedding alike; on such texts no answer changes.

    ```yaml
    - {kind: trim_vocabulary, from: student, minimum_count: 2}
    ```
    """

    kind: Literal["trim_vocabulary"] = "trim_vocabulary"
    """Always `trim_vocabulary`."""
    name: str | None = None
    """Name of the step and of its folder in the run; default: the kind, made unique by a number."""
    source: str | None = None
    """The step to start from; default: the latest float model, else the recipe's encoder."""
    minimum_count: int = 1
    """Tokens that are used less often are cut; special tokens and single characters always stay."""
    size: int | None = None
    """At most so many tokens, the most frequent ones."""
    corpus: DataConfig | None = None
    """Texts whose tokens are kept, their train split; default: training and validation texts of the tasks."""
    column: str = "text"
    """Column of `corpus` with the texts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrimWeightsStep:
    """Set single weights of small magnitude to 0, and store the model without them: smaller on disk, not faster.

    ```yaml
    - {kind: trim_weights, from: student, sparsity: 0.5, recover: {kind: distill, teacher: teacher, epochs: 2}}
    ```
    """

    kind: Literal["trim_weights"] = "trim_weights"
    """Always `trim_weights`."""
    name: str | None = None
    """Name of the step and of its folder in the run; default: the kind, made unique by a number."""
    source: str | None = None
    """The finetune, distill or prune step to start from; default: the latest of them."""
    sparsity: float | None = None
    """Fraction of the weights of the encoder's linear layers that are 0 afterwards."""
    threshold: float | None = None
    """Instead of `sparsity`: weights of smaller magnitude are trimmed; with `scope: layer`, in standard deviations of
    each matrix."""
    pattern: str | None = None
    """Instead of `sparsity`: N:M such as `"2:4"`, in quotes; of every M weights next to each other in a row the N
    largest stay."""
    scope: Literal["global", "layer"] = "global"
    """Whether weights are compared over all matrices or within each one."""
    embeddings: bool = False
    """Whether the word embedding is trimmed too."""
    storage: Literal["sparse", "dense"] = "sparse"
    """`sparse` stores the weights that are left and one bit for each place; `dense` stores zeros like any number."""
    recover: FinetuneStep | DistillStep | None = None
    """Training after the cut, in which trimmed weights stay 0: a finetune or distill section without `name`, `from` and
    `student`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationConfig:
    """Ranges of activations fixed beforehand on training rows, instead of found while the model runs."""

    method: Literal["percentile", "entropy", "minmax"] = "percentile"
    """`percentile` leaves out the rarest numbers, `entropy` takes the range that changes the distribution least,
    `minmax` takes all."""
    rows: int = 256
    """Training rows, over the tasks of the step."""
    percentile: float = 99.99
    """With `percentile`: the share of the numbers inside the range, in percent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedConfig:
    """Bits for each part of the model, by how far answers move when that part alone is stored in few bits.

    Parts are the embeddings, and attention and feed-forward part of each layer. Layers of branches, and encoders with
    adapters, are one part together with all other matrices.
    """

    choices: tuple[Literal[4, 8, 16, 32], ...] = (4, 8, 16)
    """Bits that a part may get."""
    size_mb: float | None = None
    """Size of the graph in megabytes (10^6 bytes): answers of main tasks are kept as close to float as it allows.
    Default: a small graph that reaches the step's `retention` on the validation rows, found by halving among 40."""
    rows: int = 256
    """Training rows that answers are compared on, over the tasks of the step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeStep:
    """Store weights in 16, 8 or 4 bits, or each part of the model in as many as it needs.

    ```yaml
    - {kind: quantize, from: pruned, backend: onnxruntime, bits: mixed, mixed: {size_mb: 8}}
    - {kind: quantize, from: pruned, backend: onnxruntime, bits: 8}
    - {kind: quantize, from: pruned, backend: openvino, bits: 8, calibration: {rows: 256}}
    ```
    """

    kind: Literal["quantize"] = "quantize"
    """Always `quantize`."""
    name: str | None = None
    """Name of the step and of its folder in the run; default: the kind, made unique by a number."""
    source: str | None = None
    """The finetune, distill or prune step to start from; default: the latest of them."""
    backend: Literal["bitsandbytes", "torchao", "onnxruntime", "openvino"]
    """`onnxruntime` and `openvino` export a graph and are fast on CPUs; `bitsandbytes` and `torchao` stay in torch."""
    bits: Literal[16, 8, 4, "mixed"] = 8
    """With `onnxruntime` only: 16, half precision, which halves the file at the speed of float; and `mixed`."""
    mixed: MixedConfig | None = None
    """With `bits: mixed`: what may be chosen from, and how large the graph may be."""
    block_size: int = 64
    """With `onnxruntime` where something is in 4 bits: weights that share a scale, 16, 32, 64, 128 or 256. Smaller is
    closer to float and larger on disk."""
    embedding_bits: Literal[8, 4] | None = None
    """With `onnxruntime` in 8 (dynamic) or 4 bits: bits of the embeddings; default: as many as `bits`. 8 bits with
    4 here are smaller than 8, and about as fast."""
    float_layers: tuple[int, ...] = ()
    """With `onnxruntime` in 8 or 4 bits: encoder layers whose matrices stay in float, counted from 0."""
    calibration: CalibrationConfig | None = None
    """With `onnxruntime` in 8 bits: ranges of activations are measured on training rows and fixed (static); default:
    they are found while the model runs (dynamic), over all rows of a call, so that an answer can change with the rows
    beside it. `openvino` always measures them and takes `rows` alone."""
    retention: float | None = None
    """The gate: share of the validation scores of the float model it starts from that must be kept, as a mean over
    the main tasks. The saved files are scored; below this the step fails."""
    worst_task_retention: float | None = None
    """The same for the task that keeps least."""
    keep: bool = False
    """Keep a result that does not reach these limits; record and card then say so."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """Of 4 bits with `bitsandbytes`: quantiles of a normal distribution, or floats of 4 bits."""
    double_quantization: bool = False
    """Of 4 bits with `bitsandbytes`: the scales of the blocks in 8 bits too."""
    embeddings: bool = False
    """With `bitsandbytes`: the word embedding in as many bits too; `onnxruntime` always does so."""
    recover: FinetuneStep | DistillStep | None = None
    """With `onnxruntime` in 8 (dynamic) or 4 bits: training before weights are stored, with numbers rounded as they
    will be; a finetune or distill section without `name`, `from` and `student`. The float model may be the teacher."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportStep:
    """Write the model in forms that need less than this package: plain transformers folders, ONNX, transformers.js.

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
    formats: tuple[Literal["vanilla", "onnx", "openvino", "transformers_js"], ...] = ("vanilla",)
    """`vanilla`: one plain transformers folder for each task; `onnx` and `openvino`: one graph with all heads, in
    float32; `transformers_js`, beside `onnx`: one folder for each task that transformers.js opens, with its graph in
    32, 8 and 4 bits."""
    per_task: bool = False
    """With `onnx`: write a graph of its own for each task, too, with nothing in it that the task does not need."""


StepConfig = (
    FinetuneStep
    | PretrainStep
    | DistillStep
    | PruneStep
    | TrimVocabularyStep
    | TrimWeightsStep
    | QuantizeStep
    | ExportStep
)
"""Every step of a recipe, told apart by `kind`."""


def teachers_of(step: StepConfig) -> tuple[str, ...]:
    """Steps and saved models that teach in a step, in its recovery if it has one."""
    match step:
        case DistillStep(teachers=dict() as teachers):
            return tuple(dict.fromkeys(teachers.values()))
        case DistillStep(teachers=tuple() as teachers):
            return tuple(item.path for item in teachers)
        case DistillStep() | PretrainStep():
            return () if step.teacher is None else (step.teacher,)
        case (
            PruneStep(recover=DistillStep() as recover)
            | TrimWeightsStep(recover=DistillStep() as recover)
            | QuantizeStep(recover=DistillStep() as recover)
        ):
            return teachers_of(recover)
        case _:
            return ()


FLOAT_STEPS = ("finetune", "pretrain", "distill", "prune", "trim_vocabulary", "trim_weights")
"""Kinds of steps that leave a model in float, from which others may start; quantized and exported ones are leaves."""
