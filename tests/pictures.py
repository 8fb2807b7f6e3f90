"""One picture in every way that a file can hold it, and files that are none."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""By EXIF orientation: what was done to an upright picture to store it so."""
BOMB_SIDE = 30_000


def upright() -> Image.Image:
    """24 x 16 pixels; no turn of it is like another."""
    return Image.fromarray(np.random.default_rng(7).integers(0, 256, (16, 24, 3), dtype=np.uint8))


def grey() -> Image.Image:
    """The same without colours."""
    return upright().convert("L")


def half_clear() -> Image.Image:
    """RGBA: the left half of it is transparent, and red below that."""
    colours = np.asarray(upright().convert("RGBA")).copy()
    colours[:, :12] = (255, 0, 0, 0)
    return Image.fromarray(colours)


def half_white(picture: Image.Image) -> Image.Image:
    """What is seen of a picture whose left half is transparent."""
    colours = np.asarray(picture.convert("RGB")).copy()
    colours[:, :12] = 255
    return Image.fromarray(colours)


def _turned(orientation: int) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        turn = TURNS[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = folder / f"turned-{orientation}.png"
        (upright() if turn is None else upright().transpose(turn)).save(path, exif=exif)
        return path

    return write


def _cmyk(folder: Path) -> Path:
    upright().convert("CMYK").save(folder / "cmyk.tiff")
    return folder / "cmyk.tiff"


def _sixteen_bits(folder: Path) -> Path:
    Image.fromarray(np.asarray(grey()).astype(np.uint16) * 257).save(folder / "16-bits.png")
    return folder / "16-bits.png"


def _sixteen_bits_with_clear(folder: Path) -> Path:
    numbers = np.asarray(grey()).astype(np.uint16) * 257
    numbers[:, :12] = 4242
    Image.fromarray(numbers).save(folder / "16-bits-clear.png", transparency=4242)
    return folder / "16-bits-clear.png"


def _sixteen_bits_of_colour(folder: Path) -> Path:
    """Pillow does not write those."""
    numbers = np.asarray(upright()).astype(">u2") * 257
    lines = b"".join(b"\0" + line.tobytes() for line in numbers)
    return _png(folder / "16-bits-rgb.png", 24, 16, 16, 2, zlib.compress(lines))


def _palette(folder: Path) -> Path:
    """Of few colours, so that a palette holds them; one of them is transparent."""
    few = half_clear().convert("L").quantize(64, dither=Image.Dither.NONE)
    indices = np.asarray(few).copy()
    indices[:, :12] = 255
    clear = Image.fromarray(indices)
    clear.putpalette((few.getpalette() or [])[: 64 * 3] + [9] * (192 * 3))
    clear.save(folder / "palette.png", transparency=255)
    return folder / "palette.png"


def _palette_truth() -> Image.Image:
    return half_white(half_clear().convert("L").quantize(64, dither=Image.Dither.NONE).convert("RGB"))


def _grey_with_alpha(folder: Path) -> Path:
    Image.merge("LA", [grey(), half_clear().getchannel("A")]).save(folder / "grey-alpha.png")
    return folder / "grey-alpha.png"


def _with_alpha(folder: Path) -> Path:
    half_clear().save(folder / "alpha.png")
    return folder / "alpha.png"


SAME: dict[str, tuple[Callable[[Path], Path], Callable[[], Image.Image]]] = {
    **{f"exif-{orientation}": (_turned(orientation), upright) for orientation in TURNS},
    "cmyk": (_cmyk, upright),
    "16-bit-grey": (_sixteen_bits, grey),
    "16-bit-grey-and-clear": (_sixteen_bits_with_clear, lambda: half_white(grey())),
    "16-bit-rgb": (_sixteen_bits_of_colour, upright),
    "palette-and-clear": (_palette, _palette_truth),
    "grey-and-alpha": (_grey_with_alpha, lambda: half_white(grey())),
    "rgb-and-alpha": (_with_alpha, lambda: half_white(upright())),
}
"""By name: what writes the file, and how the picture looks."""


def _text(folder: Path) -> Path:
    (folder / "text.jpg").write_text("this is no picture")
    return folder / "text.jpg"


def _empty(folder: Path) -> Path:
    (folder / "empty.png").write_bytes(b"")
    return folder / "empty.png"


def _cut(folder: Path, name: str) -> Path:
    path = folder / name
    upright().resize((240, 160)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def _bomb(folder: Path, side: int) -> Path:
    return _png(folder / f"bomb-{side}.png", side, side, 1, 0, zlib.compress(b"\0" * 1000))


def _png(path: Path, width: int, height: int, bits: int, colour: int, data: bytes) -> Path:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "text": (_text, "text.jpg' .no format that Pillow knows"),
    "empty": (_empty, "empty.png' .no format that Pillow knows"),
    "cut-jpeg": (lambda folder: _cut(folder, "cut.jpg"), "cut.jpg' .*truncated"),
    "cut-png": (lambda folder: _cut(folder, "cut.png"), "cut.png' .*truncated"),
    "bomb": (lambda folder: _bomb(folder, BOMB_SIDE), "at most 89,478,485 pixels, found .*bomb-30000.png"),
    "small-bomb": (lambda folder: _bomb(folder, 10_000), "at most 89,478,485 pixels, found .*bomb-10000.png"),
    "missing": (lambda folder: folder / "missing.png", "missing.png', found no file"),
}
"""By name: what writes the file, and what is said of it."""
