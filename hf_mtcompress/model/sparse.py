"""Float weights stored without their zeros, in folders that open like any other after `import hf_mtcompress`.

A matrix `weight` with enough zeros becomes two tensors in the safetensors file: `weight_values`, the entries that are
not 0 row by row, and `weight_mask`, one bit for each entry (eight to a byte, the lowest first). Bits cost less than
indices of 32 bits as soon as more than one weight in 32 is left, and N:M patterns need nothing of their own. The entry
in `config.json` names the method `SPARSE_METHOD`; loading fills the matrices again, and the model in memory is dense.

Entries are kept by their bits, so that negative zeros and numbers that are not finite come back as they were.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter

from hf_mtcompress.errors import ArtifactError
from hf_mtcompress.model.marking import SPARSE_METHOD, StructureConfig, is_ours

VALUES, MASK = "_values", "_mask"
"""What the names of the two tensors add to that of the matrix."""

_INDEX = "model.safetensors.index.json"
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class SparseSizes:
    """Bytes of the weight files of a folder."""

    dense: int
    sparse: int
    matrices: int
    """How many were stored without their zeros."""


def pack(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Entries that are not 0, and a bit for each entry."""
    flat = matrix.detach().contiguous().flatten()
    nonzero = flat.view(_INTEGERS[flat.element_size()]) != 0
    bits = torch.zeros(-(-len(flat) // 8) * 8, dtype=torch.uint8)
    bits[: len(flat)] = nonzero
    places = 2 ** torch.arange(8, dtype=torch.uint8)
    return flat[nonzero].clone(), (bits.view(-1, 8) * places).sum(1, dtype=torch.uint8)


def unpack(values: Tensor, mask: Tensor, shape: torch.Size) -> Tensor:
    """The matrix again, as `pack` got it.

    Raises:
        ArtifactError: the three do not belong together.
    """
    count = shape.numel()
    needed = -(-count // 8)
    found = len(mask) if mask.dim() == values.dim() == 1 and mask.dtype == torch.uint8 else 0
    bits = torch.zeros(0, dtype=torch.bool, device=mask.device)
    if found == needed:
        places = torch.arange(8, dtype=torch.uint8, device=mask.device)
        bits = ((mask[:, None] >> places) & 1).flatten().bool()
    if found != needed or int(bits.sum()) != len(values) or bool(bits[count:].any()):
        raise ArtifactError(
            f"expected {needed} bytes of mask with a bit for each of {values.numel()} values of a matrix "
            f"{tuple(shape)}, found {found} bytes with {int(bits.sum())} bits; the folder is damaged, save it again"
        )
    flat = torch.zeros(count, dtype=values.dtype, device=values.device)
    flat[bits[:count]] = values
    return flat.view(shape)


class Expand(ConversionOps):
    """Fills one matrix while a model is loaded."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        model: Any = None,
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, list[Tensor]]:
        """`{"weight": matrix}` from the two tensors of its name."""
        parts = {
            pattern.rstrip("$"): found[0] if isinstance(found, list) else found for pattern, found in input_dict.items()
        }
        shape = model.get_parameter(full_layer_name).shape
        return {"weight": [unpack(parts[f"weight{VALUES}"], parts[f"weight{MASK}"], shape)]}


def expanding_conversion() -> WeightConverter:
    """How transformers loads matrices that were stored without their zeros."""
    return WeightConverter([f"weight{VALUES}$", f"weight{MASK}$"], "weight", [Expand()])


def save_sparse(model: PreTrainedModel, folder: str | os.PathLike[str]) -> SparseSizes:
    """Like `model.save_pretrained(folder)`, with matrices stored without their zeros where that is smaller.

    The folder opens bit-equal through the ordinary Auto classes after `import hf_mtcompress`. `save_pretrained` of the
    loaded model writes it dense again, for use without this package.

    Args:
        model: a `MultiTaskModel` or a stock model with float weights.
        folder: where to.

    Raises:
        ArtifactError: the weights are quantized.
    """
    model.save_pretrained(folder)
    return make_sparse(folder)


def make_sparse(folder: str | os.PathLike[str]) -> SparseSizes:
    """Rewrite the weight files of a saved folder without zeros, where that is smaller.

    Raises:
        ArtifactError: there is no saved model, or its weights are quantized.
    """
    place = Path(folder)
    config_file = place / "config.json"
    files = sorted(place.glob("*.safetensors"))
    if not config_file.is_file() or not files:
        raise ArtifactError(
            f"expected a saved model with config.json and safetensors in {place}, found none; save it there first"
        )
    config = json.loads(config_file.read_text(encoding="utf-8"))
    mark = config.get("quantization_config") or {}
    if mark and (not is_ours(mark) or mark.get("bitsandbytes") or mark.get("torchao")):
        raise ArtifactError(
            f"expected float weights to store without zeros, found {mark.get('quant_method')} in {place}; weights in "
            "8 or 4 bits are stored as they are: save the float model"
        )
    before = sum(file.stat().st_size for file in files)
    names = {file: _rewrite(file) for file in files}
    matrices = sum(name.endswith(MASK) for found in names.values() for name in found)
    if matrices:
        structure = StructureConfig(mark.get("structure"), quant_method=SPARSE_METHOD)
        config["quantization_config"] = structure.to_dict()
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _rewrite_index(place / _INDEX, names)
    return SparseSizes(before, sum(file.stat().st_size for file in files), matrices)


def _rewrite(file: Path) -> list[str]:
    """Store the matrices of a file without zeros where that is smaller; the names that it has then."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(file).items():
        if name.rpartition(".")[2] == "weight" and tensor.dim() > 1 and tensor.is_floating_point():
            values, mask = pack(tensor)
            if _bytes(values) + _bytes(mask) < _bytes(tensor):
                tensors |= {f"{name}{VALUES}": values, f"{name}{MASK}": mask}
                continue
        tensors[name] = tensor
    if any(name.endswith(f"weight{MASK}") for name in tensors):
        # Beside the old file, which is mapped into memory while its other tensors are copied.
        fresh = file.with_suffix(".fresh")
        save_file(tensors, fresh, metadata=metadata)
        fresh.replace(file)
    return list(tensors)


def _rewrite_index(index: Path, names: dict[Path, list[str]]) -> None:
    """Say in which of several files each tensor is now."""
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] = {name: file.name for file, found in names.items() for name in found}
        content.get("metadata", {}).pop("total_size", None)
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
