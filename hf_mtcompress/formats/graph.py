"""Folders with a graph, on ONNX Runtime or OpenVINO."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hf_mtcompress.data.readers import load_reader
from hf_mtcompress.environment import package_version, require_extra
from hf_mtcompress.errors import ArtifactError, first_line
from hf_mtcompress.formats.graph_settings import check_graph, read_graph_settings
from hf_mtcompress.formats.runtime import Runtime
from hf_mtcompress.records import FORMS, FormName


class GraphRuntime(Runtime):
    """A folder with a graph, on ONNX Runtime or OpenVINO."""

    def __init__(self, folder: Path, form: FormName, threads: int | None = None) -> None:
        kind = FORMS[form]
        require_extra(str(kind.extra))
        package = str(kind.backend)
        if form == "onnx":
            # It imports onnxruntime, which is of the extra "onnx".
            from hf_mtcompress.formats.onnx.session import open_session, output_widths, run_session
        else:
            # It imports openvino, which is an extra.
            from hf_mtcompress.formats.openvino.session import open_session, output_widths, run_session

        self._run: Any = run_session
        self.form = form
        self.folder = folder
        settings = read_graph_settings(folder, form)
        graph = folder / kind.graph[0]
        check_graph(folder, settings, form)
        try:
            self.session: Any = open_session(graph, threads)
        except Exception as error:  # whatever the runtime raises: there is no class for all of it
            raise ArtifactError(
                f"expected a graph that {package} {package_version(package)} opens in {folder}, found one that it "
                f"refuses ({first_line(error)}); the graph was made with version "
                f"{settings.versions.get(package) or 'unknown'}: install that or a newer one, or export the model again"
            ) from error
        self.tasks = settings.build_tasks()
        widths = output_widths(self.session)
        wrong = {
            name: widths.get(task.logits_name, "none")
            for name, task in self.tasks.items()
            if widths.get(task.logits_name, 0) not in (None, task.num_outputs)
        }
        if wrong:
            raise ArtifactError(
                f"expected logits for { ({name: self.tasks[name].num_outputs for name in wrong}) } in the graph of "
                f"{folder}, as {kind.settings} says, found {wrong}; copy or download the folder again, or export the "
                "model again"
            )
        self.reader = load_reader(folder, settings.preprocessing.get("max_length"))
        made = set(self.reader.example(1))
        if not set(settings.inputs) <= made:
            raise ArtifactError(
                f"expected a tokenizer or image processor in {folder} that makes the graph's inputs {settings.inputs}, "
                f"found one that makes {sorted(made)}; save the one that it was exported with there"
            )

    def logits(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = self._run(self.session, batch)
        return {name: found[task.logits_name] for name, task in self.tasks.items()}
