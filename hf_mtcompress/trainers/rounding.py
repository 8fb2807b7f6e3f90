"""Training of weights that will be stored in few bits: numbers are rounded as the runtime will round them."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_mtcompress.errors import UnsupportedEncoderError
from hf_mtcompress.formats.onnx.quantize import block_size_problems, fits_blocks
from hf_mtcompress.formats.onnx.tables import worth_four_bits
from hf_mtcompress.model.adapters import ADAPTERS
from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.model.branches import refuse_sub_models
from hf_mtcompress.model.modeling import MultiTaskModel

Bits = Literal[8, 4]


class RoundToBits(TrainerCallback):
    """Quantization-aware training, in any `Trainer`: `callbacks=[RoundToBits(8)]`.

    While the model is trained and evaluated, its linear layers and embeddings compute with rounded weights and rounded
    activations, as ONNX Runtime will when `quantize_onnx` has stored them in as many bits (in 8 bits, on batches of the
    same rows, which share their range); gradients pass the rounding as if it were not there. Parameters, checkpoints
    and the saved model stay float: quantize them afterwards, with the same settings. The last layer of each head stays
    float, as it does there.

    Args:
        bits: 8 (dynamic) or 4.
        block_size: of what is in 4 bits, as in `quantize_onnx`.
        embedding_bits: 4 or 8; default: as many as `bits`.
        float_layers: encoder layers that stay in float, counted from 0.

    Raises:
        ValueError: other numbers of bits, or a block size that does not exist.

    References:
        Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
            Inference", CVPR.
        Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
            Computation" (gradients that pass).
    """

    def __init__(
        self,
        bits: Bits = 8,
        *,
        block_size: int = 64,
        embedding_bits: Bits | None = None,
        float_layers: Sequence[int] = (),
    ) -> None:
        if bits not in (8, 4):
            raise ValueError(f"bits: expected 8 or 4, found {bits}")
        if problems := block_size_problems(block_size):
            raise ValueError(*problems)
        if embedding_bits not in (None, 8, 4):
            raise ValueError(f"embedding_bits: expected 8 or 4, found {embedding_bits}")
        self.bits = bits
        self.block_size = block_size
        self.table_bits: Bits = embedding_bits or bits
        self.float_layers = tuple(float_layers)
        self._rounded: list[tuple[nn.Module, type[nn.Module]]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the model compute with rounded numbers.

        Raises:
            UnsupportedEncoderError: `float_layers` names layers that cannot be told apart, or that do not exist, or the
                model has branches beside them.
        """
        model = kwargs["model"]
        self.install(getattr(model, "module", model))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let it compute in float again."""
        self.remove()

    def install(self, model: PreTrainedModel) -> None:
        """Let a model compute with rounded numbers until `remove`."""
        self.remove()
        skipped = _last_layers(model) | _layers_of(model, self.float_layers)
        tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        most_rows = max((table.num_embeddings for table in tables), default=0)
        for name, module in model.named_modules():
            if module in skipped or f"{ADAPTERS}." in f"{name}.":
                continue
            if isinstance(module, nn.Linear):
                bits = 4 if self.bits == 4 and fits_blocks(module.in_features, self.block_size) else 8
                forward = linear_forward(bits, self.block_size)
            elif isinstance(module, nn.Embedding):
                four = self.table_bits == 4 and worth_four_bits(module.weight.shape, most_rows)
                forward = _embedding_forward(4 if four else 8, self.block_size)
            else:
                continue
            self._rounded.append((module, type(module)))
            # A class and not a function on the instance: copies and replicas then compute with their own weights.
            rounded: Any = type(f"Rounded{type(module).__name__}", (type(module),), {"forward": forward})
            module.__class__ = rounded

    def remove(self) -> None:
        """Let the model compute in float again."""
        for module, own in self._rounded:
            module.__class__ = own
        self._rounded = []


# ---- layers ----


def linear_forward(bits: int, block_size: int) -> Callable[[nn.Linear, Tensor], Tensor]:
    """What a linear layer computes with rounded weights and inputs, in 8 or 4 bits."""

    def forward(self: nn.Linear, input: Tensor) -> Tensor:
        weight, values = self.weight.float(), input.float()
        if bits == 8:
            weight, values = round_rows(weight), round_tensor(values)
        else:
            weight, values = round_blocks(weight, block_size), round_block_activations(values, block_size)
        bias = None if self.bias is None else self.bias.float()
        output = nn.functional.linear(values, weight, bias)
        return output if self.weight.dtype == torch.float32 else output.to(self.weight.dtype)

    return forward


def _embedding_forward(bits: int, block_size: int) -> Callable[[nn.Embedding, Tensor], Tensor]:
    def forward(self: nn.Embedding, input: Tensor) -> Tensor:
        table = self.weight.float()
        table = round_tensor(table) if bits == 8 else round_blocks(table, block_size, half_scales=True)
        return nn.functional.embedding(input, table, self.padding_idx).to(self.weight.dtype)

    return forward


def _last_layers(model: nn.Module) -> set[nn.Module]:
    """The linear layers that logits come from; of a stock model, all outside of its encoder."""
    if isinstance(model, MultiTaskModel):
        found = [[part for part in head.modules() if isinstance(part, nn.Linear)] for head in model.heads.values()]
        return {parts[-1] for parts in found if parts}
    inside = set(model.base_model.modules()) if isinstance(model, PreTrainedModel) else set()
    return {part for part in model.modules() if isinstance(part, nn.Linear) and part not in inside}


def _layers_of(model: PreTrainedModel, numbers: Sequence[int]) -> set[nn.Module]:
    """All modules of encoder layers."""
    if not numbers:
        return set()
    if isinstance(model, MultiTaskModel):
        refuse_sub_models(model, "training with float_layers")
    encoders = model.encoders.values() if isinstance(model, MultiTaskModel) else [model.base_model]
    found: set[nn.Module] = set()
    for encoder in encoders:
        assert isinstance(encoder, PreTrainedModel)
        layers = find_anatomy(encoder).layers
        if missing := [number for number in numbers if not 0 <= number < len(layers)]:
            raise UnsupportedEncoderError(
                f"float_layers: expected layers among 0 to {len(layers) - 1}, found {missing}; count from 0"
            )
        found |= {part for number in numbers for part in layers[number].module.modules()}
    return found


# ---- numbers ----


def round_rows(weight: Tensor) -> Tensor:
    """8 bits with a scale for each output channel.

    Args:
        weight: (outputs, inputs).
    """
    scale = weight.detach().abs().amax(dim=1, keepdim=True) / 127
    return _rounded(weight, scale, None, -127, 127)


def round_tensor(values: Tensor) -> Tensor:
    """8 bits from the smallest to the largest of all numbers: those of a batch, or of a table."""
    low, high = values.detach().amin().clamp(max=0), values.detach().amax().clamp(min=0)
    scale = (high - low) / 255
    return _rounded(values, scale, _zero_point(low, scale, 255), 0, 255)


def round_blocks(weight: Tensor, block_size: int, half_scales: bool = False) -> Tensor:
    """4 bits in blocks along the second axis, each with a scale and a zero point.

    Args:
        weight: (outputs, inputs); the last block is filled up with zeros.
        block_size: numbers in a block.
        half_scales: store scales in half precision, unless one of them is beyond its range: as tables are.
    """
    blocks = _blocks(weight, block_size)
    low = blocks.detach().amin(dim=-1, keepdim=True).clamp(max=0)
    high = blocks.detach().amax(dim=-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 15
    if half_scales:
        limits, used = torch.finfo(torch.float16), scale[scale > 0]
        if bool(((used >= limits.tiny) & (used <= limits.max)).all()):
            scale = scale.half().float()
    rounded = _rounded(blocks, scale, _zero_point(low, scale, 15), 0, 15)
    return rounded.flatten(-2)[..., : weight.shape[-1]]


def round_block_activations(values: Tensor, block_size: int) -> Tensor:
    """8 bits in blocks along the last axis, each with a scale."""
    blocks = _blocks(values, block_size)
    scale = blocks.detach().abs().amax(dim=-1, keepdim=True) / 127
    return _rounded(blocks, scale, None, -127, 127).flatten(-2)[..., : values.shape[-1]]


def _blocks(values: Tensor, block_size: int) -> Tensor:
    missing = -values.shape[-1] % block_size
    return nn.functional.pad(values, (0, missing)).unflatten(-1, (-1, block_size))


def _zero_point(low: Tensor, scale: Tensor, largest: int) -> Tensor:
    return torch.where(scale > 0, (-low / scale.clamp(min=1e-30)).round(), 0).clamp(0, largest)


def _rounded(values: Tensor, scale: Tensor, zero_point: Tensor | None, low: int, high: int) -> Tensor:
    """The nearest numbers that can be stored; gradients are those of `values`."""
    # All numbers of a block of zeros are 0.
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = 0 if zero_point is None else zero_point
    stored = ((values.detach() / safe).round() + zero).clamp(low, high)
    return values + ((stored - zero) * safe - values.detach())
