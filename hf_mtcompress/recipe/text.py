"""Recipes as text: YAML that reads `3e-5` as a number and `no` as a word, and refuses a key that is written twice."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

from hf_mtcompress.errors import first_line

_PLAIN_VALUES = {
    # YAML 1.2's core schema. PyYAML follows 1.1, where 3e-5 is text, while yes, no, on, off, 12:30 and dates are not.
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", "~nN"),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "tag:yaml.org,2002:merge": (r"<<", "<"),
}


_DEPTH = 50
"""Levels of nesting; recipes have eight."""
_VALUES = 100_000
"""Values of a document, aliases written out; the longest lists of labels have some hundreds."""

_BEYOND = 2**63
_LONGEST = 30
"""Characters of a whole number, leading zeros among them."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 -- PyYAML's own way of keeping them

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag.endswith(":merge"):  # `<<` brings keys that may be written again
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is written twice in one section", key_node.start_mark
                )
            seen.add(key if isinstance(key, Hashable) else id(key_node))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not read as text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 -- as above
        first: list(resolvers) for first, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    number = (int(text, 16) if text.lower().startswith("0x") else int(text)) if len(text) < _LONGEST else _BEYOND
    if abs(number) >= _BEYOND:
        raise yaml.MarkedYAMLError(
            None, None, "expected a whole number of at most 64 bits; put it in quotes if it is a name", node.start_mark
        )
    return number


for _tag, (_pattern, _first) in _PLAIN_VALUES.items():
    # An empty pattern character stands for the empty scalar.
    _firsts = [*_first, ""] if _tag.endswith("null") else list(_first)
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _firsts)
    if _tag.endswith("float"):
        _Dumper.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _firsts)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)


def read_yaml(text: str) -> Any:
    """Parse one YAML document.

    Raises:
        ValueError: the text is not YAML, a section holds a key twice, or it is nested or repeated (by `*name`) beyond
            what any recipe needs; the message says where.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_extent(node, (), {})
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{_place(error.problem_mark)}{error.problem or error.context or error}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError(f"expected at most {_DEPTH} levels of nesting, found many more") from None
    except (LookupError, AttributeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"a value that does not fit the tag before it, such as !!int ({first_line(error)})") from None
    finally:
        if loader is not None:
            loader.dispose()


def _place(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""


def _check_extent(node: yaml.Node, above: tuple[int, ...], known: dict[int, int]) -> int:
    """How many values a document holds once its aliases are written out; few lines may stand for billions."""
    if id(node) in above:
        raise yaml.MarkedYAMLError(
            None, None, "expected a section that ends, found one that holds itself", node.start_mark
        )
    if id(node) not in known:
        if len(above) >= _DEPTH:
            raise yaml.MarkedYAMLError(None, None, f"expected at most {_DEPTH} levels of nesting", node.start_mark)
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        inside = (*above, id(node))
        children = parts if isinstance(node, yaml.CollectionNode) else ()
        known[id(node)] = 1 + sum(_check_extent(part, inside, known) for part in children)
    if known[id(node)] > _VALUES:
        raise yaml.MarkedYAMLError(None, None, f"expected at most {_VALUES:,} values, found more", node.start_mark)
    return known[id(node)]


def write_yaml(data: Any) -> str:
    """YAML text of plain dicts, lists, text, numbers and None, in the order given."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
