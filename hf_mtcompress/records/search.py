"""The family of checkpoints that a search made: `search.json`."""

from dataclasses import dataclass, field
from typing import Any

from hf_mtcompress.records.run import FORMAT_VERSION


@dataclass(kw_only=True)
class Candidate:
    """One member of the family that a search made; scores are of validation rows."""

    folder: str
    """Of the artefact, relative to the run."""
    form: str
    size_mb: float | None
    """10**6 bytes of weights and graph."""
    ratios: dict[str, float | None]
    """Minimum time as a fraction of that of the reference in torch float32, by batch size."""
    measured_ms: dict[str, float | None]
    average: float | None
    retention: float | None
    worst_task_retention: float | None
    limits: dict[str, Any]
    """By limit of the budget: `limit`, `found`, `met`, and `why` where that is not decided."""
    missed: float | None
    """Sum over the limits that are decided of how far each is missed, as a fraction of it; 0 where none is missed, None
    where nothing is known of what is kept."""
    steps: list[str] = field(default_factory=list)
    """That lead to it from what the recipe's own steps made, in order."""
    share: float | None = None
    """Of the starting model's time that it was cut to, as predicted; None where nothing was cut by the clock."""
    predicted_ms: dict[str, float] = field(default_factory=dict)
    """By the table of block times; batch sizes that the table has."""
    on_front: bool = False
    """Whether no other is at least as good in size, every time and quality, and better in one of them."""
    not_measured: dict[str, str] = field(default_factory=dict)
    """By batch size, why its time is not given."""
    undefined: dict[str, str] = field(default_factory=dict)
    """Main tasks that are left out of what is kept, with the reason."""

    @property
    def undecided(self) -> list[str]:
        """Limits of which cannot be said whether they are met."""
        return [name for name, row in self.limits.items() if row["met"] is None]


@dataclass(kw_only=True)
class SearchRecord:
    """A family of checkpoints and the one that was chosen from it: `search.json`."""

    format_version: int = FORMAT_VERSION
    name: str
    created: str
    environment: dict[str, Any]
    reference: str
    """Folder of the artefact that everything is compared with."""
    runtime: str
    """What the family was made for."""
    budget: dict[str, float]
    candidates: list[Candidate]
    chosen: str
    """Folder of the delivered artefact."""
    met: bool | None
    """Whether it meets the whole budget on validation rows; None where that is not decided."""
    conditions: dict[str, Any]
    """Of the times."""
