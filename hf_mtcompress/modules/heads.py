"""Heads that read a shared encoder's output: the stock head of a family, or a pooled one."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


class SharedEncoder(nn.Module):
    """Stands where a stock model has its own encoder, and answers with what the shared encoder computed already.

    It holds no weights. The output is kept in a list, not as an attribute, so that tracing for export sees no
    assignment of tensors to modules.
    """

    def __init__(self) -> None:
        super().__init__()
        self._outputs: list[Any] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._outputs[-1]

    def answer_with(self, outputs: Any, call: Callable[[], Any]) -> Any:
        """Run `call` while this stand-in answers with `outputs`."""
        self._outputs.append(outputs)
        try:
            return call()
        finally:
            self._outputs.pop()


def build_stock_head(stock_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A stock model with its encoder taken out: its head, its forward, none of its encoder's weights.

    Running the family's own forward keeps every family's head exact (BERT's pooler and dropout, DINOv2's class token
    beside the mean of the patches, ModernBERT's pooling) without one line about any of them here.

    Args:
        stock_class: such as `BertForSequenceClassification`.
        config: config of the encoder with `num_labels` set.
    """
    with torch.device("meta"):
        stock = stock_class._from_config(copy.deepcopy(config))
    setattr(stock, stock.base_model_prefix, SharedEncoder())
    return stock


class PooledHead(nn.Module):
    """Pooling, an optional dense layer with GELU, dropout and a linear layer.

    Args:
        hidden_size: width of the encoder.
        num_outputs: width of the logits.
        pooling: `cls`, `mean` (over attended positions), `max`, or None for the encoder's pooler output, else `cls`.
        dense: whether a dense layer stands before the classifier (head `mlp`).
        dropout: probability in [0, 1).
        per_token: no pooling, one answer for each position.
    """

    def __init__(
        self,
        hidden_size: int,
        num_outputs: int,
        *,
        pooling: str | None,
        dense: bool,
        dropout: float,
        per_token: bool,
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.per_token = per_token
        self.dense = nn.Linear(hidden_size, hidden_size) if dense else None
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden_size, num_outputs)

    def forward(self, outputs: BaseModelOutput, attention_mask: Tensor | None) -> Tensor:
        """Logits of shape (batch, outputs), or (batch, tokens, outputs) per token."""
        features = self._features(outputs, attention_mask)
        if self.dense is not None:
            features = nn.functional.gelu(self.dense(self.dropout(features)))
        return self.classifier(self.dropout(features))

    def _features(self, outputs: BaseModelOutput, attention_mask: Tensor | None) -> Tensor:
        hidden = outputs.last_hidden_state
        assert hidden is not None
        if self.per_token:
            return hidden
        pooled = outputs.get("pooler_output")
        if self.pooling is None and pooled is not None:
            return pooled
        if self.pooling in (None, "cls"):
            return hidden[:, 0]
        mask = torch.ones_like(hidden[..., 0]) if attention_mask is None else attention_mask.to(hidden.dtype)
        if self.pooling == "mean":
            return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return hidden.masked_fill(mask[..., None] == 0, torch.finfo(hidden.dtype).min).amax(1)
