"""Proof that saved folders reload: fresh processes load them and compare their answers with those given before.

Folders of this package are loaded in one process through `AutoModel`, the `multi-task` pipeline and ONNX Runtime; plain
transformers folders in a second one in which this package is never imported.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from hf_mtcompress.data.pixels import picture_of
from hf_mtcompress.environment import ending_of
from hf_mtcompress.errors import ArtifactError
from hf_mtcompress.formats.folders import folder_form, read_config, task_folders
from hf_mtcompress.model.marking import is_ours
from hf_mtcompress.records import FORMS, FormName

_PACKAGE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class ReloadCheck:
    """One saved folder, and what its model answered before it was saved.

    Attributes:
        folder: of any form.
        inputs: model inputs as arrays by name.
        expected: logits by task for these inputs, computed on the processor in eval mode with as many threads as torch
            has now, by the model in memory.
        tolerance: largest absolute difference that passes; 0 asks for equal bits.
        labels: label names in order by task, where they are to be compared too.
        samples: raw inputs of the same rows in the same order (texts, lists of words, `(text, text)` tuples, PIL
            images); the pipelines are then run on them and must choose the same labels.
    """

    folder: Path
    inputs: Mapping[str, np.ndarray]
    expected: Mapping[str, np.ndarray]
    tolerance: float = 0.0
    labels: Mapping[str, Sequence[str]] | None = None
    samples: Sequence[Any] | None = None
    form: FormName = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "form", folder_form(self.folder))


def check_reload(checks: Sequence[ReloadCheck], timeout: float = 900.0) -> list[dict[str, Any]]:
    """Load every folder in a fresh process, without network, and compare.

    Args:
        checks: the folders.
        timeout: seconds after which a process is ended.

    Returns:
        For each check `{"passed", "max_difference", "tolerance", "how", "problems"}`, in order. `max_difference` is
        None where a folder did not load.

    Raises:
        ArtifactError: a process ended without results.
    """
    results: list[dict[str, Any]] = [{} for _ in checks]
    plain = [index for index, check in enumerate(checks) if _is_plain(check)]
    others = [index for index in range(len(checks)) if index not in plain]
    with TemporaryDirectory() as scratch:
        for name, indices in (("package", others), ("plain", plain)):
            if not indices:
                continue
            place = Path(scratch) / name
            place.mkdir()
            found = _run_child([checks[index] for index in indices], place, plain=name == "plain", timeout=timeout)
            for index, result in zip(indices, found, strict=True):
                results[index] = _judge(checks[index], result, plain=name == "plain")
    return results


def _is_plain(check: ReloadCheck) -> bool:
    """Whether a folder must load without this package: plain folders that were not cut unevenly."""
    if FORMS[check.form].layout != "tasks":
        return False
    marks = [read_config(path).get("quantization_config") or {} for path in task_folders(check.folder).values()]
    return not any(is_ours(mark) for mark in marks)


def _judge(check: ReloadCheck, result: dict[str, Any], *, plain: bool) -> dict[str, Any]:
    difference, problems = result["difference"], result["problems"]
    where = "fresh process without hf_mtcompress" if plain else "fresh process"
    return {
        "passed": not problems and difference <= check.tolerance,
        "max_difference": difference if np.isfinite(difference) and not problems else None,
        "tolerance": check.tolerance,
        "how": f"{where}: {result['how']}",
        "problems": problems,
    }


def _run_child(checks: list[ReloadCheck], scratch: Path, *, plain: bool, timeout: float) -> list[dict[str, Any]]:
    rows = []
    for index, check in enumerate(checks):
        inputs, expected = scratch / f"inputs{index}.npz", scratch / f"expected{index}.npz"
        save_arrays(inputs, check.inputs)
        save_arrays(expected, check.expected)
        rows.append(
            {
                "folder": str(check.folder.resolve()),
                "form": check.form,
                "inputs": str(inputs),
                "expected": str(expected),
                "labels": {name: list(labels) for name, labels in (check.labels or {}).items()},
                "samples": _write_samples(check.samples, scratch / f"samples{index}"),
            }
        )
    manifest, results = scratch / "manifest.json", scratch / "results.json"
    manifest.write_text(json.dumps({"threads": torch.get_num_threads(), "checks": rows}), encoding="utf-8")
    script = str(_PACKAGE / "formats" / "reload" / "plain.py")
    start = ["-I", script] if plain else ["-m", "hf_mtcompress.formats.reload.child"]
    try:
        child = subprocess.run(
            [sys.executable, *start, str(manifest), str(results)],
            env=child_environment(),
            cwd=scratch,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ArtifactError(
            f"expected {len(checks)} folders to reload within {timeout:.0f} s, found no end; raise the timeout"
        ) from error
    if child.returncode != 0 or not results.is_file():
        last = "\n".join(child.stderr.strip().splitlines()[-5:])
        raise ArtifactError(
            f"expected a fresh process to reload {len(checks)} folders, but it {ending_of(child.returncode)}:\n{last}"
        )
    return json.loads(results.read_text(encoding="utf-8"))


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name to an .npz file."""
    write: Any = np.savez  # its type takes the names of arrays for options
    write(path, **arrays)


def child_environment(threads: int | None = None) -> dict[str, str]:
    """Environment of a process that loads saved models: no network, and this package importable.

    Args:
        threads: threads of the numeric libraries; None for as many as torch has here.
    """
    paths = [str(_PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads if threads is not None else torch.get_num_threads()),
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _write_samples(samples: Sequence[Any] | None, folder: Path) -> list[Any] | None:
    """Raw inputs as JSON; pictures go to files."""
    if samples is None:
        return None
    rows: list[Any] = []
    for index, sample in enumerate(samples):
        if isinstance(sample, str):
            rows.append(sample)
        elif isinstance(sample, tuple):
            rows.append({"text": sample[0], "text_pair": sample[1]})
        elif isinstance(sample, list):
            rows.append({"text": sample})
        else:
            folder.mkdir(exist_ok=True)
            picture_of(sample).save(folder / f"{index}.png")
            rows.append({"file": str(folder / f"{index}.png")})
    return rows
