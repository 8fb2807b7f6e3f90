"""What is recorded of an attention is what the attention itself computes with."""

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hf_mtcompress import MultiTaskModel, SequenceClassification
from hf_mtcompress.errors import TrainingError, UnsupportedEncoderError
from hf_mtcompress.losses.distillation import relation_divergence_sum, relation_heads
from hf_mtcompress.model.anatomy import encoder_of, find_anatomy
from hf_mtcompress.model.relations import RelationRecord, Relations, record_relations, relation_width
from hf_mtcompress.model.surgery import cut
from tests import laws
from tests.tiny import FAMILIES, HEADS, HIDDEN, IMAGE_FAMILIES, tiny_config, tiny_encoder, tiny_inputs

HEAD_SIZE = HIDDEN // HEADS


def recorded(encoder: PreTrainedModel, family: str, layer: int = 1, **inputs: Tensor) -> Relations:
    with record_relations(encoder, layer) as record, torch.no_grad():
        encoder(**tiny_inputs(family), **inputs)
    return record.take()


def hook_count(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def without_positions(encoder: PreTrainedModel, family: str) -> PreTrainedModel:
    """What attention adds to the products by position is set to nothing."""
    if family == "mpnet":
        nn.init.zeros_(encoder.encoder.relative_attention_bias.weight)
    if family == "deberta-v2":
        for name, parameter in encoder.named_parameters():
            if "pos_key_proj" in name or "pos_query_proj" in name:
                nn.init.zeros_(parameter)
    return encoder


# ---- laws ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pruned", [False, True])
def test_the_attention_computes_with_what_is_recorded(family: str, pruned: bool) -> None:
    """A key taken for a query transposes the scores, and a student of another family learns the wrong relations.

    CLIP registers its key first.
    """
    encoder = without_positions(tiny_encoder(family, attn_implementation="eager"), family)
    if pruned:
        cut(encoder, laws.UNEVEN_HEADS, laws.UNEVEN_NEURONS)
    inputs = tiny_inputs(family)
    if family == "modernbert":
        # Every token at place 0: the rotation by position is the identity.
        inputs["position_ids"] = torch.zeros_like(inputs["input_ids"])
    for layer, part in enumerate(find_anatomy(encoder).layers):
        contexts: list[Tensor] = []
        hook = part.attention.output.register_forward_pre_hook(lambda _, args, into=contexts: into.append(args[0]))
        with record_relations(encoder, layer) as record, torch.no_grad():
            probabilities = encoder(**inputs, output_attentions=True).attentions[layer]
        hook.remove()
        heads = len(laws.UNEVEN_HEADS[layer]) if pruned else HEADS
        query, key, value = (
            answer.unflatten(-1, (heads, HEAD_SIZE)).transpose(1, 2).double() for answer in record.take()
        )
        # DeBERTa divides by the number of kinds of scores, too.
        scores = query @ key.mT / (HEAD_SIZE * (3 if family == "deberta-v2" else 1)) ** 0.5
        own = scores.masked_fill(probabilities == 0, -torch.inf).softmax(-1)
        assert (own - own.mT).abs().max() > 0.01, "scores must not be symmetric, or the test says nothing"
        real = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones(own.shape[::2]).bool()
        queries = real[:, None].expand(own.shape[:3])
        torch.testing.assert_close(own[queries], probabilities.double()[queries], rtol=0, atol=1e-5)
        context = (probabilities.double() @ value).transpose(1, 2).flatten(2)
        torch.testing.assert_close(context[real], contexts[0].double()[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pruned", [False, True])
def test_every_kernel_gives_the_same(family: str, pruned: bool) -> None:
    """Attention maps are empty under sdpa, and a loss over them sums up to nothing."""
    encoder = tiny_encoder(family)
    if pruned:
        cut(encoder, laws.UNEVEN_HEADS, laws.UNEVEN_NEURONS)
    before = recorded(encoder, family, layer=2)
    encoder.set_attn_implementation("eager")
    width = HEAD_SIZE * (len(laws.UNEVEN_HEADS[2]) if pruned else HEADS)
    mask = tiny_inputs(family).get("attention_mask")
    for one, other in zip(before, recorded(encoder, family, layer=2), strict=True):
        assert one.shape == (3, 17 if family in IMAGE_FAMILIES else 9, width)
        kept = torch.ones(one.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        torch.testing.assert_close(one[kept], other[kept], rtol=0, atol=5e-6)
    assert relation_width(encoder, 2) == width


@pytest.mark.parametrize("family", FAMILIES)
def test_recording_changes_nothing_and_leaves_nothing(family: str) -> None:
    encoder = tiny_encoder(family)
    before, hooks = laws.hidden(encoder, family), hook_count(encoder)
    with record_relations(encoder, 0):
        assert torch.equal(laws.hidden(encoder, family), before)
        assert hook_count(encoder) > hooks
    assert hook_count(encoder) == hooks
    assert torch.equal(laws.hidden(encoder, family), before)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mpnet"])  # it has no checkpointing
@pytest.mark.parametrize("inside", [False, True])
def test_gradient_checkpointing_changes_no_gradient(family: str, inside: bool) -> None:
    """The backward pass runs layers again: whether still recorded or not, the gradient is the same."""

    def gradients(encoder: PreTrainedModel) -> Tensor:
        wanted = [tensor + 1.0 for tensor in recorded(tiny_encoder(family, seed=1), family)]
        encoder.train()

        def step() -> None:
            relations = record.take()
            mask = torch.ones(relations.query.shape[:2], dtype=torch.bool)
            loss = sum(
                relation_divergence_sum(own, other, mask, 4) for own, other in zip(relations, wanted, strict=True)
            )
            (loss + outputs.last_hidden_state.square().sum()).backward()

        with record_relations(encoder, 1) as record:
            outputs = encoder(**tiny_inputs(family))
            if inside:
                step()
                # What was computed again is not taken for another forward pass.
                with pytest.raises(TrainingError, match="found none"):
                    record.take()
        if not inside:
            step()
        found = [parameter.grad for parameter in find_anatomy(encoder).stack.parameters()]
        return torch.cat([slope.flatten() for slope in found if slope is not None])

    plain, checkpointed = tiny_encoder(family), tiny_encoder(family)
    checkpointed.activation_checkpointing_enable()
    one, other = gradients(plain), gradients(checkpointed)
    # Some gradients are 0 but for rounding (those of key biases), which the largest one tells.
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * float(one.abs().max()))


def test_the_student_learns_from_relations_alone() -> None:
    student, teacher = tiny_encoder("bert", hidden_size=16, num_attention_heads=2, seed=1), tiny_encoder("bert")
    heads = relation_heads(relation_width(student, 0), relation_width(teacher, 2))
    assert heads == 8
    inputs = tiny_inputs("bert")
    mask = inputs["attention_mask"].bool()
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    losses = []
    with record_relations(student, 0) as own, record_relations(teacher, 2) as theirs:
        for _ in range(30):
            student(**inputs)
            with torch.no_grad():
                teacher(**inputs)
            pairs = zip(own.take(), theirs.take(), strict=True)
            loss = torch.stack([relation_divergence_sum(one, other, mask, heads) for one, other in pairs]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_without_gradient_nothing_has_one() -> None:
    assert not any(tensor.requires_grad for tensor in recorded(tiny_encoder("bert"), "bert"))


def test_a_shared_projection_counts_once() -> None:
    """DeBERTa may project positions with its query and key projections, after the tokens."""
    shared = tiny_encoder("deberta-v2", share_att_key=True)
    assert recorded(shared, "deberta-v2").query.shape == (3, 9, HIDDEN)
    seen: list[Tensor] = []
    query = next(iter(find_anatomy(shared).layers[1].attention.projections.values()))
    query.register_forward_hook(lambda module, args, output: seen.append(output))
    found = recorded(shared, "deberta-v2").query
    assert len(seen) == 2
    assert torch.equal(found, seen[0])


# ---- life of a record ----


def test_every_pass_replaces_the_one_before_and_taking_forgets() -> None:
    encoder = tiny_encoder("bert")
    with record_relations(encoder, 1) as record, torch.no_grad():
        encoder(**tiny_inputs("bert", seed=1))
        encoder(**tiny_inputs("bert", batch=2))
    first = record.take()
    assert first.query.shape[0] == 2
    with pytest.raises(TrainingError, match=r"expected a forward pass of the encoder while 'encoder\.layer\.1"):
        record.take()
    encoder(**tiny_inputs("bert"))
    with pytest.raises(TrainingError, match="found none"):
        record.take()


def test_two_models_and_two_layers_at_once() -> None:
    student, teacher = tiny_encoder("bert"), tiny_encoder("bert", seed=1)
    expected = [recorded(student, "bert", 0), recorded(student, "bert", 2), recorded(teacher, "bert", 2)]
    with (
        record_relations(student, 0) as first,
        record_relations(teacher, 2) as other,
        record_relations(student, 2) as last,
        torch.no_grad(),
    ):
        for model in (student, teacher):
            model(**tiny_inputs("bert"))
    for record, wanted in zip((first, last, other), expected, strict=True):
        for one, two in zip(record.take(), wanted, strict=True):
            assert torch.equal(one, two)


def test_a_forward_pass_that_fails_leaves_neither_hooks_nor_relations() -> None:
    """A caught failure (memory, most of all) must not leave the relations of half a pass."""
    encoder = tiny_encoder("bert")
    fails = True

    def fail(*_: object) -> None:
        if fails:
            raise RuntimeError("out of memory")

    find_anatomy(encoder).layers[2].module.register_forward_hook(fail)
    hooks = hook_count(encoder)
    with record_relations(encoder, 1) as record, torch.no_grad():
        with pytest.raises(RuntimeError, match="out of memory"):
            encoder(**tiny_inputs("bert"))
        with pytest.raises(TrainingError, match="found none"):
            record.take()
        fails = False
        encoder(**tiny_inputs("bert", batch=2))
    assert record.take().key.shape == (2, 9, HIDDEN)
    fails = True
    with pytest.raises(RuntimeError, match="out of memory"), record_relations(encoder, 1) as record:
        encoder(**tiny_inputs("bert"))
    assert hook_count(encoder) == hooks
    with pytest.raises(TrainingError, match="found none"):
        record.take()


def test_a_copy_neither_writes_into_the_record_nor_keeps_it() -> None:
    """A best model that is copied while training would overwrite the student's relations with its own."""
    encoder = tiny_encoder("bert")
    with record_relations(encoder, 1) as record, torch.no_grad():
        encoder(**tiny_inputs("bert"))
        twin = copy.deepcopy(encoder)
        shallow = copy.copy(encoder)
        for model in (twin, shallow):
            model(**tiny_inputs("bert", batch=1))
    assert record.take().query.shape[0] == 3
    kept = weakref.ref(record)
    del record
    gc.collect()
    assert kept() is None
    assert torch.equal(laws.hidden(twin, "bert"), laws.hidden(encoder, "bert"))


@pytest.mark.parametrize("family", ["bert", "modernbert", "clip_text"])
def test_in_a_multi_task_model_whose_tasks_read_several_depths(family: str) -> None:
    """For them a layer runs again, in a twin of the encoder that shares its hooks."""
    encoder = tiny_encoder(family)
    wanted = recorded(encoder, family, layer=0)
    tasks = [
        SequenceClassification(name, labels=("x", "y"), text="text", label="label", head="linear", layer=layer)
        for name, layer in (("a", None), ("b", 1))
    ]
    model = MultiTaskModel.from_encoder(encoder, tasks, max_length=32).eval()
    with record_relations(model.encoder, 0) as record, torch.no_grad():
        model(**tiny_inputs(family))
    for one, other in zip(record.take(), wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert"])
def test_in_a_stock_model(family: str) -> None:
    stock = AutoModelForSequenceClassification.from_config(tiny_config(family)).eval()
    with record_relations(encoder_of(stock), 1) as record, torch.no_grad():
        stock(**tiny_inputs(family))
    for one, other in zip(record.take(), recorded(encoder_of(stock), family), strict=True):
        assert torch.equal(one, other)


def test_half_precision() -> None:
    encoder = tiny_encoder("bert").to(torch.bfloat16)
    with record_relations(encoder, 1) as record:
        encoder(**tiny_inputs("bert"))
    relations = record.take()
    assert {tensor.dtype for tensor in relations} == {torch.bfloat16}
    mask = tiny_inputs("bert")["attention_mask"].bool()
    loss = relation_divergence_sum(relations.query, relations.key.detach(), mask, 4)
    loss.backward()
    assert encoder.embeddings.word_embeddings.weight.grad.isfinite().all()


# ---- what cannot be recorded ----


@pytest.mark.parametrize("layer", [-1, 3])
def test_layers_that_are_not_there(layer: int) -> None:
    with (
        pytest.raises(UnsupportedEncoderError, match=f"a layer from 0 to 2 to record relations of, found {layer}"),
        record_relations(tiny_encoder("bert"), layer),
    ):
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_an_attention_without_heads(family: str) -> None:
    encoder = tiny_encoder(family)
    cut(encoder, laws.EMPTY_HEADS)
    with (
        pytest.raises(UnsupportedEncoderError, match=r"found none left; choose among the layers \[0, 2\]"),
        record_relations(encoder, 1),
    ):
        pass
    with pytest.raises(UnsupportedEncoderError, match="none left"):
        relation_width(encoder, 1)
    assert recorded(encoder, family, 0).query.shape[-1] == HEAD_SIZE == relation_width(encoder, 0)


def test_reentrant_checkpointing_is_refused() -> None:
    """It runs the layer without gradients: the student would learn nothing from its relations, in silence."""
    encoder = tiny_encoder("bert").train()
    encoder.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    with record_relations(encoder, 1) as record:
        encoder(**tiny_inputs("bert"))
        with pytest.raises(TrainingError, match="found reentrant gradient checkpointing"):
            record.take()
        encoder.eval()
        encoder(**tiny_inputs("bert"))
        assert record.take().query.requires_grad


@pytest.mark.parametrize("answers", [[torch.ones(12, 4)] * 3, [torch.ones(2, 6, 4)] * 2])
def test_projections_of_another_kind_are_refused(answers: list[Tensor]) -> None:
    """Kernels that take the padding out give (tokens of all rows, width)."""
    record = RelationRecord("layer.0.attention", fused=False)
    record.start()
    for answer in answers:
        record.add(nn.Identity(), answer)
    record.finish()
    with pytest.raises(
        UnsupportedEncoderError, match=r"expected 'layer\.0\.attention' to project to query, key and val"
    ):
        record.take()
