"""Makes transformers know this package: `import hf_mtcompress` calls `register`."""

from typing import Any, ClassVar

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from hf_mtcompress.errors import ArtifactError, TaskError
from hf_mtcompress.model.configuration import MultiTaskConfig
from hf_mtcompress.model.marking import StructureConfig
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.structured import QUANTIZERS


def register() -> None:
    """Register the multi-task model with the Auto classes, and the reload of unevenly cut stock models.

    Calling it again changes nothing.
    """
    AutoConfig.register(MultiTaskConfig.model_type, MultiTaskConfig, exist_ok=True)
    AutoModel.register(MultiTaskConfig, MultiTaskModel, exist_ok=True)
    AutoModelForSequenceClassification.register(MultiTaskConfig, OneSequenceTask, exist_ok=True)
    AutoModelForTokenClassification.register(MultiTaskConfig, OneTokenTask, exist_ok=True)
    AutoModelForImageClassification.register(MultiTaskConfig, OneImageTask, exist_ok=True)
    for method, quantizer in QUANTIZERS.items():
        if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            register_quantization_config(method)(StructureConfig)
        if method not in AUTO_QUANTIZER_MAPPING:
            register_quantizer(method)(quantizer)


class OneTask(MultiTaskModel):
    """Loads one task of a multi-task folder as the stock class of its family.

    `AutoModelForSequenceClassification.from_pretrained(folder, task="intent")` ends here. `task` may be left out where
    only one task of the folder is of the kind.
    """

    auto_class: ClassVar[str]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, task: str | None = None, **kwargs: Any
    ) -> Any:
        """A stock model with the weights of `task`.

        Raises:
            TaskError: `task` is not a task of this kind, or left out where there are several.
            ArtifactError: the folder holds 8-bit or 4-bit weights.
        """
        kwargs.pop("output_loading_info", None)
        model = MultiTaskModel.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        fitting = [name for name, found in model.tasks.items() if found.auto_class == cls.auto_class]
        if task is None and len(fitting) == 1:
            task = fitting[0]
        if task not in fitting:
            raise TaskError(
                f"expected task= one of {fitting} for {cls.auto_class}, found {task!r}; the folder's tasks are "
                f"{list(model.tasks)}"
            )
        if getattr(model, "hf_quantizer", None) is not None:
            raise ArtifactError(
                f"expected float weights to load one task as a stock model, found {model.quantization_method} in "
                f"{pretrained_model_name_or_path}; load all tasks with AutoModel, or export the task before quantizing"
            )
        return model.to_stock(task)


class OneSequenceTask(OneTask):
    """What `AutoModelForSequenceClassification` finds for a multi-task folder."""

    auto_class = "AutoModelForSequenceClassification"


class OneTokenTask(OneTask):
    """What `AutoModelForTokenClassification` finds for a multi-task folder."""

    auto_class = "AutoModelForTokenClassification"


class OneImageTask(OneTask):
    """What `AutoModelForImageClassification` finds for a multi-task folder."""

    auto_class = "AutoModelForImageClassification"
