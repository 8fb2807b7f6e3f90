"""The entry `quantization_config` by which an unevenly cut stock model says how it is to be rebuilt.

transformers hands a model to the method named there between building it and filling it with weights, which is where the
shapes must change. `import hf_mtcompress` registers the methods; see `hf_mtcompress.model.structured`.
"""

from collections.abc import Mapping
from typing import Any, Literal

from transformers import PreTrainedConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_mtcompress.errors import ArtifactError

FORMAT_VERSION = 1
FLOAT_METHOD = "mtcompress"
METHODS = {None: FLOAT_METHOD, 8: f"{FLOAT_METHOD}_8bit", 4: f"{FLOAT_METHOD}_4bit"}
"""By the bits that the weights are stored in."""
TORCHAO_METHOD = f"{FLOAT_METHOD}_torchao"
"""Weights in 8 bits, computed by torchao."""
SPARSE_METHOD = f"{FLOAT_METHOD}_sparse"
"""Float weights of which some matrices are stored without their zeros; see `hf_mtcompress.model.sparse`."""


OUR_METHODS = (*METHODS.values(), TORCHAO_METHOD, SPARSE_METHOD)


class StructureConfig(QuantizationConfigMixin):
    """What pruning left of the encoder, and how its weights are stored.

    Args:
        structure: see `hf_mtcompress.model.surgery`; None where nothing was cut or the model knows it by itself.
        bitsandbytes: fields of a `BitsAndBytesConfig` for weights of 8 or 4 bits; None for float weights.
        torchao: fields of a `TorchAoConfig`; None for other weights.
        embedding_bits: 8 or 4 where the word embedding has so many, see `hf_mtcompress.model.embeddings`.
        format_version: of this entry; newer ones are refused.
        quant_method: name of the method; follows from the fields above, unless it is `SPARSE_METHOD`.
    """

    embedding_bits: Literal[8, 4] | None = None
    torchao: Mapping[str, Any] | None = None

    def __init__(
        self,
        structure: Mapping[str, Any] | None = None,
        bitsandbytes: Mapping[str, Any] | None = None,
        embedding_bits: Literal[8, 4] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str | None = None,
        torchao: Mapping[str, Any] | None = None,
    ) -> None:
        if format_version > FORMAT_VERSION:
            raise ArtifactError(
                f"expected a structure of format_version {FORMAT_VERSION} or older, found {format_version}; "
                "update hf_mtcompress to load this model"
            )
        bits = None if bitsandbytes is None else 8 if bitsandbytes.get("load_in_8bit") else 4
        # The base class names the type of its own methods, an enumeration; plain names are what registration takes.
        plain = METHODS[bits] if torchao is None else TORCHAO_METHOD
        method = SPARSE_METHOD if quant_method == SPARSE_METHOD else plain
        self.quant_method = method  # pyright: ignore[reportAttributeAccessIssue]
        self.format_version = format_version
        self.structure = None if structure is None else dict(structure)
        if embedding_bits is not None:  # folders without it stay as they were, and open with older versions
            self.embedding_bits = embedding_bits
        if torchao is not None:  # likewise
            self.torchao = dict(torchao)
        self.bitsandbytes = None if bitsandbytes is None else dict(bitsandbytes)


def read_mark(config: PreTrainedConfig) -> StructureConfig | None:
    """The entry in `config`, if it is ours."""
    found = config.__dict__.get("quantization_config")
    if isinstance(found, StructureConfig):
        return found
    if isinstance(found, dict) and is_ours(found):
        return StructureConfig(**found)
    return None


def is_ours(entry: Mapping[str, Any]) -> bool:
    """Whether an entry `quantization_config` names one of our methods."""
    return entry.get("quant_method") in OUR_METHODS


def write_mark(config: PreTrainedConfig, structure: Mapping[str, Any] | None) -> None:
    """Put `structure` into `config`; None takes our entry out. The entry of another method is left alone."""
    if structure is not None:
        config.quantization_config = StructureConfig(structure)
    elif read_mark(config) is not None:
        del config.__dict__["quantization_config"]
