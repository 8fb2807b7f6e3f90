"""What stands beside a graph so that it can be used without the model it came from."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt, TypeAdapter, ValidationError

from hf_mtcompress.artifacts import write_text
from hf_mtcompress.digests import file_digest
from hf_mtcompress.errors import ArtifactError, mistakes
from hf_mtcompress.records import FORMS, FormName
from hf_mtcompress.tasks import Task, build_tasks

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class GraphSettings:
    """The content of the settings file of a folder with a graph.

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
        sha256: of the graph; written by `write_graph_settings`, empty in folders of older versions.
    """

    format_version: int = FORMAT_VERSION
    tasks: Annotated[list[dict[str, Any]], Field(min_length=1)]
    preprocessing: dict[str, PositiveInt]
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
        return build_tasks(self.tasks)


_SETTINGS = TypeAdapter(GraphSettings)


def write_graph_settings(folder: Path, settings: GraphSettings, form: FormName = "onnx") -> None:
    """Write the settings beside the graph, with the digest of the graph that lies there."""
    written = dataclasses.replace(settings, sha256=graph_digest(folder, form))
    write_text(folder / FORMS[form].settings, json.dumps(dataclasses.asdict(written), indent=2) + "\n")


def graph_digest(folder: Path, form: FormName = "onnx") -> str:
    """SHA-256 of the graph of a folder; of the digests of its files where it has several."""
    digests = [file_digest(folder / name) for name in FORMS[form].graph]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def check_graph(folder: Path, settings: GraphSettings, form: FormName = "onnx") -> None:
    """Make sure that a graph is the one that its settings were written for.

    Raises:
        ArtifactError: it is another one, or damaged.
    """
    if settings.sha256 and graph_digest(folder, form) != settings.sha256:
        raise ArtifactError(
            f"expected in {folder / FORMS[form].graph[0]} the graph that was exported, found another content; copy or "
            "download the folder again, or export the model again"
        )


def graph_bytes(folder: Path, form: FormName = "onnx") -> int:
    """Bytes of graph and weights."""
    return sum((folder / name).stat().st_size for name in FORMS[form].graph)


def read_graph_settings(folder: Path, form: FormName = "onnx") -> GraphSettings:
    """Read the settings of a folder with a graph.

    Raises:
        ArtifactError: graph or settings are missing, not readable, or of a newer format.
    """
    for name in FORMS[form].files:
        if not (folder / name).is_file():
            raise ArtifactError(f"expected '{name}' in {folder}, found none; export the model again")
    path = folder / FORMS[form].settings
    try:
        text = path.read_text(encoding="utf-8")
        version = int(json.loads(text)["format_version"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"expected JSON with a format_version in {path}, found something else ({error}); export the model again"
        ) from error
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"expected a graph of format_version {FORMAT_VERSION} or older, found {version} in {folder}; "
            "update hf_mtcompress to load it"
        )
    try:
        return _SETTINGS.validate_json(text, strict=True)
    except ValidationError as error:
        raise ArtifactError(
            f"expected the settings of a graph in {path}, found {mistakes(error)}; export the model again"
        ) from error
