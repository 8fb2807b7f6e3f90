"""Laws of the multi-task trainer, on tiny real models."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_mtcompress import (
    MultiTaskModel,
    MultiTaskTrainer,
    MultiTaskTrainingArguments,
    SequenceClassification,
    Task,
    TokenClassification,
)
from hf_mtcompress.data.mixing import Strategy
from hf_mtcompress.errors import DataError, TaskError, TrainingError
from hf_mtcompress.losses.fusion import FusionKind, Uncertainty
from tests.tiny import (
    FEELING_LABELS,
    TAG_LABELS,
    tiny_config,
    tiny_encoder,
    tiny_text_rows,
    tiny_token_rows,
    tiny_tokenizer,
)


def arguments(folder: Path, **settings: Any) -> MultiTaskTrainingArguments:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    return MultiTaskTrainingArguments(str(folder), **{**defaults, **settings})


def text_tasks() -> list[Task]:
    return [
        SequenceClassification("mood", labels=FEELING_LABELS, text="text", label="label"),
        SequenceClassification("strength", problem_type="regression", text="text", label="intensity"),
    ]


def tag_task() -> Task:
    return TokenClassification("tags", labels=TAG_LABELS, tokens="tokens", label="tags")


def build(folder: Path, rows: int = 12, seed: int = 0, **settings: Any) -> MultiTaskTrainer:
    """Three tasks over two sources: two share rows, one has its own."""
    set_seed(seed)
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), [*text_tasks(), tag_task()], max_length=32)
    texts, tokens = tiny_text_rows(rows), tiny_token_rows(rows // 2)
    data = {"mood": texts, "strength": texts, "tags": tokens}
    return MultiTaskTrainer(
        model=model,
        args=arguments(folder, **settings),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tiny_tokenizer(),
    )


def test_one_task_and_a_stock_model_equals_trainer_bit_for_bit(tmp_path: Path) -> None:
    """A drop-in that shifts a seed, a loss scale or a key would change results of existing scripts unnoticed."""
    tokenizer = tiny_tokenizer()
    rows = tiny_text_rows(20)
    encoded = rows.map(
        lambda row: tokenizer(row["text"]), remove_columns=["text", "pair", "topics", "same", "intensity"]
    )
    encoded = encoded.map(lambda row: {"label": FEELING_LABELS.index(row["label"])})

    def run(cls: type[Trainer], args_cls: type[TrainingArguments], folder: Path) -> tuple[Any, Any, list[str], Any]:
        set_seed(3)
        config = tiny_config("bert", hidden_dropout_prob=0.1, num_labels=len(FEELING_LABELS))
        model = AutoModelForSequenceClassification.from_config(config)
        args = args_cls(
            str(folder),
            num_train_epochs=2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            logging_steps=1,
            eval_strategy="epoch",
            save_strategy="epoch",
            report_to="none",
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
        trainer = cls(
            model=model,
            args=args,
            train_dataset=encoded,
            eval_dataset=encoded,
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda output: {"first": float(output.predictions[0, 0])},
        )
        trainer.train()
        timings = ("runtime", "per_second")
        history = [
            {key: value for key, value in row.items() if not key.endswith(timings)} for row in trainer.state.log_history
        ]
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        return history, trainer.evaluate().keys(), files, model.state_dict()

    ours = run(MultiTaskTrainer, MultiTaskTrainingArguments, tmp_path / "ours")
    theirs = run(Trainer, TrainingArguments, tmp_path / "theirs")
    assert ours[:3] == theirs[:3]
    assert all(torch.equal(ours[3][key], theirs[3][key]) for key in theirs[3])


def gradients(trainer: MultiTaskTrainer, windows: list[list[dict[str, Any]]]) -> list[torch.Tensor]:
    """Gradients after one accumulation window made of the given micro-batches."""
    collected = []
    for window in windows:
        trainer.model.zero_grad()
        trainer.model.train()
        batches, counts = trainer.get_batch_samples(iter(window), len(window), torch.device("cpu"))
        trainer.current_gradient_accumulation_steps = len(batches)
        for batch in batches:
            trainer.training_step(trainer.model, dict(batch), counts)
        collected.append(
            torch.cat(
                [p.grad.flatten() if p.grad is not None else p.new_zeros(p.numel()) for p in trainer.model.parameters()]
            )
        )
    return collected


def test_a_plain_trainer_trains_a_multi_task_model_or_says_what_it_needs(tmp_path: Path) -> None:
    """It keeps the columns that a signature names, and `forward` takes what any encoder may take."""
    tokenizer = tiny_tokenizer()
    rows = tiny_text_rows(12)
    encoded = rows.map(
        lambda row: {**tokenizer(row["text"]), "labels_mood": FEELING_LABELS.index(row["label"])},
        remove_columns=rows.column_names,
    )

    def trainer(**settings: Any) -> Trainer:
        mood = SequenceClassification("mood", labels=FEELING_LABELS)
        return Trainer(
            model=MultiTaskModel.from_encoder(tiny_encoder("bert"), [mood]),
            args=arguments(tmp_path, **settings),
            train_dataset=encoded,
            eval_dataset=encoded,
            data_collator=DataCollatorWithPadding(tokenizer),
        )

    with pytest.raises(ValueError, match="set `remove_unused_columns=False`"):
        trainer().train()
    trained = trainer(remove_unused_columns=False, label_names=["labels_mood"])
    assert trained.train().training_loss > 0
    assert trained.evaluate()["eval_loss"] > 0


def test_splitting_a_window_differently_changes_no_gradient(tmp_path: Path) -> None:
    """Dividing by the number of batches weighs tokens of short batches more; the loss curve would hide it."""
    trainer = build(tmp_path)
    texts = trainer.train_groups[0].dataset.with_format(None)
    tags = trainer.train_groups[1].dataset.with_format(None)
    collate = trainer.data_collator

    def batch(rows: Dataset, *indices: int) -> dict[str, Any]:
        return collate([rows[index] for index in indices])

    whole = [batch(texts, 0, 1, 2, 3, 4), batch(tags, 0, 1, 2)]
    split = [batch(texts, 0), batch(tags, 1, 2), batch(texts, 1, 2, 3), batch(tags, 0), batch(texts, 4)]
    trainer.create_optimizer_and_scheduler(10)
    one, other = gradients(trainer, [whole, split])
    assert one.abs().max() > 1e-3
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


VARIANTS: list[dict[str, Any]] = [
    {},
    *({"mixing": strategy} for strategy in get_args(Strategy) if strategy not in ("proportional", "weights")),
    {"mixing": "weights", "mixing_weights": {"mood": 1.0, "tags": 2.0}},
    {"batches": "mixed", "mixing": "temperature"},
    *({"fusion": kind} for kind in get_args(FusionKind) if kind != "sum"),
    {"fusion": "gradient_norm", "fusion_options": {"share": 0.9}},
    {"task_patience": 1},
    {"gradient_combination": "pcgrad", "gradient_accumulation_steps": 2},
    {"measure_interference": 3},
    {"measure_interference": 3, "measure_on": "validation"},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda settings: "-".join(map(str, settings.values())) or "plain")
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Resume that reshuffles, or forgets the epoch or what was learned, trains otherwise, and nothing says so."""
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 13, "eval_strategy": "epoch", **settings}
    whole = build(tmp_path / "whole", **settings)
    whole.train()
    stopped = build(tmp_path / "stopped", **settings)
    stopped.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, stopped.model.state_dict()[name]), name
    assert stopped.mixing_sampler.history == whole.mixing_sampler.history
    assert stopped.fusion.state_dict() == whole.fusion.state_dict()
    assert stopped.gradient_log.state_dict() == whole.gradient_log.state_dict()
    assert bool(whole.gradient_log.steps) == ("measure_interference" in settings)
    assert stopped.stopped_tasks == whole.stopped_tasks
    assert bool(whole.stopped_tasks) == ("task_patience" in settings)


@pytest.mark.parametrize("sizes", [(2, 4), (8, 1)], ids=str)
def test_a_run_that_goes_on_in_other_batches_ends_as_an_uninterrupted_one(
    tmp_path: Path, sizes: tuple[int, int]
) -> None:
    """The same rows in a step, dealt otherwise: it would stop some steps early, with half of the rows left out."""

    def run(folder: Path, batch: int, windows: int, checkpoint: Path | None = None) -> MultiTaskTrainer:
        set_seed(0)
        trainer = MultiTaskTrainer(
            model=MultiTaskModel.from_encoder(tiny_encoder("bert"), text_tasks(), max_length=32),
            args=arguments(
                folder,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=windows,
                save_strategy="steps",
                save_steps=6,
                optim="sgd",
            ),
            train_dataset=tiny_text_rows(32),
            processing_class=tiny_tokenizer(),
        )
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return trainer

    whole = run(tmp_path / "whole", 4, 2)
    resumed = run(tmp_path / "resumed", *sizes, tmp_path / "whole" / "checkpoint-6")
    assert resumed.state.global_step == whole.state.global_step == 8
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(value, resumed.model.state_dict()[name], rtol=1e-4, atol=1e-6, msg=name)


def test_mixed_batches_give_the_gradients_of_separate_ones(tmp_path: Path) -> None:
    """Every head works on its own rows, whatever else is in the batch."""
    trainer = build(tmp_path)
    texts = trainer.train_groups[0].dataset.with_format(None)
    tags = trainer.train_groups[1].dataset.with_format(None)
    collate = trainer.data_collator
    apart = [collate([texts[0], texts[1], texts[2]]), collate([tags[0], tags[1]])]
    mixed = [collate([texts[0], tags[0], texts[1]]), collate([tags[1], texts[2]])]
    assert mixed[0]["rows_tags"].tolist() == [1]
    assert mixed[0]["labels_tags"].shape == (1, mixed[0]["input_ids"].shape[1])
    trainer.create_optimizer_and_scheduler(10)
    one, other = gradients(trainer, [apart, mixed])
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_mixed_batches_train_and_are_mixed(tmp_path: Path) -> None:
    trainer = build(tmp_path, batches="mixed", rows=32, num_train_epochs=8, learning_rate=3e-3)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert any("rows_tags" in batch for batch in trainer.get_train_dataloader())
    for task in trainer.tasks:
        assert after[f"eval_{task}_loss"] < before[f"eval_{task}_loss"], task


def test_mixing_by_training_loss_prefers_the_task_that_is_behind(tmp_path: Path) -> None:
    trainer = build(tmp_path, rows=32, mixing="loss", num_train_epochs=3)
    trainer.tasks["tags"].class_weights = None
    trainer.train()
    assert trainer._pulls.keys() == {"mood", "strength", "tags"}
    texts = (trainer._pulls["mood"] + trainer._pulls["strength"]) / 2
    first, *_, last = trainer.mixing_sampler.history
    assert (last[0] / first[0] > 1) == (texts > trainer._pulls["tags"] * first[0] / first[1])


def test_mixing_by_score_looks_at_validation_scores_and_targets(tmp_path: Path) -> None:
    settings = {"mixing": "score_gap", "mixing_targets": {"mood": 0.5}, "eval_strategy": "epoch"}
    trainer = build(tmp_path, **settings, num_train_epochs=1)
    metrics = trainer.evaluate()
    assert trainer._pulls["mood"] == pytest.approx(max(0.5 - metrics["eval_mood_accuracy"], 0) / 0.5)
    assert trainer._pulls["tags"] == pytest.approx(1 - metrics["eval_tags_span_f1"])


@pytest.mark.parametrize("settings", [{"mixing": "score_gap"}, {"task_patience": 1}])
def test_what_follows_scores_is_refused_where_nothing_is_scored(tmp_path: Path, settings: dict[str, Any]) -> None:
    """It would do nothing, and not say so."""
    with pytest.raises(TrainingError, match="expected validation scores for"):
        build(tmp_path, eval_strategy="no", **settings)


def test_annealed_mixing_counts_the_epochs_of_max_steps(tmp_path: Path) -> None:
    settings = {"mixing": "annealed", "rows": 32, "gradient_accumulation_steps": 2}
    trainer = build(tmp_path, **settings, num_train_epochs=4)
    trainer.train()
    by_steps = build(tmp_path, **settings, max_steps=trainer.state.max_steps)
    by_steps.train()
    assert by_steps.mixing_sampler.epochs == trainer.mixing_sampler.epochs == 4
    assert by_steps.mixing_sampler.history == trainer.mixing_sampler.history


def test_random_weights_follow_the_seed_of_the_run(tmp_path: Path) -> None:
    def weights(seed: int) -> list[float]:
        args = arguments(tmp_path, fusion="random", seed=seed)
        fusion = MultiTaskTrainer(model=build(tmp_path).model, args=args).fusion
        fusion.start_window(0, 10)
        return [fusion.factor(name) for name in ("mood", "tags")]

    assert weights(1) == weights(1) != weights(2)


def test_the_probe_phase_ends_without_tasks_that_have_no_rows(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    settings = {"fusion": "gradient_norm", "fusion_options": {"share": 0.1}, "max_steps": 6}
    rows = {"mood": tiny_text_rows(12), "tags": tiny_token_rows(6)}
    alone = MultiTaskTrainer(
        model=trainer.model,
        args=arguments(tmp_path, **settings),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
    )
    alone.train()
    assert alone.fusion.state_dict()["factors"].keys() == {"mood", "tags"}
    settings |= {"mixing": "weights", "mixing_weights": {"mood": 1.0, "tags": 0.0}}
    undrawn = build(tmp_path, **settings)
    undrawn.train()
    assert undrawn.fusion.state_dict()["factors"].keys() == {"mood", "strength"}


def test_sources_without_a_weight_are_refused(tmp_path: Path) -> None:
    """Their heads would stay as they were drawn, and count in the average."""
    with pytest.raises(DataError, match="found none for tags; 0 leaves a source out"):
        build(tmp_path, mixing="weights", mixing_weights={"mood": 1.0}).train()


def test_training_ends_when_only_sources_of_weight_0_are_left(tmp_path: Path) -> None:
    settings = {"task_patience": 2, "eval_strategy": "epoch", "num_train_epochs": 9, "learning_rate": 0.0}
    trainer = build(tmp_path, mixing="weights", mixing_weights={"mood": 0.0, "tags": 1.0}, **settings)
    trainer.eval_groups = [group for group in trainer.eval_groups if "tags" in group.tasks]
    trainer.train()
    assert trainer.stopped_tasks == ["tags"]
    assert trainer.state.epoch == 3


def test_a_task_that_gets_no_better_stops_alone(tmp_path: Path) -> None:
    """Its head stays as it is, bit for bit, its rows leave the mix, and the other tasks go on."""
    trainer = build(tmp_path, rows=32, task_patience=1, eval_strategy="epoch", num_train_epochs=4, weight_decay=0.1)
    # A score that never moves.
    trainer.eval_groups = [group for group in trainer.eval_groups if "tags" in group.tasks]
    trainer.tasks["tags"].compute_metrics = lambda logits, labels: {"span_f1": 0.5}  # type: ignore[method-assign]  # a score to go by
    heads: list[torch.Tensor] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if "tags" in trainer.stopped_tasks:
                heads.append(torch.cat([p.detach().flatten() for p in trainer.model.heads["task_tags"].parameters()]))

    trainer.add_callback(Watch())
    trainer.train()
    assert trainer.stopped_tasks == ["tags"]
    assert len(heads) > 5
    assert all(torch.equal(head, heads[0]) for head in heads)
    assert [shares[1] == 0 for shares in trainer.mixing_sampler.history] == [False, False, True, True]
    assert [sum(shares) for shares in trainer.mixing_sampler.history] == [12] * 4


def test_training_ends_when_all_tasks_stopped(tmp_path: Path) -> None:
    trainer = build(tmp_path, task_patience=2, eval_strategy="epoch", num_train_epochs=9, learning_rate=0.0)
    trainer.train()
    assert sorted(trainer.stopped_tasks) == ["mood", "strength", "tags"]
    assert trainer.state.epoch == 3


def test_patience_counts_evaluations_of_one_training(tmp_path: Path) -> None:
    """Not those made by hand, and not those of a training before."""
    trainer = build(tmp_path, task_patience=2, eval_strategy="epoch", num_train_epochs=9, learning_rate=0.0)
    for _ in range(3):
        trainer.evaluate()
    assert trainer.stopped_tasks == []
    for _ in range(2):
        trainer.train()
        assert trainer.state.epoch == 3


def test_rows_that_train_nothing_are_refused(tmp_path: Path) -> None:
    """Their loss has no gradient, and torch says so in words of its own."""
    trainer = build(tmp_path)
    trainer.model.freeze_encoder(["mood", "strength"])
    rows = {"mood": tiny_text_rows(8), "tags": tiny_token_rows(8)}
    settings: dict[str, Any] = {"model": trainer.model, "processing_class": tiny_tokenizer()}
    with pytest.raises(TrainingError, match="expected something to train on the rows of tags"):
        MultiTaskTrainer(**settings, args=arguments(tmp_path), train_dataset=rows)
    del rows["tags"]
    MultiTaskTrainer(**settings, args=arguments(tmp_path), train_dataset=rows).train()


def test_a_checkpoint_of_more_tasks_is_refused(tmp_path: Path) -> None:
    """Torch speaks of parameter groups, which nobody made."""
    build(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    trainer = build(tmp_path / "fewer", max_steps=4)
    trainer.model.remove_task("tags")
    fewer = MultiTaskTrainer(
        model=trainer.model,
        args=arguments(tmp_path / "fewer", max_steps=4),
        train_dataset=tiny_text_rows(12),
        processing_class=tiny_tokenizer(),
    )
    with pytest.raises(TrainingError, match="found that of another; tasks were added or removed"):
        fewer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_model_that_was_saved_trains_on_when_it_knows_its_columns(tmp_path: Path) -> None:
    """A saved model has tasks without columns, which belong to data; the message says where to put them."""
    build(tmp_path).model.save_pretrained(tmp_path / "saved")
    model = MultiTaskModel.from_pretrained(tmp_path / "saved")
    settings: dict[str, Any] = {"model": model, "args": arguments(tmp_path), "processing_class": tiny_tokenizer()}
    rows = {"mood": tiny_text_rows(8), "tags": tiny_token_rows(8)}
    for name, column in (("mood", "text"), ("tags", "tokens")):
        with pytest.raises(DataError, match=rf"set \.label, \.{column}.* of model\.tasks\['{name}'\]"):
            MultiTaskTrainer(**settings, train_dataset=rows)
        setattr(model.tasks[name], column, column)
        model.tasks[name].label = {"mood": "label", "tags": "tags"}[name]
    MultiTaskTrainer(**settings, train_dataset=rows).train()


def test_a_model_that_is_yet_to_be_made_is_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"args": arguments(tmp_path), "processing_class": tiny_tokenizer()}

    def init() -> MultiTaskModel:
        return MultiTaskModel.from_encoder(tiny_encoder("bert"), text_tasks())

    for rows in (tiny_text_rows(8), {"mood": tiny_text_rows(8)}):
        with pytest.raises(TrainingError, match="expected a multi-task model, found model_init"):
            MultiTaskTrainer(model_init=init, train_dataset=rows, **settings)
    stock = AutoModelForSequenceClassification.from_config(tiny_config("bert"))
    with pytest.raises(TrainingError, match="expected a MultiTaskModel for rows by task, found BertForSequence"):
        MultiTaskTrainer(model=stock, train_dataset={"mood": tiny_text_rows(8)}, **settings)


def test_weights_that_move_stand_in_the_log(tmp_path: Path) -> None:
    """An auxiliary task fades out: its weight is logged, and in the end it gives no gradient."""
    trainer = build(tmp_path, max_steps=5)
    trainer.tasks["tags"].weight, trainer.tasks["tags"].final_weight = 1.0, 0.0
    trainer.fusion = trainer._set_up_fusion("sum")
    trainer.train()
    weights = [row["weight_tags"] for row in trainer.state.log_history if "weight_tags" in row]
    assert weights[0] == pytest.approx(1 / trainer.fusion.normalisers["tags"])
    assert weights == sorted(weights, reverse=True)
    assert weights[-1] == 0.0


def test_heads_may_learn_faster_than_the_encoder(tmp_path: Path) -> None:
    trainer = build(tmp_path, head_learning_rate=0.01, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    heads = {id(parameter) for parameter in trainer.model.heads.parameters()}
    every = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(every) == len(set(every)) == len(list(trainer.model.parameters()))
    for group in optimizer.param_groups:
        rates = {0.01 if id(parameter) in heads else 1e-3 for parameter in group["params"]}
        assert rates == {group["lr"]}
        assert {parameter.dim() > 1 and group["weight_decay"] == 0 for parameter in group["params"]} == {False}
    trainer = build(tmp_path, head_learning_rate=0.01, max_steps=2, lr_scheduler_type="constant")
    trainer.train()
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.01, 1e-3}


def test_a_regression_begins_at_the_mean_of_its_labels(tmp_path: Path) -> None:
    """A mean far from 0 would be learned by the shared encoder, at the cost of the other tasks."""
    rows = tiny_text_rows(12).map(lambda row: {"intensity": row["intensity"] + 100.0})

    def bias_of(trainer: MultiTaskTrainer) -> torch.Tensor:
        return trainer.model.heads["task_strength"].classifier.bias.detach()

    trainer = build(tmp_path, learning_rate=1e-9)
    model = trainer.model
    data = {"mood": rows, "strength": rows}
    args = arguments(tmp_path, learning_rate=1e-9, num_train_epochs=1)
    MultiTaskTrainer(model=model, args=args, train_dataset=data, processing_class=tiny_tokenizer()).train()
    mean = sum(rows["intensity"]) / len(rows)
    assert float(bias_of(trainer)) == pytest.approx(mean, rel=1e-5)
    assert float(model.heads["task_mood"].classifier.bias.detach().abs().max()) < 1e-6
    # A head that was trained keeps its bias.
    other = {name: rows.map(lambda row: {"intensity": 0.5}) for name in data}
    MultiTaskTrainer(model=model, args=args, train_dataset=other, processing_class=tiny_tokenizer()).train()
    assert float(bias_of(trainer)) == pytest.approx(mean, rel=1e-5)


def test_a_fusion_object_keeps_what_it_was_given(tmp_path: Path) -> None:
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), text_tasks())
    trainer = MultiTaskTrainer(
        model=model,
        args=arguments(tmp_path),
        fusion=Uncertainty({"mood": 3.0}, rate=0.5),
        train_dataset=tiny_text_rows(8),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert trainer.fusion.weights == {"mood": 3.0, "strength": 1.0}
    assert any("weight_mood" in row for row in trainer.state.log_history)


def test_evaluation_gives_every_task_and_one_average(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    metrics = trainer.evaluate()
    primary = [metrics["eval_mood_accuracy"], metrics["eval_strength_pearson"], metrics["eval_tags_span_f1"]]
    assert metrics["eval_average"] == pytest.approx(sum(primary) / 3)
    assert {"eval_mood_loss", "eval_strength_loss", "eval_tags_loss", "eval_loss"} <= metrics.keys()


def test_auxiliary_tasks_do_not_count_in_the_average(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    trainer.tasks["tags"].role = "auxiliary"
    metrics = trainer.evaluate()
    assert metrics["eval_average"] == pytest.approx(
        (metrics["eval_mood_accuracy"] + metrics["eval_strength_pearson"]) / 2
    )


def test_best_checkpoint_is_chosen_by_the_average(tmp_path: Path) -> None:
    trainer = build(
        tmp_path,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="average",
        greater_is_better=True,
        num_train_epochs=3,
    )
    trainer.train()
    averages = [row["eval_average"] for row in trainer.state.log_history if "eval_average" in row]
    assert trainer.state.best_metric == max(averages)
    assert trainer.evaluate()["eval_average"] == pytest.approx(max(averages))


def test_task_losses_stand_in_the_log(tmp_path: Path) -> None:
    """A task that does not learn must be seen while it trains."""
    trainer = build(tmp_path)
    trainer.train()
    logged = [key for row in trainer.state.log_history for key in row if key.startswith("loss_")]
    assert {"loss_mood", "loss_strength", "loss_tags"} == set(logged)
    json.dumps(trainer.state.log_history)


def test_training_lowers_every_loss(tmp_path: Path) -> None:
    trainer = build(tmp_path, rows=32, num_train_epochs=8, learning_rate=3e-3)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for task in trainer.tasks:
        assert after[f"eval_{task}_loss"] < before[f"eval_{task}_loss"], task


def test_tasks_on_the_same_rows_share_batches(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    assert [group.tasks for group in trainer.train_groups] == [("mood", "strength"), ("tags",)]


def test_one_dataset_with_several_label_columns(tmp_path: Path) -> None:
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), text_tasks())
    trainer = MultiTaskTrainer(
        model=model, args=arguments(tmp_path), train_dataset=tiny_text_rows(8), processing_class=tiny_tokenizer()
    )
    assert [group.tasks for group in trainer.train_groups] == [("mood", "strength")]
    trainer.train()


def test_unlabelled_rows_change_nothing(tmp_path: Path) -> None:
    """A row without a label must give no gradient and no score to that task."""
    trainer = build(tmp_path)
    rows = trainer.train_groups[0].dataset.with_format(None)
    batch = trainer.data_collator([rows[0], rows[1]])
    masked = {**batch, "labels_mood": torch.tensor([-100, -100])}
    trainer.model.eval()
    full = trainer.compute_loss(trainer.model, {key: value for key, value in batch.items() if key != "labels_mood"})
    none = trainer.compute_loss(trainer.model, masked)
    assert torch.equal(full, none)


def test_rows_of_an_unknown_task_are_refused(tmp_path: Path) -> None:
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), text_tasks())
    with pytest.raises(DataError, match=r"expected rows for the tasks .*mood.* found rows for .*moood"):
        MultiTaskTrainer(
            model=model,
            args=arguments(tmp_path),
            train_dataset={"moood": tiny_text_rows(4)},
            processing_class=tiny_tokenizer(),
        )


def test_raw_rows_without_a_processor_are_refused(tmp_path: Path) -> None:
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), text_tasks())
    with pytest.raises(DataError, match="expected a processing_class"):
        MultiTaskTrainer(model=model, args=arguments(tmp_path), train_dataset=tiny_text_rows(4))


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), text_tasks())
    with pytest.raises(DataError, match="expected rows in the train split, found none"):
        MultiTaskTrainer(
            model=model,
            args=arguments(tmp_path),
            train_dataset=tiny_text_rows(4).select([]),
            processing_class=tiny_tokenizer(),
        )


def test_a_loss_that_is_no_number_stops_training(tmp_path: Path) -> None:
    """Trainer's filter replaces NaN losses by averages, and a broken model would be saved."""
    trainer = build(tmp_path)
    with torch.no_grad():
        next(trainer.model.heads["task_mood"].parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"expected a finite loss at step.*mood.*nan"):
        trainer.train()


def test_functions_by_task_need_a_multi_task_model(tmp_path: Path) -> None:
    stock = AutoModelForSequenceClassification.from_config(tiny_config("bert"))
    with pytest.raises(TaskError, match="expected one compute_metrics function"):
        MultiTaskTrainer(model=stock, args=arguments(tmp_path), compute_metrics={"mood": lambda output: {}})


def test_extra_metrics_by_task(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    trainer.task_metrics = {"mood": lambda output: {"rows": float(len(output.predictions))}}
    assert trainer.evaluate()["eval_mood_rows"] == 12


def test_a_hundred_tasks_train_and_evaluate(tmp_path: Path) -> None:
    """Twenty sources with five tasks each: one head, loss, metric and log entry for every task."""
    specs, data = [], {}
    for source in range(20):
        rows = tiny_text_rows(6, seed=source)
        for number in range(5):
            name = f"task_{source}_{number}"
            specs.append(SequenceClassification(name, labels=FEELING_LABELS, text="text", label="label"))
            data[name] = rows
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), specs, max_length=32)
    trainer = MultiTaskTrainer(
        model=model,
        args=arguments(tmp_path, num_train_epochs=1, batches="mixed", per_device_train_batch_size=8),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tiny_tokenizer(),
    )
    assert len(trainer.train_groups) == 20
    trainer.train()
    metrics = trainer.evaluate()
    assert len([key for key in metrics if key.endswith("_accuracy") and "balanced" not in key]) == 100
    assert {f"loss_{name}" for name in data} <= {key for row in trainer.state.log_history for key in row}
