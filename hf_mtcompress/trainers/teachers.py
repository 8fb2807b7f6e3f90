"""Teachers: models that answer for a student's tasks, and show what happens inside them.

A teacher may be a multi-task model, a stock model of one task, or a graph of ONNX Runtime. Where it shares the
student's tokenizer it can be asked while the student trains; where it reads inputs of its own, or takes long, its
answers are computed once (`data/teacher_cache.py`).
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from hf_mtcompress.data.readers import Reader, load_reader, positions_of
from hf_mtcompress.errors import ArtifactError, TaskError, first_line
from hf_mtcompress.formats.runtime import Runtime
from hf_mtcompress.formats.runtimes import open_runtime
from hf_mtcompress.losses.distillation import match_labels
from hf_mtcompress.model.anatomy import encoder_of
from hf_mtcompress.model.configuration import MultiTaskConfig
from hf_mtcompress.model.inputs import taken_by
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.states import reading_states
from hf_mtcompress.model.stock_heads import load_stock, task_of_stock
from hf_mtcompress.records import FORMS
from hf_mtcompress.tasks import Task

TeacherModel = PreTrainedModel | Runtime
LOGITS = "logits"
STOCK_TASK = "answer"
"""Name of the only task of a stock student, in messages."""


def logits_name(task: str) -> str:
    """Name of a signal: the teacher's logits of one task."""
    return f"{LOGITS}_{task}"


class Teacher:
    """One model and the tasks of the student that it answers.

    Args:
        model: a `MultiTaskModel`, a stock model with a head, or a loaded ONNX folder (`open_runtime`).
        tasks: the student's tasks that it answers; none where only its states are wanted.
        reader: its own; None where it reads the student's inputs.

    Raises:
        TaskError: it has no such task, or other labels.
    """

    def __init__(
        self,
        model: TeacherModel,
        tasks: Mapping[str, Task],
        reader: Reader | None = None,
    ) -> None:
        if isinstance(model, PreTrainedModel):
            model.eval().requires_grad_(False)
        self.model = model
        self.reader = reader
        self.orders = {name: _label_order(task, model) for name, task in tasks.items()}

    @property
    def encoder(self) -> PreTrainedModel | None:
        """What its states are read from; None where a graph shows none."""
        if isinstance(self.model, Runtime):
            return None
        return self.model.encoder if isinstance(self.model, MultiTaskModel) else encoder_of(self.model)

    def to(self, device: torch.device) -> None:
        """Move it to where the student is."""
        if isinstance(self.model, PreTrainedModel):
            torch.nn.Module.to(self.model, device)

    @torch.no_grad()
    def signals(self, features: Mapping[str, Tensor], names: Iterable[str], states: Sequence[str]) -> dict[str, Tensor]:
        """What it says of a batch.

        Args:
            features: its inputs.
            names: tasks to answer, among those it was made for.
            states: names of states to show.

        Returns:
            `logits_<task>` in the student's label order, and the states.
        """
        names = list(names)
        if isinstance(self.model, Runtime):
            answers = self.model.logits({key: value.cpu().numpy() for key, value in features.items()})
            device = next(iter(features.values())).device
            logits = {name: torch.as_tensor(np.asarray(answers[name]), device=device) for name in names}
            found = {}
        else:
            encoder = self.encoder
            assert encoder is not None
            with reading_states(encoder, states) as reader:
                output = self._run(features, names, reader.wants_hidden)
                found = reader.read(output, positions_of(features)) if states else {}
            logits = {name: self._logits(output, name) for name in names}
        for name, values in logits.items():
            order = self.orders[name]
            found[logits_name(name)] = values if order is None else values[..., order]
        return found

    def _run(self, features: Mapping[str, Tensor], names: list[str], hidden: bool) -> Any:
        if isinstance(self.model, MultiTaskModel):
            return self.model(**features, tasks=names, output_hidden_states=hidden or None)
        assert isinstance(self.model, PreTrainedModel)
        inputs = taken_by(self.model, features)
        # Stock models with a head return no last hidden state, so an embedding needs all of them.
        return self.model(**inputs, output_hidden_states=True, return_dict=True)

    def _logits(self, output: Any, name: str) -> Tensor:
        return output[f"logits_{name}"] if isinstance(self.model, MultiTaskModel) else output.logits

    def digest(self) -> str:
        """Digest of its weights and of how it reads texts."""
        digest = hashlib.sha256(type(self.model).__name__.encode())
        if isinstance(self.model, Runtime):
            digest.update(self.model.digest().encode())
        else:
            for name, tensor in self.model.state_dict().items():
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            settings = {
                key: value
                for key, value in self.model.config.to_dict().items()
                if key not in ("_name_or_path", "transformers_version", "dtype")
            }
            digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        if self.reader is not None:
            digest.update(self.reader.digest().encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class TeacherPanel:
    """All teachers of a student.

    Attributes:
        by_task: teachers and their weights for each task; several are averaged. The first one shows its states.
        answers: whether their answers are wanted, or only their states.
    """

    by_task: dict[str, list[tuple[Teacher, float]]]
    answers: bool = True

    @property
    def teachers(self) -> list[Teacher]:
        """Each once."""
        return list({id(teacher): teacher for found in self.by_task.values() for teacher, _ in found}.values())

    def shown_by(self, names: Iterable[str]) -> Teacher:
        """The teacher whose states a batch with these tasks follows."""
        return self.by_task[next(iter(names))][0][0]

    def asked(self, names: Iterable[str], states: Sequence[str]) -> dict[int, tuple[Teacher, list[str], Sequence[str]]]:
        """What each teacher is asked about a batch: tasks and states, by identity of the teacher."""
        names = list(names)
        asked: dict[int, tuple[Teacher, list[str], Sequence[str]]] = {}
        for name in names if self.answers else ():
            for teacher, _ in self.by_task[name]:
                asked.setdefault(id(teacher), (teacher, [], ()))[1].append(name)
        if states:
            teacher = self.shown_by(names)
            asked[id(teacher)] = (teacher, asked.get(id(teacher), (teacher, [], ()))[1], states)
        return asked

    def combined(
        self, found: Mapping[int, Mapping[str, Tensor]], tasks: Mapping[str, Task], states: Sequence[str]
    ) -> dict[str, Tensor]:
        """One answer for each task from those of its teachers, and the states.

        Several teachers are averaged as weighted means of their log-probabilities (of their numbers, in a regression),
        the geometric mean of Hinton et al. 2015.

        Args:
            found: signals by identity of the teacher.
            tasks: the tasks that are wanted.
            states: names of the states that are wanted.
        """
        signals: dict[str, Tensor] = {}
        for name, task in tasks.items() if self.answers else ():
            answers = [(found[id(teacher)][logits_name(name)], weight) for teacher, weight in self.by_task[name]]
            if len(answers) == 1:
                signals[logits_name(name)] = answers[0][0]
                continue
            total = sum(weight for _, weight in answers)
            one_label = task.problem in ("single_label_classification", "token_classification")
            parts = [
                (values.float().log_softmax(-1) if one_label else values.float()) * (weight / total)
                for values, weight in answers
            ]
            signals[logits_name(name)] = torch.stack(parts).sum(0)
        if states:
            shown = found[id(self.shown_by(tasks))]
            signals |= {name: shown[name] for name in states}
        return signals

    def signals(
        self, features: Mapping[str, Tensor], tasks: Mapping[str, Task], states: Sequence[str]
    ) -> dict[str, Tensor]:
        """Ask all teachers about a batch of the student's own inputs."""
        found = {
            key: teacher.signals(features, names, own_states)
            for key, (teacher, names, own_states) in self.asked(tasks, states).items()
        }
        return self.combined(found, tasks, states)


OpenTeachers = TeacherModel | Mapping[str, TeacherModel] | Sequence[TeacherModel] | Sequence[tuple[TeacherModel, float]]
OneTeacher = TeacherModel | str | Path
Teachers = OneTeacher | Mapping[str, OneTeacher] | Sequence[OneTeacher] | Sequence[tuple[OneTeacher, float]]
"""One teacher, one for each task, or several whose answers are averaged (with weights); models, or where they lie."""


def opened(teachers: Teachers) -> tuple[Any, dict[int, Any]]:
    """The same with models in the place of folders and Hub ids, each opened once.

    Returns:
        The teachers, and by identity of those that were opened the tokenizer or image processor that lies beside.
    """
    models: dict[str, TeacherModel] = {}

    def model_of(teacher: Any) -> Any:
        if isinstance(teacher, tuple):
            return (model_of(teacher[0]), *teacher[1:])
        if not isinstance(teacher, str | Path):
            return teacher
        if str(teacher) not in models:
            models[str(teacher)] = _open(teacher)
        return models[str(teacher)]

    given: Any
    if isinstance(teachers, Mapping):
        given = {name: model_of(teacher) for name, teacher in teachers.items()}
    elif isinstance(teachers, Sequence) and not isinstance(teachers, str):
        given = [model_of(teacher) for teacher in teachers]
    else:
        given = model_of(teachers)
    return given, {id(model): _processor_in(Path(place)) for place, model in models.items()}


def _open(place: str | Path) -> TeacherModel:
    """A saved model, whatever it runs on.

    Raises:
        TaskError: nothing that answers is there.
    """
    try:
        folder = Path(place)
        graphs = [form.settings for form in FORMS.values() if form.layout == "graph"]
        if folder.is_dir() and any((folder / name).is_file() for name in graphs):
            return open_runtime(folder)
        config = AutoConfig.from_pretrained(place)
        return MultiTaskModel.from_pretrained(place) if isinstance(config, MultiTaskConfig) else load_stock(place)
    except (OSError, ValueError) as error:
        raise TaskError(
            f"expected a teacher: a model, or a folder or Hub id of one, found '{place}' ({first_line(error)})"
        ) from error


def _processor_in(folder: Path) -> Any:
    """The tokenizer or image processor of a folder; None where it has none."""
    try:
        return load_reader(folder).processor if folder.is_dir() else None
    except ArtifactError:
        return None


def refuse_wrapped(model: Any, role: str) -> None:
    """What stands around a model hides its encoder.

    Raises:
        TaskError: no model of transformers itself, such as a `PeftModel`.
    """
    if not isinstance(model, PreTrainedModel | Runtime):
        raise TaskError(
            f"expected a model of transformers as {role}, found a {type(model).__name__}; of one with adapters take "
            "model.merge_and_unload()"
        )


def panel_of(
    teachers: OpenTeachers,
    tasks: Mapping[str, Task],
    readers: Mapping[int, Reader],
    *,
    answers: bool = True,
) -> TeacherPanel:
    """Make a panel of what a user gives.

    Args:
        teachers: see `Teachers`.
        tasks: the student's.
        readers: by identity of a model: a reader of its own.
        answers: whether their answers are wanted, or only their states.

    Raises:
        TaskError: a task has no teacher, or teacher and task do not fit.
    """
    if isinstance(teachers, Mapping):
        missing = [name for name in tasks if name not in teachers]
        unknown = [name for name in teachers if name not in tasks]
        if missing or unknown:
            raise TaskError(
                f"expected one teacher for each of the tasks {list(tasks)}, found none for {missing} and some for "
                f"{unknown}, which are no tasks"
            )
        weighted = {name: [(teachers[name], 1.0)] for name in tasks}
    else:
        given = list(teachers) if isinstance(teachers, Sequence) else [teachers]
        if not given:
            raise TaskError("expected at least one teacher, found none")
        pairs = [item if isinstance(item, tuple) else (item, 1.0) for item in given]
        if any(weight <= 0 for _, weight in pairs):
            raise TaskError(f"expected weights of teachers above 0, found {[weight for _, weight in pairs]}")
        weighted = dict.fromkeys(tasks, pairs)
    for found in weighted.values():
        for model, _ in found:
            if (
                answers
                and len(tasks) > 1
                and not isinstance(teachers, Mapping)
                and not isinstance(model, MultiTaskModel | Runtime)
            ):
                raise TaskError(
                    f"expected a multi-task teacher for the tasks {list(tasks)}, found a {type(model).__name__}; give "
                    "one teacher for each task: teachers={task: model}"
                )
    own_tasks: dict[int, dict[str, Task]] = {}
    models: dict[int, TeacherModel] = {}
    for name, found in weighted.items():
        for model, _ in found:
            models[id(model)] = model
            own_tasks.setdefault(id(model), {}).update({name: tasks[name]} if answers else {})
    made = {key: Teacher(model, own_tasks[key], readers.get(key)) for key, model in models.items()}
    return TeacherPanel(
        {name: [(made[id(model)], weight) for model, weight in found] for name, found in weighted.items()}, answers
    )


def _label_order(task: Task, teacher: TeacherModel) -> list[int] | None:
    """Columns of the teacher's logits in the student's label order; None where they are in it, or for a regression.

    Raises:
        TaskError: it does not answer this task, or with other labels.
    """
    if isinstance(teacher, MultiTaskModel | Runtime):
        if task.name == STOCK_TASK and task.name not in teacher.tasks:
            raise TaskError(
                f"expected a stock teacher for a stock student, found one with the tasks {list(teacher.tasks)}; take "
                f"one of them out of the multi-task model: teacher=model.to_stock('{next(iter(teacher.tasks))}')"
            )
        if task.name not in teacher.tasks:
            raise TaskError(
                f"expected a teacher with the task '{task.name}', found {list(teacher.tasks)}; "
                "give the task the same name in both, or leave it out"
            )
        own = teacher.tasks[task.name]
    else:
        own = task_of_stock(task.name, teacher)
    if own.problem != task.problem:
        raise TaskError(
            f"task '{task.name}': expected a teacher for {task.problem}, found one for {own.problem}; "
            "check that the teacher was trained on this task"
        )
    if task.problem == "regression":
        if own.num_outputs != 1:
            raise TaskError(
                f"task '{task.name}': expected a teacher with one output for a regression, found {own.num_outputs}"
            )
        return None
    try:
        order = match_labels(list(task.labels or ()), list(own.labels or ()))
    except ValueError as error:
        raise TaskError(f"task '{task.name}': {error}") from error
    return None if order == list(range(len(order))) else order
