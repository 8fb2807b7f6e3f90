"""A page that runs a model inside the browser: static files, nothing fetched from elsewhere, nothing sent."""

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import SpaceCardData
from huggingface_hub.constants import HF_HOME

from hf_mtcompress.artifacts import whole_folder, write_text
from hf_mtcompress.errors import ArtifactError, MissingExtraError, UnsupportedEncoderError
from hf_mtcompress.formats.folders import open_reader
from hf_mtcompress.formats.graph_settings import GraphSettings, check_graph, read_graph_settings
from hf_mtcompress.records.forms import ONNX_MODEL
from hf_mtcompress.tasks import Task, TokenClassification

PAGE = "page.json"
"""What the page needs to know of its model."""
LIBRARIES = "libraries"
"""Folder of the page with the code of others."""
_MODEL = "model"
_CARD = "README.md"


@dataclass(frozen=True)
class Library:
    """A package of the npm registry, and what the page takes of it.

    Attributes:
        name: of the package.
        version: the only one that is taken.
        licence: as its `package.json` says.
        files: SHA-256 by path inside the package.
    """

    name: str
    version: str
    licence: str
    files: Mapping[str, str]


# Both versions are the ones that the tests ran a page with; the digests keep others out.
LIBRARIES_OF_THE_PAGE = (
    Library(
        "onnxruntime-web",
        "1.30.0",
        "MIT",
        {
            "dist/ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
            "dist/ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
            "dist/ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
        },
    ),
    Library(
        "@huggingface/tokenizers",
        "0.2.0",
        "Apache-2.0",
        {"dist/tokenizers.min.mjs": "258e46332101335ce8d95aed7745b19ac3b46d37f3e159a89cf894c2ea9b1d3a"},
    ),
)
_PATIENCE = 300
"""Seconds that npm may take for one package."""


def write_webpage(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    title: str,
    facts: Mapping[str, str] | None = None,
    examples: Sequence[str] = (),
    libraries: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a folder that any web server can serve, a static Space of the Hub too.

    Args:
        source: an ONNX folder of any precision; `model.onnx`, tokenizer and settings are copied from it.
        output: where to write; a page that is there is replaced.
        title: heading of the page.
        facts: shown at its end, such as `{"kept of the teacher": "97.9 %"}`.
        examples: texts to try with one click.
        libraries: a folder with `node_modules` that holds `LIBRARIES_OF_THE_PAGE`; default: they are fetched with npm
            once and kept beside the cache of the Hub.

    Returns:
        `output`.

    Raises:
        ArtifactError: the source is no ONNX folder, `output` holds something else than a page, or a library is not
            the one expected.
        UnsupportedEncoderError: the tokenizer or image processor does something the page cannot do.
        MissingExtraError: npm is needed and not installed.
    """
    source, output = Path(source), Path(output)
    libraries = None if libraries is None else Path(libraries)
    settings = read_graph_settings(source)
    check_graph(source, settings)
    _check_place(output)
    description, needed = _describe(settings, source, title, facts or {}, examples)
    found = _libraries(libraries)
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(output) as scratch:
        for item in _sources():
            (scratch / item.name).write_bytes(item.read_bytes())
        write_text(scratch / PAGE, json.dumps(description, indent=2, ensure_ascii=False) + "\n")
        (scratch / _MODEL).mkdir()
        for name in (ONNX_MODEL, *needed):
            shutil.copyfile(source / name, scratch / _MODEL / name)
        (scratch / LIBRARIES).mkdir()
        for path in found:
            shutil.copyfile(path, scratch / LIBRARIES / path.name)
        write_text(scratch / LIBRARIES / "README.md", _origin())
        if (output / _CARD).is_file():
            shutil.copyfile(output / _CARD, scratch / _CARD)  # somebody may have worked on it
        else:
            write_text(scratch / _CARD, _space_card(title))
    return output


def _check_place(output: Path) -> None:
    """Nothing but an older page is replaced."""
    if not output.exists():
        return
    known = {item.name for item in _sources()} | {PAGE, LIBRARIES, _MODEL, _CARD}
    strange = (
        sorted(item.name for item in output.iterdir() if item.name not in known) if output.is_dir() else ["a file"]
    )
    if strange or not (output / PAGE).is_file():
        found = ", ".join(strange[:3]) or "no page"
        raise ArtifactError(
            f"expected a new folder or an older page at {output}, found something else ({found}); choose another "
            "--output, and copy the page from there"
        )


_SOURCES = (".html", ".css", ".mjs")


def _sources() -> list[Any]:
    """The files of a page that are the same for every model."""
    return [item for item in files("hf_mtcompress.formats.web").iterdir() if item.name.endswith(_SOURCES)]


def _describe(
    settings: GraphSettings, source: Path, title: str, facts: Mapping[str, str], examples: Sequence[str]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The content of `page.json`, and the files of the source that it needs beside the graph."""
    tasks = settings.build_tasks()
    size = (source / ONNX_MODEL).stat().st_size
    count = f"{len(tasks)} tasks" if len(tasks) != 1 else "1 task"
    page: dict[str, Any] = {
        "title": title,
        "summary": f"{count} in one model · {size / 1e6:.1f} MB · {settings.precision}",
        "facts": list(facts.items()),
        "examples": list(examples),
        "bytes": size,
        "inputs": settings.inputs,
        "tasks": [_describe_task(task) for task in tasks.values()],
    }
    described, needed = open_reader(source).describe(words=any(task.reads_words for task in tasks.values()))
    if missing := [name for name in needed if not (source / name).is_file()]:
        raise UnsupportedEncoderError(
            f"expected {', '.join(missing)} in {source} for a web page, found none; save a fast tokenizer beside the "
            "graph"
        )
    return {**page, **described}, needed


def _describe_task(task: Task) -> dict[str, Any]:
    return {
        "name": task.name,
        "problem": task.problem,
        "labels": list(task.labels or ()),
        "output": task.logits_name,
        "bio": isinstance(task, TokenClassification) and task.bio,
    }


def _origin() -> str:
    lines = [f"- {library.name} {library.version}, {library.licence}" for library in LIBRARIES_OF_THE_PAGE]
    return "\n".join(["Code of others, as published in the npm registry:", "", *lines]) + "\n"


def _space_card(title: str) -> str:
    """Front matter that makes the folder a static Space; the two headers allow threads."""
    headers = {"cross-origin-embedder-policy": "require-corp", "cross-origin-opener-policy": "same-origin"}
    front = SpaceCardData(title=title, sdk="static", app_file="index.html", custom_headers=headers)
    return f"---\n{front}\n---\n\nSeveral tasks in one model, answered inside the browser. Made with hf_mtcompress.\n"


# ---- the code of others ----


def _libraries(folder: Path | None) -> list[Path]:
    """The files of `LIBRARIES_OF_THE_PAGE`, each with the content expected."""
    found = []
    for library in LIBRARIES_OF_THE_PAGE:
        root = _fetched(library) if folder is None else folder / "node_modules" / library.name
        for name, digest in library.files.items():
            path = root / name
            if not path.is_file():
                raise ArtifactError(
                    f"expected {library.name} {library.version} with {name} in {root}, found no such file; "
                    f"install it there: npm install --ignore-scripts {library.name}@{library.version}"
                )
            if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                todo = (
                    f"remove {root} and try again"
                    if folder is None
                    else f"install it again: npm install --ignore-scripts {library.name}@{library.version}"
                )
                raise ArtifactError(
                    f"expected {name} of {library.name} {library.version} in {root}, found another content; {todo}"
                )
            found.append(path)
    return found


def _fetched(library: Library) -> Path:
    """Where the files of a library are kept, fetched with npm the first time."""
    kept = Path(HF_HOME) / "mtcompress" / f"{library.name.replace('/', '-')}-{library.version}"
    if all((kept / name).is_file() for name in library.files):
        return kept
    npm = shutil.which("npm")
    install = f"npm install --ignore-scripts {' '.join(f'{one.name}@{one.version}' for one in LIBRARIES_OF_THE_PAGE)}"
    if npm is None:
        raise MissingExtraError(
            f"expected npm to fetch {library.name} {library.version}, found none; install Node.js, or run "
            f"`{install}` elsewhere and give the folder as --libraries"
        )
    kept.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch, whole_folder(kept) as target:
        command = [npm, "pack", "--loglevel=error", "--pack-destination", scratch, f"{library.name}@{library.version}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        except subprocess.TimeoutExpired:
            reason = f"no answer within {_PATIENCE} s"
        archives = list(Path(scratch).glob("*.tgz"))
        if not archives:
            raise ArtifactError(
                f"expected npm to fetch {library.name} {library.version}, but it failed ({reason}); try again with a "
                f"network, or run `{install}` elsewhere and give the folder as --libraries"
            )
        for name, content in _members(archives[0], library).items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(content)
    return kept


def _members(archive: Path, library: Library) -> dict[str, bytes]:
    """The wanted files of a package, none of them written anywhere yet."""
    found = {}
    try:
        with tarfile.open(archive) as package:
            for name in library.files:
                member = package.extractfile(f"package/{name}")
                found[name] = member.read() if member is not None else b""
    except (tarfile.TarError, KeyError, EOFError, OSError) as error:
        raise ArtifactError(
            f"expected {library.name} {library.version} as npm packs it, found something else ({error}); try again"
        ) from error
    wrong = [name for name, content in found.items() if hashlib.sha256(content).hexdigest() != library.files[name]]
    if wrong:
        raise ArtifactError(
            f"expected {', '.join(wrong)} of {library.name} {library.version} as it was published, found another "
            "content; look where npm fetches its packages from"
        )
    return found


# ---- serving ----


class _Isolated(SimpleHTTPRequestHandler):
    """Sends the headers that let the page use several threads."""

    def guess_type(self, path: Any) -> str:
        # Some systems have no type for these, and browsers insist on one.
        known = {".mjs": "text/javascript", ".wasm": "application/wasm"}
        return known.get(Path(path).suffix) or super().guess_type(path)

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def serve_webpage(folder: Path, port: int = 0) -> ThreadingHTTPServer:
    """A server of the page on this machine alone; call `serve_forever` on it.

    Args:
        folder: what `write_webpage` wrote.
        port: 0 for any free one; `server_port` of the result tells which.

    Raises:
        ArtifactError: the port is taken.
    """
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(_Isolated, directory=str(folder)))
    except OSError as error:
        raise ArtifactError(
            f"expected port {port} to be free, but it cannot be opened ({error.strerror}); choose another one, or 0 "
            "for any"
        ) from error
