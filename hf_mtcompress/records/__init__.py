"""What happened, and in which forms it was saved: plain data, without torch."""

from hf_mtcompress.records.forms import FORMS, Form, FormName, form_of_backend
from hf_mtcompress.records.run import (
    FORMAT_VERSION,
    Artefact,
    Comparison,
    LatencyRecord,
    RunRecord,
    SizeRecord,
    SplitScores,
    StepRecord,
    TaskRecord,
    TaskScore,
    artefact_from_dict,
    run_from_dict,
    step_from_dict,
    to_json,
)
from hf_mtcompress.records.search import Candidate, SearchRecord
from hf_mtcompress.records.task_comparison import (
    ArmModel,
    ArmRecord,
    ComparedTask,
    TaskComparisonRecord,
    TaskDifference,
)

__all__ = [
    "FORMAT_VERSION",
    "FORMS",
    "ArmModel",
    "ArmRecord",
    "Artefact",
    "Candidate",
    "ComparedTask",
    "Comparison",
    "Form",
    "FormName",
    "LatencyRecord",
    "RunRecord",
    "SearchRecord",
    "SizeRecord",
    "SplitScores",
    "StepRecord",
    "TaskComparisonRecord",
    "TaskDifference",
    "TaskRecord",
    "TaskScore",
    "artefact_from_dict",
    "form_of_backend",
    "run_from_dict",
    "step_from_dict",
    "to_json",
]
