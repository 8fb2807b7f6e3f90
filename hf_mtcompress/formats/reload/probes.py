"""A few inputs and the logits a model gave for them before it was saved, kept beside the saved folder.

They let any later process prove that the folder still answers the same. They hold rows of the training data and are
therefore never uploaded.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from hf_mtcompress.formats.reload.check import ReloadCheck
from hf_mtcompress.records import FORMS, FormName

PROBES = "probes.safetensors"
GRAPH_TOLERANCE = 1e-3
"""Largest difference of logits between torch and a float32 graph of the same model."""


def save_probes(
    folder: Path, inputs: Mapping[str, np.ndarray], expected: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    """Write probes into the folder of a step.

    Args:
        folder: of the step.
        inputs: model inputs as arrays.
        expected: by artefact folder (relative to the step), logits by task.
    """
    arrays = {f"input|{name}": np.ascontiguousarray(array) for name, array in inputs.items()}
    for artefact, logits in expected.items():
        arrays |= {f"expected|{artefact}|{task}": np.ascontiguousarray(array) for task, array in logits.items()}
    save_file(arrays, folder / PROBES)


def reload_checks(step_folder: Path, forms: Mapping[str, FormName], samples: Any = None) -> dict[str, ReloadCheck]:
    """What to check of a step's artefacts, by artefact folder; those without expected logits are left out.

    Args:
        step_folder: of the step.
        forms: form of each artefact by its folder, relative to the step (`.` for the step itself).
        samples: raw inputs of the probes, where the pipelines are to be run too.
    """
    with safe_open(step_folder / PROBES, framework="numpy") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # safe_open is no mapping
    inputs = {key.split("|", 1)[1]: value for key, value in arrays.items() if key.startswith("input|")}
    checks = {}
    for artefact, form in forms.items():
        prefix = f"expected|{artefact}|"
        expected = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
        if expected:
            checks[artefact] = ReloadCheck(
                folder=step_folder / artefact,
                inputs=inputs,
                expected=expected,
                tolerance=GRAPH_TOLERANCE if FORMS[form].layout == "graph" else 0.0,
                samples=samples,
            )
    return checks
