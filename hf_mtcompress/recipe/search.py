"""What a search tries on its way to the smallest checkpoint that the budget allows."""

from dataclasses import dataclass, field
from typing import Literal

from hf_mtcompress.recipe.steps import PruneStep, TrimVocabularyStep
from hf_mtcompress.recipe.timing import TimingConfig

SEARCH_FORMS = ("onnx", "int8", "int8-4")
"""What a search puts behind the name of a float step to name the one that stores it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """A family of checkpoints from one model, each cut from the one before; see `hf-mtcompress search`.

    ```yaml
    budget: {size_mb: 8, latency_b1_ratio: 0.12, retention: 0.97}
    search:
      from: teacher
      vocabulary: {minimum_count: 1}
      prune: {importance: fisher, recover: {kind: distill, teacher: teacher, epochs: 2}}
    ```
    """

    source: str | None = None
    """The float step that the family starts from; default: the reference."""
    members: tuple[str, ...] = ()
    """Other float steps whose models belong to the family without being cut by the clock, such as a student of fewer
    layers. They are stored in the same form, with the same vocabulary."""
    timing: TimingConfig = field(default_factory=TimingConfig)
    """What the family is made for: it is quantized and timed for this runtime."""
    points: int = 4
    """Stages of the family. The last one is a little faster than the budget asks for; the others are evenly spaced."""
    shares: tuple[float, ...] | None = None
    """Instead of `points`: shares of the starting model's time that each stage keeps, falling."""
    prune: PruneStep | None = None
    """How each stage is cut and recovered. How much goes is the search's affair: no `heads`, `feed_forward`, `compute`,
    `latency` and `timing` here."""
    vocabulary: TrimVocabularyStep | None = None
    """Cut the vocabulary first."""
    embedding_bits: tuple[Literal[8, 4], ...] = (8, 4)
    """With `runtime: onnx_int8`: bits of the embeddings that every stage is stored with; each makes a member of the
    family. In 4 bits it is smaller, and about as fast."""
