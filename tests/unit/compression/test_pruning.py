import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from hf_mtcompress.compression.pruning import Whole, prune
from hf_mtcompress.errors import DataError, TrainingError, UnsupportedEncoderError
from hf_mtcompress.model.anatomy import encoder_of, find_anatomy
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.surgery import describe_structure, is_vanilla
from hf_mtcompress.tasks import ImageClassification, SequenceClassification, TokenClassification
from tests.tiny import (
    FAMILIES,
    FEELING_LABELS,
    IMAGE_FAMILIES,
    randomize,
    tiny_config,
    tiny_encoder,
    tiny_inputs,
)

Batch = dict[str, Tensor]


def model_and_batches(family: str) -> tuple[MultiTaskModel, list[Batch]]:
    """A model with two tasks (one for images) and two batches of three rows."""
    clip = family.startswith("clip")
    head: Any = "linear" if clip else "stock"
    batches = [tiny_inputs(family, seed=seed) for seed in (0, 1)]
    if family in IMAGE_FAMILIES:
        tasks: list[Any] = [ImageClassification("mood", labels=FEELING_LABELS, head=head)]
    else:
        tasks = [
            SequenceClassification("mood", labels=FEELING_LABELS, text="text", label="label", head=head),
            TokenClassification("places", labels=("O", "B-place"), tokens="tokens", label="tags", head=head),
        ]
        batches = [
            {**batch, "labels_places": batch["attention_mask"] * 2 - batch["input_ids"] % 2 - 1} for batch in batches
        ]
        for batch in batches:
            batch["labels_places"].clamp_(min=0)[batch["attention_mask"] == 0] = -100
    model = MultiTaskModel.from_encoder(tiny_encoder(family), tasks)
    return model, [{**batch, "labels_mood": torch.tensor([0, 1, 2])} for batch in batches]


def answers(model: PreTrainedModel, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if "labels" not in key})["logits_mood"]


@pytest.mark.parametrize("family", FAMILIES)
def test_prune_save_reload(family: str, tmp_path: Path) -> None:
    """The whole way, on every family: sizes as asked, and the folder gives back the model."""
    model, batches = model_and_batches(family)
    report = prune(model, batches, heads=0.5, feed_forward=0.5, multiple_of=8, progress=False)
    layers = report.after["layers"]
    assert sum(layer["heads"] for layer in layers) == 6
    assert min(layer["heads"] for layer in layers) >= 1
    assert sum(layer["feed_forward"] for layer in layers) == 96
    assert all(layer["feed_forward"] % 8 == 0 for layer in layers)
    assert report.masked_difference is not None
    assert report.masked_difference < 1e-5
    assert report.parameters_after == sum(p.numel() for p in model.parameters()) < report.parameters_before
    assert report.rows == 6
    assert report.tasks == (["mood"] if family in IMAGE_FAMILIES else ["mood", "places"])
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(answers(loaded, batches[0]), answers(model, batches[0]))
    # And again, from the reloaded one.
    prune(loaded, batches, heads=0.3, layers=1, progress=False)
    assert len(describe_structure(loaded.encoder)["layers"]) == 2
    loaded.save_pretrained(tmp_path)
    assert torch.equal(answers(AutoModel.from_pretrained(tmp_path), batches[0]), answers(loaded, batches[0]))


def test_mode_hooks_and_gradients_are_as_before() -> None:
    """A hook that stays slows training down; a gradient that stays is added to the first step's."""
    model, batches = model_and_batches("bert")
    model.train()
    prune(model, batches, heads=0.25, feed_forward=0.25, multiple_of=8, progress=False)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_dropout_does_not_matter() -> None:
    """Measured in training mode, the choice would be another one every time."""
    model, batches = model_and_batches("bert")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    again = copy.deepcopy(model.train())
    first = prune(model, batches, heads=0.5, progress=False)
    second = prune(again, batches, heads=0.5, progress=False)
    assert first.scores == second.scores


def test_only_what_the_loss_needs_stays() -> None:
    """A head that reaches no output is the first to go: the scores must point at it, not at its neighbour."""
    model, batches = model_and_batches("bert")
    kept = {0: [0, 2, 3], 1: [0, 1, 2], 2: [0, 1, 3]}
    layers = find_anatomy(model.encoder).layers
    expected = {}
    with torch.no_grad():
        for index, layer in enumerate(layers):
            assert isinstance(layer.attention.output, torch.nn.Linear)
            (silent,) = set(range(4)) - set(kept[index])
            layer.attention.output.weight[:, silent * 8 : (silent + 1) * 8] = 0
            expected[index] = [
                projection.weight.unflatten(0, (4, 8))[kept[index]].flatten(0, 1)
                for projection in layer.attention.projections.values()
            ]
    before = answers(model.eval(), batches[0])
    prune(model, batches, heads=0.25, progress=False)
    for index, layer in enumerate(find_anatomy(model.encoder).layers):
        for projection, weight in zip(layer.attention.projections.values(), expected[index], strict=True):
            assert torch.equal(projection.weight, weight)
    torch.testing.assert_close(answers(model, batches[0]), before, rtol=0, atol=5e-6)


def test_layers_go_first() -> None:
    model, batches = model_and_batches("modernbert")
    report = prune(model, batches, layers=2, heads=0.5, progress=False)
    assert len(report.removed_layers) == 2
    assert len(report.scores["layers"]) == 3
    assert [layer["heads"] for layer in report.after["layers"]] == [2]
    assert model.config.encoders is not None
    assert model.config.encoders["main"]["num_hidden_layers"] == 1


def test_whole_parts() -> None:
    model, batches = model_and_batches("vit")
    report = prune(model, batches, heads=1.0, feed_forward=1.0, progress=False)
    assert report.after["layers"] == [{"heads": 0, "feed_forward": 0}] * 3


def test_nothing_asked_changes_nothing() -> None:
    model, batches = model_and_batches("bert")
    before = answers(model.eval(), batches[0])
    report = prune(model, batches, progress=False)
    assert torch.equal(answers(model, batches[0]), before)
    assert report.before == report.after
    assert model.config.structure == {}


def test_magnitude_needs_no_data() -> None:
    model, _ = model_and_batches("bert")
    report = prune(model, [], heads=0.5, feed_forward=0.5, layers=1, importance="magnitude", progress=False)
    assert (report.rows, report.tasks, report.masked_difference) == (0, [], 0.0)
    assert sum(layer["heads"] for layer in report.after["layers"]) == 4


@pytest.mark.parametrize("uneven", [False, True])
def test_stock_model(uneven: bool, tmp_path: Path) -> None:
    """Users with one task have no multi-task model; their folder must reload as what it is."""
    model = AutoModelForSequenceClassification.from_config(tiny_config("distilbert", num_labels=3))
    assert isinstance(model, PreTrainedModel)
    randomize(model)
    batch = {**tiny_inputs("distilbert"), "labels": torch.tensor([0, 1, 2])}
    prune(model, [batch], heads=0.5 if uneven else 0, layers=1, progress=False)
    assert is_vanilla(encoder_of(model)) != uneven
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=1e-5)


# ---- every importance, every way to combine, one budget, repair ----

EVERYTHING: dict[str, Any] = {
    "compute": 0.5,
    "importance": "fisher",
    "rearrange": True,
    "combine": "max_min",
    "repair": True,
    "multiple_of": 8,
    "progress": False,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_of_it_on_every_family(family: str, tmp_path: Path) -> None:
    """Cut = mask, the budget is met, repair is not worse, the folder gives back the model, the same seed the cut."""
    model, batches = model_and_batches(family)
    again = copy.deepcopy(model)
    report = prune(model, batches, **EVERYTHING)
    layers = report.after["layers"]
    assert report.masked_difference is not None
    assert report.masked_difference < 1e-5
    assert report.swapped > 0
    assert report.multiply_adds_before is not None
    assert report.multiply_adds_after is not None
    assert 0.4 < report.multiply_adds_after / report.multiply_adds_before <= 0.5
    assert report.length == (17 if family in IMAGE_FAMILIES else 7)
    assert all(layer["heads"] >= 1 and layer["feed_forward"] % 8 == 0 and layer["feed_forward"] for layer in layers)
    assert report.repair is not None
    assert 0 < report.repair["error_after"] < report.repair["error_before"]
    assert set(report.lost_importance) == set(report.tasks)
    assert not any(module._forward_hooks for module in model.modules())
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(answers(AutoModel.from_pretrained(tmp_path), batches[0]), answers(model, batches[0]))
    second = prune(again, batches, **EVERYTHING)
    assert second.after == report.after
    assert torch.equal(answers(again.eval(), batches[0]), answers(model, batches[0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_repair_of_nothing_changes_nothing(family: str) -> None:
    model, batches = model_and_batches(family)
    before = answers(model.eval(), batches[0])
    report = prune(model, batches, repair=True, progress=False)
    torch.testing.assert_close(answers(model, batches[0]), before, rtol=0, atol=1e-5)
    assert report.repair is not None
    assert report.repair["error_after"] == 0


@pytest.mark.parametrize("importance", ["first_order", "fisher", "activation", "magnitude", "random"])
def test_importances(importance: Any) -> None:
    """Each does both ways to say how much, and the same twice."""
    model, batches = model_and_batches("bert")
    for wanted in ({"heads": 0.5, "feed_forward": 0.5}, {"compute": 0.5, "length": 16}):
        structures = []
        for _ in range(2):
            copied = copy.deepcopy(model)
            report = prune(copied, batches, importance=importance, multiple_of=8, progress=False, **wanted)
            assert report.rows == (0 if importance in ("magnitude", "random") else 6)
            structures.append((report.after, {name: value.sum() for name, value in copied.state_dict().items()}))
        assert structures[0] == structures[1]


def test_random_follows_its_seed() -> None:
    model, batches = model_and_batches("bert")
    found = []
    for seed in (1, 2):
        copied = copy.deepcopy(model)
        prune(copied, batches, heads=0.5, importance="random", seed=seed, progress=False)
        found.append(answers(copied.eval(), batches[0]))
    assert not torch.equal(*found)


def test_fisher_is_first_order_with_one_scale() -> None:
    """Where heads and neurons do not compete and nothing is swapped, both are one choice."""
    model, batches = model_and_batches("vit")
    other = copy.deepcopy(model)
    prune(model, batches, heads=0.5, feed_forward=0.5, multiple_of=8, progress=False)
    prune(other, batches, heads=0.5, feed_forward=0.5, multiple_of=8, importance="fisher", progress=False)
    assert torch.equal(answers(model.eval(), batches[0]), answers(other.eval(), batches[0]))


@pytest.mark.parametrize("seed", range(3))
def test_max_min_is_not_worse_for_the_worst_task(seed: int) -> None:
    model, batches = model_and_batches("bert")
    randomize(model, seed)
    worst = {}
    for combine in ("mean", "sum", "max", "max_min"):
        settings: dict[str, Any] = {"compute": 0.5, "combine": combine, "importance": "fisher", "multiple_of": 8}
        worst[combine] = max(prune(copy.deepcopy(model), batches, progress=False, **settings).lost_importance.values())
    assert worst["max_min"] <= worst["mean"] + 1e-9


def test_layers_count_towards_the_budget() -> None:
    """A third of the layers is a third of the compute: what is left to remove is another sixth."""
    model, batches = model_and_batches("bert")
    report = prune(model, batches, layers=1, compute=0.5, multiple_of=1, progress=False)
    assert report.multiply_adds_before is not None
    assert report.multiply_adds_after is not None
    assert 0.49 < report.multiply_adds_after / report.multiply_adds_before <= 0.5
    alone, _ = model_and_batches("bert")
    report = prune(alone, batches, layers=2, compute=0.5, multiple_of=1, progress=False)
    assert report.after["layers"] == [{"heads": 4, "feed_forward": 64}]


def test_multiply_adds_by_hand() -> None:
    """Of a layer of 32 x 64 at 7 tokens: four projections, scores and sums over values, two linear layers."""
    model, batches = model_and_batches("bert")
    report = prune(model, batches, compute=0.5, multiple_of=8, progress=False)
    assert report.length == 7
    assert report.multiply_adds_before == 3 * (7 * 4 * 32 * 32 + 2 * 7 * 7 * 32 + 7 * 2 * 32 * 64)
    gated, batches = model_and_batches("modernbert")
    report = prune(gated, batches, compute=0.5, length=10, multiple_of=8, progress=False)
    assert report.multiply_adds_before == 3 * (10 * 4 * 32 * 32 + 2 * 10 * 10 * 32 + 10 * 3 * 32 * 64)


def test_repair_makes_up_for_dropped_layers_too() -> None:
    """By the layers that come after them; nothing comes after the last."""
    model, batches = model_and_batches("vit")
    report = prune(model, batches, layers=1, repair=True, progress=False)
    assert report.removed_layers == [1]
    assert report.repair is not None
    assert 0 < report.repair["error_after"] < report.repair["error_before"]


def test_stock_model_with_a_budget_and_repair(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_config(tiny_config("distilbert", num_labels=3))
    assert isinstance(model, PreTrainedModel)
    randomize(model)
    batch = {**tiny_inputs("distilbert"), "labels": torch.tensor([0, 1, 2])}
    report = prune(model, [batch], **EVERYTHING)
    assert list(report.lost_importance) == ["task"]
    assert report.repair is not None
    assert report.repair["error_after"] < report.repair["error_before"]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=1e-5)


def test_activation_needs_no_labels() -> None:
    model, batches = model_and_batches("vit")
    unlabelled = [{key: value for key, value in batch.items() if "labels" not in key} for batch in batches]
    report = prune(model, unlabelled, compute=0.5, importance="activation", multiple_of=8, progress=False)
    assert report.tasks == []
    assert report.lost_importance == {}


# ---- bad input ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 1.2}, "heads: expected a fraction"),
        ({"feed_forward": -0.1}, "feed_forward: expected a fraction"),
        ({"layers": 3}, "layers: expected 0 to 2 layers"),
        ({"feed_forward": 0.5, "multiple_of": 0}, "multiple_of: expected 1 or more"),
        ({"compute": 0.5, "multiple_of": 0}, "multiple_of: expected 1 or more"),
        ({"compute": 1.0}, "compute: expected a fraction of at least 0 and below 1, found 1.0"),
        ({"compute": 0.5, "heads": 0.5}, "compute: expected it instead of heads and feed_forward"),
        (
            {"compute": 0.9, "multiple_of": 32},
            r"compute: expected at most 0\.631, since each of 3 layers keeps one head",
        ),
        ({"length": 8, "heads": 0.5}, "length: expected it with compute"),
        ({"compute": 0.5, "length": 0}, "length: expected 1 or more tokens"),
        ({"heads": 0.5, "rearrange": True}, "rearrange: expected importance 'fisher'.*found 'first_order'"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    model, batches = model_and_batches("bert")
    with pytest.raises(ValueError, match=message):
        prune(model, batches, progress=False, **arguments)
    assert describe_structure(model.encoder)["layers"] == [{"heads": 4, "feed_forward": 64}] * 3


def test_rounds_are_of_the_whole() -> None:
    """Two halves of a half are a half of what was there first, whatever rounding did in between."""
    model, batches = model_and_batches("bert")
    for share in (0.25, 0.5):
        whole = Whole([(4, 64)] * 3)
        prune(model, batches, heads=share, feed_forward=share, multiple_of=8, whole=whole, progress=False)
    layers = describe_structure(model.encoder)["layers"]
    assert sum(layer["heads"] for layer in layers) == 6
    assert sum(layer["feed_forward"] for layer in layers) == 96
    with pytest.raises(ValueError, match="whole: expected heads and neurons of the 3 layers that are there, found 2"):
        prune(model, batches, heads=0.5, whole=Whole([(4, 64)] * 2), progress=False)


def test_no_labels() -> None:
    model, batches = model_and_batches("bert")
    with pytest.raises(DataError, match="found no batches"):
        prune(model, [], heads=0.5, progress=False)
    unlabelled = {key: value for key, value in batches[0].items() if "labels" not in key}
    with pytest.raises(DataError, match="labels_<task>"):
        prune(model, [unlabelled], heads=0.5, progress=False)


def test_no_batches_where_some_are_needed() -> None:
    model, _ = model_and_batches("bert")
    with pytest.raises(DataError, match="to repair the model on, found none"):
        prune(model, [], heads=0.5, importance="magnitude", repair=True, progress=False)
    with pytest.raises(DataError, match="to measure activations on, found none"):
        prune(model, [], heads=0.5, importance="activation", progress=False)
    with pytest.raises(ValueError, match="length: expected a number of tokens, or batches"):
        prune(model, [], compute=0.5, importance="magnitude", progress=False)


def test_broken_model() -> None:
    model, batches = model_and_batches("bert")
    with torch.no_grad():
        next(model.encoder.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match="finite loss"):
        prune(model, batches, heads=0.5, progress=False)


def test_family_with_another_order_of_heads_is_found_out() -> None:
    """Shapes say nothing about the order of rows; a wrong cut must not pass for a pruned model."""
    model, batches = model_and_batches("bert")
    core = find_anatomy(model.encoder).layers[0].attention.core
    # Stands for a family whose heads are interleaved in the rows of the value projection.
    core.get_submodule("value").register_forward_hook(lambda _, args, output: output.flip(-1))
    with pytest.raises(UnsupportedEncoderError, match="cutting to equal masking"):
        prune(model, batches, heads=0.5, progress=False)
