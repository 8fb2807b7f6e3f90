"""What layers are worth: nothing where they change nothing, and what taking them out really costs."""

import copy

import pytest
import torch

from hf_mtcompress import ImageClassification, MultiTaskModel, SequenceClassification
from hf_mtcompress.compression.importance import block_influence
from hf_mtcompress.compression.measuring import leave_one_out
from hf_mtcompress.errors import DataError, TrainingError
from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.model.surgery import keep_layers
from tests.tiny import FAMILIES, IMAGE_FAMILIES, randomize, tiny_encoder, tiny_inputs


def labelled(family: str) -> tuple[MultiTaskModel, list[dict[str, torch.Tensor]]]:
    """A model of two tasks and two batches of unequal size, the second without the labels of one task."""
    kind = ImageClassification if family in IMAGE_FAMILIES else SequenceClassification
    tasks = [
        kind("mood", labels=["a", "b"], head="linear"),
        kind("strength", problem_type="regression", head="linear"),
    ]
    model = MultiTaskModel.from_encoder(tiny_encoder(family), tasks)
    randomize(model, seed=1)
    batches = []
    for size, seed in ((4, 3), (2, 5)):
        generator = torch.Generator().manual_seed(seed)
        batch = dict(tiny_inputs(family, batch=size))
        batch["labels_mood"] = torch.randint(0, 2, (size,), generator=generator)
        if size == 4:
            batch["labels_strength"] = torch.randn(size, generator=generator)
        batches.append(batch)
    return model.eval(), batches


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_left_out_costs_what_its_cut_costs(family: str):
    """A layer that is skipped in another way than cutting skips it would be judged by a model that nobody gets."""
    model, batches = labelled(family)
    count = len(find_anatomy(model.encoder).layers)

    def losses(one: MultiTaskModel) -> torch.Tensor:
        with torch.no_grad():
            inputs = [{key: value for key, value in batch.items() if "labels" not in key} for batch in batches]
            mood = [
                one(**x, labels_mood=b["labels_mood"]).loss * len(b["labels_mood"])
                for x, b in zip(inputs, batches, strict=True)
            ]
            strength = one(**inputs[0], labels_strength=batches[0]["labels_strength"]).loss * 4
        return torch.stack([sum(mood), strength]).double()

    added = []
    for left_out in range(count):
        cut = copy.deepcopy(model)
        keep_layers(cut.encoder, [layer for layer in range(count) if layer != left_out])
        added.append((losses(cut) - losses(model)).clamp(min=0))
    expected = torch.stack(added)
    expected = (expected / expected.sum(0).clamp(min=1e-12)).mean(1)
    before = losses(model)
    torch.testing.assert_close(
        leave_one_out(model, model.encoder, batches, progress=False), expected, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(losses(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("family", sorted(IMAGE_FAMILIES))
def test_a_layer_that_changes_nothing_is_worth_nothing(family: str):
    """With norms before its parts, a layer whose output projections are zero hands on what it gets."""
    model, batches = labelled(family)
    silent = find_anatomy(model.encoder).layers[1]
    with torch.no_grad():
        for part in (silent.attention.output, silent.feed_forward.output):
            assert isinstance(part, torch.nn.Linear)
            part.weight.zero_()
            part.bias.zero_()
    inputs = [{key: value for key, value in batch.items() if "labels" not in key} for batch in batches]
    influence = block_influence(model.encoder, inputs)
    assert influence[1].abs() < 1e-6
    assert (influence[[0, 2]] > 1e-3).all()
    assert leave_one_out(model, model.encoder, batches, progress=False)[1] < 1e-6


def test_what_cannot_be_measured_is_said():
    model, batches = labelled("bert")
    with pytest.raises(DataError, match="expected batches with labels"):
        leave_one_out(model, model.encoder, [{"input_ids": batches[0]["input_ids"]}], progress=False)
    broken = find_anatomy(model.encoder).layers[1].feed_forward.output
    assert isinstance(broken, torch.nn.Linear)
    with torch.no_grad():
        broken.weight.fill_(torch.nan)
    with pytest.raises(TrainingError, match="expected a finite loss"):
        leave_one_out(model, model.encoder, batches, progress=False)
