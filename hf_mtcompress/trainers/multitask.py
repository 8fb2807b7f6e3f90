"""A Trainer for several tasks on one shared encoder; with a stock model it is `transformers.Trainer`."""

import copy
import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalPrediction, PredictionOutput, seed_worker, speed_metrics

from hf_mtcompress.data.collator import MultiTaskCollator
from hf_mtcompress.data.mixing import REACTIVE, SIGNALS, UNCOUNTED, MixedDataset, MixingSampler
from hf_mtcompress.data.preprocessing import (
    EncodedGroup,
    EncodedStream,
    columns_of,
    encode_groups,
    encode_streams,
    encoded_labels,
)
from hf_mtcompress.data.readers import Reader, lengths_of, reader_if_known
from hf_mtcompress.data.streaming import STREAM_STRATEGIES, MixedStream
from hf_mtcompress.errors import DataError, TaskError, TrainingError
from hf_mtcompress.evaluation.affinity import held_out_gradients
from hf_mtcompress.evaluation.evaluate import labelled_rows
from hf_mtcompress.losses.fusion import DynamicWeightAverage, Fusion, fusion_of, total
from hf_mtcompress.losses.gradients import gramian
from hf_mtcompress.losses.interference import GradientLog, interference_report
from hf_mtcompress.model.adapters import adapter_of, trains_adapters
from hf_mtcompress.model.branches import reads_elsewhere
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.tasks import Task
from hf_mtcompress.tasks.base import divisor
from hf_mtcompress.trainers.arguments import check_arguments
from hf_mtcompress.trainers.card import trainer_card
from hf_mtcompress.trainers.penalties import WeightPenalty
from hf_mtcompress.trainers.scores import AVERAGE, LOSS, Scores, average, flat_names, known_scores
from hf_mtcompress.trainers.stock_arguments import ONE_LABEL, check_best_metric, check_stock_arguments, check_uploads
from hf_mtcompress.trainers.surgery import SCOPE_WORDS, GradientSurgery, SharedGradients, refuse_sharded

ItemCounts = dict[str, Tensor]
"""Labelled items by task over one accumulation window and all ranks."""

logger = logging.getLogger(__name__)

LOOK_ROWS = 100
"""Validation rows of each source that `measure_on="validation"` takes for a look."""

STATE_FILE = "multi_task_state.json"
"""Beside the optimizer's state in a checkpoint: what fusion and mixing learned."""

ONLY_COUNTED = " items"
"""End of the name of a count that no loss belongs to."""

_NO_MODEL_INIT = (
    "expected a multi-task model, found model_init, whose new models no rows were encoded for; pass model=, and make a "
    "trainer for each trial of a search"
)

_NO_INPUTS = ("labels_", "rows_", SIGNALS, UNCOUNTED)
"""How keys of a batch begin that the model does not take."""


class MultiTaskTrainer(Trainer):
    """Trains a `MultiTaskModel`; any other model is left to `transformers.Trainer` unchanged.

    Overrides of `Trainer`: `get_train_dataloader` (mixing), `get_batch_samples` (item counts by task),
    `train`, `training_step`, `compute_loss`, `prediction_step`, `evaluate`, `predict`, `log`, `create_optimizer`,
    `_get_eval_sampler`, `_set_signature_columns_if_needed`, and what saves and loads the optimizer (fusion and mixing
    have state too). Your own overrides of `get_train_dataloader`, `get_eval_dataloader` and `get_test_dataloader` act;
    the last two get the rows of one source at a time.

    Args:
        model: a `MultiTaskModel`, or any model that `Trainer` takes.
        args: `MultiTaskTrainingArguments`, or plain `TrainingArguments` (then the defaults of ours hold).
        train_dataset: rows by task name; or one data set that has the label columns of all tasks; or streams
            (`IterableDataset`, with `max_steps` and mixing uniform, round_robin or weights). Rows are raw
            (then `processing_class` is needed) or model inputs already. Tasks with the same data set and the same
            input columns share batches and are encoded once.
        eval_dataset: likewise.
        processing_class: tokenizer or image processor.
        compute_metrics: extra metrics: one function, or functions by task name. Each gets an `EvalPrediction` of one
            task and returns a dict. A `preprocess_logits_for_metrics` is called with the logits and labels of one task,
            and makes the predictions of these functions and of `predict`; the tasks' own metrics go by the logits.
        fusion: how losses are combined, by name or as an object; default: `args.fusion`. Weights and normalisers of
            tasks that an object does not name are filled in.
        **kwargs: for `Trainer`, but for `model_init`.

    Arguments of `Trainer` and `TrainingArguments` act as they do there, or are refused. `predict` needs no labels, and
    returns a `PredictionOutput` whose predictions and labels are by task.

    Metrics are `eval_<task>_<metric>`, `eval_<task>_loss`, `eval_average` (mean of the main tasks' primary metrics)
    and `eval_loss` (the fused loss); `eval_<task>/<metric>` where two would have one name. `metric_for_best_model=
    "average"` picks the best checkpoint by all tasks; of losses, `mae` and `mse` the smallest is the best.

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
        *,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]]
        | Mapping[str, Callable[[EvalPrediction], dict[str, float]]]
        | None = None,
        fusion: Fusion | str | None = None,
        **kwargs: Any,
    ) -> None:
        self.multi_task = isinstance(model, MultiTaskModel)
        self.reader: Reader | None = None
        """What encodes raw rows and pads them, where `processing_class` is given."""
        self.train_groups: list[EncodedGroup] = []
        self.train_streams: list[EncodedStream] = []
        self.eval_groups: list[EncodedGroup] = []
        self.train_rows: dict[str, Any] = {}
        """By task: rows as they were given."""
        self.eval_rows: dict[str, Any] = {}
        self._window: dict[str, Tensor] = {}
        """By task: this process's share of the mean loss in the present accumulation window."""
        self._present: list[str] = []
        """What has labelled items in the window, on any rank."""
        self._logged: dict[str, tuple[Tensor, int]] = {}
        """By task: summed window losses of this process and how many windows, since the last log line."""
        self._feature_gradients: dict[str, Tensor] = {}
        """By task: gradient of the window's mean loss at the shared features, summed over positions."""
        self._several_sources = False
        """Whether the present window has batches of several sources."""
        self.surgery: GradientSurgery | None = None
        self.stopped_tasks: list[str] = []
        """Tasks that `task_patience` stopped: their losses count no more, and their heads stay as they are."""
        self._best_scores: dict[str, tuple[float, int]] = {}
        """By task: best score, and evaluations since."""
        self.scores: Scores = {}
        """By task and metric, those of the last evaluation of `eval_dataset`, or of the best weights, once loaded."""
        self._scored_at = -1
        """Step of these weights."""
        self._scores_by_step: dict[int, Scores] = {}
        self._seen: set[str] = set()
        """Tasks that had a label in this training, on any rank."""
        self._pulls: dict[str, float] = {}
        """By task: how strongly a reactive mixing strategy wants its rows."""
        self._wanted_tasks: tuple[str, ...] | None = None
        """Tasks that `predict` wants, whatever labels the rows have."""
        self._kept: dict[str, Tensor] = {}
        """Of a model in few bits: what stayed as it was when a checkpoint was loaded."""
        self._not_loaded: Any = None
        """What `Trainer` did not find by name in the checkpoint that it loads."""
        if not self.multi_task:
            _refuse_wrapped(model)
            _refuse_rows_by_task(model, train_dataset, kwargs)
        if isinstance(model, MultiTaskModel):
            check_uploads(args)
            if processing_class is not None:
                length = (model.config.preprocessing or {}).get("main", {}).get("max_length")
                self.reader = reader_if_known(processing_class, length)
            rows = self._by_task(model.tasks, train_dataset, "train")
            if any(isinstance(source, IterableDataset) for source in rows.values()):
                self.train_streams = self._encode_streams(model.tasks, rows)
            else:
                self.train_groups = self._encode(model.tasks, rows, "train")
            self.train_rows, self.eval_rows = rows, self._by_task(model.tasks, eval_dataset, "validation")
            self.eval_groups = self._encode(model.tasks, self.eval_rows, "validation")
            self.task_metrics = _by_task(model.tasks, compute_metrics)
            compute_metrics = None
            if train_dataset is not None:
                streams = [stream.dataset for stream in self.train_streams]
                tables = [group.dataset for group in self.train_groups]
                train_dataset = MixedStream(streams, 1) if streams else MixedDataset(tables)
            eval_dataset = MixedDataset([group.dataset for group in self.eval_groups]) if self.eval_groups else None
            data_collator = data_collator or MultiTaskCollator(model.tasks, self.reader)
        elif isinstance(compute_metrics, Mapping):
            raise TaskError(
                f"expected one compute_metrics function for a {type(model).__name__}, found functions by task "
                f"{list(compute_metrics)}; build a MultiTaskModel to train several tasks"
            )
        with trains_adapters(model):
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
        self.penalty = self._set_up_penalty()
        if not self.multi_task and isinstance(self.model, MultiTaskModel):
            raise TrainingError(_NO_MODEL_INIT)
        if self.multi_task:
            core = self.accelerator.unwrap_model(self.model)
            assert isinstance(core, MultiTaskModel)
            check_arguments(self.args, core.tasks)
            check_stock_arguments(self, core.tasks, core)
            check_best_metric(
                self.args,
                [core.tasks[name] for group in self.eval_groups for name in group.tasks],
                core.tasks.values(),
                more=bool(self.task_metrics),
            )
            for encoder in core.encoders.values():
                # As `Trainer` does with the config of a stock model.
                encoder_config: Any = encoder.config
                if hasattr(encoder_config, "use_cache"):
                    encoder_config.use_cache = self.args.use_cache
            # Losses are divided by item counts of the whole window in `compute_loss`.
            self.loss_is_scaled_for_ga = True
            self.label_names = [task.label_name for task in self.tasks.values()]
            self.fusion = self._set_up_fusion(fusion)
            self._mixed = getattr(self.args, "batches", "one_source") == "mixed"
            self._check_streams()
            self._check_evaluations()
            self._check_surgery()
            self._check_shared_weights()
            self._check_frozen_parts()
            self.gradient_log = GradientLog(list(self.tasks))
            self.add_callback(_TellTrainer(self))

    # ---- data ----

    @property
    def tasks(self) -> dict[str, Task]:
        """The model's tasks; `label_smoothing_factor` smooths labels of those without a smoothing of their own."""
        model: Any = self.model
        if not isinstance(model, MultiTaskModel):
            # Walks through all modules, which would be done several times a step.
            model = self.accelerator.unwrap_model(model)
        assert isinstance(model, MultiTaskModel)
        if not (smoothing := self.args.label_smoothing_factor):
            return model.tasks
        found = {}
        for name, task in model.tasks.items():
            if task.problem in ONE_LABEL and not task.label_smoothing:
                # The model's own task is saved with it.
                task = copy.copy(task)
                task.label_smoothing = smoothing
            found[name] = task
        return found

    def _by_task(self, tasks: dict[str, Task], dataset: Any, role: str) -> dict[str, Any]:
        """Rows by task name, from a dict of data sets or from one with the label columns of all tasks."""
        if dataset is None:
            return {}
        if isinstance(dataset, Dataset | IterableDataset):
            columns = columns_of(dataset)
            labelled = {
                name: dataset for name, task in tasks.items() if task.label in columns or task.label_name in columns
            }
            if labelled and (left_out := [name for name in tasks if name not in labelled]):
                logger.warning(
                    "%s: no rows for %s, since the data set has no column %s; found %s",
                    role,
                    ", ".join(left_out),
                    ", ".join(f"'{tasks[name].label or tasks[name].label_name}'" for name in left_out),
                    columns,
                )
            return labelled or dict.fromkeys(tasks, dataset)
        if not isinstance(dataset, Mapping):
            raise DataError(
                f"{role}: expected a datasets.Dataset or a dict of them by task name {list(tasks)}, "
                f"found {type(dataset).__name__}"
            )
        return dict(dataset)

    def _encode(self, tasks: dict[str, Task], dataset: Any, role: str) -> list[EncodedGroup]:
        rows = self._by_task(tasks, dataset, role)
        if any(isinstance(source, IterableDataset) for source in rows.values()):
            raise DataError(
                f"{role}: expected rows with a length, found a stream; load them without streaming, or take some: "
                "Dataset.from_list(list(stream.take(1000)))"
            )
        return encode_groups(tasks, rows, self.reader, role)

    def _encode_streams(self, tasks: dict[str, Task], rows: dict[str, Any]) -> list[EncodedStream]:
        if not all(isinstance(source, IterableDataset) for source in rows.values()):
            raise DataError(
                "train: expected streams for all tasks or for none, found both; turn the others into streams with "
                "Dataset.to_iterable_dataset()"
            )
        return encode_streams(tasks, rows, self.reader, "train")

    @property
    def train_sources(self) -> Sequence[EncodedGroup | EncodedStream]:
        """Sources of training rows, tables or streams."""
        return self.train_streams or self.train_groups

    def _set_up_fusion(self, fusion: Fusion | str | None) -> Fusion:
        options = getattr(self.args, "fusion_options", None) or {}
        if not isinstance(fusion, Fusion):
            kind = fusion or getattr(self.args, "fusion", "sum")
            seed = {"seed": self.args.seed} if kind == "random" else {}
            fusion = fusion_of(kind, **{**seed, **options})
        for name, task in self.tasks.items():
            weight = task.weight if task.final_weight is None else (task.weight, task.final_weight)
            fusion.weights.setdefault(name, weight)
        if getattr(self.args, "normalize_losses", "chance") == "chance" and len(self.tasks) > 1:
            for name, loss in self.chance_losses.items():
                fusion.normalisers.setdefault(name, loss)
        fusion.trained = self._drawn_tasks()
        return fusion

    def _drawn_tasks(self) -> set[str]:
        """Tasks whose own training rows are drawn at all."""
        weights = getattr(self.args, "mixing_weights", None)
        if self.mixing_strategy != "weights" or not weights:
            return {name for group in self.train_sources for name in group.own_tasks}
        shares = zip(self.train_sources, self._source_weights(weights), strict=True)
        return {name for group, weight in shares if weight > 0 for name in group.own_tasks}

    @cached_property
    def chance_losses(self) -> dict[str, float]:
        """By task with training rows: the loss of an uninformed guess."""
        return {
            name: self.tasks[name].chance_loss(
                encoded_labels(group.dataset, self.tasks[name]) if self.tasks[name].problem == "regression" else []
            )
            for group in self.train_sources
            for name in group.own_tasks
        }

    # ---- what is refused before training ----

    def _check_evaluations(self) -> None:
        """What follows validation scores, or looks at validation rows, needs some while it trains.

        Raises:
            TrainingError: `mixing="score_gap"` or `task_patience` without evaluations; `measure_on="validation"`
                without rows.
        """
        found = "mixing='score_gap'" if self.mixing_strategy == "score_gap" else None
        found = found or ("task_patience" if getattr(self.args, "task_patience", None) is not None else None)
        if self._measures_on == "validation" and self.train_sources and not self.eval_groups:
            raise TrainingError(
                "expected validation rows for measure_on='validation', found none; pass an eval_dataset, or say 'train'"
            )
        if found and self.train_sources and self.args.eval_strategy == "no":
            raise TrainingError(
                f"expected validation scores for {found}, which follows them, found eval_strategy='no'; say 'epoch' or "
                "'steps', with an eval_dataset"
            )
        if found and self.args.prediction_loss_only:
            raise TrainingError(f"expected validation scores for {found}, found prediction_loss_only; leave it out")
        least = self.args.eval_batch_size * self.args.world_size
        short = [group.name for group in self.eval_groups if len(group.dataset) < least]
        if self.args.dataloader_drop_last and short:
            raise TrainingError(
                f"dataloader_drop_last: expected a batch of {least} validation rows in every source, found fewer in "
                f"{', '.join(short)}, which would never be scored; leave it out, or take smaller batches"
            )

    def _check_streams(self) -> None:
        """What cannot be done with streams is said before training.

        Raises:
            DataError: settings that need a number of rows, or several readers.
        """
        if not self.train_streams:
            return
        dispatch: Any = self.args.accelerator_config
        problems = [
            text
            for wrong, text in (
                (
                    self.mixing_strategy not in STREAM_STRATEGIES,
                    f"expected mixing among {list(STREAM_STRATEGIES)} with streams, found '{self.mixing_strategy}'",
                ),
                (self._mixed, "expected batches='one_source' with streams, found 'mixed'"),
                (
                    isinstance(self.fusion, DynamicWeightAverage),
                    "expected another fusion than dwa with streams, which have no epochs to compare losses of",
                ),
                (
                    self.args.dataloader_num_workers > 0,
                    "expected dataloader_num_workers=0 with streams, of which every worker would read all rows",
                ),
                (
                    dispatch.dispatch_batches,
                    "expected dispatch_batches left out with streams, since every process reads its own",
                ),
                (
                    self._measures_on == "train",
                    "expected measure_on='validation' for measure_interference with streams, whose rows cannot be "
                    "drawn at will",
                ),
            )
            if wrong
        ]
        if problems:
            raise DataError("; ".join(problems))
        # By default one process would read a stream for all, and deal rows without regard for their source.
        self.accelerator.dataloader_config.dispatch_batches = False

    def _check_surgery(self) -> None:
        method = getattr(self.args, "gradient_combination", None)
        if method is None or not self.train_sources:
            return
        alone = all(len(source.tasks) == 1 for source in self.train_sources)
        if alone and not self._mixed and self.args.gradient_accumulation_steps == 1:
            raise TrainingError(
                f"gradient_combination='{method}': expected several tasks in a step, found one "
                "source of rows in each; say batches='mixed', or gradient_accumulation_steps of 2 and more"
            )

    def _check_shared_weights(self) -> None:
        """What compares the tasks' gradients at shared weights needs such weights, whole and in training.

        Raises:
            TrainingError: such a setting, and weights are sharded, frozen or not shared by all tasks.
        """
        core = self.accelerator.unwrap_model(self.model)
        assert isinstance(core, MultiTaskModel)
        found = [
            name
            for name, wanted in (
                ("gradient_combination", getattr(self.args, "gradient_combination", None)),
                ("measure_interference", getattr(self.args, "measure_interference", None)),
                ("fusion='gradient_norm'", self.fusion.wants_gradient_norms),
            )
            if wanted
        ]
        if not found or not self.train_sources:
            return
        settings = ", ".join(found)
        refuse_sharded(self, settings)
        if len(core.adapters):
            raise TrainingError(
                f"expected no settings that compare the tasks' gradients with adapters, found {settings}; the "
                "encoder is frozen and every task trains weights of its own: leave them out"
            )
        if reads_elsewhere(core):
            raise TrainingError(
                f"expected tasks that all read one encoder at its end with {settings}, which compares their gradients "
                "there, found branches, or tasks that read a lower layer; compare them in a run without these"
            )
        if not any(parameter.requires_grad for parameter in core.encoders.parameters()):
            raise TrainingError(
                f"expected an encoder that is trained with {settings}, which compares the tasks' gradients at its "
                "weights, found a frozen one; leave them out"
            )

    def _check_frozen_parts(self) -> None:
        """A batch has to train something.

        Raises:
            TrainingError: rows of a source reach frozen weights only.
        """
        core = self.accelerator.unwrap_model(self.model)
        assert isinstance(core, MultiTaskModel)
        shared = [core.encoders, core.branches]
        if self._mixed or any(parameter.requires_grad for part in shared for parameter in part.parameters()):
            return
        for source in self.train_sources:
            parts = [
                part[self.tasks[name].head_name]
                for name in source.tasks
                for part in (core.heads, core.adapters)
                if self.tasks[name].head_name in part
            ]
            if not any(parameter.requires_grad for part in parts for parameter in part.parameters()):
                raise TrainingError(
                    f"expected something to train on the rows of {' + '.join(source.tasks)}, found encoder and heads "
                    "frozen; leave these rows out of train_dataset, or unfreeze their tasks"
                )

    # ---- what lives while training runs ----

    def _set_up_penalty(self) -> WeightPenalty | None:
        """What pulls weights towards 0, if anything does.

        Raises:
            TrainingError: a penalty is out of its range, or there is nothing whole to pull at.
        """
        l1, l2 = (float(getattr(self.args, name, 0.0)) for name in ("l1_penalty", "l2_penalty"))
        if not (l1 or l2):
            return None
        refuse_sharded(self, "l1_penalty and l2_penalty")
        core: Any = self.accelerator.unwrap_model(self.model)
        penalty = WeightPenalty(core, l1, l2)
        self.add_callback(penalty)
        return penalty

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`; what stopped in a training before this one counts anew."""
        self.stopped_tasks, self._best_scores, self._seen, self._scores_by_step = [], {}, set(), {}
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def start_training(self) -> None:
        """Set up what lives while training runs."""
        self._centre_regressions()
        method = getattr(self.args, "gradient_combination", None)
        if self.surgery is not None:
            self.surgery.close()
            self.surgery = None
        if method is not None:
            core: Any = self.accelerator.unwrap_model(self.model)
            scope: Any = getattr(self.args, "surgery_scope", "features")
            self.surgery = GradientSurgery(core, method, scope, self._over_ranks, self.args.world_size)

    @torch.no_grad()
    def _centre_regressions(self) -> None:
        """Let the untrained head of a regression begin at the mean of its labels.

        A bias moves by about the learning rate a step, so a mean far from 0 would be learned by the shared encoder
        instead, with large gradients that push the other tasks aside.
        """
        core: Any = self.accelerator.unwrap_model(self.model)
        for group in self.train_sources:
            for name in (name for name in group.tasks if self.tasks[name].problem == "regression"):
                layers = [
                    part for part in core.heads[self.tasks[name].head_name].modules() if isinstance(part, nn.Linear)
                ]
                bias = layers[-1].bias if layers else None
                # The bias of a head that was trained is never exactly 0.
                if bias is None or bias.shape != (1,) or bool(bias.any()) or not bias.requires_grad:
                    continue
                labels = np.asarray(encoded_labels(group.dataset, self.tasks[name]), dtype=np.float64)
                if np.isfinite(labels).any():
                    bias.fill_(float(np.nanmean(labels)))

    def end_training(self) -> None:
        """Take it away again."""
        drawn = self._drawn_tasks() if self.state.global_step else set()
        if unseen := [name for name in self.tasks if name in drawn and name not in self._seen]:
            logger.warning(
                "no training row with a label of %s was seen: what is new in its head is as it was drawn",
                ", ".join(unseen),
            )
        if self.surgery is not None:
            self.surgery.close()
            self.surgery = None

    def freeze_stopped_heads(self) -> None:
        """No gradient, no step: neither momentum nor weight decay moves head and adapter of a task that stopped."""
        core: Any = self.accelerator.unwrap_model(self.model)
        for name in self.stopped_tasks:
            for part in (core.heads, core.adapters):
                if self.tasks[name].head_name in part:
                    for parameter in part[self.tasks[name].head_name].parameters():
                        parameter.grad = None

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.multi_task and self._signature_columns is not None:
            core: Any = self.accelerator.unwrap_model(self.model)
            wanted = (*core.input_names, *self.label_names, UNCOUNTED)
            self._signature_columns += [name for name in wanted if name not in self._signature_columns]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As `Trainer`; heads may have a learning rate of their own."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        rate = getattr(self.args, "head_learning_rate", None)
        if not (self.multi_task and made and rate):
            return optimizer
        core: Any = self.accelerator.unwrap_model(self.model)
        heads = {id(parameter) for parameter in core.heads.parameters()}
        for group in list(optimizer.param_groups):
            own = [parameter for parameter in group["params"] if id(parameter) in heads]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in heads]
            if own:
                settings = {key: value for key, value in group.items() if key != "params"}
                optimizer.add_param_group({**settings, "params": own, "lr": rate})
        return optimizer

    # ---- batches ----

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of one source of rows each, mixed as `args.mixing` says."""
        if not self.multi_task:
            return super().get_train_dataloader()
        if self.train_dataset is None:
            raise DataError("expected train_dataset for training, found none; pass rows by task name")
        weights = getattr(self.args, "mixing_weights", None)
        if self.train_streams:
            return self._stream_dataloader(weights)
        self.mixing_sampler = MixingSampler(
            [len(group.dataset) for group in self.train_groups],
            self._train_batch_size,
            strategy=getattr(self.args, "mixing", "proportional"),
            temperature=getattr(self.args, "mixing_temperature", 2.0),
            cap=getattr(self.args, "mixing_cap", None),
            weights=None if weights is None else self._source_weights(weights),
            epochs=math.ceil(self.args.num_train_epochs),
            mixed=getattr(self.args, "batches", "one_source") == "mixed",
            shuffle=self.args.train_sampling_strategy != "sequential",
            drop_last=self.args.dataloader_drop_last,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            num_processes=self.accelerator.num_processes,
            lengths=self._lengths() if self.args.train_sampling_strategy == "group_by_length" else None,
        )
        if self.args.max_steps > 0:
            windows = self.mixing_sampler.groups / self.args.gradient_accumulation_steps
            self.mixing_sampler.epochs = math.ceil(self.args.max_steps / max(math.ceil(windows), 1))
        return self._prepared_loader(
            MixedDataset([group.dataset for group in self.train_groups]), batch_sampler=self.mixing_sampler
        )

    def _prepared_loader(self, dataset: Any, **settings: Any) -> DataLoader[Any]:
        """As `Trainer` prepares the loader of training rows."""
        return self.accelerator.prepare(
            DataLoader(
                dataset,
                collate_fn=self._get_collator_with_removed_columns(self.data_collator, "Training"),
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory,
                persistent_workers=self.args.dataloader_persistent_workers,
                multiprocessing_context=self.args.dataloader_multiprocessing_context,
                prefetch_factor=self.args.dataloader_prefetch_factor,
                in_order=self.args.dataloader_in_order,
                worker_init_fn=partial(
                    seed_worker, num_workers=self.args.dataloader_num_workers, rank=self.args.process_index
                ),
                **settings,
            )
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # `Trainer` would put rows of like length together, and answers in their order.
        if not self.multi_task:
            return super()._get_eval_sampler(eval_dataset)
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _stream_dataloader(self, weights: Mapping[str, float] | None) -> DataLoader[Any]:
        stream = MixedStream(
            [stream.dataset for stream in self.train_streams],
            self._train_batch_size,
            strategy=self.mixing_strategy,
            weights=None if weights is None else self._source_weights(weights),
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            num_processes=self.accelerator.num_processes,
        )
        return self._prepared_loader(stream, batch_size=self._train_batch_size)

    def _source_weights(self, weights: Mapping[str, float]) -> list[float]:
        """Weights of the sources: the sum of those of their tasks."""
        open_ones = [
            "+".join(group.own_tasks)
            for group in self.train_sources
            if not any(name in weights for name in group.own_tasks)
        ]
        if open_ones:
            raise DataError(
                "mixing_weights: expected one for each source of rows, found none for "
                f"{', '.join(open_ones)}; 0 leaves a source out"
            )
        return [sum(weights.get(name, 0.0) for name in group.own_tasks) for group in self.train_sources]

    def _lengths(self) -> list[list[int]] | None:
        """Tokens of every training row by source; None where rows have none, and are of one size."""
        found = [lengths_of(group.dataset) for group in self.train_groups]
        lengths = [of_source for of_source in found if of_source is not None]
        return lengths if len(lengths) == len(found) else None

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
            gathered: Any = self.accelerator.reduce(torch.stack(list(counts.values())).to(device), "sum")
            counts = dict(zip(counts, gathered.cpu(), strict=True))
        self._present = [
            name
            for name, count in counts.items()
            if not name.endswith(ONLY_COUNTED) and float(count) + float(counts.get(name + ONLY_COUNTED, 0.0)) > 0
        ]
        self._seen.update(self._present)
        self._several_sources = not self._mixed and len({_source(batch) for batch in batches}) > 1
        self.fusion.start_window(self.state.global_step, self.state.max_steps)
        if self.surgery is not None:
            self.surgery.step = self.state.global_step
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
        features = {key: value for key, value in inputs.items() if not key.startswith(_NO_INPUTS)}
        counts: ItemCounts = num_items_in_batch or {
            name: task.item_count(labels[name]) for name, task in present.items()
        }
        rows = {name: inputs[task.rows_name] for name, task in present.items() if task.rows_name in inputs}
        outputs, losses, extra = self.task_losses(model, features, labels, counts, rows)
        if num_items_in_batch and self.fusion.wants_gradient_norms:
            self._note_feature_gradients(losses, outputs.last_hidden_state)
        terms = self.fusion.terms(losses)
        for name in self.stopped_tasks if num_items_in_batch else ():
            if name in terms:
                terms[name] = 0.0 * terms[name]
        if num_items_in_batch and self.surgery is not None:
            names = [name for name in self._present if name in self.tasks] if self._mixed else list(terms)
            terms = self.surgery.reweighted(terms, outputs.last_hidden_state, names)
        loss = total(terms)
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
        if num_items_in_batch:
            for name, value in {**losses, **extra}.items():
                self._window[name] = self._window.get(name, 0.0) + value.detach().float()
        return (loss, outputs) if return_outputs else loss

    def task_losses(
        self,
        model: nn.Module,
        features: dict[str, Tensor],
        labels: dict[str, Tensor],
        counts: ItemCounts,
        rows: dict[str, Tensor],
    ) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
        """Losses of one batch.

        Args:
            model: the model, perhaps wrapped.
            features: model inputs.
            labels: by task that is present.
            counts: labelled items of the window by task.
            rows: places of a task's rows in the batch, for tasks that have only some of them.

        Returns:
            Model output, by present task the loss of this batch as a share of the window's mean, and further terms.
        """
        outputs = model(**features, tasks=list(labels))
        losses = {
            name: self.tasks[name].loss_sum(own_rows(outputs[f"logits_{name}"], rows.get(name)), target)
            / divisor(counts[name].to(target.device))
            for name, target in labels.items()
        }
        return outputs, losses, {}

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one batch; after the last one of a window, fusion and mixing learn from it."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        last = self.accelerator.sync_gradients
        if self.multi_task and num_items_in_batch:
            if self.surgery is not None and self._several_sources:
                self.surgery.keep(_source(inputs), last)
                if last:
                    self.surgery.combine()
            if last:
                self._finish_window()
        if last and self.penalty is not None:
            scaler = self.accelerator.scaler
            self.penalty.pull(1.0 if scaler is None else scaler.get_scale())
        return loss

    def _finish_window(self) -> None:
        zero = torch.zeros((), device=self.args.device)
        window = {name: self._window.get(name, zero) for name in self._present}
        for name, value in window.items():
            total, windows = self._logged.get(name, (zero, 0))
            self._logged[name] = (total + value, windows + 1)
        if self.fusion.adaptive or self.mixing_strategy == "loss":
            losses = {name: float(value) for name, value in self._over_ranks(window).items() if name in self.tasks}
            self.fusion.observe(losses)
            if self.mixing_strategy == "loss":
                for name, loss in losses.items():
                    loss /= self.chance_losses.get(name, 1.0)
                    self._pulls[name] = 0.9 * self._pulls.get(name, loss) + 0.1 * loss
        if self._feature_gradients:
            summed = self._over_ranks(self._feature_gradients)
            self.fusion.observe_gradient_norms({name: float(value.norm()) for name, value in summed.items()})
        if self.surgery is not None:
            self.surgery.finish_window()
        self._window, self._feature_gradients = {}, {}
        every = getattr(self.args, "measure_interference", None)
        if every and self.state.global_step % every == 0:
            self._measure_interference()

    @property
    def _measures_on(self) -> str | None:
        """On which rows the tasks' gradients are compared, if they are at all."""
        measured = getattr(self.args, "measure_interference", None)
        if not measured:
            return None
        return getattr(self.args, "measure_on", "train")

    def _measure_interference(self) -> None:
        """Compare the tasks' gradients, without dropout, and leave everything as it was."""
        if self._measures_on == "validation":
            self._measure_on_validation()
        else:
            self._measure_on_train()

    def _measure_on_validation(self) -> None:
        """On some validation rows of each source, at all layers of the encoder."""
        core: Any = self.accelerator.unwrap_model(self.model)
        step, groups = self.state.global_step, []
        for number, group in enumerate(self.eval_groups):
            generator = np.random.default_rng([self.args.seed, step, number])
            rows = generator.choice(len(group.dataset), min(LOOK_ROWS, len(group.dataset)), False)
            groups.append(dataclasses.replace(group, dataset=group.dataset.select(rows)))
        found = held_out_gradients(core, groups, self.data_collator, batch_size=self.args.train_batch_size)
        vectors = {
            name: self.fusion.weight(name, torch.tensor(wanted.loss)) * wanted.gradient
            for name, wanted in found.items()
        }
        shares = {
            name: wanted.loss / self.chance_losses[name] for name, wanted in found.items() if name in self.chance_losses
        }
        if vectors:
            self.gradient_log.add(step, list(vectors), gramian(vectors).tolist(), shares)

    def _measure_on_train(self) -> None:
        """On a batch of each source, where `surgery_scope` says."""
        core: Any = self.accelerator.unwrap_model(self.model)
        gradients = SharedGradients(core, getattr(self.args, "surgery_scope", "features"))
        training = core.training
        core.eval()
        step, vectors, shares = self.state.global_step, {}, {}
        for number, group in enumerate(self.train_groups):
            generator = np.random.default_rng([self.args.seed, step, number])
            rows = generator.choice(len(group.dataset), min(self.args.train_batch_size, len(group.dataset)), False)
            batch = self.data_collator(MixedDataset([group.dataset]).__getitems__([(0, int(row)) for row in rows]))
            inputs = self._prepare_inputs(batch)
            features = {key: value for key, value in inputs.items() if not key.startswith(_NO_INPUTS)}
            with self.compute_loss_context_manager():
                outputs = core(**features, tasks=list(group.tasks))
            if not outputs.last_hidden_state.requires_grad:
                continue
            for name in group.tasks:
                task, target = self.tasks[name], inputs[self.tasks[name].label_name]
                items = task.item_count(target)
                if not items:
                    continue  # rows of others, which only a teacher labels
                loss = task.loss_sum(outputs[f"logits_{name}"], target) / divisor(items)
                vectors[name] = gradients.of(self.fusion.weight(name, loss) * loss, outputs.last_hidden_state)
                shares[name] = float(loss.detach()) / self.chance_losses[name]
        core.train(training)
        if vectors:
            self.gradient_log.add(step, list(vectors), gramian(vectors).tolist(), shares)

    def interference(self) -> dict[str, Any] | None:
        """How the tasks get along, from what `measure_interference` compared; None where nothing was measured."""
        if not self.multi_task or not self.gradient_log.steps:
            return None
        on = self._measures_on or "train"
        scope = SCOPE_WORDS["full" if on == "validation" else getattr(self.args, "surgery_scope", "features")]
        return interference_report(self.gradient_log, scope, on)

    def _over_ranks(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over processes, in one go. All ranks call it with the same names."""
        if self.args.world_size == 1 or not values:
            return values
        summed: Any = self.accelerator.reduce(torch.stack(list(values.values())), "sum")
        return dict(zip(values, summed, strict=True))

    def _note_feature_gradients(self, losses: Mapping[str, Tensor], features: Tensor) -> None:
        """Add the gradient of each loss at the features that all heads read; it passes through heads only."""
        for name in (name for name in self._present if name in self.tasks):
            total = self._feature_gradients.get(name, features.new_zeros(features.shape[-1], dtype=torch.float32))
            if name in losses:
                (found,) = torch.autograd.grad(losses[name], features, retain_graph=True, allow_unused=True)
                total = total if found is None else total + found.float().reshape(-1, features.shape[-1]).sum(0)
            self._feature_gradients[name] = total

    def _finds_unused_parameters(self, model: nn.Module) -> bool:
        """Whether nothing waits for the gradients of parts that a batch does not use: one process, or DDP looks."""
        return getattr(model, "find_unused_parameters", True)

    def _touch_unread_parts(self, present: Mapping[str, Task]) -> Tensor:
        """Zero, through every parameter that this batch may not use.

        These are heads and adapters of absent tasks, poolers, and all encoders where tasks read different places. DDP
        that does not look for unused parameters waits for the gradients of all of them.
        """
        core = self.accelerator.unwrap_model(self.model)
        assert isinstance(core, MultiTaskModel)
        absent = [name for name in self.tasks if name not in present]
        parts: list[nn.Module | None] = [core.heads[self.tasks[name].head_name] for name in absent]
        parts += [adapter_of(core, name) for name in absent]
        parts += [
            part for encoder in core.encoders.values() for key, part in encoder.named_children() if key == "pooler"
        ]
        if reads_elsewhere(core):
            parts += [core.encoders, core.branches]
        total = torch.zeros((), device=self.args.device)
        found = {parameter for part in parts if part is not None for parameter in part.parameters()}
        for parameter in (parameter for parameter in found if parameter.requires_grad):
            total = total + 0.0 * parameter.sum()
        return total

    @property
    def mixing_strategy(self) -> str:
        """How sources of rows are mixed."""
        return getattr(self.args, "mixing", "proportional")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add `loss_<task>`, `weight_<task>` where weights change, and penalties to training logs; else `Trainer`'s."""
        if self.multi_task and "loss" in logs:
            losses = self._over_ranks({name: total for name, (total, _) in self._logged.items()})
            for name, total in losses.items():
                logs[f"loss_{name}"] = float(total) / self._logged[name][1]
            moving = [task.final_weight for task in self.tasks.values() if task.final_weight is not None]
            if self.fusion.adaptive or moving:
                logs |= {f"weight_{name}": self.fusion.weight(name) for name in self.tasks}
            if self.surgery is not None:
                logs |= {f"combination_{name}": weight for name, weight in self.surgery.weights.items()}
            self._logged = {}
        if self.penalty is not None and "loss" in logs:
            logs |= self.penalty.figures()
        super().log(logs, start_time)

    # ---- what a checkpoint holds beside weights ----

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.multi_task and self.args.should_save:
            state = {
                "fusion": self.fusion.state_dict(),
                "mixing": {**self._mixing_state(), "pulls": self._pulls},
                "gradients": self.gradient_log.state_dict() | {"rows": self._measures_on},
                "stopped": {"tasks": self.stopped_tasks, "best": self._best_scores},
                "seen": sorted(self._seen),
            }
            (Path(output_dir) / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            if "parameter group" not in str(error):
                raise
            raise TrainingError(
                f"expected the optimizer state of this model in {checkpoint}, found that of another; tasks were added "
                "or removed, or parts frozen, since it was saved: train without resume_from_checkpoint"
            ) from error
        file = Path(checkpoint or "") / STATE_FILE
        if self.multi_task and checkpoint is not None and file.exists():
            state = json.loads(file.read_text(encoding="utf-8"))
            self.fusion.load_state_dict(state["fusion"])
            self._load_mixing_state(state["mixing"])
            self._pulls = state["mixing"]["pulls"]
            self._seen = set(state.get("seen", self.tasks))
            self.stopped_tasks = state["stopped"]["tasks"]
            self._best_scores = {name: (best, waited) for name, (best, waited) in state["stopped"]["best"].items()}
            if state["gradients"].get("rows", self._measures_on) == self._measures_on:
                # Otherwise it would be a mean over rows of two kinds.
                self.gradient_log = GradientLog.from_state_dict(state["gradients"])

    def _mixing_state(self) -> dict[str, Any]:
        if self.train_streams:
            return {"group_size": self._train_batch_size * self.accelerator.num_processes}
        done = float(self.state.epoch or 0.0) - self.mixing_sampler.epoch
        return self.mixing_sampler.state_dict(round(done * self.mixing_sampler.groups))

    def _load_mixing_state(self, saved: Mapping[str, Any]) -> None:
        """Go on among the rows where the checkpoint stopped, in batches of any size.

        Raises:
            TrainingError: streams, in batches of another size.
        """
        if self.train_streams:
            size = self._train_batch_size * self.accelerator.num_processes
            if size != saved["group_size"]:
                raise TrainingError(
                    f"expected streams in the batches of the checkpoint, {saved['group_size']} rows over all "
                    f"processes, found {size}; go on with as many, or load the data without streaming"
                )
            return
        # As `Trainer` counts what it skips.
        windows = math.ceil(self.mixing_sampler.groups / self.args.gradient_accumulation_steps)
        epoch, step = divmod(self.state.global_step, max(windows, 1))
        skipped = 0 if self.args.ignore_data_skip else step * self.args.gradient_accumulation_steps
        self.mixing_sampler.load_state_dict(saved, epoch, skipped)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_renamed(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_renamed(str(self.state.best_model_checkpoint))
        self.scores = self._scores_by_step.get(self.state.best_global_step or -1, {})
        self._scored_at = self.state.global_step

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # Files name the weights of some families (ViT, DINOv2) as older versions did, and `Trainer` loads by name: it
        # would leave those as they are, with a warning.
        if load_result.missing_keys:
            self._not_loaded = load_result
            return
        # Layers in 4 bits save what their numbers mean, and do not ask for it again.
        own = self.accelerator.unwrap_model(self.model, keep_torch_compile=False).state_dict()
        self._kept = {key: own[key] for key in load_result.unexpected_keys if key in own}
        unknown = [key for key in load_result.unexpected_keys if key not in own]
        super()._issue_warnings_after_load(load_result._replace(unexpected_keys=unknown))

    def _load_renamed(self, checkpoint: str) -> None:
        """Load all weights of a checkpoint with the names that `from_pretrained` knows, where some were not found."""
        result, self._not_loaded = self._not_loaded, None
        kept, self._kept = self._kept, {}
        _check_kept(kept, Path(checkpoint))
        if result is None:
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if isinstance(model, PreTrainedModel):
            # Not strict: quantized weights come with more than parameters.
            found = model.load_state_dict(type(model).from_pretrained(checkpoint).state_dict(), strict=False)
            if found.missing_keys:
                raise TrainingError(
                    f"expected all weights of the model in {checkpoint}, found none for {len(found.missing_keys)} of "
                    f"them, such as {found.missing_keys[0]}; resume with the model that saved it"
                )
        else:
            super()._issue_warnings_after_load(result)

    # ---- what is saved and published ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.multi_task and self.args.should_save:
            # A pickle, with paths of this machine, which nothing reads.
            (Path(output_dir or str(self.args.output_dir)) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write `README.md` into the output folder: tasks, scores and settings of a multi-task model."""
        if not self.multi_task:
            stock: Any = super().create_model_card
            stock(language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args)
            return
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        core = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        assert isinstance(core, MultiTaskModel)
        text = trainer_card(
            model_name or folder.resolve().name,
            core,
            self.args,
            self.scores if self._scored_at == self.state.global_step else {},
            steps=self.state.global_step,
            finetuned_from=finetuned_from,
            metadata={
                "language": language,
                "license": license,
                "tags": [tags] if isinstance(tags, str) else tags,
                "datasets": dataset_tags or dataset,
            },
        )
        (folder / "README.md").write_text(text, encoding="utf-8")

    def start_epoch(self, epoch: int) -> None:
        """Tell fusion and mixing that an epoch begins, or begins again after a restart."""
        self.fusion.start_epoch(epoch)
        if self.train_streams:
            return
        sampler = self.mixing_sampler
        sampler.excluded = {
            number
            for number, group in enumerate(self.train_groups)
            if all(name in self.stopped_tasks for name in group.own_tasks)
        }
        if sampler.strategy in REACTIVE and len(sampler.history) <= epoch and self._pulls:
            default = float(np.mean(list(self._pulls.values())))
            pulls = {name: self._pulls.get(name, default) for name in self.tasks}
            sampler.react([float(np.mean([pulls[name] for name in group.own_tasks])) for group in self.train_groups])
        sampler.set_epoch(epoch)

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
        features = {key: value for key, value in inputs.items() if not key.startswith(_NO_INPUTS)}
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**features, tasks=list(self._wanted_tasks or labels) or None)
        logits = {
            name: outputs[f"logits_{name}"].detach().float() for name in self.tasks if f"logits_{name}" in outputs
        }
        loss = None
        if labels and "loss" in self.args.include_for_metrics:
            loss = self.fusion.static(
                {
                    name: self._mean_loss(
                        self.tasks[name], own_rows(logits[name], inputs.get(self.tasks[name].rows_name)), target
                    )
                    for name, target in labels.items()
                }
            )
        return loss, logits, labels or None

    @staticmethod
    def _mean_loss(task: Task, logits: Tensor, labels: Tensor) -> Tensor:
        return task.loss_sum(logits, labels) / divisor(task.item_count(labels))

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
        answers = self._answer(groups, "Evaluation", metric_key_prefix)
        scores, losses = self._score(answers, metric_key_prefix)
        if eval_dataset is None:
            self.scores, self._scored_at = scores, self.state.global_step
            self._pulls_by_score(scores)
            if self.is_in_train:
                self._scores_by_step[self.state.global_step] = scores
                self._stop_tasks(scores)
        rows = sum(len(group.dataset) for group in groups)
        metrics = self._flat_metrics(scores, losses, metric_key_prefix, start, rows)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def _flat_metrics(
        self, scores: Scores, losses: Mapping[str, Tensor], prefix: str, start: float, rows: int
    ) -> dict[str, float]:
        """The names under which logs and callbacks see what is kept by task and metric."""
        pairs = [(name, metric) for name, found in scores.items() for metric in found]
        names = flat_names([*known_scores(self.tasks.values()), *pairs])
        metrics: dict[str, float] = {}
        if losses:
            metrics[f"{prefix}_{LOSS}"] = float(self.fusion.static(dict(losses)))
        metrics |= {f"{prefix}_{names[name, metric]}": scores[name][metric] for name, metric in pairs}
        if (mean := average(self.tasks.values(), scores)) is not None:
            metrics[f"{prefix}_{AVERAGE}"] = mean
        batches = math.ceil(rows / (self.args.eval_batch_size * self.args.world_size))
        return metrics | speed_metrics(prefix, start, num_samples=rows, num_steps=batches)

    def _pulls_by_score(self, scores: Scores) -> None:
        """How far each task is from the best score that is known for it, as a share of that score."""
        if self.mixing_strategy != "score_gap":
            return
        targets = getattr(self.args, "mixing_targets", None) or {}
        for name, task in self.tasks.items():
            if (score := scores.get(name, {}).get(str(task.metric))) is not None:
                target = targets.get(name, 1.0)
                self._pulls[name] = max(target - score, 0.0) / target

    def _stop_tasks(self, scores: Scores) -> None:
        """Freeze the heads of tasks that did not get better for `task_patience` evaluations."""
        patience = getattr(self.args, "task_patience", None)
        if patience is None:
            return
        for name, task in self.tasks.items():
            score = scores.get(name, {}).get(str(task.metric))
            if score is None or name in self.stopped_tasks:
                continue
            best, waited = self._best_scores.get(name, (-math.inf, 0))
            self._best_scores[name] = (score, 0) if score > best else (best, waited + 1)
            if self._best_scores[name][1] >= patience:
                self.stopped_tasks.append(name)
                logger.warning("task '%s' stops at step %d: best score %.4f", name, self.state.global_step, best)
        if self._drawn_tasks() <= set(self.stopped_tasks):
            self.control.should_training_stop = True

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Answer every task with rows in `test_dataset`, and score those whose labels are there.

        A stock model is predicted as `Trainer` does.

        Returns:
            Predictions (logits, or what `preprocess_logits_for_metrics` made of them) and labels by task, and metrics
            under the names of `evaluate`; labels are None where no task has any.
        """
        if not self.multi_task:
            return super().predict(test_dataset, ignore_keys, metric_key_prefix)
        self._memory_tracker.start()
        start = time.time()
        groups = self._encode_for_prediction(test_dataset, metric_key_prefix)
        answers = self._answer(groups, "Prediction", metric_key_prefix)
        scores, losses = self._score(answers, metric_key_prefix)
        rows = sum(len(group.dataset) for group in groups)
        metrics = self._flat_metrics(scores, losses, metric_key_prefix, start, rows)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        if self.args.prediction_loss_only:
            return PredictionOutput(predictions=None, label_ids=None, metrics=metrics)  # type: ignore[arg-type]  # as Trainer
        predictions: Any = {name: answer.predictions for name, answer in answers.items()}
        labels: Any = {name: answer.labels for name, answer in answers.items() if answer.labels is not None}
        return PredictionOutput(predictions=predictions, label_ids=labels or None, metrics=metrics)

    def _encode_for_prediction(self, dataset: Any, role: str) -> list[EncodedGroup]:
        """Rows with the labels that are there; without any where some are none, as the dummies of many test sets."""
        rows = self._by_task(self.tasks, dataset, role)
        tasks = dict(self.tasks)
        for name in (name for name in rows if name in tasks):
            if tasks[name].label not in columns_of(rows[name]):
                tasks[name] = copy.copy(tasks[name])
                tasks[name].label = None
        try:
            return self._encode(tasks, rows, role)
        except DataError as error:
            without = {name: copy.copy(task) for name, task in tasks.items()}
            for task in without.values():
                task.label = None
            groups = self._encode(without, rows, role)
            logger.warning("%s: the rows are answered without a look at their labels: %s", role, error)
            return groups

    def _answer(self, groups: Sequence[EncodedGroup], description: str, prefix: str) -> dict[str, "_Answer"]:
        """What the model says of every row, by task."""
        found = {}
        for group in groups:
            self._wanted_tasks = group.tasks
            try:
                found |= self._answer_group(group, description, prefix)
            finally:
                self._wanted_tasks = None
        return found

    def _answer_group(self, group: EncodedGroup, description: str, prefix: str) -> dict[str, "_Answer"]:
        rows: Any = MixedDataset([group.dataset])
        # A loader that `Trainer` kept is one of another source.
        self.__dict__.pop("_eval_dataloaders", None)
        loader = self.get_test_dataloader(rows) if description == "Prediction" else self.get_eval_dataloader(rows)
        kept: dict[str, Any] = {"inputs": None, "losses": None}

        def keep(found: EvalPrediction) -> dict[str, float]:
            kept.update(inputs=found.inputs, losses=found.losses)
            return {}

        # The loop knows one function for all tasks, and lets go of what only such functions see.
        preprocess, self.compute_metrics = self.preprocess_logits_for_metrics, keep
        if preprocess is not None:
            self.preprocess_logits_for_metrics = partial(_beside_logits, preprocess)  # type: ignore[assignment]  # by task
        try:
            output: Any = self.evaluation_loop(
                loader, f"{description} of {group.name}", prediction_loss_only=False, metric_key_prefix=prefix
            )
        finally:
            self.compute_metrics, self.preprocess_logits_for_metrics = None, preprocess
        logits = predictions = output.predictions
        if preprocess is not None:
            logits, predictions = output.predictions["logits"], output.predictions["predictions"]
        labels = output.label_ids or {}
        return {name: _Answer(logits[name], predictions[name], labels.get(name), **kept) for name in group.tasks}

    def _score(self, answers: Mapping[str, "_Answer"], prefix: str) -> tuple[Scores, dict[str, Tensor]]:
        """Scores of the tasks that have labels, and their mean losses."""
        scores: Scores = {}
        losses: dict[str, Tensor] = {}
        for name, answer in answers.items():
            if answer.labels is None:
                continue
            if not labelled_rows(answer.labels):
                logger.warning("%s: no row with a label of task '%s', which gets no score", prefix, name)
                continue
            task = self.tasks[name]
            losses[name] = self._mean_loss(task, torch.as_tensor(answer.logits), torch.as_tensor(answer.labels))
            scores[name] = {LOSS: float(losses[name])}
            if self.args.prediction_loss_only:
                continue
            scores[name] |= task.compute_metrics(answer.logits, answer.labels)
            if (extra := self.task_metrics.get(name)) is not None:
                scores[name] |= extra(
                    EvalPrediction(
                        predictions=answer.predictions,
                        label_ids=answer.labels,
                        inputs=answer.inputs,
                        losses=answer.losses,
                    )
                )
        return scores, losses


@dataclasses.dataclass(frozen=True)
class _Answer:
    """What the model says of all rows of a task.

    Attributes:
        logits: its own.
        predictions: what `preprocess_logits_for_metrics` made of them, else the same.
        labels: None where the rows have none.
        inputs: where `include_for_metrics` names them.
        losses: where it names them: the fused loss of its batch for each row.
    """

    logits: np.ndarray
    predictions: Any
    labels: np.ndarray | None
    inputs: Any
    losses: Any


def _beside_logits(
    preprocess: Callable[[Tensor, Tensor], Any], logits: Mapping[str, Tensor], labels: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    """The logits, and what a function of the user's makes of those of each task."""
    made = {name: preprocess(values, (labels or {}).get(name)) for name, values in logits.items()}  # type: ignore[arg-type]  # None as Trainer
    return {"logits": dict(logits), "predictions": made}


def _refuse_wrapped(model: Any) -> None:
    """What stands around a multi-task model would be taken for a stock one.

    Raises:
        TrainingError: a `PeftModel`, a compiled or a parallel model around one.
    """
    if isinstance(model, nn.Module) and any(isinstance(part, MultiTaskModel) for part in model.modules()):
        raise TrainingError(
            f"expected a MultiTaskModel, found a {type(model).__name__} around one; pass the model itself: adapters "
            "are put on it by model.add_adapters(), and torch_compile=True compiles it"
        )


def _check_kept(kept: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Frozen numbers in few bits mean what they meant in the checkpoint.

    Raises:
        TrainingError: they were made of other weights.
    """
    for file in sorted(checkpoint.glob("*.safetensors")) if kept else ():
        with safe_open(file, framework="pt") as saved:
            for name in kept.keys() & set(saved.keys()):
                if not torch.equal(saved.get_tensor(name), kept[name].cpu()):
                    raise TrainingError(
                        f"expected the quantized encoder of {checkpoint.name}, found one whose '{name}' differs; "
                        "resume with the model that saved it"
                    )


def _refuse_rows_by_task(model: Any, rows: Any, kwargs: Mapping[str, Any]) -> None:
    """`Trainer` would stop at them with a KeyError.

    Raises:
        TrainingError: rows by task for a model without tasks.
    """
    if not isinstance(rows, Mapping):
        return
    if model is None and kwargs.get("model_init") is not None:
        raise TrainingError(_NO_MODEL_INIT)
    raise TrainingError(
        f"expected a MultiTaskModel for rows by task, found {type(model).__name__}; build one with "
        "MultiTaskModel.from_encoder, or pass one data set"
    )


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


def own_rows(values: Tensor, rows: Tensor | None) -> Tensor:
    """The rows of a batch that belong to a task; all where it is alone."""
    return values if rows is None else values[rows]


def _source(batch: Mapping[str, Any]) -> str:
    """Which tasks have rows in a batch, as one word."""
    return "+".join(key.removeprefix("labels_") for key in batch if key.startswith("labels_"))


class _TellTrainer(TrainerCallback):
    """Tells the trainer when training and epochs begin; accelerate does not reach a batch sampler on one process."""

    def __init__(self, trainer: MultiTaskTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.start_training()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.end_training()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.freeze_stopped_heads()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.start_epoch(int(state.epoch or 0))
