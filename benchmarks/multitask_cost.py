"""What several tasks cost: step time of the trainer and time of a prediction, arms taking turns.

Command: python benchmarks/multitask_cost.py --encoder FOLDER_OR_HUB_ID [--steps 12] [--rounds 7]

Workload: batches of 32 rows of 32 tokens, drawn at random, so nothing depends on a data set. Every round runs each arm
once, in turns; the result is the ratio of minima and of medians, with the times behind them.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.utils import logging

from hf_mtcompress import MultiTaskModel, MultiTaskTrainer, MultiTaskTrainingArguments, SequenceClassification
from hf_mtcompress.environment import environment_facts

ROWS, TOKENS, LABELS, TASKS = 32, 32, ("no", "yes"), 10
RESULT = Path(__file__).parent / "results" / "multitask_cost.json"
PAIRS = {
    "one task: MultiTaskTrainer / Trainer": ("one_task", "stock_trainer", 1.03),
    "10 tasks / 1 task, same rows": ("ten_tasks", "one_task", 1.05),
    "10 tasks: surgery at the features / plain sum": ("ten_tasks_upgrad", "ten_tasks", 1.25),
    "prediction of 10 tasks / 1 task": ("predict_ten", "predict_one", 1.15),
}
"""By claim: numerator, denominator, and the ratio that is aimed at."""


class Clock(TrainerCallback):
    """Notes when each optimizer step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """One step is done."""
        self.ends.append(time.perf_counter())


def rows(names: list[str], count: int) -> Dataset:
    """Random token ids with one random label for each task."""
    generator = np.random.default_rng(0)
    ids = generator.integers(1000, 20000, (count, TOKENS))
    columns: dict[str, Any] = {"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}
    return Dataset.from_dict(columns | {name: generator.integers(0, 2, count).tolist() for name in names})


def arguments(cls: type[TrainingArguments], folder: str, steps: int, **settings: Any) -> Any:
    """The same settings for every arm."""
    return cls(
        folder,
        max_steps=steps,
        per_device_train_batch_size=ROWS,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **settings,
    )


def step_times(trainer: Trainer) -> list[float]:
    """Milliseconds of each optimizer step but the first."""
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    trainer.remove_callback(clock)
    return [1000 * (end - begin) for begin, end in zip(clock.ends, clock.ends[1:], strict=False)]


def multi_task(encoder: str, count: int) -> MultiTaskModel:
    """A model with some binary tasks."""
    tasks = [SequenceClassification(f"task{number}", labels=LABELS) for number in range(count)]
    return MultiTaskModel.from_encoder(encoder, tasks, max_length=TOKENS)


def arms(encoder: str, steps: int, folder: str) -> dict[str, Callable[[], list[float]]]:
    """By name: one round of an arm, as times in milliseconds."""
    count = ROWS * (steps + 1)
    stock = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2, dtype=torch.float32)

    def plain() -> list[float]:
        data = rows(["labels"], count)
        args = arguments(TrainingArguments, folder, steps)
        return step_times(Trainer(model=stock, args=args, train_dataset=data, data_collator=default_data_collator))

    def ours(tasks: int, **settings: Any) -> Callable[[], list[float]]:
        model = multi_task(encoder, tasks)
        data = rows([f"labels_task{number}" for number in range(tasks)], count)

        def run() -> list[float]:
            args = arguments(MultiTaskTrainingArguments, folder, steps, **settings)
            return step_times(MultiTaskTrainer(model=model, args=args, train_dataset=data))

        return run

    def predict(tasks: int) -> Callable[[], list[float]]:
        model: PreTrainedModel = multi_task(encoder, tasks).eval()
        ids = torch.as_tensor(rows([], ROWS)["input_ids"])

        def run() -> list[float]:
            times = []
            with torch.inference_mode():
                for _ in range(steps):
                    begin = time.perf_counter()
                    model(input_ids=ids)
                    times.append(1000 * (time.perf_counter() - begin))
            return times[1:]

        return run

    return {
        "stock_trainer": plain,
        "one_task": ours(1),
        "ten_tasks": ours(TASKS),
        "ten_tasks_upgrad": ours(TASKS, gradient_combination="upgrad"),
        "predict_one": predict(1),
        "predict_ten": predict(TASKS),
    }


def main() -> int:
    """Run the rounds, print ratios, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="folder or Hub id of a pretrained text encoder")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps or calls of an arm in a round")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        chosen = arms(options.encoder, options.steps, folder)
        times: dict[str, list[float]] = {name: [] for name in chosen}
        load = os.getloadavg()[0]
        for number in range(options.rounds):
            for name, run in chosen.items():
                print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr)
                times[name] += run()
    found = {
        claim: {
            "minimum": min(times[above]) / min(times[below]),
            "median": statistics.median(times[above]) / statistics.median(times[below]),
            "aimed_at": aim,
        }
        for claim, (above, below, aim) in PAIRS.items()
    }
    result = {
        "workload": f"{ROWS} rows of {TOKENS} tokens, {options.rounds} rounds of {options.steps} steps, arms in turns",
        "load_before": load,
        "threads": torch.get_num_threads(),
        "environment": environment_facts(),
        "milliseconds": {
            name: {"minimum": min(values), "median": statistics.median(values)} for name, values in times.items()
        },
        "ratios": found,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for claim, values in found.items():
        print(
            f"{claim}: {values['minimum']:.3f} (minimum), {values['median']:.3f} (median), at most {values['aimed_at']}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
