"""What is made of a picture does not depend on how it is given; what is none is named."""

import base64
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from hf_mtcompress.data.pixels import fetched, picture_of, problem_of, undecoded
from hf_mtcompress.errors import DataError
from tests.pictures import REFUSED, SAME, half_clear, half_white, upright

UPRIGHT = np.asarray(upright())
GREY = np.asarray(upright().convert("L"))
LEFT_CLEAR = np.where(np.arange(24) < 12, 0, 255).astype(np.uint8) * np.ones((16, 1), np.uint8)


def pixels(value: Any) -> np.ndarray:
    picture = picture_of(value)
    assert picture.mode == "RGB"
    return np.asarray(picture)


@pytest.mark.parametrize("name", SAME)
def test_a_file_is_the_picture_that_it_shows(name: str, tmp_path: Path):
    write, truth = SAME[name]
    path = write(tmp_path)
    expected = np.asarray(truth().convert("RGB"))
    content = path.read_bytes()
    with Image.open(path) as opened:
        for value in (path, str(path), content, {"bytes": content, "path": None}, {"bytes": None, "path": str(path)}):
            np.testing.assert_array_equal(pixels(value), expected)
        np.testing.assert_array_equal(pixels(opened), expected)
    assert problem_of(str(path)) is None


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_shows_none_is_named(name: str, tmp_path: Path):
    write, message = REFUSED[name]
    path = write(tmp_path)
    with pytest.raises(DataError, match=message):
        picture_of(path)
    assert str(path) in str(problem_of({"bytes": None, "path": str(path)}))
    if path.exists():
        with pytest.raises(DataError, match="a picture in memory"):
            picture_of(path.read_bytes())


ARRAYS: dict[str, tuple[Any, np.ndarray]] = {
    "rgb": (UPRIGHT, UPRIGHT),
    "channels first": (np.moveaxis(UPRIGHT, 2, 0), UPRIGHT),
    "tensor": (torch.tensor(np.moveaxis(UPRIGHT, 2, 0).copy()), UPRIGHT),
    "tensor, channels last": (torch.tensor(UPRIGHT.copy()), UPRIGHT),
    "nested lists": (UPRIGHT.tolist(), UPRIGHT),
    "floats": ((UPRIGHT / 255).astype(np.float32), UPRIGHT),
    "half floats": (torch.tensor(UPRIGHT / 255).half(), UPRIGHT),
    "16 bits": (UPRIGHT.astype(np.uint16) * 257, UPRIGHT),
    "64 bits": (UPRIGHT.astype(np.int64), UPRIGHT),
    "grey": (GREY, GREY),
    "grey, one channel": (GREY[:, :, None], GREY),
    "grey, one channel first": (torch.tensor(GREY[None].copy()), GREY),
    "grey, 16 bits": (GREY.astype(np.uint16) * 257, GREY),
    "grey and alpha": (np.stack([GREY, LEFT_CLEAR], 2), np.asarray(half_white(upright().convert("L")))),
    "rgb and alpha": (np.asarray(half_clear()), np.asarray(half_white(upright()))),
    "true or false": (GREY > 127, np.where(GREY > 127, 255, 0)),
    "three rows": (UPRIGHT[:3], UPRIGHT[:3]),
    "pillow's floats": (Image.fromarray((GREY / 255).astype(np.float32)), GREY),
    "pillow's whole numbers": (Image.fromarray(GREY.astype(np.int32)), GREY),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_every_kind_are_the_same_picture(name: str):
    value, expected = ARRAYS[name]
    found = pixels(value)
    np.testing.assert_array_equal(found, expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (UPRIGHT.astype(np.float32), "from 0 to 1 in a picture in memory of float32, found 0.0 to 255"),
        (UPRIGHT / 255 * 2 - 1, "expected numbers from 0 to 1"),
        (np.full((4, 4), np.nan), "expected numbers from 0 to 1"),
        (UPRIGHT.astype(np.int64) * 257, "from 0 to 255 in a picture in memory of int64"),
        (np.zeros((2, 16, 24, 3), np.uint8), r"found \(2, 16, 24, 3\); give one picture at a time"),
        (np.zeros((7, 16, 24), np.uint8), r"1 to 4 channels, found \(16, 24, 7\)|found \(7, 16, 24\)"),
        (np.zeros((0, 24, 3), np.uint8), "found"),
        (np.array([["a"]]), "expected numbers, found a picture in memory of <U1"),
        ([[1, 2], [3]], "expected a picture that opens"),
        ({"bytes": None, "path": None}, "found neither bytes nor a path"),
        (3, "expected a picture .a path, bytes, a PIL image, an array or a tensor., found int; convert it"),
        (None, "found NoneType"),
        ("https://example.org/fox.png", "found 'https://example.org/fox.png'; download it first"),
    ],
    ids=str,
)
def test_what_could_mean_several_pictures_is_refused(value: Any, message: str):
    """Floats up to 255 would be white but for the darkest pixels."""
    with pytest.raises(DataError, match=message):
        picture_of(value)


def test_photographs_keep_their_colours(tmp_path: Path):
    """JPEG in CMYK and in grey, turned: within what JPEG loses."""
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth = upright().resize((240, 160), Image.Resampling.BICUBIC)
    for mode in ("RGB", "CMYK", "L"):
        smooth.convert(mode).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.jpg", quality=95, exif=exif)
        difference = np.abs(
            pixels(tmp_path / "photo.jpg").astype(int) - np.asarray(smooth.convert(mode).convert("RGB"))
        )
        assert difference.mean() < 6


@pytest.fixture
def server(tmp_path: Path):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_addresses_are_fetched_where_a_user_gives_one(server: str, tmp_path: Path):
    upright().save(tmp_path / "fox.png")
    np.testing.assert_array_equal(pixels(fetched(f"{server}/fox.png")), UPRIGHT)
    inline = f"data:image/png;base64,{base64.b64encode((tmp_path / 'fox.png').read_bytes()).decode()}"
    np.testing.assert_array_equal(pixels(fetched(inline)), UPRIGHT)
    with pytest.raises(DataError, match=r"owl.png', found that it cannot be fetched \(HTTP Error 404"):
        fetched(f"{server}/owl.png")
    assert fetched(str(tmp_path)) == str(tmp_path)


def test_pictures_of_a_data_set_are_named(tmp_path: Path):
    upright().save(tmp_path / "fox.png")
    (tmp_path / "owl.jpg").write_bytes(b"broken")
    features = Features({"image": ImageFeature(), "other": ImageFeature()})
    paths = [str(tmp_path / "fox.png"), str(tmp_path / "owl.jpg")]
    rows = undecoded(Dataset.from_dict({"image": paths, "other": paths}, features=features))
    assert problem_of(rows[0]["image"]) is None
    assert "owl.jpg' (no format" in str(problem_of(rows[1]["other"]))


def test_transparent_pixels_may_have_any_share():
    """As Pillow composes them: the page computes the same (`onWhite`)."""
    colours = np.stack(np.broadcast_arrays(*np.ogrid[:256, :256]), 2).astype(np.uint8)[:, :, [0, 0, 0, 1]]
    share = colours[..., 3:] / 255
    expected = colours[..., :3] * share + 255 * (1 - share)
    assert np.abs(pixels(colours) - expected).max() <= 1
