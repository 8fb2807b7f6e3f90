"""Planted agreement and conflict are found on held-out rows, and the sketch is close to the whole gradients."""

from typing import Any

import pytest
import torch
from datasets import Dataset

from hf_mtcompress.data.collator import MultiTaskCollator
from hf_mtcompress.data.preprocessing import encode_groups
from hf_mtcompress.data.readers import reader_of
from hf_mtcompress.errors import DataError, UnsupportedEncoderError
from hf_mtcompress.evaluation import affinity
from hf_mtcompress.evaluation.affinity import held_out_cosines, held_out_gradients
from hf_mtcompress.losses.grouping import best_grouping
from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.tasks import ImageClassification, SequenceClassification, Task, TokenClassification
from tests.tiny import (
    COLOUR_LABELS,
    TAG_LABELS,
    tiny_encoder,
    tiny_image_processor,
    tiny_image_rows,
    tiny_text_rows,
    tiny_token_rows,
    tiny_tokenizer,
)

LABELS = ("no", "yes")

READER = reader_of(tiny_tokenizer())


def two_sided(seed: int = 0) -> Dataset:
    """Texts with a label of two, its opposite, and a number that has nothing to do with either."""
    rows = tiny_text_rows(60, seed=seed)
    good = [LABELS[label == "good"] for label in rows["label"]]
    bad = [LABELS[label != "good"] for label in rows["label"]]
    return Dataset.from_dict({"text": rows["text"], "good": good, "bad": bad, "length": [len(t) for t in rows["text"]]})


def of_texts(name: str, label: str) -> Task:
    return SequenceClassification(name, text="text", label=label, labels=LABELS, head="linear", pooling="mean")


def model_of(*tasks: Task, small_heads: bool = True, **options: Any) -> MultiTaskModel:
    """Fresh heads; with `small_heads` all alike, so that all tasks begin from chance and read the same."""
    torch.manual_seed(0)
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), list(tasks), **options)
    if small_heads:
        heads = [model.heads[task.head_name] for task in tasks]
        state = {key: 0.01 * value for key, value in heads[0].state_dict().items()}
        for head in heads:
            head.load_state_dict(state)
    return model


def test_the_same_task_twice_and_its_opposite() -> None:
    """Losses at chance of opposite labels pull in opposite directions, and twice the weight changes no direction."""
    tasks = (of_texts("one", "good"), of_texts("two", "good"), of_texts("other", "bad"))
    tasks[1].weight = 2.0
    rows = two_sided()
    cosines = held_out_cosines(model_of(*tasks), dict.fromkeys(("one", "two", "other"), rows), READER)
    assert cosines.shape == (3, 3)
    torch.testing.assert_close(cosines.diagonal(), torch.ones(3))
    assert cosines[0, 1] == pytest.approx(1.0, abs=1e-6)
    assert cosines[0, 2] < -0.95
    groups = best_grouping([task.name for task in tasks], cosines.tolist(), 2).groups
    assert groups == (("one", "two"), ("other",))


@pytest.mark.parametrize("batch_size", [7, 60])
def test_the_sketch_is_close_to_the_whole_gradients(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the batches are: a sum over rows, not a mean of means."""
    # The tiny encoder has fewer numbers than the sketch has places.
    monkeypatch.setattr(affinity, "SKETCH", 2**12)
    tasks = (
        of_texts("one", "good"),
        SequenceClassification("size", text="text", label="length", problem_type="regression"),
    )
    rows = two_sided()
    model = model_of(*tasks, small_heads=False)
    found = held_out_cosines(model, dict.fromkeys(("one", "size"), rows), READER, batch_size=batch_size)

    encoded = tiny_tokenizer()(list(rows["text"]), padding=True, return_tensors="pt")
    labels = {
        "one": torch.tensor([LABELS.index(x) for x in rows["good"]]),
        "size": torch.tensor(rows["length"]).float(),
    }
    weights = [weight for layer in find_anatomy(model.encoder).layers for weight in layer.module.parameters()]
    groups = encode_groups(model.tasks, dict.fromkeys(("one", "size"), rows), READER, "validation")
    wanted = held_out_gradients(model, groups, MultiTaskCollator(model.tasks, READER), batch_size=batch_size)
    gradients = []
    for name, values in labels.items():
        loss = model(**encoded, tasks=[name], **{f"labels_{name}": values}).loss
        gradients.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)]))
        # Of the mean loss over items, in length too.
        assert wanted[name].loss == pytest.approx(loss.item(), rel=1e-4)
        assert wanted[name].gradient.norm().item() == pytest.approx(gradients[-1].norm().item(), rel=0.1)
    assert len(gradients[0]) > 5 * 2**12
    expected = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    assert found[0, 1].item() == pytest.approx(expected.item(), abs=3 / 2**6)


def test_a_model_is_left_as_it_was() -> None:
    """Words and texts over different rows, with a frozen encoder, in the middle of training."""
    words = TokenClassification("tags", tokens="tokens", label="tags", labels=TAG_LABELS)
    model = model_of(of_texts("one", "good"), words, small_heads=False)
    model.train().freeze_encoder()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained = {name: weight.requires_grad for name, weight in model.named_parameters()}
    cosines = held_out_cosines(model, {"one": two_sided(), "tags": tiny_token_rows(20)}, READER)
    assert torch.isfinite(cosines).all()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == trained
    assert set(trained.values()) == {True, False}


def test_layers_that_are_not_trained_have_no_say() -> None:
    """Unless none is trained."""
    tasks = (of_texts("one", "good"), of_texts("two", "good"))
    rows = dict.fromkeys(("one", "two"), two_sided())
    model = model_of(*tasks, small_heads=False)
    layers = [layer.module for layer in find_anatomy(model.encoder).layers]
    all_layers = held_out_cosines(model, rows, READER)
    layers[0].requires_grad_(False)
    last = held_out_cosines(model, rows, READER)
    assert not torch.allclose(all_layers, last, atol=1e-4)
    model.freeze_encoder()
    assert torch.allclose(held_out_cosines(model, rows, READER), all_layers, atol=1e-6)


def test_pictures() -> None:
    tasks = [
        ImageClassification(name, image="image", label="label", labels=COLOUR_LABELS, head="linear", pooling="mean")
        for name in ("one", "two")
    ]
    torch.manual_seed(0)
    model = MultiTaskModel.from_encoder(tiny_encoder("vit"), tasks)
    model.heads[tasks[1].head_name].load_state_dict(model.heads[tasks[0].head_name].state_dict())
    rows = tiny_image_rows(8)
    cosines = held_out_cosines(model, {"one": rows, "two": rows}, reader_of(tiny_image_processor()))
    assert cosines[0, 1] == pytest.approx(1.0, abs=1e-6)


def test_rows_without_labels_are_not_counted() -> None:
    task = of_texts("one", "good")
    rows = two_sided()
    texts = list(rows["text"])
    some = Dataset.from_dict({"text": texts, "good": [rows["good"][0], *[None] * (len(texts) - 1)]})
    assert held_out_cosines(model_of(task), {"one": some}, READER)[0, 0] == pytest.approx(1.0)
    none = Dataset.from_dict({"text": texts, "good": [None] * len(texts)})
    with pytest.raises(DataError, match="task 'one': expected validation rows with a label, found none among 60"):
        held_out_cosines(model_of(task), {"one": none}, READER)


def test_what_cannot_be_compared() -> None:
    one, two = of_texts("one", "good"), of_texts("two", "bad")
    rows = two_sided()
    with pytest.raises(DataError, match="expected validation rows of every task, found none of two"):
        held_out_cosines(model_of(one, two), {"one": rows}, READER)
    model = model_of(one, two, branches={"side": ["two"]}, branch_layers=1)
    with pytest.raises(
        UnsupportedEncoderError, match="for comparing what tasks want of the encoder, found the branches"
    ):
        held_out_cosines(model, {"one": rows, "two": rows}, READER)
