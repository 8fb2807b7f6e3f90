import copy

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_mtcompress.compression.repair import LeastSquares, RepairReport, repair
from hf_mtcompress.errors import UnsupportedEncoderError
from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.model.surgery import cut, keep_layers
from tests import laws
from tests.laws import Kept
from tests.tiny import FAMILIES, tiny_encoder, tiny_inputs

Batch = dict[str, Tensor]


def batches(family: str) -> list[Batch]:
    return [tiny_inputs(family, batch=6, seed=seed) for seed in range(3)]


def repaired(
    family: str, heads: Kept, feed_forward: Kept, layers: tuple[int, ...] = (0, 1, 2)
) -> tuple[PreTrainedModel, PreTrainedModel, RepairReport]:
    """The full encoder, the cut and repaired one, and what the repair reports."""
    full = tiny_encoder(family)
    encoder = copy.deepcopy(full)
    keep_layers(encoder, layers)
    cut(encoder, heads, feed_forward)
    return full, encoder, solve(encoder, full, family, layers)


def solve(
    encoder: PreTrainedModel, full: PreTrainedModel, family: str, layers: tuple[int, ...] = (0, 1, 2)
) -> RepairReport:
    return repair(
        encoder,
        full,
        lambda batch: encoder(**batch),
        lambda batch: full(**batch),
        batches(family),
        layers,
        progress=False,
    )


def distance(encoder: PreTrainedModel, full: PreTrainedModel, family: str) -> float:
    """Squared distance behind the last layer, of positions that count, relative to the full encoder's."""
    ends = []
    for model in (encoder, full):
        found: list[Tensor] = []

        def note(_, args, output, found: list[Tensor] = found) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        hook = find_anatomy(model).layers[-1].module.register_forward_hook(note)
        with torch.no_grad():
            for batch in batches(family):
                model(**batch)
        hook.remove()
        masks = [batch.get("attention_mask") for batch in batches(family)]
        ends.append(
            torch.cat(
                [
                    state.flatten(0, 1) if mask is None else state[mask.bool()]
                    for state, mask in zip(found, masks, strict=True)
                ]
            ).double()
        )
    return float((ends[0] - ends[1]).square().sum() / ends[1].square().sum())


# ---- laws ----


@pytest.mark.parametrize("family", FAMILIES)
def test_cutting_nothing_is_the_identity(family: str) -> None:
    full, encoder, report = repaired(family, {}, {})
    assert (report.error_before, report.error_after, report.undone) == (0.0, 0.0, False)
    assert torch.equal(laws.hidden(encoder, family), laws.hidden(full, family))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("heads", "feed_forward", "layers"),
    [
        (laws.UNEVEN_HEADS, laws.UNEVEN_NEURONS, (0, 1, 2)),
        (laws.EMPTY_HEADS, laws.EMPTY_NEURONS, (0, 1, 2)),
        ({1: [0, 3]}, {}, (0, 2)),
        ({}, {1: range(20)}, (1, 2)),
    ],
)
def test_never_worse_than_without(family: str, heads: Kept, feed_forward: Kept, layers: tuple[int, ...]) -> None:
    """And the report tells what another way of measuring finds too."""
    full = tiny_encoder(family)
    plain = copy.deepcopy(full)
    keep_layers(plain, layers)
    cut(plain, heads, feed_forward)
    _, encoder, report = repaired(family, heads, feed_forward, layers)
    assert report.error_before == pytest.approx(distance(plain, full, family), rel=1e-3)
    assert report.error_after == pytest.approx(distance(encoder, full, family), rel=1e-3)
    assert report.error_after < report.error_before
    inputs = batches(family)
    if "attention_mask" in inputs[0]:
        assert report.positions == sum(int(batch["attention_mask"].sum()) for batch in inputs)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in full.modules() if family != "mpnet")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_others_do_too_is_not_lost(family: str) -> None:
    """Neurons and a head that double others can be cut without loss: the others take over their columns. A target or a
    position that is off by one would be found here on every family, whatever its norms and factors."""
    full = tiny_encoder(family)
    with torch.no_grad():
        for layer in find_anatomy(full).layers:
            attention, part = layer.attention, layer.feed_forward
            for linear in part.inputs.values():
                rows = linear.weight.unflatten(0, (part.blocks, part.width))
                rows[:, 32:] = rows[:, :32]
                if linear.bias is not None:
                    bias = linear.bias.unflatten(0, (part.blocks, part.width))
                    bias[:, 32:] = bias[:, :32]
            for linear in attention.projections.values():
                rows = linear.weight.unflatten(0, (attention.blocks, attention.heads, attention.head_size))
                rows[:, 3] = rows[:, 1]
                if linear.bias is not None:
                    bias = linear.bias.unflatten(0, (attention.blocks, attention.heads, attention.head_size))
                    bias[:, 3] = bias[:, 1]
        if family == "mpnet":
            full.get_submodule("encoder.relative_attention_bias").weight[:, 3] = full.get_submodule(
                "encoder.relative_attention_bias"
            ).weight[:, 1]
    encoder = copy.deepcopy(full)
    cut(encoder, {layer: [0, 1, 2] for layer in range(3)}, {layer: range(32) for layer in range(3)})
    report = repair(
        encoder,
        full,
        lambda batch: encoder(**batch),
        lambda batch: full(**batch),
        batches(family),
        (0, 1, 2),
        ridge=1e-9,
        progress=False,
    )
    assert report.error_before > 1e-3
    assert report.error_after < 1e-7


def test_padding_does_not_count() -> None:
    """What stands at padded positions is arbitrary; fitted too, it would take its share of the weights."""
    found = []
    for padding in (1, 20):
        full = tiny_encoder("bert")
        encoder = copy.deepcopy(full)
        cut(encoder, laws.UNEVEN_HEADS, laws.UNEVEN_NEURONS)
        rows = [{**batch, "input_ids": batch["input_ids"].clone()} for batch in batches("bert")]
        for batch in rows:
            batch["input_ids"][batch["attention_mask"] == 0] = padding
        repair(encoder, full, lambda b: encoder(**b), lambda b: full(**b), rows, (0, 1, 2), progress=False)  # noqa: B023 - called at once
        found.append(laws.hidden(encoder, "bert"))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-4)


def test_repair_that_makes_it_worse_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    full = tiny_encoder("bert")
    encoder = copy.deepcopy(full)
    cut(encoder, laws.UNEVEN_HEADS, laws.UNEVEN_NEURONS)
    before = laws.hidden(encoder, "bert")
    monkeypatch.setattr(LeastSquares, "solve", lambda self, ridge: torch.full_like(self.cross, 3.0))
    report = solve(encoder, full, "bert")
    assert report.undone
    assert report.error_after == report.error_before > 0
    assert torch.equal(laws.hidden(encoder, "bert"), before)


def test_layers_that_do_not_follow_each_other() -> None:
    """DeBERTa of some sizes changes the hidden state between two layers; run one by one, the layers would not."""
    full = tiny_encoder("deberta-v2", conv_kernel_size=3)
    with pytest.raises(UnsupportedEncoderError, match="each read what the one before answered"):
        solve(copy.deepcopy(full), full, "deberta-v2")


# ---- exact numbers ----


def problem(rows: int, width: int, outputs: int, seed: int = 0) -> tuple[LeastSquares, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    features, missing = generator.normal(size=(rows, width)), generator.normal(size=(rows, outputs))
    system = LeastSquares(width, outputs)
    for start in range(0, rows, 7):
        system.add(torch.tensor(features[start : start + 7]), torch.tensor(missing[start : start + 7]))
    return system, features, missing


def test_least_squares_by_numpy() -> None:
    system, features, missing = problem(50, 4, 3)
    expected = np.linalg.lstsq(features, missing, rcond=None)[0]
    np.testing.assert_allclose(system.solve(1e-12).numpy(), expected, rtol=1e-8)


def test_ridge_is_relative_to_each_input() -> None:
    """A penalty on plain weights would hold small inputs back: scaled by 1000, an input is to be treated alike."""
    system, features, missing = problem(50, 4, 3)
    scaled = LeastSquares(4, 3)
    factors = np.array([1.0, 1000.0, 1.0, 0.001])
    scaled.add(torch.tensor(features * factors), torch.tensor(missing))
    np.testing.assert_allclose(scaled.solve(0.1).numpy() * factors[:, None], system.solve(0.1).numpy(), rtol=1e-8)
    # By hand: features (1, 2), missing (2, 4): 10 / (5 + 0.5 * 5).
    single = LeastSquares(1, 1)
    single.add(torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [4.0]]))
    assert single.solve(0.5).item() == pytest.approx(10 / 7.5)
    # One input and two positions.
    assert single.solve().item() == pytest.approx(10 / 7.5)


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1.0, 100.0])
def test_least_squares_never_make_it_worse(ridge: float) -> None:
    """With fewer rows than inputs too."""
    for rows in (3, 40):
        system, features, missing = problem(rows, 6, 2)
        left = missing - features @ system.solve(ridge).numpy()
        assert np.square(left).sum() <= np.square(missing).sum()


def test_inputs_that_are_always_zero() -> None:
    system = LeastSquares(2, 1)
    system.add(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0], [2.0]]))
    assert system.solve(1e-9).flatten().tolist() == pytest.approx([1.0, 0.0])
