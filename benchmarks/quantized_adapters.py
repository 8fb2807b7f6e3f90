"""Adapters on a frozen encoder in 8 or 4 bits against training all weights: what three tasks score, over seeds.

Command: python benchmarks/quantized_adapters.py --data FOLDER --encoder FOLDER_OR_HUB_ID [--seeds 3]

Tasks and rows are those of the text suite, small size. The same epochs for every arm; rates of the adapters were chosen
on the validation rows of seed 1:

  full        all weights, in float
  float       an adapter for each task on the frozen encoder in float
  int8, nf4   the same on the encoder in 8 and 4 bits (bitsandbytes), as in QLoRA

Scores are of the test split, on the saved folders. Resumable: what is finished keeps its small JSON.
"""

import argparse
import dataclasses
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from multitask_text import FOLDERS, RECIPE
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from hf_mtcompress.artifacts import whole_folder, write_text
from hf_mtcompress.compression.quantization import quantize_bitsandbytes
from hf_mtcompress.data.sources import load_sources
from hf_mtcompress.evaluation.benchmark import measure_size
from hf_mtcompress.locks import share_work
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.recipe import FinetuneStep
from hf_mtcompress.recipe.load import load_recipe
from hf_mtcompress.runs.compare.statistics import paired_difference
from hf_mtcompress.runs.run import prepare_output
from hf_mtcompress.steps.run_context import RunContext, Start, recipe_reader, start_model
from hf_mtcompress.steps.scoring import score_folder
from hf_mtcompress.steps.training import train_finetune

RESULTS = Path(__file__).parent / "results" / "quantized_adapters"
ARMS = ("full", "float", "int8", "nf4")
ADAPTED = {"learning_rate": 1e-3, "head_learning_rate": 2e-3}


def build(arm: str, context: RunContext, options: argparse.Namespace) -> MultiTaskModel:
    """The model that an arm trains."""
    model = start_model(None, context)
    if arm == "full":
        return model
    if arm != "float":
        quantized = quantize_bitsandbytes(model, 8 if arm == "int8" else 4)
        assert isinstance(quantized, MultiTaskModel)
        model = quantized
    model.add_adapters(rank=options.rank, targets="all")
    return model


def train(arm: str, seed: int, options: argparse.Namespace, split: str) -> dict[str, Any]:
    """Train and score one arm."""
    overrides = [f"tasks.{task}.data.data_dir={options.data / name}" for task, name in FOLDERS.items()]
    overrides += [f"encoder.path={options.encoder}", "training.bf16=false", "mixing.batches=one_source"]
    recipe = load_recipe(RECIPE, overrides)
    tasks = {name: recipe.tasks[name] for name in options.tasks}
    sources = load_sources(tasks, recipe.seed)
    # Rows are drawn with the recipe's own seed and are the same for all; this one is of training.
    recipe = dataclasses.replace(recipe, tasks=tasks, seed=seed)
    folder = options.work / "quantized_adapters" / f"seed-{seed}"
    context = RunContext(recipe, folder, sources, recipe_reader(recipe))
    prepare_output(folder)
    set_seed(seed)
    model = build(arm, context, options)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    rates = {} if arm == "full" else {**ADAPTED, **({"learning_rate": options.rate} if options.rate else {})}
    step = FinetuneStep(name=arm, epochs=options.epochs, **rates)
    begin = time.monotonic()
    fit = train_finetune(step, Start(model, context.reader), context, folder / f"{arm}-{options.rate or 'work'}")
    seconds = time.monotonic() - begin
    with whole_folder(folder / arm) as scratch:
        torch.nn.Module.to(model, "cpu")
        model.save_pretrained(scratch)
        context.reader.save(scratch)
    scores = score_folder(context, folder / arm, split)
    return {
        "arm": arm,
        "seed": seed,
        "optimizer_steps": fit.training["steps"],
        "seconds": seconds,
        "trained_parameters": trained,
        "bytes": measure_size(folder / arm).weights_bytes,
        "average": scores.average,
        "scores": {name: found.metrics[str(sources.tasks[name].metric)] for name, found in scores.tasks.items()},
    }


def _mean(seconds: list[float | None]) -> str:
    """Of the trainings that were not interrupted: a clock that went on says nothing."""
    known = [value for value in seconds if value is not None]
    return f"{sum(known) / len(known):.0f}" if known else "-"


def main() -> int:
    """Do what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--encoder", required=True, help="folder or Hub id of the pretrained encoder")
    parser.add_argument("--tasks", nargs="+", default=["trec", "sst2", "entailment"], help="of the text suite")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, help="of adapters, to try another on the validation rows; keeps nothing")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="for the models (default: runs)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    transformers_logging.set_verbosity_error()
    if options.rate:
        for arm in options.arms:
            print(json.dumps(train(arm, 1, options, "validation"), indent=2))
        return 0
    (options.work / "quantized_adapters").mkdir(parents=True, exist_ok=True)

    def one(job: tuple[str, int]) -> dict[str, Any]:
        arm, seed = job
        target = RESULTS / arm / f"seed-{seed}.json"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_text(target, json.dumps(train(arm, seed, options, "test"), indent=2) + "\n")
        return json.loads(target.read_text(encoding="utf-8"))

    jobs = [(arm, seed) for seed in range(1, options.seeds + 1) for arm in options.arms]
    locks = [options.work / "quantized_adapters" / f"{arm}-{seed}.lock" for arm, seed in jobs]
    runs: dict[str, list[dict[str, Any]]] = {}
    for (arm, _), facts in zip(jobs, share_work(one, jobs, locks), strict=True):
        runs.setdefault(arm, []).append(facts)
    print(f"| arm | trained | MB | seconds | {' | '.join(options.tasks)} | average | against full |")
    print("| --- |" + " ---: |" * (len(options.tasks) + 5))
    for arm, found in runs.items():
        mean = {task: sum(facts["scores"][task] for facts in found) / len(found) for task in options.tasks}
        averages = [facts["average"] for facts in found]
        against = "-"
        if arm != "full" and len(found) > 1 and "full" in runs:
            difference = paired_difference(averages, [facts["average"] for facts in runs["full"]])
            low, high = difference.low or 0.0, difference.high or 0.0
            against = f"{100 * difference.mean:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"
        print(
            f"| {arm} | {found[0]['trained_parameters']:,} | {found[0]['bytes'] / 1e6:.1f} | "
            f"{_mean([facts['seconds'] for facts in found])} | "
            f"{' | '.join(f'{score:.4f}' for score in mean.values())} | "
            f"{sum(averages) / len(averages):.4f} | {against} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
