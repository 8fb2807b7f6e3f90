"""Whether `bench` says what is true, or that it cannot: on a quiet machine, and beside processes that never rest.

Command: python benchmarks/busy_machine.py --encoder FOLDER_OR_HUB_ID [--runs 10] [--busy 0 1 4] [--cores 2]

A model of two tasks (the reference), its 8-bit graph, and a student of half of its layers with half of their heads and
neurons are timed by `hf-mtcompress bench` in turns with other conditions: every round has one call for each number of
busy processes. Goals, with ten runs each on two cores: of quiet runs at least nine give every ratio; beside one busy
process at least half do; no run gives a ratio that is off by more than 25 % of the median of the quiet ones.

It goes on where it was stopped. What it counts as quiet is only quiet if nothing else runs; `others` says what did.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import logging

from hf_mtcompress.artifacts import whole_folder, write_text
from hf_mtcompress.compression.latency import save_shape
from hf_mtcompress.environment import environment_facts
from hf_mtcompress.formats.onnx.export import export_onnx
from hf_mtcompress.formats.onnx.quantize import quantize_onnx
from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.tasks import SequenceClassification, TokenClassification

RESULTS = Path(__file__).parent / "results" / "busy_machine"
FOLDERS = ("teacher", "teacher-int8", "student-int8")
TOLERANCE = 0.25


def save_models(encoder: str, output: Path) -> None:
    """The three folders, those that are not there yet."""
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    tasks: list[Any] = [
        SequenceClassification("topic", labels=tuple("abcd"), text="text", label="label"),
        TokenClassification("words", labels=tuple("abcdefgh"), tokens="tokens", label="tags"),
    ]
    if all((output / name).is_dir() for name in FOLDERS):
        return
    model = MultiTaskModel.from_encoder(encoder, tasks).eval()
    sizes = find_anatomy(model.encoder).sizes
    heads, width = sizes[0]
    half = [(max(heads // 2, 1), width // 2)] * max(len(sizes) // 2, 1)
    for name in FOLDERS:
        if (output / name).is_dir():
            continue
        with whole_folder(output / name) as folder:
            if name == "teacher":
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
            elif name == "teacher-int8":
                with TemporaryDirectory() as scratch:
                    quantize_onnx(export_onnx(model, tokenizer, Path(scratch)), folder)
            else:
                save_shape(model, tokenizer, half, folder, "onnx_int8")


def one_run(output: Path, busy: int, wait: int) -> dict[str, Any]:
    """`bench` beside processes that never rest."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    begin = time.monotonic()
    try:
        command = [sys.executable, "-m", "hf_mtcompress", "bench", *FOLDERS, "--json", "--wait", str(wait)]
        found = subprocess.run(command, cwd=output, capture_output=True, text=True, check=True)
    finally:
        for process in others:
            process.kill()
            process.wait()
    result = json.loads(found.stdout)
    conditions = result["conditions"]
    return {
        "seconds": round(time.monotonic() - begin, 1),
        "threads": conditions["threads"],
        "others": conditions["other_processes"],
        "ratios": {
            f"{label} b{row['batch_size']}": row["ratio_minimum"]
            for label in FOLDERS[1:]
            for row in result["latency"][label]
        },
        "not_measured": conditions["not_measured"],
    }


def known(results: Path) -> dict[int, list[dict[str, Any]]]:
    """Runs by the number of busy processes."""
    found: dict[int, list[dict[str, Any]]] = {}
    for file in sorted(results.glob("*.json")):
        found.setdefault(int(file.stem.split("-")[0]), []).append(json.loads(file.read_text(encoding="utf-8")))
    return found


def table(results: Path) -> str:
    """One line for each number of busy processes."""
    runs = known(results)
    quiet: dict[str, float] = {}
    for run in runs.get(0, []):
        for name in run["ratios"]:
            values = [other["ratios"][name] for other in runs[0] if other["ratios"][name] is not None]
            if values:
                quiet[name] = statistics.median(values)
    lines = ["quiet ratios: " + ", ".join(f"{name} {value:.3f}" for name, value in quiet.items())]
    lines += [
        "| busy processes | runs | every ratio given | some | none | farthest from quiet | off by more than 25 % |"
    ]
    lines += ["|" + " ---: |" * 7]
    for busy, found in sorted(runs.items()):
        given = [[value for value in run["ratios"].values() if value is not None] for run in found]
        every = sum(len(values) == len(run["ratios"]) for values, run in zip(given, found, strict=True))
        none = sum(not values for values in given)
        far = [
            abs(value / quiet[name] - 1)
            for run in found
            for name, value in run["ratios"].items()
            if value is not None and name in quiet
        ]
        worst = f"{100 * max(far):.0f} %" if far else "-"
        wrong = sum(value > TOLERANCE for value in far)
        lines.append(f"| {busy} | {len(found)} | {every} | {len(found) - every - none} | {none} | {worst} | {wrong} |")
    return "\n".join(lines)


def main() -> int:
    """Do what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="folder or Hub id of a pretrained text encoder")
    parser.add_argument("--output", type=Path, default=Path("runs/busy_machine"), help="for the models")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--runs", type=int, default=10, help="of each condition (default: 10)")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 4], help="busy processes (default: 0 1 4)")
    parser.add_argument("--cores", type=int, default=2, help="that all may use, where the system can tell (default: 2)")
    parser.add_argument("--wait", type=int, default=30, help="seconds that bench waits for a quiet machine")
    options = parser.parse_args()
    logging.set_verbosity_error()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    options.output.mkdir(parents=True, exist_ok=True)
    save_models(options.encoder, options.output)
    options.results.mkdir(parents=True, exist_ok=True)
    for number in range(options.runs):
        for busy in options.busy:
            target = options.results / f"{busy}-{number:02d}.json"
            if not target.exists():
                result = {**one_run(options.output, busy, options.wait), "environment": environment_facts()}
                write_text(target, json.dumps(result, indent=2) + "\n")
                print(f"{busy} busy, run {number}: {result['ratios']} on {result['threads']} threads", file=sys.stderr)
    print(table(options.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
