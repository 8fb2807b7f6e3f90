"""A Trainer whose student learns to answer like its teacher."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_mtcompress.errors import TaskError
from hf_mtcompress.losses.distillation import (
    binary_divergence_sum,
    hidden_error_sum,
    layer_map,
    match_labels,
    soft_cross_entropy_sum,
    squared_error_sum,
)
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.tasks import Task
from hf_mtcompress.tasks.base import UNLABELLED, divisor
from hf_mtcompress.trainers.multitask import ONLY_COUNTED, ItemCounts, MultiTaskTrainer, own_rows

HIDDEN = "hidden"
CRITERIA = ("logits", HIDDEN)


class DistillationTrainer(MultiTaskTrainer):
    """Trains a `MultiTaskModel` on labels and on a teacher's logits and hidden states.

    The loss of a task is `label_weight` * label loss + (1 - `label_weight`) * divergence from the teacher's logits;
    the hidden-state term is added once. The teacher runs in evaluation mode without gradients and is never part of
    the optimizer, of a checkpoint or of a saved folder.

    Args:
        teacher: a `MultiTaskModel` with the student's tasks (labels in any order, matched by name), or for a student
            with one task a stock model of that kind. It shares the student's tokenizer.
        criteria: among `logits` and `hidden`; default: `args.criteria`.
        temperature, label_weight, hidden_weight: override those of `args` (`DistillationTrainingArguments`).
        **kwargs: for `MultiTaskTrainer`.

    Raises:
        TaskError: student and teacher do not fit: tasks, labels or vocabulary differ.

    References:
        Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"; Jiao et al. 2020, "TinyBERT".
    """

    def __init__(
        self,
        model: MultiTaskModel,
        *,
        teacher: PreTrainedModel,
        criteria: tuple[str, ...] | None = None,
        temperature: float | None = None,
        label_weight: float | None = None,
        hidden_weight: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, **kwargs)
        own = self.args
        self.criteria = criteria or tuple(str(getattr(own, "criteria", "logits,hidden")).split(","))
        self.temperature = float(getattr(own, "temperature", 2.0) if temperature is None else temperature)
        self.label_weight = float(getattr(own, "label_weight", 0.5) if label_weight is None else label_weight)
        self.hidden_weight = float(getattr(own, "hidden_weight", 1.0) if hidden_weight is None else hidden_weight)
        unknown = [name for name in self.criteria if name not in CRITERIA]
        if unknown or not self.criteria:
            raise TaskError(f"expected criteria among {CRITERIA}, found {unknown or 'none'}")
        adapted = [found for found in (model, teacher) if isinstance(found, MultiTaskModel) and len(found.adapters)]
        if HIDDEN in self.criteria and adapted:
            raise TaskError(
                "expected criteria ('logits',) with adapters, found 'hidden' too; with an adapter every task has "
                "hidden states of its own, so that there are none to compare for all of them"
            )
        if not 0 <= self.label_weight <= 1 or self.temperature <= 0:
            raise TaskError(
                f"expected label_weight in [0, 1] and a temperature above 0, found {self.label_weight} and "
                f"{self.temperature}"
            )
        self.teacher = teacher.eval().requires_grad_(False)
        torch.nn.Module.to(self.teacher, self.args.device)
        self._label_order = {name: _label_order(task, teacher) for name, task in model.tasks.items()}
        _check_vocabulary(model, teacher)
        student_config, teacher_config = model.encoder.config, _encoder_config(teacher)
        self._layers = layer_map_or_explain(student_config.num_hidden_layers, teacher_config.num_hidden_layers)
        self._widths = (student_config.hidden_size, teacher_config.hidden_size)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; where widths differ a projection of each layer is learned beside the student and dropped after it."""
        model = self.model
        assert isinstance(model, MultiTaskModel)
        if HIDDEN not in self.criteria or self._widths[0] == self._widths[1]:
            return super().train(*args, **kwargs)
        # A part of the model while training, so that optimizer, DDP and checkpoints hold it.
        model.projections = nn.ModuleList(nn.Linear(*self._widths) for _ in self._layers).to(self.args.device)
        try:
            return super().train(*args, **kwargs)
        finally:
            del model.projections

    def extra_counts(self, batches: list[dict[str, Any]]) -> ItemCounts:
        """Positions that the hidden-state criterion runs over; items of tasks whose own count is weighted by class."""
        total = sum(float(_positions(batch).sum()) for batch in batches)
        counts = {HIDDEN: torch.tensor(total)}
        for name, task in self.tasks.items():
            if task.class_weights:
                found = [
                    float((batch[task.label_name] != UNLABELLED).sum()) for batch in batches if task.label_name in batch
                ]
                counts[name + ONLY_COUNTED] = torch.tensor(sum(found))
        return counts

    def task_losses(
        self,
        model: nn.Module,
        features: dict[str, Tensor],
        labels: dict[str, Tensor],
        counts: ItemCounts,
        rows: dict[str, Tensor],
    ) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
        """Label loss mixed with the divergence from the teacher, by task; and the hidden-state term."""
        hidden = HIDDEN in self.criteria
        outputs = model(**features, tasks=list(labels), output_hidden_states=hidden or None)
        with torch.no_grad():
            guide = self._ask_teacher(features, list(labels), hidden)
        losses = {}
        for name, target in labels.items():
            task = self.tasks[name]
            logits = own_rows(outputs[f"logits_{name}"], rows.get(name))
            items = divisor(counts[name].to(target.device))
            loss = self.label_weight * task.loss_sum(logits, target) / items
            if "logits" in self.criteria:
                order = self._label_order[name]
                wanted = own_rows(guide[name], rows.get(name))
                wanted = wanted if order is None else wanted[..., order]
                # Class weights are for labels: every item counts the same beside the teacher.
                each = divisor(counts.get(name + ONLY_COUNTED, counts[name]).to(target.device))
                loss = loss + (1 - self.label_weight) * self._divergence(task, logits, wanted, target) / each
            losses[name] = loss
        if not hidden:
            return outputs, losses, {}
        count = counts.get(HIDDEN, _positions(features).sum())
        error = self._hidden_error(model, outputs.hidden_states, guide[HIDDEN], _positions(features))
        term = (1 - self.label_weight) * self.hidden_weight * error / divisor(count.to(error.device))
        return outputs, losses, {HIDDEN: term}

    def _ask_teacher(self, features: Mapping[str, Tensor], names: list[str], hidden: bool) -> dict[str, Any]:
        if isinstance(self.teacher, MultiTaskModel):
            answer = self.teacher(**features, tasks=names, output_hidden_states=hidden or None)
            return {**{name: answer[f"logits_{name}"] for name in names}, HIDDEN: answer.hidden_states}
        answer = self.teacher(**features, output_hidden_states=hidden or None)
        return {names[0]: answer.logits, HIDDEN: answer.get("hidden_states")}

    def _divergence(self, task: Task, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        match task.problem:
            case "regression":
                labelled = ~target.isnan()
                return squared_error_sum(student[labelled], teacher[labelled])
            case "multi_label_classification":
                labelled = target[:, 0] != UNLABELLED
                return binary_divergence_sum(student[labelled], teacher[labelled], self.temperature)
            case "single_label_classification" | "token_classification":
                mask = (target != UNLABELLED).flatten()
                width = student.shape[-1]
                return soft_cross_entropy_sum(
                    student.reshape(-1, width), teacher.reshape(-1, width), mask, self.temperature
                )

    def _hidden_error(
        self, model: nn.Module, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], mask: Tensor
    ) -> Tensor:
        """Mean over matched layers of the relative error, summed over positions. The first state is the embedding."""
        projections = getattr(self.accelerator.unwrap_model(model), "projections", None)
        total = torch.zeros((), device=mask.device)
        for index, layer in enumerate(self._layers):
            own = student[index + 1] if projections is None else projections[index](student[index + 1])
            counted = mask if mask.dim() == 2 else mask[:, None].expand(own.shape[:2])
            error = hidden_error_sum(own, teacher[layer + 1], counted.bool())
            # Images have no mask: a row counts once, whatever its number of patches.
            total = total + (error if mask.dim() == 2 else error / own.shape[1])
        return total / len(self._layers)


def layer_map_or_explain(student: int, teacher: int) -> list[int]:
    """`layer_map`, with an error that speaks of student and teacher.

    Raises:
        TaskError: the student is deeper than the teacher.
    """
    try:
        return layer_map(student, teacher)
    except ValueError as error:
        raise TaskError(
            f"a student of {student} layers cannot follow a teacher of {teacher}: {error}; "
            "choose a shallower student or leave out the criterion 'hidden'"
        ) from error


def _positions(batch: Mapping[str, Any]) -> Tensor:
    """(batch, tokens) attention mask of texts, or (batch,) ones of images."""
    if "attention_mask" in batch:
        return batch["attention_mask"]
    if "input_ids" in batch:
        return torch.ones_like(batch["input_ids"])
    return torch.ones(len(batch["pixel_values"]), device=batch["pixel_values"].device)


def _encoder_config(model: PreTrainedModel) -> Any:
    return model.encoder.config if isinstance(model, MultiTaskModel) else model.base_model.config


def _label_order(task: Task, teacher: PreTrainedModel) -> list[int] | None:
    """Columns of the teacher's logits in the student's label order; None for a regression."""
    if isinstance(teacher, MultiTaskModel):
        if task.name not in teacher.tasks:
            raise TaskError(
                f"expected a teacher with the task '{task.name}', found {list(teacher.tasks)}; "
                "give the task the same name in both, or leave it out"
            )
        names: Any = teacher.tasks[task.name].labels
        outputs = teacher.tasks[task.name].num_outputs
    else:
        names = [label for _, label in sorted((teacher.config.id2label or {}).items())]
        outputs = teacher.config.num_labels
    if task.problem == "regression":
        if outputs != 1:
            raise TaskError(f"task '{task.name}': expected a teacher with one output for a regression, found {outputs}")
        return None
    try:
        order = match_labels(task.labels or (), names or ())
    except ValueError as error:
        raise TaskError(f"task '{task.name}': {error}") from error
    return None if order == list(range(len(order))) else order


def _check_vocabulary(student: MultiTaskModel, teacher: PreTrainedModel) -> None:
    own = student.encoder.config.to_dict().get("vocab_size")
    other = _encoder_config(teacher).to_dict().get("vocab_size")
    if own != other:
        raise TaskError(
            f"expected teacher and student with one tokenizer, found vocabularies of {other} and {own} tokens; "
            "take a student from the teacher's layers or a checkpoint of the same family"
        )
    if not isinstance(teacher, MultiTaskModel) and len(student.tasks) != 1:
        raise TaskError(
            f"expected a multi-task teacher for the tasks {list(student.tasks)}, found a {type(teacher).__name__}"
        )
