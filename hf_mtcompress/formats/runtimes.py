"""One way to open every saved form."""

from pathlib import Path

from hf_mtcompress.formats.folders import folder_form
from hf_mtcompress.formats.graph import GraphRuntime
from hf_mtcompress.formats.runtime import Runtime
from hf_mtcompress.formats.torch import TorchRuntime
from hf_mtcompress.formats.vanilla import VanillaRuntime
from hf_mtcompress.model.loading import opening
from hf_mtcompress.records import FORMS

_TRIED = 8
"""Tokens of the pass that every model makes when it is opened."""


def open_runtime(folder: Path, threads: int | None = None) -> Runtime:
    """Load a saved folder of any form.

    Args:
        folder: a multi-task folder, a folder of plain transformers folders, or one with a graph.
        threads: threads within an operation, for the whole process where the form runs on torch; None leaves them.

    Raises:
        ArtifactError: the folder is none of these, incomplete, of a newer format, or opens and does not answer.
        MissingExtraError: the form needs a package that is not installed.
    """
    form = folder_form(folder)
    match FORMS[form].layout:
        case "model":
            runtime: Runtime = TorchRuntime(folder, threads)
        case "tasks":
            runtime = VanillaRuntime(folder, threads)
        case "graph":
            runtime = GraphRuntime(folder, form, threads)
    with opening(folder):
        # A token that has no row in the encoder's table, say, is noticed by a pass alone.
        runtime.logits(runtime.reader.unpadded(runtime.reader.samples()[:1], _TRIED))
    return runtime
