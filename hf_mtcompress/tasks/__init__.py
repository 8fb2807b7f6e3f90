"""Task kinds: labels, head, loss, metrics and collation of a kind live together."""

from hf_mtcompress.tasks.base import Task, build_tasks, register_task, task_from_dict
from hf_mtcompress.tasks.image_classification import ImageClassification
from hf_mtcompress.tasks.sequence_classification import SequenceClassification
from hf_mtcompress.tasks.token_classification import TokenClassification

__all__ = [
    "ImageClassification",
    "SequenceClassification",
    "Task",
    "TokenClassification",
    "build_tasks",
    "register_task",
    "task_from_dict",
]
