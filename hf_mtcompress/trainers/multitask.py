"""A Trainer for several tasks on one shared encoder; with a stock model it is `transformers.Trainer`."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalPrediction, speed_metrics

from hf_mtcompress.data.collator import MultiTaskCollator
from hf_mtcompress.data.mixing import MixedDataset, MixingSampler
from hf_mtcompress.data.preprocessing import EncodedGroup, encode_groups, encoded_labels
from hf_mtcompress.errors import DataError, TaskError, TrainingError
from hf_mtcompress.losses.fusion import Fusion, WeightedSum
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.tasks import Task

ItemCounts = dict[str, Tensor]
"""Labelled items by task over one accumulation window and all ranks."""


class MultiTaskTrainer(Trainer):
    """Trains a `MultiTaskModel`; any other model is left to `transformers.Trainer` unchanged.

    Overrides of `Trainer`: `get_train_dataloader` (mixing), `get_batch_samples` (item counts by task),
    `compute_loss`, `prediction_step`, `evaluate`, `predict`, `log`, `_set_signature_columns_if_needed`.

    Args:
        model: a `MultiTaskModel`, or any model that `Trainer` takes.
        args: `MultiTaskTrainingArguments`, or plain `TrainingArguments` (then the defaults of ours hold).
        train_dataset: rows by task name; or one data set that has the label columns of all tasks. Rows are raw
            (then `processing_class` is needed) or encoded (`input_ids` or `pixel_values`). Tasks with the same data
            set and the same input columns share batches and are encoded once.
        eval_dataset: likewise.
        processing_class: tokenizer or image processor.
        compute_metrics: extra metrics: one function, or functions by task name. Each gets an `EvalPrediction` of one
            task and returns a dict.
        fusion: how losses are combined; default: the weighted sum with normalised losses.
        **kwargs: for `Trainer`.

    Metrics are `eval_<task>_<metric>`, `eval_<task>_loss`, `eval_average` (mean of the main tasks' primary metrics)
    and `eval_loss` (the fused loss). `metric_for_best_model="average"` picks the best checkpoint by all tasks.

    Raises:
        DataError: rows do not fit the tasks.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]]
        | Mapping[str, Callable[[EvalPrediction], dict[str, float]]]
        | None = None,
        fusion: Fusion | None = None,
        **kwargs: Any,
    ) -> None:
        self.multi_task = isinstance(model, MultiTaskModel)
        self.train_groups: list[EncodedGroup] = []
        self.eval_groups: list[EncodedGroup] = []
        self._window: dict[str, tuple[Tensor, set[int]]] = {}
        """By task: summed loss shares, and the steps they come from, since the last log line."""
        if isinstance(model, MultiTaskModel):
            self._max_length = (model.config.preprocessing or {}).get("main", {}).get("max_length")
            self._processor = processing_class
            self.train_groups = self._encode(model.tasks, train_dataset, "train")
            self.eval_groups = self._encode(model.tasks, eval_dataset, "validation")
            self.task_metrics = _by_task(model.tasks, compute_metrics)
            compute_metrics = None
            train_dataset = MixedDataset([group.dataset for group in self.train_groups]) if self.train_groups else None
            eval_dataset = MixedDataset([group.dataset for group in self.eval_groups]) if self.eval_groups else None
            text = "pixel_values" not in getattr(processing_class, "model_input_names", ())
            data_collator = data_collator or MultiTaskCollator(model.tasks, processing_class if text else None)
        elif isinstance(compute_metrics, Mapping):
            raise TaskError(
                f"expected one compute_metrics function for a {type(model).__name__}, found functions by task "
                f"{list(compute_metrics)}; build a MultiTaskModel to train several tasks"
            )
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            **kwargs,
        )
        if self.multi_task:
            # Losses are divided by item counts of the whole window in `compute_loss`.
            self.loss_is_scaled_for_ga = True
            self.label_names = [task.label_name for task in self.tasks.values()]
            self.fusion = fusion or self._default_fusion()
            self.add_callback(_SetEpoch(self))

    # ---- data ----

    @property
    def tasks(self) -> dict[str, Task]:
        """The model's tasks by name."""
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, MultiTaskModel)
        return model.tasks

    def _encode(self, tasks: dict[str, Task], dataset: Any, role: str) -> list[EncodedGroup]:
        if dataset is None:
            return []
        if isinstance(dataset, Dataset):
            labelled = {
                name: dataset
                for name, task in tasks.items()
                if task.label in dataset.column_names or task.label_name in dataset.column_names
            }
            dataset = labelled or dict.fromkeys(tasks, dataset)
        if not isinstance(dataset, Mapping):
            raise DataError(
                f"{role}: expected a datasets.Dataset or a dict of them by task name {list(tasks)}, "
                f"found {type(dataset).__name__}"
            )
        return encode_groups(tasks, dataset, self._processor, self._max_length, role)

    def _default_fusion(self) -> Fusion:
        normalisers: dict[str, float] = {}
        if getattr(self.args, "normalize_losses", "chance") == "chance" and len(self.tasks) > 1:
            for group in self.train_groups:
                for name in group.tasks:
                    task = self.tasks[name]
                    needed = encoded_labels(group.dataset, task) if task.problem == "regression" else []
                    normalisers[name] = task.chance_loss(needed)
        return WeightedSum({name: task.weight for name, task in self.tasks.items()}, normalisers)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.multi_task and self._signature_columns is not None:
            self._signature_columns += [name for name in self.label_names if name not in self._signature_columns]

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of one source of rows each, mixed as `args.mixing` says."""
        if not self.multi_task:
            return super().get_train_dataloader()
        if self.train_dataset is None:
            raise DataError("expected train_dataset for training, found none; pass rows by task name")
        self.mixing_sampler = MixingSampler(
            [len(group.dataset) for group in self.train_groups],
            self._train_batch_size,
            strategy=getattr(self.args, "mixing", "proportional"),
            temperature=getattr(self.args, "mixing_temperature", 2.0),
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            num_processes=self.accelerator.num_processes,
            lengths=self._lengths() if self.args.train_sampling_strategy == "group_by_length" else None,
        )
        return self.accelerator.prepare(
            DataLoader(
                MixedDataset([group.dataset for group in self.train_groups]),
                batch_sampler=self.mixing_sampler,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory,
                persistent_workers=self.args.dataloader_persistent_workers,
            )
        )

    def _lengths(self) -> list[list[int]] | None:
        """Tokens of every training row by source; None for images, which are of one size."""
        if any("input_ids" not in group.dataset.column_names for group in self.train_groups):
            return None
        return [[len(ids) for ids in group.dataset.with_format(None)["input_ids"]] for group in self.train_groups]

    # ---- losses ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Batches of one accumulation window, and the labelled items in it by task over all ranks."""
        batches, counted = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self.multi_task:
            return batches, counted
        counts: ItemCounts = {}
        for name, task in self.tasks.items():
            found = [task.item_count(batch[task.label_name]).cpu() for batch in batches if task.label_name in batch]
            counts[name] = torch.stack(found).sum() if found else torch.tensor(0.0)
        counts |= self.extra_counts(batches)
        if self.args.world_size > 1:
            gathered = self.accelerator.reduce(torch.stack(list(counts.values())).to(device), "sum")
            counts = dict(zip(counts, gathered, strict=True))
        return batches, counts

    def extra_counts(self, batches: list[dict[str, Any]]) -> ItemCounts:
        """Further counts over the window that a subclass divides by."""
        return {}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The fused loss: each task's loss summed over this batch, divided by its items in the whole window."""
        if not self.multi_task:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        present = {name: task for name, task in self.tasks.items() if task.label_name in inputs}
        labels = {name: inputs[task.label_name] for name, task in present.items()}
        features = {key: value for key, value in inputs.items() if not key.startswith("labels_")}
        counts: ItemCounts = num_items_in_batch or {
            name: task.item_count(labels[name]) for name, task in present.items()
        }
        outputs, losses, extra = self.task_losses(model, features, labels, counts)
        loss = self.fusion(losses)
        for term in extra.values():
            loss = loss + term
        if num_items_in_batch:
            # Gradients are averaged over ranks, the counts are sums over them.
            loss = loss * self.args.world_size
        if not self._finds_unused_parameters(model):
            loss = loss + self._touch_unread_parts(present)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"expected a finite loss at step {self.state.global_step}, found "
                f"{ {name: float(value.detach()) for name, value in losses.items()} }; lower the learning rate "
                f"(now {self._get_learning_rate() if self.lr_scheduler else self.args.learning_rate:.2g}), "
                "check the labels of a regression for huge values, or turn off bf16/fp16"
            )
        self._note_losses({**losses, **extra}, counts)
        return (loss, outputs) if return_outputs else loss

    def task_losses(
        self, model: nn.Module, features: dict[str, Tensor], labels: dict[str, Tensor], counts: ItemCounts
    ) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
        """Model output, by present task the loss of this batch as a share of the window's mean, and further terms."""
        outputs = model(**features, tasks=list(labels))
        losses = {
            name: self.tasks[name].loss_sum(outputs[f"logits_{name}"], target)
            / counts[name].to(target.device).clamp(min=1)
            for name, target in labels.items()
        }
        return outputs, losses, {}

    def _finds_unused_parameters(self, model: nn.Module) -> bool:
        """Whether nothing waits for the gradients of parts that a batch does not use: one process, or DDP looks."""
        return getattr(model, "find_unused_parameters", True)

    def _touch_unread_parts(self, present: Mapping[str, Task]) -> Tensor:
        """Zero, through every parameter that this batch may not use (heads of absent tasks, poolers).

        DDP that does not look for unused parameters waits for the gradients of all of them.
        """
        core = self.accelerator.unwrap_model(self.model)
        assert isinstance(core, MultiTaskModel)
        parts = [core.heads[task.head_name] for name, task in self.tasks.items() if name not in present]
        parts += [
            part for encoder in core.encoders.values() for key, part in encoder.named_children() if key == "pooler"
        ]
        total = torch.zeros((), device=self.args.device)
        for parameter in (parameter for part in parts if part is not None for parameter in part.parameters()):
            total = total + 0.0 * parameter.sum()
        return total

    def _note_losses(self, losses: Mapping[str, Tensor], counts: ItemCounts) -> None:
        """Keep the mean loss of each task for the next log line."""
        for name, loss in losses.items():
            if float(counts.get(name, 1)) > 0:
                total, steps = self._window.get(name, (torch.zeros(()), set()))
                self._window[name] = (total + loss.detach().float().cpu(), steps | {self.state.global_step})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add `loss_<task>` to training logs; otherwise as `Trainer.log`."""
        if self.multi_task and "loss" in logs:
            for name, (total, steps) in self._window.items():
                # Each rank holds its share of the window's mean.
                whole: Any = self.accelerator.reduce(total.to(self.args.device), "sum")
                logs[f"loss_{name}"] = float(whole) / len(steps)
            self._window = {}
        super().log(logs, start_time)

    # ---- evaluation ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Logits and labels by task; rows may lack the labels of some tasks."""
        if not self.multi_task:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        labels = {name: inputs[task.label_name] for name, task in self.tasks.items() if task.label_name in inputs}
        features = {key: value for key, value in inputs.items() if not key.startswith("labels_")}
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**features, tasks=list(labels) or None)
        logits = {
            name: outputs[f"logits_{name}"].detach().float() for name in self.tasks if f"logits_{name}" in outputs
        }
        return None, logits, labels or None

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Score every task once; callbacks see all metrics together."""
        if not self.multi_task:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        groups = self.eval_groups if eval_dataset is None else self._encode(self.tasks, eval_dataset, metric_key_prefix)
        if not groups:
            raise DataError("expected eval_dataset for an evaluation, found none; pass rows by task name")
        self._memory_tracker.start()
        start = time.time()
        scores: dict[str, float] = {}
        losses: dict[str, Tensor] = {}
        rows = 0
        for group in groups:
            output = self._predict_group(group, metric_key_prefix)
            rows += len(group.dataset)
            for name in group.tasks:
                if output.label_ids is None or name not in output.label_ids:
                    continue
                logits, labels = output.predictions[name], output.label_ids[name]
                task_scores, loss = self._score(self.tasks[name], logits, labels)
                losses[name] = loss
                scores |= {f"{metric_key_prefix}_{name}_{key}": value for key, value in task_scores.items()}
        primary = [
            scores[f"{metric_key_prefix}_{name}_{task.metric}"]
            for name, task in self.tasks.items()
            if task.role == "main" and f"{metric_key_prefix}_{name}_{task.metric}" in scores
        ]
        metrics = {f"{metric_key_prefix}_loss": float(self.fusion(losses)), **scores}
        if primary:
            metrics[f"{metric_key_prefix}_average"] = float(np.mean(primary))
        batches = math.ceil(rows / (self.args.eval_batch_size * self.args.world_size))
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=rows, num_steps=batches)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test") -> Any:
        """Logits by task for each task with rows in `test_dataset`; a stock model is predicted as `Trainer` does."""
        if not self.multi_task:
            return super().predict(test_dataset, ignore_keys, metric_key_prefix)
        outputs = {}
        for group in self._encode(self.tasks, test_dataset, metric_key_prefix):
            output = self._predict_group(group, metric_key_prefix)
            outputs |= {name: output.predictions[name] for name in group.tasks}
        return outputs

    def _predict_group(self, group: EncodedGroup, prefix: str) -> Any:
        loader = self.accelerator.prepare(
            DataLoader(
                MixedDataset([group.dataset]),
                batch_size=self.args.eval_batch_size,
                sampler=[(0, row) for row in range(len(group.dataset))],
                collate_fn=self.data_collator,
            )
        )
        return self.evaluation_loop(
            loader, f"Evaluation of {group.name}", prediction_loss_only=False, metric_key_prefix=prefix
        )

    def _score(self, task: Task, logits: np.ndarray, labels: np.ndarray) -> tuple[dict[str, float], Tensor]:
        targets = torch.as_tensor(labels)
        loss = task.loss_sum(torch.as_tensor(logits), targets) / task.item_count(targets).clamp(min=1)
        extra = self.task_metrics.get(task.name)
        scores = {"loss": float(loss), **task.compute_metrics(logits, labels)}
        if extra is not None:
            scores |= extra(EvalPrediction(predictions=logits, label_ids=labels))
        return scores, loss


def _by_task(tasks: Mapping[str, Task], functions: Any) -> dict[str, Callable[[EvalPrediction], dict[str, float]]]:
    """Extra metric functions by task name."""
    if functions is None:
        return {}
    if not isinstance(functions, Mapping):
        return {name: functions for name in tasks}  # noqa: C420  # dict.fromkeys loses the type
    unknown = [name for name in functions if name not in tasks]
    if unknown:
        raise TaskError(f"compute_metrics: expected task names among {list(tasks)}, found {unknown}")
    return dict(functions)


class _SetEpoch(TrainerCallback):
    """Tells the sampler which epoch begins; accelerate does not reach a batch sampler on one process."""

    def __init__(self, trainer: MultiTaskTrainer) -> None:
        self._trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.mixing_sampler.set_epoch(int(state.epoch or 0))
