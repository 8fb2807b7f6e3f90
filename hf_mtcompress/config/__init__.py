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
from hf_mtcompress.config.schedules import GradualSchedule, IterativeSchedule, OneShotSchedule, ScheduleConfig
from hf_mtcompress.config.search import SearchConfig
from hf_mtcompress.config.steps import (
    AdapterConfig,
    AdapterTargets,
    DistillStep,
    ExportStep,
    FinetuneStep,
    PretrainStep,
    PruneStep,
    QuantizeStep,
    StepConfig,
    StudentConfig,
    TeacherConfig,
    TrimVocabularyStep,
    TrimWeightsStep,
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
from hf_mtcompress.config.timing import TimingConfig
from hf_mtcompress.config.training import EncoderConfig, FusionConfig, MixingConfig, TrainingConfig

__all__ = [
    "FORMAT_VERSION",
    "AdapterConfig",
    "AdapterTargets",
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
    "GradualSchedule",
    "HiddenCriterionConfig",
    "ImageClassificationConfig",
    "IterativeSchedule",
    "LogitsCriterionConfig",
    "MixingConfig",
    "OneShotSchedule",
    "PretrainStep",
    "ProblemType",
    "PruneStep",
    "PublishConfig",
    "QuantizeStep",
    "Recipe",
    "RelationsCriterionConfig",
    "Role",
    "ScheduleConfig",
    "SearchConfig",
    "SequenceClassificationConfig",
    "StepConfig",
    "StudentConfig",
    "TaskConfig",
    "TaskRole",
    "TeacherConfig",
    "TimingConfig",
    "TokenClassificationConfig",
    "TrainingConfig",
    "TrimVocabularyStep",
    "TrimWeightsStep",
    "WeightSchedule",
    "teachers_of",
]
