import pytest
import torch

from hf_mtcompress.compression.importance import (
    Scores,
    activation,
    combine,
    from_weight_gradients,
    gate_gradients,
    gated,
    magnitude,
    random_scores,
)
from hf_mtcompress.errors import TrainingError
from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.model.surgery import keep_layers
from tests import laws
from tests.tiny import FAMILIES, tiny_encoder, tiny_inputs


def row_losses(encoder, family: str) -> torch.Tensor:
    weights = torch.linspace(-1, 1, 32, dtype=next(encoder.parameters()).dtype)
    return (encoder(**inputs_like(encoder, family)).last_hidden_state[:, 0] @ weights).square()


def inputs_like(encoder, family: str) -> dict[str, torch.Tensor]:
    dtype = next(encoder.parameters()).dtype
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in tiny_inputs(family).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_derivative_of_each_row(family: str) -> None:
    """A gate on the wrong tensor, or the derivative of the mean instead of each row's, gives numbers all the same."""
    encoder = tiny_encoder(family).double()
    anatomy = find_anatomy(encoder)
    like = next(encoder.parameters())
    scores = gate_gradients(anatomy, lambda: row_losses(encoder, family).mean(), 3, like, states=True).scores()
    # Not smaller: ModernBERT rotates in float32 whatever its weights are.
    step = 1e-3
    places = [("heads", 1, 2, scores.heads[1][2]), ("feed_forward", 2, 7, scores.feed_forward[2][7])]
    places += [("layers", 1, 0, scores.layers[1]), ("states", 0, 5, scores.states[5])]
    for kind, layer, part, found in places:
        moved = []
        for sign in (1, -1):
            with torch.no_grad(), gated(anatomy, 3, like.dtype, like.device, states=True) as gates:
                getattr(gates, kind)[layer][:, part] += sign * step
                moved.append(row_losses(encoder, family))
        derivative = (moved[0] - moved[1]) / (2 * step)
        torch.testing.assert_close(found, derivative.square().mean(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_of_hidden_states_stand_everywhere(family: str) -> None:
    """One that is missing behind a layer leaves the number there, and its importance is of another cut."""
    encoder = tiny_encoder(family)
    anatomy = find_anatomy(encoder)
    like = next(encoder.parameters())
    seen: list[torch.Tensor] = []

    def enter(module, args, kwargs) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    def leave(module, args, output) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    with torch.no_grad(), gated(anatomy, 3, like.dtype, like.device, states=True) as gates:
        gates.states[0][:, 5] = 0
        hooks = [anatomy.layers[0].module.register_forward_pre_hook(enter, with_kwargs=True)]
        hooks += [layer.module.register_forward_hook(leave) for layer in anatomy.layers]
        encoder(**tiny_inputs(family))
    for hook in hooks:
        hook.remove()
    assert len(seen) == 1 + len(anatomy.layers)
    for states in seen:
        assert not states[..., 5].any()
        assert states[..., 4].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_weights_know_the_gates(family: str) -> None:
    """What a backward pass leaves on the weights is the derivative by gates that are the same for all rows."""
    encoder = tiny_encoder(family).double()
    anatomy = find_anatomy(encoder)
    like = next(encoder.parameters())
    rows = gate_gradients(anatomy, lambda: row_losses(encoder, family).mean(), 3, like)
    row_losses(encoder, family).mean().backward()
    for expected, found in zip((rows.heads, rows.feed_forward), from_weight_gradients(anatomy), strict=True):
        for layer, values in zip(expected, found, strict=True):
            torch.testing.assert_close(values, layer.mean(0).square().float(), rtol=1e-4, atol=1e-9)
    encoder.zero_grad()
    assert not any(values.any() for kind in from_weight_gradients(anatomy) for values in kind)


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_layer_gate_is_a_dropped_layer(family: str) -> None:
    """The layer's gate must cover all that the layer does, norms too, or its score is of another change."""
    encoder = tiny_encoder(family)
    anatomy = find_anatomy(encoder)
    like = next(encoder.parameters())
    with torch.no_grad(), gated(anatomy, 3, like.dtype, like.device) as gates:
        gates.layers[1].zero_()
        closed = encoder(**tiny_inputs(family)).last_hidden_state
    keep_layers(encoder, [0, 2])
    torch.testing.assert_close(laws.hidden(encoder, family), closed, rtol=0, atol=5e-6)


def test_open_gates_change_nothing_and_go_away() -> None:
    encoder = tiny_encoder("bert")
    before = laws.hidden(encoder, "bert")
    anatomy = find_anatomy(encoder)
    with gated(anatomy, 3, torch.float32, torch.device("cpu")):
        torch.testing.assert_close(laws.hidden(encoder, "bert"), before, rtol=0, atol=5e-6)
    assert torch.equal(laws.hidden(encoder, "bert"), before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in encoder.modules())


def test_loss_that_is_not_a_number() -> None:
    encoder = tiny_encoder("bert")
    loss = lambda: row_losses(encoder, "bert").mean() * float("nan")  # noqa: E731 - short and used once
    with pytest.raises(TrainingError, match="finite loss"):
        gate_gradients(find_anatomy(encoder), loss, 3, next(encoder.parameters()))


def test_every_task_has_the_same_say() -> None:
    """A regression with large numbers would otherwise decide alone which heads stay."""
    loud = Scores([torch.tensor([100.0, 300.0])], [torch.tensor([7.0])], torch.tensor([2.0]))
    quiet = Scores([torch.tensor([0.03, 0.01])], [torch.tensor([0.1])], torch.tensor([0.5]))
    both = combine([loud, quiet])
    torch.testing.assert_close(both.heads[0], torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(both.feed_forward[0], torch.tensor([1.0]))


def test_all_zero_scores_stay_numbers() -> None:
    """A task that depends on nothing would turn every score to NaN."""
    nothing = Scores([torch.zeros(2)], [torch.zeros(2)], torch.zeros(1))
    assert combine([nothing]).heads[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("family", FAMILIES)
def test_magnitude_of_a_silenced_part(family: str) -> None:
    encoder = tiny_encoder(family)
    layer = find_anatomy(encoder).layers[1]
    with torch.no_grad():
        layer.attention.output.weight[:, 8:16] = 0
        layer.feed_forward.output.weight[:, 5] = 0
    scores = magnitude(find_anatomy(encoder))
    assert (scores.heads[1] == 0).nonzero().flatten().tolist() == [1]
    assert (scores.feed_forward[1] == 0).nonzero().flatten().tolist() == [5]
    assert len(scores.layers) == 3


def test_derivatives_of_two_gates_act_together() -> None:
    """The rearrangement multiplies derivatives of one row: rows that are mixed up would pass every other test."""
    encoder = tiny_encoder("bert").double()
    anatomy = find_anatomy(encoder)
    like = next(encoder.parameters())
    found = gate_gradients(anatomy, lambda: row_losses(encoder, "bert").mean(), 3, like)
    step = 1e-4
    for row in range(3):
        moved = []
        for sign in (1, -1):
            with torch.no_grad(), gated(anatomy, 3, like.dtype, like.device) as gates:
                gates.feed_forward[1][row, 3] += sign * step
                moved.append(row_losses(encoder, "bert")[row])
        torch.testing.assert_close(found.feed_forward[1][row, 3], (moved[0] - moved[1]) / (2 * step))


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_is_what_a_part_adds(family: str) -> None:
    """Measured on the wrong slice of the weights, or on padding, it would still look like a score."""
    encoder = tiny_encoder(family)
    anatomy = find_anatomy(encoder)
    inputs = tiny_inputs(family)
    mask = inputs.get("attention_mask")
    scores = activation(anatomy, lambda: encoder(**inputs), mask)
    places = [(anatomy.layers[1].attention, slice(16, 24), scores.heads[1][2])]
    places += [(anatomy.layers[2].feed_forward, slice(7, 8), scores.feed_forward[2][7])]
    for part, columns, score in places:
        seen: list[torch.Tensor] = []
        hook = part.output.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        laws.hidden(encoder, family)
        hook.remove()
        added = seen[0][..., columns] @ part.output.weight[:, columns].T
        counted = added.flatten(0, 1) if mask is None else added[mask.bool()]
        torch.testing.assert_close(score, counted.detach().double().square().sum(1).mean(), rtol=1e-4, atol=1e-8)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in encoder.modules())


def test_random_scores_are_seeded() -> None:
    anatomy = find_anatomy(tiny_encoder("bert"))
    one, same, other = (random_scores(anatomy, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.cat(one.heads), torch.cat(same.heads))
    assert not torch.equal(torch.cat(one.feed_forward), torch.cat(other.feed_forward))


def test_ways_to_combine() -> None:
    one = Scores([torch.tensor([1.0, 3.0])], [torch.tensor([4.0])], torch.tensor([1.0, 1.0]))
    other = Scores([torch.tensor([30.0, 10.0])], [torch.tensor([0.0])], torch.tensor([0.0, 2.0]))
    assert combine([one, other], "sum").heads[0].tolist() == [31.0, 13.0]
    assert combine([one, other], "max").heads[0].tolist() == [0.75, 0.75]
    # On one scale half of the first task's importance is the neuron's.
    joint = combine([one, other], "mean", one_scale=True)
    assert joint.heads[0].tolist() == [(0.125 + 0.75) / 2, (0.375 + 0.25) / 2]
    assert joint.feed_forward[0].tolist() == [0.25]
    assert combine([one, other], "max", one_scale=True).layers.tolist() == [0.5, 1.0]
