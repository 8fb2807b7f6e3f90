"""Multi-task training and compression of pretrained encoders for Hugging Face transformers.

Importing the package makes `AutoConfig`, `AutoModel`, `AutoModelFor...` and `pipeline` open what it saves. It loads
neither torch nor transformers: every name below is imported when it is first used.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hf_mtcompress import environment as environment  # filters log lines of libraries, so it comes before them
from hf_mtcompress.registration_hooks import install

if TYPE_CHECKING:  # where type checkers find the names that are imported on first use
    from hf_mtcompress.compression.pruning import prune
    from hf_mtcompress.compression.quantization import quantize_bitsandbytes, quantize_torchao
    from hf_mtcompress.compression.schedule import GradualPruning
    from hf_mtcompress.compression.sparsity import trim_weights
    from hf_mtcompress.compression.vocabulary import trim_vocabulary
    from hf_mtcompress.compression.width import prune_width
    from hf_mtcompress.errors import MTCompressError
    from hf_mtcompress.formats.onnx.export import export_onnx, split_onnx
    from hf_mtcompress.formats.onnx.quantize import Calibration, quantize_onnx
    from hf_mtcompress.formats.pipeline import MultiTaskPipeline
    from hf_mtcompress.formats.predictor import Predictor, load_predictor
    from hf_mtcompress.losses.criteria import Criterion, criterion_of
    from hf_mtcompress.losses.fusion import Fusion, WeightedSum
    from hf_mtcompress.model.configuration import MultiTaskConfig
    from hf_mtcompress.model.modeling import MultiTaskModel
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

_PLACES = {
    "Calibration": "formats.onnx.quantize",
    "Criterion": "losses.criteria",
    "DistillationMixin": "trainers.distillation",
    "DistillationTrainer": "trainers.distillation",
    "DistillationTrainingArguments": "trainers.arguments",
    "Fusion": "losses.fusion",
    "GradualPruning": "compression.schedule",
    "ImageClassification": "tasks",
    "KeepTrimmed": "trainers.masking",
    "MTCompressError": "errors",
    "MultiTaskConfig": "model.configuration",
    "MultiTaskModel": "model.modeling",
    "MultiTaskPipeline": "formats.pipeline",
    "MultiTaskTrainer": "trainers.multitask",
    "MultiTaskTrainingArguments": "trainers.arguments",
    "Predictor": "formats.predictor",
    "Recipe": "recipe",
    "RoundToBits": "trainers.rounding",
    "RunRecord": "records",
    "SequenceClassification": "tasks",
    "Task": "tasks",
    "TokenClassification": "tasks",
    "WeightedSum": "losses.fusion",
    "criterion_of": "losses.criteria",
    "export_onnx": "formats.onnx.export",
    "load_predictor": "formats.predictor",
    "load_recipe": "recipe.load",
    "prune": "compression.pruning",
    "prune_width": "compression.width",
    "push_folder": "publishing.hub",
    "quantize_bitsandbytes": "compression.quantization",
    "quantize_onnx": "formats.onnx.quantize",
    "quantize_torchao": "compression.quantization",
    "register_task": "tasks",
    "render_card": "publishing.card",
    "run_recipe": "runs.run:run",
    "save_sparse": "model.sparse",
    "split_onnx": "formats.onnx.export",
    "student_of": "model.student",
    "trim_vocabulary": "compression.vocabulary",
    "trim_weights": "compression.sparsity",
}
"""The module of each public name below this package; after a colon, what it is called there."""

# Hidden from type checkers, which read the imports above: with it, every misspelt name would be of the type Any.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _PLACES:
            module, _, called = _PLACES[name].partition(":")
            value = getattr(import_module(f"{__name__}.{module}"), called or name)
            globals()[name] = value
            return value
        place = f"{__name__}.{name}"
        try:
            if not name.startswith("_"):
                return import_module(place)
        except ModuleNotFoundError as error:
            if error.name != place:  # something that the module needs
                raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Pickled by its name. `datasets` pickles what a mapped function uses, and modules outside site-packages whole."""

    def __reduce__(self) -> tuple[Any, ...]:
        return import_module, (self.__name__,)


sys.modules[__name__].__class__ = _Package

install()
