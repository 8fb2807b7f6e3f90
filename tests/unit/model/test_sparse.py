"""Folders whose matrices are stored without their zeros."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from hf_mtcompress.compression.quantization import quantize_bitsandbytes
from hf_mtcompress.compression.sparsity import trim_weights
from hf_mtcompress.errors import ArtifactError
from hf_mtcompress.evaluation.benchmark import measure_size
from hf_mtcompress.formats.folders import folder_form
from hf_mtcompress.model.anatomy import encoder_of
from hf_mtcompress.model.marking import StructureConfig, read_mark
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.sparse import make_sparse, pack, save_sparse, unpack
from hf_mtcompress.model.surgery import cut
from hf_mtcompress.tasks import SequenceClassification
from tests import laws
from tests.tiny import (
    FAMILIES,
    FEELING_LABELS,
    TEXT_FAMILIES,
    randomize,
    tiny_config,
    tiny_encoder,
    tiny_tokenizer,
)


def classifier(family: str = "bert", uneven: bool = False) -> PreTrainedModel:
    model = AutoModelForSequenceClassification.from_config(tiny_config(family, num_labels=3))
    assert isinstance(model, PreTrainedModel)
    randomize(model)
    if uneven:
        cut(encoder_of(model), laws.UNEVEN_HEADS, laws.UNEVEN_NEURONS)
    return model


def equal(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_packing_keeps_every_bit(dtype: torch.dtype) -> None:
    """Also of numbers that are odd: a negative zero counts as a value, and sizes need not fill bytes."""
    torch.manual_seed(0)
    for shape in ((3, 5), (8, 8), (1, 1), (0, 4)):
        matrix = torch.randn(shape, dtype=dtype)
        matrix[matrix < 0.3] = 0.0
        if matrix.numel() > 8:
            matrix[0, 0], matrix[0, 1], matrix[0, 2] = -0.0, float("nan"), float("inf")
        values, mask = pack(matrix)
        found = unpack(values, mask, matrix.shape)
        assert found.dtype == dtype
        integers = torch.int16 if dtype == torch.bfloat16 else torch.int64 if dtype == torch.float64 else torch.int32
        assert torch.equal(found.view(integers), matrix.view(integers))


def test_one_bit_a_place() -> None:
    values, mask = pack(torch.tensor([[0.0, 1.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 3.0]]))
    assert values.tolist() == [1.0, 2.0, 3.0]
    assert mask.tolist() == [0b1010, 0b1]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_loaded_as_it_was(family: str, tmp_path: Path) -> None:
    """Names of weights are mapped while a model loads, for some families; a lost matrix would be random."""
    encoder = tiny_encoder(family)
    trim_weights(encoder, sparsity=0.75, embeddings=family in TEXT_FAMILIES)
    sizes = save_sparse(encoder, tmp_path / "sparse")
    encoder.save_pretrained(tmp_path / "dense")
    on_disk = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("dense", "sparse")]
    assert on_disk == [sizes.dense, sizes.sparse]
    assert sizes.sparse < 0.7 * sizes.dense
    loaded, info = AutoModel.from_pretrained(tmp_path / "sparse", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert equal(loaded, encoder)
    # Saved in the ordinary way it is a dense folder again, the same file as if it had never been sparse.
    loaded.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("dense", "again")]
    assert files[0] == files[1]


def test_an_uneven_classifier(tmp_path: Path) -> None:
    """Structure and zeros are in one folder; loaded, it keeps the structure, trains, and is measured right."""
    model = classifier(uneven=True)
    trim_weights(model, sparsity=0.8)
    save_sparse(model, tmp_path / "sparse")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sparse")
    assert equal(loaded, model)
    mark, expected = read_mark(loaded.config), read_mark(model.config)
    assert mark is not None
    assert expected is not None
    assert mark.structure == expected.structure
    assert mark.to_dict() == StructureConfig(expected.structure).to_dict()
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, dataloader_pin_memory=False)
    Trainer(model=loaded, args=arguments)
    loaded.save_pretrained(tmp_path / "again")
    assert equal(AutoModelForSequenceClassification.from_pretrained(tmp_path / "again"), model)


def test_a_multi_task_folder(tmp_path: Path) -> None:
    """It counts as a torch folder, its parameters and word embedding are counted right, and one task loads alone."""
    task = SequenceClassification("mood", labels=FEELING_LABELS, text="text", label="label")
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), [task], max_length=32)
    trim_weights(model, sparsity=0.9, embeddings=True)
    for name in ("dense", "sparse"):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    sizes = make_sparse(tmp_path / "sparse")
    # Doing it again changes nothing.
    assert make_sparse(tmp_path / "sparse").sparse == sizes.sparse
    assert folder_form(tmp_path / "sparse") == "torch"
    assert equal(AutoModel.from_pretrained(tmp_path / "sparse"), model)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sparse", task="mood")
    assert equal(stock, model.to_stock("mood"))
    dense, sparse = (measure_size(tmp_path / name) for name in ("dense", "sparse"))
    assert (sparse.parameters, sparse.weights_bytes) == (dense.parameters, sizes.sparse)
    words = model.encoder.get_input_embeddings().weight
    assert dense.embedding_bytes == words.numel() * 4
    assert sparse.embedding_bytes == int(words.count_nonzero()) * 4 + words.numel() // 8


def test_several_files(tmp_path: Path) -> None:
    """A large model is saved in shards with an index, which names the tensors of each."""
    encoder = tiny_encoder("bert")
    trim_weights(encoder, sparsity=0.8)
    encoder.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    sizes = make_sparse(tmp_path)
    assert sizes.sparse < sizes.dense
    assert equal(AutoModel.from_pretrained(tmp_path), encoder)


def test_nothing_to_gain(tmp_path: Path) -> None:
    """A model without zeros stays the ordinary folder that it was."""
    encoder = tiny_encoder("bert")
    encoder.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    sizes = make_sparse(tmp_path)
    assert (sizes.matrices, sizes.sparse) == (0, sizes.dense)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_half_precision_on_loading(tmp_path: Path) -> None:
    """Values are cast, the bits of the mask are not numbers to cast."""
    encoder = tiny_encoder("bert")
    trim_weights(encoder, sparsity=0.6)
    save_sparse(encoder, tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert equal(loaded, encoder.to(torch.bfloat16))  # type: ignore[arg-type]  # a stub of `to` that takes devices only


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"expected a saved model with config\.json and safetensors"):
        make_sparse(tmp_path)
    task = SequenceClassification("mood", labels=FEELING_LABELS, text="text", label="label")
    quantized = quantize_bitsandbytes(MultiTaskModel.from_encoder(tiny_encoder("bert"), [task]), 8)
    with pytest.raises(ArtifactError, match="expected float weights to store without zeros, found mtcompress_8bit"):
        save_sparse(quantized, tmp_path / "quantized")
    encoder = tiny_encoder("bert")
    trim_weights(encoder, sparsity=0.6)
    save_sparse(encoder, tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    tensors: dict[str, Any] = {key: value.clone() for key, value in load_file(file).items()}
    name = next(key for key in tensors if key.endswith("_values"))
    save_file({**tensors, name: tensors[name][:-1].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError):
        AutoModel.from_pretrained(tmp_path / "damaged")
