"""Multi-task folders, which PyTorch runs, in float precision or in few bits."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoConfig,
    PreTrainedConfig,
)

from hf_mtcompress.data.readers import load_reader
from hf_mtcompress.environment import require_extra
from hf_mtcompress.formats.folders import folder_form
from hf_mtcompress.formats.runtime import Runtime
from hf_mtcompress.model.configuration import MultiTaskConfig
from hf_mtcompress.model.loading import opening, read_config
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.records import FORMS


class TorchRuntime(Runtime):
    """A multi-task folder, in float precision or quantized by bitsandbytes or torchao."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        set_threads(threads)
        self.folder = folder
        config = load_config(folder)
        assert isinstance(config, MultiTaskConfig)
        self.form = folder_form(folder)
        if (extra := FORMS[self.form].extra) is not None:
            require_extra(extra)
        self.model: MultiTaskModel = MultiTaskModel.from_pretrained(folder).eval()
        self.tasks = dict(self.model.tasks)
        self.reader = load_reader(folder, (config.preprocessing or {}).get("main", {}).get("max_length"))

    def logits(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            output = self.model(**self.model.inputs_in(as_tensors(batch)))
            return {name: as_array(output[task.logits_name]) for name, task in self.tasks.items()}


def load_config(folder: Path) -> PreTrainedConfig:
    """The config of a folder of ours or of a stock model.

    Raises:
        ArtifactError: it is damaged.
    """
    with opening(folder):
        read_config(folder)
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def set_threads(threads: int | None) -> None:
    """Threads within an operation of PyTorch, for the whole process; None leaves them."""
    if threads is not None:
        torch.set_num_threads(threads)


def as_tensors(batch: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Arrays as tensors."""
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}


def as_array(logits: torch.Tensor) -> np.ndarray:
    """Logits as a float32 array."""
    return logits.float().numpy()
