"""What stands where pruning removed the whole of a block: modules without weights, or with a bias alone."""

from typing import Any

import torch
from torch import Tensor, nn


class Constant(nn.Module):
    """A linear layer all of whose inputs were cut: its bias, for every position.

    Args:
        out_features: width of the output.
        bias: of shape (out_features,), or None for zeros.
    """

    def __init__(self, out_features: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.in_features = 0
        self.out_features = out_features
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        """Nothing; some families' initialisation looks for it."""
        return torch.empty(self.out_features, 0)

    def forward(self, features: Tensor) -> Tensor:
        """(..., any width) to (..., out_features)."""
        shape = (*features.shape[:-1], self.out_features)
        constant = features.new_zeros(shape) if self.bias is None else self.bias.expand(shape)
        if torch.is_grad_enabled() and features.requires_grad:
            # Zero, so that what computed the input takes part in the backward pass: DDP waits for every weight.
            constant = constant + features[..., :0].sum()
        return constant

    def extra_repr(self) -> str:
        return f"out_features={self.out_features}, bias={self.bias is not None}"


class NoFeatures(nn.Module):
    """A linear layer all of whose outputs were cut."""

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = 0

    @property
    def weight(self) -> Tensor:
        """Nothing; some families' initialisation looks for it."""
        return torch.empty(0, self.in_features)

    def forward(self, features: Tensor) -> Tensor:
        """(..., in_features) to (..., 0)."""
        return features[..., :0]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}"


class EmptyAttention(nn.Module):
    """An attention without heads. It answers as the families' attentions do: a tuple of output and no weights.

    Args:
        head_size: width of the heads that were here.
        output: name and module of the output projection, where the attention holds it.
    """

    def __init__(self, head_size: int, output: tuple[str, Constant] | None) -> None:
        super().__init__()
        self.head_size = head_size
        self.output_name = None if output is None else output[0]
        if output is not None:
            self.add_module(*output)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """(batch, tokens, hidden) to (batch, tokens, hidden), or to width 0 where the projection stands outside."""
        if self.output_name is None:
            return hidden_states[..., :0], None
        return self.get_submodule(self.output_name)(hidden_states), None


class SelectHeads:
    """Forward pre-hook of an attention whose encoder computes one bias per head for all layers (MPNet).

    It hands on the bias of the heads that are left.

    Args:
        kept: indices of those heads among the encoder's.
        total: heads of the encoder.
    """

    def __init__(self, kept: list[int], total: int) -> None:
        self.kept = kept
        self.total = total

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Narrow every (batch, heads, tokens, tokens) tensor; masks have one head and pass."""
        return tuple(map(self._narrow, args)), {name: self._narrow(value) for name, value in kwargs.items()}

    def _narrow(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() == 4 and value.shape[1] == self.total > 1:
            return value.index_select(1, torch.tensor(self.kept, device=value.device))
        return value
