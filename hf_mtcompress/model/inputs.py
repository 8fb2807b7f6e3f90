"""What a model takes, read off its own forward: nobody has to know by which names."""

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

from transformers import PreTrainedModel


@cache
def input_names(model_class: type[PreTrainedModel]) -> tuple[str, ...]:
    """Names of the arguments that the forward of a model spells out."""
    arguments = list(inspect.signature(model_class.forward).parameters.values())[1:]
    return tuple(item.name for item in arguments if item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD))


def taken_by(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the inputs that a stock model takes: a tokenizer may make more of them."""
    names = input_names(type(model))
    return {name: value for name, value in inputs.items() if name in names}
