"""Adapters saved alone: a folder for each task with its low-rank layers and its head, without the encoder.

A task's folder is one of `peft` (`adapter_config.json`, `adapter_model.safetensors`): `PeftModel.from_pretrained` opens
it on the family's own model with as many labels. Beside these stands what a multi-task model needs of the task. A head
that no stock model has is in a file of its own, and `peft` opens the adapter on the bare encoder (`AutoModel`).
"""

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_mtcompress.artifacts import whole_folder, write_text
from hf_mtcompress.errors import ArtifactError, TaskError
from hf_mtcompress.model.adapters import Adapter, adapter_of, build_adapter
from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.model.base import SharedModel
from hf_mtcompress.model.vanilla import stock_class
from hf_mtcompress.recipe import AdapterConfig
from hf_mtcompress.tasks import Task, task_from_dict

# Imported late: peft - it takes seconds to import, and most models have no adapters.
if TYPE_CHECKING:
    from peft import LoraConfig

SETTINGS = "mtcompress_adapter.json"
WEIGHTS = "adapter_model.safetensors"
HEAD = "head.safetensors"
FORMAT_VERSION = 1
_PREFIX = "base_model.model."
_PEFT_TYPES = {"AutoModelForSequenceClassification": "SEQ_CLS", "AutoModelForTokenClassification": "TOKEN_CLS"}
_SAMPLES = 8
"""Numbers of each tensor by which an encoder is known again."""
_TOLERANCE = 2.0**-7
"""Of these numbers, relative: an encoder in half precision is the same one."""


@dataclasses.dataclass(frozen=True)
class _Encoder:
    """By what an encoder is known again, whatever its precision.

    Attributes:
        hidden_size: of the hidden states.
        sizes: heads and neurons of each layer.
        vectors: some numbers of every norm and bias of the layers, which quantization leaves as they are.
        matrices: some numbers of every matrix of the layers; None where these are in few bits.
    """

    hidden_size: int
    sizes: list[list[int]]
    vectors: list[float]
    matrices: list[float] | None

    def is_same(self, other: "_Encoder") -> bool:
        same = (self.hidden_size, self.sizes) == (other.hidden_size, other.sizes) and _alike(
            self.vectors, other.vectors
        )
        if self.matrices is None or other.matrices is None:
            return same
        return same and _alike(self.matrices, other.matrices)


@dataclasses.dataclass(frozen=True)
class _Description:
    """What `SETTINGS` says of an adapter.

    Attributes:
        task: without columns, see `Task.to_dict`.
        adapter: its settings.
        prefix: of the low-rank matrices in the file.
        paths: by layer index and role, module paths in the encoder that was saved.
        encoder: the encoder that it was trained on.
        format_version: of the file.
    """

    task: dict[str, Any]
    adapter: AdapterConfig
    prefix: str
    paths: list[dict[str, str]]
    encoder: _Encoder
    format_version: int = FORMAT_VERSION


@dataclasses.dataclass(frozen=True)
class _Saved:
    """What stands in the folder of one task.

    Attributes:
        folder: where.
        description: of task, adapter and encoder.
        task: the task.
        adapter: low-rank matrices by (path, `lora_A` or `lora_B`).
        head: state of the head.
    """

    folder: Path
    description: _Description
    task: Task
    adapter: dict[tuple[str, str], Tensor]
    head: dict[str, Tensor]


# ---- writing ----


def save_adapters(
    model: SharedModel, folder: Path, tasks: Sequence[str] | None = None, base_model: str | None = None
) -> list[Path]:
    """See `MultiTaskModel.save_adapters`."""
    having = [name for name in model.tasks if adapter_of(model, name) is not None]
    wanted = having if tasks is None else list(tasks)
    if not wanted or not set(wanted) <= set(having):
        raise TaskError(f"expected tasks with an adapter, among {having}, found {wanted}; see add_adapters")
    _check_hub_id(base_model)
    for name in wanted:
        place = folder / name
        if place.exists() and not (place / SETTINGS).exists():
            raise ArtifactError(
                f"expected no folder '{name}' in {folder}, or one with an adapter to replace, found something else; "
                "choose another folder"
            )
    for name in wanted:
        with whole_folder(folder / name) as scratch:
            _write(model, name, scratch, base_model)
    return [folder / name for name in wanted]


def _check_hub_id(base_model: str | None) -> None:
    """What is published names no place of this machine."""
    try:
        if base_model is None or not Path(base_model).exists():
            validate_repo_id(base_model or "none")
            return
    except HFValidationError:
        pass
    raise TaskError(
        f"base_model: expected the id of an encoder on the Hub, such as 'org/name', found '{base_model}'; leave it out "
        "for one that is only here"
    )


def _write(model: SharedModel, name: str, folder: Path, base_model: str | None) -> None:
    task, adapter = model.tasks[name], adapter_of(model, name)
    assert adapter is not None
    head = model.heads[task.head_name]
    config = model.config.encoder_config(task.encoder)
    task.configure(config)
    found = stock_class(task, config) if isinstance(head, PreTrainedModel) else None
    base = "" if found is None else f"{found.base_model_prefix}."
    state = {f"{_PREFIX}{base}{path}.{matrix}.weight": values for (path, matrix), values in _matrices(adapter).items()}
    own = {key: value.detach() for key, value in head.state_dict().items()}
    if found is None:
        _save(own, folder / HEAD)
    else:
        state |= {f"{_PREFIX}{key}": value for key, value in own.items()}
    _save(state, folder / WEIGHTS)
    _peft_config(adapter, base, task, [] if found is None else list(own), base_model).save_pretrained(str(folder))
    description = _Description(
        task.to_dict(), adapter.settings, _PREFIX + base, adapter.paths, _known_by(model, task.encoder)
    )
    write_text(folder / SETTINGS, json.dumps(dataclasses.asdict(description), indent=2) + "\n")


def _peft_config(adapter: Adapter, base: str, task: Task, head: list[str], base_model: str | None) -> "LoraConfig":
    """How `peft` puts this adapter on a stock model; without keys of a head, on the bare encoder."""
    from peft import LoraConfig

    return LoraConfig(
        r=adapter.settings.rank,
        lora_alpha=cast(int, adapter.settings.alpha),  # a factor; peft's annotation is narrower than its use
        lora_dropout=adapter.settings.dropout,
        target_modules=[f"{base}{path}" for path in adapter.by_path()],
        modules_to_save=sorted({key.split(".")[0] for key in head}) or None,
        task_type=cast(Any, _PEFT_TYPES.get(task.auto_class) if head else None),
        base_model_name_or_path=base_model,
        inference_mode=True,
    )


def _save(state: Mapping[str, Tensor], file: Path) -> None:
    # Copies, since safetensors refuses tensors that share memory.
    save_file({key: value.detach().cpu().clone() for key, value in state.items()}, file, metadata={"format": "pt"})


# ---- reading ----


def load_adapters(
    model: SharedModel, folder: Path, tasks: Sequence[str] | None, new_head: Callable[[Task], nn.Module]
) -> dict[str, tuple[Task, nn.Module, Adapter]]:
    """Saved tasks by name, each with its head and adapter, which the model does not hold yet.

    Args:
        model: the model that they are for; left as it is.
        folder: see `MultiTaskModel.load_adapters`; likewise `tasks`, and the errors.
        tasks: which; default: all that are found.
        new_head: makes the head of a task that the model does not have.
    """
    places = [folder] if (folder / SETTINGS).exists() else sorted(file.parent for file in folder.glob(f"*/{SETTINGS}"))
    saved = [_read(place) for place in places]
    names = [item.task.name for item in saved]
    wanted = names if tasks is None else list(tasks)
    if not wanted or not set(wanted) <= set(names) or any(names.count(name) > 1 for name in wanted):
        raise ArtifactError(
            f"expected one saved adapter of {wanted or 'one or more tasks'} in {folder}, found those of {names}; check "
            "the folder, save_adapters writes one"
        )
    return {item.task.name: _made(model, item, new_head) for item in saved if item.task.name in wanted}


def _read(folder: Path) -> _Saved:
    file = folder / SETTINGS
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        version = int(values["format_version"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"expected the description of an adapter, found {file} which cannot be read ({error!r}); save it again"
        ) from error
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"expected an adapter of format {FORMAT_VERSION} or older, found {version} in {file}; update hf_mtcompress"
        )
    try:
        AdapterConfig(**values["adapter"])  # pydantic lets unknown keys pass
        description = TypeAdapter(_Description).validate_python(values)
        task = task_from_dict(description.task)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"expected the description of an adapter that is known here, found another one in {file} ({error}); update "
            "hf_mtcompress, or save it again"
        ) from error
    try:
        weights = load_file(folder / WEIGHTS)
        head = load_file(folder / HEAD) if (folder / HEAD).exists() else {}
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"expected whole safetensors files in {folder}, found one that cannot be read ({error}); save it again"
        ) from error
    adapter: dict[tuple[str, str], Tensor] = {}
    for key, value in weights.items():
        path, _, matrix = key.removeprefix(description.prefix).removesuffix(".weight").rpartition(".")
        if matrix in ("lora_A", "lora_B"):
            adapter[path, matrix] = value
        else:
            head[key.removeprefix(_PREFIX)] = value
    # Before an adapter of this rank is built.
    rank = description.adapter.rank
    sides = {"lora_A": 0, "lora_B": -1}
    wrong = [key for key, value in adapter.items() if value.dim() != 2 or value.shape[sides[key[1]]] != rank]
    if wrong or not adapter:
        raise ArtifactError(
            f"expected matrices of rank {rank} in {folder}, as {SETTINGS} says, found "
            f"{tuple(adapter[wrong[0]].shape) if wrong else 'none'}; save the adapter again"
        )
    return _Saved(folder, description, task, adapter, head)


def _made(model: SharedModel, saved: _Saved, new_head: Callable[[Task], nn.Module]) -> tuple[Task, nn.Module, Adapter]:
    """Task, head and adapter with their weights, while nothing of the model changes.

    Raises:
        ArtifactError: it was trained on another encoder, or parts are missing.
        TaskError: the model has another task of this name.
    """
    name, folder = saved.task.name, saved.folder
    task = model.tasks.get(name, saved.task)
    answers = [(one.kind, one.labels, one.head, one.pooling) for one in (task, saved.task)]
    if answers[0] != answers[1]:
        raise TaskError(
            f"task '{name}': expected the kind, labels, head and pooling {answers[0]} that the model has, found "
            f"{answers[1]} in {folder}; take the model's own out first (remove_task)"
        )
    adapter = build_adapter(model, task, saved.description.adapter).train(model.training)
    if not _known_by(model, task.encoder).is_same(saved.description.encoder):
        raise ArtifactError(
            f"task '{name}': expected an adapter trained on this encoder, found one trained on other weights in "
            f"{folder}; load the encoder that it was trained on, in float or in few bits"
        )
    _fill(adapter, saved)
    head = copy.deepcopy(model.heads[task.head_name]) if name in model.tasks else new_head(task)
    wanted = {key: tuple(value.shape) for key, value in head.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in saved.head.items()}
    if wanted != found:
        raise ArtifactError(
            f"task '{name}': expected a head with {wanted}, found {found} in {folder}; save the adapter again"
        )
    head.load_state_dict(saved.head, strict=True)
    return task, head, adapter


def _fill(adapter: Adapter, saved: _Saved) -> None:
    """Put the saved matrices in, matched by layer and role, since paths change between versions of transformers."""
    here = {(number, role): path for number, layer in enumerate(adapter.paths) for role, path in layer.items()}
    there = {
        (number, role): path for number, layer in enumerate(saved.description.paths) for role, path in layer.items()
    }
    own = _matrices(adapter)
    try:
        pairs = {
            own[here[key], matrix]: saved.adapter[there[key], matrix] for key in here for matrix in ("lora_A", "lora_B")
        }
    except KeyError as error:
        raise ArtifactError(
            f"expected an adapter of all of the {len(here)} linear layers in {saved.folder}, found none for {error}; "
            "save it again"
        ) from error
    wrong = [tuple(value.shape) for parameter, value in pairs.items() if parameter.shape != value.shape]
    if wrong:
        raise ArtifactError(
            f"expected matrices of rank {saved.description.adapter.rank} for the layers' shapes in {saved.folder}, "
            f"found {wrong[0]}; save the adapter again"
        )
    with torch.no_grad():
        for parameter, value in pairs.items():
            parameter.copy_(value)


def _matrices(adapter: Adapter) -> dict[tuple[str, str], nn.Parameter]:
    """The low-rank matrices by path and kind."""
    found: dict[tuple[str, str], nn.Parameter] = {}
    for path, layer in adapter.by_path().items():
        for matrix in ("lora_A", "lora_B"):
            (linear,) = getattr(layer, matrix).values()
            found[path, matrix] = linear.weight
    return found


# ---- knowing an encoder again ----


def _known_by(model: SharedModel, name: str) -> _Encoder:
    """Of the layers alone: poolers come and go with the heads that read them, and vocabularies are cut."""
    encoder = model.encoders[name]
    assert isinstance(encoder, PreTrainedModel)
    anatomy = find_anatomy(encoder)
    few_bits = bool(getattr(model, "is_quantized", False))
    vectors, matrices = [], []
    for layer in anatomy.layers:
        for parameter in layer.module.parameters():
            if parameter.ndim == 1:
                vectors += _some(parameter)
            elif not few_bits:
                matrices += _some(parameter)
    return _Encoder(
        anatomy.hidden_size, [list(size) for size in anatomy.sizes], vectors, None if few_bits else matrices
    )


def _some(tensor: Tensor) -> list[float]:
    """Some of its numbers, evenly spread, with six digits."""
    numbers = tensor.detach().flatten()
    places = torch.linspace(0, len(numbers) - 1, min(_SAMPLES, len(numbers))).long()
    return [float(f"{value:.6g}") for value in numbers[places.to(numbers.device)].float().tolist()]


def _alike(numbers: Sequence[float], others: Sequence[float]) -> bool:
    return len(numbers) == len(others) and np.allclose(numbers, others, rtol=_TOLERANCE, atol=1e-5)
