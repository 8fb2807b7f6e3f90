"""What is wanted: one frozen dataclass for each section of a recipe."""

from hf_mtcompress.config.data import DataConfig, Role
from hf_mtcompress.config.recipe import (
    FORMAT_VERSION,
    BenchmarkConfig,
    BudgetConfig,
    PublishConfig,
    Recipe,
)
from hf_mtcompress.config.steps import (
    AdapterConfig,
    AdapterTargets,
    DistillStep,
    ExportStep,
    FinetuneStep,
    PruneStep,
    QuantizeStep,
    StepConfig,
    StudentConfig,
)
from hf_mtcompress.config.tasks import (
    ImageClassificationConfig,
    ProblemType,
    SequenceClassificationConfig,
    TaskConfig,
    TaskRole,
    TokenClassificationConfig,
    WeightSchedule,
)
from hf_mtcompress.config.training import EncoderConfig, FusionConfig, MixingConfig, TrainingConfig

__all__ = [
    "FORMAT_VERSION",
    "AdapterConfig",
    "AdapterTargets",
    "BenchmarkConfig",
    "BudgetConfig",
    "DataConfig",
    "DistillStep",
    "EncoderConfig",
    "ExportStep",
    "FinetuneStep",
    "FusionConfig",
    "ImageClassificationConfig",
    "MixingConfig",
    "ProblemType",
    "PruneStep",
    "PublishConfig",
    "QuantizeStep",
    "Recipe",
    "Role",
    "SequenceClassificationConfig",
    "StepConfig",
    "StudentConfig",
    "TaskConfig",
    "TaskRole",
    "TokenClassificationConfig",
    "TrainingConfig",
    "WeightSchedule",
]
