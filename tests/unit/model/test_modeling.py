"""Laws of the multi-task model on every encoder family."""

import dataclasses
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel, AutoTokenizer

from hf_mtcompress import (
    ImageClassification,
    MultiTaskModel,
    SequenceClassification,
    Task,
    TokenClassification,
    student_of,
)
from hf_mtcompress.errors import ArtifactError, DataError, TaskError, UnsupportedEncoderError
from hf_mtcompress.model.configuration import MultiTaskConfig
from tests.tiny import FAMILIES, FEELING_LABELS, IMAGE_FAMILIES, TAG_LABELS, tiny_encoder, tiny_inputs, tiny_tokenizer

NO_STOCK_CLASS = ("clip_text", "clip_vision")


def tasks_of(family: str, head: Any = "stock") -> list[Task]:
    if family in IMAGE_FAMILIES:
        return [
            ImageClassification("colour", labels=["red", "green", "blue"], head=head),
            ImageClassification("strength", problem_type="regression", head=head),
        ]
    return [
        SequenceClassification("mood", labels=FEELING_LABELS, head=head),
        SequenceClassification("strength", problem_type="regression", head=head),
        TokenClassification("tags", labels=TAG_LABELS, head=head),
    ]


def logits(model: torch.nn.Module, family: str) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        outputs = model(**tiny_inputs(family))
    return {key: value for key, value in outputs.items() if key.startswith("logits")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_answers_bit_for_bit(family: str, tmp_path: Path) -> None:
    """Weights read from a file lie off cache lines, where kernels round otherwise; comparing weights shows nothing."""
    model = MultiTaskModel.from_encoder(tiny_encoder(family), tasks_of(family)).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, MultiTaskModel)
    before, after = logits(model, family), logits(loaded, family)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NO_STOCK_CLASS])
def test_an_exported_task_is_the_familys_own_class(family: str, tmp_path: Path) -> None:
    """A head that is nearly the stock one loads everywhere and answers wrongly."""
    model = MultiTaskModel.from_encoder(tiny_encoder(family), tasks_of(family)).eval()
    expected = logits(model, family)
    for name, task in model.tasks.items():
        folder = model.export_task(name, tmp_path / name, None)
        stock = getattr(transformers, task.auto_class).from_pretrained(folder).eval()
        with torch.no_grad():
            found = stock(**tiny_inputs(family)).logits
        torch.testing.assert_close(found, expected[f"logits_{name}"], rtol=0, atol=1e-6)
        if task.labels:
            assert stock.config.id2label == dict(enumerate(task.labels))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_heads_at_once_equal_one_at_a_time(family: str) -> None:
    model = MultiTaskModel.from_encoder(tiny_encoder(family), tasks_of(family)).eval()
    together = logits(model, family)
    for name in model.tasks:
        with torch.no_grad():
            alone = model(**tiny_inputs(family), tasks=[name])
        assert torch.equal(alone[f"logits_{name}"], together[f"logits_{name}"])
        assert all(f"logits_{other}" not in alone for other in model.tasks if other != name)
    with pytest.raises(TaskError, match=r"tasks: expected names among .*, found \['mod'\]"):
        model(**tiny_inputs(family), tasks=["mod"])


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in IMAGE_FAMILIES])
def test_padding_changes_nothing(family: str) -> None:
    """An attention mask that is dropped somewhere shifts every score a little."""
    model = MultiTaskModel.from_encoder(tiny_encoder(family), tasks_of(family)).eval()
    inputs = {key: value[:1] for key, value in tiny_inputs(family).items()}
    length = int(inputs["attention_mask"].sum())
    short = {key: value[:, :length] for key, value in inputs.items()}
    padding = torch.nn.functional.pad
    fill = {"input_ids": tiny_tokenizer(family).pad_token_id, "attention_mask": 0, "token_type_ids": 0}
    long = {key: padding(value, (0, 5), value=fill[key]) for key, value in short.items()}
    with torch.no_grad():
        one, other = model(**short), model(**long)
    torch.testing.assert_close(one.logits_mood, other.logits_mood, rtol=0, atol=1e-5)
    torch.testing.assert_close(one.logits_tags, other.logits_tags[:, :length], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in IMAGE_FAMILIES])
def test_without_a_mask_every_token_counts(family: str) -> None:
    """ModernBERT's stock head that takes means would look for tokens, which it is not given."""
    pooling = {"classifier_pooling": "mean"} if family == "modernbert" else {}
    model = MultiTaskModel.from_encoder(tiny_encoder(family, **pooling), tasks_of(family)).eval()
    inputs = tiny_inputs(family)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    with torch.no_grad():
        given = model(**inputs)
        bare = model(**{key: value for key, value in inputs.items() if key != "attention_mask"})
    assert torch.equal(given.logits_mood, bare.logits_mood)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_gets_what_it_takes_by_any_name(family: str) -> None:
    """Of inputs that only some encoders have; what a tokenizer makes for the others is left out."""
    model = MultiTaskModel.from_encoder(tiny_encoder(family), tasks_of(family)).eval()
    inputs = tiny_inputs(family)
    main = inputs[model.main_input_name]
    assert model.inputs_in({**inputs, "labels_mood": None}).keys() == inputs.keys()
    with torch.no_grad():
        plain = model(**inputs).last_hidden_state
        if "token_type_ids" not in model.input_names:
            assert torch.equal(model(**inputs, token_type_ids=torch.ones(3, 9).long()).last_hidden_state, plain)
        if "position_ids" in model.input_names:
            backwards = torch.arange(main.shape[1]).flip(0)[None]
            assert not torch.allclose(model(**inputs, position_ids=backwards).last_hidden_state, plain, atol=1e-4)
        with pytest.raises(TypeError, match=r"expected inputs among .*, found \['attention_masks'\]"):
            model(**inputs, attention_masks=main)


def test_a_model_is_freed_with_its_last_name() -> None:
    """No circle holds it until the garbage collector comes by: searches build many."""
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks_of("bert"))
    model(**tiny_inputs("bert"))
    watched = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert watched() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("family", ["bert", "modernbert", "dinov2", "clip_text", "clip_vision"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_other_heads_reload_and_say_that_they_are_not_plain(family: str, head: str, tmp_path: Path) -> None:
    model = MultiTaskModel.from_encoder(tiny_encoder(family), tasks_of(family, head)).eval()
    model.save_pretrained(tmp_path)
    before, after = logits(model, family), logits(AutoModel.from_pretrained(tmp_path).eval(), family)
    assert all(torch.equal(before[key], after[key]) for key in before)
    with pytest.raises(TaskError, match="expected a stock head"):
        model.export_task(next(iter(model.tasks)), tmp_path / "plain", None)


@pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
def test_pooling_ignores_padding(pooling: Any) -> None:
    task = SequenceClassification("mood", labels=FEELING_LABELS, head="linear", pooling=pooling)
    model = MultiTaskModel.from_encoder(tiny_encoder("roberta"), [task]).eval()
    inputs = {key: value[:1] for key, value in tiny_inputs("roberta").items()}
    length = int(inputs["attention_mask"].sum())
    with torch.no_grad():
        padded = model(**inputs).logits_mood
        bare = model(**{key: value[:, :length] for key, value in inputs.items()}).logits_mood
    torch.testing.assert_close(padded, bare, rtol=0, atol=1e-5)


def test_a_part_that_no_head_reads_is_left_out(tmp_path: Path) -> None:
    """BERT's pooler under word tasks alone would never be trained, and DDP would wait for it."""
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), [TokenClassification("tags", labels=TAG_LABELS)])
    assert not [key for key in model.state_dict() if "pooler" in key]
    model.save_pretrained(tmp_path)
    assert not [key for key in MultiTaskModel.from_pretrained(tmp_path).state_dict() if "pooler" in key]


def test_an_encoder_without_its_pooler(tmp_path: Path) -> None:
    """`add_pooling_layer=False` is common; loaded again with a fresh pooler, a head would read noise."""
    tiny_encoder("bert").save_pretrained(tmp_path / "encoder")
    encoder = AutoModel.from_pretrained(tmp_path / "encoder", add_pooling_layer=False)
    task = SequenceClassification("mood", labels=FEELING_LABELS, text="text", label="label", head="linear")
    model = MultiTaskModel.from_encoder(encoder, [task]).eval()
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModel.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        found, expected = (each(**tiny_inputs("bert")).logits_mood for each in (loaded, model))
    assert torch.equal(found, expected)
    with pytest.raises(UnsupportedEncoderError, match="expected an encoder with a pooler for its stock head"):
        MultiTaskModel.from_encoder(encoder, [dataclasses.replace(task, head="stock")])


def test_a_part_that_no_head_reads_any_more(tmp_path: Path) -> None:
    """What is saved is what loads: a folder with weights that nobody takes is not one that reloads."""
    tasks = [TokenClassification("tags", labels=TAG_LABELS), SequenceClassification("mood", labels=FEELING_LABELS)]
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks)
    model.remove_task("mood")
    model.save_pretrained(tmp_path)
    _, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())


def test_a_student_reloads_and_exports(tmp_path: Path) -> None:
    teacher = MultiTaskModel.from_encoder(tiny_encoder("modernbert"), tasks_of("modernbert")).eval()
    student = student_of(teacher, [1, 2])
    student.save_pretrained(tmp_path)
    before = logits(student, "modernbert")
    after = logits(MultiTaskModel.from_pretrained(tmp_path).eval(), "modernbert")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_loss_is_the_weighted_sum_of_means() -> None:
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks_of("bert")).eval()
    model.tasks["mood"].weight = 0.5
    labels = {"labels_mood": torch.tensor([0, 2, -100]), "labels_strength": torch.tensor([0.5, float("nan"), 1.0])}
    with torch.no_grad():
        outputs = model(**tiny_inputs("bert"), **labels)
    mood = torch.nn.functional.cross_entropy(outputs.logits_mood[:2], torch.tensor([0, 2]))
    strength = torch.nn.functional.mse_loss(outputs.logits_strength[[0, 2], 0], torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(outputs.loss, 0.5 * mood + strength)
    assert "logits_tags" not in outputs


def test_gradient_checkpointing_changes_no_gradient() -> None:
    labels = {"labels_mood": torch.tensor([0, 1, 2])}

    def gradient(checkpointing: bool) -> torch.Tensor:
        model = MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks_of("bert")).train()
        torch.manual_seed(0)
        for head in model.heads.parameters():
            torch.nn.init.normal_(head)
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**tiny_inputs("bert"), **labels).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.encoders.parameters() if p.grad is not None])

    torch.testing.assert_close(gradient(True), gradient(False))


def test_tasks_of_one_name_are_refused() -> None:
    with pytest.raises(TaskError, match=r"different names, found \['a', 'a'\]"):
        MultiTaskModel.from_encoder(tiny_encoder("bert"), [SequenceClassification("a", labels=["x", "y"])] * 2)


def test_a_task_without_labels_is_refused() -> None:
    with pytest.raises(TaskError, match="expected labels before a head is built"):
        MultiTaskModel.from_encoder(tiny_encoder("bert"), [SequenceClassification("a")])


def test_labels_of_an_unknown_task_are_refused() -> None:
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks_of("bert"))
    with pytest.raises(TypeError, match="labels_moood"):
        model(**tiny_inputs("bert"), labels_moood=torch.tensor([0, 0, 0]))


def test_a_newer_format_is_refused() -> None:
    with pytest.raises(ArtifactError, match="expected a model of format_version 1 or older, found 2"):
        MultiTaskConfig(format_version=2)


def test_an_exported_task_reads_texts(tmp_path: Path) -> None:
    """Without its tokenizer transformers makes up one of five tokens, and every text has the same answer."""
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), [SequenceClassification("mood", labels=["bad", "good"])])
    with pytest.raises(TypeError, match="processor"):
        model.export_task("mood", tmp_path)  # pyright: ignore[reportCallIssue] - what is tested
    with pytest.raises(DataError, match="expected a tokenizer or image processor to save beside the model, found str"):
        model.export_task("mood", tmp_path, "bert-base-uncased")
    model.export_task("mood", tmp_path, tiny_tokenizer())
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(tiny_tokenizer())
