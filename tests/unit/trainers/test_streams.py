"""Training on streams: the same laws without a number of rows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from datasets import Dataset, IterableDataset

from hf_mtcompress import MultiTaskModel, MultiTaskTrainer
from hf_mtcompress.data.streaming import MixedStream
from hf_mtcompress.errors import DataError, TrainingError
from tests.tiny import tiny_encoder, tiny_text_rows, tiny_token_rows, tiny_tokenizer
from tests.unit.trainers.test_multitask import arguments, tag_task, text_tasks


def stream(rows: Dataset) -> IterableDataset:
    return rows.to_iterable_dataset().shuffle(seed=1, buffer_size=5)


def build(folder: Path, *, model: MultiTaskModel | None = None, **settings: Any) -> MultiTaskTrainer:
    torch.manual_seed(0)
    model = model or MultiTaskModel.from_encoder(tiny_encoder("bert"), [*text_tasks(), tag_task()], max_length=32)
    texts, tags = stream(tiny_text_rows(12)), stream(tiny_token_rows(6))
    return MultiTaskTrainer(
        model=model,
        args=arguments(folder, **{"max_steps": 10, "mixing": "uniform", **settings}),
        train_dataset={"mood": texts, "strength": texts, "tags": tags},
        eval_dataset={"mood": tiny_text_rows(12), "tags": tiny_token_rows(6)},
        processing_class=tiny_tokenizer(),
    )


def numbers(name: str, count: int) -> IterableDataset:
    return Dataset.from_dict({"source": [name] * count, "row": list(range(count))}).to_iterable_dataset()


def take(stream: Any, count: int) -> list[tuple[str, int]]:
    found = []
    for row in stream:
        found.append((row["source"], row["row"]))
        if len(found) == count:
            break
    return found


def test_small_weights_are_kept() -> None:
    assert MixedStream([numbers("a", 7), numbers("b", 3)], 2, strategy="weights", weights=[0.99, 0.01]).shares == [
        99,
        1,
    ]
    rows = take(MixedStream([numbers("a", 7), numbers("b", 3)], 2, strategy="weights", weights=[1, 0]), 80)
    assert {source for source, _ in rows} == {"a"}


@pytest.mark.parametrize("strategy", ["uniform", "round_robin", "weights"])
def test_the_order_depends_on_the_seed_alone_and_groups_have_one_source(strategy: str) -> None:
    def rows(seed: int) -> list[tuple[str, int]]:
        sources = [numbers("a", 7), numbers("b", 3)]
        return take(MixedStream(sources, 2, strategy=strategy, weights=[3, 1], seed=seed, num_processes=2), 80)

    assert rows(1) == rows(1)
    assert (rows(1) == rows(2)) == (strategy == "round_robin")
    groups = [rows(1)[start : start + 4] for start in range(0, 80, 4)]
    assert all(len({source for source, _ in group}) == 1 for group in groups)
    share = sum(group[0][0] == "a" for group in groups) / len(groups)
    assert share == (0.75 if strategy == "weights" else 0.5)


def test_a_stream_that_ends_begins_again_after_its_last_row() -> None:
    rows = [row for source, row in take(MixedStream([numbers("a", 7), numbers("b", 3)], 2), 40) if source == "b"]
    assert len(rows) >= 9
    for start in range(0, len(rows) - 2, 3):
        assert rows[start : start + 3] == [0, 1, 2]


def test_processes_work_on_one_source_and_on_different_rows() -> None:
    """accelerate deals a stream in pieces of the batch size."""
    sources = [numbers("a", 50), numbers("b", 50)]
    parts = []
    for rank in range(2):
        mixed = MixedStream(sources, 3, num_processes=2)
        shard = IterableDatasetShard(mixed, batch_size=3, num_processes=2, process_index=rank)
        parts.append(take(shard, 30))
    assert [source for source, _ in parts[0]] == [source for source, _ in parts[1]]
    assert not set(parts[0]) & set(parts[1])


def test_training_on_streams_lowers_every_loss(tmp_path: Path) -> None:
    trainer = build(tmp_path, max_steps=60, learning_rate=3e-3)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for task in ("mood", "tags"):
        assert after[f"eval_{task}_loss"] < before[f"eval_{task}_loss"], task
    assert {"loss_mood", "loss_strength", "loss_tags"} <= {key for row in trainer.state.log_history for key in row}


def test_a_resumed_run_on_streams_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "fusion": "product"}
    whole = build(tmp_path / "whole", **settings)
    whole.train()
    stopped = build(tmp_path / "stopped", **settings)
    stopped.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, stopped.model.state_dict()[name]), name
    other = build(tmp_path / "other", **settings, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    with pytest.raises(TrainingError, match="expected streams in the batches of the checkpoint, 4 rows over all"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))


def test_gradients_are_compared_on_validation_rows(tmp_path: Path) -> None:
    trainer = build(tmp_path, measure_interference=2, measure_on="validation")
    trainer.train()
    report = trainer.interference()
    assert report is not None
    assert report["steps"] == trainer.state.max_steps // 2
    assert report["cosine"][0][2] is not None
    assert report["norms"]["strength"] is None  # no validation rows of it


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixing": "proportional"}, "expected mixing among .*uniform.* found 'proportional'"),
        ({"batches": "mixed"}, "expected batches='one_source' with streams"),
        ({"fusion": "dwa"}, "expected another fusion than dwa with streams"),
        ({"dataloader_num_workers": 2}, "expected dataloader_num_workers=0 with streams"),
        ({"measure_interference": 5}, "expected measure_on='validation' for measure_interference with streams"),
    ],
)
def test_settings_that_need_a_number_of_rows_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        build(tmp_path, **settings)


def test_the_number_of_steps_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_steps has to be specified"):
        build(tmp_path, max_steps=-1)


def test_streams_beside_tables_are_refused(tmp_path: Path) -> None:
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), [*text_tasks(), tag_task()], max_length=32)
    with pytest.raises(DataError, match="expected streams for all tasks or for none"):
        MultiTaskTrainer(
            model=model,
            args=arguments(tmp_path, max_steps=2, mixing="uniform"),
            train_dataset={"mood": stream(tiny_text_rows(4)), "tags": tiny_token_rows(4)},
            processing_class=tiny_tokenizer(),
        )


def test_evaluation_on_a_stream_is_refused(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    with pytest.raises(DataError, match="expected rows with a length, found a stream"):
        trainer.evaluate({"mood": stream(tiny_text_rows(4))})


def test_an_empty_stream_is_refused() -> None:
    with pytest.raises(DataError, match="expected rows in every stream"):
        take(MixedStream([numbers("a", 3), numbers("b", 3).filter(lambda row: row["row"] > 5)], 2), 50)
