"""The weight matrices of a model that single weights can be taken out of."""

from torch import nn
from transformers import PreTrainedModel

from hf_mtcompress.errors import UnsupportedEncoderError
from hf_mtcompress.model.anatomy import encoder_of, find_anatomy
from hf_mtcompress.model.base import SharedModel
from hf_mtcompress.model.branches import Branch


def encoder_matrices(model: PreTrainedModel, *, embeddings: bool = False) -> dict[str, nn.Parameter]:
    """Weights of the linear layers in the encoder's stack, by name in `model`; of branches too.

    Biases, norms, poolers and task heads are none of them: they are small, and poolers and heads belong to the tasks.

    Args:
        model: a `MultiTaskModel`, or a stock model with or without a head.
        embeddings: the word embedding as well.

    Raises:
        UnsupportedEncoderError: the encoder is built in another way, its weights are quantized, or it has no word
            embedding where it is asked for.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedEncoderError(
            f"{type(model).__name__}: expected float weights, found a model that is quantized; start from the float "
            "model, and quantize it afterwards: weights that are 0 stay 0"
        )
    encoders = list(model.encoders.values()) if isinstance(model, SharedModel) else [encoder_of(model)]
    branches = list(model.branches.values()) if isinstance(model, SharedModel) else []
    inside = {module for branch in branches if isinstance(branch, Branch) for module in branch.layers.modules()}
    tables: set[nn.Module] = set()
    for encoder in encoders:
        assert isinstance(encoder, PreTrainedModel)
        anatomy = find_anatomy(encoder)
        inside |= set(anatomy.stack.modules())
        if not embeddings:
            continue
        if anatomy.word_embedding is None:
            raise UnsupportedEncoderError(
                f"{type(encoder).__name__}: expected a word embedding, found none in this encoder; leave embeddings out"
            )
        tables.add(anatomy.word_embedding)
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if (isinstance(module, nn.Linear) and module in inside) or module in tables:
            weight = module.get_parameter("weight")
            # A weight that is used twice is one matrix.
            if not any(weight is other for other in found.values()):
                found[f"{name}.weight"] = weight
    return found
