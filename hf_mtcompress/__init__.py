"""Multi-task training and compression of pretrained encoders for Hugging Face transformers.

Importing the package makes `AutoConfig`, `AutoModel`, `AutoModelFor...` and `pipeline` open what it saves.
"""

from hf_mtcompress.compression.pruning import prune
from hf_mtcompress.compression.quantization import quantize_bitsandbytes, quantize_torchao
from hf_mtcompress.compression.schedule import GradualPruning
from hf_mtcompress.compression.sparsity import trim_weights
from hf_mtcompress.compression.vocabulary import trim_vocabulary
from hf_mtcompress.compression.width import prune_width
from hf_mtcompress.errors import MTCompressError
from hf_mtcompress.formats.onnx.export import export_onnx, split_onnx
from hf_mtcompress.formats.onnx.quantize import Calibration, quantize_onnx
from hf_mtcompress.formats.pipeline import MultiTaskPipeline, register_pipeline
from hf_mtcompress.formats.predictor import Predictor, load_predictor
from hf_mtcompress.losses.criteria import Criterion, criterion_of
from hf_mtcompress.losses.fusion import Fusion, WeightedSum
from hf_mtcompress.model.configuration import MultiTaskConfig
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.registration import register
from hf_mtcompress.model.sparse import save_sparse
from hf_mtcompress.model.student import student_of
from hf_mtcompress.publishing.card import render_card
from hf_mtcompress.publishing.hub import push_folder
from hf_mtcompress.recipe import Recipe
from hf_mtcompress.recipe.load import load_recipe
from hf_mtcompress.records import RunRecord
from hf_mtcompress.runs.run import run as run_recipe
from hf_mtcompress.tasks import (
    ImageClassification,
    SequenceClassification,
    Task,
    TokenClassification,
    register_task,
)
from hf_mtcompress.trainers.arguments import DistillationTrainingArguments, MultiTaskTrainingArguments
from hf_mtcompress.trainers.distillation import DistillationMixin, DistillationTrainer
from hf_mtcompress.trainers.masking import KeepTrimmed
from hf_mtcompress.trainers.multitask import MultiTaskTrainer
from hf_mtcompress.trainers.rounding import RoundToBits

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "Criterion",
    "DistillationMixin",
    "DistillationTrainer",
    "DistillationTrainingArguments",
    "Fusion",
    "GradualPruning",
    "ImageClassification",
    "KeepTrimmed",
    "MTCompressError",
    "MultiTaskConfig",
    "MultiTaskModel",
    "MultiTaskPipeline",
    "MultiTaskTrainer",
    "MultiTaskTrainingArguments",
    "Predictor",
    "Recipe",
    "RoundToBits",
    "RunRecord",
    "SequenceClassification",
    "Task",
    "TokenClassification",
    "WeightedSum",
    "criterion_of",
    "export_onnx",
    "load_predictor",
    "load_recipe",
    "prune",
    "prune_width",
    "push_folder",
    "quantize_bitsandbytes",
    "quantize_onnx",
    "quantize_torchao",
    "register_task",
    "render_card",
    "run_recipe",
    "save_sparse",
    "split_onnx",
    "student_of",
    "trim_vocabulary",
    "trim_weights",
]

register()
register_pipeline()
