"""Unevenly cut stock models: they save their structure in `config.json` and are rebuilt from it.

transformers offers one place between building a model and loading its weights: the quantizer. Ours reshapes the modules
on the meta device; with weights in 8 or 4 bits it does so before bitsandbytes swaps the linear layers in. A float model
is not marked as quantized after loading, so it trains and saves like any other.
"""

import logging
from typing import Any

from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

from hf_mtcompress.environment import require_extra
from hf_mtcompress.errors import UnsupportedEncoderError
from hf_mtcompress.model.anatomy import encoder_of, find_anatomy
from hf_mtcompress.model.base import SharedModel, align_weights
from hf_mtcompress.model.embeddings import Bits, swap_embedding
from hf_mtcompress.model.loading import refuse_oversized, refuse_unfilled
from hf_mtcompress.model.marking import METHODS, SPARSE_METHOD, TORCHAO_METHOD, StructureConfig, write_mark
from hf_mtcompress.model.sparse import expanding_conversion
from hf_mtcompress.model.surgery import apply_structure

# Imported late: bitsandbytes - an extra.


def keep_exact(model: nn.Module) -> None:
    """Compute 4-bit layers in the precision of their input on every processor.

    On processors with AVX512-BF16, bitsandbytes 0.50 repacks a layer on its first forward pass in eval mode and
    computes in bfloat16 from then on. Saving undoes the packing, but with single quantization leaves the scales of the
    blocks in another order: the file and the model in memory are then both wrong (logits of MiniLM move by 0.05).
    Without packing what is saved and loaded is bit-equal.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def keep_loadable(model: nn.Module) -> None:
    """Let 8-bit layers take a checkpoint after they have run, as the best weights at the end of a training are.

    bitsandbytes 0.50 moves the scales of a layer's rows from the weight to a state of its own on the first forward
    pass; loading looks for them at the weight alone, and refuses.
    """
    from bitsandbytes.nn.modules import Linear8bitLt

    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.register_load_state_dict_pre_hook(_put_scales_back)


def _put_scales_back(module: Any, *args: Any) -> None:
    if module.weight.SCB is None:
        module.weight.SCB = module.state.SCB


def swap_word_embeddings(model: PreTrainedModel, bits: Bits | None) -> list[str]:
    """Give the word embeddings of a model's encoders empty tables of few bits; their names in the model.

    Raises:
        UnsupportedEncoderError: an encoder has none, or its rows cannot be stored so.
    """
    names = [] if bits is None else word_embeddings(model)
    for name in names:
        assert bits is not None
        swap_embedding(model, name, bits)
    return names


def word_embeddings(model: PreTrainedModel) -> list[str]:
    """Names of the word embeddings of a model's encoders.

    Raises:
        UnsupportedEncoderError: an encoder has none, or another part reads its weights too.
    """
    encoders = list(model.encoders.values()) if isinstance(model, SharedModel) else [encoder_of(model)]
    names = {module: name for name, module in model.named_modules()}
    found = []
    for encoder in encoders:
        assert isinstance(encoder, PreTrainedModel)
        table = find_anatomy(encoder).word_embedding
        if table is None:
            raise UnsupportedEncoderError(
                f"{type(encoder).__name__}: expected a word embedding to store in few bits, found none; leave "
                "embeddings out, which is for text encoders"
            )
        shared = [name for module, name in names.items() if module is not table and _weight_of(module) is table.weight]
        if shared:
            raise UnsupportedEncoderError(
                f"{type(model).__name__}: expected a word embedding of its own to store in few bits, found that "
                f"'{shared[0]}' shares its weights; leave embeddings out"
            )
        found.append(names[table])
    return found


def _weight_of(module: nn.Module) -> Any:
    return module._parameters.get("weight")


class StructureQuantizer(HfQuantizer):
    """Reshapes a model with float weights; nothing is quantized."""

    requires_calibration = False
    quantization_config: StructureConfig

    def preprocess_model(self, model: PreTrainedModel, dtype: Any = None, **kwargs: Any) -> None:
        apply_structure(encoder_of(model), self.quantization_config.structure)
        refuse_oversized(model, kwargs.get("checkpoint_files") or [], model.name_or_path)

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        refuse_unfilled(model, model.name_or_path)
        # The entry stays in the config, so that saving writes it again; the model itself is an ordinary one.
        model.config.quantization_config = self.quantization_config
        del model.hf_quantizer
        align_weights(model)
        return model

    # The base class annotates neither method, so a checker takes both for returning None.
    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True


class SparseQuantizer(StructureQuantizer):
    """Fills matrices that were stored without their zeros; the model is then like any other, and saves dense."""

    # Likewise.
    def get_weight_conversions(self) -> list[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return [expanding_conversion()]

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        _forget_conversions(model, "Expand")
        super().postprocess_model(model, **kwargs)
        write_mark(model.config, self.quantization_config.structure)
        return model


class ShapedFirst(HfQuantizer):
    """Reshapes a model before another method fills it with weights in few bits; mixed into that method's quantizer."""

    structure_config: StructureConfig

    def preprocess_model(self, model: PreTrainedModel, dtype: Any = None, **kwargs: Any) -> None:
        apply_structure(encoder_of(model), self.structure_config.structure)
        swap_word_embeddings(model, self.structure_config.embedding_bits)
        refuse_oversized(model, kwargs.get("checkpoint_files") or [], model.name_or_path)
        super().preprocess_model(model, dtype=dtype, **kwargs)

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        super().postprocess_model(model, **kwargs)
        if self.pre_quantized:
            refuse_unfilled(model, model.name_or_path)
        _forget_conversions(model, "Deserialize")
        model.config.quantization_config = self.structure_config
        align_weights(model)
        return model


class Structured8BitQuantizer(ShapedFirst, Bnb8BitHfQuantizer):
    """8-bit weights of bitsandbytes."""

    def __init__(self, quantization_config: StructureConfig, **kwargs: Any) -> None:
        super().__init__(_bitsandbytes(quantization_config), **kwargs)
        self.structure_config = quantization_config
        # bitsandbytes logs on every pass of every layer that it rounds its input to float16 on the way to 8 bits.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        keep_loadable(super().postprocess_model(model, **kwargs))
        return model


class Structured4BitQuantizer(ShapedFirst, Bnb4BitHfQuantizer):
    """4-bit weights of bitsandbytes, which are computed exactly."""

    def __init__(self, quantization_config: StructureConfig, **kwargs: Any) -> None:
        super().__init__(_bitsandbytes(quantization_config), **kwargs)
        self.structure_config = quantization_config

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        keep_exact(super().postprocess_model(model, **kwargs))
        return model


class StructuredTorchAoQuantizer(ShapedFirst, TorchAoHfQuantizer):
    """8-bit weights of torchao, which pass no gradient to their inputs."""

    def __init__(self, quantization_config: StructureConfig, **kwargs: Any) -> None:
        super().__init__(_torchao(quantization_config), **kwargs)
        self.structure_config = quantization_config

    # As in StructureQuantizer.
    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return False


QUANTIZERS: dict[str, type[HfQuantizer]] = {
    METHODS[None]: StructureQuantizer,
    METHODS[8]: Structured8BitQuantizer,
    METHODS[4]: Structured4BitQuantizer,
    TORCHAO_METHOD: StructuredTorchAoQuantizer,
    SPARSE_METHOD: SparseQuantizer,
}


def _forget_conversions(model: PreTrainedModel, kind: str) -> None:
    """Drop conversions of stored weights whose operations end so.

    What was converted on loading would be converted back on saving, for which these have no way.
    """
    conversions: list[Any] = vars(model).get("_weight_conversions") or []
    vars(model)["_weight_conversions"] = [
        item
        for item in conversions
        if not any(type(operation).__name__.endswith(kind) for operation in getattr(item, "operations", ()))
    ]


def _bitsandbytes(config: StructureConfig) -> BitsAndBytesConfig:
    found = BitsAndBytesConfig.from_dict(dict(config.bitsandbytes or {}))
    assert isinstance(found, BitsAndBytesConfig)
    return found


def _torchao(config: StructureConfig) -> TorchAoConfig:
    require_extra("torchao")
    found = TorchAoConfig.from_dict(dict(config.torchao or {}))
    assert isinstance(found, TorchAoConfig)
    return found
