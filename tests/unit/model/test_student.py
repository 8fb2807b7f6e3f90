"""Students made of a teacher: which layers, and what no student can be made of."""

import pytest
import torch
from torch import nn

from hf_mtcompress.errors import UnsupportedEncoderError
from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.student import fresh_student_of, student_of
from hf_mtcompress.tasks import ImageClassification, SequenceClassification, Task
from tests.tiny import FAMILIES, IMAGE_FAMILIES, LAYERS, tiny_encoder, tiny_inputs


def teacher_of(family: str) -> MultiTaskModel:
    """One task, random weights."""
    labels = ["a", "b"]
    task: Task = (
        ImageClassification("kind", labels=labels)
        if family in IMAGE_FAMILIES
        else SequenceClassification("kind", labels=labels)
    )
    return MultiTaskModel.from_encoder(tiny_encoder(family), [task])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_any_family_may_be_of_another_depth(family: str):
    """DINOv2's config also names its stages, which follow from the depth."""
    teacher = teacher_of(family)
    layers = {"num_layers": 2} if not hasattr(teacher.encoder.config, "num_hidden_layers") else {"num_hidden_layers": 2}
    student = fresh_student_of(teacher, layers)
    assert len(find_anatomy(student.encoder).layers) == 2
    assert len(find_anatomy(teacher.encoder).layers) == LAYERS
    with torch.no_grad():
        assert student.eval()(**tiny_inputs(family)).logits_kind.shape == (3, 2)


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [((2, "spaced"), [0, 2]), ((2, "first"), [0, 1]), ((2, "last"), [1, 2]), (([2, 0], "spaced"), [0, 2])],
)
def test_a_student_has_the_layers_that_were_asked_for(wanted: tuple, kept: list[int]):
    teacher = teacher_of("bert")
    student = student_of(teacher, wanted[0], choose=wanted[1])
    theirs = find_anatomy(teacher.encoder).layers
    for own, layer in zip(find_anatomy(student.encoder).layers, kept, strict=True):
        assert torch.equal(own.feed_forward.output.weight, theirs[layer].feed_forward.output.weight)


def test_what_no_student_can_be_made_of_is_said():
    teacher = teacher_of("bert")
    with pytest.raises(UnsupportedEncoderError, match="expected a shape that a bert encoder can have, found"):
        fresh_student_of(teacher, {"hidden_size": 30})
    with pytest.raises(UnsupportedEncoderError, match="found 4; choose 1 to 3"):
        student_of(teacher, 4)
    teacher.encoder.register_parameter("packed", nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False))
    with pytest.raises(UnsupportedEncoderError, match="found one with quantized weights"):
        student_of(teacher, 2)
