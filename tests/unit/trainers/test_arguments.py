"""Values of training arguments that would train something else than was meant are refused, all at once."""

from pathlib import Path
from typing import Any

import pytest

from hf_mtcompress.errors import TrainingError
from hf_mtcompress.trainers.arguments import MultiTaskTrainingArguments, check_arguments

TASKS = ["mood", "tags"]


def arguments(folder: Path, **settings: Any) -> MultiTaskTrainingArguments:
    return MultiTaskTrainingArguments(str(folder), report_to="none", use_cpu=True, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batches": "both"}, "batches: expected one of one_source, mixed, found 'both'"),
        ({"normalize_losses": "chanc"}, "normalize_losses: expected one of chance, none, found 'chanc'"),
        ({"mixing": "propotional"}, "mixing: expected one of proportional, .*, found 'propotional'"),
        ({"gradient_combination": "upgard"}, "gradient_combination: expected one of mean, .*, found 'upgard'"),
        ({"surgery_scope": "layers"}, "surgery_scope: expected one of features, last_block, full, found 'layers'"),
        ({"measure_on": "test"}, "measure_on: expected one of train, validation, found 'test'"),
        ({"mixing_cap": 0}, "mixing_cap: expected a whole number of at least 1, found 0"),
        ({"task_patience": 0}, "task_patience: expected a whole number of at least 1, found 0"),
        ({"measure_interference": -1}, "measure_interference: expected a whole number of at least 1, found -1"),
        ({"mixing_temperature": 0.0}, r"mixing_temperature: expected a number above 0, found 0\.0"),
        ({"mixing_targets": {"mood": 0}}, "mixing_targets: expected numbers above 0, found {'mood': 0}"),
        ({"mixing_targets": {"mod": 0.9}}, r"mixing_targets: expected task names among \['mood', 'tags'\], found"),
        (
            {"mixing_weights": {"mood": -1, "tags": 1}},
            "mixing_weights: expected numbers at least 0, found {'mood': -1}",
        ),
        (
            {"mixing_weights": {"mood": float("nan")}},
            "mixing_weights: expected numbers at least 0, found {'mood': nan}",
        ),
        ({"mixing": "weights"}, "mixing_weights: expected weights by task, not all 0, .* found None"),
        ({"mixing": "weights", "mixing_weights": {"mood": 0, "tags": 0}}, "not all 0, with mixing='weights'"),
    ],
)
def test_a_value_that_means_nothing_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        check_arguments(arguments(tmp_path, **settings), TASKS)


def test_all_of_them_at_once(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        check_arguments(arguments(tmp_path, batches="both", mixing_cap=0, mixing_temperature=-1.0), TASKS)
    assert [part.split(":")[0] for part in str(caught.value).split("; ") if ": expected" in part] == [
        "batches",
        "mixing_cap",
        "mixing_temperature",
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mixing": "weights", "mixing_weights": {"mood": 0, "tags": 0.5}},
        {"mixing": "score_gap", "mixing_targets": {"mood": 0.9}},
        {"mixing_cap": 1, "task_patience": 1, "measure_interference": 1, "gradient_combination": "mean"},
    ],
)
def test_sensible_values_pass(tmp_path: Path, settings: dict[str, Any]) -> None:
    check_arguments(arguments(tmp_path, **settings), TASKS)
