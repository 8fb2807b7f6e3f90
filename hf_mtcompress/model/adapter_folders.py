"""Adapters saved alone: a folder for each task with its low-rank layers and its head, without the encoder.

A task's folder is one of `peft` (`adapter_config.json`, `adapter_model.safetensors`): `PeftModel.from_pretrained` opens
it on the family's own model with as many labels. Beside these stands what a multi-task model needs of the task. A head
that no stock model has is in a file of its own, and `peft` opens the adapter on the bare encoder (`AutoModel`).
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_mtcompress.artifacts import whole_folder, write_text
from hf_mtcompress.config import AdapterConfig
from hf_mtcompress.errors import ArtifactError, TaskError
from hf_mtcompress.model.adapters import Adapter, adapter_of, build_adapter
from hf_mtcompress.model.vanilla import stock_class
from hf_mtcompress.tasks import Task, task_from_dict

if TYPE_CHECKING:
    from peft import LoraConfig

    from hf_mtcompress.model.modeling import MultiTaskModel

SETTINGS = "mtcompress_adapter.json"
WEIGHTS = "adapter_model.safetensors"
HEAD = "head.safetensors"
_PREFIX = "base_model.model."
_FORMAT = 1
_PEFT_TYPES = {"AutoModelForSequenceClassification": "SEQ_CLS", "AutoModelForTokenClassification": "TOKEN_CLS"}


@dataclasses.dataclass(frozen=True)
class _Saved:
    """What stands in the folder of one task.

    Attributes:
        task: without columns.
        settings: of the adapter.
        paths: by layer index and role, module paths in the encoder that was saved.
        encoder: digests of that encoder, see `_digests`.
        adapter: low-rank matrices by (path, `lora_A` or `lora_B`).
        head: state of the head.
    """

    task: Task
    settings: AdapterConfig
    paths: list[dict[str, str]]
    encoder: dict[str, str | None]
    adapter: dict[tuple[str, str], Tensor]
    head: dict[str, Tensor]


def save_adapters(
    model: "MultiTaskModel", folder: Path, tasks: Sequence[str] | None = None, base_model: str | None = None
) -> list[Path]:
    """See `MultiTaskModel.save_adapters`."""
    having = [name for name in model.tasks if adapter_of(model, name) is not None]
    wanted = having if tasks is None else list(tasks)
    if not wanted or not set(wanted) <= set(having):
        raise TaskError(f"expected tasks with an adapter, among {having}, found {wanted}; see add_adapters")
    written = []
    for name in wanted:
        with whole_folder(folder / name) as scratch:
            _write(model, name, scratch, base_model)
        written.append(folder / name)
    return written


def load_adapters(model: "MultiTaskModel", folder: Path, tasks: Sequence[str] | None = None) -> list[str]:
    """See `MultiTaskModel.load_adapters`."""
    found = {place.parent.name: place.parent for place in sorted(folder.glob(f"*/{SETTINGS}"))}
    if (folder / SETTINGS).exists():
        found = {_settings(folder)["task"]["name"]: folder}
    wanted = list(found) if tasks is None else list(tasks)
    if not wanted or not set(wanted) <= set(found):
        raise ArtifactError(
            f"expected saved adapters of {wanted or 'one or more tasks'} in {folder}, found those of {list(found)}; "
            "check the folder, save_adapters writes one"
        )
    read = {name: _read(found[name]) for name in wanted}
    made = {name: _made(model, name, saved, found[name]) for name, saved in read.items()}
    for name, saved in read.items():
        if name not in model.tasks:
            model.add_task(saved.task)
        head_name = model.tasks[name].head_name
        model.heads[head_name].load_state_dict(saved.head, strict=True)
        model.adapters[head_name] = made[name].train(model.training)
    model.freeze_encoder()
    model.refresh_config()
    return wanted


def _write(model: "MultiTaskModel", name: str, folder: Path, base_model: str | None) -> None:
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
    settings = {
        "format": _FORMAT,
        "task": task.to_dict(),
        "adapter": dataclasses.asdict(adapter.settings),
        "prefix": _PREFIX + base,
        "paths": adapter.paths,
        "encoder": _digests(model, task.encoder),
    }
    write_text(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")


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


def _matrices(adapter: Adapter) -> dict[tuple[str, str], nn.Parameter]:
    """The low-rank matrices by path and kind."""
    found: dict[tuple[str, str], nn.Parameter] = {}
    for path, layer in adapter.by_path().items():
        for matrix in ("lora_A", "lora_B"):
            (linear,) = getattr(layer, matrix).values()
            found[path, matrix] = linear.weight
    return found


def _save(state: Mapping[str, Tensor], file: Path) -> None:
    # Copies, since safetensors refuses tensors that share memory.
    save_file({key: value.detach().cpu().clone() for key, value in state.items()}, file, metadata={"format": "pt"})


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / SETTINGS
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if settings["format"] > _FORMAT:
            raise ArtifactError(
                f"expected an adapter of format {_FORMAT} or older, found {settings['format']} in {file}; "
                "update hf_mtcompress"
            )
        return {key: settings[key] for key in ("task", "adapter", "prefix", "paths", "encoder")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"expected the description of an adapter, found {file} which cannot be read ({error}); save it again"
        ) from error


def _read(folder: Path) -> _Saved:
    settings = _settings(folder)
    try:
        weights = load_file(folder / WEIGHTS)
        head = load_file(folder / HEAD) if (folder / HEAD).exists() else {}
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"expected whole safetensors files in {folder}, found one that cannot be read ({error}); save it again"
        ) from error
    adapter: dict[tuple[str, str], Tensor] = {}
    for key, value in weights.items():
        path, _, matrix = key.removeprefix(settings["prefix"]).removesuffix(".weight").rpartition(".")
        if matrix in ("lora_A", "lora_B"):
            adapter[path, matrix] = value
        else:
            head[key.removeprefix(_PREFIX)] = value
    try:
        described = AdapterConfig(**settings["adapter"])
    except TypeError as error:
        raise ArtifactError(
            f"expected the settings of an adapter that are known here, found {settings['adapter']} in {folder}; update "
            "hf_mtcompress"
        ) from error
    return _Saved(task_from_dict(settings["task"]), described, settings["paths"], settings["encoder"], adapter, head)


def _made(model: "MultiTaskModel", name: str, saved: _Saved, folder: Path) -> Adapter:
    """The adapter with its weights, while nothing of the model changes.

    Raises:
        ArtifactError: it was trained on another encoder, or parts are missing.
        TaskError: the model has another task of this name, or lacks its encoder.
    """
    own = model.tasks.get(name)
    answers = [(task.kind, task.labels, task.head, task.pooling) for task in (own or saved.task, saved.task)]
    if answers[0] != answers[1]:
        raise TaskError(
            f"task '{name}': expected the kind, labels, head and pooling {answers[0]} that the model has, found "
            f"{answers[1]} in {folder}; take the model's own out first (remove_task)"
        )
    place = (own or saved.task).encoder
    if place not in model.encoders:
        raise TaskError(
            f"task '{name}': expected an adapter for one of the encoders {list(model.encoders)}, found one for "
            f"'{place}' in {folder}; build the model with that encoder"
        )
    digests = _digests(model, place)
    known = {key for key in digests if digests[key] is not None and saved.encoder.get(key) is not None}
    if not known or any(digests[key] != saved.encoder[key] for key in known):
        raise ArtifactError(
            f"task '{name}': expected an adapter trained on this encoder, found one trained on other weights in "
            f"{folder}; load the encoder that it was trained on, in float or in few bits"
        )
    with torch.device("meta"):
        head = model.build_head(own or saved.task)
    wanted = {key: tuple(value.shape) for key, value in head.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in saved.head.items()}
    if wanted != found:
        raise ArtifactError(
            f"task '{name}': expected a head with {wanted}, found {found} in {folder}; save the adapter again"
        )
    adapter = build_adapter(model, own or saved.task, saved.settings)
    _fill(adapter, saved, folder)
    return adapter


def _fill(adapter: Adapter, saved: _Saved, folder: Path) -> None:
    """Put the saved matrices in, matched by layer and role, since paths change between versions of transformers."""
    here = {(number, role): path for number, layer in enumerate(adapter.paths) for role, path in layer.items()}
    there = {(number, role): path for number, layer in enumerate(saved.paths) for role, path in layer.items()}
    own = _matrices(adapter)
    try:
        pairs = {
            own[here[key], matrix]: saved.adapter[there[key], matrix] for key in here for matrix in ("lora_A", "lora_B")
        }
    except KeyError as error:
        raise ArtifactError(
            f"expected an adapter of all of the {len(here)} linear layers in {folder}, found none for {error}; save it "
            "again"
        ) from error
    wrong = [tuple(value.shape) for parameter, value in pairs.items() if parameter.shape != value.shape]
    if wrong:
        raise ArtifactError(
            f"expected matrices of rank {saved.settings.rank} for the layers' shapes in {folder}, found {wrong[0]}; "
            "save the adapter again"
        )
    with torch.no_grad():
        for parameter, value in pairs.items():
            parameter.copy_(value)


def _digests(model: "MultiTaskModel", name: str) -> dict[str, str | None]:
    """Digests by which an encoder is known again, in float (bfloat16 or more) and in few bits.

    Quantization leaves norms and biases as they are (`vectors`); `matrices` is None where some are in few bits.
    """
    parts: dict[str, list[bytes]] = {"vectors": [], "matrices": []}
    for parameter in model.encoders[name].parameters():
        if not parameter.is_floating_point():
            continue
        values = parameter.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16)
        parts["vectors" if parameter.ndim == 1 else "matrices"].append(
            hashlib.sha256(values.numpy().tobytes()).digest()
        )
    digests = {key: hashlib.sha256(b"".join(sorted(found))).hexdigest()[:24] for key, found in parts.items()}
    few_bits = bool(getattr(model, "is_quantized", False))
    return {"vectors": digests["vectors"], "matrices": None if few_bits else digests["matrices"]}
