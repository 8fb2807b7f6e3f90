import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from hf_mtcompress.compression.quantization import quantize_bitsandbytes
from hf_mtcompress.errors import ArtifactError, UnsupportedEncoderError
from hf_mtcompress.model.anatomy import encoder_of, find_anatomy
from hf_mtcompress.model.embeddings import QuantizedEmbedding
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.surgery import cut, describe_structure
from hf_mtcompress.tasks import SequenceClassification
from tests import laws
from tests.tiny import FEELING_LABELS, randomize, tiny_config, tiny_encoder, tiny_inputs

bitsandbytes = pytest.importorskip("bitsandbytes")

Bits = Literal[8, 4]
FAMILIES = ["bert", "mpnet", "deberta-v2", "modernbert"]
"""Each of these is quantized in a way of its own: BERT for the many, a head bias, more projections, fused ones."""


def multi_task(family: str) -> MultiTaskModel:
    tasks = [SequenceClassification("mood", labels=FEELING_LABELS, text="text", label="label")]
    model = MultiTaskModel.from_encoder(tiny_encoder(family), tasks).eval()
    cut(model.encoder, laws.UNEVEN_HEADS, {0: range(20), 1: range(32), 2: []})
    model.config.structure = {"main": describe_structure(model.encoder)}
    return model


def stock(uneven: bool, **overrides: int) -> PreTrainedModel:
    model = AutoModelForSequenceClassification.from_config(tiny_config("bert", num_labels=3, **overrides))
    assert isinstance(model, PreTrainedModel)
    randomize(model)
    if uneven:
        cut(encoder_of(model), laws.UNEVEN_HEADS, laws.UNEVEN_NEURONS)
    return model


def logits(model: PreTrainedModel, family: str = "bert") -> Tensor:
    with torch.no_grad():
        outputs = model(**tiny_inputs(family))
    return outputs["logits_mood" if isinstance(model, MultiTaskModel) else "logits"]


def quantized_layers(model: nn.Module) -> list[str]:
    kinds = (bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Linear4bit)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [8, 4])
def test_multi_task_model_reloads_bit_equal(family: str, bits: Bits, tmp_path: Path) -> None:
    """Saved after it has run, as every model is: bitsandbytes loses the order of its scales (see `keep_exact`)."""
    model = multi_task(family)
    quantized = quantize_bitsandbytes(model, bits)
    before = logits(quantized, family)
    quantized.save_pretrained(tmp_path)
    assert torch.equal(logits(quantized, family), before), "saving must not change the model"
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, family), before)
    assert describe_structure(loaded.encoder) == describe_structure(model.encoder)
    stack = find_anatomy(loaded.encoder).stack_name
    assert quantized_layers(loaded) == quantized_layers(quantized) != []
    assert all(name.startswith(f"encoders.main.{stack}.") for name in quantized_layers(loaded))
    # And is near the model it came from.
    assert (before - logits(model, family)).abs().max() < (0.1 if bits == 8 else 2.0) * logits(
        model, family
    ).abs().max()


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_stock_model_reloads(uneven: bool, bits: Bits, tmp_path: Path) -> None:
    """Cut and quantized in one folder; the plain one must not need this package."""
    quantized = quantize_bitsandbytes(stock(uneven, hidden_size=64, intermediate_size=64), bits)
    before = logits(quantized)
    quantized.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert quantized_layers(loaded) == quantized_layers(quantized) != []
    method = loaded.config.quantization_config.quant_method
    assert method == ("bitsandbytes" if not uneven else f"mtcompress_{bits}bit")
    # A plain 4-bit folder is computed in bfloat16 on processors that can.
    torch.testing.assert_close(logits(loaded), before, rtol=0, atol=0.05 if bits == 4 and not uneven else 0)


def test_same_result_with_and_without_gradient() -> None:
    """Packed layers compute in bfloat16 under no_grad and in float32 else: evaluation and training would disagree."""
    quantized = quantize_bitsandbytes(multi_task("bert"), 4)
    torch.testing.assert_close(
        quantized(**tiny_inputs("bert"))["logits_mood"].detach(), logits(quantized), rtol=0, atol=0
    )


@pytest.mark.skipif(
    not bitsandbytes.functional.has_avx512bf16(), reason="needs a processor on which bitsandbytes packs 4-bit layers"
)
def test_why_layers_are_not_packed(tmp_path: Path) -> None:
    """The defect of bitsandbytes that `keep_exact` avoids; when this fails, it is mended and the method can go."""
    # Two blocks of 64 to a row: with one, another order of the scales is the same order.
    stock(False, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["classifier", "pooler"]
    )
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=settings)
    before = logits(model)
    assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path / "saved")
    assert (logits(model) - before).abs().max() > 0.1


def test_heads_and_embeddings_stay_float() -> None:
    quantized = quantize_bitsandbytes(multi_task("bert"), 4)
    heads = list(quantized.get_submodule("heads").parameters())
    assert heads
    assert all(parameter.dtype == torch.float32 for parameter in heads)


def test_sizes_that_do_not_fit_stay_float(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Plain transformers would die on its first forward pass with `N must be divisible by block_n`."""
    with caplog.at_level(logging.WARNING, "hf_mtcompress"):
        quantized = quantize_bitsandbytes(stock(False, hidden_size=64, intermediate_size=96), 4)
    assert "3 linear layers stay float" in caplog.text
    quantized.save_pretrained(tmp_path)
    assert torch.isfinite(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path))).all()


def test_a_single_neuron_stays_float() -> None:
    """The product of 8-bit matrices in torch reads past a single column: other logits at every call."""
    quantized = quantize_bitsandbytes(stock(True), 8)
    assert "bert.encoder.layer.2.output.dense" not in quantized_layers(quantized)
    assert "bert.encoder.layer.2.intermediate.dense" in quantized_layers(quantized)


def test_the_source_is_left_alone() -> None:
    """The float step is still needed: for the next step, and to compare with."""
    model = multi_task("bert")
    before, config = logits(model), model.config.to_dict()
    quantize_bitsandbytes(model, 8)
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config
    assert quantized_layers(model) == []


# ---- bad input ----


def test_quantizing_twice() -> None:
    quantized = quantize_bitsandbytes(multi_task("bert"), 8)
    with pytest.raises(UnsupportedEncoderError, match="quantized already"):
        quantize_bitsandbytes(quantized, 4)


@pytest.mark.parametrize("bits", [8, 4])
def test_saved_again_after_loading(bits: Bits, tmp_path: Path) -> None:
    """What was put together on loading has no way back in transformers 5.24."""
    quantize_bitsandbytes(multi_task("bert"), bits).save_pretrained(tmp_path / "one")
    loaded = AutoModel.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "two")), logits(loaded))


def test_exporting_a_task_of_a_quantized_model() -> None:
    """In 8 bits it would have integers for weights, and answer."""
    quantized = quantize_bitsandbytes(multi_task("bert"), 8)
    assert isinstance(quantized, MultiTaskModel)
    with pytest.raises(UnsupportedEncoderError, match="found quantized ones; keep the multi-task folder"):
        quantized.to_stock("mood")


def test_pruning_after_quantizing() -> None:
    quantized = quantize_bitsandbytes(multi_task("bert"), 8)
    assert isinstance(quantized, MultiTaskModel)
    with pytest.raises(UnsupportedEncoderError, match="prune first, then quantize"):
        cut(quantized.encoder, heads={0: [0]})


def test_other_bits() -> None:
    with pytest.raises(ValueError, match="expected 8 or 4, found 3"):
        quantize_bitsandbytes(multi_task("bert"), 3)  # pyright: ignore[reportArgumentType] - the point of the test


def test_one_task_of_a_quantized_folder(tmp_path: Path) -> None:
    quantize_bitsandbytes(multi_task("bert"), 8).save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="expected float weights to load one task"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("make", [lambda: multi_task("bert"), lambda: multi_task("deberta-v2"), lambda: stock(True)])
@pytest.mark.parametrize(
    ("bits", "options"), [(8, {}), (4, {}), (4, {"quant_type": "fp4", "double_quantization": True})]
)
def test_embeddings_in_few_bits_reload_bit_equal(
    make: Callable[[], PreTrainedModel], bits: Bits, options: dict[str, Any], tmp_path: Path
) -> None:
    model = make()
    encoder = model.encoder if isinstance(model, MultiTaskModel) else encoder_of(model)
    family = encoder.config.model_type
    quantized = quantize_bitsandbytes(model, bits, embeddings=True, **options)
    before = logits(quantized, family)
    quantized.save_pretrained(tmp_path)
    opener = AutoModel if isinstance(model, MultiTaskModel) else AutoModelForSequenceClassification
    loaded = opener.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, family), before)
    tables = [module for module in loaded.modules() if isinstance(module, QuantizedEmbedding)]
    assert len(tables) == 1
    assert tables[0].weight.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert not tables[0].weight.requires_grad
    plain = logits(quantize_bitsandbytes(model, bits, **options), family)
    assert not torch.equal(plain, before)
    assert (plain - before).abs().max() < (0.1 if bits == 8 else 1.0) * plain.abs().max()


def test_shared_embeddings_are_refused() -> None:
    """A head that reads the same weights would read integers."""
    model = AutoModelForMaskedLM.from_config(tiny_config("bert"))
    with pytest.raises(UnsupportedEncoderError, match="shares its weights; leave embeddings out"):
        quantize_bitsandbytes(model, 8, embeddings=True)


def test_options_of_four_bits() -> None:
    model = stock(False)
    with pytest.raises(ValueError, match="quant_type: expected 'nf4' or 'fp4', found 'int4'"):
        quantize_bitsandbytes(model, 4, quant_type="int4")  # type: ignore[arg-type]  # the mistake
    with pytest.raises(ValueError, match="expected them with 4 bits only, found 8"):
        quantize_bitsandbytes(model, 8, double_quantization=True)
