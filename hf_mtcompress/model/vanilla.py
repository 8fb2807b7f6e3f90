"""One task of a multi-task model as a stock transformers model."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from hf_mtcompress.artifacts import save_processor
from hf_mtcompress.errors import DataError, TaskError, UnsupportedEncoderError
from hf_mtcompress.model.adapters import merged_encoder
from hf_mtcompress.model.anatomy import encoder_of
from hf_mtcompress.model.base import SharedModel
from hf_mtcompress.model.surgery import apply_structure, describe_structure, is_vanilla, mark_structure
from hf_mtcompress.tasks import Task


def stock_class(task: Task, config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The family's own class for this kind of task, or None where transformers has none (CLIP's towers)."""
    auto = getattr(transformers, task.auto_class)
    if type(config) not in auto._model_mapping:
        return None
    found = auto._model_mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def to_stock(model: SharedModel, name: str) -> PreTrainedModel:
    """See `MultiTaskModel.to_stock`."""
    if name not in model.tasks:
        raise TaskError(f"expected one of the tasks {list(model.tasks)}, found '{name}'")
    if getattr(model, "is_quantized", False):
        raise UnsupportedEncoderError(
            f"task '{name}': expected float weights to write a plain transformers model, found quantized ones; keep "
            "the multi-task folder, or export the task before quantizing"
        )
    task = model.tasks[name]
    head = model.heads[task.head_name]
    encoder = merged_encoder(model, name)
    config = copy.deepcopy(encoder.config)
    task.configure(config)
    found = stock_class(task, config)
    if found is None or not isinstance(head, PreTrainedModel):
        raise TaskError(
            f"task '{name}': expected a stock head to write a plain transformers model, found head '{task.head}'"
            + (
                ""
                if found is not None
                else f" on {type(encoder).__name__}, for which transformers has no {task.auto_class}"
            )
            + "; train with `head: stock`, or use the multi-task folder or its ONNX form"
        )
    with torch.device("meta"):
        stock = found._from_config(config)
    apply_structure(encoder_of(stock), describe_structure(encoder))
    prefix = stock.base_model_prefix
    wanted = set(stock.state_dict())
    state = {f"{prefix}.{key}": value for key, value in encoder.state_dict().items()}
    state |= head.state_dict()
    # A part that only other heads read (BERT's pooler under a token head) has no place in this class.
    state = {key: value.detach().clone() for key, value in state.items() if key in wanted}
    stock.to_empty(device=encoder.device)
    _fill_buffers(stock, encoder, prefix)
    stock.load_state_dict(state, strict=True)
    stock.tie_weights()
    torch.nn.Module.to(stock, encoder.dtype)
    return stock.train(model.training)


def export_folder(model: SharedModel, name: str, folder: Path, processor: Any | None) -> Path:
    """See `MultiTaskModel.export_task`."""
    if not (processor is None or hasattr(processor, "save_pretrained")):
        raise DataError(
            f"expected a tokenizer or image processor to save beside the model, found {type(processor).__name__}; "
            "give the one that the encoder came with, or None to save none"
        )
    stock = to_stock(model, name)
    if not is_vanilla(encoder_of(stock)):
        mark_structure(stock)
    stock.save_pretrained(folder)
    if processor is not None:
        save_processor(processor, folder)
    return folder


def _fill_buffers(stock: PreTrainedModel, encoder: PreTrainedModel, prefix: str) -> None:
    """Copy buffers that are not in the state dict (position ids, rotary frequencies), which `to_empty` left unset."""
    source = dict(encoder.named_buffers())
    for key, buffer in stock.named_buffers():
        value = source.get(key.removeprefix(f"{prefix}."))
        if value is not None:
            buffer.copy_(value)
