"""Word embeddings in 8 or 4 bits, which bitsandbytes can neither save nor load.

A row is looked up, then brought back to float, so only the rows of a text's tokens are computed. The weights stay in
few bits on disk and in memory.

Reference:
    Dettmers et al.: QLoRA: Efficient Finetuning of Quantized LLMs. NeurIPS 2023 (NF4, the sixteen numbers below).
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

Bits = Literal[8, 4]

BLOCK = 64
"""Numbers of a row that share a scale in 4 bits, as in bitsandbytes; in 8 bits a row has one scale."""

_NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
"""Quantiles of a normal distribution: each of the sixteen is as likely as the others."""


class QuantizedEmbedding(nn.Embedding):
    """An embedding whose table holds integers, and scales beside it. It cannot be trained.

    Args:
        num_embeddings: rows.
        embedding_dim: numbers of a row; even for 4 bits.
        bits: 8 (a number is an integer of -127 to 127 times its row's scale) or 4 (NF4, two to a byte).
        padding_idx: as in `nn.Embedding`.

    Attributes:
        weight: int8 of shape (rows, dim), or uint8 of shape (rows, dim / 2).
        scale: float32 of shape (rows, 1), or (rows, blocks of 64).
    """

    scale: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, bits: Bits, padding_idx: int | None = None) -> None:
        if bits == 4 and embedding_dim % 2:
            raise ValueError(f"embedding_dim: expected an even number for 4 bits, found {embedding_dim}")
        # The base class would make a float table of full size first.
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.bits = bits
        shape, dtype = ((embedding_dim,), torch.int8) if bits == 8 else ((embedding_dim // 2,), torch.uint8)
        weight = torch.empty(num_embeddings, *shape, dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        scales = 1 if bits == 8 else math.ceil(embedding_dim / BLOCK)
        self.register_buffer("scale", torch.empty(num_embeddings, scales))

    def forward(self, input: Tensor) -> Tensor:
        """(...) of row numbers to (..., dim) in the precision of the scales."""
        rows, scale = self.weight[input], self.scale[input]
        if self.bits == 8:
            return rows.to(scale.dtype) * scale
        places = torch.stack([rows >> 4, rows & 15], dim=-1).flatten(-2)
        numbers = _NF4.to(scale)[places.long()]
        return numbers * scale.repeat_interleave(BLOCK, dim=-1)[..., : self.embedding_dim]

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}"


def quantized_table(table: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """Weight and scale of a `QuantizedEmbedding` for a float table of shape (rows, dim)."""
    table = table.detach().float()
    if bits == 8:
        scale = table.abs().amax(1, keepdim=True) / 127
        return (table / scale.clamp(min=1e-30)).round().to(torch.int8), scale
    rows, width = table.shape
    padded = nn.functional.pad(table, (0, -width % BLOCK)).view(rows, -1, BLOCK)
    scale = padded.abs().amax(2)
    numbers = (padded / scale.clamp(min=1e-30).unsqueeze(-1)).flatten(1)[:, :width]
    # The nearest of the sixteen: the borders are in the middle between two.
    places = torch.bucketize(numbers.contiguous(), (_NF4[1:] + _NF4[:-1]) / 2).to(torch.uint8)
    return (places[:, 0::2] << 4) | places[:, 1::2], scale


def swap_embedding(model: nn.Module, name: str, bits: Bits) -> None:
    """Put an empty table of few bits in the place of the embedding `name`, on its device."""
    old = model.get_submodule(name)
    assert isinstance(old, nn.Embedding)
    with torch.device(old.weight.device):
        model.set_submodule(name, QuantizedEmbedding(old.num_embeddings, old.embedding_dim, bits, old.padding_idx))
