"""A Trainer whose student learns to answer like its teachers, and to think like them.

Teachers are asked while the student trains, or once for all rows before (`teacher_cache`). Which is done changes no
gradient: a batch then brings along what was said of its rows.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from hf_mtcompress.data.mixing import SIGNALS, UNCOUNTED, MixedDataset
from hf_mtcompress.data.preprocessing import EncodedGroup, for_every_task
from hf_mtcompress.data.readers import Reader, positions_of, reader_if_known, reader_of
from hf_mtcompress.data.teacher_cache import (
    CacheSummary,
)
from hf_mtcompress.errors import TaskError, TrainingError
from hf_mtcompress.formats.runtime import Runtime
from hf_mtcompress.losses.criteria import EMBEDDING, AnswerCriterion, Criterion, StateCriterion, criterion_of, scheduled
from hf_mtcompress.losses.fusion import Weight
from hf_mtcompress.model.anatomy import encoder_of
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.sizes import word_table
from hf_mtcompress.model.states import reading_states, state_width
from hf_mtcompress.model.stock_heads import task_of_stock
from hf_mtcompress.tasks import Task
from hf_mtcompress.tasks.base import UNLABELLED, divisor
from hf_mtcompress.trainers.arguments import names_in
from hf_mtcompress.trainers.asking_ahead import AsksAhead
from hf_mtcompress.trainers.multitask import ONLY_COUNTED, ItemCounts, MultiTaskTrainer, own_rows
from hf_mtcompress.trainers.teachers import (
    STOCK_TASK,
    TeacherPanel,
    Teachers,
    logits_name,
    opened,
    panel_of,
    refuse_wrapped,
)

logger = logging.getLogger(__name__)

DEFAULT_CRITERIA = "logits,hidden"
CACHE_FOLDER = "_teacher_cache"
"""In the output folder; `Trainer.push_to_hub` leaves out what begins so."""


class DistillationMixin(AsksAhead):
    """Adds teachers to a Trainer: to `MultiTaskTrainer`, or to your own subclass of `transformers.Trainer`.

    `class Mine(DistillationMixin, MyTrainer)` trains what `MyTrainer` trains, a stock model with one head or a
    `MultiTaskModel` (then `MyTrainer` is a `MultiTaskTrainer`). See `DistillationTrainer` for the arguments. The loss
    on labels is the task's own, with `label_smoothing_factor` of a stock model: a `compute_loss` of `MyTrainer`, or a
    `compute_loss_func`, has no place in it and is refused.
    """

    # What it uses of the Trainer that it is mixed with.
    model: Any
    args: Any
    state: Any
    accelerator: Any
    train_dataset: Any
    data_collator: Any
    processing_class: Any

    def __init__(
        self,
        *args: Any,
        teacher: Teachers | None = None,
        teachers: Teachers | None = None,
        teacher_processing_class: Any = None,
        criteria: Sequence[Criterion | str] | None = None,
        temperature: float | None = None,
        label_weight: Weight | None = None,
        teacher_cache: str | Path | Literal[False] | None = None,
        probe_rows: int | None = None,
        every_task: bool | None = None,
        **kwargs: Any,
    ) -> None:
        given = teachers if teacher is None else teacher
        if given is None or (teacher is not None and teachers is not None):
            raise TaskError("expected teacher= or teachers=, found " + ("both" if given is not None else "neither"))
        super().__init__(*args, **kwargs)
        settings = self.args
        refuse_wrapped(self._core, "student")
        given, beside = opened(given)
        self.label_weight: Weight = getattr(settings, "label_weight", 0.5) if label_weight is None else label_weight
        softness = float(getattr(settings, "temperature", 2.0) if temperature is None else temperature)
        self.criteria = _criteria(criteria or names_in(getattr(settings, "criteria", DEFAULT_CRITERIA)), softness)
        _check_weights(self.label_weight, softness)
        self.answer_criteria = [item for item in self.criteria if isinstance(item, AnswerCriterion)]
        self.state_criteria = [item for item in self.criteria if isinstance(item, StateCriterion)]
        self._signals: dict[str, Tensor] = {}
        """What the present batch brings along of its teachers."""
        self._uncounted: Tensor | None = None
        """Rows of the present batch that count nowhere."""
        self._stock: Task | None = None
        self._projections: nn.ModuleDict | None = None
        """By state of the student: what takes it to the teacher's width; kept from one `train` to the next."""
        if not getattr(self, "multi_task", False):
            self._stock = self._stock_task()
            self.reader = reader_if_known(self.processing_class)
            # Losses are divided by the items of a whole accumulation window in `compute_loss`.
            self.loss_is_scaled_for_ga = True
        self.panel = self._panel(given, teacher_processing_class, beside)
        for member in self.panel.teachers:
            member.to(self.args.device)
        self._check_states()
        if getattr(settings, "every_task", False) if every_task is None else every_task:
            self._ask_every_task()
        folder = None if teacher_cache is False else teacher_cache or getattr(settings, "teacher_cache", None)
        foreign = [member for member in self.panel.teachers if member.reader is not None]
        if folder is None and foreign and teacher_cache is not False:
            folder = Path(str(settings.output_dir)) / CACHE_FOLDER
            logger.warning(
                "a teacher reads inputs of its own: it is asked about all rows now, and what it says is kept in %s",
                folder.name,
            )
        count = int(getattr(settings, "probe_rows", 64) if probe_rows is None else probe_rows)
        if count and self.answer_criteria:
            self._probe(count)
        self.caches: list[CacheSummary] = []
        """Of what teachers said of the training rows, one for each source of rows; empty without a cache."""
        if folder is not None and self.train_dataset is not None:
            self._use_cache(Path(folder))

    # ---- who teaches what ----

    @property
    def _core(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    @property
    def _answered(self) -> dict[str, Task]:
        """The student's tasks by name."""
        if self._stock is not None:
            return {STOCK_TASK: self._stock}
        # Of `MultiTaskTrainer`, which smooths labels where it is told to.
        return self.tasks  # type: ignore[attr-defined]  # of the Trainer

    @property
    def _student_encoder(self) -> PreTrainedModel:
        core = self._core
        return core.encoder if isinstance(core, MultiTaskModel) else encoder_of(core)

    def _label_key(self, name: str) -> str:
        return "labels" if self._stock is not None else self._answered[name].label_name

    def _stock_task(self) -> Task:
        """The task of a stock student.

        Raises:
            TaskError: a loss of the user's own, which could not be mixed with criteria.
        """
        own = [
            cls.__name__
            for cls in type(self).__mro__
            if "compute_loss" in vars(cls) and cls not in (Trainer, MultiTaskTrainer) and cls is not DistillationMixin
        ]
        if own or getattr(self, "compute_loss_func", None) is not None:
            raise TaskError(
                f"expected the model's own loss on labels beside a teacher, found compute_loss of {', '.join(own)}"
                if own
                else "expected the model's own loss on labels beside a teacher, found compute_loss_func; leave it out"
            )
        task = task_of_stock(STOCK_TASK, self._core)
        smoothing = float(getattr(self.args, "label_smoothing_factor", 0.0))
        one_label = task.problem in ("single_label_classification", "token_classification")
        return dataclasses.replace(task, label_smoothing=smoothing) if smoothing and one_label else task

    def _panel(self, given: Any, processing_class: Any, beside: Mapping[int, Any]) -> TeacherPanel:
        models, own = _models_and_processors(given, processing_class)
        readers: dict[int, Reader] = {}
        for model, processor in zip(models, own, strict=True):
            if model is self._core:
                raise TaskError("expected a teacher beside the student, found the student; give copy.deepcopy(model)")
            refuse_wrapped(model, "teacher")
            if processor is None and self.reader is not None:
                processor = beside.get(id(model))
            length = None
            if isinstance(model, Runtime):
                length = model.reader.max_length
                processor = model.reader.processor if processor is None else processor
            elif isinstance(model, MultiTaskModel):
                length = (model.config.preprocessing or {}).get("main", {}).get("max_length")
            if processor is None:
                self._check_vocabulary(model)
            elif self.reader is None:
                raise TaskError(
                    "expected processing_class, the student's tokenizer or image processor, beside that of the "
                    "teacher, found none; pass it"
                )
            elif not (reader := reader_of(processor, length)).reads_as(self.reader):
                readers[id(model)] = reader
        if readers and self._stock is not None:
            raise TaskError(
                "expected a teacher with the student's tokenizer for a stock student, whose rows hold no texts, found "
                "another; make the student a MultiTaskModel (from_heads) and pass the texts"
            )
        return panel_of(given, self._answered, readers, answers=bool(self.answer_criteria))

    def _check_vocabulary(self, teacher: Any) -> None:
        encoder = teacher.encoder if isinstance(teacher, MultiTaskModel) else encoder_of(teacher)
        own = self._student_encoder.config.to_dict().get("vocab_size")
        other = encoder.config.to_dict().get("vocab_size")
        if own != other:
            raise TaskError(
                f"expected teacher and student with one tokenizer, found vocabularies of {other} and {own} tokens; "
                "pass its own tokenizer as teacher_processing_class, or take a student of the teacher's layers"
            )

    def _ask_every_task(self) -> None:
        """Let rows of a task teach the others too, which the teacher answers for them."""
        if self._stock is not None or not self.answer_criteria or getattr(self, "train_streams", None):
            raise TaskError(
                "every_task: expected a MultiTaskModel, a criterion for answers and rows with a length, found "
                + (
                    "a stock model"
                    if self._stock is not None
                    else "streams"
                    if self.answer_criteria
                    else f"criteria {[item.kind for item in self.criteria]}"
                )
                + "; leave it out"
            )
        groups: list[EncodedGroup] = getattr(self, "train_groups", [])
        if groups:
            self.train_groups = for_every_task(groups, self._answered)
            self.train_dataset = MixedDataset([group.dataset for group in self.train_groups])

    def _check_states(self) -> None:
        """State criteria fit student and teachers."""
        self._pairs: list[tuple[StateCriterion, list[tuple[str, str]]]] = []
        showing = list(
            {id(self.panel.shown_by([name])): self.panel.shown_by([name]) for name in self._answered}.values()
        )
        if not self.state_criteria:
            return
        encoders = [teacher.encoder for teacher in showing]
        if any(encoder is None for encoder in encoders):
            raise TaskError(
                f"expected a teacher in torch for the criteria {[item.kind for item in self.state_criteria]}, found a "
                "graph, which shows answers only; use criteria=['logits'], or the checkpoint the graph was made of"
            )
        models = [self._core, *(teacher.model for teacher in showing)]
        if any(isinstance(model, MultiTaskModel) and len(model.adapters) for model in models):
            raise TaskError(
                "expected criteria ['logits'] with adapters, found "
                f"{', '.join(repr(item.kind) for item in self.state_criteria)} too; with an adapter every task has "
                "states of its own, so that there are none to compare for all of them"
            )
        clash = [item.kind for item in self.state_criteria if item.kind in self._answered]
        if clash:
            raise TaskError(f"expected task names other than those of criteria, found {clash}; rename the task")
        if len(showing) > 1 and getattr(self, "_mixed", False):
            raise TrainingError(
                f"expected one teacher for the states in batches of several sources, found {len(showing)}; use "
                "batches='one_source', or criteria=['logits']"
            )
        kinds = [item.kind for item in self.state_criteria]
        own = _depth_and_width(self._student_encoder, kinds)
        shapes = {_depth_and_width(encoder, kinds) for encoder in encoders if encoder}
        if len(shapes) > 1:
            raise TaskError(
                f"expected teachers of one depth and width for state criteria, found {sorted(shapes)}; use "
                "criteria=['logits']"
            )
        first = encoders[0]
        assert first is not None
        depths = own[0], next(iter(shapes))[0]
        for item in self.state_criteria:
            words = word_table(self._student_encoder) is not None
            if item.on_patches and words and not hasattr(self._student_encoder.config, "patch_size"):
                raise TaskError(f"criterion '{item.kind}': expected a vision encoder, found one for texts")
            self._pairs.append((item, item.pairs(*depths)))
        self._own_states = list(dict.fromkeys(own for _, pairs in self._pairs for own, _ in pairs))
        self._their_states = list(dict.fromkeys(theirs for _, pairs in self._pairs for _, theirs in pairs))
        self._widths = {
            **{("own", name): state_width(self._student_encoder, name) for name in self._own_states},
            **{("theirs", name): state_width(first, name) for name in self._their_states},
        }

    _own_states: Sequence[str] = ()
    _widths: Mapping[tuple[str, str], int] = {}

    # ---- training ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; where widths differ projections are learned beside the student and dropped after it.

        Raises:
            TrainingError: a teacher with inputs of its own that was not asked; or `model_init`, whose new models the
                teacher was not compared with.
        """
        if any(teacher.reader is not None for teacher in self.panel.teachers) and not self.caches:
            raise TrainingError(
                "expected a teacher with a tokenizer of its own to be asked before, found teacher_cache=False; give a "
                "folder, or leave it out"
            )
        if getattr(self, "model_init", None) is not None:
            raise TrainingError(
                "expected a student beside a teacher, found model_init; make a trainer for each student"
            )
        projections = self._make_projections()
        if not projections:
            return super().train(*args, **kwargs)  # type: ignore[misc]  # of the Trainer
        model = self.model
        # A part of the model while training, so that optimizer, DDP and checkpoints hold it.
        model.projections = projections
        hook = model.register_forward_hook(_reach_projections)
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]  # of the Trainer
        finally:
            hook.remove()
            del model.projections

    def _make_projections(self) -> nn.ModuleDict:
        """The projections, the same ones in every training, as the optimizer knows them."""
        if self._projections is None:
            made = {
                self._projection_name(item, own): nn.Linear(self._widths["own", own], self._widths["theirs", theirs])
                for item, pairs in self._pairs
                for own, theirs in pairs
                if item.projected and self._widths["own", own] != self._widths["theirs", theirs]
            }
            self._projections = nn.ModuleDict(made).to(self.args.device)
        return self._projections

    @staticmethod
    def _projection_name(criterion: StateCriterion, state: str) -> str:
        return f"{criterion.kind}_{state}"

    @property
    def _progress(self) -> float:
        return self.state.global_step / max(self.state.max_steps - 1, 1)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Batches of one accumulation window, and how many items of each kind are in it over all ranks."""
        # Of the Trainer, which this class is mixed into.
        batches, counted = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        if self._stock is None:
            return batches, counted
        for batch in batches:
            if "labels" not in batch:
                batch["labels"] = self._open_labels(batch)
        found = [self._stock.item_count(batch["labels"]).cpu() for batch in batches]
        counts: ItemCounts = {STOCK_TASK: torch.stack(found).sum() if found else torch.tensor(0.0)}
        counts |= self.extra_counts(batches)
        if self.args.world_size > 1:
            gathered: Any = self.accelerator.reduce(torch.stack(list(counts.values())).to(device), "sum")
            counts = dict(zip(counts, gathered.cpu(), strict=True))
        return batches, counts

    def _open_labels(self, batch: Mapping[str, Any]) -> Tensor:
        """Labels of a stock student's batch that has none."""
        assert self._stock is not None
        positions = positions_of(batch)
        match self._stock.problem:
            case "token_classification":
                return torch.full(positions.shape, UNLABELLED, device=positions.device)
            case "single_label_classification":
                return torch.full((len(positions),), UNLABELLED, device=positions.device)
            case "multi_label_classification":
                shape = (len(positions), self._stock.num_outputs)
                return torch.full(shape, float(UNLABELLED), device=positions.device)
            case "regression":
                return torch.full((len(positions),), float("nan"), device=positions.device)

    def extra_counts(self, batches: list[dict[str, Any]]) -> ItemCounts:
        """Items of the window that each criterion runs over."""
        counts: ItemCounts = {}
        for name in self._answered:
            masks = [self._asked(name, batch).sum() for batch in batches if self._label_key(name) in batch]
            counts[name + ONLY_COUNTED] = torch.stack(masks).sum().float().cpu() if masks else torch.tensor(0.0)
        for item, pairs in self._pairs:
            masks = [self._state_mask(item, pairs[0][1], batch).sum() for batch in batches]
            counts[item.kind] = torch.stack(masks).sum().float().cpu() if masks else torch.tensor(0.0)
        return counts

    def _asked(self, name: str, batch: Mapping[str, Any]) -> Tensor:
        """Which items of a task count beside the teacher: (rows,), or (rows, positions) of word labels.

        Rows without a label count too, as the teacher has an answer for them. Of words, those with a label; of a row
        without any, every position.
        """
        task, target = self._answered[name], batch[self._label_key(name)]
        rows = batch.get(f"rows_{name}")
        if task.problem == "token_classification":
            labelled = target != UNLABELLED
            attention = own_rows(positions_of(batch), rows).bool()
            mask = labelled | (~labelled.any(1, keepdim=True) & attention)
        else:
            mask = torch.ones(len(target), dtype=torch.bool, device=target.device)
        if UNCOUNTED in batch:
            skipped = own_rows(batch[UNCOUNTED], rows)
            mask = mask & ~(skipped[:, None] if mask.dim() == 2 else skipped)
        wanted = batch.get(f"{SIGNALS}{logits_name(name)}")
        return mask if wanted is None else mask & wanted.isfinite().all(-1)

    def _state_mask(self, criterion: StateCriterion, theirs: str, batch: Mapping[str, Any]) -> Tensor:
        """Which positions (rows, where a criterion compares rows) count: of texts (rows, positions), else (rows,)."""
        positions = positions_of(batch).bool()
        if UNCOUNTED in batch:
            skipped = batch[UNCOUNTED]
            positions = positions & ~(skipped[:, None] if positions.dim() == 2 else skipped)
        wanted = batch.get(f"{SIGNALS}{theirs}")
        if wanted is not None and wanted.dim() == 3 and positions.dim() == 2:
            positions = positions & wanted.isfinite().all(-1)
        return positions.any(1) if criterion.per_row and positions.dim() == 2 else positions

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss on labels and on what the teachers say; outside of training a stock student's own loss."""
        self._signals = {key.removeprefix(SIGNALS): value for key, value in inputs.items() if key.startswith(SIGNALS)}
        self._uncounted = inputs.get(UNCOUNTED)
        inputs = {key: value for key, value in inputs.items() if not key.startswith(SIGNALS) and key != UNCOUNTED}
        if self._stock is None or not isinstance(num_items_in_batch, dict):
            # Of the Trainer, too.
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        target = inputs.pop("labels")
        labels = {STOCK_TASK: target}
        outputs, losses, extra = self.task_losses(model, inputs, labels, num_items_in_batch, {})
        loss = torch.stack([*losses.values(), *extra.values()]).sum() * self.args.world_size
        if not torch.isfinite(loss):
            raise TrainingError(
                f"expected a finite loss at step {self.state.global_step}, found {float(loss.detach())}; lower the "
                "learning rate, or turn off bf16/fp16"
            )
        return (loss, outputs) if return_outputs else loss

    def task_losses(
        self,
        model: nn.Module,
        features: dict[str, Tensor],
        labels: dict[str, Tensor],
        counts: ItemCounts,
        rows: dict[str, Tensor],
    ) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
        """Label loss mixed with the distance from the teachers, by task; and one term for each state criterion."""
        batch = self._whole_batch(features, labels, rows)
        core = self._core
        with reading_states(self._student_encoder, self._own_states) as reader:
            if isinstance(core, MultiTaskModel):
                outputs = model(**features, tasks=list(labels), output_hidden_states=reader.wants_hidden or None)
            else:
                wants = reader.wants_hidden or bool(self._own_states)
                outputs = model(**features, output_hidden_states=wants, return_dict=True)
            own = reader.read(outputs, positions_of(features)) if self._own_states else {}
        tasks = {name: self._answered[name] for name in labels}
        cached = bool(self._signals)
        guide = self._signals if cached else self.panel.signals(features, tasks, self._their_states)
        share = scheduled(self.label_weight, self._progress)
        losses = {}
        for name, task in tasks.items():
            logits = own_rows(outputs[f"logits_{name}"], rows.get(name)) if self._stock is None else outputs.logits
            wanted = guide.get(logits_name(name))
            if wanted is not None and not cached:
                wanted = own_rows(wanted, rows.get(name))
            losses[name] = self._task_loss(task, logits, wanted, labels[name], self._asked(name, batch), counts, share)
        terms = {
            item.kind: (1 - share)
            * item.weight_at(self._progress)
            * self._state_error(item, pairs, own, guide, batch, counts)
            for item, pairs in self._pairs
        }
        return outputs, losses, terms

    def _whole_batch(
        self, features: Mapping[str, Tensor], labels: Mapping[str, Tensor], rows: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The batch as the collator made it, for what counts in it."""
        batch = dict(features)
        batch |= {self._label_key(name): target for name, target in labels.items()}
        batch |= {f"rows_{name}": places for name, places in rows.items()}
        batch |= {f"{SIGNALS}{name}": values for name, values in self._signals.items()}
        if self._uncounted is not None:
            batch[UNCOUNTED] = self._uncounted
        return batch

    def _task_loss(
        self,
        task: Task,
        student: Tensor,
        teacher: Tensor | None,
        target: Tensor,
        mask: Tensor,
        counts: ItemCounts,
        share: float,
    ) -> Tensor:
        """The loss of one task in this batch, as a share of the window's mean."""
        loss = share * task.loss_sum(student, target) / divisor(counts[task.name].to(target.device))
        if teacher is None:
            return loss
        # Class weights are for labels: every item counts the same beside the teacher.
        each = divisor(counts.get(task.name + ONLY_COUNTED, mask.sum().float()).to(target.device))
        for item in self.answer_criteria:
            error = item.divergence_sum(task.problem, student[mask], teacher[mask], target[mask])
            loss = loss + (1 - share) * item.weight_at(self._progress) * error / each
        return loss

    def _state_error(
        self,
        criterion: StateCriterion,
        pairs: list[tuple[str, str]],
        own: Mapping[str, Tensor],
        guide: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        counts: ItemCounts,
    ) -> Tensor:
        """Mean over the compared states of their distance, as a share of the window's mean."""
        projections = getattr(self._core, "projections", {})
        mask = self._state_mask(criterion, pairs[0][1], batch)
        count = divisor(counts.get(criterion.kind, mask.sum().float()).to(mask.device))
        total = torch.zeros((), device=mask.device)
        for mine, theirs in pairs:
            student, teacher = own[mine], guide[theirs]
            name = self._projection_name(criterion, mine)
            if name in projections:
                projection = projections[name]
                student = projection(student.to(projection.weight.dtype))
            counted = mask
            if student.dim() == 3 and mask.dim() == 1 and not criterion.per_row:
                if student.shape[1] != teacher.shape[1]:
                    raise TaskError(
                        f"criterion '{criterion.kind}': expected as many patches in student and teacher, found "
                        f"{student.shape[1]} and {teacher.shape[1]}; use feature_map or embedding"
                    )
                counted = mask[:, None].expand(student.shape[:2])
            error = criterion.distance_sum(student, torch.nan_to_num(teacher.float()), counted)
            # Images have no mask: a row counts once, whatever its number of patches.
            per_patch = student.dim() == 3 and mask.dim() == 1 and not criterion.per_row
            total = total + (error / student.shape[1] if per_patch else error)
        return total / len(pairs) / count


class DistillationTrainer(DistillationMixin, MultiTaskTrainer):
    """Trains a student on labels and on what its teachers say; a stock student with one head trains too.

    The loss of a task is `label_weight` * label loss + (1 - `label_weight`) * what the answer criteria say; state
    criteria are added once, with the same second factor. Teachers run in evaluation mode without gradients and are
    never part of the optimizer, of a checkpoint or of a saved folder.

    Args:
        teacher: one model, or a list of models (or of pairs of model and weight) whose answers are averaged, or models
            by task name. Each is a `MultiTaskModel` with the student's tasks, a stock model of one task's kind, or
            a graph opened by `open_runtime`; or the folder (or Hub id) of one, then with the tokenizer or image
            processor that is there. Labels may be in any order; they are matched by name.
        teachers: the same, for those who have several.
        teacher_processing_class: the teacher's own tokenizer or image processor, where it is not the student's: each
            then reads the rows for itself, and tokens are matched by their first character. Likewise a list or a dict.
        criteria: names (`logits`, `hidden`, `relations`, `embedding`, `feature_map`) or objects from
            `hf_mtcompress.losses.criteria`; default: `args.criteria`.
        temperature: of `logits` where it is given by name.
        label_weight: share of the label loss, in [0, 1]; a pair goes linearly from the first to the last step, as in
            the teacher annealing of Clark et al. 2019, "BAM!".
        teacher_cache: folder for what teachers say of the training rows; asked once, whatever the epochs. Default:
            `args.teacher_cache`, else teachers run beside the student. False asks nothing yet, for `ask_teachers`.
        probe_rows: labelled rows a source on which a teacher must agree with the labels better than a guess; 0 trusts
            it. Default: `args.probe_rows`.
        every_task: whether the teacher answers every task on every text that the task can read, and not only on the
            rows of that task. Default: `args.every_task`.
        **kwargs: for `MultiTaskTrainer`.

    Raises:
        TaskError: student and teacher do not fit: tasks, labels, vocabulary, depth; or a teacher that knows nothing.

    References:
        Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"; Clark et al. 2019, "BAM! Born-Again
        Multi-Task Networks for Natural Language Understanding"; Ghiasi et al. 2021, "Multi-Task Self-Training for
        Learning General Representations" (`every_task`); those of the criteria.
    """


def _reach_projections(model: nn.Module, args: Any, outputs: Any) -> Any:
    """Let DDP, which looks for parameters from the outputs of a forward pass, find those that are used after it."""
    name = next((key for key in outputs if key.startswith("logits")), None)
    if name is not None:
        projections = model.get_submodule("projections")
        nothing = sum(0.0 * parameter.sum() for parameter in projections.parameters())
        outputs[name] = outputs[name] + nothing
    return outputs


def _models_and_processors(given: Teachers, processing_class: Any) -> tuple[list[Any], list[Any]]:
    """The models in order, each with its own processor or None."""
    if isinstance(given, Mapping):
        named = processing_class if isinstance(processing_class, Mapping) else dict.fromkeys(given, processing_class)
        return list(given.values()), [named.get(name) for name in given]
    members = list(given) if isinstance(given, Sequence) else [given]
    models = [item[0] if isinstance(item, tuple) else item for item in members]
    if isinstance(processing_class, Sequence):
        if len(processing_class) != len(models):
            raise TaskError(
                f"expected one teacher_processing_class for each of {len(models)} teachers, found "
                f"{len(processing_class)}; say None for those with the student's tokenizer"
            )
        return models, list(processing_class)
    return models, [processing_class] * len(models)


def _depth_and_width(encoder: PreTrainedModel, kinds: Sequence[str]) -> tuple[int, int]:
    """Layers and width of an encoder whose states can be compared.

    Raises:
        TaskError: it has no layers of one width, as encoders in stages.
    """
    found = tuple(getattr(encoder.config, name, None) for name in ("num_hidden_layers", "hidden_size"))
    depth, width = found
    stages = encoder.config.to_dict().get("depths") if any(kind != EMBEDDING for kind in kinds) else None
    if stages or not isinstance(depth, int) or not isinstance(width, int):
        raise TaskError(
            f"expected encoders with layers of one width for the criteria {list(kinds)}, found a "
            f"{type(encoder).__name__} without; use criteria=['logits']"
        )
    return depth, width


def _criteria(given: Sequence[Criterion | str], temperature: float) -> list[Criterion]:
    found = []
    for item in given:
        if isinstance(item, Criterion):
            found.append(item)
        else:
            options = {"temperature": temperature} if item.strip() == "logits" else {}
            found.append(criterion_of(item.strip(), **options))
    names = [item.kind for item in found]
    if not names or len(set(names)) < len(names):
        raise TaskError(f"expected different criteria, at least one, found {names or 'none'}")
    return found


def _check_weights(label_weight: Weight, temperature: float) -> None:
    shares = label_weight if isinstance(label_weight, tuple) else (label_weight,)
    if not all(0 <= share <= 1 for share in shares) or temperature <= 0:
        raise TaskError(
            f"expected label_weight in [0, 1] and a temperature above 0, found {label_weight} and {temperature}"
        )
