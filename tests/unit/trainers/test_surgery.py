"""Laws of gradient surgery inside the trainer, on a tiny real model."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_mtcompress import MultiTaskModel, MultiTaskTrainer, SequenceClassification
from hf_mtcompress.errors import TrainingError
from hf_mtcompress.evaluation.affinity import held_out_gradients
from hf_mtcompress.losses.fusion import WeightedSum
from hf_mtcompress.losses.gradients import COMBINATIONS
from hf_mtcompress.trainers import multitask
from tests.tiny import tiny_encoder, tiny_text_rows, tiny_token_rows, tiny_tokenizer
from tests.unit.trainers.test_multitask import arguments, build, tag_task, text_tasks

COMBINED = "upgrad"


def window(trainer: MultiTaskTrainer, batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Gradients that an accumulation window of these batches leaves on the model."""
    trainer.model.zero_grad()
    trainer.start_training()
    ready, counts = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = len(ready)
    for number, batch in enumerate(ready):
        trainer.accelerator.gradient_state._set_sync_gradients(number == len(ready) - 1)
        trainer.training_step(trainer.model, dict(batch), counts)
    trainer.end_training()
    return {
        name: parameter.grad.clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.grad is not None
    }


def prepared(folder: Path, **settings: Any) -> MultiTaskTrainer:
    trainer = build(folder, **{"gradient_accumulation_steps": 2, **settings})
    trainer.create_optimizer_and_scheduler(10)
    return trainer


def batches(trainer: MultiTaskTrainer, *sources: int) -> list[dict[str, Any]]:
    """One batch of three rows from each of the named sources."""
    rows = [group.dataset.with_format(None) for group in trainer.train_groups]
    return [trainer.data_collator([rows[source][row] for row in range(3)]) for source in sources]


def mixed(trainer: MultiTaskTrainer) -> list[dict[str, Any]]:
    rows = [group.dataset.with_format(None) for group in trainer.train_groups]
    return [trainer.data_collator([rows[0][0], rows[1][0], rows[0][1], rows[1][1]])]


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("scope", ["features", "last_block", "full"])
@pytest.mark.parametrize("sources", [(0,), (0, 1), (1, 0, 1), "mixed"])
def test_the_mean_is_the_plain_sum(tmp_path: Path, scope: str, sources: Any) -> None:
    """Surgery that does nothing must change nothing: shared batches, batches of one source, mixed ones."""
    batching = {"batches": "mixed"} if sources == "mixed" else {}
    plain = prepared(tmp_path, **batching)
    trainer = prepared(tmp_path, gradient_combination="mean", surgery_scope=scope, **batching)
    rows = mixed(plain) if sources == "mixed" else batches(plain, *sources)
    assert_same(window(trainer, rows), window(plain, rows))


def shared(gradients: dict[str, Tensor]) -> Tensor:
    """Gradients of the layers, flat."""
    return torch.cat([value.flatten() for name, value in gradients.items() if ".layer." in name])


def opposed(folder: Path, *, apart: bool, **settings: Any) -> MultiTaskTrainer:
    """Two regressions with one head and labels of opposite sign, on the same rows or on two copies of them."""
    rows = tiny_text_rows(6)
    rows = rows.add_column("against", [-value for value in rows["intensity"]])
    names = {"strength": "intensity", "against": "against"}
    tasks = [
        SequenceClassification(name, problem_type="regression", text="text", label=label)
        for name, label in names.items()
    ]
    torch.manual_seed(0)
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks, max_length=32)
    model.heads["task_against"].load_state_dict(model.heads["task_strength"].state_dict())
    data = {"strength": rows, "against": rows.select([2, 1, 0, 5, 4, 3]) if apart else rows}
    trainer = MultiTaskTrainer(
        model=model,
        args=arguments(folder, gradient_accumulation_steps=2, **settings),
        train_dataset=data,
        processing_class=tiny_tokenizer(),
        fusion=WeightedSum({"strength": 3.0, "against": 1.0}),
    )
    trainer.create_optimizer_and_scheduler(10)
    return trainer


@pytest.mark.parametrize("apart", [False, True])
def test_upgrad_goes_against_no_task(tmp_path: Path, apart: bool) -> None:
    """Its defining law, on the real gradients of the encoder's layers; the plain sum walks over the weaker task."""
    plain = opposed(tmp_path, apart=apart)
    rows = batches(plain, *range(1 + apart))
    own = {}
    for name in ("strength", "against"):
        alone = [
            {key: value for key, value in batch.items() if key[:7] != "labels_" or key[7:] == name} for batch in rows
        ]
        own[name] = shared(window(plain, [batch for batch in alone if f"labels_{name}" in batch]))

    def worst(method: str) -> float:
        found = shared(window(opposed(tmp_path, apart=apart, gradient_combination=method, surgery_scope="full"), rows))
        return min(float(torch.dot(found, gradient) / gradient.norm() ** 2) for gradient in own.values())

    assert worst("mean") < -0.5
    assert worst(COMBINED) > -1e-3


def test_heads_learn_from_their_own_task_alone(tmp_path: Path) -> None:
    """Weights are for what is shared; a head whose task gets little weight still learns."""
    plain = prepared(tmp_path)
    trainer = prepared(tmp_path, gradient_combination="mgda")
    rows = batches(plain, 0)
    wanted, found = window(plain, rows), window(trainer, rows)
    heads = [name for name in wanted if name.startswith("heads.")]
    assert heads
    for name in heads:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(shared(found), shared(wanted), rtol=1e-2)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2, "mixing": "round_robin"},
        {"batches": "mixed"},
        {"surgery_scope": "last_block"},
        {"surgery_scope": "full", "gradient_accumulation_steps": 3, "activation_checkpointing": True},
        {"bf16": True},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_training_with_surgery_lowers_every_loss_and_logs_weights(tmp_path: Path, settings: dict[str, Any]) -> None:
    training = {"rows": 32, "num_train_epochs": 8, "learning_rate": 3e-3, "gradient_combination": COMBINED}
    trainer = build(tmp_path, **{**training, **settings})
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for task in trainer.tasks:
        assert after[f"eval_{task}_loss"] < before[f"eval_{task}_loss"], task
    assert any("combination_mood" in row for row in trainer.state.log_history)
    assert trainer.surgery is None, "nothing is left on the model"


@pytest.mark.parametrize("method", COMBINATIONS)
def test_every_method_trains_and_the_length_is_that_of_an_even_sum(tmp_path: Path, method: str) -> None:
    """Methods whose weights are a mean, a sum or a bargain can be exchanged without another learning rate."""
    trainer = build(tmp_path, batches="mixed", gradient_combination=method, num_train_epochs=1)
    trainer.train()
    logged = [
        [value for key, value in row.items() if key.startswith("combination_")] for row in trainer.state.log_history
    ]
    full = [values for values in logged if len(values) == 3]
    assert full
    for values in full:
        assert sum(map(abs, values)) == pytest.approx(3.0, rel=0.01)


def test_draws_depend_on_the_step_alone(tmp_path: Path) -> None:
    """PCGrad's order must be the same on all processes, whatever else they drew."""
    trainer = prepared(tmp_path, gradient_combination="pcgrad", surgery_scope="full")
    rows = batches(trainer, 0)
    first = window(trainer, rows)
    torch.rand(7)
    assert_same(window(trainer, rows), first)


def test_a_run_where_no_two_tasks_meet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="expected several tasks in a step, found one source"):
        lonely(tmp_path, gradient_combination=COMBINED)


def lonely(folder: Path, **settings: Any) -> MultiTaskTrainer:
    """Two tasks with rows of their own."""
    trainer = build(folder)
    del trainer.model.tasks["strength"]
    data = {name: next(g.dataset for g in trainer.train_groups if name in g.tasks) for name in ("mood", "tags")}
    return MultiTaskTrainer(model=trainer.model, args=arguments(folder, **settings), train_dataset=data)


def test_an_unknown_scope_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="surgery_scope: expected one of"):
        build(tmp_path, gradient_combination="mean", surgery_scope="feature").train()


def planted(folder: Path, **settings: Any) -> MultiTaskTrainer:
    """A task, its copy, and one whose labels are drawn at random, on the same rows."""
    rows = tiny_text_rows(96)
    values = rows["intensity"]
    noise = np.random.default_rng(0).choice(["x", "y"], len(values)).tolist()
    rows = rows.add_column("noise", noise)
    tasks = [
        SequenceClassification("strength", problem_type="regression", text="text", label="intensity"),
        SequenceClassification("copy", problem_type="regression", text="text", label="intensity"),
        SequenceClassification("noise", labels=("x", "y"), text="text", label="noise"),
    ]
    torch.manual_seed(0)
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks, max_length=32)
    model.heads["task_copy"].load_state_dict(model.heads["task_strength"].state_dict())
    return MultiTaskTrainer(
        model=model,
        args=arguments(folder, **{"per_device_train_batch_size": 16, "learning_rate": 2e-3, **settings}),
        train_dataset=rows,
        eval_dataset=rows.select(range(40, 96)),
        processing_class=tiny_tokenizer(),
    )


@pytest.mark.parametrize("normalize", ["chance", "none"])
def test_the_report_sees_a_duplicate_and_labels_drawn_at_random(tmp_path: Path, normalize: str) -> None:
    trainer = planted(tmp_path, num_train_epochs=8, measure_interference=1, normalize_losses=normalize)
    trainer.train()
    report = trainer.interference()
    assert report is not None
    names = report["tasks"]
    place = {name: number for number, name in enumerate(names)}
    assert report["cosine"][place["strength"]][place["copy"]] == pytest.approx(1.0, abs=1e-3)
    assert abs(report["cosine"][place["strength"]][place["noise"]]) < 0.3
    assert report["affinity"][place["strength"]][place["copy"]] == pytest.approx(1.0, abs=1e-3)
    (idle,) = [finding for finding in report["findings"] if "has learnt nothing" in finding]
    assert idle.startswith("`noise`")
    assert any("copy" in finding and "strength" in finding for finding in report["findings"])


def test_looks_at_validation_rows_see_a_duplicate(tmp_path: Path) -> None:
    """Rows of each source drawn anew for each look, at all layers; as long as the tasks' weights make them."""
    found = {}
    for weight in (1.0, 3.0):
        trainer = planted(
            tmp_path,
            num_train_epochs=8,
            measure_interference=4,
            measure_on="validation",
            learning_rate=0.0,
            fusion_options={"weights": {"noise": weight}},
        )
        trainer.train()
        report = trainer.interference()
        assert report is not None
        assert (report["steps"], report["rows"], report["scope"]) == (
            12,
            "validation",
            "the trained layers of the encoder",
        )
        assert report["tasks"] == ["strength", "copy", "noise"]
        assert report["cosine"][0][1] == pytest.approx(1.0, abs=1e-5)
        assert abs(report["cosine"][0][2]) < 0.5
        # Heads that know nothing, weights that stay: losses of a guess.
        assert report["losses"]["noise"] == pytest.approx(1.0, abs=0.1)
        found[weight] = report["norms"]
    assert found[3.0]["noise"] == pytest.approx(3 * found[1.0]["noise"], rel=1e-4)
    assert found[3.0]["strength"] == pytest.approx(found[1.0]["strength"], rel=1e-4)


def test_each_look_draws_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multitask, "LOOK_ROWS", 8)
    seen: list[list[str]] = []

    def watch(model: Any, groups: Any, *rest: Any, **options: Any) -> Any:
        seen.append([str(ids) for ids in groups[0].dataset.with_format(None)["input_ids"]])
        return held_out_gradients(model, groups, *rest, **options)

    monkeypatch.setattr(multitask, "held_out_gradients", watch)
    for _ in range(2):
        planted(tmp_path, num_train_epochs=1, measure_interference=2, measure_on="validation").train()
    assert [len(rows) for rows in seen] == [8] * 6
    assert seen[0] != seen[1]
    assert seen[:3] == seen[3:]


def test_a_log_of_other_rows_is_not_taken_up(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "measure_interference": 1}
    planted(tmp_path, **settings).train()
    other = planted(tmp_path / "other", **settings, measure_on="validation")
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert other.gradient_log.steps == 2


def test_looks_at_validation_rows_need_some(tmp_path: Path) -> None:
    trainer = planted(tmp_path)
    with pytest.raises(TrainingError, match=r"expected validation rows for measure_on='validation', found none"):
        MultiTaskTrainer(
            model=trainer.model,
            args=arguments(tmp_path, measure_interference=2, measure_on="validation"),
            train_dataset=trainer.train_rows,
            processing_class=tiny_tokenizer(),
        )
    with pytest.raises(TrainingError, match=r"measure_on: expected one of train, validation, found 'test'"):
        planted(tmp_path, measure_interference=2, measure_on="test")


@pytest.mark.parametrize("rows", ["train", "validation"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_measuring_changes_nothing(tmp_path: Path, rows: str, accumulated: int) -> None:
    """Watching must not disturb: the same weights with and without, dropout included."""
    plain, watched = (
        planted(
            tmp_path,
            num_train_epochs=accumulated,
            measure_interference=every,
            measure_on=rows,
            gradient_accumulation_steps=accumulated,
        )
        for every in (None, 2)
    )
    for trainer in (plain, watched):
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        torch.manual_seed(1)
        trainer.train()
    assert watched.gradient_log.steps == 3
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[name]), name


SETTINGS = [{"gradient_combination": "mean"}, {"measure_interference": 1}, {"fusion": "gradient_norm"}]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("flag", "name"), [("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")])
def test_sharded_training_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], flag: str, name: str
) -> None:
    """Each process has only pieces of the gradients there."""
    trainer = build(tmp_path, **settings)
    monkeypatch.setattr(trainer, flag, True)
    with pytest.raises(TrainingError, match=f"expected one process or DDP .* found {name}"):
        trainer._check_shared_weights()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"branches": {"side": ["tags"]}, "branch_layers": 1}, "expected tasks that all read one encoder at its end"),
        ({"branches": {"side": ["tags"]}}, "expected tasks that all read one encoder at its end"),
        ({"layer": 1}, "expected tasks that all read one encoder at its end"),
        ({"branches": {"side": ["mood", "strength", "tags"]}}, "expected tasks that all read one encoder at its end"),
        ({}, "expected an encoder that is trained"),
    ],
)
def test_gradients_are_compared_only_where_all_tasks_meet(
    tmp_path: Path, settings: dict[str, Any], place: dict[str, Any], message: str
) -> None:
    """Elsewhere they would be those of other weights, or zero, and the report would speak of chance."""
    tasks = [*text_tasks(), dataclasses.replace(tag_task(), layer=place.get("layer"))]
    branches = {key: value for key, value in place.items() if key != "layer"}
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks, max_length=32, **branches)
    model.freeze_encoder(frozen=not place)
    rows = {"mood": tiny_text_rows(6), "strength": tiny_text_rows(6), "tags": tiny_token_rows(6)}
    with pytest.raises(TrainingError, match=message):
        MultiTaskTrainer(
            model=model,
            args=arguments(tmp_path, gradient_accumulation_steps=2, **settings),
            train_dataset=rows,
            processing_class=tiny_tokenizer(),
        )
