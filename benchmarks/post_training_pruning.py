"""Half of an encoder's compute removed without training: what is left of its scores, by importance, and by peers.

Command: python benchmarks/post_training_pruning.py --data FOLDER --model FOLDER [--rows 1024] [--compute 0.5]
         pip install --no-deps torch-pruning==1.6.1 adds the arms of that peer.

`--model` is a saved multi-task model of the text suite (`multitask_text.yaml`), such as a teacher that
`distillation.py` leaves in its work folder. All arms see the same calibration rows (of training rows) and are scored on
the same test rows. torch-pruning cuts heads and feed-forward neurons alone, ranked over all layers, to the same number
of parameters beside the embeddings; its gradients are those of the sum of the tasks' losses.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from multitask_text import FOLDERS, RECIPE
from torch import Tensor
from transformers.utils import logging

from hf_mtcompress.artifacts import write_text
from hf_mtcompress.compression.pruning import prune
from hf_mtcompress.data.sources import load_sources
from hf_mtcompress.environment import environment_facts
from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.recipe.load import load_recipe
from hf_mtcompress.records import SplitScores
from hf_mtcompress.steps.rows import calibration_batches
from hf_mtcompress.steps.run_context import RunContext, Start, recipe_reader
from hf_mtcompress.steps.scoring import score_folder

RESULT = Path(__file__).parent / "results" / "post_training_pruning.json"
ARMS: dict[str, dict[str, Any]] = {
    "random": {"importance": "random"},
    "magnitude": {"importance": "magnitude"},
    "magnitude, repair": {"importance": "magnitude", "repair": True},
    "activation, repair": {"importance": "activation", "repair": True},
    "first order": {"importance": "first_order"},
    "first order, repair": {"importance": "first_order", "repair": True},
    "fisher": {"importance": "fisher"},
    "fisher, rearranged": {"importance": "fisher", "rearrange": True},
    "fisher, rearranged, repair": {"importance": "fisher", "rearrange": True, "repair": True},
    "fisher max-min, repair": {"importance": "fisher", "combine": "max_min", "repair": True},
}
PEERS = ("taylor", "hessian")


def by_torch_pruning(
    model: MultiTaskModel, batches: Sequence[Mapping[str, Tensor]], kind: str, ratio: float, isomorphic: bool
) -> None:
    """Remove a share of heads and neurons with torch-pruning, as its examples do for transformers."""
    import torch_pruning  # pyright: ignore[reportMissingImports] - the peer

    encoder = model.encoder
    encoder.set_attn_implementation("eager")
    anatomy = find_anatomy(encoder)
    heads, kept = {}, []
    for layer in anatomy.layers:
        linears = {name: part for name, part in layer.module.named_modules() if isinstance(part, torch.nn.Linear)}
        attention = [part for name, part in linears.items() if name.endswith(("query", "key", "value"))]
        heads |= dict.fromkeys(attention, layer.attention.heads)
        # The residual stream keeps its width: what writes into it is left alone.
        kept += [part for name, part in linears.items() if name.endswith("output.dense")]
    kept += [encoder.get_input_embeddings(), *([encoder.pooler] if getattr(encoder, "pooler", None) else [])]
    match kind:
        case "taylor":
            importance = torch_pruning.importance.GroupTaylorImportance()
        case _:
            importance = torch_pruning.importance.GroupHessianImportance()
    example = {key: value[:2] for key, value in batches[0].items() if not key.startswith("labels")}
    pruner = torch_pruning.pruner.BasePruner(
        encoder,
        example,
        importance=importance,
        global_pruning=True,
        isomorphic=isomorphic,
        pruning_ratio=ratio,
        head_pruning_ratio=ratio,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=kept,
        forward_fn=lambda part, inputs: part(**inputs),
        output_transform=lambda output: output.last_hidden_state.sum(),
    )
    model.zero_grad()
    if kind == "taylor":
        for batch in batches:
            model(**batch).loss.backward()
    else:
        # Its own accumulation keeps the last gradient only, so squares of all batches are put in their place.
        squares: dict[Any, Tensor] = {}
        for batch in batches:
            model.zero_grad()
            model(**batch).loss.backward()
            for parameter in encoder.parameters():
                if parameter.grad is not None:
                    squares[parameter] = squares.get(parameter, 0.0) + parameter.grad.square()
        importance._accu_grad = squares
        importance._counter = dict.fromkeys(squares, len(batches))
    pruner.step()
    model.zero_grad()


def layer_parameters(model: MultiTaskModel) -> int:
    """Of the encoder's layers."""
    return sum(
        parameter.numel() for layer in find_anatomy(model.encoder).layers for parameter in layer.module.parameters()
    )


def main() -> int:
    """Run all arms, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--model", type=Path, required=True, help="saved multi-task model of the text suite")
    parser.add_argument("--rows", type=int, default=1024, help="for calibration")
    parser.add_argument("--compute", type=float, default=0.5, help="fraction of multiply-adds to remove")
    parser.add_argument("--arms", nargs="*", choices=(*ARMS, *PEERS), default=[*ARMS, *PEERS])
    options = parser.parse_args()
    logging.set_verbosity_error()
    overrides = [f"tasks.{task}.data.data_dir={options.data / folder}" for task, folder in FOLDERS.items()]
    recipe = load_recipe(RECIPE, [*overrides, f"encoder.path={options.model}"])
    sources = load_sources(recipe.tasks, recipe.seed)
    context = RunContext(recipe, options.model.parent, sources, recipe_reader(recipe))

    def load() -> MultiTaskModel:
        return context.load(options.model.name).eval()

    def score(model: MultiTaskModel) -> SplitScores:
        with tempfile.TemporaryDirectory() as scratch:
            model.save_pretrained(scratch)
            context.reader.save(scratch)
            return score_folder(context, Path(scratch), "test")

    batches = calibration_batches(Start(load(), context.reader), context, options.rows)
    found: dict[str, Any] = {}

    def note(name: str, model: MultiTaskModel, seconds: float) -> None:
        scores = score(model)
        found[name] = {
            "average": scores.average,
            "scores": {task: row.metrics[str(sources.tasks[task].metric)] for task, row in scores.tasks.items()},
            "layer_parameters": layer_parameters(model),
            "seconds": seconds,
        }
        print(
            f"{name}: {scores.average:.4f}, {found[name]['layer_parameters']:,} parameters, {seconds:.0f} s",
            file=sys.stderr,
        )

    def timed(name: str, work: Callable[[MultiTaskModel], Any]) -> None:
        model = load()
        begin = time.monotonic()
        work(model)
        note(name, model, time.monotonic() - begin)

    note("uncut", load(), 0.0)
    for name in (name for name in options.arms if name in ARMS):
        settings = ARMS[name]
        timed(name, lambda model: prune(model, batches, compute=options.compute, progress=False, **settings))  # noqa: B023 - called at once
    ours = [row["layer_parameters"] for name, row in found.items() if name != "uncut"]
    if ours:
        share = 1.0 - min(ours) / found["uncut"]["layer_parameters"]
        for kind in (name for name in options.arms if name in PEERS):
            for isomorphic in (False, True):
                label = f"torch-pruning {kind}{', isomorphic' if isomorphic else ''}"
                timed(label, lambda model: by_torch_pruning(model, batches, kind, share, isomorphic))  # noqa: B023 - called at once
    result = {
        "settings": {"rows": options.rows, "compute": options.compute, "seed": recipe.seed},
        "environment": environment_facts(),
        "arms": found,
    }
    write_text(RESULT, json.dumps(result, indent=2) + "\n")
    print("| arm | average | kept | parameters of layers | seconds |\n| --- | ---: | ---: | ---: | ---: |")
    for name, row in sorted(found.items(), key=lambda item: -item[1]["average"]):
        kept = 100 * row["average"] / found["uncut"]["average"]
        print(f"| {name} | {row['average']:.4f} | {kept:.1f} % | {row['layer_parameters']:,} | {row['seconds']:.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
