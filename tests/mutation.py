"""A seeded mutator of recipes, with the kinds of mistakes that people and their tools make as its grammar."""

import copy
import random
from typing import Any

import yaml

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 30, 10**9, 10**18, 0.0, 0.5, 1.0, -0.5, 1e-300, 1e300, float("inf"),
    float("nan"),
    "", " ", "a", "None", "nope", "teacher", "mood", "0.5", "3", "true", "json", "linear", "../../x", "/", "~", ".",
    "-",
    "a/b", "s3://bucket/x", "http://127.0.0.1:9/x", "\u00e9\u4e2d\U0001f600", "\x00", "a\nb", "x" * 5000, "{{x}}", "%s",
    [], {}, [None], [[]], [1], ["a"], ["teacher"], [{}], [{"path": ["a"]}], {"a": 1}, {"path": "x"}, {"train": "train"},
    {"kind": "finetune"}, ["logits"], ["logits", "hidden"], ["logits", "logits"], [1, 2, 3], {"mood": 0.5}, {"x": {}},
    "vanilla", "onnxruntime", "bitsandbytes", "chance", "random", "equal", "temperature", "average", "lora",
)  # fmt: skip
"""Values that do not fit where they come to stand, or only just."""
ODD_TEXTS = (
    "*x", "&x [*x]", "!!bool 7", '!!float ""', "!!timestamp foo", "!!python/object:os.system x", "!!set {a}",
    "9" * 4000,
    "[" * 200, "{" * 50, "- - - -", "? a", "<<: 3", "'", '"', "\t", "|", ">", "%YAML 1.1", "---", "...",
    "0x" + "f" * 99,
    "4294967296", "1:30", "2020-01-01", "no", "!!binary aGk=", "@a", "`a`", "{a: b, a: c}", "\u2028", "\ufeff",
)  # fmt: skip
"""Texts of values that a YAML parser takes for something else."""


def mutated(recipe: dict[str, Any], generator: random.Random) -> str:
    """The text of a recipe with one to three mistakes in it, now and then one of YAML itself."""
    data = copy.deepcopy(recipe)
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        _mutate(data, generator)
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    if generator.random() < 0.15:
        text = _mutate_text(text, generator)
    return text


def overrides(recipe: dict[str, Any], generator: random.Random) -> list[str]:
    """A value given on the command line, for a place that is there or nearly so."""
    keys = list(generator.choice(list(_places(recipe))))
    if generator.random() < 0.2:
        keys.insert(generator.randrange(len(keys) + 1), generator.choice(("x", "0", "-1", "99", "", "name")))
    value = generator.choice((*ODD_TEXTS, *(yaml.safe_dump(odd).strip() for odd in ODD_VALUES)))
    return [f"{'.'.join(map(str, keys))}={value}"]


def _places(value: Any, above: tuple[Any, ...] = ()) -> Any:
    """Ways to every value of a recipe, by keys and indices."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*above, key)
        yield from _places(item, (*above, key))


def _at(data: Any, keys: tuple[Any, ...]) -> Any:
    for key in keys:
        data = data[key]
    return data


def _mutate(data: dict[str, Any], generator: random.Random) -> None:
    places = list(_places(data))
    if not places:
        return
    *above, key = generator.choice(places)
    parent = _at(data, tuple(above))
    match generator.randrange(9):
        case 0 | 1 | 2:
            parent[key] = copy.deepcopy(generator.choice(ODD_VALUES))
        case 3:
            del parent[key]
        case 4:  # the value of another place
            parent[key] = copy.deepcopy(_at(data, generator.choice(places)))
        case 5 if isinstance(parent, dict):  # a slip of the pen
            name = str(key)
            place = generator.randrange(len(name) + 1)
            parent[name[:place] + generator.choice("ex_ ") + name[place:]] = parent.pop(key)
        case 6 if isinstance(parent, dict):  # a key of elsewhere
            *_, other = generator.choice(places)
            parent.setdefault(str(other), copy.deepcopy(generator.choice(ODD_VALUES)))
        case 7 if isinstance(parent, list):  # twice, or in another order
            parent.insert(generator.randrange(len(parent) + 1), copy.deepcopy(parent[key]))
        case _:
            value = parent[key]
            parent[key] = [value] if generator.random() < 0.5 else {"a": value}


def _mutate_text(text: str, generator: random.Random) -> str:
    lines = text.splitlines()
    number = generator.randrange(len(lines))
    match generator.randrange(4):
        case 0:
            place = lines[number].find(":")
            lines[number] = f"{lines[number][: place + 1]} {generator.choice(ODD_TEXTS)}"
        case 1:
            lines[number] = generator.choice((" ", "  ", "\t", "- ", "")) + lines[number].lstrip()
        case 2:
            lines.insert(number, generator.choice(lines))
        case _:
            place = generator.randrange(len(lines[number]) + 1)
            odd = generator.choice((*"{}[]&*!|>'\"%@`#:-,?\t\x07\\", "\ufeff"))
            lines[number] = lines[number][:place] + odd + lines[number][place:]
    return "\n".join(lines)
