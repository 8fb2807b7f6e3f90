"""Parameters of a model by what they belong to."""

import torch
from transformers import PreTrainedModel

from hf_mtcompress.model.base import SharedModel


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Numbers of parameters: `encoder`, with branches and `embedding` (the word embeddings) inside, and `head`."""
    encoders = list(model.encoders.values()) if isinstance(model, SharedModel) else [model.base_model]
    branches = list(model.branches.values()) if isinstance(model, SharedModel) else []
    encoder = sum(parameter.numel() for part in (*encoders, *branches) for parameter in part.parameters())
    tables = [table for part in encoders if (table := word_table(part)) is not None]
    return {
        "encoder": encoder,
        "embedding": sum(table.weight.numel() for table in tables),
        "head": sum(parameter.numel() for parameter in model.parameters()) - encoder,
    }


def word_table(encoder: torch.nn.Module) -> torch.nn.Embedding | None:
    """The word embeddings; None for images, whose input layer is a convolution."""
    assert isinstance(encoder, PreTrainedModel)
    try:
        table = encoder.get_input_embeddings()
    except NotImplementedError:
        return None
    return table if isinstance(table, torch.nn.Embedding) else None
