"""Fewer bits: as small as promised, close to the float graph, and the same in every process."""

import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from hf_mtcompress.compression.pruning import cut
from hf_mtcompress.errors import ArtifactError, RecipeError
from hf_mtcompress.formats.graph_settings import read_graph_settings, write_graph_settings
from hf_mtcompress.formats.onnx.export import export_onnx, split_onnx
from hf_mtcompress.formats.onnx.graphs import largest_difference, run_graph
from hf_mtcompress.formats.onnx.mixed_bits import quantize_mixed
from hf_mtcompress.formats.onnx.quantize import HALF_TOLERANCE, Calibration, quantize_onnx
from hf_mtcompress.formats.predictor import load_predictor
from hf_mtcompress.formats.reload.check import ReloadCheck, check_reload
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.records.forms import ONNX_MODEL
from hf_mtcompress.tasks import ImageClassification, SequenceClassification
from tests.tiny import FAMILIES, IMAGE_FAMILIES, randomize, tiny_encoder, tiny_image_processor, tiny_inputs
from tests.tiny import tiny_tokenizer as tokenizer_of
from tests.unit.formats.artefacts import Saved, moved_by_company, saved_images, saved_text

FORMS = {
    "half": {"bits": 16},
    "int8": {"bits": 8},
    "int4": {"bits": 4, "block_size": 16},
    "int4, tables in 8": {"bits": 4, "block_size": 32, "embedding_bits": 8},
    "int8, tables in 4": {"bits": 8, "block_size": 32, "embedding_bits": 4},
    "static": {"bits": 8},
}
TOLERANCES = {
    "half": 0.002,
    "int8": 0.15,
    "int4": 0.5,
    "int4, tables in 8": 0.5,
    "int8, tables in 4": 0.5,
    "static": 0.35,
}
"""As a fraction of the largest logit, or of 1, on random weights; trained ones are nearer."""


@pytest.fixture(params=[saved_text, saved_images], ids=["text", "images"])
def saved(request: pytest.FixtureRequest) -> Saved:
    return request.param()


def rows_of(inputs: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Each row by itself and without padding."""
    count = len(next(iter(inputs.values())))
    lengths = inputs["attention_mask"].sum(axis=1) if "attention_mask" in inputs else [None] * count
    return [{name: array[row : row + 1, : lengths[row]] for name, array in inputs.items()} for row in range(count)]


_ROUNDED_ACTIVATIONS = 0.1
"""The same where weights are exact."""


def distance(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """Largest difference of any output, as a fraction of its largest number, or of 1."""
    assert list(found) == list(expected)
    return max(np.abs(found[name] - array).max() / max(1.0, np.abs(array).max()) for name, array in expected.items())


def on_grid(model: torch.nn.Module) -> None:
    """Give every matrix weights that 4 bits hold exactly, so that what is left is no rounding of weights."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                values = torch.randint(-8, 8, parameter.shape, generator=generator)
                values[:, ::16], values[:, 1::16] = -8, 7  # both ends in every block
                parameter.copy_(0.03 * values)


def quantize(source: Path, folder: Path, form: str, inputs: dict[str, np.ndarray]) -> Path:
    calibration = Calibration(rows_of(inputs)) if form == "static" else None
    return quantize_onnx(source, folder, calibration=calibration, **FORMS[form])  # type: ignore[arg-type]  # keywords by name


@cache
def made(images: bool, form: str) -> Path:
    """A form of the tiny text or image model, made once."""
    saved = saved_images() if images else saved_text()
    return quantize(saved.folders["onnx"], Path(mkdtemp()) / "made", form, saved.inputs)


def form_of(saved: Saved, form: str) -> Path:
    return made("pixel_values" in saved.inputs, form)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "int8"])
def test_answers_are_close(saved: Saved, form: str):
    """A scale along the wrong axis, or a block that begins in the middle of a row, moves logits by their own size."""
    found = load_predictor(form_of(saved, form), threads=1).logits(saved.inputs)
    assert list(found) == list(saved.model.tasks)
    assert distance(found, saved.logits()) <= TOLERANCES[form]


@pytest.mark.parametrize("form", ["int8", "static", "half", "int4"])
def test_only_dynamic_ranges_make_an_answer_depend_on_its_company(form: str):
    """Of 600 sentences, 10 got another label alone than among 32; the docs offer the other forms as a way out."""
    saved = saved_text()
    moved = moved_by_company(form_of(saved, form), saved.inputs)
    assert moved > 1e-3 if form == "int8" else moved == 0


def test_predict_runs_on_fewer_bits(saved: Saved):
    """Batches of another size and length than the probe's."""
    answers = load_predictor(form_of(saved, "int4"), threads=1).predict(saved.samples[:1])
    assert list(answers[0]) == list(saved.model.tasks)


def test_half_is_half_and_plain_onnx(saved: Saved):
    """A matrix that stays in float would hide in the file; an operator of ONNX Runtime's own would tie it to that."""
    folder = form_of(saved, "half")
    model = onnx.load(folder / ONNX_MODEL)
    large = {item.data_type for item in model.graph.initializer if len(item.dims) > 1}
    assert TensorProto.FLOAT not in large
    assert TensorProto.FLOAT16 in large
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    onnx.checker.check_model(model, full_check=True)
    settings, source = read_graph_settings(folder), read_graph_settings(saved.folders["onnx"])
    assert settings.precision == "float16"
    if source.embedding_bytes is not None:
        assert settings.embedding_bytes == source.embedding_bytes // 2


def test_numbers_too_large_for_half_stay_in_float(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Infinity in a weight would make every answer not-a-number, or, worse, only some."""
    saved = saved_text()
    source = tmp_path / "source"
    source.mkdir()
    for file in saved.folders["onnx"].iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    model = onnx.load(source / ONNX_MODEL)
    table = next(item for item in model.graph.initializer if "position_embeddings" in item.name)
    values = onnx.numpy_helper.to_array(table).copy()
    values[-1, 0] = 1e6  # a place that no text here reaches
    table.CopyFrom(onnx.numpy_helper.from_array(values, table.name))
    onnx.save(model, source / ONNX_MODEL)
    write_graph_settings(source, read_graph_settings(source))  # another graph has another digest
    with caplog.at_level(logging.WARNING):
        quantize_onnx(source, tmp_path / "half", 16)
    assert "too large for half precision" in caplog.text
    found = run_graph(tmp_path / "half" / ONNX_MODEL, saved.inputs)
    assert largest_difference(found, run_graph(source / ONNX_MODEL, saved.inputs)) <= HALF_TOLERANCE


def test_four_bits_are_four_bits():
    """4 + 36 / block_size bits a weight are promised, 24 in tables; only the heads' last layers are float."""
    saved = saved_text()
    folder = made(images=False, form="int4")
    settings = read_graph_settings(folder)
    assert settings.precision == "int4"
    assert settings.quantization == {"block_size": 16, "embedding_bits": 4}
    assert settings.embedding_bytes == settings.parameters["embedding"] * (4 + 24 / 16) / 8
    graph = onnx.load(folder / ONNX_MODEL).graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(products) >= 3 * 4
    floats = {item.name: tuple(item.dims) for item in graph.initializer if item.data_type == TensorProto.FLOAT}
    weights = {name: dims for name, dims in floats.items() if len(dims) == 2 and "scale" not in name}
    assert {min(dims) for dims in weights.values()} <= {1, 2, 3, 4}
    assert saved.folders["int8"].joinpath(ONNX_MODEL).stat().st_size * 2 > (folder / ONNX_MODEL).stat().st_size


def test_eight_bits_with_tables_in_four():
    """As fast as 8 bits: products must be theirs, and only look-ups be in blocks."""
    settings = read_graph_settings(made(images=False, form="int8, tables in 4"))
    assert settings.precision == "int8"
    assert settings.quantization == {"block_size": 32, "embedding_bits": 4}
    assert settings.embedding_bytes == settings.parameters["embedding"] * (4 + 24 / 32) / 8
    kinds, plain = (
        [node.op_type for node in onnx.load(made(images=False, form=form) / ONNX_MODEL).graph.node]
        for form in ("int8, tables in 4", "int8")
    )
    assert "MatMulNBits" not in kinds
    assert kinds.count("BitShift") == 2  # words and positions, which are as many here; not types of tokens
    assert kinds.count("MatMulInteger") == plain.count("MatMulInteger") > 0


def test_widths_that_would_waste_their_block_take_eight_bits(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Padded from 32 to 128, a matrix in 4 bits is twice as large as in 8; nobody would look."""
    saved = saved_text()
    with caplog.at_level(logging.WARNING):
        quantize_onnx(saved.folders["onnx"], tmp_path, 4, block_size=128)
    assert "are in 8 bits, since a width of 32 in blocks of 128 would take more" in caplog.text
    exceptions = read_graph_settings(tmp_path).quantization["exceptions"]
    assert any("width of 32" in reason for reason in exceptions)
    found = load_predictor(tmp_path, threads=1).logits(saved.inputs)
    assert distance(found, saved.logits()) <= TOLERANCES["int4"]


def test_a_table_of_odd_width_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Eight bits where four were asked for must not go unsaid."""
    encoder = tiny_encoder("bert", hidden_size=15, num_attention_heads=3)
    model = MultiTaskModel.from_encoder(encoder, [SequenceClassification("mood", labels=["bad", "good"])])
    export_onnx(model, tokenizer_of(), tmp_path / "onnx")
    with caplog.at_level(logging.WARNING):
        quantize_onnx(tmp_path / "onnx", tmp_path / "few", embedding_bits=4)
    reason = "are in 8 bits, since a row of 15 numbers does not fill its bytes in 4"
    assert reason in caplog.text
    assert reason in read_graph_settings(tmp_path / "few").quantization["exceptions"]


def test_the_log_of_the_process_is_left_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """The quantizer sets up logging when it is imported, and prints what it counts."""
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    saved = saved_text()
    quantize(saved.folders["onnx"], tmp_path / "four", "int4", saved.inputs)
    quantize(saved.folders["onnx"], tmp_path / "static", "static", saved.inputs)
    assert (root.level, list(root.handlers)) == before
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err == ""


@pytest.mark.parametrize("form", ["int8", "int4", "static"])
def test_chosen_layers_stay_in_float(form: str, tmp_path: Path):
    """Query, key and value are fused into a new matrix, which has lost the name of its layer."""
    saved = saved_text()
    calibration = Calibration(rows_of(saved.inputs)) if form == "static" else None
    options: dict = FORMS[form]
    quantize_onnx(saved.folders["onnx"], tmp_path, calibration=calibration, float_layers=[0, 2], **options)
    graph = onnx.load(tmp_path / ONNX_MODEL).graph
    floats = [tuple(item.dims) for item in graph.initializer if item.data_type == TensorProto.FLOAT]
    assert sorted(dims for dims in floats if len(dims) == 2 and min(dims) >= 32) == sorted(
        2 * [(32, 96), (32, 32), (32, 64), (64, 32)]
    )
    assert read_graph_settings(tmp_path).quantization["float_layers"] == [0, 2]


@pytest.mark.parametrize("method", ["entropy", "minmax"])
def test_every_way_to_calibrate(method: str, tmp_path: Path):
    """Texts of unequal length do not stack, which stops the calibrator where rows are handed over at once."""
    saved = saved_text()
    calibration = Calibration(rows_of(saved.inputs), method)  # type: ignore[arg-type]  # one of the three words
    quantize_onnx(saved.folders["onnx"], tmp_path, calibration=calibration)
    found = load_predictor(tmp_path, threads=1).logits(saved.inputs)
    assert distance(found, saved.logits()) <= TOLERANCES["static"]
    kinds = [node.op_type for node in onnx.load(tmp_path / ONNX_MODEL).graph.node]
    assert "DynamicQuantizeLinear" not in kinds
    assert "QuantizeLinear" in kinds


def test_every_form_reloads_in_a_fresh_process():
    """What answers here only because of something in this process is of no use to anybody."""
    saved = [saved_text(), saved_images()]
    checks = [
        ReloadCheck(
            folder=form_of(one, form),
            inputs=one.inputs,
            expected=load_predictor(form_of(one, form), torch.get_num_threads()).logits(one.inputs),
        )
        for one in saved
        for form in FORMS
    ]
    for check, result in zip(checks, check_reload(checks), strict=True):
        assert result["passed"], (check.folder, result)


@pytest.mark.parametrize("images", [False, True], ids=["text", "images"])
def test_unevenly_cut_widths(images: bool, tmp_path: Path):
    """Widths that are no multiple of the block are padded; the padding must not reach the answer."""
    family = "vit" if images else "bert"
    tasks = [ImageClassification("colour", labels=["a", "b"])] if images else [_mood()]
    model = MultiTaskModel.from_encoder(tiny_encoder(family, intermediate_size=128), tasks)
    cut(model.encoder, {1: [0, 2]}, {0: list(range(73)), 2: list(range(20, 57))})
    model.refresh_config()
    randomize(model, seed=2)
    on_grid(model)
    processor = tiny_image_processor() if images else tokenizer_of()
    export_onnx(model, processor, tmp_path / "onnx")
    sample = tiny_inputs(family, batch=4, length=12)
    with torch.no_grad():
        expected = {task.logits_name: model(**sample)[task.logits_name].numpy() for task in model.tasks.values()}
    feed = {name: value.numpy() for name, value in sample.items()}
    for form in FORMS:
        quantize(tmp_path / "onnx", tmp_path / form, form, feed)
        found = run_graph(tmp_path / form / ONNX_MODEL, feed)
        assert distance(found, expected) <= (_ROUNDED_ACTIVATIONS if form == "int4" else TOLERANCES[form]), form
    exceptions = read_graph_settings(tmp_path / "int4").quantization["exceptions"]
    assert "are padded from a width of 73 to 80" in exceptions


@pytest.mark.slow
def test_weights_of_several_runs_are_stored_once(tmp_path: Path):
    """With adapters the encoder runs once for each task: packed for each run, a file would be as large as float."""
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), [_mood(), SequenceClassification("topic", labels=["a"])])
    model.add_adapters(rank=2)
    randomize(model, seed=3)
    on_grid(model)
    export_onnx(model.eval(), tokenizer_of(), tmp_path / "onnx")
    quantize_onnx(tmp_path / "onnx", tmp_path / "int4", 4, block_size=32)
    graph = onnx.load(tmp_path / "int4" / ONNX_MODEL).graph
    names = [item.name for item in graph.initializer]
    assert len(names) == len(set(names))
    sample = {name: value.numpy() for name, value in tiny_inputs("bert").items()}
    expected = run_graph(tmp_path / "onnx" / ONNX_MODEL, sample)
    assert distance(run_graph(tmp_path / "int4" / ONNX_MODEL, sample), expected) <= _ROUNDED_ACTIVATIONS


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path):
    """A kernel or a fusion that one family alone has may take a quantized weight wrongly."""
    processor = tiny_image_processor(family) if family in IMAGE_FAMILIES else tokenizer_of(family)
    task = SequenceClassification("mood", labels=["a", "b", "c"], head="linear")
    model = randomize(MultiTaskModel.from_encoder(tiny_encoder(family), [task]))
    assert isinstance(model, MultiTaskModel)
    export_onnx(model, processor, tmp_path / "onnx")
    sample = tiny_inputs(family, batch=4, length=12)
    with torch.no_grad():
        expected = {"logits_mood": model(**sample).logits_mood.numpy()}
    feed = {name: value.numpy() for name, value in sample.items()}
    for form in FORMS:
        quantize(tmp_path / "onnx", tmp_path / form, form, feed)
        found = run_graph(tmp_path / form / ONNX_MODEL, feed)
        assert distance(found, expected) <= TOLERANCES[form], form


def test_what_cannot_be_done_is_said_at_once(tmp_path: Path):
    """One line for each mistake, before anything is written."""
    saved = saved_text()
    source = saved.folders["onnx"]
    with pytest.raises(RecipeError) as caught:
        quantize_onnx(source, tmp_path / "a", 3, block_size=48, embedding_bits=2, calibration=Calibration([]))
    assert len(caught.value.problems) == 6
    with pytest.raises(RecipeError, match=r"encoder layers among 0 to 2, found \[3\]"):
        quantize_onnx(source, tmp_path / "a", float_layers=[3])
    with pytest.raises(RecipeError, match="found 16; leave it out"):
        quantize_onnx(source, tmp_path / "a", 16, float_layers=[0])
    with pytest.raises(ArtifactError, match="expected a float32 graph"):
        quantize_onnx(made(images=False, form="half"), tmp_path / "a", 4)
    assert not (tmp_path / "a" / ONNX_MODEL).exists()


def _mood() -> SequenceClassification:
    return SequenceClassification("mood", labels=["a", "b", "c"])


def test_paths_may_be_text(tmp_path: Path):
    """`export_onnx(model, tokenizer, "out")` is what everyone writes."""
    saved = saved_text()
    whole, small = str(tmp_path / "whole"), str(tmp_path / "small")
    assert export_onnx(saved.model, saved.processor, whole) == tmp_path / "whole"
    assert quantize_onnx(whole, small) == tmp_path / "small"
    assert quantize_mixed(whole, str(tmp_path / "mixed"), {}) == tmp_path / "mixed"
    assert list(split_onnx(whole, str(tmp_path / "tasks"), saved.model)) == list(saved.model.tasks)
    assert load_predictor(small)("the fox sleeps")["mood"]


@pytest.mark.parametrize("size", [8, 33])
def test_small_vocabularies(size: int, tmp_path: Path):
    """Both graphs are compared on ids that the tokenizer has: those of proteins have 33."""
    tokenizer = tokenizer_of()
    words = list(tokenizer.get_vocab().items())
    vocabulary = [word for word, _ in sorted(words, key=lambda item: item[1])][:size]
    small = type(tokenizer)(vocab={word: place for place, word in enumerate(vocabulary)})
    model = MultiTaskModel.from_encoder(
        tiny_encoder("bert", vocab_size=len(small)), [SequenceClassification("mood", labels=["bad", "good"])]
    )
    export_onnx(model, small, tmp_path / "whole")
    for bits in (8, 4):
        assert load_predictor(quantize_onnx(tmp_path / "whole", tmp_path / str(bits), bits))("the fox")["mood"]
