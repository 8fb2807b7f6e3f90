"""What a saved folder holds: its form, its config, what it reads inputs with."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download

from hf_mtcompress.data.readers import Reader, load_reader
from hf_mtcompress.errors import ArtifactError, first_line
from hf_mtcompress.formats.graph_settings import read_graph_settings
from hf_mtcompress.model.configuration import MultiTaskConfig
from hf_mtcompress.model.loading import read_config
from hf_mtcompress.records import FORMS, FormName
from hf_mtcompress.records.forms import CONFIG

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def folder_form(folder: Path) -> FormName:
    """What kind of artefact a folder holds.

    Raises:
        ArtifactError: it holds none that is known.
    """
    if not folder.is_dir():
        raise ArtifactError(f"expected a folder with a saved model, found no folder {folder}; check the path")
    for form in FORMS.values():
        if form.layout == "graph" and (folder / form.settings).is_file():
            return form.name
    if (folder / CONFIG).is_file():
        values = read_config(folder)
        if values.get("model_type") == MultiTaskConfig.model_type:
            return stores_few_bits(values) or "torch"
        raise ArtifactError(
            f"expected a multi-task folder, found a model of type '{values.get('model_type')}' in {folder}; a plain "
            "transformers folder opens with transformers' own pipeline, a folder with one for each task opens here"
        )
    if task_folders(folder):
        return "vanilla"
    if inside := _models_inside(folder):
        raise ArtifactError(
            f"expected a folder with one saved model, found {folder} with {len(inside)} in it; give one of them: "
            f"{', '.join(str(path.relative_to(folder)) for path in inside)}"
        )
    graphs = [form.settings for form in FORMS.values() if form.layout == "graph"]
    raise ArtifactError(
        f"expected a multi-task folder ({CONFIG}), a folder with a graph ({' or '.join(graphs)}) or "
        f"a folder with one plain transformers folder for each task, found {_listing(folder)} in {folder}; give the "
        "folder that a step saved"
    )


def task_folders(folder: Path) -> dict[str, Path]:
    """The plain folders inside a vanilla folder, by task name, in alphabetical order; none where some are ours."""
    found = {path.name: path for path in sorted(folder.iterdir()) if (path / CONFIG).is_file()}
    ours = any(read_config(path).get("model_type") == MultiTaskConfig.model_type for path in found.values())
    return {} if ours else found


def find_model(place: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder with the one model of a place: a saved model, a step or a run around it, or a repository of the Hub.

    Args:
        place: folder or Hub id.
        revision: of a repository.

    Raises:
        ArtifactError: there is no such place.
    """
    folder = Path(place)
    if not folder.exists() and _HUB_ID.fullmatch(str(place)):
        try:
            folder = Path(snapshot_download(str(place), revision=revision))
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"expected a folder with a saved model or the id of one on the Hub, found '{place}' "
                f"({first_line(error)}); check the spelling, or download it first where there is no network"
            ) from error
    if folder.is_dir() and not _is_model(folder):
        inside = _models_inside(folder)
        return inside[0] if len(inside) == 1 else folder
    return folder


def _is_model(folder: Path) -> bool:
    return any((folder / form.settings).is_file() for form in FORMS.values()) or bool(task_folders(folder))


def _models_inside(folder: Path) -> list[Path]:
    """Models of all tasks in a step, or in the steps of a run."""
    found = []
    for path in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        parts = sorted(part for part in path.iterdir() if part.is_dir())
        found += [path] if _is_model(path) else [part for part in parts if _is_model(part)]
    return found


def stores_few_bits(config: Mapping[str, Any]) -> Literal["bitsandbytes", "torchao"] | None:
    """What stored the weights in 8 or 4 bits that the config values of a torch folder speak of; None for float."""
    mark = config.get("quantization_config") or {}
    if mark.get("torchao") or mark.get("quant_method") == "torchao":
        return "torchao"
    few = mark.get("load_in_8bit") or mark.get("load_in_4bit") or mark.get("bitsandbytes")
    return "bitsandbytes" if few else None


def open_reader(folder: Path) -> Reader:
    """What makes the inputs of a saved model of any form.

    Raises:
        ArtifactError: the folder holds no model, or nothing that reads.
    """
    form = FORMS[folder_form(folder)]
    match form.layout:
        case "tasks":
            return load_reader(next(iter(task_folders(folder).values())))
        case "graph":
            preprocessing = read_graph_settings(folder, form.name).preprocessing
        case "model":
            preprocessing = (read_config(folder).get("preprocessing") or {}).get("main", {})
    return load_reader(folder, preprocessing.get("max_length"))


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
