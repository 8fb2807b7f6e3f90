"""Which numbers of the hidden states go, and that all that is left still works together."""

import copy

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hf_mtcompress.compression.pruning import prune
from hf_mtcompress.compression.width import prune_width
from hf_mtcompress.errors import DataError, TrainingError, UnsupportedEncoderError
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.surgery import is_vanilla
from hf_mtcompress.tasks import SequenceClassification, TokenClassification
from tests.tiny import FEELING_LABELS, HEADS, HIDDEN, randomize, tiny_config, tiny_encoder, tiny_inputs

Batch = dict[str, torch.Tensor]


def multi_task(family: str = "bert") -> MultiTaskModel:
    tasks = [
        SequenceClassification("mood", labels=FEELING_LABELS, text="text", label="label"),
        TokenClassification("words", labels=["a", "b"], tokens="tokens", label="tags"),
    ]
    model = MultiTaskModel.from_encoder(tiny_encoder(family), tasks)
    randomize(model)
    return model


def batches(family: str = "bert") -> list[Batch]:
    inputs = tiny_inputs(family)
    first = {**inputs, "labels_mood": torch.tensor([0, 2, 1]), "labels_words": inputs["input_ids"] % 2}
    return [first, {**tiny_inputs(family, seed=1), "labels_mood": torch.tensor([1, 1, 0])}]


@pytest.mark.parametrize("family", ["bert", "modernbert", "deberta-v2"])
def test_it_becomes_narrower(family: str) -> None:
    model = multi_task(family)
    before = copy.deepcopy(model.state_dict())
    narrow, report = prune_width(model, batches(family), 0.3, progress=False)
    assert isinstance(narrow, MultiTaskModel)
    assert is_vanilla(narrow.encoder)
    assert (report.width_before, report.width_after) == (HIDDEN, HIDDEN - HIDDEN // HEADS)
    assert [report.before["layers"][0]["heads"], report.after["layers"][0]["heads"]] == [HEADS, HEADS - 1]
    assert report.parameters_after == narrow.num_parameters() < report.parameters_before == model.num_parameters()
    assert (report.tasks, report.rows) == (["mood", "words"], 6)
    assert all(0 < share < 1 for share in report.lost_importance.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the source changed"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    # It is a model like any other: it can be pruned on, unevenly too.
    prune(narrow, batches(family), heads=0.3, feed_forward=0.5, multiple_of=8, progress=False)


def test_numbers_that_nothing_depends_on_go_first() -> None:
    """Importance that is mixed up with another order would throw away what the heads read."""
    model = AutoModelForSequenceClassification.from_config(tiny_config("bert", num_labels=3))
    randomize(model)
    used = [1, 2, 4, 5, 8, 9, 10, 11, 13, 14, 17, 18, 20, 21, 22, 24, 25, 26, 27, 28, 29, 30, 31, 0]
    unused = sorted(set(range(HIDDEN)) - set(used))
    with torch.no_grad():
        # At these places every norm answers zero.
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight[unused] = 0
                module.bias[unused] = 0
    batch = {**tiny_inputs("bert"), "labels": torch.tensor([0, 2, 1])}
    narrow, report = prune_width(model, [batch], 0.25, progress=False)
    assert report.lost_importance == pytest.approx({"task": 0.0}, abs=1e-12)
    words = model.bert.embeddings.word_embeddings.weight
    assert torch.equal(narrow.bert.embeddings.word_embeddings.weight, words[:, sorted(used)])


# ---- bad input ----


@pytest.mark.parametrize("width", [0.0, 1.0, -0.1, 0.01, 0.99])
def test_amounts_that_are_none(width: float) -> None:
    with pytest.raises(ValueError, match="width: expected a fraction"):
        prune_width(multi_task(), batches(), width, progress=False)


def test_no_labels() -> None:
    with pytest.raises(DataError, match="expected batches with labels"):
        prune_width(multi_task(), [tiny_inputs("bert")], 0.25, progress=False)


def test_a_loss_that_is_no_number() -> None:
    model = multi_task()
    with torch.no_grad():
        model.encoder.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(TrainingError, match="expected a finite loss"):
        prune_width(model, batches(), 0.25, progress=False)


def test_mpnet() -> None:
    with pytest.raises(UnsupportedEncoderError, match="all layers share"):
        prune_width(multi_task("mpnet"), batches("mpnet"), 0.25, progress=False)
