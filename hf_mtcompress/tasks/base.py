"""What every kind of task has in common: a name, labels, a loss, metrics and the way its inputs are encoded."""

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hf_mtcompress.errors import TaskError

NAME_PATTERN = re.compile(r"[a-z][a-z0-9_]*")
RESERVED_NAMES = frozenset({"average", "loss", "runtime", "epoch", "model_preparation_time", "label", "labels", "main"})
UNLABELLED = -100
_CHOICES = {"role": ("main", "auxiliary"), "head": ("stock", "linear", "mlp"), "pooling": (None, "cls", "mean", "max")}

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression", "token_classification"]


@dataclass
class Task(ABC):
    """One thing the model answers. The name joins data, head, loss, metrics and logs; nothing is counted by index.

    A saved model keeps the task without its column names (`to_dict`), since columns belong to the data.

    Args:
        name: matches `[a-z][a-z0-9_]*` and is not reserved.
        label: column with the label; rows that hold None (or -100) are unlabelled and count nowhere.
        labels: label names in order; None for regression, and until the data are known.
        metric: primary metric, the one in `average`; default: the kind's own.
        role: `auxiliary` tasks are trained but do not count in `average`.
        weight: factor of this task's loss in the fused loss, at least 0.
        final_weight: factor at the end of the training, reached linearly; None for the same throughout.
        head: `stock` (the head of the family's AutoModelFor class), `linear` or `mlp`.
        pooling: what a `linear` or `mlp` head reads: `cls`, `mean`, `max`; None takes the encoder's pooler, else `cls`.
        encoder: which encoder or branch of the model the task reads.
        layer: how many layers of the encoder the task reads, from 1; None for all. Final norm and pooler follow.

    Raises:
        TaskError: the name, labels, head, role or metric cannot work.
    """

    kind: ClassVar[str]

    name: str
    _: KW_ONLY
    label: str | None = None
    labels: Sequence[str] | None = None
    metric: str | None = None
    role: Literal["main", "auxiliary"] = "main"
    weight: float = 1.0
    final_weight: float | None = None
    head: Literal["stock", "linear", "mlp"] = "stock"
    pooling: Literal["cls", "mean", "max"] | None = None
    encoder: str = "main"
    layer: int | None = None
    class_weights: Sequence[float] | None = None
    label_smoothing: float = 0.0

    columns: ClassVar[tuple[str, ...]] = ("label",)
    """Fields that name columns of the data; they are not saved with the model."""

    def __post_init__(self) -> None:
        if not NAME_PATTERN.fullmatch(self.name) or self.name in RESERVED_NAMES:
            raise TaskError(
                f"expected a task name of lower-case letters, digits and underscores that starts with a letter and is "
                f"not one of {sorted(RESERVED_NAMES)}, found '{self.name}'; rename the task"
            )
        if isinstance(self.labels, str):
            raise TaskError(
                f"task '{self.name}': expected a list of labels, found the text {self.labels!r}; put it into a list"
            )
        if self.labels is not None:
            self.labels = tuple(str(label) for label in self.labels)
            if len(set(self.labels)) != len(self.labels):
                raise TaskError(
                    f"task '{self.name}': expected different labels, found a label twice; remove the double"
                )
        for field, known in _CHOICES.items():
            if (found := getattr(self, field)) not in known:
                raise TaskError(f"task '{self.name}': expected a {field} among {list(known)}, found {found!r}")
        if self.head == "stock" and self.pooling is not None:
            raise TaskError(
                f"task '{self.name}': a stock head has its own pooling, found pooling '{self.pooling}'; "
                "use head 'linear' or 'mlp' with it"
            )
        if self.layer is not None and self.layer < 1:
            raise TaskError(f"task '{self.name}': expected a layer of at least 1, found {self.layer}")
        if self.weight < 0 or (self.final_weight is not None and self.final_weight < 0):
            raise TaskError(
                f"task '{self.name}': expected weights of at least 0, found {self.weight} and {self.final_weight}"
            )
        if self.class_weights is not None:
            self.class_weights = tuple(float(weight) for weight in self.class_weights)
            if self.labels is not None and len(self.class_weights) != len(self.labels):
                raise TaskError(
                    f"task '{self.name}': expected one class weight for each of {len(self.labels)} labels, "
                    f"found {len(self.class_weights)}"
                )
        if self.metric is None and (self.labels or self.problem != "token_classification"):
            # Word labels decide whether spans are scored, so the choice waits until they are known.
            self.metric = self.default_metric
        if self.metric is not None and self.metric not in self.primary_metrics:
            raise TaskError(
                f"task '{self.name}': expected a primary metric among {sorted(self.primary_metrics)}, "
                f"found '{self.metric}'"
            )

    # ---- what a kind says of itself ----

    @property
    @abstractmethod
    def problem(self) -> ProblemType:
        """Which loss and metrics apply."""

    @property
    @abstractmethod
    def default_metric(self) -> str:
        """Primary metric where none is given."""

    @property
    @abstractmethod
    def primary_metrics(self) -> tuple[str, ...]:
        """Metrics that may be primary: higher is better."""

    @property
    @abstractmethod
    def auto_class(self) -> str:
        """Name of the transformers Auto class whose models answer this kind of task."""

    @property
    @abstractmethod
    def pipeline(self) -> str:
        """Name of the transformers pipeline that runs the exported task."""

    @property
    @abstractmethod
    def input_columns(self) -> tuple[str, ...]:
        """Columns that hold the input, in the order in which a reader takes them."""

    @abstractmethod
    def encode_labels(self, values: Sequence[Any], encoding: Mapping[str, Any]) -> list[Any]:
        """Turn raw labels into numbers that fit the encoded inputs; unlabelled rows become -100 or NaN.

        Raises:
            DataError: a value is not among the labels.
        """

    @abstractmethod
    def collate_labels(self, labels: Sequence[Any], length: int | None) -> Tensor:
        """Stack encoded labels to one tensor; `length` is the padded input length in tokens."""

    @abstractmethod
    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum of the loss over labelled items, a scalar."""

    @abstractmethod
    def item_count(self, labels: Tensor) -> Tensor:
        """How many labelled items `loss_sum` runs over (class weights counted), a scalar float."""

    @abstractmethod
    def chance_loss(self, labels: Sequence[Any]) -> float:
        """Mean loss of an uninformed guess on encoded training labels: the normaliser of this task's loss."""

    @abstractmethod
    def compute_metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Metrics of logits against encoded labels; unlabelled items are left out."""

    @abstractmethod
    def baseline(self, labels: Sequence[Any]) -> float:
        """Primary metric of the majority class or the mean predictor on encoded labels."""

    @abstractmethod
    def decode(self, logits: np.ndarray, encoding: Mapping[str, Any] | None = None) -> Any:
        """One row's answer in the words of the task."""

    # ---- shared behaviour ----

    @property
    def num_outputs(self) -> int:
        """Width of the logits.

        Raises:
            TaskError: the labels are not known yet.
        """
        if self.problem == "regression":
            return 1
        if not self.labels:
            raise TaskError(
                f"task '{self.name}': expected labels before a head is built, found none; "
                "pass labels=[...] or let the recipe read them from the data"
            )
        return len(self.labels)

    @property
    def reads_words(self) -> bool:
        """Whether it labels words, so that texts are read word by word."""
        return self.problem == "token_classification"

    @property
    def head_name(self) -> str:
        """Key of the head in the model (ModuleDict refuses names such as `keys`)."""
        return f"task_{self.name}"

    @property
    def label_name(self) -> str:
        """Key of this task's labels in a batch."""
        return f"labels_{self.name}"

    @property
    def rows_name(self) -> str:
        """Key of the places of this task's rows in a batch that holds rows of other tasks too."""
        return f"rows_{self.name}"

    @property
    def logits_name(self) -> str:
        """Key of this task's logits in the model output."""
        return f"logits_{self.name}"

    @property
    def id2label(self) -> dict[int, str]:
        """Label names by index, as transformers configs hold them."""
        return dict(enumerate(self.labels)) if self.labels else {0: "LABEL_0"}

    def configure(self, config: Any) -> None:
        """Write labels and problem type into the config of a stock model."""
        config.num_labels = self.num_outputs
        config.id2label = self.id2label
        config.label2id = {label: index for index, label in self.id2label.items()}
        if self.problem != "token_classification":
            config.problem_type = self.problem

    def to_dict(self) -> dict[str, Any]:
        """The task without its columns, as plain values for `config.json`."""
        values: dict[str, Any] = {"kind": self.kind}
        for field in dataclasses.fields(self):
            if field.name not in self.columns:
                value = getattr(self, field.name)
                values[field.name] = list(value) if isinstance(value, tuple) else value
        return values


_KINDS: dict[str, type[Task]] = {}


def register_task(kind: str, cls: type[Task]) -> None:
    """Make a task class loadable under `kind`, as `AutoConfig.register` does for configs.

    Raises:
        TaskError: another class holds this kind already.
    """
    known = _KINDS.get(kind)
    if known is not None and known is not cls:
        raise TaskError(
            f"expected a new task kind, found '{kind}' registered by {known.__qualname__}; choose another name"
        )
    _KINDS[kind] = cls


def task_from_dict(values: Mapping[str, Any]) -> Task:
    """Rebuild a task from `Task.to_dict`.

    Raises:
        TaskError: nothing is registered under its kind, or the kind takes no such fields.
    """
    rest = dict(values)
    kind = rest.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise TaskError(
            f"expected a task kind among {sorted(_KINDS)}, found {kind!r}; import the module that registers it "
            "(register_task) before loading, or update hf_mtcompress"
        )
    try:
        return _KINDS[kind](**rest)
    except (AttributeError, TypeError, ValueError) as error:
        if isinstance(error, TaskError):
            raise
        raise TaskError(
            f"expected the fields of a task of kind '{kind}', found something else ({error}); update hf_mtcompress, or "
            "save the model again"
        ) from error


def build_tasks(specs: Iterable[Mapping[str, Any]]) -> dict[str, Task]:
    """Tasks by name, in order, from what `Task.to_dict` gave.

    Raises:
        TaskError: see `task_from_dict`; or two have the same name.
    """
    tasks = [task_from_dict(values) for values in specs]
    found = {task.name: task for task in tasks}
    if len(found) < len(tasks):
        raise TaskError(f"expected tasks of different names, found {[task.name for task in tasks]}; rename the doubles")
    return found


def cross_entropy_sum(task: Task, logits: Tensor, labels: Tensor) -> Tensor:
    """Summed cross entropy of (items, labels) logits, with the task's class weights and smoothing."""
    weight = torch.tensor(task.class_weights, device=logits.device, dtype=torch.float32) if task.class_weights else None
    return nn.functional.cross_entropy(
        logits.float(),
        labels,
        weight=weight,
        ignore_index=UNLABELLED,
        label_smoothing=task.label_smoothing,
        reduction="sum",
    )


def weighted_count(task: Task, labels: Tensor) -> Tensor:
    """Labelled items, each counted with the weight of its class."""
    labelled = labels[labels != UNLABELLED]
    if not task.class_weights:
        return torch.tensor(float(labelled.numel()), device=labels.device)
    return torch.tensor(task.class_weights, device=labels.device)[labelled].sum()


def divisor(count: Tensor) -> Tensor:
    """A count to divide a sum of losses by: 1 where nothing is labelled, since the sum is 0 there."""
    return torch.where(count > 0, count, torch.ones_like(count))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)
