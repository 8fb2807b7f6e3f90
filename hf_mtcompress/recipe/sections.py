"""One section of a recipe: a raw mapping becomes a config dataclass, every mistake in it is written down.

The config classes stay plain dataclasses. Their annotations say what is allowed: pydantic checks and converts each
value, this module words what went wrong in the terms of a recipe.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from hf_mtcompress.recipe.data import DataConfig

WRITTEN_AS = {"source": "from"}
"""Fields whose key in a recipe is a word that Python keeps for itself."""

_BUILDER_ARGUMENTS_LIKE_KEYS = {"names"}
"""Arguments of `datasets` builders that look like a misspelt key of `data`, but are not."""


class Problems:
    """Mistakes found so far, each with the place where the user wrote it."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, path: str, message: str) -> None:
        """Note a mistake; `path` is dotted, as in an override."""
        self.lines.append(f"{path}: {message}" if path else message)


def join(path: str, key: object) -> str:
    """The dotted path of a key inside a section."""
    return f"{path}.{key}" if path else str(key)


def shown(value: Any) -> str:
    """A value as a short quotation for a message."""
    match value:
        case Mapping():
            return "a section with " + (", ".join(map(str, value)) or "nothing in it")
        case str():
            return f"'{value}'" if len(value) <= 60 else f"'{value[:57]}...'"
        case bool():
            return str(value).lower()
        case None:
            return "nothing"
        case _:
            text = str(value)
            return text if len(text) <= 60 else f"{text[:57]}..."


def near(word: str, known: list[str]) -> str:
    """The end of a message about an unknown word: the nearest known one, else all of them."""
    close = get_close_matches(word.lower(), known, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"expected one of {', '.join(sorted(known))}"


def build_section(
    cls: type, raw: Any, path: str, problems: Problems, built: Mapping[str, Any] = types.MappingProxyType({})
) -> Any:
    """Build a config dataclass from a raw mapping.

    A key with no value (`budget:`) counts as left out. Sections inside are built the same way; a union of sections is
    told apart by `kind`.

    Args:
        cls: the dataclass.
        raw: the section as written.
        path: where it stands, dotted.
        problems: receives every mistake.
        built: fields that the caller has built already; their keys in `raw` are not looked at.

    Returns:
        The object, or None when `problems` got longer.
    """
    fields = {WRITTEN_AS.get(field.name, field.name): field for field in dataclasses.fields(cls)}
    hints = _hints(cls)
    if not isinstance(raw, Mapping):
        problems.add(path, f"expected a section with keys such as {', '.join(list(fields)[:4])}, found {shown(raw)}")
        return None
    before = len(problems.lines)
    raw = {str(key): value for key, value in raw.items()}
    if cls is DataConfig:
        raw = _collect_builder_arguments(raw, fields, path, problems)
    values = dict(built)
    for key, value in raw.items():
        if key not in fields:
            problems.add(join(path, key), f"unknown key, {near(WRITTEN_AS.get(key) or key, list(fields))}")
        elif value is not None and fields[key].name not in built:
            field = fields[key]
            values[field.name] = _build_value(hints[field.name], field.name, value, join(path, key), problems)
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            problems.add(join(path, key), f"is required: expected {expected(hints[field.name])}")
    return None if len(problems.lines) > before else cls(**values)


def build_by_kind(classes: Mapping[str, type], raw: Any, path: str, problems: Problems) -> Any:
    """Build the dataclass that `kind` names; otherwise like `build_section`."""
    if not isinstance(raw, Mapping):
        problems.add(path, f"expected a section with kind: {' | '.join(classes)}, found {shown(raw)}")
        return None
    kind = raw.get("kind")
    if kind is None:
        problems.add(join(path, "kind"), f"is required: expected one of {', '.join(classes)}")
        return None
    if not isinstance(kind, str) or kind not in classes:
        problems.add(join(path, "kind"), f"unknown kind {shown(kind)}, {near(str(kind), list(classes))}")
        return None
    return build_section(classes[kind], raw, path, problems)


def kinds(union: Any) -> dict[str, type]:
    """The classes of a union of sections by their `kind`."""
    return {get_args(_hints(cls)["kind"])[0]: cls for cls in _sections(union)}


def expected(annotation: Any) -> str:
    """What an annotation allows, in words."""
    texts: list[str] = []
    for member in _members(annotation):
        origin, args = get_origin(member), get_args(member)
        if member is types.NoneType:
            continue
        if origin is Literal:
            words = [str(word) for word in args]
            texts.append(f"one of {', '.join(words)}" if len(words) > 1 else words[0])
        elif origin is tuple:
            texts.append(f"a list of {_plural(args[0])}")
        elif origin is dict:
            words = [str(word) for word in get_args(args[0])]
            texts.append(f"a section with keys among {', '.join(words)}" if words else "a section by name")
        elif dataclasses.is_dataclass(member):
            texts.append("a section")
        else:
            texts.append(_WORDS.get(member, str(member)))
    return " or ".join(dict.fromkeys(texts))


_WORDS: dict[Any, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false", Any: "anything"}
_PLURALS: dict[Any, str] = {str: "texts", int: "whole numbers", float: "numbers"}


def _plural(annotation: Any) -> str:
    if _sections(annotation):
        return "sections"
    return _PLURALS.get(annotation) or f"values, each {expected(annotation)}"


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _sections(annotation: Any) -> list[type]:
    return [member for member in _members(annotation) if isinstance(member, type) and dataclasses.is_dataclass(member)]


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


@functools.cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation)


def _collect_builder_arguments(
    raw: dict[str, Any], fields: Mapping[str, Any], path: str, problems: Problems
) -> dict[str, Any]:
    """Move the keys of a `data` section that are not ours to `builder_arguments`, except those that look misspelt."""
    collected = dict(raw.get("builder_arguments") or {}) if isinstance(raw.get("builder_arguments"), Mapping) else None
    if collected is None and raw.get("builder_arguments") is not None:
        return raw  # the wrong type, which is reported as for any other key
    kept, collected = {}, collected or {}
    for key, value in raw.items():
        close = get_close_matches(key.lower(), list(fields), n=1, cutoff=0.8)
        if key in fields:
            kept[key] = value
        elif close and key not in _BUILDER_ARGUMENTS_LIKE_KEYS:
            problems.add(
                join(path, key),
                f"unknown key, did you mean '{close[0]}'? (an argument of the dataset builder that looks like it "
                "goes under builder_arguments)",
            )
        else:
            collected[key] = value
    return {**kept, "builder_arguments": collected}


def _build_value(annotation: Any, name: str, value: Any, path: str, problems: Problems) -> Any:
    elements = _elements(annotation)
    if isinstance(value, list | tuple) and elements is not None:
        return _build_list(elements, value, path, problems)
    sections = _sections(annotation)
    if isinstance(value, Mapping) and sections:
        # A section that is alone in its union need not name its kind.
        if len(sections) == 1:
            return build_section(sections[0], value, path, problems)
        return build_by_kind(kinds(annotation), value, path, problems)
    converted = _convert(annotation, value, path, problems)
    if converted is not None:
        _check_limits(name, converted, path, problems)
    return converted


def _elements(annotation: Any) -> Any:
    """What a list of sections holds; None where the annotation has no such list."""
    for member in _members(annotation):
        if get_origin(member) is tuple and _sections(get_args(member)[0]):
            return get_args(member)[0]
    return None


def _build_list(elements: Any, values: Sequence[Any], path: str, problems: Problems) -> tuple[Any, ...] | None:
    """Build the sections of a list; a word stands for the section of that kind with its defaults."""
    sections = _sections(elements)
    by_kind = all(any(field.name == "kind" for field in dataclasses.fields(section)) for section in sections)
    before = len(problems.lines)
    built = []
    for index, value in enumerate(values):
        place = join(path, index)
        if by_kind:
            word = {"kind": value} if isinstance(value, str) else value
            # A word that is no kind is a mistake in the word itself, not in a key that was not written.
            if isinstance(value, str) and value not in kinds(elements):
                problems.add(place, f"unknown word '{value}', {near(value, list(kinds(elements)))}")
                continue
            built.append(build_by_kind(kinds(elements), word, place, problems))
        else:
            built.append(build_section(sections[0], value, place, problems))
    return None if len(problems.lines) > before else tuple(built)


def _convert(annotation: Any, value: Any, path: str, problems: Problems) -> Any:
    members = _members(annotation)
    # pydantic takes true for 1 and 1.0; in a recipe it is a mistake.
    if isinstance(value, bool) and bool not in members and Any not in members:
        problems.add(path, f"expected {expected(annotation)}, found {shown(value)}{_quote_hint(members)}")
        return None
    if len(_sections(annotation)) == len([member for member in members if member is not types.NoneType]):
        problems.add(path, f"expected {expected(annotation)}, found {shown(value)}")
        return None
    try:
        return _adapter(annotation).validate_python(value)
    except ValidationError as error:
        # With several members pydantic reports each one's objection; ours says what all of them together allow.
        if len([member for member in members if member is not types.NoneType]) == 1:
            for detail in error.errors(include_url=False):
                _add_detail(annotation, value, path, detail, problems)
        else:
            problems.add(path, f"expected {expected(annotation)}, found {shown(value)}{_quote_hint(members)}")
        return None


def _add_detail(annotation: Any, value: Any, path: str, detail: Any, problems: Problems) -> None:
    """Word one objection of pydantic, at the element of `value` that it is about."""
    member = next(member for member in _members(annotation) if member is not types.NoneType)
    for key in detail["loc"]:
        args = get_args(member)
        if key == "[key]":  # the key itself is wrong; it already stands at the end of the path
            member, value = args[0], path.rsplit(".", 1)[-1]
            path = path.rsplit(".", 1)[0]
            break
        if isinstance(value, list | tuple) and isinstance(key, int):
            member, value, path = args[0], value[key], join(path, key)
        elif isinstance(value, Mapping) and key in value:
            path = join(path, key)
            if detail["loc"][-1] != "[key]":
                member, value = args[1], value[key]
        else:
            break
    words = get_args(member) if get_origin(member) is Literal else ()
    if words and isinstance(value, str):
        problems.add(path, f"expected {expected(member)}, found {shown(value)}{_meant(value, words)}")
    else:
        problems.add(path, f"expected {expected(member)}, found {shown(value)}{_quote_hint(_members(member))}")


def _meant(value: str, words: tuple[Any, ...]) -> str:
    close = get_close_matches(value.lower(), [word for word in words if isinstance(word, str)], n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _quote_hint(members: tuple[Any, ...]) -> str:
    return "; put it in quotes" if str in members else ""


# ---- what a number may be, by the name of its field ----

_Limit = tuple[str, Callable[[float], bool]]
_POSITIVE: _Limit = ("a number above 0", lambda value: value > 0)
_AT_LEAST_0: _Limit = ("a number of at least 0", lambda value: value >= 0)
_AT_LEAST_1: _Limit = ("a whole number of at least 1", lambda value: value >= 1)
_FRACTION: _Limit = ("a fraction of at least 0 and below 1", lambda value: 0 <= value < 1)
_INSIDE: _Limit = ("a share above 0 and below 1", lambda value: 0 < value < 1)
_SHARE: _Limit = ("a share between 0 and 1", lambda value: 0 <= value <= 1)

LIMITS: dict[str, _Limit] = {
    "alpha": _POSITIVE,
    "batch_size": _AT_LEAST_1,
    "batch_sizes": _AT_LEAST_1,
    "begin": _FRACTION,
    "block_size": ("16, 32, 64, 128 or 256", lambda value: value in (16, 32, 64, 128, 256)),
    "branch_layers": _AT_LEAST_1,
    "candidates": _AT_LEAST_1,
    "cap": _AT_LEAST_1,
    "class_weights": _POSITIVE,
    "compute": _FRACTION,
    "dropout": _FRACTION,
    "end": _SHARE,
    "epochs": _POSITIVE,
    "eval_batch_size": _AT_LEAST_1,
    "every": _AT_LEAST_1,
    "feed_forward": _FRACTION,
    "width": _FRACTION,
    "float_layers": _AT_LEAST_0,
    "format_version": _AT_LEAST_1,
    "gradient_accumulation_steps": _AT_LEAST_1,
    "head_learning_rate": _POSITIVE,
    "heads": _FRACTION,
    "image_size": _AT_LEAST_1,
    "l1_penalty": _AT_LEAST_0,
    "l2_penalty": _AT_LEAST_0,
    "label_smoothing": _FRACTION,
    "label_weight": _SHARE,
    "latency_b1_ratio": _POSITIVE,
    "latency_b32_ratio": _POSITIVE,
    "latency": _FRACTION,
    "layer": _AT_LEAST_1,
    "layers": _AT_LEAST_0,
    "learning_rate": _POSITIVE,
    "length": _AT_LEAST_1,
    "max_length": _AT_LEAST_1,
    "max_rows": _AT_LEAST_1,
    "max_steps": _AT_LEAST_1,
    "measure_every": _AT_LEAST_1,
    "minimum_count": _AT_LEAST_1,
    "percentile": ("a number above 50 and at most 100", lambda value: 50 < value <= 100),
    "multiple_of": _AT_LEAST_1,
    "rank": _AT_LEAST_1,
    "rate": _POSITIVE,
    "relation_heads": _AT_LEAST_1,
    "repetitions": _AT_LEAST_1,
    "retention": _POSITIVE,
    "rounds": _AT_LEAST_1,
    "rows": _AT_LEAST_1,
    "points": _AT_LEAST_1,
    "save_steps": _AT_LEAST_1,
    "seed": ("a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32),
    "share": _FRACTION,
    "shares": _INSIDE,
    "size": _AT_LEAST_1,
    "size_mb": _POSITIVE,
    "source": _AT_LEAST_0,
    "sparsity": _FRACTION,
    "targets": _POSITIVE,
    "task_patience": _AT_LEAST_1,
    "teacher_layer": _AT_LEAST_0,
    "temperature": _POSITIVE,
    "threads": _AT_LEAST_1,
    "threshold": _POSITIVE,
    "to": _AT_LEAST_0,
    "tokens": _AT_LEAST_1,
    "wait": _AT_LEAST_0,
    "warmup": _AT_LEAST_0,
    "warmup_steps": _AT_LEAST_0,
    "weight": _AT_LEAST_0,
    "weight_decay": _AT_LEAST_0,
    "weights": _AT_LEAST_0,
    "worst_task_retention": _POSITIVE,
}


def _check_limits(name: str, value: Any, path: str, problems: Problems) -> None:
    if name not in LIMITS or isinstance(value, str):  # `tokens` is a number here and the name of a column there
        return
    words, holds = LIMITS[name]
    match value:
        case dict():
            numbers = {join(path, key): number for key, number in value.items()}
        case tuple():
            numbers = {join(path, index): number for index, number in enumerate(value)}
        case _:
            numbers = {path: value}
    for place, number in numbers.items():
        if not math.isfinite(number) or not holds(number):
            problems.add(place, f"expected {words}, found {number}")


def plain_settings(value: Any) -> Any:
    """Dataclasses as dicts, without what is left open."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            item.name: plain_settings(getattr(value, item.name))
            for item in dataclasses.fields(value)
            if getattr(value, item.name) is not None
        }
    if isinstance(value, tuple | list):
        return [plain_settings(item) for item in value]
    if isinstance(value, dict):
        return {key: plain_settings(item) for key, item in value.items()}
    return value
