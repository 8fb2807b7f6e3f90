"""Weights in 8 or 4 bits with bitsandbytes or torchao, saved and reloaded through transformers.

Only linear layers of the encoder's stack are stored in fewer bits; heads, pooler and embeddings stay float. On a CPU
this makes a model smaller, and hardly faster: for speed there, export to ONNX and quantize that.
"""

import copy
import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_mtcompress.environment import require_extra
from hf_mtcompress.errors import UnsupportedEncoderError
from hf_mtcompress.model.adapters import ADAPTERS
from hf_mtcompress.model.anatomy import encoder_of, find_anatomy
from hf_mtcompress.model.base import align_weights
from hf_mtcompress.model.branches import refuse_sub_models
from hf_mtcompress.model.embeddings import quantized_table
from hf_mtcompress.model.marking import StructureConfig, read_mark
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.structured import keep_exact, word_embeddings

logger = logging.getLogger(__name__)

_BFLOAT16_BLOCK = (32, 64)
"""Rows and columns that the bfloat16 kernel for 4 bits works on; two weights share a byte otherwise."""


def quantize_bitsandbytes(
    model: PreTrainedModel,
    bits: Literal[8, 4],
    *,
    quant_type: Literal["nf4", "fp4"] = "nf4",
    double_quantization: bool = False,
    embeddings: bool = False,
) -> PreTrainedModel:
    """A copy of `model` with the linear layers of its encoder in 8 bits (LLM.int8) or 4 bits (NF4, FP4).

    The copy computes in float32 around those layers. `save_pretrained` writes it; `from_pretrained` gives it back
    bit-equal. The one exception are 4 bits in a stock model that plain transformers loads by itself: opened so, a
    processor with AVX512-BF16 computes it in bfloat16 (logits of MiniLM then differ by 3e-4), and layers of sizes that
    this kernel cannot take stay float.

    Args:
        model: a `MultiTaskModel` or a stock model, with float weights.
        bits: 8 or 4.
        quant_type: of 4 bits: quantiles of a normal distribution, or floats of 4 bits.
        double_quantization: of 4 bits: store the scales of the blocks in 8 bits too, which saves 0.4 bits a weight.
        embeddings: store the word embedding in as many bits (4 bits as NF4), which in a small encoder is half of all
            weights. Such a folder needs `import hf_mtcompress` to open.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
        UnsupportedEncoderError: the encoder is built in another way, or quantized already.

    References:
        Dettmers et al.: LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale. NeurIPS 2022.
        Dettmers et al.: QLoRA: Efficient Finetuning of Quantized LLMs. NeurIPS 2023 (NF4).
    """
    require_extra("bitsandbytes")
    if bits not in (8, 4):
        raise ValueError(f"bits: expected 8 or 4, found {bits}")
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type: expected 'nf4' or 'fp4', found '{quant_type}'")
    if bits == 8 and (quant_type != "nf4" or double_quantization):
        raise ValueError("quant_type, double_quantization: expected them with 4 bits only, found 8; leave them out")
    _check_start(model, "bitsandbytes")
    mark = read_mark(model.config)
    # Where the package is needed for loading anyway, layers of any size are computed exactly.
    ours = isinstance(model, MultiTaskModel) or mark is not None or embeddings
    settings = BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quantization,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=_skipped(model, bits, exact=ours),
    )
    structure = mark.structure if mark else None
    wanted = StructureConfig(structure, settings.to_dict(), bits if embeddings else None) if ours else settings
    weights = model.state_dict()
    for name in word_embeddings(model) if embeddings else ():
        weights[f"{name}.weight"], weights[f"{name}.scale"] = quantized_table(weights[f"{name}.weight"], bits)
    quantized = _filled(model, weights, wanted)
    if bits == 4:
        keep_exact(quantized)
    return quantized


def quantize_torchao(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` with the linear layers of its encoder in 8 bits, computed by torchao.

    Weights have one scale a row, activations one a token, found while the model runs, so that no row of a batch changes
    the answers of another. The copy is for inference. `save_pretrained` writes it; `from_pretrained` gives it back
    bit-equal. A stock model that was not cut unevenly opens with transformers and torchao alone.

    Args:
        model: a `MultiTaskModel` or a stock model, with float weights.

    Raises:
        MissingExtraError: torchao is not installed.
        UnsupportedEncoderError: the encoder is built in another way, or quantized already.

    References:
        Or et al.: TorchAO: PyTorch-Native Training-to-Serving Model Optimization. ICML 2025 workshop CODEML.
    """
    require_extra("torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig  # of the extra "torchao"

    _check_start(model, "torchao")
    mark = read_mark(model.config)
    settings = TorchAoConfig(
        Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=_skipped(model, 8, exact=True)
    )
    structure = mark.structure if mark else None
    ours = isinstance(model, MultiTaskModel) or mark is not None
    quantized = _filled(
        model, model.state_dict(), StructureConfig(structure, torchao=settings.to_dict()) if ours else settings
    )
    # Unlike bitsandbytes, which needs its device while it loads, torchao loads on the CPU.
    nn.Module.to(quantized, model.device)
    return quantized


def _check_start(model: PreTrainedModel, backend: str) -> None:
    if isinstance(model, MultiTaskModel):
        refuse_sub_models(model, f"quantization by {backend}")
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedEncoderError(
            f"{type(model).__name__}: expected float weights, found a model that is quantized already; start from the "
            "float model"
        )
    if isinstance(model, MultiTaskModel):
        model.refresh_config()


def _filled(
    model: PreTrainedModel, weights: Mapping[str, Any], quantization_config: QuantizationConfigMixin
) -> PreTrainedModel:
    """A model of the same class and shapes with float `weights` stored as `quantization_config` says."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    quantized = type(model).from_pretrained(
        None, config=config, state_dict=weights, quantization_config=quantization_config, dtype=model.dtype
    )
    align_weights(quantized)
    if isinstance(model, MultiTaskModel) and isinstance(quantized, MultiTaskModel):
        # With the columns of their data, which the config does not hold: adapters can be trained on some copies.
        quantized.tasks = dict(model.tasks)
    return quantized


def _skipped(model: PreTrainedModel, bits: int, *, exact: bool) -> list[str]:
    """Names of the linear layers that stay float: those outside of the stack, and those of sizes that do not fit."""
    encoders = model.encoders.values() if isinstance(model, MultiTaskModel) else [encoder_of(model)]
    inside: set[nn.Module] = set()
    for encoder in encoders:
        assert isinstance(encoder, PreTrainedModel)
        inside |= set(find_anatomy(encoder).stack.modules())
    rows, columns = (1, 1) if bits == 8 else (1, 2) if exact else _BFLOAT16_BLOCK
    # With a single column, torch's product of 8-bit matrices (2.13, CPU) is wrong.
    fewest = 2
    # Adapters, also those that are added later, are trained: they stay float whatever their sizes.
    skipped, odd = ([ADAPTERS] if isinstance(model, MultiTaskModel) else []), []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name.startswith(f"{ADAPTERS}."):
            continue
        if module not in inside:
            skipped.append(name)
        elif module.out_features % rows or module.in_features % columns or module.in_features < fewest:
            odd.append(name)
    if odd:
        logger.warning(
            "%d linear layers stay float, such as '%s': %d bits need multiples of %d rows and %d columns (2 at least)",
            len(odd),
            odd[0],
            bits,
            rows,
            columns,
        )
    return skipped + odd
