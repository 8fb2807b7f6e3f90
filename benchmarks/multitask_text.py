"""Single-task models, the multi-task model and its variants on eleven text tasks, over seeds.

Command: python benchmarks/multitask_text.py --data FOLDER --encoder FOLDER_OR_HUB_ID [--size small] [--seeds 3]

Resumable: a training that is finished keeps its small JSON below benchmarks/results and is not repeated; one that was
killed goes on from its checkpoint. `--seeds` and `--arms` do some now and others later. Processes with the same command
share the work: on two cores, two of them with OMP_NUM_THREADS=1 take less time than one with two threads.

small: at most 1,000 training and 500 test rows a task, drawn with the recipe's seed. full: all rows.
"""

import argparse
import sys
from pathlib import Path

from hf_mtcompress.cli import main as command

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
    "one-source": "mixing.batches=one_source",
    "product": f"{EQUAL},fusion.kind=product",
    "uncertainty": f"{EQUAL},fusion.kind=uncertainty",
    "gradient-norm": f"{EQUAL},fusion.kind=gradient_norm",
    "upgrad": f"{EQUAL},fusion.combination=upgrad",
}
TEMPERATURE = {"temperature": "mixing.strategy=temperature"}
"""In `small` every source has the same number of rows, so this arm says something in `full` only."""


def main() -> int:
    """Call `hf-mtcompress compare-tasks` with the arms; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--encoder", required=True, help="folder or Hub id of the pretrained encoder")
    parser.add_argument("--size", choices=("small", "full"), default="small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", help="names of arms; default: all")
    parser.add_argument(
        "--groups", nargs="*", default=[], help="NAME=task+task/task: several models; see compare-tasks"
    )
    options = parser.parse_args()
    arms = ARMS | (TEMPERATURE if options.size == "full" else {})
    chosen = arms if options.arms is None else {name: arms[name] for name in options.arms}
    overrides = [f"tasks.{task}.data.data_dir={options.data / folder}" for task, folder in FOLDERS.items()]
    if options.size == "full":
        overrides += [f"tasks.{task}.data.max_rows=null" for task in FOLDERS]
        overrides += ["steps.model.epochs=3"]
    arguments = ["compare-tasks", str(RECIPE), f"encoder.path={options.encoder}", *overrides]
    arguments += ["--seeds", str(options.seeds), "--output", str(HERE / "results" / f"multitask_text_{options.size}")]
    arguments += [word for name, settings in chosen.items() for word in ("--arm", f"{name}={settings}")]
    arguments += [word for group in options.groups for word in ("--group", group)]
    return command(arguments)


if __name__ == "__main__":
    sys.exit(main())
