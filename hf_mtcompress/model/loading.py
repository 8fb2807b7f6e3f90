"""Saved models open whole or not at all, and what is damaged or hostile is refused cheaply.

transformers draws tensors that it does not find at random, and says so in a log; it builds whatever size a config
names. Here numbers of a config are compared with the files first, from the headers of safetensors, and every tensor has
to be in its place afterwards.
"""

import json
import pickle
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers.utils import CONFIG_NAME

from hf_mtcompress.errors import ArtifactError, MTCompressError, first_line

_AGAIN = "copy or download the folder again, or save the model again"
_MOST_LAYERS = 1024
"""No encoder has more, and so many are built in about a second."""
_MOST_PARTS = 2**20
"""Heads, labels, experts: no config counts more of anything."""
_LAYERS = re.compile(r"(^|_)(layers|depths?|blocks|stages)$")
_PARTS = re.compile(r"^(num|n)_")
_SLACK = 2**22
"""Elements that a model may have beyond those in its files: tied weights that are built apart, small buffers."""
_BUFFERS = 2**26
"""Elements of buffers that are computed, not stored, such as the causal masks of GPT-2."""
_NUMBERED = re.compile(r"\.\d+\.")
_SHOWN = 3
_LONGEST = 240
_DAMAGED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
    pickle.PickleError,
)
"""What libraries raise on a config or weights that are not as they should be."""


@contextmanager
def opening(place: Any) -> Iterator[None]:
    """Say in one line what is wrong with a saved model that does not open, whatever was raised.

    Raises:
        ArtifactError: it is damaged, incomplete, or none.
    """
    try:
        yield
    except (MTCompressError, ImportError, torch.OutOfMemoryError):
        raise
    except SafetensorError as error:
        raise ArtifactError(
            f"expected whole weights in {place}, found a damaged file ({first_line(error)}); {_AGAIN}"
        ) from error
    except pickle.PickleError as error:
        # What torch says there proposes to run the file as code.
        raise ArtifactError(
            f"expected weights in safetensors in {place}, found a pickle that is not plain tensors; {_AGAIN} as "
            "safetensors, which runs no code"
        ) from error
    except OSError as error:
        if not Path(str(place)).is_dir():  # what the Hub says is clear
            raise
        pickles = sorted(file.name for file in Path(str(place)).glob("*.bin"))
        beside = f" and {', '.join(pickles)}, which is not opened: pickles run code" if pickles else ""
        raise ArtifactError(
            f"expected a whole saved model in {place}, found: {first_line(error)}{beside}; {_AGAIN}"
        ) from error
    except _DAMAGED as error:
        raise ArtifactError(
            f"expected a saved model in {place} that opens, found one that does not ({type(error).__name__}: "
            f"{_in_short(error)}); {_AGAIN}"
        ) from error


def load_whole(cls: Any, place: Any, *, partly: bool = False, **kwargs: Any) -> tuple[Any, list[str]]:
    """A stock model of transformers with its weights, all of them.

    Args:
        cls: a model class or an Auto class.
        place: folder or Hub id.
        partly: leave it to the caller what to do without tensors that are missing.
        **kwargs: for `from_pretrained`.

    Returns:
        The model, and with `partly` the names of the missing tensors, in alphabetical order.

    Raises:
        ArtifactError: tensors are missing or mis-shaped, there are layers that the config does not have, or the folder
            is damaged.
    """
    folder = Path(str(place))
    with opening(place):
        files: list[Path] = []
        if folder.is_dir():
            read_config(folder)
            files = weight_files(folder)
        # Without the last, transformers tells mis-shaped tensors in a table in the log alone.
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        with _no_larger_than(files, place):
            model, info = cls.from_pretrained(place, **kwargs)
        # Foreign checkpoints may hold more than a class reads, such as another head, but not more layers.
        more = [name for name in info["unexpected_keys"] if _NUMBERED.search(name)]
        refuse_partial(place, info | {"unexpected_keys": more} | ({"missing_keys": ()} if partly else {}))
    return model, sorted(info["missing_keys"])


def refuse_partial(place: Any, info: Mapping[str, Any]) -> None:
    """Make sure that tensors and model fit.

    Args:
        place: for the message.
        info: what `from_pretrained` tells with `output_loading_info=True`.

    Raises:
        ArtifactError: tensors are missing, unexpected or mis-shaped.
    """
    shapes = [f"{name} {tuple(found)} for {tuple(wanted)}" for name, found, wanted in info.get("mismatched_keys") or ()]
    groups = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"], "mis-shaped": shapes}
    wrong = [f"{len(names)} {what} ({_some(names)})" for what, names in groups.items() if names]
    if wrong:
        raise ArtifactError(
            f"expected the tensors that {CONFIG_NAME} describes in {place}, found {', '.join(wrong)}; {_AGAIN}"
        )


def refuse_unfilled(model: nn.Module, place: Any) -> None:
    """Make sure that transformers drew no weights of a model that it has just loaded; it marks those that it read.

    Raises:
        ArtifactError: it did.
    """
    drawn = [name for name, value in model.named_parameters() if not getattr(value, "_is_hf_initialized", False)]
    refuse_partial(place, {"missing_keys": drawn, "unexpected_keys": ()})


# ---- numbers, before anything is made of them ----


def read_config(folder: Path) -> dict[str, Any]:
    """The values of a folder's `config.json`.

    Raises:
        ArtifactError: it is no JSON object, or counts what no model has so many of.
    """
    path = folder / CONFIG_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"expected JSON in {path}, found something else ({first_line(error)}); {_AGAIN}") from error
    if not isinstance(values, dict):
        raise ArtifactError(f"expected a JSON object in {path}, found a {type(values).__name__}; {_AGAIN}")
    refuse_counts(values, path)
    return values


def refuse_counts(values: Any, place: Any) -> None:
    """Make sure that a config asks for no endless number of parts; sizes are compared with the weights later.

    Raises:
        ArtifactError: it does.
    """
    waiting = [("", values)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(str(name), part) for name, part in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(key, part) for part in value]
        elif isinstance(value, int | float):
            most = _MOST_LAYERS if _LAYERS.search(key) else _MOST_PARTS if _PARTS.match(key) else value
            if value > most:
                raise ArtifactError(f"expected '{key}' of at most {most} in {place}, found {value}; {_AGAIN}")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder."""
    return sorted(folder.glob("*.safetensors"))


def refuse_oversized(model: nn.Module, files: Sequence[Any], place: Any) -> None:
    """Make sure that a model on the meta device is no larger than its files, before memory is taken for it.

    Args:
        model: built, without weights.
        files: safetensors files; others are left to transformers.
        place: for the message.

    Raises:
        ArtifactError: it is.
    """
    stored = _stored_elements(files)
    if stored is not None:
        elements = sum(parameter.numel() for parameter in model.parameters())
        _compare(elements, sum(buffer.numel() for buffer in model.buffers()), stored, place)


def _stored_elements(files: Sequence[Any]) -> int | None:
    """The most elements that files can hold, from their headers alone; None where one is no safetensors file."""
    if not files or any(not str(file).endswith(".safetensors") for file in files):
        return None
    total = 0
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                part = opened.get_slice(name)
                count = 1
                for side in part.get_shape():
                    count *= side
                # A byte holds two weights of 4 bits, or says of eight entries whether they are stored.
                total += count * (8 if name.endswith("_mask") else 2 if part.get_dtype() == "U8" else 1)
    return total


def _compare(elements: int, buffers: int, stored: int, place: Any, times: int = 2) -> None:
    if elements > times * stored + _SLACK or buffers > times * stored + _BUFFERS:
        raise ArtifactError(
            f"expected a {CONFIG_NAME} that fits the weights in {place}, found one that asks for "
            f"{elements + buffers:,} numbers or more, where the files hold {stored:,}; {_AGAIN}"
        )


@contextmanager
def _no_larger_than(files: Sequence[Path], place: Any) -> Iterator[None]:
    """Stop the building of a model, in this thread, that grows beyond its files."""
    stored = _stored_elements(files)
    if stored is None:
        yield
        return
    thread, sizes = threading.get_ident(), {"parameters": 0, "buffers": 0}

    def count(what: str, value: Tensor | None) -> None:
        if value is not None and threading.get_ident() == thread:
            sizes[what] += value.numel()
            # Every one is registered twice, when it is built and when it is filled.
            _compare(sizes["parameters"], sizes["buffers"], stored, place, times=4)

    hooks = [
        register_module_parameter_registration_hook(lambda module, name, value: count("parameters", value)),
        register_module_buffer_registration_hook(lambda module, name, value: count("buffers", value)),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _in_short(error: Exception) -> str:
    """What libraries say of a damaged file may quote all of it."""
    text = " ".join(str(error).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _some(names: Any) -> str:
    shown = sorted(str(name) for name in names)
    return ", ".join(shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "")
