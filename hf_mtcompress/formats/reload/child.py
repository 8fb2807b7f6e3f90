"""Reloads folders through the Auto classes in a process of its own; started by `reload_check`.

    python -m hf_mtcompress.formats.reload.child manifest.json results.json

Manifest and results are those of `plain.py`, with the `form` of each folder.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, pipeline

from hf_mtcompress.formats.predictor import load_predictor
from hf_mtcompress.formats.registration import PIPELINE
from hf_mtcompress.formats.reload.plain import check_plain_folder, largest_difference, read_sample
from hf_mtcompress.records import FORMS
from hf_mtcompress.tasks import Task

SCORE_TOLERANCE = 1e-3
"""Between a row alone, as a pipeline computes it, and the same row in a padded batch."""
QUANTIZED_SCORE_TOLERANCE = 0.1
"""The same where bitsandbytes picks outlier columns over the whole batch, so that a row alone is rounded otherwise."""


def check_folder(check: dict[str, Any]) -> dict[str, Any]:
    """Load one folder of any form and compare its logits with the expected ones."""
    form = FORMS[check["form"]]
    if form.layout == "tasks":
        return check_plain_folder(check)
    try:
        return _check_torch(check) if form.layout == "model" else _check_graph(check)
    except Exception as error:  # any failure to load or run is the result that is asked for
        return {"difference": float("inf"), "problems": [f"{type(error).__name__}: {error}"], "how": form.name}


def _check_torch(check: dict[str, Any]) -> dict[str, Any]:
    inputs, expected = dict(np.load(check["inputs"])), dict(np.load(check["expected"]))
    model, info = AutoModel.from_pretrained(check["folder"], output_loading_info=True)
    # Packed weights bring keys of their own, which the loader lists as unexpected.
    lost = [*info["missing_keys"], *info["mismatched_keys"]]
    lost += [] if check["form"] == "bitsandbytes" else [*info["unexpected_keys"]]
    problems = [f"weights do not fit: {lost[:3]}"] if lost else []
    tasks: dict[str, Task] = model.eval().tasks
    problems += _compare_labels(tasks, check)
    with torch.inference_mode():
        output = model(**{key: torch.from_numpy(array) for key, array in inputs.items()})
    found = {name: output[task.logits_name].float().numpy() for name, task in tasks.items() if name in expected}
    how = "AutoModel"
    if check.get("samples") and not problems:
        tolerance = QUANTIZED_SCORE_TOLERANCE if check["form"] == "bitsandbytes" else SCORE_TOLERANCE
        build: Any = pipeline  # its type lists the tasks of transformers only
        pipe = build(PIPELINE, model=check["folder"], device="cpu")
        for row, sample in enumerate(check["samples"]):
            wanted = {name: logits[row] for name, logits in expected.items()}
            problems += _compare_answer(pipe(read_sample(sample)), wanted, tasks, tolerance)
        how += f", pipeline({PIPELINE})"
    return {"difference": _worst(found, expected), "problems": problems[:5], "how": how}


def _check_graph(check: dict[str, Any]) -> dict[str, Any]:
    inputs, expected = dict(np.load(check["inputs"])), dict(np.load(check["expected"]))
    predictor = load_predictor(check["folder"], torch.get_num_threads())
    problems = _compare_labels(predictor.tasks, check)
    return {
        "difference": _worst(predictor.logits(inputs), expected),
        "problems": problems,
        "how": FORMS[check["form"]].runtime,
    }


def _compare_labels(tasks: dict[str, Task], check: dict[str, Any]) -> list[str]:
    return [
        f"'{name}': expected the labels {labels} in this order, found {list(tasks[name].labels or ())}"
        for name, labels in check.get("labels", {}).items()
        if list(tasks[name].labels or ()) != labels
    ]


def _worst(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    missing = np.empty(0)
    return max((largest_difference(found.get(name, missing), array) for name, array in expected.items()), default=0.0)


def _compare_answer(
    answer: dict[str, Any], logits: dict[str, np.ndarray], tasks: dict[str, Task], tolerance: float
) -> list[str]:
    """Problems of one pipeline answer; word-level answers only need to be there, their rows are padded."""
    problems = []
    for name, row in logits.items():
        task = tasks[name]
        if name not in answer:
            problems.append(f"the pipeline gave no answer for '{name}'")
        elif task.problem == "single_label_classification":
            labels = task.labels or ()
            chosen = float(row[labels.index(answer[name]["label"])])
            if float(row.max()) - chosen > tolerance * max(1.0, float(np.abs(row).max())):
                wanted = labels[int(row.argmax())]
                problems.append(f"'{name}': the pipeline answered {answer[name]['label']!r}, expected {wanted!r}")
        elif task.problem == "regression" and abs(answer[name] - float(row[0])) > tolerance * max(1.0, abs(row[0])):
            problems.append(f"'{name}': the pipeline answered {answer[name]}, expected {float(row[0])}")
    return problems


def main(manifest: str, results: str) -> None:
    """Run the checks of a manifest."""
    values = json.loads(Path(manifest).read_text(encoding="utf-8"))
    torch.set_num_threads(values["threads"])
    found = [check_folder(check) for check in values["checks"]]
    Path(results).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
