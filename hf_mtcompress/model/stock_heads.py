"""Fine-tuned stock checkpoints as tasks: what `MultiTaskModel.from_heads` starts from."""

import os
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from hf_mtcompress.errors import TaskError
from hf_mtcompress.model.anatomy import encoder_of
from hf_mtcompress.model.loading import load_whole
from hf_mtcompress.tasks import ImageClassification, SequenceClassification, Task, TokenClassification

_KINDS: dict[str, type[Task]] = {
    "ForSequenceClassification": SequenceClassification,
    "ForTokenClassification": TokenClassification,
    "ForImageClassification": ImageClassification,
}


def load_stock(checkpoint: str | os.PathLike[str] | PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
    """A stock model with a head, of the class that its config names.

    Raises:
        TaskError: the checkpoint has no head that a task here has.
    """
    if isinstance(checkpoint, PreTrainedModel):
        return checkpoint
    config = AutoConfig.from_pretrained(checkpoint, **kwargs)
    name = (config.architectures or [""])[0]
    stock: Any = getattr(transformers, name, None)
    if stock is None or not name.endswith(tuple(_KINDS)):
        raise TaskError(
            f"expected a checkpoint of a class {', '.join(f'...{kind}' for kind in _KINDS)}, found "
            f"'{name or 'no architecture'}' in '{checkpoint}'; pass a fine-tuned model with its head"
        )
    return load_whole(stock, checkpoint, dtype=torch.float32, **kwargs)[0]


def task_of_stock(name: str, stock: PreTrainedModel) -> Task:
    """The task that a stock model answers, with its labels in its own order; without columns.

    Raises:
        TaskError: the kind of head has no task here.
    """
    kind = next((kind for kind in _KINDS if type(stock).__name__.endswith(kind)), None)
    if kind is None:
        raise TaskError(
            f"task '{name}': expected a model of a class {', '.join(f'...{kind}' for kind in _KINDS)}, found "
            f"{type(stock).__name__}"
        )
    labels = [label for _, label in sorted((stock.config.id2label or {}).items())]
    if kind == "ForTokenClassification":
        return TokenClassification(name, labels=labels)
    problem = stock.config.problem_type or ("regression" if stock.config.num_labels == 1 else None)
    settings: dict[str, Any] = {"problem_type": problem} if problem else {}
    return _KINDS[kind](name, labels=None if problem == "regression" else labels, **settings)


def head_weights(stock: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Copies of the weights that are not the encoder's, named as in the heads of a `MultiTaskModel`."""
    prefix = f"{stock.base_model_prefix}."
    return {key: value.detach().clone() for key, value in stock.state_dict().items() if not key.startswith(prefix)}


def check_one_family(stocks: Mapping[str, PreTrainedModel]) -> None:
    """Heads of one model read one encoder.

    Raises:
        TaskError: the checkpoints are of different families or widths.
    """
    shapes = {
        name: (encoder_of(stock).config.model_type, encoder_of(stock).config.hidden_size)
        for name, stock in stocks.items()
    }
    if len(set(shapes.values())) > 1:
        raise TaskError(
            f"expected checkpoints of one family and width, found {shapes}; heads can only read the encoder that they "
            "were trained on, or one like it"
        )
