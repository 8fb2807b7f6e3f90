"""Laws of every task: it survives saving, its name collides with nothing, and what cannot work is refused at once."""

import json
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from hf_mtcompress import ImageClassification, SequenceClassification, Task, TokenClassification
from hf_mtcompress.errors import TaskError
from hf_mtcompress.recipe.tasks import RESERVED_TASK_NAMES
from hf_mtcompress.tasks import base, register_task, task_from_dict
from hf_mtcompress.tasks.base import RESERVED_NAMES, cross_entropy_sum, divisor, softmax, weighted_count
from tests.tiny import COLOUR_LABELS, FEELING_LABELS, TAG_LABELS, tiny_config

TASKS: list[Task] = [
    SequenceClassification(
        "mood",
        text="text",
        text_pair="pair",
        label="label",
        labels=FEELING_LABELS,
        metric="macro_f1",
        role="auxiliary",
        weight=0.5,
        head="mlp",
        pooling="mean",
        class_weights=[1, 2, 3.5],
        label_smoothing=0.1,
    ),
    SequenceClassification("topics", labels=["fox"], problem_type="multi_label_classification"),
    SequenceClassification("strength", text="text", label="intensity", problem_type="regression"),
    TokenClassification("tags", tokens="tokens", label="tags", labels=TAG_LABELS),
    ImageClassification("colour", image="image", label="label", labels=COLOUR_LABELS),
]
SINGLE = SequenceClassification("mood", labels=FEELING_LABELS)


def mood(**settings: Any) -> SequenceClassification:
    return SequenceClassification("mood", **{"labels": FEELING_LABELS, **settings})


# ------------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_saved_task_is_the_same_without_its_columns(task: Task) -> None:
    """A field that is lost on the way changes the head, the loss or the metric of a reloaded model."""
    values = json.loads(json.dumps(task.to_dict()))
    assert not set(task.columns) & set(values)
    again = task_from_dict(values)
    assert type(again) is type(task)
    assert again.to_dict() == task.to_dict()
    assert again.labels == task.labels
    assert all(getattr(again, column) is None for column in task.columns)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_primary_metric_is_one_that_may_be_primary(task: Task) -> None:
    assert task.default_metric in task.primary_metrics
    assert task.metric in task.primary_metrics


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_head_is_as_wide_as_there_are_answers(task: Task) -> None:
    assert task.num_outputs == (len(task.labels) if task.labels else 1)
    assert len(task.id2label) == task.num_outputs


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_names_in_a_batch_are_those_of_the_task(task: Task) -> None:
    """A head called `keys` would hide a method of `nn.ModuleDict`, which refuses it; the prefix keeps it apart."""
    assert (task.head_name, task.label_name) == (f"task_{task.name}", f"labels_{task.name}")
    assert task.logits_name == f"logits_{task.name}"
    assert nn.ModuleDict({task.head_name: nn.Identity()})


def test_names_that_the_task_refuses_are_refused_in_a_recipe() -> None:
    """Written down twice: a recipe that passes its check must not fail when its tasks are built."""
    assert RESERVED_NAMES <= RESERVED_TASK_NAMES


@dataclass
class Verdict(SequenceClassification):
    """A kind of a user's own."""

    kind: ClassVar[str] = "verdict"
    _: KW_ONLY
    court: str = "first"


def test_a_registered_kind_can_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_KINDS", dict(base._KINDS))
    task = Verdict("guilt", labels=["no", "yes"], court="second")
    with pytest.raises(TaskError, match=r"found 'verdict'; import the module that registers it"):
        task_from_dict(task.to_dict())
    register_task("verdict", Verdict)
    register_task("verdict", Verdict)
    again = task_from_dict(task.to_dict())
    assert isinstance(again, Verdict)
    assert again.court == "second"


# ---------------------------------------------------------------------------------------------------- exact numbers


def test_labels_and_problem_reach_a_stock_config() -> None:
    config = tiny_config("bert")
    mood().configure(config)
    assert config.id2label == {0: "bad", 1: "plain", 2: "good"}
    assert config.label2id == {"bad": 0, "plain": 1, "good": 2}
    assert (config.num_labels, config.problem_type) == (3, "single_label_classification")


def test_a_stock_config_of_a_regression_has_one_nameless_output() -> None:
    config = tiny_config("bert")
    SequenceClassification("strength", problem_type="regression").configure(config)
    assert (config.num_labels, config.id2label, config.problem_type) == (1, {0: "LABEL_0"}, "regression")


def test_a_stock_config_of_word_labels_has_no_problem_type() -> None:
    """transformers knows three problem types and refuses any other word."""
    config = tiny_config("bert")
    TokenClassification("tags", labels=TAG_LABELS).configure(config)
    assert (config.num_labels, config.problem_type) == (4, None)


def test_label_names_are_text() -> None:
    """Numbers as labels would be other keys after a round trip through JSON."""
    assert mood(labels=[0, 1, True]).labels == ("0", "1", "True")


def test_a_count_divides_and_nothing_divides_by_one() -> None:
    """Dividing by at least one shrinks the loss of a window whose class weights add up to less."""
    assert divisor(torch.tensor([0.0, 0.25, 1.0, 7.0])).tolist() == [1.0, 0.25, 1.0, 7.0]


def test_weighted_count() -> None:
    labels = torch.tensor([0, 2, -100, 2])
    assert weighted_count(SINGLE, labels).item() == 3.0
    assert weighted_count(mood(class_weights=[0.5, 8.0, 0.25]), labels).item() == 1.0
    assert weighted_count(SINGLE, torch.tensor([-100, -100])).item() == 0.0


def test_cross_entropy_of_nothing_is_zero() -> None:
    """torch's own mean over no labelled item is not a number, and one such batch ends a training."""
    logits = torch.randn(2, 3, requires_grad=True)
    loss = cross_entropy_sum(mood(label_smoothing=0.1), logits, torch.tensor([-100, -100]))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad.abs().max().item() == 0.0


def test_softmax_of_huge_logits() -> None:
    assert softmax(np.array([[1000.0, 1000.0], [0.0, np.log(3.0)]])) == pytest.approx(
        np.array([[0.5, 0.5], [0.25, 0.75]])
    )


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "name", ["", "Mood", "1st", "mood-2", "my mood", "_mood", "mood.x", "möod", *sorted(RESERVED_NAMES)]
)
def test_names_that_collide_or_are_malformed(name: str) -> None:
    """The name becomes part of module names, keyword arguments and metric keys."""
    with pytest.raises(TaskError, match=rf"expected a task name of lower-case letters.*found '{name}'; rename"):
        SequenceClassification(name, labels=FEELING_LABELS)


@pytest.mark.parametrize("name", ["a", "mood2", "a_b_", "loss2"])
def test_names_that_pass(name: str) -> None:
    assert SequenceClassification(name, labels=FEELING_LABELS).name == name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": ["a", "b", "a"]}, "found a label twice"),
        ({"labels": [1, "1"]}, "found a label twice"),
        ({"pooling": "mean"}, "a stock head has its own pooling, found pooling 'mean'"),
        ({"head": "mpl"}, r"expected a head among \['stock', 'linear', 'mlp'\], found 'mpl'"),
        ({"head": "mlp", "pooling": "average"}, "expected a pooling among .*found 'average'"),
        ({"role": "helper"}, r"expected a role among \['main', 'auxiliary'\], found 'helper'"),
        ({"layer": 0}, "expected a layer of at least 1, found 0"),
        ({"weight": -0.5}, "at least 0, found -0.5"),
        ({"class_weights": [1.0, 2.0]}, "expected one class weight for each of 3 labels, found 2"),
        ({"metric": "f1"}, r"expected a primary metric among \['accuracy', .*found 'f1'"),
        ({"metric": "mse", "labels": None, "problem_type": "regression"}, r"\['pearson', 'spearman'\], found 'mse'"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    """A misspelt head or pooling would be another head; a misspelt role would drop the task from the average."""
    with pytest.raises(TaskError, match=f"task 'mood': .*{message}"):
        mood(**settings)


def test_outputs_before_labels_are_known() -> None:
    with pytest.raises(TaskError, match="task 'mood': expected labels before a head is built, found none"):
        _ = mood(labels=None).num_outputs


@pytest.mark.parametrize("kind", ["sequence_classification", None])
def test_an_unknown_kind(kind: str | None) -> None:
    with pytest.raises(
        TaskError, match=rf"expected a task kind among \['image-classification', .*found {kind!r}; import the module"
    ):
        task_from_dict({"kind": kind, "name": "mood"})


def test_a_kind_that_another_class_holds() -> None:
    with pytest.raises(TaskError, match="found 'sequence-classification' registered by SequenceClassification"):
        register_task("sequence-classification", Verdict)
    assert type(task_from_dict(SINGLE.to_dict())) is SequenceClassification
