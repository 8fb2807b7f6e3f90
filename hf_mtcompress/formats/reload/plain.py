"""Reloads plain transformers folders as somebody without this package would. Run as a script, by its path.

    python -I plain.py manifest.json results.json

It imports nothing of this package, and refuses to report when something else did. `manifest.json` holds `threads` and a
list of `checks`, each with `folder` (one plain folder a task inside), `inputs` and `expected` (.npz files), `labels`
(names in order by task), `samples` (raw inputs or null). `results.json` gets one object for each check: `difference`,
`problems`, `how`.
"""

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

PIPELINES = {
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForImageClassification": ("AutoModelForImageClassification", "image-classification"),
}
"""Auto class and pipeline by the end of an architecture's name."""
SCORE_TOLERANCE = 1e-3
"""A pipeline runs one input at a time without padding, so its scores differ in the last bits."""


def check_plain_folder(check: dict[str, Any]) -> dict[str, Any]:
    """Load every plain folder inside `check["folder"]` and compare its logits with the expected ones."""
    inputs, expected = dict(np.load(check["inputs"])), dict(np.load(check["expected"]))
    worst, problems, how = 0.0, [], set()
    for name, wanted in expected.items():
        folder = Path(check["folder"]) / name
        try:
            labels = check.get("labels", {}).get(name)
            difference, auto_class, pipeline = _check_task(folder, inputs, wanted, labels, check.get("samples"))
        except Exception as error:  # any failure to load or run is the result that is asked for
            problems.append(f"{name}: {type(error).__name__}: {error}")
            continue
        worst = max(worst, difference)
        how.update({auto_class, pipeline} - {None})
    return {"difference": worst, "problems": problems, "how": ", ".join(sorted(how))}


def largest_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference; infinite for unlike shapes or numbers that are not finite."""
    if found.shape != expected.shape:
        return float("inf")
    if np.array_equal(found, expected):
        return 0.0
    difference = float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max(initial=0.0))
    return difference if np.isfinite(difference) else float("inf")


def read_sample(sample: Any) -> Any:
    """A raw input from its JSON form: pictures stand in files of their own."""
    if isinstance(sample, dict) and "file" in sample:
        with Image.open(sample["file"]) as picture:
            return picture.convert("RGB")
    return sample


def _check_task(
    folder: Path,
    inputs: dict[str, np.ndarray],
    expected: np.ndarray,
    labels: list[str] | None,
    samples: list[Any] | None,
) -> tuple[float, str, str | None]:
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    names: dict[Any, str] = config.id2label or {}
    if labels is not None and [names[index] for index in sorted(names)] != labels:
        raise ValueError(f"expected the labels {labels} in this order, found {list(names.values())}")
    architecture = (config.architectures or [""])[0]
    auto_class, task = next(names for ending, names in PIPELINES.items() if architecture.endswith(ending))
    model, info = getattr(transformers, auto_class).from_pretrained(folder, output_loading_info=True)
    lost = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if lost:
        raise ValueError(f"weights do not fit: {lost[:3]}")
    model.eval()
    with torch.inference_mode():
        for tensor in [*model.parameters(), *model.buffers()]:
            # Kernels round otherwise on memory that starts off a cache line, as tensors in a mapped file may.
            tensor.data = tensor.data.clone()
        # A tokenizer may make more than a model takes.
        taken = inspect.signature(type(model).forward).parameters
        arguments = {key: torch.from_numpy(array) for key, array in inputs.items() if key in taken}
        found = model(**arguments).logits.float().numpy()
    difference = largest_difference(found, expected)
    if not samples:
        return difference, auto_class, None
    build: Any = transformers.pipeline  # its type lists the tasks one by one
    pipe = build(task, model=str(folder), device="cpu")
    for row, sample in enumerate(samples):
        _compare_answer(pipe(_pipeline_input(read_sample(sample))), expected[row], config, task)
    return difference, auto_class, f"pipeline({task})"


def _pipeline_input(sample: Any) -> Any:
    """What a stock pipeline takes: words become a text again."""
    return " ".join(sample["text"]) if isinstance(sample, dict) and "text_pair" not in sample else sample


def _compare_answer(answer: Any, logits: np.ndarray, config: Any, task: str) -> None:
    if task == "token-classification":
        known = set(config.id2label.values())
        if any(item["entity"] not in known for item in answer):
            raise ValueError("the pipeline answered with a label that the model does not have")
        return
    answer = answer[0] if isinstance(answer, list) else answer
    label = config.id2label[int(logits.argmax())]
    if answer["label"] != label:
        # Two labels may be as good as equal; then either is right.
        other = logits[config.label2id[answer["label"]]]
        if abs(float(other - logits.max())) > SCORE_TOLERANCE:
            raise ValueError(f"the pipeline answered '{answer['label']}' where '{label}' was expected")
    if config.problem_type == "regression" and abs(answer["score"] - float(logits[0])) > SCORE_TOLERANCE:
        raise ValueError(f"the pipeline answered {answer['score']} where {float(logits[0])} was expected")


def main(manifest: str, results: str) -> None:
    """Run the checks of a manifest; see above."""
    values = json.loads(Path(manifest).read_text(encoding="utf-8"))
    torch.set_num_threads(values["threads"])
    found = [check_plain_folder(check) for check in values["checks"]]
    if "hf_mtcompress" in sys.modules:
        raise SystemExit("expected a process without hf_mtcompress, but something imported it")
    Path(results).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
