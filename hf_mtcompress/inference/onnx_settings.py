"""What stands beside a graph so that it can be used without the model it came from."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_mtcompress.artifacts import ONNX_MODEL, ONNX_SETTINGS, write_text
from hf_mtcompress.errors import ArtifactError
from hf_mtcompress.tasks import Task, task_from_dict

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class OnnxSettings:
    """The content of the settings file of an ONNX folder.

    Attributes:
        format_version: of this file; newer ones are refused.
        tasks: task specs without columns (`Task.to_dict`), in order.
        preprocessing: `max_length` in tokens or `image_size` in pixels, where they are set.
        inputs: names of the graph's inputs.
        precision: `float32`, `float16`, `int8` or `int4`.
        quantization: how the weights got there, empty for float32: `block_size`, `embedding_bits`, `float_layers`,
            `calibration`, and `exceptions` (numbers of matrices that were not stored as asked for, by reason).
        parameters: numbers of parameters: `encoder`, `embedding` (word embeddings, part of the encoder) and `head`.
        stored_bytes: bytes of weights by the type they are stored in.
        embedding_bytes: bytes of word embeddings, None for images.
        versions: packages that wrote the graph, and its opset.
        sha256: of the graph; written by `write_onnx_settings`, empty in folders of older versions.
    """

    format_version: int = FORMAT_VERSION
    tasks: list[dict[str, Any]]
    preprocessing: dict[str, Any]
    inputs: list[str]
    precision: str
    parameters: dict[str, int]
    stored_bytes: dict[str, int] = field(default_factory=dict)
    embedding_bytes: int | None = None
    quantization: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""

    def build_tasks(self) -> dict[str, Task]:
        """The tasks by name, in order."""
        tasks = [task_from_dict(values) for values in self.tasks]
        return {task.name: task for task in tasks}


def write_onnx_settings(folder: Path, settings: OnnxSettings) -> None:
    """Write the settings beside the graph, with the digest of the graph that lies there."""
    written = dataclasses.replace(settings, sha256=graph_digest(folder))
    write_text(folder / ONNX_SETTINGS, json.dumps(dataclasses.asdict(written), indent=2) + "\n")


def graph_digest(folder: Path) -> str:
    """SHA-256 of the graph of an ONNX folder."""
    with (folder / ONNX_MODEL).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_onnx_settings(folder: Path) -> OnnxSettings:
    """Read the settings of an ONNX folder.

    Raises:
        ArtifactError: graph or settings are missing, not readable, or of a newer format.
    """
    for name in (ONNX_SETTINGS, ONNX_MODEL):
        if not (folder / name).is_file():
            raise ArtifactError(f"expected '{name}' in {folder}, found none; export the model again")
    try:
        values = json.loads((folder / ONNX_SETTINGS).read_text(encoding="utf-8"))
        version = int(values["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"expected JSON with a format_version in {folder / ONNX_SETTINGS}, found something else ({error}); "
            "export the model again"
        ) from error
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"expected an ONNX folder of format_version {FORMAT_VERSION} or older, found {version} in {folder}; "
            "update hf_mtcompress to load it"
        )
    known = {item.name for item in dataclasses.fields(OnnxSettings)}
    missing = {"tasks", "preprocessing", "inputs", "precision", "parameters"} - set(values)
    if missing:
        raise ArtifactError(
            f"expected {sorted(missing)} in {folder / ONNX_SETTINGS}, found none; export the model again"
        )
    return OnnxSettings(**{key: value for key, value in values.items() if key in known})
