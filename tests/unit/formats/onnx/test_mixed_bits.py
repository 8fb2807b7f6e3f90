"""Bits for each part: what is measured is what is stored, and the choice is the best there is."""

import dataclasses
import itertools
import math
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest

from hf_mtcompress.errors import RecipeError
from hf_mtcompress.formats.graph_settings import read_graph_settings, write_graph_settings
from hf_mtcompress.formats.onnx import mixed_bits as mixed_precision
from hf_mtcompress.formats.onnx.export import export_onnx
from hf_mtcompress.formats.onnx.graphs import random_feed, run_graph
from hf_mtcompress.formats.onnx.mixed_bits import (
    BitChoice,
    PartSensitivity,
    Sensitivity,
    answer_divergence,
    best_choices,
    choose_within_size,
    measure_sensitivity,
    quantize_mixed,
)
from hf_mtcompress.formats.onnx.prepare import last_layers, load_prepared, matrices_of, parts_of, weight_of
from hf_mtcompress.formats.onnx.quantize import quantize_onnx
from hf_mtcompress.formats.predictor import load_predictor
from hf_mtcompress.formats.reload.check import ReloadCheck, check_reload
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.records.forms import ONNX_MODEL
from hf_mtcompress.tasks import ImageClassification, SequenceClassification
from tests.tiny import IMAGE_FAMILIES, TEXT_FAMILIES, randomize, tiny_encoder, tiny_image_processor, tiny_tokenizer
from tests.unit.formats.artefacts import Saved, saved_images, saved_text

LAYERS = [f"layer {number} {half}" for number in range(3) for half in ("attention", "feed-forward")]
PARTS = ["embeddings", *LAYERS]


@pytest.fixture(params=[saved_text, saved_images], ids=["text", "images"])
def saved(request: pytest.FixtureRequest) -> Saved:
    return request.param()


@cache
def sensitivity_of(images: bool) -> Sensitivity:
    made = saved_images() if images else saved_text()
    return measure_sensitivity(made.folders["onnx"], [made.inputs], (4, 8, 16), block_size=16, progress=False)


def planted(numbers: list[dict[int, tuple[float, int]]], whole: int = 100_000) -> Sensitivity:
    """By part and bits: divergence and saved bytes."""
    parts = [
        PartSensitivity(
            f"part {place}",
            10,
            {bits: moved for bits, (moved, _) in options.items()},
            {bits: {"mood": moved} for bits, (moved, _) in options.items()},
            {bits: saved for bits, (_, saved) in options.items()},
        )
        for place, options in enumerate(numbers)
    ]
    return Sensitivity(parts, whole, 64, 5)


# ---- parts ----


@pytest.mark.parametrize("family", [*TEXT_FAMILIES, *IMAGE_FAMILIES])
def test_parts_hold_every_matrix_once(family: str, tmp_path: Path):
    """A matrix in no part would stay in float unseen; one in the wrong part would be blamed on another."""
    image = family in IMAGE_FAMILIES
    kind = ImageClassification if image else SequenceClassification
    model = randomize(MultiTaskModel.from_encoder(tiny_encoder(family), [kind("mood", labels=["a", "b"])]))
    assert isinstance(model, MultiTaskModel)
    processor = tiny_image_processor(family) if image else tiny_tokenizer()
    source = export_onnx(model, processor, tmp_path / "onnx") / ONNX_MODEL
    prepared = load_prepared(source, tmp_path, random_feed(source))
    parts = parts_of(prepared)
    assert [part for part in parts if part.startswith("layer")] == LAYERS
    assert set(parts) - set(LAYERS) <= {"embeddings", "other matrices"}
    assert ("embeddings" in parts) == (not image)
    names = [name for found in parts.values() for name in found]
    assert len(names) == len(set(names))
    sizes = matrices_of(prepared)
    readers = {node.name: weight_of(node) for node in prepared.graph.node if node.op_type in ("MatMul", "Gather")}
    last = {readers[name] for name in last_layers(prepared) if name in readers}
    assert {readers[name] for name in names} >= {name for name in readers.values() if name in sizes} - last
    # Query, key, value and output; then up and down, and a gate in some families.
    numbers = {
        part: sum(sizes[weight] for weight in {readers[name] for name in found}) for part, found in parts.items()
    }
    assert {numbers[part] for part in LAYERS[::2]} == {4 * 32 * 32}
    assert len({numbers[part] for part in LAYERS[1::2]}) == 1
    assert numbers[LAYERS[1]] in (2 * 32 * 64, 3 * 32 * 64)


# ---- divergence ----


def test_divergence_is_nothing_for_equal_answers_and_known_for_small_ones():
    """Exact numbers, one for each kind of answer."""
    two = SequenceClassification("mood", labels=["a", "b"])
    many = SequenceClassification("topics", labels=["a", "b"], problem_type="multi_label_classification")
    value = SequenceClassification("value", problem_type="regression")
    logits = np.array([[0.0, math.log(3)], [1.0, 1.0]])
    for task in (two, many):
        assert answer_divergence(task, logits, logits) == 0
        assert answer_divergence(task, logits + np.array([[0.0, 1e-2]]), logits) > 1e-7
    assert answer_divergence(two, logits + 5, logits) == pytest.approx(0, abs=1e-12)  # an offset changes no answer
    # From (1/4, 3/4) to (1/2, 1/2); the second row agrees.
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert answer_divergence(two, np.array([[0.0, 0.0], [2.0, 2.0]]), logits) == pytest.approx(expected / 2)
    # Each label of its own: sigmoid(log 3) = 3/4 against 1/2.
    found = answer_divergence(many, np.array([[0.0, 0.0]]), np.array([[0.0, math.log(3)]]))
    assert found == pytest.approx(expected)
    # Differences of 1 where the answers have a variance of 4.
    assert answer_divergence(value, np.array([[1.0], [5.0]]), np.array([[0.0], [4.0]])) == pytest.approx(1 / 8)


# ---- sensitivities ----


def test_a_part_that_says_nothing_has_none(tmp_path: Path):
    """Feed-forward weights of 0 are 0 in any bits; every other part rounds."""
    made = saved_text()
    model = MultiTaskModel.from_encoder(tiny_encoder("bert"), list(made.model.tasks.values()), max_length=24)
    randomize(model, seed=1)
    model.encoder.encoder.layer[1].output.dense.weight.data.zero_()
    model.encoder.encoder.layer[1].intermediate.dense.weight.data.zero_()
    source = export_onnx(model, made.processor, tmp_path / "onnx")
    found = measure_sensitivity(source, [made.inputs], (4,), block_size=16, progress=False)
    silent = {part.name: part.divergence[4] for part in found.parts}
    assert silent.pop("layer 1 feed-forward") < 1e-9
    assert min(silent.values()) > 1e-4


def test_more_bits_move_answers_less(saved: Saved):
    """16 bits are nearly exact, 4 the coarsest; a mean over tasks, with each of them."""
    found = sensitivity_of("pixel_values" in saved.inputs)
    assert [part.name for part in found.parts if part.name in PARTS] == [
        part for part in PARTS if "pixel_values" not in saved.inputs or part != "embeddings"
    ]
    assert found.rows == len(saved.samples)
    for part in found.parts:
        assert part.divergence[16] < 1e-5
        assert part.divergence[16] < min(part.divergence[8], part.divergence[4])
        assert 0 < part.saved_bytes[16] < part.saved_bytes[8]
        for bits, of_tasks in part.tasks.items():
            assert list(of_tasks) == list(saved.model.tasks)
            assert sum(of_tasks.values()) / len(of_tasks) == pytest.approx(part.divergence[bits])


def test_only_main_tasks_decide(tmp_path: Path):
    """Bytes spent on answers that nobody judges would be missing where they are."""
    made = saved_text()
    source = tmp_path / "onnx"
    shutil.copytree(made.folders["onnx"], source)
    settings = read_graph_settings(source)
    tasks = [{**task, "role": "main" if task["name"] == "mood" else "auxiliary"} for task in settings.tasks]
    write_graph_settings(source, dataclasses.replace(settings, tasks=tasks))
    found = measure_sensitivity(source, [made.inputs], (4,), block_size=16, progress=False)
    for part in found.parts:
        assert part.divergence[4] == part.tasks[4]["mood"]
        assert list(part.tasks[4]) == list(made.model.tasks)


def test_it_comes_back_from_json():
    """A killed run reads it again."""
    found = sensitivity_of(images=False)
    assert Sensitivity.from_dict(found.to_dict()) == found


# ---- choices ----


def test_choices_are_the_best_there_are():
    """Against all choices of three parts."""
    found = planted(
        [
            {4: (0.5, 70_00), 8: (0.02, 60_00), 16: (0.0001, 40_00)},
            {4: (0.01, 20_000), 8: (0.03, 15_000), 16: (0.0002, 10_000)},  # 8 bits are worse than 4 in every way
            {4: (0.2, 35_000), 8: (0.004, 30_000), 16: (0.0, 20_000)},
        ]
    )
    front = best_choices(found)
    every = []
    for bits in itertools.product((4, 8, 16, 32), repeat=3):
        pairs = list(zip(found.parts, bits, strict=True))
        size = found.float_bytes - sum(part.saved_bytes.get(number, 0) for part, number in pairs)
        every.append((size, sum(part.divergence.get(number, 0.0) for part, number in pairs)))
    wanted = [
        (size, moved)
        for size, moved in sorted(set(every))
        if not any((other < size and less <= moved) or (other <= size and less < moved) for other, less in every)
    ]
    assert [choice.size_bytes for choice in front] == [size for size, _ in wanted]
    assert [choice.divergence for choice in front] == pytest.approx([moved for _, moved in wanted])
    assert all(choice.bits["part 1"] != 8 for choice in front)
    assert front[-1].bits["part 2"] == 16  # exact in 16 bits: float would be larger for nothing
    for size_mb in (0.04, 0.05, 0.061, 0.2):
        chosen = choose_within_size(front, size_mb)
        assert chosen.divergence == pytest.approx(min(moved for size, moved in every if size <= size_mb * 1e6))
    assert {number for choice in best_choices(found, (8, 32)) for number in choice.bits.values()} == {8, 32}


def test_a_size_that_nothing_fits():
    """Said with the size that would."""
    front = best_choices(planted([{8: (0.1, 75_000)}]))
    assert choose_within_size(front, 0.025) == BitChoice({"part 0": 8}, 25_000, 0.1)
    with pytest.raises(RecipeError, match=r"size_mb: expected at least 0\.03, .* found 0\.02; allow fewer bits"):
        choose_within_size(front, 0.02)


def test_many_uneven_parts_are_quick():
    """As many choices as 4 to the power of 40 must not be looked at one by one."""
    generator = np.random.default_rng(0)
    numbers = [
        {
            bits: (float(generator.random() / bits), int(generator.integers(1000, 2000) // bits * 8))
            for bits in (4, 8, 16)
        }
        for _ in range(40)
    ]
    front = best_choices(planted(numbers, whole=200_000))
    assert 100 < len(front) <= 4000
    assert all(a.size_bytes < b.size_bytes and a.divergence > b.divergence for a, b in itertools.pairwise(front))


def test_thinning_loses_neither_end(monkeypatch: pytest.MonkeyPatch):
    """Parts whose options are less than a division apart must not add up to a size that nobody can have."""
    numbers = [{4: (0.2 + 0.01 * place, 1000 + 3**place % 97), 8: (0.1, 955 + place)} for place in range(26)]
    sensitivity = planted(numbers, whole=100_000)
    whole = best_choices(sensitivity, (4, 8))
    monkeypatch.setattr(mixed_precision, "_LONGEST_FRONT", 50)
    front = best_choices(sensitivity, (4, 8))
    assert 25 < len(front) <= 51 < len(whole)
    assert (front[0].size_bytes, front[-1].divergence) == (whole[0].size_bytes, whole[-1].divergence)
    assert front[0].size_bytes == 100_000 - sum(max(options[4][1], options[8][1]) for options in numbers)
    assert front[-1].divergence == pytest.approx(26 * 0.1)
    assert all(a.size_bytes < b.size_bytes and a.divergence > b.divergence for a, b in itertools.pairwise(front))


def test_bits_without_numbers_are_left_out():
    """Not-a-number is neither smaller nor larger than anything, and would win."""
    found = planted([{4: (math.nan, 9000), 8: (0.1, 5000)}])
    assert [choice.bits for choice in best_choices(found, (4, 8))] == [{"part 0": 8}]
    with pytest.raises(RecipeError, match=r"expected bits in which 'part 0' gives numbers, found none; add 32"):
        best_choices(found, (4,))


# ---- graphs ----


def test_sizes_add_up(saved: Saved, tmp_path: Path):
    """The budget is about the file; an estimate that is off would miss it."""
    images = "pixel_values" in saved.inputs
    front = best_choices(sensitivity_of(images))
    for number, choice in enumerate((front[0], front[len(front) // 2], front[-1])):
        folder = quantize_mixed(saved.folders["onnx"], tmp_path / str(number), choice.bits, block_size=16)
        assert (folder / ONNX_MODEL).stat().st_size == pytest.approx(choice.size_bytes, abs=600)


def test_bits_for_all_are_the_plain_forms(saved: Saved, tmp_path: Path):
    """Float for all is the float graph; 8 and 4 for all is what `bits: 8` and `bits: 4` make."""
    source = saved.folders["onnx"]
    parts = [part.name for part in sensitivity_of("pixel_values" in saved.inputs).parts]
    for bits in (8, 4):
        plain = quantize_onnx(source, tmp_path / f"plain-{bits}", bits, block_size=16)
        mixed = quantize_mixed(source, tmp_path / f"mixed-{bits}", dict.fromkeys(parts, bits), block_size=16)
        own, wanted = (run_graph(folder / ONNX_MODEL, saved.inputs) for folder in (mixed, plain))
        for name, array in wanted.items():
            np.testing.assert_array_equal(own[name], array)
    untouched = quantize_mixed(source, tmp_path / "float", {})
    for name, array in run_graph(source / ONNX_MODEL, saved.inputs).items():
        np.testing.assert_allclose(run_graph(untouched / ONNX_MODEL, saved.inputs)[name], array, atol=1e-5)


def test_a_mixed_graph_says_what_it_is_and_reloads(saved: Saved, tmp_path: Path):
    """Bits by part, how far it is from float, and the same answers in another process."""
    found = sensitivity_of("pixel_values" in saved.inputs)
    names = [part.name for part in found.parts]
    bits = {name: (4, 8, 16, 32)[place % 4] for place, name in enumerate(names)}
    folder = quantize_mixed(saved.folders["onnx"], tmp_path / "mixed", bits, block_size=16, rows=[saved.inputs])
    settings = read_graph_settings(folder)
    assert settings.precision == "mixed"
    assert settings.quantization["parts"] == bits
    assert settings.quantization["block_size"] == 16
    divergence = settings.quantization["divergence"]
    assert list(divergence["tasks"]) == list(saved.model.tasks)
    assert divergence["mean"] == pytest.approx(sum(divergence["tasks"].values()) / len(divergence["tasks"]))
    types = {item.data_type for item in onnx.load(folder / ONNX_MODEL).graph.initializer}
    assert {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8} <= types
    answers = load_predictor(folder).logits(saved.inputs)
    (result,) = check_reload([ReloadCheck(folder=folder, inputs=saved.inputs, expected=answers)])
    assert result["passed"], result


def test_what_cannot_be(tmp_path: Path):
    """Each with what was expected."""
    made = saved_text()
    source = made.folders["onnx"]
    with pytest.raises(RecipeError, match=r"expected parts among embeddings, layer 0 attention, .*, found layer 9"):
        quantize_mixed(source, tmp_path / "a", {"layer 9 attention": 8})
    with pytest.raises(RecipeError, match=r"choices: expected some of 4, 8, 16, 32, found \[2\]"):
        quantize_mixed(source, tmp_path / "b", {"embeddings": 2})
    with pytest.raises(RecipeError, match="block_size: expected one of 16, 32"):
        measure_sensitivity(source, [made.inputs], (4,), block_size=5)
    with pytest.raises(RecipeError, match=r"mixed\.rows: expected at least one row, found none"):
        measure_sensitivity(source, [], (4,))
    assert not (tmp_path / "b").exists()
