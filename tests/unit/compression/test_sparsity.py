"""Trimming of single weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedModel

from hf_mtcompress.compression.quantization import quantize_bitsandbytes
from hf_mtcompress.compression.sparsity import trim_weights
from hf_mtcompress.errors import UnsupportedEncoderError
from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.model.matrices import encoder_matrices
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.sparse import save_sparse
from hf_mtcompress.model.surgery import cut
from hf_mtcompress.tasks import SequenceClassification
from tests import laws
from tests.tiny import (
    FAMILIES,
    FEELING_LABELS,
    IMAGE_FAMILIES,
    LAYERS,
    randomize,
    tiny_config,
    tiny_encoder,
    tiny_inputs,
)


def matrices(model: PreTrainedModel, **options: Any) -> dict[str, torch.Tensor]:
    return {name: matrix.detach().clone() for name, matrix in encoder_matrices(model, **options).items()}


def multi_task(**settings: Any) -> MultiTaskModel:
    torch.manual_seed(0)
    names = ("mood", "tone")
    tasks = [SequenceClassification(name, labels=FEELING_LABELS, text="text", label="label") for name in names]
    return MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks, max_length=32, **settings).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_trimming_nothing_is_the_identity(family: str) -> None:
    """Otherwise a search over sparsities starts from another model."""
    encoder = tiny_encoder(family)
    before = copy.deepcopy(encoder.state_dict())
    report = trim_weights(encoder, sparsity=0.0)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert (report.zeros_after, report.sparsity, report.threshold) == (0, 0.0, 0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_smallest_weights_of_all_go(family: str) -> None:
    """What is 0 is smaller than what is left; the number is right to one weight; nothing else changes."""
    encoder = tiny_encoder(family)
    before, others = matrices(encoder), copy.deepcopy(encoder.state_dict())
    report = trim_weights(encoder, sparsity=0.37)
    after = matrices(encoder)
    total = sum(matrix.numel() for matrix in after.values())
    assert len(after) % LAYERS == 0
    assert report.zeros_after == round(0.37 * total) == sum(int((matrix == 0).sum()) for matrix in after.values())
    gone = max(float(before[name][after[name] == 0].abs().max()) for name in after if bool((after[name] == 0).any()))
    left = min(float(matrix[matrix != 0].abs().min()) for matrix in after.values())
    assert report.threshold == gone <= left
    for name, value in encoder.state_dict().items():
        assert (
            torch.equal(value[value != 0], others[name][value != 0])
            if name in after
            else torch.equal(value, others[name])
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_by_itself(family: str) -> None:
    """With one ranking, a matrix of large weights keeps all of them; here every one loses the same share."""
    encoder = tiny_encoder(family)
    with torch.no_grad():
        next(iter(encoder_matrices(encoder).values())).mul_(100.0)
    together = copy.deepcopy(encoder)
    uneven = list(trim_weights(together, sparsity=0.5).matrices.values())
    report = trim_weights(encoder, sparsity=0.5, scope="layer")
    assert uneven[0]["sparsity"] < 0.05
    for name, matrix in matrices(encoder).items():
        assert int((matrix == 0).sum()) == round(0.5 * matrix.numel()) == report.matrices[name]["zeros"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pattern", ["2:4", "1:8"])
def test_a_pattern_holds_in_every_group(family: str, pattern: str) -> None:
    """Groups lie along the input dimension: of columns, kernels would read something else."""
    kept, size = map(int, pattern.split(":"))
    encoder = tiny_encoder(family)
    before = matrices(encoder)
    report = trim_weights(encoder, pattern=pattern)
    for name, matrix in matrices(encoder).items():
        for row, old in zip(matrix[:3], before[name][:3], strict=True):
            for group, was in zip(row.split(size), old.split(size), strict=True):
                assert int((group != 0).sum()) == kept
                assert set(group[group != 0].abs().tolist()) == set(was.abs().sort().values[-kept:].tolist())
        assert int((matrix == 0).sum()) * size == matrix.numel() * (size - kept)
    assert report.sparsity == 1 - kept / size
    # Trimming again finds nothing to do.
    again = matrices(encoder)
    trim_weights(encoder, pattern=pattern)
    assert all(torch.equal(matrix, again[name]) for name, matrix in matrices(encoder).items())


def test_thresholds() -> None:
    """One number for all, or so many standard deviations of each matrix."""
    for scope in ("global", "layer"):
        encoder = tiny_encoder("bert")
        before = matrices(encoder)
        report = trim_weights(encoder, threshold=0.15, scope=scope)  # type: ignore[arg-type]  # one of the two words
        for name, matrix in matrices(encoder).items():
            limit = 0.15 if scope == "global" else 0.15 * float(before[name].std())
            assert torch.equal(matrix == 0, before[name].abs() < limit)
            assert report.matrices[name]["threshold"] == pytest.approx(limit)
        assert report.threshold == (0.15 if scope == "global" else None)


def test_equal_magnitudes_and_zeros_that_are_there() -> None:
    """Of equal weights the first ones go, and zeros count: the sparsity is met to one weight and then stays."""
    encoder = tiny_encoder("bert")
    with torch.no_grad():
        for matrix in encoder_matrices(encoder).values():
            matrix.copy_(matrix.sign())
    report = trim_weights(encoder, sparsity=0.25)
    assert report.zeros_after == round(0.25 * report.weights)
    before = matrices(encoder)
    assert trim_weights(encoder, sparsity=0.25).zeros_before == report.zeros_after
    assert all(torch.equal(matrix, before[name]) for name, matrix in matrices(encoder).items())
    assert trim_weights(encoder, sparsity=0.1).zeros_after == report.zeros_after
    # Zeros have no sign: a product with a mask would leave some with one.
    assert not any(bool(torch.signbit(matrix[matrix == 0]).any()) for matrix in before.values())


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    """The weight is one, is trimmed once, and is stored once."""
    model = AutoModelForMaskedLM.from_config(tiny_config("bert"))
    assert isinstance(model, PreTrainedModel)
    randomize(model)
    report = trim_weights(model, sparsity=0.8, embeddings=True)
    assert "bert.embeddings.word_embeddings.weight" in report.matrices
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    save_sparse(model, tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    with torch.no_grad():
        assert torch.equal(loaded(**tiny_inputs("bert")).logits, model(**tiny_inputs("bert")).logits)


@pytest.mark.parametrize("layers", [1, None])
def test_branches_are_trimmed_too(layers: int | None) -> None:
    """Otherwise tasks of a branch would keep what the record says was trimmed."""
    model = multi_task(branches={"own": ["tone"]}, branch_layers=layers)
    plain = len(encoder_matrices(multi_task()))
    assert len(encoder_matrices(model)) == plain + plain // LAYERS * (layers or LAYERS)
    assert trim_weights(model, sparsity=0.5).sparsity == 0.5


def test_trim_save_load_trim_again(tmp_path: Path) -> None:
    """A second trimming must find the zeros of the first, through cuts and either way of saving."""
    encoder = tiny_encoder("bert")
    trim_weights(encoder, sparsity=0.3)
    cut(encoder, laws.UNEVEN_HEADS, laws.UNEVEN_NEURONS)
    for step, sparsity in enumerate((0.5, 0.7)):
        place = tmp_path / str(step)
        save_sparse(encoder, place) if step else encoder.save_pretrained(place)
        loaded = AutoModel.from_pretrained(place)
        reports = [trim_weights(model, sparsity=sparsity) for model in (encoder, loaded)]
        assert reports[0].zeros_before == reports[1].zeros_before > 0
        assert all(torch.equal(one, matrices(loaded)[name]) for name, one in matrices(encoder).items())
    # Cutting what was trimmed keeps zeros where the rest is.
    cut(encoder, laws.AGAIN_HEADS, {})
    assert find_anatomy(encoder).layers[0].attention.heads == 1
    assert float((torch.cat([m.flatten() for m in matrices(encoder).values()]) == 0).float().mean()) > 0.5


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_of_fewer_bits_keep_their_zeros(bits: Any) -> None:
    """Both formats have a 0; a model that is quantized already is refused."""
    model = multi_task()
    trim_weights(model, sparsity=0.5)
    quantized = quantize_bitsandbytes(model, bits)
    import bitsandbytes

    for name, matrix in matrices(model).items():
        layer = quantized.get_submodule(name.removesuffix(".weight"))
        weight: Any = layer.weight
        values = weight.data if bits == 8 else bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert not bool(values[matrix == 0].any()), name
    with pytest.raises(UnsupportedEncoderError, match="expected float weights, found a model that is quantized"):
        trim_weights(quantized, sparsity=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected one of sparsity, threshold and pattern, found none of them; keep one"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "found sparsity and pattern; keep one"),
        ({"sparsity": 1.0}, "sparsity: expected a fraction of at least 0 and below 1, found 1.0"),
        ({"sparsity": float("nan")}, "sparsity: expected a fraction of at least 0 and below 1, found nan"),
        ({"threshold": -0.1}, "threshold: expected a finite magnitude of at least 0, found -0.1"),
        ({"pattern": "4:2"}, "pattern: expected N:M, .* such as 2:4, found '4:2'"),
        ({"pattern": "2-4"}, "pattern: expected N:M, .* such as 2:4, found '2-4'"),
        ({"pattern": "2:4", "scope": "layer"}, "scope: a pattern holds in every group"),
        ({"sparsity": 0.5, "scope": "row"}, "scope: expected 'global' or 'layer', found 'row'"),
        ({"pattern": "2:5"}, "pattern 2:5: expected rows of a multiple of 5 weights, found 32 in .* more matrices"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    encoder = tiny_encoder("bert")
    before = matrices(encoder)
    with pytest.raises(ValueError, match=message):
        trim_weights(encoder, **options)
    assert all(torch.equal(matrix, before[name]) for name, matrix in matrices(encoder).items())


def test_what_cannot_be_trimmed() -> None:
    with pytest.raises(UnsupportedEncoderError, match="expected a word embedding, found none"):
        trim_weights(tiny_encoder(IMAGE_FAMILIES[0]), sparsity=0.5, embeddings=True)
    adapted = multi_task()
    adapted.add_adapters()
    with pytest.raises(UnsupportedEncoderError, match="without adapters for trimming weights"):
        trim_weights(adapted, sparsity=0.5)
