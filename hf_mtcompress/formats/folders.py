"""What a saved folder holds: its form, its config, what it reads inputs with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from hf_mtcompress.data.readers import Reader, load_reader
from hf_mtcompress.errors import ArtifactError
from hf_mtcompress.formats.graph_settings import read_graph_settings
from hf_mtcompress.model.configuration import MultiTaskConfig
from hf_mtcompress.records import FORMS, FormName
from hf_mtcompress.records.forms import CONFIG


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
    if any((path / CONFIG).is_file() for path in folder.iterdir() if path.is_dir()):
        return "vanilla"
    graphs = [form.settings for form in FORMS.values() if form.layout == "graph"]
    raise ArtifactError(
        f"expected a multi-task folder ({CONFIG}), a folder with a graph ({' or '.join(graphs)}) or "
        f"a folder with one plain transformers folder for each task, found {_listing(folder)} in {folder}; give the "
        "folder that a step saved"
    )


def task_folders(folder: Path) -> dict[str, Path]:
    """The plain folders inside a vanilla folder, by task name, in alphabetical order."""
    return {path.name: path for path in sorted(folder.iterdir()) if (path / CONFIG).is_file()}


def read_config(folder: Path) -> dict[str, Any]:
    """The values of a folder's `config.json`.

    Raises:
        ArtifactError: it is not JSON.
    """
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"expected JSON in {folder / CONFIG}, found something else ({error}); save it again"
        ) from error


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
