"""The graph as quantizers get it: fewer operators, the same numbers."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hf_mtcompress.formats.onnx import prepare as preparation
from hf_mtcompress.formats.onnx.graphs import random_feed, run_graph
from hf_mtcompress.records.forms import ONNX_MODEL
from tests.unit.formats.artefacts import saved_text


def test_biases_are_added_once_and_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Query, key and value come out of one product; one addition before it is split does for three behind."""
    source = saved_text().folders["onnx"] / ONNX_MODEL
    sample = random_feed(source)
    found = []
    for join in (preparation.join_biases, lambda model: model):
        monkeypatch.setattr(preparation, "join_biases", join)
        model = preparation.load_prepared(source, tmp_path, sample)
        onnx.checker.check_model(model)
        splits = [node for node in model.graph.node if node.op_type == "Split"]
        makers = {name: node.op_type for node in model.graph.node for name in node.output}
        behind = [
            reader.op_type
            for node in splits
            for reader in model.graph.node
            if set(node.output).intersection(reader.input)
        ]
        found.append(([makers[node.input[0]] for node in splits], set(behind), run_graph_of(model, sample, tmp_path)))
    (before, behind, joined), (_, apart, plain) = found
    assert len(before) >= 3
    assert set(before) == {"Add"}
    assert "Add" not in behind
    assert "Add" in apart
    for name, array in plain.items():
        np.testing.assert_array_equal(joined[name], array)


def test_a_sum_and_its_normalisation_are_two_operators(tmp_path: Path):
    """The kernel that does both is slower; its further outputs have names whether anything reads them or not."""
    source = saved_text().folders["onnx"] / ONNX_MODEL
    sample = random_feed(source)
    model = preparation.load_prepared(source, tmp_path, sample)
    kinds = [node.op_type for node in model.graph.node]
    assert "SkipLayerNormalization" not in kinds
    assert kinds.count("LayerNormalization") == 7  # the embeddings' and two in each of three layers
    for name, array in run_graph_of(model, sample, tmp_path).items():
        np.testing.assert_allclose(array, run_graph(source, sample)[name], atol=1e-5)


@pytest.mark.parametrize("read", ["", "mean", "sum"])
def test_a_normalisation_whose_statistics_are_read_stays_whole(read: str):
    """Two operators give the sum, but neither mean nor deviation."""
    outputs = ["normal", "mean", "deviation", "sum"]
    node = helper.make_node("SkipLayerNormalization", ["x", "y", "scale"], outputs, domain="com.microsoft")
    names = ["normal", *([read] if read else [])]
    graph = helper.make_graph(
        [node],
        "parts",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, 4]) for name in ("x", "y")],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names],
        [numpy_helper.from_array(np.ones(4, np.float32), "scale")],
    )
    model = preparation.split_skip_norms(helper.make_model(graph))
    kinds = [found.op_type for found in model.graph.node]
    assert kinds == (["SkipLayerNormalization"] if read == "mean" else ["Add", "LayerNormalization"])
    assert {name for found in model.graph.node for name in found.output} >= set(names)


@pytest.mark.parametrize(
    "kept", ["read elsewhere, too", "an output of the graph", "no bias", "of another width", "along rows"]
)
def test_what_is_no_split_of_biased_parts_stays(kept: str):
    """An addition that is moved before the split would then count in a place where it was not."""
    width = 1 if kept == "of another width" else 2
    nodes = [
        helper.make_node("Split", ["x", "sizes"], ["a", "b"], name="split", axis=0 if kept == "along rows" else -1),
        helper.make_node("Add", ["a", "bias_a"], ["c"]),
        helper.make_node("Add", ["b", "a" if kept == "no bias" else "bias_b"], ["d"]),
    ]
    names = ["c", "d"]
    if kept == "read elsewhere, too":
        nodes.append(helper.make_node("Neg", ["b"], ["e"]))
        names.append("e")
    elif kept == "an output of the graph":
        names.append("b")
    graph = helper.make_graph(
        nodes,
        "parts",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 2] if kept == "along rows" else [3, 4])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names],
        [
            numpy_helper.from_array(np.array([2, 2]), "sizes"),
            numpy_helper.from_array(np.ones(2, np.float32), "bias_a"),
            numpy_helper.from_array(np.ones(width, np.float32), "bias_b"),
        ],
    )
    model = helper.make_model(graph)
    expected = model.SerializeToString()
    assert preparation.join_biases(model).SerializeToString() == expected


def run_graph_of(model: onnx.ModelProto, sample: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    onnx.save(model, folder / "prepared.onnx")
    return run_graph(folder / "prepared.onnx", sample)
