"""What a head and a neuron cost, and which of them a fraction of an encoder's multiply-adds pays for."""

from dataclasses import dataclass

from hf_mtcompress.compression.importance import Scores
from hf_mtcompress.compression.selection import Kept, check_fraction, select_within_budget
from hf_mtcompress.model.anatomy import Anatomy


def check_amounts(heads: float, feed_forward: float, compute: float) -> None:
    """Refuse fractions that are none, and `compute` beside those that it chooses.

    Raises:
        ValueError: one is out of range, or they exclude each other.
    """
    check_fraction("heads", heads)
    check_fraction("feed_forward", feed_forward)
    if not 0.0 <= compute < 1.0:
        raise ValueError(f"compute: expected a fraction of at least 0 and below 1, found {compute}")
    if compute and (heads or feed_forward):
        raise ValueError(
            f"compute: expected it instead of heads and feed_forward, since it chooses both, found heads {heads} and "
            f"feed_forward {feed_forward} too; keep one of them"
        )


@dataclass(frozen=True)
class Costs:
    """Multiply-adds for one row of `length` tokens."""

    length: int
    head: int
    neuron: int

    def of(self, anatomy: Anatomy) -> int:
        """Of the layers; norms, and what families compute once for all heads, are left out."""
        heads = sum(layer.attention.heads for layer in anatomy.layers)
        return heads * self.head + sum(layer.feed_forward.width for layer in anatomy.layers) * self.neuron


def costs_of(anatomy: Anatomy, length: int) -> Costs:
    """What a head and a neuron cost: their rows and columns of the linear layers, and a head's attention."""
    head, neuron = 1, 1
    for layer in anatomy.layers:
        attention, part = layer.attention, layer.feed_forward
        # A part that is gone does not know what it cost.
        if attention.heads:
            linear = anatomy.hidden_size * (len(attention.projections) * attention.blocks + 1)
            head = length * attention.head_size * (linear + 2 * length)
        if part.width:
            neuron = length * anatomy.hidden_size * (len(part.inputs) * part.blocks + 1)
    return Costs(length, head, neuron)


def select_compute(
    scores: Scores, anatomy: Anatomy, costs: Costs, compute: float, total: int, multiple_of: int
) -> tuple[Kept, Kept]:
    """Heads and neurons to keep for all but a fraction of `total` multiply-adds.

    Raises:
        ValueError: one head and one group of neurons in each layer cost more than that.
    """
    least = sum(
        costs.head * min(layer.attention.heads, 1) + costs.neuron * min(layer.feed_forward.width, multiple_of)
        for layer in anatomy.layers
    )
    if least > (1.0 - compute) * total:
        raise ValueError(
            f"compute: expected at most {1.0 - least / total:.3f}, since each of {len(anatomy.layers)} layers keeps "
            f"one head and {multiple_of} neurons, found {compute}; remove layers too, or lower multiple_of"
        )
    return select_within_budget(
        scores.heads,
        scores.feed_forward,
        head_cost=costs.head,
        neuron_cost=costs.neuron,
        budget=(1.0 - compute) * total,
        multiple_of=multiple_of,
    )
