"""The config of a multi-task model: encoders, tasks, preprocessing, and what pruning left."""

import copy
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_mtcompress.errors import ArtifactError

FORMAT_VERSION = 1


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

    def encoder_config(self, name: str = "main") -> PreTrainedConfig:
        """A fresh config object of one encoder, or of the one that a branch shares."""
        # transformers registers this class while it imports `AutoConfig`.
        from transformers import AutoConfig

        values = copy.deepcopy((self.encoders or {})[self.root_of(name)])
        return AutoConfig.for_model(values.pop("model_type"), **values)

    def root_of(self, name: str) -> str:
        """The encoder that a branch shares; an encoder itself."""
        return (self.branches or {}).get(name, {}).get("encoder", name)
