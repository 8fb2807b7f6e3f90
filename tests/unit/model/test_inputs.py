"""What an encoder takes is known before training: sizes of pictures, and whether it answers alike twice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    LayoutLMv3Config,
    LayoutLMv3Model,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from hf_mtcompress import ImageClassification, MultiTaskModel, SequenceClassification
from hf_mtcompress.errors import UnsupportedEncoderError
from hf_mtcompress.formats.onnx.export import export_onnx
from hf_mtcompress.model.inputs import check_picture_size
from tests.tiny import COLOUR_LABELS, HEADS, HIDDEN, LAYERS, tiny_encoder, tiny_tokenizer

SHAPE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 2 * HIDDEN,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.mark.parametrize("family", ["vit", "deit", "clip_vision_model", "siglip_vision_model"])
def test_sizes_without_a_place_are_refused_by_the_one_that_has(family: str):
    config = AutoConfig.for_model(family, **SHAPE)
    check_picture_size(config, 32, 32)
    for height, width in ((48, 48), (32, 40)):
        message = rf"expected pictures of 32 x 32 pixels, .* found {height} x {width}; set image_size to 32"
        with pytest.raises(UnsupportedEncoderError, match=message):
            check_picture_size(config, height, width)


def test_encoders_that_stretch_their_places_take_any_size():
    check_picture_size(tiny_encoder("dinov2").config, 48, 40)
    check_picture_size(tiny_encoder("bert").config, 48, 40)


def test_the_size_that_is_saved_with_a_model_fits_it():
    with pytest.raises(UnsupportedEncoderError, match="set image_size to 32"):
        MultiTaskModel.from_encoder(tiny_encoder("vit"), [colour()], image_size=64)


def colour() -> ImageClassification:
    return ImageClassification("colour", labels=COLOUR_LABELS)


@pytest.mark.filterwarnings("ignore:You are using a model of type")
def test_an_encoder_that_hides_parts_at_random_is_refused(tmp_path: Path):
    """Two calls of a ViT-MAE differ in eval mode too: no score of it could be repeated."""
    ViTMAEModel(ViTMAEConfig(**SHAPE)).save_pretrained(tmp_path / "mae")
    state = torch.get_rng_state()
    with pytest.raises(
        UnsupportedEncoderError, match=r"hides 75% of each at random; save its weights as a ViT"
    ) as found:
        MultiTaskModel.from_encoder(tmp_path / "mae", [colour()])
    assert torch.equal(state, torch.get_rng_state())
    # What the message says is done.
    assert "ViTModel.from_pretrained(PATH, add_pooling_layer=False).save_pretrained(FOLDER)" in str(found.value)
    ViTModel.from_pretrained(tmp_path / "mae", add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    model = MultiTaskModel.from_encoder(tmp_path / "vit", [colour()]).eval()
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    model.save_pretrained(tmp_path / "saved")
    reloaded = AutoModel.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits_colour, reloaded(**inputs).logits_colour)


def test_a_graph_without_all_inputs_of_its_encoder_is_refused(tmp_path: Path):
    """Words of a page without their places and without the page: other answers than the model that was trained."""
    config = LayoutLMv3Config(
        **{key: value for key, value in SHAPE.items() if key != "image_size"},
        vocab_size=len(tiny_tokenizer()),
        input_size=32,
        max_position_embeddings=64,
        max_2d_position_embeddings=64,
        coordinate_size=4,
        shape_size=8,
    )
    tasks = [SequenceClassification("mood", labels=["bad", "good"], head="linear")]
    model = MultiTaskModel.from_encoder(LayoutLMv3Model(config), tasks)
    with pytest.raises(UnsupportedEncoderError, match="LayoutLMv3Model, found none for bbox, pixel_values: its graph"):
        export_onnx(model, tiny_tokenizer(), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
