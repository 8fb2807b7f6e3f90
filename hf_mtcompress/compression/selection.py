"""Which parts stay, given their scores and how much is to go. Pure: numbers in, indices out.

Ties are broken by place (the part that comes first goes first), so the same scores always give the same cut.
"""

from collections.abc import Sequence

from torch import Tensor


def check_fraction(name: str, fraction: float) -> None:
    """Refuse what is no fraction.

    Raises:
        ValueError: `fraction` is outside of 0..1.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"{name}: expected a fraction from 0 (keep all) to 1 (remove all), found {fraction}")


def select_heads(scores: Sequence[Tensor], fraction: float) -> dict[int, list[int]]:
    """Heads to keep, by layer.

    The least important heads of all layers together go; each layer that has heads keeps one, unless `fraction` is 1.

    Args:
        scores: by layer, of shape (heads,).
        fraction: of all heads to remove, 0..1.
    """
    check_fraction("heads", fraction)
    kept = {layer: list(range(len(values))) for layer, values in enumerate(scores)}
    if fraction == 1.0:
        return {layer: [] for layer in kept}
    order = sorted(
        (float(value), layer, head) for layer, values in enumerate(scores) for head, value in enumerate(values)
    )
    removed = 0
    for _, layer, head in order:
        if removed == _round(fraction * len(order)):
            break
        if len(kept[layer]) > 1:
            kept[layer].remove(head)
            removed += 1
    return kept


def select_neurons(scores: Sequence[Tensor], fraction: float, multiple_of: int = 1) -> dict[int, list[int]]:
    """Feed-forward neurons to keep, by layer, in widths that are multiples.

    In each layer the neurons are sorted by score and put in groups of `multiple_of`; the groups with the highest mean
    over all layers stay until the wanted share is kept as nearly as groups allow. Each layer that has neurons keeps one
    group, unless `fraction` is 1. A width below `multiple_of` is one group.

    Args:
        scores: by layer, of shape (width,).
        fraction: of all neurons to remove, 0..1.
        multiple_of: at least 1.

    Raises:
        ValueError: `fraction` or `multiple_of` is out of range.
    """
    check_fraction("feed_forward", fraction)
    if multiple_of < 1:
        raise ValueError(f"multiple_of: expected 1 or more, found {multiple_of}")
    everything = {layer: list(range(len(values))) for layer, values in enumerate(scores)}
    if fraction == 0.0:
        return everything
    if fraction == 1.0:
        return {layer: [] for layer in everything}
    groups: list[tuple[float, int, list[int]]] = []
    kept: dict[int, list[int]] = {}
    for layer, values in enumerate(scores):
        ranked = sorted(everything[layer], key=lambda neuron: (-float(values[neuron]), neuron))
        kept[layer] = ranked[:multiple_of]
        for start in range(multiple_of, len(ranked), multiple_of):
            group = ranked[start : start + multiple_of]
            groups.append((sum(float(values[neuron]) for neuron in group) / len(group), layer, group))
    wanted = (1.0 - fraction) * sum(len(values) for values in scores)
    have = sum(len(neurons) for neurons in kept.values())
    # Scores fall within a layer, so a layer's groups are taken in order.
    for _, layer, group in sorted(groups, key=lambda entry: (-entry[0], entry[1])):
        if have + len(group) / 2 > wanted:
            break
        kept[layer] += group
        have += len(group)
    return {layer: sorted(neurons) for layer, neurons in kept.items()}


def select_layers(scores: Tensor, count: int) -> list[int]:
    """Layers to keep when the `count` least important ones go.

    Raises:
        ValueError: `count` is negative, or would leave no layer.
    """
    if not 0 <= count < len(scores):
        raise ValueError(f"layers: expected 0 to {len(scores) - 1} layers to remove from {len(scores)}, found {count}")
    order = sorted(range(len(scores)), key=lambda layer: (float(scores[layer]), layer))
    return sorted(order[count:])


def _round(value: float) -> int:
    """To the nearest whole number, halves up."""
    return int(value + 0.5)
