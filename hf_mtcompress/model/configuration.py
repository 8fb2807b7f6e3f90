"""The config of a multi-task model: encoders, tasks, preprocessing, and what pruning left."""

import copy
from typing import Any

from huggingface_hub.dataclasses import strict
from pydantic import ConfigDict, PositiveInt, TypeAdapter, ValidationError
from transformers import PreTrainedConfig

from hf_mtcompress.errors import ArtifactError, mistakes
from hf_mtcompress.model.loading import refuse_counts

FORMAT_VERSION = 1
_FIELDS: dict[str, TypeAdapter[Any]] = {
    name: TypeAdapter(kind, config=ConfigDict(strict=True))
    for name, kind in {
        "encoders": dict[str, dict[str, Any]],
        "tasks": list[dict[str, Any]],
        "preprocessing": dict[str, dict[str, PositiveInt]],
        "branches": dict[str, dict[str, Any]],
        "adapters": dict[str, dict[str, Any]],
        "structure": dict[str, dict[str, Any]],
        "without_pooler": list[str],
    }.items()
}
"""What is inside the dicts is checked by those who read them."""
_FROM_ONE = ("hidden_size", "num_attention_heads", "num_hidden_layers")
"""Numbers, or lists of them, by the names that every family's config knows them under."""


@strict
class MultiTaskConfig(PreTrainedConfig):
    """Describes encoders and the tasks that read them.

    Args:
        format_version: of this file; newer ones are refused.
        encoders: configs by encoder name; one encoder is called `main`.
        tasks: task specs without columns (`Task.to_dict`), in order.
        preprocessing: by encoder name: `max_length` in tokens or `image_size` in pixels.
        branches: by branch name: {"encoder": whose lower layers it shares, "layers": how many top layers are its own}.
        adapters: by task name: {"rank", "alpha", "dropout", "targets"} of its adapter (see `model/adapters.py`).
        without_pooler: names of encoders that came without the pooler that their class may have.
        structure: by encoder name: what pruning left, by layer index and role (see `model/surgery.py`); empty if whole.
    """

    model_type = "mtcompress"

    format_version: int = FORMAT_VERSION
    encoders: dict | None = None
    tasks: list | None = None
    preprocessing: dict | None = None
    branches: dict | None = None
    adapters: dict | None = None
    structure: dict | None = None
    without_pooler: list | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.format_version > FORMAT_VERSION:
            raise ArtifactError(
                f"expected a model of format_version {FORMAT_VERSION} or older, found {self.format_version}; "
                "update hf_mtcompress to load it"
            )
        self.encoders = self.encoders or {}
        self.tasks = self.tasks or []
        self.preprocessing = self.preprocessing or {}
        self.branches = self.branches or {}
        self.adapters = self.adapters or {}
        self.structure = self.structure or {}
        self.without_pooler = self.without_pooler or []
        for name, kind in _FIELDS.items():
            try:
                kind.validate_python(getattr(self, name))
            except ValidationError as error:
                raise ArtifactError(
                    f"expected a config of a multi-task model, found {name}.{mistakes(error)}; restore the config, or "
                    "save the model again"
                ) from error
        refuse_counts(self.encoders, "the encoders of a multi-task model")

    def encoder_config(self, name: str = "main") -> PreTrainedConfig:
        """A fresh config object of one encoder, or of the one that a branch shares."""
        # transformers registers this class while it imports `AutoConfig`.
        from transformers import AutoConfig

        root = self.root_of(name)
        values = copy.deepcopy((self.encoders or {}).get(root, {}))
        if "model_type" not in values:
            raise ArtifactError(
                f"expected a config with a model_type for the encoder '{root}', found {len(values)} fields without it "
                f"among the encoders {list(self.encoders or {})}; restore the config, or save the model again"
            )
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        for key in _FROM_ONE:
            found = getattr(config, key, None)
            if any(isinstance(size, int) and size < 1 for size in (found if isinstance(found, list) else [found])):
                raise ArtifactError(
                    f"expected {key} of at least 1 in the config of the encoder '{root}', found {found}; restore the "
                    "config, or save the model again"
                )
        return config

    def root_of(self, name: str) -> str:
        """The encoder that a branch shares; an encoder itself."""
        return (self.branches or {}).get(name, {}).get("encoder", name)
