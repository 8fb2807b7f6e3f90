"""Scores are kept by task and metric; names are a view of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import EvalPrediction
from transformers.trainer_utils import PredictionOutput

from hf_mtcompress import MultiTaskModel, MultiTaskTrainer, SequenceClassification, Task
from hf_mtcompress.errors import TrainingError
from hf_mtcompress.tasks.metrics import classification_metrics
from tests.tiny import FEELING_LABELS, tiny_encoder, tiny_text_rows, tiny_token_rows, tiny_tokenizer
from tests.unit.trainers.test_multitask import arguments, build

ROWS = tiny_text_rows(30)


def trainer_of(
    folder: Path, tasks: list[Task], given: dict[str, Any] | None = None, **settings: Any
) -> MultiTaskTrainer:
    return MultiTaskTrainer(
        model=MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks, max_length=32),
        args=arguments(folder, **settings),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        processing_class=tiny_tokenizer(),
        **(given or {}),
    )


def mood(name: str = "mood", **settings: Any) -> Task:
    return SequenceClassification(name, labels=FEELING_LABELS, text="text", label="label", **settings)


def same(name: str, **settings: Any) -> Task:
    return SequenceClassification(name, labels=("no", "yes"), text="text", label="same", **settings)


@pytest.mark.parametrize(
    ("tasks", "names"),
    [
        (
            [mood(metric="balanced_accuracy"), same("mood_balanced", metric="accuracy")],
            ["mood/balanced_accuracy", "mood_balanced/accuracy"],
        ),
        (
            [
                mood(metric="macro_f1"),
                SequenceClassification(
                    "mood_macro",
                    problem_type="multi_label_classification",
                    labels=("fox", "river", "market"),
                    text="text",
                    label="topics",
                ),
            ],
            ["mood_macro_f1", "mood_macro_micro_f1"],
        ),
    ],
)
def test_tasks_whose_names_and_metrics_meet_keep_their_scores(
    tmp_path: Path, tasks: list[Task], names: list[str]
) -> None:
    """One would stand under the name of the other, in the average too, and the wrong checkpoint be kept."""
    trainer = trainer_of(tmp_path, tasks)
    metrics = trainer.evaluate()
    output = trainer.predict(ROWS)
    scores = []
    for task, name in zip(tasks, names, strict=True):
        expected = task.compute_metrics(output.predictions[task.name], output.label_ids[task.name])[str(task.metric)]
        assert metrics[f"eval_{name}"] == output.metrics[f"test_{name}"] == pytest.approx(expected)
        scores.append(expected)
    assert metrics["eval_average"] == pytest.approx(sum(scores) / 2)


def test_what_follows_scores_follows_those_of_its_task(tmp_path: Path) -> None:
    tasks = [mood(metric="balanced_accuracy"), same("mood_balanced", metric="accuracy")]
    trainer = trainer_of(tmp_path, tasks, mixing="score_gap", eval_strategy="epoch")
    metrics = trainer.evaluate()
    for name, key in (("mood", "mood/balanced_accuracy"), ("mood_balanced", "mood_balanced/accuracy")):
        assert trainer._pulls[name] == pytest.approx(1 - metrics[f"eval_{key}"])


def test_a_score_of_the_users_own_takes_no_name_of_the_evaluation(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, [mood("samples")], {"compute_metrics": lambda output: {"per_second": -1.0}})
    metrics = trainer.evaluate()
    assert metrics["eval_samples/per_second"] == -1.0
    assert metrics["eval_samples_per_second"] > 0


@pytest.mark.parametrize("metric", ["strength_mae", "eval_strength_mse", "strength_loss"])
def test_the_smallest_error_is_the_best(tmp_path: Path, metric: str) -> None:
    """`TrainingArguments` takes any name that does not end in "loss" for one whose largest value is the best."""
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = build(
        tmp_path,
        **steps,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        max_steps=4,
        learning_rate=0.05,
        save_only_model=True,
    )
    trainer.train()
    key = f"eval_{metric.removeprefix('eval_')}"
    found = [row[key] for row in trainer.state.log_history if key in row]
    assert trainer.state.best_metric == min(found) < max(found)
    assert trainer.evaluate()[key] == pytest.approx(min(found))


@pytest.mark.parametrize("metric", ["mood_acuracy", "mood_span_f1", "tags_accuracy", "moood_loss"])
def test_a_score_that_no_evaluation_has_is_refused_before_training(tmp_path: Path, metric: str) -> None:
    """Trainer says so after the first epoch."""
    settings: dict[str, Any] = {"eval_strategy": "epoch", "save_strategy": "best", "metric_for_best_model": metric}
    with pytest.raises(TrainingError, match=rf"metric_for_best_model: expected one of .*average.*found '{metric}'"):
        build(tmp_path, **settings)


def test_predictions_come_with_labels_and_metrics(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    texts, tokens = tiny_text_rows(12), tiny_token_rows(6)
    data = {"mood": texts, "strength": texts, "tags": tokens}
    output = trainer.predict(data)
    assert isinstance(output, PredictionOutput)
    assert output.predictions.keys() == output.label_ids.keys() == data.keys()
    expected = trainer.evaluate(data, metric_key_prefix="test")
    timings = ("runtime", "per_second", "epoch")
    assert {key: value for key, value in output.metrics.items() if not key.endswith(timings)} == {
        key: value for key, value in expected.items() if not key.endswith(timings)
    }
    assert trainer.predict(data, metric_key_prefix="dev").metrics["dev_average"] == expected["test_average"]


def test_some_tasks_have_labels_in_what_is_predicted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build(tmp_path)
    texts = tiny_text_rows(12)
    bare = {"mood": texts, "strength": texts.remove_columns("intensity")}
    output = trainer.predict(bare)
    assert output.predictions.keys() == {"mood", "strength"}
    assert output.label_ids.keys() == {"mood"}
    assert output.metrics["test_average"] == output.metrics["test_mood_accuracy"]
    # Test sets whose labels nobody has come with dummies.
    dummies = {"mood": texts.map(lambda row: {"label": "?"})}
    found = trainer.predict(dummies)
    assert found.label_ids is None
    assert "answered without a look at their labels" in caplog.text
    np.testing.assert_array_equal(found.predictions["mood"], output.predictions["mood"])


def test_functions_of_the_user_are_called_by_task_with_what_they_ask_for(tmp_path: Path) -> None:
    """Scripts choose the class first, and count hits after."""
    seen: list[EvalPrediction] = []

    def hits(output: EvalPrediction) -> dict[str, float]:
        seen.append(output)
        return {"hits": float((output.predictions == output.label_ids).mean())}

    given = {
        "compute_metrics": hits,
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1) + 0 * labels,
    }
    trainer = trainer_of(tmp_path, [mood(), same("same")], given, include_for_metrics=["inputs", "loss"])
    metrics = trainer.evaluate()
    for task in ("mood", "same"):
        assert metrics[f"eval_{task}_hits"] == pytest.approx(metrics[f"eval_{task}_accuracy"])
    assert [output.inputs.shape[0] for output in seen] == [30, 30]
    assert [len(output.losses) for output in seen] == [30, 30]
    answers = trainer.predict(ROWS)
    assert answers.predictions["mood"].shape == (30,)
    scores = classification_metrics(answers.predictions["mood"], answers.label_ids["mood"], num_labels=3)
    assert answers.metrics["test_mood_accuracy"] == pytest.approx(scores["accuracy"])


def test_only_losses_on_request(tmp_path: Path) -> None:
    trainer = build(tmp_path, prediction_loss_only=True)
    expected = {"eval_loss", "eval_mood_loss", "eval_strength_loss", "eval_tags_loss"}
    found = {key for key in trainer.evaluate() if not key.endswith(("runtime", "per_second", "epoch"))}
    assert found == expected
    assert trainer.predict({"mood": tiny_text_rows(4)}).predictions is None
    with pytest.raises(TrainingError, match="found prediction_loss_only"):
        build(tmp_path, prediction_loss_only=True, task_patience=1, eval_strategy="epoch")
    with pytest.raises(TrainingError, match="metric_for_best_model: expected one of loss, mood_loss"):
        build(tmp_path, prediction_loss_only=True, eval_strategy="epoch", metric_for_best_model="average")
