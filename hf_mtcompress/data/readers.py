"""How rows become model inputs: one Reader for each encoder, of texts or of images.

Nothing else asks which of them an encoder reads. `reader_of` (of a tokenizer or image processor in memory),
`load_reader` (of a saved folder) and `pretrained_reader` (of a checkpoint) choose the class; everything behind them
asks the reader, or takes inputs by whatever names they come under. An encoder that reads texts and images together
(ViLT, LayoutLMv3: a `ProcessorMixin`) is one more class here, a case in each of these three, and a place in `_READERS`.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from hf_mtcompress.artifacts import save_processor
from hf_mtcompress.data.alignment import Start, as_text, read_with_starts, words_of_tokens
from hf_mtcompress.data.pixels import fetched, picture_of
from hf_mtcompress.environment import package_version
from hf_mtcompress.errors import ArtifactError, DataError, UnsupportedEncoderError, first_line
from hf_mtcompress.recipe.tasks import Modality

WORD_IDS = "word_ids"
"""Beside the inputs of texts whose words are labelled: the word that each token begins in."""
_DEFAULT_MAX_LENGTH = 512
_BEYOND_ANY_TEXT = 10**6
"""Tokenizers without a limit of their own say a number beyond this."""
_TEXTS = (
    "The ferry left the harbour an hour late, so we had time for a second coffee and a walk along the old pier.",
    "Nobody on the committee could say who had ordered forty boxes of green paint, or what they had been meant for.",
)
_RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Filters by their number in Pillow."""


_DATA = ("pixel_values", "bbox", "image", "visual_embeds", "visual_feats", "input_values", "input_features")
"""Inputs that cannot be made of a text: pixels, places on a page, sound."""
_BACKENDS = ("pil", "torchvision")
_BACKEND = "image_backend"
"""Which of them an image processor computes with, beside its settings in `preprocessor_config.json`."""


class Reader(ABC):
    """Turns raw rows into the inputs of one encoder.

    Attributes:
        names: model inputs that every reader of the class may make, the main one first.
        on_read: whether rows are encoded when they are read, since all of them would fill the disk.
        processor: what does it: a tokenizer or image processor, which a `Trainer` calls its `processing_class`.
        max_length: longest input in tokens, longer ones are cut; None where inputs have no tokens.
    """

    names: ClassVar[tuple[str, ...]]
    on_read: ClassVar[bool]
    processor: Any
    max_length: int | None = None

    @property
    def input_names(self) -> tuple[str, ...]:
        """Model inputs that it makes, the main one first."""
        made = self.processor.model_input_names
        return (*(name for name in self.names if name in made), *(name for name in made if name not in self.names))

    def left_out(self, taken: Iterable[str]) -> list[str]:
        """Those of an encoder's inputs that hold data of their own, such as pictures, and that it does not make."""
        return [name for name in taken if name in _DATA and name not in self.input_names]

    @property
    @abstractmethod
    def preprocessing(self) -> dict[str, int]:
        """What a saved model notes of it, as `MultiTaskModel.from_encoder` takes it."""

    @abstractmethod
    def columns(self, samples: Sequence[Any]) -> list[list[Any]]:
        """Raw inputs as a user gives them, one a row, as columns for `encode`.

        Raises:
            DataError: they are none that it reads.
        """

    @abstractmethod
    def encode(self, columns: Sequence[Sequence[Any]], *, words: bool = False) -> dict[str, list[Any]]:
        """Model inputs, one entry a row.

        Args:
            columns: one sequence for each input column; a list of words is read as the text that it makes.
            words: say the words of tokens, for tasks that label words: `WORD_IDS` then stands beside the inputs, which
                are the same as without.

        Raises:
            DataError: a row is not what it reads.
        """

    @abstractmethod
    def encode_with_starts(
        self, columns: Sequence[Sequence[Any]]
    ) -> tuple[dict[str, list[Any]], list[list[Start | None]] | None]:
        """As `encode`, and where each token begins; None where inputs have no tokens."""

    @abstractmethod
    def collate(self, rows: Sequence[Mapping[str, Any]], pad_to_multiple_of: int | None = None) -> dict[str, Tensor]:
        """Encoded rows as one batch, padded to the longest; what is no model input is left out."""

    @abstractmethod
    def example(self, rows: int, *, length: int = 9, padding: int = 0, seed: int = 0) -> dict[str, Tensor]:
        """A made-up batch, to trace an encoder, probe it or time it.

        Args:
            rows: how many.
            length: in tokens, where there are some.
            padding: how many of these the last row lacks, where the reader pads.
            seed: other seeds give other rows.
        """

    @abstractmethod
    def samples(self) -> list[Any]:
        """A few made-up inputs as a user gives them."""

    @abstractmethod
    def unpadded(self, samples: Sequence[Any], length: int) -> dict[str, np.ndarray]:
        """A batch of real inputs in which nothing is padding: texts are repeated and cut to `length` tokens."""

    @abstractmethod
    def describe(self, *, words: bool = False) -> tuple[dict[str, Any], tuple[str, ...]]:
        """How it reads, as plain values for the engine of a web page; and the saved files which that engine needs.

        Raises:
            UnsupportedEncoderError: it does something that the engine cannot do.
        """

    @abstractmethod
    def digest(self) -> str:
        """Digest of all that its inputs depend on beside the rows, for caches."""

    def reads_as(self, other: "Reader") -> bool:
        """Whether both make the same inputs, of whatever length."""
        return self.limited(None).digest() == other.limited(None).digest()

    def limited(self, max_length: int | None) -> Self:
        """The same with another longest input; None for its own limit."""
        return self

    @property
    def own_limit(self) -> int | None:
        """Longest input in tokens that the processor itself allows; None where it says nothing of it."""
        return None

    def save(self, folder: Path) -> None:
        """Write it beside a model; `load_reader` opens it."""
        save_processor(self.processor, folder)


@dataclass(frozen=True, eq=False)
class TextReader(Reader):
    """Reads texts, lists of words, or pairs of either, with a tokenizer."""

    names: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "token_type_ids")
    on_read: ClassVar[bool] = False

    processor: Any
    max_length: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_length", max_length_of(self.processor, self.max_length))

    @property
    def preprocessing(self) -> dict[str, int]:
        assert self.max_length is not None
        return {"max_length": self.max_length}

    @property
    def own_limit(self) -> int | None:
        limit = self.processor.model_max_length
        return limit if limit < _BEYOND_ANY_TEXT else None

    def limited(self, max_length: int | None) -> Self:
        return replace(self, max_length=max_length)

    def columns(self, samples: Sequence[Any]) -> list[list[Any]]:
        rows = [_texts_of(sample) for sample in samples]
        kinds = {_kind_of(row) for row in rows}
        if len(kinds) != 1 or "unknown" in kinds:
            raise DataError(
                "expected texts, lists of words or (text, text) tuples, all of one kind, found "
                f"{sorted({type(row).__name__ for row in rows})}; convert the inputs"
            )
        return [list(column) for column in zip(*rows, strict=True)] if kinds.pop().startswith("pair") else [rows]

    def encode(self, columns: Sequence[Sequence[Any]], *, words: bool = False) -> dict[str, list[Any]]:
        if words:
            inputs, starts = self.encode_with_starts(columns)
            return {**inputs, WORD_IDS: [words_of_tokens(*row) for row in zip(columns[0], starts, strict=True)]}
        return dict(self.processor(*_texts(columns), truncation=True, max_length=self.max_length))

    def encode_with_starts(
        self, columns: Sequence[Sequence[Any]]
    ) -> tuple[dict[str, list[Any]], list[list[Start | None]]]:
        return read_with_starts(_texts(columns), self.processor, self.max_length)

    def collate(self, rows: Sequence[Mapping[str, Any]], pad_to_multiple_of: int | None = None) -> dict[str, Tensor]:
        names = [name for name in dict.fromkeys((*self.names, *self.input_names)) if name in rows[0]]
        if not names:
            return {}
        inputs = [{name: row[name] for name in names if name in row} for row in rows]
        if len(rows) == 1 and pad_to_multiple_of is None and self.processor.pad_token_id is None:
            return _stacked(inputs, names)  # nothing is to be padded
        return dict(self.processor.pad(inputs, return_tensors="pt", pad_to_multiple_of=pad_to_multiple_of))

    def example(self, rows: int, *, length: int = 9, padding: int = 0, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        # Tokens that were added later may have no row in the encoder's table.
        vocabulary = self.processor.vocab_size
        ids = torch.randint(0, vocabulary, (rows, length), generator=generator)
        mask, pad = torch.ones_like(ids), self.processor.pad_token_id
        if pad is not None:
            ids[ids == pad] = (pad + 1) % vocabulary
            mask[-1, length - padding :] = 0
            ids[mask == 0] = pad
        made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        return {name: made[name] for name in self.names if name in self.input_names}

    def samples(self) -> list[Any]:
        return list(_TEXTS)

    def unpadded(self, samples: Sequence[Any], length: int) -> dict[str, np.ndarray]:
        assert self.max_length is not None
        length = min(length, self.max_length)
        texts = [as_text(sample) for sample in samples]
        # A word is at least one token in every vocabulary, so this is always long enough.
        repeated = [" ".join([text or "text"] * length) for text in texts]
        encoded = self.processor(repeated, truncation=True, max_length=length, return_tensors="np")
        return {name: np.asarray(array) for name, array in encoded.items()}

    def describe(self, *, words: bool = False) -> tuple[dict[str, Any], tuple[str, ...]]:
        if not self.processor.is_fast:
            raise UnsupportedEncoderError(
                f"expected a fast tokenizer, found {type(self.processor).__name__}; save one beside the model"
            )
        text = {
            "max_length": self.max_length,
            "truncation_side": self.processor.truncation_side,
            "words": words,
            "pairs": not words,
            "templates": {"single": self._template(None), "pair": self._template("a")},
        }
        return {"text": text}, ("tokenizer.json", "tokenizer_config.json")

    def _template(self, pair: str | None) -> list[dict[str, Any]]:
        """Where texts and special tokens stand: parts with `ids` or the number of a `text`, and their token type."""
        encoded = self.processor("a", pair, return_token_type_ids=True)
        parts: list[dict[str, Any]] = []
        for token, owner, kind in zip(
            encoded["input_ids"], encoded.sequence_ids(0), encoded["token_type_ids"], strict=True
        ):
            last = parts[-1] if parts else {}
            if owner is None and "ids" in last and last["type"] == kind:
                last["ids"].append(token)
            elif owner is None:
                parts.append({"ids": [token], "type": kind})
            elif last.get("text") != owner:
                parts.append({"text": owner, "type": kind})
        return parts

    def reads_as(self, other: Reader) -> bool:
        if not isinstance(other, TextReader):
            return False
        one, two = self.processor, other.processor
        special = [(item.cls_token_id, item.sep_token_id, item.pad_token_id, item.mask_token_id) for item in (one, two)]
        return one is two or (one.get_vocab() == two.get_vocab() and special[0] == special[1])

    def digest(self) -> str:
        backend = getattr(self.processor, "backend_tokenizer", None)
        if backend is None:
            rules: Any = sorted(self.processor.get_vocab().items())
        else:
            # How it cut and padded last is noted there too.
            rules = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
        sides = [self.processor.truncation_side, self.processor.padding_side]
        return _digest_of([rules, sides, self.max_length, list(self.input_names)])


@dataclass(frozen=True, eq=False)
class ImageReader(Reader):
    """Reads images with an image processor."""

    names: ClassVar[tuple[str, ...]] = ("pixel_values",)
    on_read: ClassVar[bool] = True

    processor: Any

    def __post_init__(self) -> None:
        # The processor's own `save_pretrained` leaves this out, whoever calls it; pixels are not quite the same.
        object.__setattr__(self, "processor", _with_its_backend(self.processor))

    @property
    def preprocessing(self) -> dict[str, int]:
        side = dict(getattr(self.processor, "size", None) or {}).get("height")
        return {} if side is None else {"image_size": side}

    def columns(self, samples: Sequence[Any]) -> list[list[Any]]:
        return [[fetched(sample) for sample in samples]]

    def encode(self, columns: Sequence[Sequence[Any]], *, words: bool = False) -> dict[str, list[Any]]:
        encoded = self.processor([picture_of(value) for value in columns[0]], return_tensors="np")
        return {name: list(encoded[name]) for name in self.input_names if name in encoded}

    def encode_with_starts(
        self, columns: Sequence[Sequence[Any]]
    ) -> tuple[dict[str, list[Any]], list[list[Start | None]] | None]:
        return self.encode(columns), None

    def collate(self, rows: Sequence[Mapping[str, Any]], pad_to_multiple_of: int | None = None) -> dict[str, Tensor]:
        return _stacked(rows, self.input_names)

    def example(self, rows: int, *, length: int = 9, padding: int = 0, seed: int = 0) -> dict[str, Tensor]:
        noise = np.random.default_rng(seed).integers(0, 256, (rows, 64, 64, 3), dtype=np.uint8)
        encoded = self.encode([[Image.fromarray(picture) for picture in noise]])
        return {name: torch.as_tensor(np.stack(values)) for name, values in encoded.items()}

    def samples(self) -> list[Any]:
        return [Image.effect_noise((256, 256), 64)]

    def unpadded(self, samples: Sequence[Any], length: int) -> dict[str, np.ndarray]:
        return {name: np.stack(values) for name, values in self.encode([samples]).items()}

    def describe(self, *, words: bool = False) -> tuple[dict[str, Any], tuple[str, ...]]:
        def of(name: str) -> Any:
            return getattr(self.processor, name, None)

        size = {key: value for key, value in dict(of("size")).items() if value is not None} if of("do_resize") else None
        crop = dict(of("crop_size")) if of("do_center_crop") else None
        known = size is None or set(size) in ({"height", "width"}, {"shortest_edge"})
        if not known or of("do_pad") or of("do_convert_rgb") is False:
            raise UnsupportedEncoderError(
                f"expected an image processor that scales to height and width or to the shortest edge, crops and "
                f"normalizes, found {type(self.processor).__name__} with size {size}; a web page cannot do what it does"
            )
        image = {
            "size": size,
            "crop": None if crop is None else {key: crop[key] for key in ("height", "width")},
            "resample": _RESAMPLE[int(of("resample") if of("resample") is not None else 2)],
            "tall_first": int((package_version("pillow") or "13").partition(".")[0]) >= 13,
            "factor": of("rescale_factor") if of("do_rescale") else 1.0,
            "mean": list(of("image_mean")) if of("do_normalize") else [0.0] * 3,
            "std": list(of("image_std")) if of("do_normalize") else [1.0] * 3,
        }
        return {"image": image}, ()

    def digest(self) -> str:
        return _digest_of(sorted(self.processor.to_dict().items()))


def _with_its_backend(processor: BaseImageProcessor) -> BaseImageProcessor:
    """An image processor that computes with the library that it was saved with, and is saved with a note of it.

    Raises:
        ArtifactError: that library is not installed.
    """
    found = getattr(processor, "backend", None)
    noted = getattr(processor, _BACKEND, found)
    if noted != found:
        with TemporaryDirectory() as scratch:
            processor.save_pretrained(scratch)
            processor = AutoImageProcessor.from_pretrained(scratch, backend=noted)
        if (found := getattr(processor, "backend", None)) != noted:
            raise ArtifactError(
                f"expected {noted}, which made the pixels that this model was trained on, found {found}, which makes "
                f"slightly other ones; install {noted}, or change {_BACKEND} in preprocessor_config.json to '{found}' "
                "if those will do"
            )
    if found in _BACKENDS:
        setattr(processor, _BACKEND, found)
    return processor


_READERS: tuple[type[Reader], ...] = (TextReader, ImageReader)


def lies_in_files(reads: Collection[Modality]) -> bool:
    """Whether what tasks read may lie in files of its own, whose paths stand in the rows."""
    return "image" in reads


def reader_of(processor: Any, max_length: int | None = None) -> Reader:
    """The reader that works with a tokenizer or image processor.

    Args:
        processor: tokenizer or image processor.
        max_length: longest input in tokens; None for the tokenizer's own limit, at most 512.

    Raises:
        DataError: it is neither.
    """
    match processor:
        case PreTrainedTokenizerBase():
            return TextReader(processor, max_length)
        case BaseImageProcessor():
            return ImageReader(processor)
        case _:
            raise DataError(
                f"expected a tokenizer or image processor, found {type(processor).__name__}; pass one of them, as "
                "AutoTokenizer.from_pretrained or AutoImageProcessor.from_pretrained give it"
            )


def saved_reader(processor: Any, max_length: int | None = None) -> Reader:
    """As `reader_of`, of what transformers read from a saved folder, with whatever library it prefers there."""
    if isinstance(processor, BaseImageProcessor) and not hasattr(processor, _BACKEND):
        setattr(processor, _BACKEND, "pil")
    return reader_of(processor, max_length)


def reader_if_known(processor: Any, max_length: int | None = None) -> Reader | None:
    """As `reader_of`; None for anything else, which a script with rows and a collator of its own may pass on."""
    try:
        return reader_of(processor, max_length)
    except DataError:
        return None


def load_reader(folder: Path, max_length: int | None = None) -> Reader:
    """The reader whose tokenizer or image processor is saved in a folder.

    Args:
        folder: of a saved model.
        max_length: as of `reader_of`.

    Raises:
        ArtifactError: there is none.
    """
    try:
        if (folder / "preprocessor_config.json").is_file():
            processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
            return _tried(reader_of(processor))
        if (folder / "tokenizer_config.json").is_file():
            return _tried(reader_of(AutoTokenizer.from_pretrained(folder, trust_remote_code=False), max_length))
    except (ArtifactError, ImportError, MemoryError):
        raise
    except Exception as error:  # whatever tokenizers and Pillow raise: there is no class for all of it
        raise ArtifactError(
            f"expected a tokenizer or image processor that loads from {folder}, found one that does not "
            f"({type(error).__name__}: {first_line(error)}); save it again with processor.save_pretrained(folder)"
        ) from error
    names = sorted(path.name for path in folder.iterdir())
    found = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
    raise ArtifactError(
        f"expected a tokenizer or image processor in {folder}, found {found}; "
        "save it there with processor.save_pretrained(folder)"
    )


def _tried(reader: Reader) -> Reader:
    """The same, once it has read something: settings that cannot be are noticed at the first input alone."""
    encoded = reader.encode(reader.columns(reader.samples()[:1]))
    reader.collate([{name: values[0] for name, values in encoded.items()}])
    return reader


def pretrained_reader(
    path: str,
    reads: Collection[Modality],
    *,
    max_length: int | None = None,
    image_size: int | None = None,
    **options: Any,
) -> Reader:
    """The reader of a pretrained encoder, which may have several of them, for what its tasks read.

    Args:
        path: local folder or Hub id.
        reads: what the tasks read.
        max_length: as of `reader_of`.
        image_size: side of the input in pixels; default: what the image processor says.
        **options: for `from_pretrained`.

    Raises:
        ArtifactError: it has none for that.
    """
    images = set(reads) == {"image"}
    try:
        if not images:
            return reader_of(AutoTokenizer.from_pretrained(path, **options), max_length)
        processor = AutoImageProcessor.from_pretrained(path, backend="pil", **options)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"expected a local folder or a Hub id of a pretrained encoder with its "
            f"{'image processor' if images else 'tokenizer'}, found '{path}' ({first_line(error)}); "
            "check the spelling, or download it first where there is no network"
        ) from error
    if image_size is not None:
        side = {"height": image_size, "width": image_size}
        processor.size = side
        if processor.crop_size is not None:
            processor.crop_size = side
    return reader_of(processor)


def max_length_of(tokenizer: PreTrainedTokenizerBase, wanted: int | None) -> int:
    """Longest input in tokens: what is wanted, else the tokenizer's own limit, at most 512."""
    return min(tokenizer.model_max_length, _DEFAULT_MAX_LENGTH) if wanted is None else wanted


# ---- encoded rows and batches, which may have come without a reader ----


def are_encoded(columns: Collection[str], reader: Reader | None = None) -> bool:
    """Whether rows with these columns are model inputs already: those of the reader, or of any."""
    return any(kind.names[0] in columns for kind in ([reader] if reader is not None else _READERS))


def input_columns(columns: Iterable[str], reader: Reader | None = None) -> list[str]:
    """Those of the columns of encoded rows that are model inputs."""
    known = {*(name for kind in _READERS for name in kind.names), *(() if reader is None else reader.input_names)}
    return [name for name in columns if name in known]


def collate_inputs(
    rows: Sequence[Mapping[str, Any]], reader: Reader | None = None, pad_to_multiple_of: int | None = None
) -> dict[str, Tensor]:
    """Encoded rows as one batch; what no reader pads must be of one size."""
    batch = {} if reader is None else reader.collate(rows, pad_to_multiple_of)
    return {**batch, **_stacked(rows, [name for kind in _READERS for name in kind.names if name not in batch])}


def lengths_of(rows: Dataset | Mapping[str, Sequence[Any]]) -> list[int] | None:
    """Tokens of each encoded row; None where rows have none, and are all of one size."""
    tokens = TextReader.names[0]
    if isinstance(rows, Dataset):
        return [len(ids) for ids in rows.with_format(None)[tokens]] if tokens in rows.column_names else None
    return [len(ids) for ids in rows[tokens]] if tokens in rows else None


def positions_of(batch: Mapping[str, Any]) -> Tensor:
    """(rows, tokens): 1 where a token counts; (rows,) ones where rows have no tokens."""
    tokens, mask, _ = TextReader.names
    if mask in batch:
        return batch[mask]
    if tokens in batch:
        return torch.ones_like(batch[tokens])
    pixels = batch[ImageReader.names[0]]
    return torch.ones(len(pixels), device=pixels.device)


def padded_length(batch: Mapping[str, Any]) -> int | None:
    """Tokens of each row of a batch, padding included; None where rows have none."""
    tokens = TextReader.names[0]
    return int(batch[tokens].shape[1]) if tokens in batch else None


def _stacked(rows: Sequence[Mapping[str, Any]], names: Iterable[str]) -> dict[str, Tensor]:
    """Rows of one size as one batch.

    Raises:
        DataError: they are of several sizes.
    """
    found = {name: [torch.as_tensor(row[name]) for row in rows] for name in names if name in rows[0]}
    for name, values in found.items():
        if len(sizes := sorted({tuple(value.shape) for value in values})) > 1:
            raise DataError(
                f"expected rows of one size for '{name}', found {sizes}; pass processing_class, with which texts are "
                "padded"
            )
    return {name: torch.stack(values) for name, values in found.items()}


def _texts(columns: Sequence[Sequence[Any]]) -> list[list[str]]:
    return [[as_text(row) for row in column] for column in columns]


def _texts_of(sample: Any) -> Any:
    """A text, a list of words, or a pair of them, given as such or under `text` and `text_pair`."""
    if not isinstance(sample, Mapping):
        return sample
    if "text" not in sample:
        raise DataError(f"expected the keys text and perhaps text_pair, found {list(sample)}; rename them")
    text, pair = (list(part) if isinstance(part, tuple) else part for part in (sample["text"], sample.get("text_pair")))
    return text if pair is None else (text, pair)


def _kind_of(row: Any) -> str:
    if isinstance(row, str):
        return "text"
    if isinstance(row, list) and all(isinstance(part, str) for part in row):
        return "words"
    if isinstance(row, tuple) and len(row) == 2 and _kind_of(row[0]) == _kind_of(row[1]) in ("text", "words"):
        return f"pair of {_kind_of(row[0])}"
    return "unknown"


def _digest_of(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, default=repr).encode("utf-8", "surrogatepass")).hexdigest()
