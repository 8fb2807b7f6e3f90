"""Single-task models, the multi-task model and its variants on eleven text tasks, over seeds.

Command: python benchmarks/multitask_text.py --data FOLDER --encoder FOLDER_OR_HUB_ID [--size small] [--seeds 3]

Resumable: a training that is finished keeps its small JSON below benchmarks/results and is not repeated; one that was
killed goes on from its checkpoint. `--seeds` and `--arms` do some now and others later. Processes with the same command
share the work: on two cores, two of them with OMP_NUM_THREADS=1 take less time than one with two threads.

small: at most 1,000 training and 500 test rows a task, drawn with the recipe's seed. full: all rows.

--encoders N adds two groupings into at most N encoders: `grouped`, by what sharing cost each task on validation rows,
and `by-gradients`, for which all tasks are trained together for 500 steps in seed 1, in `--work`, and their gradients
compared on validation rows 20 times. `--groups` adds others by hand.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from hf_mtcompress.artifacts import write_text
from hf_mtcompress.cli import main as command
from hf_mtcompress.environment import environment_facts
from hf_mtcompress.recipe.load import load_recipe
from hf_mtcompress.runs.grouping import group_tasks_of
from hf_mtcompress.runs.run import run

HERE = Path(__file__).parent
RECIPE = HERE / "multitask_text.yaml"
FOLDERS = {
    "emotion": "tweeteval/emotion",
    "irony": "tweeteval/irony",
    "stance": "tweeteval/stance",
    "sst2": "sst2",
    "trec": "trec",
    "subj": "subj",
    "intent": "snips",
    "entailment": "sick",
    "pos": "ud_ewt_pos",
}
EQUAL = "tasks.slots.weight=1,tasks.pos.weight=1"
ARMS = {
    "equal": EQUAL,
    "scaled": f"{EQUAL},fusion.normalize=chance",
    "branches": "branches={words: [slots, pos]},branch_layers=2",
    "tone": "branches={tone: [emotion, stance, sst2]},branch_layers=2",
    "one-source": "mixing.batches=one_source",
    "product": f"{EQUAL},fusion.kind=product",
    "uncertainty": f"{EQUAL},fusion.kind=uncertainty",
    "gradient-norm": f"{EQUAL},fusion.kind=gradient_norm",
    "upgrad": f"{EQUAL},fusion.combination=upgrad",
}
TEMPERATURE = {"temperature": "mixing.strategy=temperature"}
"""In `small` every source has the same number of rows, so this arm says something in `full` only."""


def grouping_of(overrides: list[str], encoders: int, work: Path, results: Path) -> str:
    """The tasks in at most so many encoders, as their gradients say, in the form that `--group` takes."""
    folder = work / f"{results.name}-begun"
    looks = ["steps.model.max_steps=500", "fusion.measure_every=25", "fusion.measure_on=validation"]
    run(load_recipe(RECIPE, [*overrides, *looks]), folder)
    found = group_tasks_of(folder, encoders=encoders)
    results.mkdir(parents=True, exist_ok=True)
    facts = {"encoders": encoders, **dataclasses.asdict(found), "environment": environment_facts()}
    write_text(results / "grouping.json", json.dumps(facts, indent=2) + "\n")
    return found.text


def main() -> int:
    """Call `hf-mtcompress compare-tasks` with the arms; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--encoder", required=True, help="folder or Hub id of the pretrained encoder")
    parser.add_argument("--size", choices=("small", "full"), default="small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", help="names of arms; default: all")
    parser.add_argument(
        "--groups", nargs="*", default=[], help="NAME=task+task/task[,a.b.c=value]: several models; see compare-tasks"
    )
    parser.add_argument("--encoders", type=int, help="add groupings into so many, by cost and by gradients")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="for the run of --encoders (default: runs)")
    options = parser.parse_args()
    arms = ARMS | (TEMPERATURE if options.size == "full" else {})
    chosen = arms if options.arms is None else {name: arms[name] for name in options.arms}
    overrides = [f"tasks.{task}.data.data_dir={options.data / folder}" for task, folder in FOLDERS.items()]
    if options.size == "full":
        overrides += [f"tasks.{task}.data.max_rows=null" for task in FOLDERS]
        overrides += ["steps.model.epochs=3"]
    overrides.append(f"encoder.path={options.encoder}")
    results = HERE / "results" / f"multitask_text_{options.size}"
    if options.encoders:
        options.groups.append(f"by-gradients={grouping_of(overrides, options.encoders, options.work, results)}")
    arguments = ["compare-tasks", str(RECIPE), *overrides, "--seeds", str(options.seeds), "--output", str(results)]
    arguments += [word for name, settings in chosen.items() for word in ("--arm", f"{name}={settings}")]
    arguments += [word for group in options.groups for word in ("--group", group)]
    if options.encoders:
        arguments += ["--encoders", str(options.encoders)]
    return command(arguments)


if __name__ == "__main__":
    sys.exit(main())
