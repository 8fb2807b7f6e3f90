"""What is wanted: one frozen dataclass for each section of a recipe."""

from hf_mtcompress.config.criteria import (
    CriterionConfig,
    EmbeddingCriterionConfig,
    FeatureMapCriterionConfig,
    HiddenCriterionConfig,
    LogitsCriterionConfig,
    RelationsCriterionConfig,
)
from hf_mtcompress.config.data import DataConfig, Role
from hf_mtcompress.config.recipe import (
    FORMAT_VERSION,
    BenchmarkConfig,
    BudgetConfig,
    PublishConfig,
    Recipe,
)
from hf_mtcompress.config.steps import (
    DistillStep,
    ExportStep,
    FinetuneStep,
    PretrainStep,
    PruneStep,
    QuantizeStep,
    StepConfig,
    StudentConfig,
    TeacherConfig,
    teachers_of,
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
    "BenchmarkConfig",
    "BudgetConfig",
    "CriterionConfig",
    "DataConfig",
    "DistillStep",
    "EmbeddingCriterionConfig",
    "EncoderConfig",
    "ExportStep",
    "FeatureMapCriterionConfig",
    "FinetuneStep",
    "FusionConfig",
    "HiddenCriterionConfig",
    "ImageClassificationConfig",
    "LogitsCriterionConfig",
    "MixingConfig",
    "PretrainStep",
    "ProblemType",
    "PruneStep",
    "PublishConfig",
    "QuantizeStep",
    "Recipe",
    "RelationsCriterionConfig",
    "Role",
    "SequenceClassificationConfig",
    "StepConfig",
    "StudentConfig",
    "TaskConfig",
    "TaskRole",
    "TeacherConfig",
    "TokenClassificationConfig",
    "TrainingConfig",
    "WeightSchedule",
    "teachers_of",
]
