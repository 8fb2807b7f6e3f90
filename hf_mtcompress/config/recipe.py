"""A recipe: encoder, tasks and the ordered steps, as one frozen object."""

from dataclasses import dataclass, field

from hf_mtcompress.config.steps import StepConfig
from hf_mtcompress.config.tasks import TaskConfig
from hf_mtcompress.config.training import EncoderConfig, FusionConfig, MixingConfig, TrainingConfig

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetConfig:
    """What the device allows; checked against the last artefact, and reported."""

    latency_b1_ratio: float | None = None
    """Batch-1 latency as a fraction of the reference in torch float32."""
    latency_b32_ratio: float | None = None
    size_mb: float | None = None
    """10**6 bytes of weights and graph, tokenizer apart."""
    retention: float | None = None
    worst_task_retention: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkConfig:
    """How latency is measured at the end of a run."""

    tokens: int = 64
    batch_sizes: tuple[int, ...] = (1, 32)
    repetitions: int = 20
    """Timed calls of each artefact and batch size, artefacts taking turns."""
    warmup: int = 3
    threads: int | None = None
    """Default: all cores of the machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishConfig:
    """Where and how the result is pushed by `hf-mtcompress push`."""

    repo_id: str
    private: bool = True
    license: str | None = None
    language: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that is wanted. Made by `hf_mtcompress.config.load.load_recipe`."""

    format_version: int = FORMAT_VERSION
    name: str
    seed: int = 42
    encoder: EncoderConfig
    tasks: dict[str, TaskConfig]
    mixing: MixingConfig = field(default_factory=MixingConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    steps: tuple[StepConfig, ...]
    reference: str | None = None
    """The step that everything is compared with; default: the first one."""
    budget: BudgetConfig | None = None
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    publish: PublishConfig | None = None
