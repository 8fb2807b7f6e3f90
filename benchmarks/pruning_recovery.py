"""Pruning with recovery on the text suite: what is kept at which speed, by schedule, and against torch-pruning.

Command: python benchmarks/pruning_recovery.py --data FOLDER --encoder FOLDER_OR_HUB_ID [--arms ...] [--times]
         pip install --no-deps torch-pruning==1.6.1 adds the arm of that peer.

The model is the teacher of `distillation.py` in seed 1 (small size, eleven tasks, six layers), which is taken from
`--work` where it is done. It is the teacher of every recovery, too, on all texts for all tasks (`every_task`).

  half: ...         half of the multiply-adds of the layers gone at once, then a recovery of 2 epochs
  at once           77 % of them gone at once, recovery of 8 epochs
  deeper            80 % of them, the same recovery
  in rounds         the same in four rounds, with a quarter of the recovery after each
  gradually         the same while it recovers
  layers first      a student of three layers for 4 epochs, then the rest at once, recovery of 4 epochs
  layers, narrower  a student of three layers for 4 epochs, then narrower hidden states, recovery of 4 epochs
  layers, long      as `layers first`, 8 epochs each

Scores are of the test split, on the saved folders. --times measures torch float32 and ONNX Runtime int8 of everything
that is done against the teacher in the same form, in turns, on a quiet machine. Resumable.
"""

import argparse
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from distillation import Benchmark
from post_training_pruning import by_torch_pruning, layer_parameters
from transformers.utils import logging as transformers_logging

from hf_mtcompress.artifacts import whole_folder, write_text
from hf_mtcompress.compression.pruning import prune
from hf_mtcompress.environment import environment_facts
from hf_mtcompress.evaluation.benchmark import benchmark
from hf_mtcompress.formats.onnx.export import export_onnx
from hf_mtcompress.formats.onnx.quantize import quantize_onnx
from hf_mtcompress.locks import share_work
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.recipe import BenchmarkConfig, PruneStep
from hf_mtcompress.recipe.load import load_recipe
from hf_mtcompress.records import StepRecord
from hf_mtcompress.runs.run import do_step, prepare_output
from hf_mtcompress.steps.rows import calibration_batches
from hf_mtcompress.steps.run_context import RunContext, Start, probe_samples
from hf_mtcompress.steps.scoring import score_folder
from hf_mtcompress.steps.teaching import recover

RESULTS = Path(__file__).parent / "results" / "pruning_recovery"
RATE = 3e-4
REMOVED = 0.77
"""Of the multiply-adds: what is left is less than a quarter, because a call is more than its layers."""
HALF = ("half: first order, repair", "half: magnitude", "half: torch-pruning")
ROWS = 1024
"""For calibration."""
CUT = {"importance": "first_order", "repair": True, "rows": ROWS}


def steps_of(arm: str, learn: Callable[[float], dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps of an arm after the teacher; the last one makes what is scored."""
    first = {**learn(4), "name": f"{arm}-layers", "student": {"layers": 3}}
    rest = {"kind": "prune", "name": arm, "compute": 1 - 2 * (1 - REMOVED), **CUT, "recover": learn(4)}
    match arm:
        case "at_once":
            return [{"kind": "prune", "name": arm, "compute": REMOVED, **CUT, "recover": learn(8)}]
        case "deeper":
            return [{"kind": "prune", "name": arm, "compute": 0.8, **CUT, "recover": learn(8)}]
        case "in_rounds":
            schedule = {"kind": "iterative", "rounds": 4}
            return [
                {"kind": "prune", "name": arm, "compute": REMOVED, "schedule": schedule, **CUT, "recover": learn(8)}
            ]
        case "gradually":
            cut = {"compute": REMOVED, "schedule": {"kind": "gradual"}, "importance": "first_order"}
            return [{"kind": "prune", "name": arm, **cut, "recover": learn(8)}]
        case "layers_first":
            return [first, rest]
        case "layers_narrower":
            return [first, {"kind": "prune", "name": arm, "width": 0.42, "rows": ROWS, "recover": learn(4)}]
        case "layers_long":
            return [{**first, "epochs": 8}, {**rest, "recover": learn(8)}]
        case _:
            raise ValueError(arm)


ARMS = ("at_once", "deeper", "in_rounds", "gradually", "layers_first", "layers_narrower", "layers_long")


class Recoveries:
    """The teacher, everything that was made of it, and what is known of that."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.suite = Benchmark(options)
        self.output = self.suite.work / "seed-1"
        self.teacher = {"kind": "finetune", "name": "teacher", "epochs": self.suite.epochs}
        prepare_output(self.output)

    def learn(self, epochs: float) -> dict[str, Any]:
        """A training on the teacher's answers."""
        return {
            "kind": "distill",
            "teacher": "teacher",
            "criteria": ["logits"],
            "every_task": True,
            "learning_rate": RATE,
            "epochs": epochs,
            "teacher_cache": str(self.suite.work / "cache"),
        }

    def context(self, steps: list[dict[str, Any]]) -> RunContext:
        """What these steps after the teacher run in."""
        overrides = [*self.suite.overrides, f"steps={json.dumps([self.teacher, *steps])}"]
        recipe = dataclasses.replace(load_recipe(self.suite.recipe, overrides), seed=1)
        return RunContext(recipe, self.output, self.suite.sources, self.suite.reader)

    def do(self, steps: list[dict[str, Any]]) -> dict[str, StepRecord]:
        """The teacher's record and those of these steps, by name; what is done is taken."""
        context = self.context(steps)
        done: dict[str, StepRecord] = {}
        for step in context.recipe.steps:
            done[str(step.name)] = do_step(step, done, context)
        return done

    def one(self, arm: str) -> None:
        """Train and score one arm."""
        target = RESULTS / f"{arm.replace(':', '')}.json"
        if target.exists():
            return
        name = arm.replace(":", "").replace(",", "").replace(" ", "_")
        context = self.context([])
        if arm in HALF:
            seconds = self._half(arm, self.output / name, context)
        elif arm == "teacher":
            self.do([])
            seconds = None
        else:
            done = self.do(steps_of(arm, self.learn))
            seconds = sum(record.seconds for step, record in done.items() if step != "teacher")
        scores = score_folder(context, self.output / name, "test")
        model = context.load(name)
        facts = {
            "arm": arm,
            "folder": name,
            "seconds": seconds,
            "layer_parameters": layer_parameters(model),
            "parameters": model.num_parameters(),
            "average": scores.average,
            "scores": {
                task: row.metrics[str(self.suite.sources.tasks[task].metric)] for task, row in scores.tasks.items()
            },
        }
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, json.dumps(facts, indent=2) + "\n")

    def _half(self, arm: str, folder: Path, context: RunContext) -> float:
        """Half of the compute gone in a way that no step of a recipe has, and the same recovery."""
        begin = time.monotonic()
        model = context.load("teacher").eval()
        batches = calibration_batches(Start(model, context.reader), context, ROWS)
        if arm == "half: torch-pruning":
            # As many parameters as ours leaves, in the better of its settings in `post_training_pruning.py`.
            ours = json.loads((RESULTS / f"{HALF[0].replace(':', '')}.json").read_text(encoding="utf-8"))
            by_torch_pruning(model, batches, "taylor", 1 - ours["layer_parameters"] / layer_parameters(model), False)
            model.refresh_config()
        else:
            repair = "repair" in arm
            prune(model, batches, compute=0.5, importance="first_order" if repair else "magnitude", repair=repair)
        work = self.output / "work" / folder.name
        with whole_folder(work / "cut") as scratch:
            model.save_pretrained(scratch)
        # As a recipe spells it out.
        (_, step) = self.context([{"kind": "prune", "compute": 0.5, "recover": self.learn(2)}]).recipe.steps
        assert isinstance(step, PruneStep)
        assert step.recover is not None
        recover(step.recover, Start(model, context.reader), context, work)
        with whole_folder(folder) as scratch:
            torch.nn.Module.to(model, "cpu")
            assert isinstance(model, MultiTaskModel)
            model.save_pretrained(scratch)
            context.reader.save(scratch)
        return time.monotonic() - begin

    def times(self) -> None:
        """Time torch float32 and int8 of everything that is done, each against the teacher in the same form."""
        context = self.context([])
        done = {facts["arm"]: facts["folder"] for facts in known() if (self.output / facts["folder"]).exists()}
        torch_folders = {arm: self.output / name for arm, name in done.items()}
        graphs = {}
        for arm, name in done.items():
            graphs[arm] = self.output / f"{name}-recovery-int8"
            if not graphs[arm].exists():
                work = self.output / "work" / f"{name}-graph"
                if not work.exists():
                    with whole_folder(work) as scratch:
                        export_onnx(context.load(name).eval(), context.reader_of_step("teacher"), scratch)
                with whole_folder(graphs[arm]) as scratch:
                    quantize_onnx(work, scratch)
        config = BenchmarkConfig(threads=self.options.threads, repetitions=self.options.repetitions)
        result: dict[str, Any] = {"environment": environment_facts()}
        for form, folders in (("torch float32", torch_folders), ("onnx int8", graphs)):
            every = {"reference": self.output / "teacher", **folders}
            found = benchmark(every, reference="reference", config=config, samples=probe_samples(context))
            rows = {
                arm: {str(row.batch_size): dataclasses.asdict(row) for row in times}
                for arm, times in found.latency.items()
            }
            result[form] = {"conditions": found.conditions, "latency": rows}
        write_text(RESULTS / "times.json", json.dumps(result, indent=2, default=str) + "\n")


def known() -> list[dict[str, Any]]:
    """What is scored."""
    files = sorted(RESULTS.glob("*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.name != "times.json"]


def table() -> str:
    """Every arm against the teacher."""
    found = {facts["arm"]: facts for facts in known()}
    teacher = found["teacher"]
    file = RESULTS / "times.json"
    times = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    lines = [
        "| arm | average | kept | kept, worst task | parameters of layers | torch 1 | torch 32 | int8 1 | int8 32 |",
        "| --- |" + " ---: |" * 8,
    ]
    for arm, facts in sorted(found.items(), key=lambda item: -item[1]["average"]):
        shares = [facts["scores"][task] / teacher["scores"][task] for task in teacher["scores"]]
        faster = []
        for form in ("torch float32", "onnx int8"):
            every = times.get(form, {}).get("latency", {})
            for size in ("1", "32"):
                pair = [every[name][size]["minimum_ms"] for name in ("teacher", arm) if size in every.get(name, {})]
                faster.append(f"{pair[0] / pair[1]:.1f}x" if len(pair) == 2 and all(pair) else "-")
        lines.append(
            f"| {arm} | {facts['average']:.4f} | {100 * sum(shares) / len(shares):.1f} % | {100 * min(shares):.1f} % | "
            f"{facts['layer_parameters']:,} | {' | '.join(faster)} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Do what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--encoder", required=True, help="folder or Hub id of the pretrained encoder")
    parser.add_argument("--arms", nargs="*", choices=(*ARMS, *HALF), default=[*ARMS, *HALF])
    parser.add_argument("--work", type=Path, default=Path("runs"), help="for models and caches (default: runs)")
    parser.add_argument("--times", action="store_true", help="time what is done, and train nothing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=20)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    transformers_logging.set_verbosity_error()
    recoveries = Recoveries(options)
    if options.times:
        recoveries.times()
    else:
        # The teacher is needed by all, and the peer cuts as many parameters as the first arm of its kind did.
        first = [HALF[0]] if set(HALF).intersection(options.arms) else []
        for jobs in (["teacher"], first, [arm for arm in options.arms if arm not in first]):
            names = [arm.replace(":", "").replace(" ", "_") for arm in jobs]
            share_work(recoveries.one, jobs, [recoveries.output.parent / f"{name}.lock" for name in names])
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
