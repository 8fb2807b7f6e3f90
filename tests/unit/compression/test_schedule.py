"""Pruning while a stock Trainer trains: masks, the cut, and the way back from a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_mtcompress import GradualPruning, MultiTaskTrainer
from hf_mtcompress.compression.schedule import cubic
from hf_mtcompress.errors import TrainingError, UnsupportedEncoderError
from hf_mtcompress.model.anatomy import Layer, encoder_of, find_anatomy
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.surgery import describe_structure
from hf_mtcompress.tasks import ImageClassification, SequenceClassification
from tests.tiny import FAMILIES, FEELING_LABELS, IMAGE_FAMILIES, randomize, tiny_config, tiny_encoder, tiny_inputs

STEPS = 10


def stock_model(family: str = "bert", **overrides: Any) -> PreTrainedModel:
    auto = AutoModelForImageClassification if family in IMAGE_FAMILIES else AutoModelForSequenceClassification
    return randomize(auto.from_config(tiny_config(family, num_labels=3, **overrides)))


def rows(family: str = "bert", label: str = "labels") -> Dataset:
    inputs = tiny_inputs(family, batch=16)
    return Dataset.from_dict(
        {**{key: value.tolist() for key, value in inputs.items()}, label: [row % 3 for row in range(16)]}
    ).with_format("torch")


def trainer_of(
    folder: Path, model: PreTrainedModel, *callbacks: TrainerCallback, family: str = "bert", **settings: Any
) -> Trainer:
    set_seed(0)
    arguments = TrainingArguments(
        str(folder),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "weight_decay": 0.1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **settings,
        },
    )
    data = rows(family)
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))


def weights_of(layer: Layer, kind: str, gone: list[int]) -> list[Tensor]:
    """Every weight of some heads or neurons of a layer."""
    part = layer.attention if kind == "heads" else layer.feed_forward
    heads = (layer.attention.heads, layer.attention.head_size)
    count, size = heads if kind == "heads" else (layer.feed_forward.width, 1)
    inputs = layer.attention.projections if kind == "heads" else layer.feed_forward.inputs
    assert isinstance(part.output, nn.Linear)
    found = [part.output.weight.unflatten(1, (count, size))[:, gone]]
    for linear in inputs.values():
        assert isinstance(linear, nn.Linear)
        found.append(linear.weight.unflatten(0, (part.blocks, count, size))[:, gone])
        if linear.bias is not None:
            found.append(linear.bias.unflatten(0, (part.blocks, count, size))[:, gone])
    return found


class Watch(TrainerCallback):
    """What is exactly zero after each step, as fractions of heads and neurons, and what gradients reach it."""

    def __init__(self) -> None:
        self.gone: list[tuple[float, float]] = []
        self.largest_gradient = 0.0

    def _zeros(self, model: PreTrainedModel) -> dict[str, list[list[int]]]:
        found: dict[str, list[list[int]]] = {"heads": [], "feed_forward": []}
        for layer in find_anatomy(encoder_of(model)).layers:
            for kind, count in (("heads", layer.attention.heads), ("feed_forward", layer.feed_forward.width)):
                gone = [i for i in range(count) if not any(w.any() for w in weights_of(layer, kind, [i]))]
                found[kind].append(gone)
        return found

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        zeros = self._zeros(kwargs["model"])
        for layer, heads in zip(find_anatomy(encoder_of(kwargs["model"])).layers, zeros["heads"], strict=True):
            if heads:
                assert isinstance(layer.attention.output, nn.Linear)
                gradient = layer.attention.output.weight.grad
                assert gradient is not None
                columns = gradient.unflatten(1, (layer.attention.heads, -1))[:, heads]
                self.largest_gradient = max(self.largest_gradient, float(columns.abs().max()))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        layers = find_anatomy(encoder_of(kwargs["model"])).layers
        zeros = self._zeros(kwargs["model"])
        heads = sum(map(len, zeros["heads"])) / sum(layer.attention.heads for layer in layers)
        neurons = sum(map(len, zeros["feed_forward"])) / sum(layer.feed_forward.width for layer in layers)
        self.gone.append((heads, neurons))


def answers(model: PreTrainedModel, family: str = "bert") -> Tensor:
    with torch.no_grad():
        return model.eval()(**tiny_inputs(family)).logits


def test_cubic_by_hand() -> None:
    """Equation 1 of Zhu and Gupta, from nothing to all."""
    assert [cubic(step, 2, 6) for step in (0, 2, 3, 4, 5, 6, 9)] == [0, 0, 1 - 0.75**3, 0.875, 1 - 0.25**3, 1, 1]


def test_masks_follow_the_curve_and_stay_zero(tmp_path: Path) -> None:
    """Under AdamW with weight decay and accumulated gradients, after every single step; no gradient reaches them."""
    watch = Watch()
    model = stock_model()
    pruning = GradualPruning(heads=0.5, feed_forward=0.6, begin=0.2, end=0.8, every=2, multiple_of=1)
    trainer_of(tmp_path, model, pruning, watch, gradient_accumulation_steps=2).train()
    # 12 heads and 192 neurons; changes after steps 4, 6 and 8 of 10, begun after 2.
    expected = []
    for step in range(1, STEPS + 1):
        share = cubic(2 + (min(step, 8) - 2) // 2 * 2, 2, 8) if step > 2 else 0.0
        expected.append((round(share * 0.5 * 12) / 12, round(share * 0.6 * 192) / 192))
    assert watch.gone == expected
    assert watch.largest_gradient == 0.0
    report = pruning.report
    assert report is not None
    assert [change["step"] for change in report.changes] == [4, 6, 8]
    assert report.complete
    assert sum(layer["heads"] for layer in report.after["layers"]) == 6
    assert sum(layer["feed_forward"] for layer in report.after["layers"]) == 192 - 115
    assert report.parameters_after == sum(p.numel() for p in model.parameters()) < report.parameters_before


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cut_equals_the_mask(family: str, tmp_path: Path) -> None:
    """On every family; otherwise training recovers from another loss than the one that the cut brings."""
    settings: dict[str, Any] = {"heads": 0.5, "feed_forward": 0.5, "multiple_of": 8, "end": 0.5, "cut_at_end": False}
    pruning = GradualPruning(**settings)
    if family.startswith("clip"):
        if family in IMAGE_FAMILIES:
            task: Any = ImageClassification("mood", labels=FEELING_LABELS, head="linear")
        else:
            task = SequenceClassification("mood", labels=FEELING_LABELS, head="linear", text="text", label="label")
        model: PreTrainedModel = MultiTaskModel.from_encoder(tiny_encoder(family), [task])
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True
        )
        data = rows(family, "labels_mood")
        trainer: Trainer = MultiTaskTrainer(model, arguments, train_dataset={"mood": data}, callbacks=[pruning])
    else:
        model = stock_model(family)
        trainer = trainer_of(tmp_path, model, pruning, family=family, max_steps=4)
    trainer.train()
    encoder = model.encoder if isinstance(model, MultiTaskModel) else encoder_of(model)
    assert isinstance(encoder, PreTrainedModel)
    inputs = tiny_inputs(family)
    with torch.no_grad():
        masked = encoder.eval()(**inputs).last_hidden_state
        report = pruning.cut(model)
        found = encoder(**inputs).last_hidden_state
    torch.testing.assert_close(found, masked, rtol=0, atol=5e-6)
    assert sum(layer["heads"] for layer in report.after["layers"]) == 6
    assert sum(layer["feed_forward"] for layer in report.after["layers"]) == 96
    assert report.masked_difference is not None
    assert report.masked_difference < 1e-5
    with pytest.raises(TrainingError, match="expected a training to cut after"):
        pruning.cut(model)


def test_nothing_to_remove_is_plain_training(tmp_path: Path) -> None:
    """Bit for bit, scores of checkpoints included."""
    plain, pruned = stock_model(), stock_model()
    settings = {"eval_strategy": "steps", "eval_steps": 3, "max_steps": 6}
    one = trainer_of(tmp_path, plain, **settings)
    one.train()
    two = trainer_of(tmp_path, pruned, GradualPruning(), **settings)
    two.train()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), pruned.parameters(), strict=True))
    losses = [[row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row] for trainer in (one, two)]
    assert losses[0] == losses[1]
    assert describe_structure(encoder_of(plain)) == describe_structure(encoder_of(pruned))


@pytest.mark.parametrize(("importance", "restore"), [("first_order", False), ("magnitude", True)])
def test_resumed_in_mid_schedule(importance: Any, restore: bool, tmp_path: Path) -> None:
    """The same masks and the same weights as without interruption, whether Trainer restores callbacks or not."""

    def pruning() -> GradualPruning:
        return GradualPruning(heads=0.5, feed_forward=0.5, end=0.9, every=1, importance=importance, multiple_of=4)

    settings = {"save_strategy": "steps", "save_steps": 5}
    whole = stock_model()
    trainer_of(tmp_path / "one", whole, pruning(), **settings).train()
    resumed = stock_model()
    again = trainer_of(
        tmp_path / "two", resumed, pruning(), restore_callback_states_from_checkpoint=restore, **settings
    )
    again.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-5"))
    assert describe_structure(encoder_of(resumed)) == describe_structure(encoder_of(whole))
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    reports = [callback.report for callback in again.callback_handler.callbacks if isinstance(callback, GradualPruning)]
    assert reports[0] is not None
    assert [change["step"] for change in reports[0].changes] == list(range(2, 10))
    # Nothing is left to train after the last checkpoint, but the cut is still to be made.
    finished = stock_model()
    trainer_of(tmp_path / "three", finished, pruning(), **settings).train(
        resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-10")
    )
    assert torch.equal(answers(finished), answers(whole))


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    """Half of one schedule and half of another would be neither."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer_of(tmp_path / "plain", stock_model(), **settings).train()
    trainer_of(tmp_path / "half", stock_model(), GradualPruning(heads=0.5), **settings).train()
    again = trainer_of(tmp_path / "again", stock_model(), GradualPruning(heads=0.3), **settings)
    with pytest.raises(TrainingError, match=r"found none of its state at step 2"):
        again.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"))
    again = trainer_of(tmp_path / "again", stock_model(), GradualPruning(heads=0.3), **settings)
    with pytest.raises(TrainingError, match=r"\{'heads': \(0.5, 0.3\)\}; restore them"):
        again.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))


class Scores(TrainerCallback):
    """Sets the score of each evaluation."""

    def __init__(self, values: dict[int, float]) -> None:
        self.values = values

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["metrics"]["eval_given"] = self.values[state.global_step]


def test_the_best_checkpoint_is_one_with_the_final_masks(tmp_path: Path) -> None:
    """A larger model scores better; cut afterwards without a step of recovery it would be the worst of all."""
    model = stock_model()
    scores = Scores({2: 0.9, 4: 0.8, 6: 0.5, 8: 0.6, 10: 0.4})
    pruning = GradualPruning(heads=0.5, feed_forward=0.5, end=0.6, multiple_of=8)
    settings = {
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_steps": 2,
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "given",
        "greater_is_better": True,
    }
    trainer = trainer_of(tmp_path, model, pruning, scores, **settings)
    trainer.train()
    assert trainer.state.best_global_step == 8
    # The checkpoint answers as the cut model, without this package knowing of any mask.
    masked = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-8")
    torch.testing.assert_close(answers(model), answers(masked), rtol=0, atol=5e-6)
    trainer.save_model(str(tmp_path / "small"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    assert torch.equal(answers(loaded), answers(model))
    assert describe_structure(encoder_of(loaded)) == describe_structure(encoder_of(model))
    # Evaluated it is still right, trained further by this Trainer it would not be.
    scores.values = dict.fromkeys(range(20), 0.0)
    trainer.evaluate()
    with pytest.raises(TrainingError, match="make a new Trainer"):
        trainer.train()
    trainer_of(tmp_path, model, GradualPruning(heads=0.5), max_steps=2).train()


@pytest.mark.parametrize(("begin", "end", "steps"), [(0.0, 0.1, 1), (0.96, 1.0, 3), (0.0, 0.01, 3)])
def test_short_trainings_are_pruned_too(begin: float, end: float, steps: int, tmp_path: Path) -> None:
    """Rounded to whole steps, a schedule could end after the training, or before it begins."""
    model = stock_model()
    pruning = GradualPruning(heads=0.5, begin=begin, end=end)
    trainer_of(tmp_path, model, pruning, max_steps=steps).train()
    assert pruning.report is not None
    assert pruning.report.complete
    assert sum(layer["heads"] for layer in pruning.report.after["layers"]) == 6


def test_compute_and_bfloat16(tmp_path: Path) -> None:
    """Heads and neurons compete for one budget; weights computed with in bfloat16 stay zero too."""
    watch, model = Watch(), stock_model()
    pruning = GradualPruning(compute=0.5, length=9, end=0.5, multiple_of=8)
    before = stock_model()
    trainer_of(tmp_path, model, pruning, watch, bf16=True).train()
    assert watch.gone[-1] == watch.gone[4]
    assert watch.largest_gradient == 0.0

    def cost(layers: list[dict[str, int]]) -> float:
        return sum(layer["heads"] * 9 * 8 * (4 * 32 + 18) + layer["feed_forward"] * 9 * 64 for layer in layers)

    whole = cost(describe_structure(encoder_of(before))["layers"])
    assert 0.42 * whole < cost(describe_structure(encoder_of(model))["layers"]) <= 0.5 * whole


def test_training_that_stops_early(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is masked is cut, and it is said that this is not all."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    pruning = GradualPruning(heads=0.5, every=1, begin=0.0)
    trainer_of(tmp_path, stock_model(), pruning, Stop()).train()
    assert pruning.report is not None
    assert not pruning.report.complete
    assert "training ended at step 3, before all was pruned at step 7" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 1.5}, "heads: expected a fraction from 0"),
        ({"heads": 0.5, "compute": 0.5, "length": 8}, "compute: expected it instead of heads"),
        ({"compute": 0.5}, "length: expected 1 or more tokens together with compute"),
        ({"heads": 0.5, "begin": 0.7, "end": 0.7}, "0 <= begin < end <= 1, found 0.7 and 0.7"),
        ({"heads": 0.5, "every": 0}, "every: expected 1 or more"),
        ({"heads": 0.5, "importance": "fisher"}, r"found 'fisher'; use prune\(...\)"),
        ({"heads": 0.5, "memory": 1.0}, "memory: expected a share"),
        ({"heads": 0.5, "multiple_of": 0}, "multiple_of: expected 1 or more"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradualPruning(**arguments)


def test_models_that_cannot_be_pruned_are_refused_before_the_first_step(tmp_path: Path) -> None:
    """A message at the end of a training of hours would be too late."""
    frozen = stock_model()
    for parameter in encoder_of(frozen).parameters():
        parameter.requires_grad_(False)
    with pytest.raises(TrainingError, match="use importance='magnitude'"):
        trainer_of(tmp_path, frozen, GradualPruning(heads=0.5)).train()
    with pytest.raises(ValueError, match="compute: expected at most 0"):
        trainer_of(tmp_path, stock_model(), GradualPruning(compute=0.99, length=8)).train()

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = stock_model()

        def forward(self, **kwargs: Any) -> Any:
            return self.inner(**kwargs)

    own: Any = Own()
    with pytest.raises(UnsupportedEncoderError, match="found a Own"):
        trainer_of(tmp_path, own, GradualPruning(heads=0.5), remove_unused_columns=False).train()
    two = (GradualPruning(heads=0.5), GradualPruning(feed_forward=0.5))
    with pytest.raises(TrainingError, match="expected one GradualPruning among the callbacks"):
        trainer_of(tmp_path, stock_model(), *two).train()
