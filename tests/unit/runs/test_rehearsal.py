"""What would stop a run is told before anything is trained: by `validate`, `plan` and `run` alike."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hf_mtcompress.errors import RecipeError
from hf_mtcompress.recipe.load import load_recipe
from hf_mtcompress.runs.commands import plan, validate
from hf_mtcompress.runs.run import run
from tests.tiny_recipe import write_tiny_recipe

Edit = Callable[[dict[str, Any]], None]


def edited(folder: Path, edit: Edit) -> Path:
    path = write_tiny_recipe(folder)
    recipe = yaml.safe_load(path.read_text())
    recipe["steps"] = recipe["steps"][:2]
    edit(recipe)
    path.write_text(yaml.safe_dump(recipe))
    return path


def argument(**values: Any) -> Edit:
    return lambda recipe: recipe["training"]["arguments"].update(values)


def step(number: int, **values: Any) -> Edit:
    return lambda recipe: recipe["steps"][number].update(values)


def cut_twice(recipe: dict[str, Any]) -> None:
    recipe["reference"] = "teacher"
    recipe["steps"][1:] = [
        {"kind": "prune", "name": "less", "layers": 2, "recover": {"kind": "finetune", "epochs": 1}},
        {"kind": "prune", "name": "least", "layers": 2},
    ]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda recipe: recipe["encoder"].update(max_length=4000),
            "encoder.max_length of 4000 tokens: expected",
        ),
        (
            step(1, student={"layers": 30}),
            "steps.student.student.layers: expected at most the 3 layers of 'teacher'",
        ),
        (step(1, student={"layers": [0, 30]}), r"of the 3 layers of 'teacher', counted from 0, found \[0, 30\]"),
        (cut_twice, "steps.least.layers: expected at most 0 layers to remove from the 1 of 'less', found 2"),
        (argument(early_stopping_patience=2), "unexpected keyword argument 'early_stopping_patience'"),
        (
            argument(report_to="wandb"),
            "expected settings that a training can begin with.*requires wandb",
        ),
        (argument(seed=-1), "Seed must be between 0 and"),
        (argument(lr_scheduler_type="x"), "x is not a valid SchedulerType"),
        (argument(lr_scheduler_kwargs={"x": 1}), "unexpected keyword argument 'x'"),
        (argument(max_grad_norm="a"), "training.arguments.max_grad_norm: expected float, found 'a'"),
        (argument(push_to_hub=True), "training.arguments.push_to_hub: expected no such key.*hf-mtcompress push"),
        (argument(output_dir="elsewhere"), "training.arguments.output_dir: expected no such key.*--output"),
        (argument(resume_from_checkpoint=True), "a killed run goes on by itself"),
        (argument(dataloader_num_workers=-1), "num_workers option should be non-negative"),
        (argument(metric_for_best_model="nope"), "metric_for_best_model"),
        (lambda recipe: recipe["tasks"]["mood"]["data"].update(encoding="nope"), "unknown encoding: nope"),
        (lambda recipe: recipe["tasks"]["mood"]["data"].update(features="x"), "found a problem"),
        (lambda recipe: recipe["tasks"]["mood"]["data"].update(version={}), "expected .* that .*'json' takes"),
        (lambda recipe: recipe["tasks"]["mood"]["data"].update(data_files="s3://b/x"), "Install s3fs"),
    ],
)
def test_what_cannot_end_well_does_not_begin(edit: Edit, message: str, tmp_path: Path) -> None:
    """After a training of hours the same words would come too late."""
    recipe = edited(tmp_path, edit)
    for verb in (validate, plan, lambda found: run(found, tmp_path / "run")):
        with pytest.raises(RecipeError, match=message):
            verb(load_recipe(recipe))
    assert not (tmp_path / "run").exists()


def test_defaults_that_are_written_out_are_no_mistake(tmp_path: Path) -> None:
    validate(load_recipe(edited(tmp_path, argument(push_to_hub=False, resume_from_checkpoint=None))))


def test_labels_at_the_end_of_a_split_are_found(tmp_path: Path) -> None:
    """Two rows stand for a source: they must not be two that happen to have no label."""
    recipe = edited(tmp_path, argument(dataloader_drop_last=True))
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) | ({"label": None, "intensity": None} if n < 40 else {}) for n, line in enumerate(lines)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    validate(load_recipe(recipe))


def test_a_rehearsal_changes_no_draw(tmp_path: Path) -> None:
    recipe = load_recipe(edited(tmp_path, lambda recipe: None))
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    validate(recipe)
    assert torch.equal(torch.rand(3), expected)
