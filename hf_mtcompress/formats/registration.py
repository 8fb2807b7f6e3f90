"""What transformers is told about this package; `registration_hooks` says when.

What is registered stands for classes that are loaded when a folder is opened. So a program that never opens one of ours
pays nothing, and no class is asked for while the module it needs, or its own, is still being imported:
`transformers.modeling_utils` imports `transformers.quantizers.auto` before it defines the base class of our models.
"""

from typing import Any, ClassVar

from hf_mtcompress.errors import ArtifactError, TaskError

# Imported late: transformers, hf_mtcompress - every start loads this module, and nothing slow with it.

PIPELINE = "multi-task"


def register() -> None:
    """Register everything with transformers; calling it again changes nothing.

    `import hf_mtcompress` does so by itself. Call it after modules of transformers were reloaded.
    """
    register_config()
    register_models()
    register_quantizers()
    register_pipeline()


def register_config() -> None:
    """Make `AutoConfig` read the config of a multi-task folder."""
    from transformers.models.auto.configuration_auto import AutoConfig

    from hf_mtcompress.model.configuration import MultiTaskConfig

    AutoConfig.register(MultiTaskConfig.model_type, MultiTaskConfig, exist_ok=True)


def register_models() -> None:
    """Make the Auto classes open multi-task folders, all tasks or one."""
    from transformers.models.auto import modeling_auto

    from hf_mtcompress.model.configuration import MultiTaskConfig

    for entry in (AllTasks, OneSequenceTask, OneTokenTask, OneImageTask):
        getattr(modeling_auto, entry.auto_class).register(MultiTaskConfig, entry, exist_ok=True)


def register_quantizers() -> None:
    """Make transformers rebuild the shapes of unevenly cut stock models, and read weights as we store them."""
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.quantizers.base import HfQuantizer

    from hf_mtcompress.model.marking import OUR_METHODS, StructureConfig

    class StructureReader(HfQuantizer):
        """Making one gives the quantizer of the config's method."""

        def __new__(cls, quantization_config: StructureConfig, **kwargs: Any) -> Any:
            from hf_mtcompress.model.structured import QUANTIZERS

            return QUANTIZERS[str(quantization_config.quant_method)](quantization_config, **kwargs)

    for method in OUR_METHODS:
        if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            register_quantization_config(method)(StructureConfig)
        if method not in AUTO_QUANTIZER_MAPPING:
            register_quantizer(method)(StructureReader)


def register_pipeline() -> None:
    """Make `pipeline("multi-task", ...)` known to transformers; calling it again changes nothing."""
    from transformers.models.auto.modeling_auto import AutoModel
    from transformers.pipelines import PIPELINE_REGISTRY

    # As transformers lists its own: the name of a class, which `PIPELINE_REGISTRY.register_pipeline` would not take.
    entry = {"impl": "hf_mtcompress.formats.pipeline.MultiTaskPipeline", "pt": (AutoModel,), "type": "multimodal"}
    PIPELINE_REGISTRY.supported_tasks.setdefault(PIPELINE, entry)


class AllTasks:
    """What `AutoModel` finds for a multi-task folder; it answers with a `MultiTaskModel`."""

    auto_class: ClassVar[str] = "AutoModel"

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """The model of a folder."""
        return _model_class().from_pretrained(*args, **kwargs)

    @classmethod
    def _from_config(cls, *args: Any, **kwargs: Any) -> Any:
        return _model_class()._from_config(*args, **kwargs)


class OneTask(AllTasks):
    """Loads one task of a multi-task folder as the stock class of its family.

    `AutoModelForSequenceClassification.from_pretrained(folder, task="intent")` ends here. `task` may be left out where
    only one task of the folder is of the kind.
    """

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
        model = _model_class().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        fitting = [name for name, found in model.tasks.items() if found.auto_class == cls.auto_class]
        if task is None and len(fitting) == 1:
            task = fitting[0]
        if task not in fitting:
            raise TaskError(
                f"expected task= one of {fitting} for {cls.auto_class}, found {task!r}; the folder's tasks are "
                f"{list(model.tasks)}, and pipeline('{PIPELINE}', model=...) answers all of them"
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


def _model_class() -> Any:
    from hf_mtcompress.model.modeling import MultiTaskModel

    return MultiTaskModel
