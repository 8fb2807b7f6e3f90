"""Whatever a recipe holds: it is accepted, or refused in one clear message, at once; and an accepted one runs."""

import random
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_mtcompress.errors import RecipeError
from hf_mtcompress.recipe import Recipe
from hf_mtcompress.recipe.load import load_recipe
from hf_mtcompress.runs.commands import plan
from hf_mtcompress.runs.run import run
from tests.mutation import mutated, overrides
from tests.tiny_recipe import write_tiny_recipe

SECONDS = 5
MEGABYTES = 500
STEPS = 60
"""Optimizer steps of an accepted recipe that is still run."""


def write_base(folder: Path) -> tuple[Path, dict[str, Any]]:
    """A recipe with most sections, quick to run; and what it holds."""
    path = write_tiny_recipe(folder)
    recipe = yaml.safe_load(path.read_text())
    recipe["training"] |= {"epochs": 1}
    recipe |= {
        "reference": "teacher",
        "mixing": {"strategy": "temperature", "temperature": 2.0},
        "fusion": {"kind": "uncertainty"},
        "budget": {"size_mb": 5, "retention": 0.9},
        "publish": {"repo_id": "a/b", "private": True, "license": "mit"},
        "steps": [
            {"kind": "finetune", "name": "teacher"},
            {
                "kind": "distill",
                "name": "student",
                "teacher": "teacher",
                "student": {"layers": 2},
                "criteria": ["logits", {"kind": "hidden", "weight": 0.5}],
            },
            {"kind": "prune", "name": "pruned", "heads": 0.25, "feed_forward": 0.4, "multiple_of": 16, "rows": 16},
            {"kind": "quantize", "name": "int8", "backend": "onnxruntime", "bits": 8},
        ],
    }
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path, recipe


def accepted(path: Path, base: dict[str, Any], generator: random.Random, into: Path) -> Recipe | None:
    """A recipe with mistakes, if it is accepted all the same; refusals are quick, small and in our words."""
    arguments: list[str] = []
    if generator.random() < 0.2:
        into.write_bytes(path.read_bytes())
        arguments = overrides(base, generator)
    else:
        into.write_bytes(mutated(base, generator).encode("utf-8", "surrogatepass"))
    begin, memory = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        return load_recipe(into, arguments)
    except RecipeError:
        return None
    finally:
        assert time.perf_counter() - begin < SECONDS
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024 < MEGABYTES


def test_mistakes_of_all_kinds_are_refused_in_our_words(tmp_path: Path) -> None:
    path, base = write_base(tmp_path)
    generator = random.Random(0)
    found = [accepted(path, base, generator, tmp_path / "mutated.yaml") for _ in range(400)]
    assert 0 < sum(recipe is not None for recipe in found) < 200


def quick(recipe: Recipe, steps: list[dict[str, Any]]) -> bool:
    """Whether a recipe asks for no more than a test has time for."""
    trained = sum(step.get("optimizer_steps", 0) for step in steps)
    benchmark = recipe.benchmark
    return (
        trained <= STEPS and benchmark.repetitions <= 20 and benchmark.warmup <= 20 and len(benchmark.batch_sizes) < 4
    )


@pytest.mark.slow
def test_every_tenth_accepted_recipe_runs(tmp_path: Path) -> None:
    """10,000 recipes; what `plan` lets pass has to come to its end."""
    path, base = write_base(tmp_path)
    generator = random.Random(1)
    number = ran = 0
    for _ in range(10_000):
        recipe = accepted(path, base, generator, tmp_path / "mutated.yaml")
        if recipe is None:
            continue
        number += 1
        if number % 10:
            continue
        try:
            planned = plan(recipe)
        except RecipeError:
            continue
        if quick(recipe, planned["steps"]):
            text = (tmp_path / "mutated.yaml").read_text()
            try:
                run(recipe, tmp_path / f"run{ran}")
            except Exception as error:
                raise AssertionError(f"accepted, and did not end well:\n{text}") from error
            ran += 1
    assert ran > 20
