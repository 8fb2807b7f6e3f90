"""Tables in 4 bits: what is looked up, by any runtime, is the stored number."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hf_mtcompress.formats.onnx.graphs import run_graph
from hf_mtcompress.formats.onnx.tables import in_four_bits, large_tables, store_tables


def lookups(**tables: np.ndarray) -> onnx.ModelProto:
    """A graph that looks the same rows up in each of these tables."""
    nodes = [helper.make_node("Gather", [name, "input_ids"], [f"{name}_out"], name=f"look_{name}") for name in tables]
    outputs = [
        helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, ["batch", "length", table.shape[1]])
        for name, table in tables.items()
    ]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])
    constants = [numpy_helper.from_array(table, name) for name, table in tables.items()]
    graph = helper.make_graph(nodes, "lookups", [ids], outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def random_table(rows: int, width: int, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(width).standard_normal((rows, width))).astype(np.float32)


@pytest.mark.parametrize("width", [32, 48, 6], ids=["whole blocks", "a shorter last block", "less than a block"])
@pytest.mark.parametrize("scale", [1.0, 1e-7], ids=["half-precision scales", "float scales"])
def test_a_graph_looks_up_what_the_numbers_say(width: int, scale: float, tmp_path: Path):
    """Halves of a row in the wrong order, or a scale of the neighbour, give numbers that look as good."""
    table = random_table(30, width, scale)
    model = lookups(words=table)
    store_tables(model, {"look_words"}, 32)
    onnx.checker.check_model(model, full_check=True)
    assert all(node.domain == "" for node in model.graph.node)
    assert all(item.name != "words" for item in model.graph.initializer)
    onnx.save(model, tmp_path / "four.onnx")
    ids = np.array([[0, 29, 7], [7, 3, 1]])
    found = run_graph(tmp_path / "four.onnx", {"input_ids": ids})["words_out"]
    numbers, scales, zeros = in_four_bits(table, 32)
    assert scales.dtype == (np.float16 if scale == 1.0 else np.float32)
    block = np.arange(width) // 32
    wide = scales.astype(np.float32)[:, block]
    expected = (numbers.astype(np.float32) - zeros.astype(np.float32)[:, block]) * wide
    np.testing.assert_allclose(found, expected[ids], rtol=1e-6, atol=0)
    # Half a step, and what rounding the scale adds at the far end.
    assert (np.abs(expected - table) <= wide * 0.51).all()


def test_small_numbers_by_hand():
    """Two blocks of two: one on the grid, one of a single sign, whose other end is zero."""
    numbers, scales, zeros = in_four_bits(np.array([[-8.0, 7.0, 3.0, 30.0], [0.0, 0.0, -15.0, -1.0]], np.float32), 2)
    assert numbers.tolist() == [[0, 15, 2, 15], [0, 0, 0, 14]]
    assert scales.tolist() == [[1.0, 2.0], [1.0, 1.0]]
    assert zeros.tolist() == [[8, 0], [0, 15]]


def test_small_tables_and_odd_widths_stay():
    """Positions and types would cost a call seven operators each, and save next to nothing."""
    model = lookups(
        words=random_table(800, 4), places=random_table(99, 4), types=random_table(2, 4), odd=random_table(800, 5)
    )
    every = {node.name for node in model.graph.node}
    assert large_tables(model, every) == ({"look_words"}, {"odd": 5})
    assert large_tables(model, every - {"look_words", "look_odd"}) == ({"look_places"}, {})


def test_a_table_that_is_read_twice_is_stored_once(tmp_path: Path):
    """An encoder with adapters runs once for each task."""
    model = lookups(words=random_table(9, 4))
    model.graph.node.append(helper.make_node("Gather", ["words", "input_ids"], ["again"], name="look_again"))
    model.graph.output.append(helper.make_tensor_value_info("again", TensorProto.FLOAT, ["batch", "length", 4]))
    store_tables(model, {"look_words", "look_again"}, 4)
    names = [item.name for item in model.graph.initializer]
    assert sorted(names) == ["four_bits_mask", "four_bits_shift", "words_packed", "words_scales", "words_zeros"]
    onnx.save(model, tmp_path / "four.onnx")
    found = run_graph(tmp_path / "four.onnx", {"input_ids": np.array([[3, 8]])})
    np.testing.assert_array_equal(found["again"], found["words_out"])
