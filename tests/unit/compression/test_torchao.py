from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from hf_mtcompress.compression.pruning import prune
from hf_mtcompress.compression.quantization import quantize_torchao
from hf_mtcompress.compression.width import prune_width
from hf_mtcompress.errors import ArtifactError, MissingExtraError, UnsupportedEncoderError
from hf_mtcompress.formats.folders import folder_form
from hf_mtcompress.formats.predictor import load_predictor
from hf_mtcompress.model.anatomy import encoder_of, find_anatomy
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.sparse import make_sparse
from hf_mtcompress.model.surgery import cut, describe_structure
from hf_mtcompress.tasks import ImageClassification, SequenceClassification
from tests import laws
from tests.tiny import FEELING_LABELS, randomize, tiny_config, tiny_encoder, tiny_inputs, tiny_tokenizer

# An extra, which `make test` installs.
torchao_tensors = pytest.importorskip("torchao.quantization").Int8Tensor

FAMILIES = ["bert", "mpnet", "deberta-v2", "modernbert", "vit"]


def multi_task(family: str) -> MultiTaskModel:
    kind, column = (ImageClassification, "image") if family == "vit" else (SequenceClassification, "text")
    tasks = [kind("mood", labels=FEELING_LABELS, label="label", **{column: column})]
    model = MultiTaskModel.from_encoder(tiny_encoder(family), tasks).eval()
    cut(model.encoder, laws.UNEVEN_HEADS, {0: range(20), 1: range(32), 2: []})
    model.refresh_config()
    return model


def stock(uneven: bool) -> PreTrainedModel:
    model = AutoModelForSequenceClassification.from_config(tiny_config("bert", num_labels=3))
    randomize(model)
    if uneven:
        cut(encoder_of(model), laws.UNEVEN_HEADS, laws.UNEVEN_NEURONS)
    return model.eval()


def logits(model: PreTrainedModel, family: str = "bert", rows: slice = slice(None)) -> Tensor:
    inputs = {key: value[rows] for key, value in tiny_inputs(family).items()}
    with torch.no_grad():
        return model(**inputs)["logits_mood" if isinstance(model, MultiTaskModel) else "logits"]


def quantized_layers(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if isinstance(parameter, torchao_tensors)]


@pytest.mark.parametrize("family", FAMILIES)
def test_multi_task_model_reloads_bit_equal(family: str, tmp_path: Path) -> None:
    model = multi_task(family)
    quantized = quantize_torchao(model)
    before = logits(quantized, family)
    quantized.save_pretrained(tmp_path)
    assert torch.equal(logits(quantized, family), before), "saving must not change the model"
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, family), before)
    assert describe_structure(loaded.encoder) == describe_structure(model.encoder)
    assert quantized_layers(loaded) == quantized_layers(quantized) != []
    stack = find_anatomy(loaded.encoder).stack_name
    assert all(name.startswith(f"encoders.main.{stack}.") for name in quantized_layers(loaded))
    # And is near the model it came from.
    float_logits = logits(model, family)
    assert 0 < (before - float_logits).abs().max() < 0.1 * float_logits.abs().max()


@pytest.mark.parametrize("uneven", [False, True])
def test_stock_model_reloads(uneven: bool, tmp_path: Path) -> None:
    """The plain one must not need this package."""
    quantized = quantize_torchao(stock(uneven))
    before = logits(quantized)
    quantized.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert quantized_layers(loaded) == quantized_layers(quantized) != []
    assert loaded.config.quantization_config.quant_method == ("mtcompress_torchao" if uneven else "torchao")
    assert torch.equal(logits(loaded), before)


def test_rows_do_not_disturb_each_other() -> None:
    """Ranges are those of a token: a row alone gets the answer that it gets in a batch."""
    quantized = quantize_torchao(multi_task("bert"))
    torch.testing.assert_close(logits(quantized)[:1], logits(quantized, rows=slice(0, 1)), rtol=0, atol=1e-6)


def test_weights_are_smaller(tmp_path: Path) -> None:
    model = MultiTaskModel.from_encoder(
        tiny_encoder("bert", hidden_size=128, intermediate_size=512, vocab_size=120),
        [SequenceClassification("mood", labels=FEELING_LABELS, text="text", label="label")],
    )
    model.save_pretrained(tmp_path / "float")
    quantize_torchao(model).save_pretrained(tmp_path / "few")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("float", "few")]
    assert sizes[1] < 0.4 * sizes[0]


def test_the_source_is_left_alone() -> None:
    model = multi_task("bert")
    before, config = logits(model), model.config.to_dict()
    quantize_torchao(model)
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config
    assert quantized_layers(model) == []


def test_predictor_opens_it(tmp_path: Path) -> None:
    quantized = quantize_torchao(multi_task("bert"))
    quantized.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert folder_form(tmp_path) == "torchao"
    answer = load_predictor(tmp_path).predict(["the old house"])[0]["mood"]
    assert answer["label"] in FEELING_LABELS


def test_saved_again_after_loading(tmp_path: Path) -> None:
    """What was put together on loading has no way back in transformers 5.24."""
    quantize_torchao(multi_task("bert")).save_pretrained(tmp_path / "one")
    loaded = AutoModel.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "two")), logits(loaded))


# ---- bad input ----


def test_adapters_would_learn_from_wrong_gradients() -> None:
    """torchao's 8-bit layers pass no gradient to their inputs, and say nothing."""
    with pytest.raises(UnsupportedEncoderError, match="found weights of torchao, which pass no gradient"):
        quantize_torchao(multi_task("bert")).add_adapters()


def test_cutting_after_quantizing() -> None:
    quantized = quantize_torchao(multi_task("bert"))
    batch = {**tiny_inputs("bert"), "labels_mood": torch.tensor([0, 1, 2])}
    for work in (
        lambda: prune(quantized, [batch], heads=0.5, progress=False),
        lambda: prune_width(quantized, [batch], 0.25, progress=False),
        lambda: cut(quantized.encoder, {0: [0]}),
    ):
        with pytest.raises(UnsupportedEncoderError, match="prune first, then quantize"):
            work()


def test_exporting_a_task() -> None:
    with pytest.raises(UnsupportedEncoderError, match="found quantized ones; keep the multi-task folder"):
        quantize_torchao(multi_task("bert")).to_stock("mood")


def test_opening_without_torchao(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize_torchao(multi_task("bert")).save_pretrained(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(MissingExtraError, match=r"hf_mtcompress\[torchao\]"):
        AutoModel.from_pretrained(tmp_path)


def test_quantizing_twice() -> None:
    quantized = quantize_torchao(multi_task("bert"))
    with pytest.raises(UnsupportedEncoderError, match="quantized already"):
        quantize_torchao(quantized)


def test_one_task_of_a_quantized_folder(tmp_path: Path) -> None:
    quantize_torchao(multi_task("bert")).save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="expected float weights to load one task"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_storing_without_zeros(tmp_path: Path) -> None:
    quantize_torchao(multi_task("bert")).save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="found mtcompress_torchao"):
        make_sparse(tmp_path)


def test_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(MissingExtraError, match=r"hf_mtcompress\[torchao\]"):
        quantize_torchao(stock(False))
