"""Laws of heads: a stock head is the family's own class, a pooled one does what its name says."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

from hf_mtcompress.modules.heads import PooledHead, SharedEncoder, build_stock_head
from tests.tiny import FAMILIES, HIDDEN, IMAGE_FAMILIES, randomize, tiny_config, tiny_inputs

WITH_STOCK_CLASS = [family for family in FAMILIES if not family.startswith("clip")]
CASES = [
    (family, kind)
    for family in WITH_STOCK_CLASS
    for kind in (["Image"] if family in IMAGE_FAMILIES else ["Sequence", "Token"])
]
HIDDEN_STATES = torch.tensor([[[1.0, -4.0], [3.0, -2.0], [5.0, 9.0]], [[2.0, 0.0], [8.0, 8.0], [8.0, 8.0]]])
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])
POOLER_OUTPUT = torch.tensor([[0.5, 0.25], [-1.0, 1.0]])


def stock_model(family: str, kind: str) -> PreTrainedModel:
    """A stock model with random weights, every one of them away from its initial value."""
    auto = getattr(transformers, f"AutoModelFor{kind}Classification")
    return randomize(auto.from_config(tiny_config(family, num_labels=3)))


def head_of(stock: PreTrainedModel) -> PreTrainedModel:
    """The head alone, with the weights that the stock model has outside of its encoder."""
    head = build_stock_head(type(stock), stock.config)
    prefix = f"{stock.base_model_prefix}."
    own = {key: value for key, value in stock.state_dict().items() if not key.startswith(prefix)}
    head.load_state_dict(own, strict=True, assign=True)
    return head.eval()


def answer(head: PreTrainedModel, outputs: Any, inputs: dict[str, Tensor]) -> Tensor:
    stand_in = getattr(head, head.base_model_prefix)
    mask = {key: value for key, value in inputs.items() if key == "attention_mask"}
    return stand_in.answer_with(outputs, lambda: head(**mask, return_dict=True)).logits


def pooled(pooling: str | None, **settings: Any) -> PooledHead:
    """A head that passes its features on: two in, two out, the classifier is the identity."""
    head = PooledHead(2, 2, **{"pooling": pooling, "dense": False, "dropout": 0.0, "per_token": False, **settings})
    with torch.no_grad():
        head.classifier.weight.copy_(torch.eye(2))
        head.classifier.bias.zero_()
    return head.eval()


# ------------------------------------------------------------------------------------------------------ stock heads


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_stock_head_answers_like_the_stock_class(family: str, kind: str) -> None:
    """A head that is nearly the family's own (another pooling, a missing layer) makes exports answer otherwise."""
    stock, inputs = stock_model(family, kind), tiny_inputs(family)
    with torch.no_grad():
        expected = stock(**inputs).logits
        found = answer(head_of(stock), stock.base_model(**inputs, return_dict=True), inputs)
    assert torch.equal(found, expected)
    assert expected.std() > 0.01, "logits that are all alike would hide a wrong head"


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_gradients_pass_through_a_stock_head(family: str, kind: str) -> None:
    stock, inputs = stock_model(family, kind), tiny_inputs(family)
    head = head_of(stock)
    outputs = stock.base_model(**inputs, return_dict=True)
    answer(head, outputs, inputs).square().sum().backward()
    first = next(stock.base_model.parameters())
    assert first.grad is not None
    assert first.grad.abs().max() > 0
    assert all(parameter.grad is not None for parameter in head.parameters())


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_stock_head_holds_no_weight_of_the_encoder(family: str, kind: str) -> None:
    """One encoder for each head would be saved, and trained, several times."""
    stock = stock_model(family, kind)
    head = head_of(stock)
    stand_in = getattr(head, head.base_model_prefix)
    assert isinstance(stand_in, SharedEncoder)
    assert not list(stand_in.state_dict())
    encoder = sum(parameter.numel() for parameter in stock.base_model.parameters())
    everything = sum(parameter.numel() for parameter in stock.parameters())
    assert sum(parameter.numel() for parameter in head.parameters()) == everything - encoder > 0


def test_building_a_stock_head_allocates_nothing_and_leaves_the_config_alone() -> None:
    """A large encoder built only to be thrown away would double the memory needed."""
    config = tiny_config("bert", num_labels=3)
    before = config.to_dict()
    head = build_stock_head(transformers.BertForSequenceClassification, config)
    assert {parameter.device.type for parameter in head.parameters()} == {"meta"}
    assert config.to_dict() == before
    assert head.config is not config


# ------------------------------------------------------------------------------------------------------- stand-ins


def test_a_stand_in_answers_with_the_innermost_output() -> None:
    stand_in = SharedEncoder()
    inner = stand_in.answer_with(1, lambda: [stand_in(), stand_in.answer_with(2, stand_in), stand_in(input_ids=None)])
    assert inner == [1, 2, 1]


def test_a_stand_in_forgets_its_answer() -> None:
    """An output that stays would be that of the batch before, and its graph would stay in memory."""
    stand_in = SharedEncoder()
    stand_in.answer_with(1, stand_in)
    with pytest.raises(IndexError):
        stand_in()

    def fail() -> None:
        raise KeyError("body")

    with pytest.raises(KeyError, match="body"):
        stand_in.answer_with(1, fail)
    with pytest.raises(IndexError):
        stand_in()


# ------------------------------------------------------------------------------------------------------ pooled heads


@pytest.mark.parametrize(
    ("pooling", "mask", "expected"),
    [
        ("cls", MASK, [[1.0, -4.0], [2.0, 0.0]]),
        ("mean", MASK, [[3.0, 1.0], [2.0, 0.0]]),
        ("max", MASK, [[5.0, 9.0], [2.0, 0.0]]),
        ("mean", None, [[3.0, 1.0], [6.0, 16 / 3]]),
        ("max", None, [[5.0, 9.0], [8.0, 8.0]]),
        # A first position that is masked (padding on the left) does not count.
        ("mean", torch.tensor([[0, 1, 1], [1, 1, 1]]), [[4.0, 3.5], [6.0, 16 / 3]]),
        ("max", torch.tensor([[1, 1, 0], [1, 1, 1]]), [[3.0, -2.0], [8.0, 8.0]]),
        ("mean", torch.tensor([[0, 0, 0], [1, 1, 1]]), [[0.0, 0.0], [6.0, 16 / 3]]),
    ],
)
def test_poolings(pooling: str, mask: Tensor | None, expected: list[list[float]]) -> None:
    """Padding that is pooled makes an answer depend on the other rows of its batch."""
    found = pooled(pooling)(BaseModelOutput(last_hidden_state=HIDDEN_STATES), mask)
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize(("pooling", "expected"), [(None, POOLER_OUTPUT.tolist()), ("cls", [[1.0, -4.0], [2.0, 0.0]])])
def test_the_encoders_own_pooler_is_read_where_no_pooling_is_named(pooling: str | None, expected: Any) -> None:
    outputs = BaseModelOutputWithPooling(last_hidden_state=HIDDEN_STATES, pooler_output=POOLER_OUTPUT)
    assert pooled(pooling)(outputs, MASK).tolist() == expected


def test_the_first_position_is_read_where_there_is_no_pooler() -> None:
    for outputs in (
        BaseModelOutput(last_hidden_state=HIDDEN_STATES),
        BaseModelOutputWithPooling(last_hidden_state=HIDDEN_STATES, pooler_output=None),
    ):
        assert pooled(None)(outputs, MASK).tolist() == [[1.0, -4.0], [2.0, 0.0]]


def test_a_head_per_token_answers_at_every_position() -> None:
    outputs = BaseModelOutputWithPooling(last_hidden_state=HIDDEN_STATES, pooler_output=POOLER_OUTPUT)
    assert torch.equal(pooled(None, per_token=True)(outputs, MASK), HIDDEN_STATES)


def test_the_dense_layer_stands_before_the_classifier() -> None:
    head = PooledHead(HIDDEN, 3, pooling="mean", dense=True, dropout=0.5, per_token=False).eval()
    hidden = torch.randn(2, 4, HIDDEN, generator=torch.Generator().manual_seed(0))
    assert head.dense is not None
    expected = head.classifier(functional.gelu(head.dense(hidden.mean(1))))
    torch.testing.assert_close(head(BaseModelOutput(last_hidden_state=hidden), None), expected)
    assert [tuple(parameter.shape) for parameter in head.parameters()] == [
        (HIDDEN, HIDDEN),
        (HIDDEN,),
        (3, HIDDEN),
        (3,),
    ]


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    head = pooled("mean", dropout=0.9)
    outputs = BaseModelOutput(last_hidden_state=torch.ones(200, 3, 2))
    assert torch.equal(head(outputs, None), torch.ones(200, 2))
    kept = head.train()(outputs, None)
    assert set(kept.unique().round(decimals=4).tolist()) == {0.0, 10.0}
    assert 0.8 < (kept == 0).float().mean() < 0.97


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_poolings_keep_half_precision_finite(pooling: str, dtype: torch.dtype) -> None:
    """A mask value that fits only float32 is infinite in float16."""
    found = pooled(pooling).to(dtype)(BaseModelOutput(last_hidden_state=HIDDEN_STATES.to(dtype)), MASK)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), pooled(pooling)(BaseModelOutput(last_hidden_state=HIDDEN_STATES), MASK))
