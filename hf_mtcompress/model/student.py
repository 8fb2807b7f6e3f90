"""A student made of some of its teacher's layers, or of its teacher's shape."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModel

from hf_mtcompress.errors import UnsupportedEncoderError, first_line
from hf_mtcompress.model.adapters import refuse_adapters
from hf_mtcompress.model.branches import refuse_sub_models
from hf_mtcompress.model.marking import write_mark
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.surgery import keep_layers
from hf_mtcompress.tasks import Task

Choose = Literal["spaced", "first", "last"]


def student_of(teacher: MultiTaskModel, layers: int | Sequence[int], *, choose: Choose = "spaced") -> MultiTaskModel:
    """A copy of a teacher that keeps some layers; embeddings and heads are carried over.

    Args:
        teacher: left as it is.
        layers: how many, or which ones, counted from 0.
        choose: which, where `layers` is a number: evenly spaced with the last one kept, as Sanh et al. 2019 initialise
            DistilBERT, or the first or the last ones.

    Raises:
        UnsupportedEncoderError: the teacher has no such layers, or adapters, or its weights are quantized.
    """
    refuse_sub_models(teacher, "taking layers")
    refuse_adapters(teacher, "taking layers")
    if not all(parameter.is_floating_point() for parameter in teacher.parameters()):
        raise UnsupportedEncoderError(
            "expected a teacher in float to take layers of, found one with quantized weights; give the model that it "
            "was made of, or another checkpoint for the student (student.path)"
        )
    depth = teacher.encoder.config.num_hidden_layers
    if isinstance(layers, int):
        kept = {
            "spaced": [(index + 1) * depth // layers - 1 for index in range(layers)],
            "first": list(range(layers)),
            "last": list(range(depth - layers, depth)),
        }[choose]
    else:
        kept = sorted(layers)
    if not kept or len(set(kept)) != len(kept) or kept[0] < 0 or kept[-1] >= depth:
        raise UnsupportedEncoderError(
            f"expected layers of a teacher that has {depth} (counted from 0), found {layers}; choose 1 to {depth}"
        )
    # A teacher may be frozen; its student is there to be trained.
    student = copy.deepcopy(teacher).requires_grad_(True)
    keep_layers(student.encoder, kept)
    student.refresh_config()
    return student


def fresh_student_of(teacher: MultiTaskModel, changes: Mapping[str, Any]) -> MultiTaskModel:
    """A student of the teacher's family with another shape and fresh weights; embeddings that fit are carried over.

    Args:
        teacher: left as it is.
        changes: fields of its encoder's config, such as `hidden_size`, `num_hidden_layers`, `intermediate_size`.

    Raises:
        UnsupportedEncoderError: the config has no such field, or no encoder has this shape.
    """
    refuse_sub_models(teacher, "making a student of its shape")
    config = copy.deepcopy(teacher.encoder.config)
    unknown = [key for key in changes if not hasattr(config, key)]
    if unknown:
        raise UnsupportedEncoderError(
            f"expected fields of {type(config).__name__}, found {unknown}; see the config.json of the teacher"
        )
    # Names of stages (DINOv2) and kinds of layers (ModernBERT) follow from the depth.
    derived = {"out_features", "out_indices", "stage_names", "layer_types"}
    kept = {key: value for key, value in config.to_dict().items() if key not in derived}
    try:
        config = type(config).from_dict({**kept, **changes})
        # The fresh encoder is whole, whatever was cut from the teacher's.
        write_mark(config, None)
        encoder = AutoModel.from_config(config)
    except (ValueError, StrictDataclassError) as error:
        raise UnsupportedEncoderError(
            f"expected a shape that a {teacher.encoder.config.model_type} encoder can have, found {dict(changes)} "
            f"({first_line(error)})"
        ) from error
    own, theirs = encoder.get_input_embeddings(), teacher.encoder.get_input_embeddings()
    if own is not None and theirs is not None:
        _take_over(own, theirs)
    preprocessing = (teacher.config.preprocessing or {}).get("main", {})
    return MultiTaskModel.from_encoder(encoder, list(teacher.tasks.values()), **preprocessing)


def with_tasks(teacher: MultiTaskModel, tasks: Sequence[Task]) -> tuple[MultiTaskModel, list[str]]:
    """A copy of a model that has these tasks instead of its own: its heads where they fit, fresh ones elsewhere.

    Args:
        teacher: left as it is.
        tasks: with known labels.

    Returns:
        The model in evaluation mode, and the names of the tasks with fresh heads: those that the teacher has not, or
        with other labels, labels in another order, or a head of another shape.

    Raises:
        UnsupportedEncoderError: the teacher has sub-models or adapters.
    """
    refuse_sub_models(teacher, "taking layers")
    refuse_adapters(teacher, "taking layers")
    preprocessing = (teacher.config.preprocessing or {}).get("main", {})
    model = MultiTaskModel.from_encoder(copy.deepcopy(teacher.encoder), tasks, **preprocessing)
    fresh = []
    for task in tasks:
        known = teacher.tasks.get(task.name)
        if (
            known is None
            or known.labels != task.labels
            or not _take_over(model.heads[task.head_name], teacher.heads[known.head_name])
        ):
            fresh.append(task.name)
    return model.eval(), fresh


def _take_over(own: nn.Module, theirs: nn.Module) -> bool:
    """Give a module another's weights; False where their shapes differ, and nothing is changed."""
    found, present = theirs.state_dict(), own.state_dict()
    if {key: value.shape for key, value in found.items()} != {key: value.shape for key, value in present.items()}:
        return False
    own.load_state_dict(found)
    return True
