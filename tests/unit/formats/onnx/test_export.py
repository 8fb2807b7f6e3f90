"""The graph answers like the model, and eight bits reach every large table."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper

from hf_mtcompress.errors import ArtifactError
from hf_mtcompress.formats.graph_settings import read_graph_settings
from hf_mtcompress.formats.onnx.export import export_onnx, split_onnx
from hf_mtcompress.formats.onnx.graphs import largest_difference
from hf_mtcompress.formats.onnx.quantize import quantize_onnx
from hf_mtcompress.formats.onnx.session import open_session, run_session
from hf_mtcompress.formats.predictor import load_predictor
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.sizes import count_parameters
from hf_mtcompress.records.forms import ONNX_MODEL, ONNX_SETTINGS
from hf_mtcompress.tasks import SequenceClassification
from tests.tiny import (
    FAMILIES,
    IMAGE_FAMILIES,
    randomize,
    tiny_encoder,
    tiny_image_processor,
    tiny_inputs,
    tiny_tokenizer,
)
from tests.unit.formats.artefacts import Saved, saved_images, saved_text


@pytest.fixture(params=[saved_text, saved_images], ids=["text", "images"])
def saved(request: pytest.FixtureRequest) -> Saved:
    return request.param()


def test_graph_equals_model(saved: Saved):
    """A constant-folded mask or a baked-in batch size answers right on the traced shape only."""
    found = load_predictor(saved.folders["onnx"], threads=1).logits(saved.inputs)
    expected = saved.logits()
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-5)


def test_outputs_are_the_logits_only(saved: Saved):
    """Hidden states as outputs would be computed and copied on every call."""
    graph = onnx.load(saved.folders["onnx"] / ONNX_MODEL, load_external_data=False).graph
    assert [output.name for output in graph.output] == [f"logits_{name}" for name in saved.model.tasks]
    assert [item.name for item in graph.input] == read_graph_settings(saved.folders["onnx"]).inputs


def test_plain_onnx_runtime_is_enough(saved: Saved):
    """A graph that needs our session settings, or a data file beside it, is of no use to anybody else."""
    data = (saved.folders["onnx"] / ONNX_MODEL).read_bytes()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    found = run_session(session, saved.inputs)
    assert largest_difference(found, {f"logits_{n}": a for n, a in saved.logits().items()}) < 1e-4
    domains = {node.domain for node in onnx.load_from_string(data).graph.node}
    assert domains <= {"", "ai.onnx"}


def test_no_paths_of_this_machine(saved: Saved):
    """The exporter notes a stack trace at every operator, which an upload would publish."""
    for form in ("onnx", "int8"):
        data = (saved.folders[form] / ONNX_MODEL).read_bytes()
        assert b"site-packages" not in data
        assert b"hf_mtcompress" not in data
        assert str(Path(__file__).parents[3]).encode() not in data


def test_free_dimensions_have_names(saved: Saved):
    """A fixed batch or length would only show when somebody uses another one."""
    graph = onnx.load(saved.folders["onnx"] / ONNX_MODEL, load_external_data=False).graph
    for item in [*graph.input, *graph.output]:
        dimensions = [size.dim_param or size.dim_value for size in item.type.tensor_type.shape.dim]
        assert dimensions[0] == "batch", item.name
        if item.name in ("input_ids", "attention_mask", "token_type_ids", "logits_tags"):
            assert dimensions[1] == "tokens", item.name


def test_int8_is_close_and_small(saved: Saved):
    """A saturated or per-tensor weight would move logits by their own size; a float table would hide in the file."""
    folder = saved.folders["int8"]
    found = load_predictor(folder, threads=1).logits(saved.inputs)
    for name, array in saved.logits().items():
        assert np.abs(found[name] - array).max() < 0.15 * max(1.0, np.abs(array).max()), name
    floats = [
        item.name
        for item in onnx.load(folder / ONNX_MODEL).graph.initializer
        if item.data_type == TensorProto.FLOAT and numpy_helper.to_array(item).size > 32 * 32
    ]
    # What may stay in float: the patch convolution, which has no fast integer kernel. Here it is 32 * 3 * 8 * 8.
    assert all("patch" in name for name in floats), floats
    settings, source = read_graph_settings(folder), read_graph_settings(saved.folders["onnx"])
    assert settings.precision == "int8"
    assert source.precision == "float32"
    assert settings.tasks == source.tasks
    if source.embedding_bytes is not None:
        assert source.embedding_bytes == settings.parameters["embedding"] * 4
        assert settings.embedding_bytes == settings.parameters["embedding"]


def test_position_and_type_tables_are_in_eight_bits_too():
    """The quantizer takes whatever a Gather reads; a position table read by a Slice would stay in float unseen."""
    graph = onnx.load(saved_text().folders["int8"] / ONNX_MODEL).graph
    tables = {
        item.name: item.data_type
        for item in graph.initializer
        if "embeddings" in item.name and len(item.dims) == 2 and item.data_type != TensorProto.INT64
    }
    kinds = {kind for kind in ("word", "position", "token_type") if any(kind in name for name in tables)}
    assert kinds == {"word", "position", "token_type"}
    assert set(tables.values()) <= {TensorProto.INT8, TensorProto.UINT8}


def test_heads_stay_in_float():
    """A regression feels the rounding of its last layer most, and it costs next to nothing."""
    graph = onnx.load(saved_text().folders["int8"] / ONNX_MODEL).graph
    shapes = [
        tuple(sorted(item.dims))
        for item in graph.initializer
        if item.data_type == TensorProto.FLOAT and len(item.dims) == 2
    ]
    assert {(1, 32), (2, 32), (3, 32), (4, 32)} <= set(shapes)


def test_the_model_is_left_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Export that leaves a model in eval mode would switch dropout off for the rest of a training."""
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), [SequenceClassification("mood", labels=["a", "b"])])
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_onnx(model, tiny_tokenizer(), tmp_path)
    assert model.training
    assert model.encoder.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    output = capfd.readouterr()
    assert output.out == ""
    assert "torch.onnx" not in output.err


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_exports(family: str, tmp_path: Path):
    """A kernel or mask that one family alone has may trace wrongly."""
    image = family in IMAGE_FAMILIES
    processor = tiny_image_processor(family) if image else tiny_tokenizer(family)
    task = SequenceClassification("mood", labels=["a", "b", "c"], head="linear")
    model = randomize(MultiTaskModel.from_encoder(tiny_encoder(family), [task]))
    assert isinstance(model, MultiTaskModel)
    export_onnx(model, processor, tmp_path / "onnx")
    quantize_onnx(tmp_path / "onnx", tmp_path / "int8")
    sample = tiny_inputs(family, batch=4, length=12)
    with torch.no_grad():
        expected = model(**sample).logits_mood.numpy()
    feed = {name: value.numpy() for name, value in sample.items()}
    found = run_session(open_session(tmp_path / "onnx" / ONNX_MODEL, 1), feed)["logits_mood"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    rounded = run_session(open_session(tmp_path / "int8" / ONNX_MODEL, 1), feed)["logits_mood"]
    assert np.abs(rounded - expected).max() < 0.15 * max(1.0, np.abs(expected).max())


def test_a_graph_for_each_task(saved: Saved, tmp_path: Path):
    """A head too many would be computed for nothing; one that is cut out with something it needs would not open."""
    folders = split_onnx(saved.folders["onnx"], tmp_path, saved.model)
    assert list(folders) == list(saved.model.tasks)
    whole = read_graph_settings(saved.folders["onnx"])
    for name, folder in folders.items():
        predictor = load_predictor(folder, threads=1)
        assert list(predictor.tasks) == [name]
        found = predictor.logits(saved.inputs)[name]
        np.testing.assert_allclose(found, saved.logits()[name], rtol=1e-4, atol=1e-5)
        assert list(predictor.predict(saved.samples[:2])[0]) == [name]
        alone = read_graph_settings(folder)
        head = saved.model.heads[saved.model.tasks[name].head_name]
        assert alone.parameters["head"] == sum(parameter.numel() for parameter in head.parameters())
        assert alone.parameters["encoder"] <= whole.parameters["encoder"]
        floats = alone.stored_bytes["float"] / 4
        assert floats == pytest.approx(alone.parameters["encoder"] + alone.parameters["head"], rel=0.01)
        assert [item.name for item in folder.iterdir() if item.suffix == ".data"] == []


def test_largest_difference_is_relative_and_strict():
    """Not-a-number compares false with everything, so a careless check would let it pass."""
    assert largest_difference({"a": np.array([2.0, 4.0])}, {"a": np.array([2.0, 5.0])}) == pytest.approx(0.2)
    assert largest_difference({"a": np.array([np.nan])}, {"a": np.array([1.0])}) == float("inf")
    assert largest_difference({}, {"a": np.array([1.0])}) == float("inf")
    assert largest_difference({"a": np.zeros(2)}, {"a": np.zeros(3)}) == float("inf")


def test_parameters_are_counted_by_part():
    """The embedding is part of the encoder; counting it twice would make a small model look larger."""
    model = saved_text().model
    parts = count_parameters(model)
    assert parts["encoder"] + parts["head"] == sum(parameter.numel() for parameter in model.parameters())
    assert parts["embedding"] == 160 * 32


def test_what_cannot_be_quantized_is_refused(tmp_path: Path):
    """Quantizing twice, or something that is no graph, would write a folder that only fails later."""
    saved = saved_text()
    with pytest.raises(ArtifactError, match="expected a float32 graph"):
        quantize_onnx(saved.folders["int8"], tmp_path / "twice")
    with pytest.raises(ArtifactError, match=ONNX_SETTINGS):
        quantize_onnx(saved.folders["torch"], tmp_path / "torch")
    broken = tmp_path / "broken"
    shutil.copytree(saved.folders["onnx"], broken)
    (broken / ONNX_SETTINGS).write_text("{}")
    with pytest.raises(ArtifactError, match="format_version"):
        quantize_onnx(broken, tmp_path / "out")
