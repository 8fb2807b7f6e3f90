"""The one way from anything that may be a picture to its pixels: upright, red, green and blue, eight bits each.

Training, scoring, `predict`, pipelines and teachers all see what `picture_of` makes; the web page does the same in its
own words (`formats/web/image.mjs`). What it cannot make is refused by name, never half read.
"""

import io
import os
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from hf_mtcompress.errors import DataError, first_line

BACKGROUND = "white"
"""What shows through transparent pixels, as in `transformers.image_transforms.convert_to_rgb`."""
_WEB = ("http://", "https://", "data:image/")
_PATIENCE = 30
"""Seconds without an answer after which an address is given up."""
_SIXTEEN_BITS = ("PNG", "PPM")
"""Formats that Pillow may open in mode `I`, whose numbers then have 16 bits."""
_CHANNELS = (1, 2, 3, 4)
_MOST_NAMED = 100


def picture_of(value: Any, *, coarse: bool = False) -> Image.Image:
    """A picture, turned as its EXIF data say, in mode RGB.

    Transparent pixels show `BACKGROUND`. Of 16 bits the upper 8 are kept, also of grey pictures, which Pillow would
    clip to white. Numbers of an array mean: `uint8` 0 to 255, `uint16` 0 to 65,535, other whole numbers 0 to 255,
    floats 0 to 1.

    Args:
        value: path of a file; its content; `{"bytes": ..., "path": ...}`, as `datasets` holds a picture; a PIL image;
            an array, tensor or nested list of shape (height, width), (height, width, channels) or (channels, height,
            width), with 1 to 4 channels: grey, grey and alpha, RGB, RGBA. Where both ends could be channels, they are
            last in an array and first in a tensor.
        coarse: decode a JPEG at an eighth of its size: faster, and what is broken is found as well.

    Raises:
        DataError: it is no picture, has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, or does not open.
    """
    match value:
        case Image.Image():
            return _read(value, name_of(value))
        case str() if value.startswith(_WEB):
            raise DataError(f"expected a picture on this machine, found {name_of(value)}; download it first")
        case str() | os.PathLike():
            return _open(os.fspath(value), name_of(value), coarse)
        case bytes() | bytearray():
            return _open(io.BytesIO(value), name_of(value), coarse)
        case Mapping() if value.keys() & {"bytes", "path"}:
            return _stored(value, coarse)
        case np.ndarray():
            return _of_array(value, name_of(value), first=False)
        case torch.Tensor():
            return _of_array(value.detach().cpu().numpy(), name_of(value), first=True)
        case list() if value and isinstance(value[0], list | np.ndarray):
            with _refusing(name_of(value)):  # rows of several lengths
                return _of_array(np.asarray(value), name_of(value), first=False)
        case _:
            raise DataError(
                "expected a picture (a path, bytes, a PIL image, an array or a tensor), found "
                f"{type(value).__name__}; convert it"
            )


def name_of(value: Any) -> str:
    """What a picture is called in messages: its file where it has one."""
    match value:
        case str() if value.startswith("data:"):
            return "a data: address"
        case str() | os.PathLike():
            return f"'{os.fspath(value)}'"
        case Mapping():
            return f"'{value['path']}'" if value.get("path") else "a picture without a name"
        case Image.Image():
            return f"'{name}'" if (name := getattr(value, "filename", "")) else "a picture in memory"
        case _:
            return "a picture in memory"


def fetched(value: Any) -> Any:
    """The content of what an `http`, `https` or `data` address names; anything else as it is.

    For what a user asks a model about. Rows of data are not fetched one by one while a model is trained.

    Raises:
        DataError: nothing is there.
    """
    if not (isinstance(value, str) and value.startswith(_WEB)):
        return value
    request = urllib.request.Request(value, headers={"User-Agent": "hf_mtcompress"})
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
            return answer.read()
    except (OSError, ValueError) as error:
        raise DataError(
            f"expected a picture at {name_of(value)}, found that it cannot be fetched ({first_line(error)}); check the "
            "address and the network, or give a file"
        ) from error


def problem_of(value: Any) -> str | None:
    """What is wrong with a picture, in the words of `picture_of`; None for one that opens to its last byte."""
    try:
        picture_of(value, coarse=True)
    except DataError as error:
        return str(error)
    return None


def undecoded(rows: Any) -> Any:
    """The same rows with pictures as `{"bytes", "path"}`, so that one that does not open can be named."""
    columns = [name for name, feature in (rows.features or {}).items() if isinstance(feature, datasets.Image)]
    for name in columns:
        rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def named(problems: Sequence[str]) -> str:
    """Problems as one text, the first hundred of them."""
    more = len(problems) - _MOST_NAMED
    return "\n".join(f"    - {problem}" for problem in problems[:_MOST_NAMED]) + (
        f"\n    - and {more:,} more" if more > 0 else ""
    )


# ---- files ----


def _stored(value: Mapping[str, Any], coarse: bool) -> Image.Image:
    content, path = value.get("bytes"), value.get("path")
    if content is not None:
        return _open(io.BytesIO(content), name_of(value), coarse)
    if path is None:
        raise DataError("expected a picture, found neither bytes nor a path; give one of them")
    if str(path).startswith(_WEB):
        return picture_of(str(path))
    if "://" not in str(path):
        return _open(str(path), name_of(value), coarse)
    with _refusing(name_of(value)):
        # In an archive or on the Hub: `datasets` knows how to get there.
        return _read(datasets.Image().decode_example({"bytes": None, "path": path}), name_of(value), coarse)


def _open(source: Any, name: str, coarse: bool) -> Image.Image:
    with _refusing(name), Image.open(source) as image:
        return _read(image, name, coarse)


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """What goes wrong with a picture, in our words."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"expected a picture at {name}, found no file; check the path") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, first_line(error)) from error
    except Exception as error:  # decoders raise what they like: OSError, SyntaxError, struct.error, ...
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "no format that Pillow knows" if unknown else first_line(error)
        raise DataError(f"expected a picture that opens, found {name} ({reason}); replace or remove it") from error


def _too_large(name: str, found: str) -> DataError:
    return DataError(
        f"expected a picture of at most {Image.MAX_IMAGE_PIXELS:,} pixels, found {name} ({found}); make it smaller, or "
        "raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
    )


# ---- pixels ----


def _read(image: Image.Image, name: str, coarse: bool = False) -> Image.Image:
    limit, form = Image.MAX_IMAGE_PIXELS, image.format
    if limit is not None and image.width * image.height > limit:
        raise _too_large(name, f"{image.width:,} x {image.height:,}")
    with _refusing(name):
        if coarse:
            image.draft("RGB", (1, 1))
        image.load()
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = _upper_bits(image)
        elif image.mode in ("I", "F"):
            numbers = np.asarray(image)
            image = Image.fromarray(_eight_bits(numbers.astype(np.uint16) if form in _SIXTEEN_BITS else numbers, name))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
        return image.convert("RGB")


def _upper_bits(image: Image.Image) -> Image.Image:
    """Grey in 16 bits as grey in 8, transparent where the file names a colour for that."""
    numbers = np.asarray(image)
    grey = Image.fromarray((numbers >> 8).astype(np.uint8))
    if (clear := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(numbers == clear, 0, 255).astype(np.uint8)))
    return grey


def _of_array(array: np.ndarray, name: str, *, first: bool) -> Image.Image:
    """Of numbers; `first` where channels come first if they could be at both ends."""
    if array.ndim == 3 and (array.shape[0] in _CHANNELS if first else array.shape[2] not in _CHANNELS):
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in _CHANNELS)):
        raise DataError(
            "expected an array of shape (height, width), (height, width, channels) or (channels, height, width) with 1 "
            f"to 4 channels, found {array.shape}; give one picture at a time"
        )
    return _read(Image.fromarray(np.ascontiguousarray(_eight_bits(array, name))), name)


def _eight_bits(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.uint16:
        return (array >> 8).astype(np.uint8)
    whole, most = array.dtype.kind in "iu", 255 if array.dtype.kind in "iu" else 1
    if array.dtype.kind not in "iubf":
        raise DataError(f"expected numbers, found {name} of {array.dtype}; convert it")
    if not (array.min() >= 0 and array.max() <= most):  # not a number is neither
        raise DataError(
            f"expected numbers from 0 to {most} in {name} of {array.dtype}, found {array.min()} to {array.max()}; give "
            "uint8 (0 to 255), uint16 (0 to 65,535) or floats from 0 to 1"
        )
    return (array if whole else np.round(array.astype(np.float64) * 255)).astype(np.uint8)
