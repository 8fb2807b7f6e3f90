"""Word embeddings cut to the tokens that the text suite uses: sizes, and scores before and after.

Command: python benchmarks/vocabulary.py --data FOLDER --encoder FOLDER_OR_HUB_ID [--size small] [--work runs]

The model is the teacher of `distillation.py` in seed 1, which is taken from `--work` where it is done. Arms: all tokens
of training and validation texts stay; the same, seen twice or more; and the most frequent ones, as many as make half of
the table and a quarter. Scores on both splits, on the saved folders: validation texts are among those whose tokens are
counted, test texts are not.
"""

import argparse
import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

from distillation import Benchmark
from transformers.utils import logging as transformers_logging

from hf_mtcompress.artifacts import write_text
from hf_mtcompress.recipe.load import load_recipe
from hf_mtcompress.records import StepRecord
from hf_mtcompress.runs.run import do_step, prepare_output
from hf_mtcompress.steps.run_context import RunContext
from hf_mtcompress.steps.scoring import score_folder

RESULT = Path(__file__).parent / "results" / "vocabulary.json"


def main() -> int:
    """Trim, score, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--encoder", required=True, help="folder or Hub id of the pretrained encoder")
    parser.add_argument("--size", choices=("small", "full"), default="small")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="for the models (default: runs)")
    parser.add_argument("overrides", metavar="a.b.c=value", nargs="*", help="change a value of the recipe")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    transformers_logging.set_verbosity_error()
    suite = Benchmark(options)
    output = suite.work / "seed-1"
    prepare_output(output)
    tokens = len(suite.reader.processor)
    arms: dict[str, dict[str, Any]] = {
        "used": {},
        "used-twice": {"minimum_count": 2},
        "half": {"size": tokens // 2},
        "quarter": {"size": tokens // 4},
    }
    steps = [{"kind": "finetune", "name": "teacher", "epochs": suite.epochs}]
    steps += [
        {"kind": "trim_vocabulary", "name": f"vocabulary-{arm}", "from": "teacher", **settings}
        for arm, settings in arms.items()
    ]
    recipe = dataclasses.replace(load_recipe(suite.recipe, [*suite.overrides, f"steps={json.dumps(steps)}"]), seed=1)
    context = RunContext(recipe, output, suite.sources, suite.reader)
    done: dict[str, StepRecord] = {}
    result: dict[str, Any] = {}
    for step in recipe.steps:
        record = done[str(step.name)] = do_step(step, done, context)
        artefact = record.artefacts[0]
        assert artefact.size is not None
        test = score_folder(context, output / str(step.name), "test")
        result[str(step.name).removeprefix("vocabulary-")] = {
            "embedding_bytes": artefact.size.embedding_bytes,
            "bytes": artefact.size.weights_bytes,
            "tokenizer_bytes": artefact.size.tokenizer_bytes,
            "validation": artefact.scores["validation"].average,
            "test": test.average,
            "vocabulary": record.vocabulary,
        }
    write_text(RESULT, json.dumps({"size": options.size, **result}, indent=2) + "\n")
    whole = result["teacher"]
    print("| tokens kept | embeddings, MB | of all | model, MB | validation | difference | test | difference |")
    print("| --- |" + " ---: |" * 7)
    for arm, facts in result.items():
        table = facts["embedding_bytes"]
        print(
            f"| {arm} | {table / 1e6:.1f} | {100 * table / whole['embedding_bytes']:.1f} % | "
            f"{facts['bytes'] / 1e6:.1f} | "
            f"{facts['validation']:.4f} | {100 * (facts['validation'] - whole['validation']):+.2f} | "
            f"{facts['test']:.4f} | {100 * (facts['test'] - whole['test']):+.2f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
