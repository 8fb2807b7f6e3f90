"""Adapters in recipes: what is read, and what is said before training when steps cannot go together."""

from typing import Any

import pytest

from hf_mtcompress.errors import RecipeError
from hf_mtcompress.recipe import AdapterConfig, FinetuneStep
from hf_mtcompress.recipe.load import dump_recipe, parse_recipe
from hf_mtcompress.recipe.text import read_yaml

TASK: dict[str, Any] = {
    "kind": "sequence-classification",
    "data": {"path": "json", "data_files": {"train": "train.jsonl"}},
    "text": "text",
    "label": "label",
}
FIRST = {"kind": "finetune", "name": "first"}
ADAPTED = {"kind": "finetune", "name": "adapted", "adapters": {}}


def recipe(*steps: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return {
        "name": "small",
        "encoder": {"path": "org/encoder"},
        "tasks": {"mood": TASK, "other": {**TASK, "data": "mood"}},
        "steps": list(steps),
        **sections,
    }


def test_settings_are_read_and_written_back() -> None:
    raw = recipe(FIRST, {**ADAPTED, "adapters": {"rank": 4, "alpha": 8, "targets": "all"}})
    built = parse_recipe(raw)
    assert built.steps[1] == FinetuneStep(name="adapted", adapters=AdapterConfig(rank=4, alpha=8.0, targets="all"))
    assert parse_recipe(read_yaml(dump_recipe(built))) == built
    defaults = parse_recipe(recipe(ADAPTED))
    assert parse_recipe(read_yaml(dump_recipe(defaults))) == defaults
    assert defaults.steps[0] == FinetuneStep(name="adapted", adapters=AdapterConfig())


ADAPTED_TRAINING = {"kind": "finetune", "adapters": {}}


@pytest.mark.parametrize(
    "steps",
    [
        (ADAPTED, {"kind": "finetune", "name": "longer"}, {"kind": "export", "formats": ["vanilla", "onnx"]}),
        (ADAPTED, {"kind": "quantize", "backend": "bitsandbytes", "bits": 4}),
        (ADAPTED, {"kind": "quantize", "backend": "onnxruntime"}),
        (FIRST, {"kind": "prune", "name": "pruned", "heads": 0.5}, ADAPTED),
        (FIRST, ADAPTED, {"kind": "prune", "name": "pruned", "from": "first", "heads": 0.5}),
        (FIRST, ADAPTED, {"kind": "distill", "teacher": "first", "criteria": ["logits"]}),
        (ADAPTED, {"kind": "distill", "teacher": "adapted", "student": {"path": "org/s"}, "criteria": ["logits"]}),
    ],
)
def test_steps_that_go_together(steps: tuple[dict[str, Any], ...]) -> None:
    parse_recipe(recipe(*steps))


@pytest.mark.parametrize(
    ("steps", "sections", "message"),
    [
        ((ADAPTED, {"kind": "prune", "name": "p", "heads": 0.5}), {}, "steps.p: prunes models without adapters"),
        (
            (ADAPTED, {"kind": "finetune", "name": "f"}, {"kind": "prune", "name": "p", "heads": 0.5}),
            {},
            "steps.p: prunes models without adapters, found those of 'f'",
        ),
        (
            (ADAPTED, {"kind": "distill", "name": "d", "teacher": "adapted", "student": {"layers": 1}}),
            {},
            "steps.d.student.layers: takes layers of models without adapters",
        ),
        (
            (FIRST, ADAPTED, {"kind": "distill", "name": "d", "teacher": "first"}),
            {},
            r"steps.d.criteria: expected \[logits\] with adapters",
        ),
        (
            (
                FIRST,
                ADAPTED,
                {
                    "kind": "prune",
                    "name": "p",
                    "from": "first",
                    "heads": 0.5,
                    "recover": {"kind": "distill", "teacher": "adapted"},
                },
            ),
            {},
            r"steps.p.recover.criteria: expected \[logits\] with adapters",
        ),
        ((ADAPTED, {**ADAPTED, "name": "again"}), {}, "steps.again.adapters: .* has adapters already"),
        (
            (FIRST, {"kind": "quantize", "name": "q", "backend": "onnxruntime", "recover": ADAPTED_TRAINING}),
            {},
            "steps.q.recover.adapters: recovery trains the cut model itself",
        ),
        (
            (
                ADAPTED,
                {"kind": "quantize", "name": "q", "backend": "onnxruntime", "recover": {"kind": "finetune"}},
            ),
            {},
            "steps.q.recover: trains models without adapters, found those of 'adapted'",
        ),
        (
            (FIRST, {"kind": "prune", "name": "p", "heads": 0.5, "recover": {"kind": "finetune", "adapters": {}}}),
            {},
            "steps.p.recover.adapters: recovery trains the cut model itself",
        ),
        ((ADAPTED,), {"branches": {"side": ["mood"]}}, "one whole encoder, found branches side"),
        ((ADAPTED,), {"tasks": {"mood": {**TASK, "layer": 1}}}, "found tasks with a layer: mood"),
        ((ADAPTED,), {"fusion": {"combination": "upgrad"}}, "expected no fusion.combination with adapters"),
        ((ADAPTED,), {"fusion": {"measure_every": 5}}, "expected no fusion.measure_every with adapters"),
        ((ADAPTED,), {"fusion": {"kind": "gradient_norm"}}, "expected no fusion.kind: gradient_norm with adapters"),
        (({**ADAPTED, "adapters": {"rank": 0}},), {}, "adapters.rank: expected a whole number of at least 1"),
        (({**ADAPTED, "adapters": 8},), {}, "adapters: expected a section, found 8"),
    ],
)
def test_steps_that_cannot_go_together_are_refused(
    steps: tuple[dict[str, Any], ...], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        parse_recipe(recipe(*steps, **sections))
    assert len(str(caught.value).splitlines()) <= 2, "one message for one mistake"
