import pytest
import torch
from torch import nn

from hf_mtcompress.model.embeddings import BLOCK, Bits, QuantizedEmbedding, quantized_table, swap_embedding


def filled(table: torch.Tensor, bits: Bits) -> QuantizedEmbedding:
    made = QuantizedEmbedding(*table.shape, bits)
    weight, scale = quantized_table(table, bits)
    assert weight.shape == made.weight.shape
    assert scale.shape == made.scale.shape
    made.load_state_dict({"weight": weight, "scale": scale})
    return made


def test_eight_bits_in_exact_numbers() -> None:
    table = torch.tensor([[127.0, -63.4, 0.0], [0.0, 0.0, 0.0], [0.5, 1.0, -1.0]])
    weight, scale = quantized_table(table, 8)
    assert weight.tolist() == [[127, -63, 0], [0, 0, 0], [64, 127, -127]]
    assert scale.flatten().tolist() == pytest.approx([1.0, 0.0, 1 / 127])
    found = filled(table, 8)(torch.tensor([[0, 2], [1, 0]]))
    assert found.shape == (2, 2, 3)
    assert found[0, 0].tolist() == pytest.approx([127.0, -63.0, 0.0])
    assert found[1, 0].tolist() == [0.0, 0.0, 0.0]


def test_four_bits_in_exact_numbers() -> None:
    """The largest number of a block, its negative, and 0 come back as they were."""
    table = torch.tensor([[2.0, -2.0, 0.0, 0.9], [0.0, 0.0, 0.0, 0.0]])
    weight, scale = quantized_table(table, 4)
    assert scale.tolist() == [[2.0], [0.0]]
    # Places of 1, -1, 0 and 0.45 (nearest: 0.4407) among the sixteen.
    assert weight[0].tolist() == [(15 << 4) | 0, (7 << 4) | 12]
    found = filled(table, 4)(torch.tensor([0, 1]))
    assert found[0].tolist() == pytest.approx([2.0, -2.0, 0.0, 2 * 0.44070982933044434])
    assert found[1].tolist() == [0.0] * 4


@pytest.mark.parametrize("width", [2, BLOCK, BLOCK + 2, 3 * BLOCK])
@pytest.mark.parametrize(("bits", "error"), [(8, 0.5 / 127), (4, 0.16)])
def test_every_number_is_near(width: int, bits: Bits, error: float) -> None:
    """A block's scale that is read by its neighbour would be off by far more."""
    table = torch.randn(11, width, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 11)[:, None]
    found = filled(table, bits)(torch.arange(11))
    largest = table.abs().amax(1, keepdim=True)
    assert ((found - table).abs() <= error * largest * 1.001).all()


def test_four_bits_agree_with_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    table = torch.randn(8, 2 * BLOCK, generator=torch.Generator().manual_seed(2))
    packed, state = functional.quantize_4bit(table, blocksize=BLOCK, quant_type="nf4")
    expected = functional.dequantize_4bit(packed, state)
    assert torch.allclose(filled(table, 4)(torch.arange(8)), expected, atol=1e-6)


def test_precision_follows_the_scales() -> None:
    made = filled(torch.randn(4, 6), 8).to(torch.bfloat16)
    assert made(torch.tensor([1])).dtype == torch.bfloat16
    assert made.weight.dtype == torch.int8


def test_a_table_of_odd_width_cannot_have_four_bits() -> None:
    with pytest.raises(ValueError, match="embedding_dim: expected an even number for 4 bits, found 5"):
        QuantizedEmbedding(3, 5, 4)


def test_swapping_keeps_the_device_and_the_padding() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, padding_idx=2, device="meta"))
    swap_embedding(model, "0", 8)
    swapped = model[0]
    assert isinstance(swapped, QuantizedEmbedding)
    assert swapped.padding_idx == 2
    assert swapped.weight.device.type == swapped.scale.device.type == "meta"
