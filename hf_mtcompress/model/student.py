"""A student made of some of its teacher's layers."""

import copy
from collections.abc import Sequence

from hf_mtcompress.errors import UnsupportedEncoderError
from hf_mtcompress.model.adapters import refuse_adapters
from hf_mtcompress.model.branches import refuse_sub_models
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.surgery import keep_layers


def student_of(teacher: MultiTaskModel, layers: int | Sequence[int]) -> MultiTaskModel:
    """A copy of a teacher that keeps some layers; embeddings and heads are carried over.

    Args:
        teacher: left as it is.
        layers: how many (evenly spaced, the last one kept, as Sanh et al. 2019 initialise DistilBERT), or which ones,
            counted from 0.

    Raises:
        UnsupportedEncoderError: the teacher has no such layers, or adapters.
    """
    refuse_sub_models(teacher, "taking layers")
    refuse_adapters(teacher, "taking layers")
    depth = teacher.encoder.config.num_hidden_layers
    kept = [(index + 1) * depth // layers - 1 for index in range(layers)] if isinstance(layers, int) else sorted(layers)
    if not kept or len(set(kept)) != len(kept) or kept[0] < 0 or kept[-1] >= depth:
        raise UnsupportedEncoderError(
            f"expected layers of a teacher that has {depth} (counted from 0), found {layers}; choose 1 to {depth}"
        )
    # A teacher may be frozen; its student is there to be trained.
    student = copy.deepcopy(teacher).requires_grad_(True)
    keep_layers(student.encoder, kept)
    student.refresh_config()
    return student
