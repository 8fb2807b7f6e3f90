"""A large teacher of another architecture and with another tokenizer, asked once: what it gives a small encoder.

Command: python benchmarks/large_teacher.py --data FOLDER --encoder FOLDER_OR_HUB_ID --teacher FOLDER_OR_HUB_ID
         [--tasks emotion entailment] [--seeds 3]

The teacher (all-mpnet-base-v2 in the results kept here) is fine-tuned once on the tasks. The small encoder is then
trained on the same rows with labels alone, and with labels and the teacher's answers from a cache, at the same steps.
Resumable: what is finished is not repeated, and several processes with the same command share the work.
"""

import argparse
import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
from multitask_text import FOLDERS, RECIPE
from transformers.utils import logging as transformers_logging

from hf_mtcompress.artifacts import write_text
from hf_mtcompress.data.sources import load_sources
from hf_mtcompress.environment import environment_facts
from hf_mtcompress.evaluation.benchmark import measure_size
from hf_mtcompress.locks import share_work
from hf_mtcompress.recipe.load import load_recipe
from hf_mtcompress.records import StepRecord
from hf_mtcompress.runs.compare.statistics import paired_difference
from hf_mtcompress.runs.run import do_step, prepare_output
from hf_mtcompress.steps.run_context import RunContext, recipe_reader
from hf_mtcompress.steps.scoring import score_folder

RESULT = Path(__file__).parent / "results" / "large_teacher.json"
EPOCHS, TEACHER_RATE = 4, 5e-5


def train(step: dict[str, Any], encoder: str, seed: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Do one step on a pretrained encoder: its record and its test scores."""
    overrides = [f"tasks.{task}.data.data_dir={options.data / name}" for task, name in FOLDERS.items()]
    overrides += [f"encoder.path={encoder}", f"steps={json.dumps([{'epochs': EPOCHS, **step}])}"]
    recipe = load_recipe(RECIPE, overrides)
    tasks = {name: recipe.tasks[name] for name in options.tasks}
    sources = load_sources(tasks, recipe.seed)
    # Rows are drawn with the recipe's own seed and are the same for all; this one is of training.
    recipe = dataclasses.replace(recipe, tasks=tasks, seed=seed)
    context = RunContext(recipe, folder, sources, recipe_reader(recipe))
    prepare_output(folder)
    record: StepRecord = do_step(recipe.steps[0], {}, context)
    kept = folder / str(record.name) / "test.json"
    if not kept.exists():
        scores = score_folder(context, folder / str(record.name), "test")
        by_task = {name: found.metrics[str(sources.tasks[name].metric)] for name, found in scores.tasks.items()}
        write_text(kept, json.dumps({"scores": by_task, "rows": {n: s.rows for n, s in scores.tasks.items()}}))
    training = record.training or {}
    size = measure_size(folder / str(record.name))
    return {
        **json.loads(kept.read_text(encoding="utf-8")),
        "seconds": record.seconds,
        "optimizer_steps": training["steps"],
        "teacher_cache": training.get("teacher_cache"),
        "parameters": size.parameters if size else None,
    }


def main() -> int:
    """Run what is missing, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--encoder", required=True, help="folder or Hub id of the small pretrained encoder")
    parser.add_argument("--teacher", required=True, help="folder or Hub id of the large one")
    parser.add_argument("--tasks", nargs="+", default=["emotion", "entailment"], help="of the text suite")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/large_teacher"), help="for models and the cache")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    transformers_logging.set_verbosity_error()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)

    def teach(_: str) -> dict[str, Any]:
        step = {"kind": "finetune", "name": "teacher", "learning_rate": TEACHER_RATE}
        return train(step, options.teacher, 1, work, options)

    def study(job: tuple[str, int]) -> dict[str, Any]:
        arm, seed = job
        step: dict[str, Any] = {"kind": "finetune", "name": arm}
        if arm == "distilled":
            step |= {
                "kind": "distill",
                "teacher": str(work / "teacher"),
                "teacher_cache": str(work / "cache"),
                "criteria": ["logits"],
            }
        return train(step, options.encoder, seed, work / f"seed-{seed}", options)

    (teacher,) = share_work(teach, ["teacher"], [work / "teacher.lock"])
    jobs = [(arm, seed) for seed in range(1, options.seeds + 1) for arm in ("plain", "distilled")]
    found = share_work(study, jobs, [work / f"{arm}-{seed}.lock" for arm, seed in jobs])
    arms = {arm: [facts for (name, _), facts in zip(jobs, found, strict=True) if name == arm] for arm, _ in jobs}
    averages = {arm: [float(np.mean(list(facts["scores"].values()))) for facts in runs] for arm, runs in arms.items()}
    difference = paired_difference(averages["distilled"], averages["plain"])
    result = {
        "settings": {"epochs": EPOCHS, "teacher_learning_rate": TEACHER_RATE, "seeds": options.seeds},
        "environment": environment_facts(),
        "teacher": teacher,
        **arms,
        "distilled_against_plain": dataclasses.asdict(difference),
    }
    write_text(RESULT, json.dumps(result, indent=2) + "\n")
    print(f"| model | {' | '.join(options.tasks)} | average |")
    print("| --- |" + " ---: |" * (len(options.tasks) + 1))
    for name, runs in {"teacher": [teacher], **arms}.items():
        means = [float(np.mean([facts["scores"][task] for facts in runs])) for task in options.tasks]
        print(f"| {name} | {' | '.join(f'{mean:.4f}' for mean in [*means, float(np.mean(means))])} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
