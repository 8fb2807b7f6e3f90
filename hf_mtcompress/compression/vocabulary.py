"""Vocabulary pruning: keep the tokens that texts use, in the tokenizer and in the word embedding alike.

A text whose tokens are all kept is read as before, token by token, whatever else was cut:

- WordPiece takes the longest piece that fits; a shorter vocabulary offers no longer one.
- BPE merges the pair of lowest rank; with every merge that can lead to a kept token (and so every token on the way to
  it), each step finds the pair that it found before.
- Unigram takes the pieces of the highest total score; what is left of the ways to read a text still holds the best one.
  The score of an unknown character hangs on the lowest score in the vocabulary, so that piece stays.

Single characters stay, and so do pieces with a character that no single piece has: other texts fall into smaller
pieces, and what was not unknown before stays known.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel

from hf_mtcompress.data.alignment import Text, as_text
from hf_mtcompress.errors import DataError, UnsupportedEncoderError
from hf_mtcompress.model.anatomy import encoder_of, find_anatomy
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.surgery import cut_vocabulary

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""What a fast tokenizer loads from; vocabularies in older formats beside them would be stale."""
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_TEXTS_AT_ONCE = 1000


@dataclass(kw_only=True)
class VocabularyReport:
    """What a call of `trim_vocabulary` did; plain data."""

    tokens_before: int
    tokens_after: int
    used: int
    """Different tokens that the texts use, `minimum_count` times at least."""
    embedding_bytes_before: int
    """Of the word embeddings in memory."""
    embedding_bytes_after: int


@dataclass(frozen=True)
class TrimmedTokenizer:
    """A tokenizer with fewer tokens, of the same class.

    Attributes:
        tokenizer: the new one; the old one is left as it was.
        rows: for each new id the old one.
    """

    tokenizer: Any
    rows: list[int]


def trim_vocabulary(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Iterable[Sequence[Text]],
    *,
    minimum_count: int = 1,
    size: int | None = None,
) -> tuple[Any, VocabularyReport]:
    """Cut the tokens that texts do not use out of a model, in place, and out of a copy of its tokenizer.

    On texts whose tokens are all kept, the new tokenizer gives the same token strings and the model the same answers.

    Args:
        model: a `MultiTaskModel`, an encoder, or a stock model with a head; with float weights.
        tokenizer: its fast tokenizer: WordPiece, BPE or Unigram.
        texts: columns of texts, or of lists of words.
        minimum_count: tokens that are used less often are cut, 1 or more.
        size: at most so many tokens, the most frequent ones; what other tokens need is counted, too.

    Returns:
        The new tokenizer, to be saved with the model, and what was cut.

    Raises:
        DataError: there are no texts, or `size` is less than what has to stay.
        UnsupportedEncoderError: the model reads no text, the tokenizer is of another kind, or the encoder counts
            positions from a padding id that cannot be kept.
    """
    encoder = model.encoder if isinstance(model, MultiTaskModel) else encoder_of(model)
    counts = count_tokens(tokenizer, texts)
    if not counts:
        raise DataError("expected texts whose tokens are to be kept, found none; pass columns of texts")
    always = [value for key, value in encoder.config.to_dict().items() if key.endswith("_token_id")]
    trimmed = trim_tokenizer(
        tokenizer,
        counts,
        minimum_count=minimum_count,
        size=size,
        always=[value for value in always if isinstance(value, int)],
    )
    before = _embedding_bytes(encoder)
    cut_vocabulary(model, trimmed.rows)
    if isinstance(model, MultiTaskModel):
        model.refresh_config()
    report = VocabularyReport(
        tokens_before=len(tokenizer),
        tokens_after=len(trimmed.rows),
        used=sum(count >= minimum_count for count in counts.values()),
        embedding_bytes_before=before,
        embedding_bytes_after=_embedding_bytes(encoder),
    )
    return trimmed.tokenizer, report


def _embedding_bytes(encoder: PreTrainedModel) -> int:
    table = find_anatomy(encoder).word_embedding
    return 0 if table is None else table.weight.numel() * table.weight.element_size()


# ---- what texts use ----


def count_tokens(tokenizer: Any, texts: Iterable[Sequence[Text]]) -> Counter[int]:
    """How often each token is used, by id; special tokens that are put around a text are not counted.

    Args:
        tokenizer: a fast tokenizer.
        texts: columns of texts, or of lists of words.
    """
    return Counter(token for ids in _encoded(tokenizer, texts) for token in ids)


@dataclass(frozen=True)
class Reading:
    """How texts are read with the whole vocabulary and with a cut one; shares are None where there is nothing to count.

    Attributes:
        texts: number of texts.
        same: share of texts with the same tokens.
        tokens_before: mean tokens of a text, without special ones.
        tokens_after: the same with the cut vocabulary.
        unknown_before: share of tokens that are the unknown one.
        unknown_after: the same with the cut vocabulary.
    """

    texts: int
    same: float | None
    tokens_before: float | None
    tokens_after: float | None
    unknown_before: float | None
    unknown_after: float | None


def compare_readings(before: Any, after: Any, texts: Iterable[Sequence[Text]]) -> Reading:
    """Read texts with two tokenizers, of which the second has some of the tokens of the first."""
    columns = list(texts)
    same = total = 0
    tokens, unknown = [0, 0], [0, 0]
    ids = before.get_vocab()
    before_of = {new: ids[token] for token, new in after.get_vocab().items()}
    for old, new in zip(_encoded(before, columns), _encoded(after, columns), strict=True):
        total += 1
        same += old == [before_of[token] for token in new]
        for place, (tokenizer, read) in enumerate(((before, old), (after, new))):
            tokens[place] += len(read)
            unknown[place] += read.count(tokenizer.unk_token_id)
    return Reading(
        texts=total,
        same=_share(same, total),
        tokens_before=_share(tokens[0], total),
        tokens_after=_share(tokens[1], total),
        unknown_before=_share(unknown[0], tokens[0]),
        unknown_after=_share(unknown[1], tokens[1]),
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _encoded(tokenizer: Any, columns: Iterable[Sequence[Text]]) -> Iterator[list[int]]:
    for column in columns:
        for start in range(0, len(column), _TEXTS_AT_ONCE):
            part = [as_text(row) for row in column[start : start + _TEXTS_AT_ONCE]]
            # Whole texts, so that what stays does not hang on the length at which inputs are cut.
            yield from tokenizer(
                part,
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]


# ---- a tokenizer with fewer tokens ----


def trim_tokenizer(
    tokenizer: Any,
    counts: Mapping[int, int],
    *,
    minimum_count: int = 1,
    size: int | None = None,
    always: Collection[int] = (),
) -> TrimmedTokenizer:
    """A copy of a fast tokenizer without the tokens that are used too seldom.

    Special and added tokens stay, as do single characters and what kept tokens are made of. Special tokens keep their
    ids where there is room for it, since some families count on them; all others keep their order.

    Args:
        tokenizer: WordPiece, BPE or Unigram; it is left as it is.
        counts: uses by id, as `count_tokens` returns them.
        minimum_count: tokens that are used less often are cut, 1 or more.
        size: at most so many tokens, the most frequent ones and what they need.
        always: ids that stay whatever the counts, such as those that a model's config names.

    Raises:
        DataError: `size` is less than what has to stay.
        UnsupportedEncoderError: the tokenizer is of another kind, or does not load with another vocabulary.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    document: Any = json.loads(backend.to_str()) if backend is not None else {"model": {"type": "no fast tokenizer"}}
    kind = document["model"]["type"]
    if kind not in ("WordPiece", "BPE", "Unigram"):
        raise UnsupportedEncoderError(
            f"{type(tokenizer).__name__}: expected a fast tokenizer with WordPiece, BPE or Unigram to cut its "
            f"vocabulary, found {kind}; leave the vocabulary as it is"
        )
    old = _ids(document)
    names = {token: name for name, token in old.items()}
    special = {*tokenizer.all_special_tokens, *(names[token] for token in always if token in names)}
    has_to_stay = special | {entry["content"] for entry in document["added_tokens"]} | _basic_pieces(document["model"])
    used = sorted((-count, token) for token, count in counts.items() if count >= minimum_count)
    kept = _choose(has_to_stay & set(old), [names[token] for _, token in used], _needs(document["model"]), size)
    new = _new_ids(old, kept, _pieces(document["model"]), special)
    trimmed = _rebuilt(tokenizer, _rewritten(document, new), new)
    return TrimmedTokenizer(trimmed, [old[name] for name in sorted(new, key=new.__getitem__)])


def _pieces(model: Mapping[str, Any]) -> dict[str, int]:
    """Tokens of the model itself, by id; added tokens may stand beside them."""
    vocabulary = model["vocab"]
    return (
        dict(vocabulary)
        if isinstance(vocabulary, dict)
        else {piece: place for place, (piece, _) in enumerate(vocabulary)}
    )


def _ids(document: Mapping[str, Any]) -> dict[str, int]:
    return {**_pieces(document["model"]), **{entry["content"]: entry["id"] for entry in document["added_tokens"]}}


def _basic_pieces(model: Mapping[str, Any]) -> set[str]:
    """Pieces of the model that other texts fall back to."""
    pieces = _pieces(model)
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    basic = {piece for piece in pieces if len(piece.removeprefix(prefix).removesuffix(suffix)) <= 1}
    if model.get("byte_fallback"):
        basic |= {piece for piece in pieces if _BYTE.fullmatch(piece)}
    match model["type"]:
        case "WordPiece":
            basic |= {piece for piece in pieces if not basic.issuperset(_characters(piece, prefix))}
            basic.add(model["unk_token"])
        case "Unigram":
            basic |= {piece for piece in pieces if not basic.issuperset(piece)}
            basic.add(min(model["vocab"], key=lambda entry: entry[1])[0])
            if model["unk_id"] is not None:
                basic.add(model["vocab"][model["unk_id"]][0])
        case _:  # BPE begins with characters or bytes: those that are not there were unknown before
            if model["unk_token"] is not None:
                basic.add(model["unk_token"])
    return basic


def _characters(piece: str, prefix: str) -> list[str]:
    """A WordPiece piece in pieces of one character."""
    inside = piece.startswith(prefix) and piece != prefix
    return [
        f"{prefix}{letter}" if inside or place else letter
        for place, letter in enumerate(piece.removeprefix(prefix) if inside else piece)
    ]


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Merges of a BPE model, lowest rank first; older files hold them as text."""
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    return [(left, right) for left, right in pairs]


def _merged(model: Mapping[str, Any], merge: tuple[str, str]) -> str:
    return merge[0] + merge[1].removeprefix(model.get("continuing_subword_prefix") or "")


def _needs(model: Mapping[str, Any]) -> Callable[[str], set[str]]:
    """A function that returns a token with all that it is made of."""
    makers: dict[str, list[tuple[str, str]]] = {}
    if model["type"] == "BPE":
        for merge in _merges(model):
            makers.setdefault(_merged(model, merge), []).append(merge)

    def needs(token: str) -> set[str]:
        found, open_ends = {token}, [token]
        while open_ends:
            parts = {part for merge in makers.get(open_ends.pop(), ()) for part in merge} - found
            found |= parts
            open_ends += parts
        return found

    return needs


def _choose(has_to_stay: set[str], used: Sequence[str], needs: Callable[[str], set[str]], size: int | None) -> set[str]:
    """Tokens to keep; `used` ones come most frequent first."""
    kept = {part for token in has_to_stay for part in needs(token)}
    if size is not None and len(kept) > size:
        raise DataError(
            f"size: expected at least {len(kept)} tokens, since special tokens and single characters stay, found {size}"
        )
    for token in used:
        more = needs(token) - kept
        if size is None or len(kept) + len(more) <= size:
            kept |= more
    return kept


def _new_ids(old: Mapping[str, int], kept: set[str], pieces: Collection[str], special: set[str]) -> dict[str, int]:
    """Ids without gaps: the model's pieces first, then tokens that were only added to them."""
    inside = sorted(kept & set(pieces), key=old.__getitem__)
    held = [name for name in inside if name in special and old[name] < len(inside)]
    # One that stays must not overtake one that has no room: CLIP looks for the largest id in a text.
    while (order := [name for name in _arranged(inside, held, old) if name in special]) != sorted(
        order, key=old.__getitem__
    ):
        held.pop()
    names = _arranged(inside, held, old) + sorted(kept - set(pieces), key=old.__getitem__)
    return {name: place for place, name in enumerate(names)}


def _arranged(names: Sequence[str], held: Collection[str], old: Mapping[str, int]) -> list[str]:
    """The names in their order, with some at the places of their old ids."""
    places = {old[name]: name for name in held}
    others = iter([name for name in names if name not in held])
    return [places[place] if place in places else next(others) for place in range(len(names))]


def _rewritten(document: dict[str, Any], new: Mapping[str, int]) -> dict[str, Any]:
    """The tokenizer's own JSON with other ids."""
    model = dict(document["model"])
    pieces = [name for name in _pieces(model) if name in new]
    match model["type"]:
        case "Unigram":
            scores = dict(model["vocab"])
            model["vocab"] = [[name, scores[name]] for name in sorted(pieces, key=new.__getitem__)]
            if model["unk_id"] is not None:
                model["unk_id"] = new[document["model"]["vocab"][model["unk_id"]][0]]
        case _:
            model["vocab"] = {name: new[name] for name in sorted(pieces, key=new.__getitem__)}
    if "merges" in model:
        model["merges"] = [
            list(merge) for merge in _merges(model) if {*merge, _merged(model, merge)} <= set(model["vocab"])
        ]
    return {
        **document,
        "model": model,
        "added_tokens": sorted(
            ({**entry, "id": new[entry["content"]]} for entry in document["added_tokens"]),
            key=lambda entry: entry["id"],
        ),
        "post_processor": _with_new_ids(document["post_processor"], new),
        "padding": document["padding"] and {**document["padding"], "pad_id": new[document["padding"]["pad_token"]]},
    }


def _with_new_ids(processor: Any, new: Mapping[str, int]) -> Any:
    """A post-processor (which puts special tokens around a text) with other ids."""
    match processor:
        case {"type": "Sequence", "processors": parts}:
            return {**processor, "processors": [_with_new_ids(part, new) for part in parts]}
        case {"type": "TemplateProcessing", "special_tokens": tokens}:
            named = {key: {**entry, "ids": [new[token] for token in entry["tokens"]]} for key, entry in tokens.items()}
            return {**processor, "special_tokens": named}
        case {"sep": [separator, _], "cls": [start, _]}:
            return {**processor, "sep": [separator, new[separator]], "cls": [start, new[start]]}
        case _:
            return processor


def _rebuilt(tokenizer: Any, document: Mapping[str, Any], new: Mapping[str, int]) -> Any:
    """A tokenizer of the same class and settings, as it loads from a saved folder."""
    with TemporaryDirectory() as place:
        tokenizer.save_pretrained(place)
        for file in Path(place).iterdir():
            if file.name not in _FILES:
                file.unlink()
        (Path(place) / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
        settings = Path(place) / "tokenizer_config.json"
        values = json.loads(settings.read_text(encoding="utf-8"))
        if "added_tokens_decoder" in values:
            values["added_tokens_decoder"] = {
                str(new[entry["content"]]): entry for entry in values["added_tokens_decoder"].values()
            }
            settings.write_text(json.dumps(values), encoding="utf-8")
        made = type(tokenizer).from_pretrained(place)
    # Where it was loaded from just now is gone already.
    for key in ("name_or_path", "is_local", "local_files_only"):
        made.init_kwargs.pop(key, None)
        if key in tokenizer.init_kwargs:
            made.init_kwargs[key] = tokenizer.init_kwargs[key]
    made.name_or_path = tokenizer.name_or_path
    found = json.loads(made.backend_tokenizer.to_str())["model"]
    wrong = [key for key in ("vocab", "merges", "unk_id") if found.get(key) != document["model"].get(key)]
    if wrong or made.get_vocab() != dict(new):
        raise UnsupportedEncoderError(
            f"{type(tokenizer).__name__}: expected a tokenizer that loads with the tokens it was saved with, found "
            f"other {', '.join(wrong) or 'ids of added tokens'}; leave the vocabulary as it is"
        )
    return made
