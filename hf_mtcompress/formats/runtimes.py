"""One way to open every saved form."""

from pathlib import Path

from hf_mtcompress.formats.folders import folder_form
from hf_mtcompress.formats.graph import GraphRuntime
from hf_mtcompress.formats.runtime import Runtime
from hf_mtcompress.formats.torch import TorchRuntime
from hf_mtcompress.formats.vanilla import VanillaRuntime
from hf_mtcompress.records import FORMS


def open_runtime(folder: Path, threads: int | None = None) -> Runtime:
    """Load a saved folder of any form.

    Args:
        folder: a multi-task folder, a folder of plain transformers folders, or one with a graph.
        threads: threads within an operation, for the whole process where the form runs on torch; None leaves them.

    Raises:
        ArtifactError: the folder is none of these, incomplete, or of a newer format.
        MissingExtraError: the form needs a package that is not installed.
    """
    form = folder_form(folder)
    match FORMS[form].layout:
        case "model":
            return TorchRuntime(folder, threads)
        case "tasks":
            return VanillaRuntime(folder, threads)
        case "graph":
            return GraphRuntime(folder, form, threads)
