"""What the other files here may know of a multi-task model: its parts, not how it is built, run or saved."""

from abc import ABC, abstractmethod

from torch import nn
from transformers import PreTrainedModel

from hf_mtcompress.model.configuration import MultiTaskConfig
from hf_mtcompress.tasks import Task


class SharedModel(PreTrainedModel, ABC):
    """Encoders that tasks share, and what each task has for itself.

    Attributes:
        tasks: the tasks by name.
        encoders: encoders by name; a single one is `main`.
        branches: branches by name.
        heads: heads by `task_<name>`.
        adapters: adapters by `task_<name>`, of the tasks that have one.
    """

    config: MultiTaskConfig
    tasks: dict[str, Task]
    encoders: nn.ModuleDict
    branches: nn.ModuleDict
    heads: nn.ModuleDict
    adapters: nn.ModuleDict

    @property
    def encoder(self) -> PreTrainedModel:
        """The only encoder, or the one called `main`."""
        encoder = self.encoders["main"]
        assert isinstance(encoder, PreTrainedModel)
        return encoder

    @abstractmethod
    def refresh_config(self) -> None:
        """Bring the config in step with the modules, after surgery on an encoder."""


def align_weights(model: nn.Module) -> None:
    """Move weights that start off a cache line (as tensors inside a safetensors file do) to fresh memory.

    Matrix kernels take other paths, and round otherwise, on unaligned memory: without this a loaded model differs from
    the saved one in the last bits.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
