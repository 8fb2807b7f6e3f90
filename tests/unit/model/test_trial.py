"""What an encoder cannot do is said when heads are put on it, not after a training."""

from typing import Any

import pytest
import torch
from transformers import AlbertConfig, AutoModel, BartConfig, FNetConfig, GPT2Config, GPTNeoXConfig, PreTrainedConfig

from hf_mtcompress import MultiTaskModel, SequenceClassification
from hf_mtcompress.errors import UnsupportedEncoderError
from hf_mtcompress.model.trial import check_trainable
from tests.tiny import FEELING_LABELS, TEXT_FAMILIES, randomize, tiny_encoder

SHAPE: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def mood(head: Any = "stock") -> SequenceClassification:
    return SequenceClassification("mood", labels=FEELING_LABELS, head=head)


@pytest.mark.parametrize(
    "config",
    [
        AlbertConfig(**SHAPE, embedding_size=16),
        FNetConfig(**SHAPE),
        GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2),
        BartConfig(
            vocab_size=60,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            bos_token_id=4,
            forced_eos_token_id=2,
        ),
    ],
)
def test_an_encoder_that_cannot_be_saved_is_refused(config: PreTrainedConfig) -> None:
    """It would train, be scored, and then be lost."""
    with pytest.raises(UnsupportedEncoderError, match=r"expected an encoder that can be saved .*give another"):
        MultiTaskModel.from_encoder(AutoModel.from_config(config), [mood("linear")])


def test_answers_that_padding_changes_are_refused() -> None:
    """A head that reads the last token, and cannot see which ones are padding, answers by the company of a text."""
    config = GPTNeoXConfig(**SHAPE, pad_token_id=1, bos_token_id=2, eos_token_id=3)
    encoder = randomize(AutoModel.from_config(config))
    with pytest.raises(UnsupportedEncoderError, match=r"'mood': expected the same answer to a text alone and beside"):
        MultiTaskModel.from_encoder(encoder, [mood()])
    model = MultiTaskModel.from_encoder(encoder, [mood("linear")])
    assert model(input_ids=torch.tensor([[4, 5]])).logits_mood.shape == (1, len(FEELING_LABELS))


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_a_trial_leaves_no_trace(family: str) -> None:
    """Neither in draws that follow, nor in the mode of the model."""
    model = MultiTaskModel.from_encoder(tiny_encoder(family), [mood("linear")]).train()
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    check_trainable(model)
    assert torch.equal(torch.rand(2), expected)
    assert model.training


def test_an_encoder_in_half_precision_is_left_to_its_user() -> None:
    """Heads and encoder come to one type later: by autocast, or by hand."""
    model = MultiTaskModel.from_encoder(tiny_encoder("bert").to(torch.bfloat16), [mood()])
    assert model.float()(input_ids=torch.tensor([[4, 5]])).logits_mood.dtype == torch.float32
