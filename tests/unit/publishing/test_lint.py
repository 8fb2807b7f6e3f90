"""Every mistake the linter knows is found, and found alone."""

import socket
from pathlib import Path

import pytest

from hf_mtcompress.publishing.card import render_card
from hf_mtcompress.publishing.lint import lint_card
from tests.unit.publishing.factory import RECIPE, make_record, write_run


def card() -> str:
    return render_card(make_record(), RECIPE, "example/artificial")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("license: apache-2.0\n", "", "expected 'license' in the front matter"),
        ("license: apache-2.0\n", "license: apache-3.0\n", "expected a known license, found 'apache-3.0'"),
        ("pipeline_tag: text-classification\n", "pipeline_tag: text-sorting\n", "expected a known pipeline_tag"),
        ("base_model_relation: finetune\n", "base_model_relation: pruned\n", "expected a known base_model_relation"),
        ("library_name: hf_mtcompress\n", "", "expected 'library_name'"),
        ("value: 0.96\n", "value: .nan\n", "expected a finite number for accuracy in model-index, found nan"),
        ("value: 0.96\n", "value: high\n", "expected a finite number for accuracy in model-index, found 'high'"),
        ("value: 0.96\n", "value: 0.98\n", "expected accuracy in model-index as it stands in the record, found 0.98"),
        (
            "  results:\n  - task:\n      type: text-classification\n",
            "  results:\n  - task:\n      kind: x\n",
            "huggingface_hub",
        ),
        ("tags:\n", "tags: [\n", "expected front matter in YAML"),
        ("---\nbase_model", "base_model", "expected front matter between two lines"),
        ("97.1 %", "98.9 %", "expected every number to stand in the record, found 98.9"),
        ("## Limitations\n", "## Limitations\n\n- Only 17 people tried it.\n", "found 17"),
        (
            "(record.json)",
            "(/data/someone/record.json)",
            "expected no path of a machine, found '/data/someone/record.json'",
        ),
        ("(record.json)", "(C:\\Users\\x\\record.json)", "expected no path of a machine"),
        ("## Limitations\n", "## Limitations\n\nhf_" + "Ab1" * 10 + "\n", "what looks like a Hugging Face token"),
        ("## Limitations\n", "## Limitations\n\nRun on builder-seven.\n", "expected no host name"),
    ],
)
def test_mistakes_are_found(old: str, new: str, said: str, monkeypatch: pytest.MonkeyPatch):
    """A mistake that is not found here is found by the Hub, or by the readers."""
    monkeypatch.setattr(socket, "gethostname", lambda: "builder-seven.example.org")
    text = card()
    assert old in text
    problems = lint_card(text.replace(old, new, 1), None, make_record())
    assert any(said in problem for problem in problems), problems


def test_links_must_lead_somewhere(tmp_path: Path):
    """A picture that was never written shows as a broken image on the first screen."""
    record = write_run(tmp_path)
    assert lint_card(card(), tmp_path, record) == []
    (tmp_path / "assets" / "comparison.png").unlink()
    (problem,) = lint_card(card(), tmp_path, record)
    assert "'assets/comparison.png'" in problem


def test_stale_card_is_found():
    """The run was repeated and the card was not: every number looks right and is yesterday's."""
    record = make_record()
    row = record.comparisons[-1]
    row.retention = 0.9377
    problems = lint_card(card(), None, record)
    assert any("found 97.1" in problem for problem in problems)


@pytest.mark.parametrize(
    "text",
    [
        "see https://example.com/data/x and http://x.org/home/y",
        "either/or, and/or, n/a",
        "a ~ b, ~5",
        "hf_mtcompress",
        "data/snips",
    ],
)
def test_no_false_alarms(text: str):
    """A linter that cries wolf is switched off."""
    assert lint_card(card() + text) == []
