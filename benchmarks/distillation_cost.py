"""What a teacher costs a training step: beside the student, and asked once before; arms taking turns.

Command: python benchmarks/distillation_cost.py --encoder FOLDER_OR_HUB_ID [--layers 3] [--steps 12] [--rounds 7]

Workload: a student of some layers of the encoder with one binary task, batches of 32 rows of 32 tokens drawn at random;
the teacher is the encoder itself. Every round runs each arm once, in turns; the result is the ratio of minima and of
medians to plain fine-tuning of the student, with the times behind them. What it takes to ask the teacher stands apart.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from multitask_cost import ROWS, TOKENS, arguments, multi_task, rows, step_times
from transformers.utils import logging

from hf_mtcompress import (
    DistillationTrainer,
    DistillationTrainingArguments,
    MultiTaskTrainer,
    MultiTaskTrainingArguments,
    student_of,
)
from hf_mtcompress.environment import environment_facts

RESULT = Path(__file__).parent / "results" / "distillation_cost.json"
PLAIN = "plain"
ARMS = {
    "cached: logits": (["logits"], True),
    "cached: logits and hidden states": (["logits", "hidden"], True),
    "cached: logits and relations": (["logits", "relations"], True),
    "live: logits": (["logits"], False),
    "live: logits and hidden states": (["logits", "hidden"], False),
}
"""By name: criteria, and whether the teacher is asked before."""
AIM = 1.10
"""For cached arms."""


def arms(
    encoder: str, layers: int, steps: int, folder: str
) -> tuple[dict[str, Callable[[], list[float]]], dict[str, dict[str, float]]]:
    """By name: one round of an arm, as times in milliseconds; and what the caches took."""
    teacher = multi_task(encoder, 1)
    data = rows(["labels_task0"], ROWS * (steps + 1))
    caches: dict[str, dict[str, float]] = {}

    def plain() -> list[float]:
        args = arguments(MultiTaskTrainingArguments, folder, steps)
        return step_times(MultiTaskTrainer(model=student_of(teacher, layers), args=args, train_dataset=data))

    def distilled(name: str) -> Callable[[], list[float]]:
        criteria, cached = ARMS[name]

        def run() -> list[float]:
            trainer = DistillationTrainer(
                model=student_of(teacher, layers),
                teacher=teacher,
                args=arguments(DistillationTrainingArguments, folder, steps),
                criteria=criteria,
                teacher_cache=Path(folder) / "cache" if cached else None,
                probe_rows=0,
                train_dataset=data,
            )
            for summary in trainer.caches:
                caches[name] = {
                    "seconds_to_ask": summary.seconds,
                    "megabytes": summary.bytes / 1e6,
                    "kilobytes_a_row": summary.bytes / 1e3 / summary.rows,
                }
            return step_times(trainer)

        return run

    return {PLAIN: plain, **{name: distilled(name) for name in ARMS}}, caches


def main() -> int:
    """Run the rounds, print ratios, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="folder or Hub id of a pretrained text encoder")
    parser.add_argument("--layers", type=int, default=3, help="of the student")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of an arm in a round")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        chosen, caches = arms(options.encoder, options.layers, options.steps, folder)
        times: dict[str, list[float]] = {name: [] for name in chosen}
        load = os.getloadavg()[0]
        for number in range(options.rounds):
            for name, run in chosen.items():
                print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr)
                times[name] += run()
    found: dict[str, Any] = {
        name: {
            "minimum": min(times[name]) / min(times[PLAIN]),
            "median": statistics.median(times[name]) / statistics.median(times[PLAIN]),
            **({"aimed_at": AIM} if ARMS[name][1] else {}),
        }
        for name in ARMS
    }
    workload = (
        f"{options.layers} layers, {ROWS} rows of {TOKENS} tokens, {options.rounds} rounds of {options.steps} steps"
    )
    result = {
        "workload": f"{workload}, arms in turns",
        "load_before": load,
        "threads": torch.get_num_threads(),
        "environment": environment_facts(),
        "milliseconds": {
            name: {"minimum": min(values), "median": statistics.median(values)} for name, values in times.items()
        },
        "ratios_to_plain": found,
        "caches": caches,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for name, values in found.items():
        aim = f", at most {AIM}" if "aimed_at" in values else ""
        print(f"{name} / plain: {values['minimum']:.3f} (minimum), {values['median']:.3f} (median){aim}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
