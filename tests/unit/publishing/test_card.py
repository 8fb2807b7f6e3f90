"""The card says what the record says, whole, and nothing else."""

import ast
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_mtcompress.errors import PublishingError
from hf_mtcompress.losses.interference import GradientLog, interference_report
from hf_mtcompress.publishing.card import is_untouched, render_card
from hf_mtcompress.publishing.figures import numbers_in
from hf_mtcompress.publishing.lint import lint_card
from hf_mtcompress.publishing.metadata import card_metadata
from hf_mtcompress.publishing.portable import local_paths_in
from hf_mtcompress.records import RunRecord, run_from_dict, to_json
from tests.unit.publishing.factory import RECIPE, layers, make_record

GOLDEN = Path(__file__).parent / "golden" / "card.md"


def test_golden_card():
    """A changed template changes every card that is made from now on: look at the difference, then write it anew.

    python -c "from tests.unit.publishing.test_card import *; GOLDEN.write_text(golden())"
    """
    assert golden() == GOLDEN.read_text(encoding="utf-8")


def golden() -> str:
    return render_card(make_record(), RECIPE, "example/artificial")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        yield len(value)
        for item in value.values():
            yield from _numbers(item)
    elif isinstance(value, list):
        yield len(value)
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def test_every_number_is_the_record_s():
    """The card's promise, checked from the JSON alone and by other means than those that printed it."""
    data = json.loads(to_json(make_record()))
    numbers = set(_numbers(data))
    weights = [artefact["size"]["weights_bytes"] for step in data["steps"] for artefact in step["artefacts"]]
    values = {
        form(factor)
        for number in numbers
        for factor in (number, 100 * number, number / 1e6, number / 60, 1 / number if number else 0.0)
        for form in (
            "{:.0f}".format,
            "{:,.0f}".format,
            "{:.1f}".format,
            "{:.2f}".format,
            "{:.3f}".format,
            "{:.6g}".format,
        )
    }
    values |= {f"{one / other:.2f}" for one in weights for other in weights}
    strings = set(re.findall(r"\d+(?:[.,]\d+)*", " ".join(re.findall(r'"(?:[^"\\]|\\.)*"', json.dumps(data)))))
    assert [
        number for number in numbers_in(golden()) if number not in values and number.lstrip("-") not in strings
    ] == []


@pytest.mark.parametrize("repo_id", [None, "example/artificial"])
@pytest.mark.parametrize("recipe", [None, RECIPE])
def test_card_passes_its_own_lint(repo_id: str | None, recipe: str | None):
    """A card that the linter refuses can never be pushed."""
    record = make_record()
    assert lint_card(render_card(record, recipe, repo_id), None, record) == []


def no_scores(record: RunRecord) -> None:
    for step in record.steps:
        for artefact in step.artefacts:
            artefact.scores = {}
    record.comparisons = []


def no_latency(record: RunRecord) -> None:
    for step in record.steps:
        for artefact in step.artefacts:
            artefact.latency = []
    record.benchmark = None


def no_sizes(record: RunRecord) -> None:
    for step in record.steps:
        for artefact in step.artefacts:
            artefact.size = None


def no_structure(record: RunRecord) -> None:
    for step in record.steps:
        step.structure = step.training = None
        step.settings = {}


def only_reference(record: RunRecord) -> None:
    record.steps = record.steps[:1]
    record.comparisons = []
    record.budget = None


def only_validation(record: RunRecord) -> None:
    for step in record.steps:
        for artefact in step.artefacts:
            artefact.scores.pop("test", None)
    for comparison in record.comparisons:
        comparison.split = "validation"


def bare_facts(record: RunRecord) -> None:
    record.environment = {}
    record.encoder = {"path_or_id": "somewhere"}
    record.publish = record.budget = None
    for task in record.tasks.values():
        task.labels = task.dataset_id = task.dataset_revision = task.license = None
        task.rows, task.baseline = {}, {}


def undefined_retention(record: RunRecord) -> None:
    comparison = record.comparisons[-1]
    comparison.undefined = {"mood": "the reference (0.75) is not above the baseline (0.8)"}
    comparison.tasks["mood"] |= {"retention": None, "retention_above_chance": None}
    comparison.retention = comparison.worst_task_retention = comparison.worst_task = None


def not_a_number(record: RunRecord) -> None:
    scores = record.steps[-1].artefacts[0].scores["test"]
    scores.tasks["mood"].metrics["pearson"] = float("nan")
    scores.average = float("nan")


def slower(record: RunRecord) -> None:
    for row in record.steps[-1].artefacts[0].latency:
        row.ratio_minimum = 1.25


def awkward_labels(record: RunRecord) -> None:
    record.tasks["intent"].labels = ["a|b", "<script>", "no. 17", "[x](y)", "`tick`", "line\nbreak"]


def two_encoders(record: RunRecord) -> None:
    record.steps[-1].structure = {**layers(2, [4], [64]), "image": {"layers": [{"heads": 3, "feed_forward": 96}]}}


def local_paths(record: RunRecord) -> None:
    record.steps[2].settings["teacher"] = "/home/someone/teachers/large"
    record.encoder["path_or_id"] = "/mnt/disk/encoders/base"


def no_interference(record: RunRecord) -> None:
    record.steps[0].interference = None


def tasks_that_never_met(record: RunRecord) -> None:
    log = GradientLog(["intent", "mood", "slots"])
    for step in range(30):
        log.add(step, [log.tasks[step % 3]], [[1.0 + step]])
    record.steps[0].interference = interference_report(log)
    record.steps[2].interference = interference_report(GradientLog(["intent", "mood"]))


def many_tasks(record: RunRecord) -> None:
    record.steps[2].interference = interference_of_many(15)


def interference_of_many(count: int) -> dict[str, Any]:
    names = [f"task_number_{number}" for number in range(count)]
    log = GradientLog(names)
    for step in range(12):
        gramian = [[math.cos(0.3 * (i - j) * (1 + step / 9)) for j in range(count)] for i in range(count)]
        log.add(step, names, gramian, dict.fromkeys(names[:2], 0.9875))
    return interference_report(log, "the encoder | all of it")


VARIANTS = [
    no_interference,
    tasks_that_never_met,
    many_tasks,
    no_scores,
    no_latency,
    no_sizes,
    no_structure,
    only_reference,
    only_validation,
    bare_facts,
    undefined_retention,
    not_a_number,
    slower,
    awkward_labels,
    two_encoders,
    local_paths,
]


@pytest.mark.parametrize("change", VARIANTS)
@pytest.mark.parametrize("repo_id", [None, "example/artificial"])
def test_card_of_an_unusual_record(change: Callable[[RunRecord], None], repo_id: str | None):
    """A card must not fail, guess or show None where something was not measured: it is written at the end of a run."""
    record = make_record()
    change(record)
    text = render_card(record, RECIPE, repo_id)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"\bNone\b|\bnan\b|\binf\b|Undefined|\{\{|\}\}", prose)
    assert "not measured times" not in prose
    problems = lint_card(text, None, record)
    assert problems == (
        ["expected 'license' in the front matter, found none; set publish.license in the recipe"]
        if change is bare_facts
        else []
    )
    for table in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def test_unmeasured_is_left_out():
    """A claim without a measurement is what this card exists to avoid."""
    record = make_record()
    for change in (no_scores, no_latency, no_sizes):
        change(record)
    text = render_card(record)
    for claim in ("times as fast", "of the reference's", "on disk"):
        assert claim not in text.partition("## At a glance")[0]
    assert "Latency: not measured." in text
    assert "not scored" in text


def test_interference_is_left_out_where_it_was_not_logged():
    """An empty section reads as if there were no conflict."""
    record = make_record()
    assert "## How the tasks get along" in render_card(record)
    assert "assets/interference.png" not in render_card(record, pictures=["comparison.png"])
    record.steps[0].interference = None
    assert "get along" not in render_card(record)
    assert "interference" not in render_card(record)


def test_interference_of_many_tasks_is_a_list_of_pairs():
    """A matrix of 15 columns cannot be read; the pairs that matter can."""
    record = make_record()
    many_tasks(record)
    record.steps[0].interference = None
    section = render_card(record).partition("## How the tasks get along")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `task_number_\d+` \| `task_number_\d+` \| .+ \|$", section, re.MULTILINE)
    assert len(rows) == 20
    assert "the encoder \\| all of it" in section


def test_no_saved_step():
    """Half a record must not become a card."""
    record = make_record()
    record.steps = []
    with pytest.raises(PublishingError, match="at least one saved step"):
        render_card(record)


@pytest.mark.parametrize("repo_id", [None, "example/artificial"])
def test_snippets_compile(repo_id: str | None):
    """A snippet is copied before it is read."""
    snippets = re.findall(
        r"^```python\n(.*?)^```$", render_card(make_record(), None, repo_id), re.DOTALL | re.MULTILINE
    )
    assert len(snippets) == 3
    for snippet in snippets:
        names = {node.id for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Name)}
        bound = {
            alias.asname or alias.name
            for node in ast.walk(ast.parse(snippet))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assigned = set(re.findall(r"^(\w+) = ", snippet, re.MULTILINE))
        assert names <= bound | assigned | {"print"}
        # These two lines only work in the package's presence.
        assert ("hf_mtcompress" in snippet) == ("vanilla" not in snippet)


def test_pruned_vanilla_needs_the_package():
    """Plain transformers cannot build layers of different widths; a card that says so sends people into an error."""
    record = make_record()
    record.steps[3].source = "pruned"
    record.steps[3].structure = record.steps[4].structure
    record.steps[3], record.steps[4] = record.steps[4], record.steps[3]
    text = render_card(record, None, "example/artificial")
    assert "import hf_mtcompress  # lets transformers build the pruned shapes" in text
    assert "plain transformers, one folder per task" not in text


@pytest.mark.parametrize("form", ["bitsandbytes", "torchao"])
def test_few_bits_in_torch_say_what_they_need(form: Literal["bitsandbytes", "torchao"]):
    """Without the package the folder does not open, and the error is another library's."""
    record = make_record()
    record.steps[-1].artefacts[0].form = form
    text = render_card(record, None, "example/artificial")
    assert f"All tasks at once, with {form} (step `" in text
    assert f"  # needs {form}\n" in text
    assert f"after `import hf_mtcompress`, with {form}" in text
    command = next(line for line in text.splitlines() if line.startswith("pip install "))
    assert form in command


def test_image_snippets():
    """A tokenizer for pictures."""
    record = make_record()
    for task in record.tasks.values():
        task.kind = "image-classification"
    text = render_card(record, None, "example/artificial")
    assert "AutoImageProcessor" in text
    assert "AutoTokenizer" not in text
    assert 'pipeline("image-classification", model=model, image_processor=image_processor)' in text


def test_front_matter_is_what_the_hub_reads():
    """The Hub drops a model-index that it cannot read, and merges tasks that look alike, without a word."""
    card = ModelCard(golden())
    assert card.data.to_dict() == card_metadata(make_record(), "example/artificial")
    results = card.data.to_dict()["model-index"][0]["results"]
    assert [result["task"]["name"] for result in results] == ["intent", "mood", "slots"]
    assert results[0]["metrics"][0] == {"type": "accuracy", "value": 0.96, "name": "accuracy"}


def test_base_model_is_not_guessed():
    """A wrong base model puts the card under somebody else's model."""
    record = make_record()
    assert card_metadata(record)["base_model_relation"] == "finetune"
    record.steps[2].settings["student"] = {"path": "another-encoder"}
    assert "base_model" not in card_metadata(record)
    record = make_record()
    record.encoder["hub_id"] = None
    assert not {"base_model", "base_model_relation"} & set(card_metadata(record))


def test_quantized_base_model():
    """`quantized` promises the same model in fewer bits, which holds only when nothing was trained."""
    record = make_record()
    record.steps = [dataclasses.replace(record.steps[-1], source=None)]
    assert card_metadata(record)["base_model_relation"] == "quantized"


def test_data_without_a_hub_name_stay_out_of_the_front_matter():
    """The Hub refuses a card whose data sets are no ids."""
    assert card_metadata(make_record())["datasets"] == ["example/artificial-data"]
    assert "Invented ratings" in golden()


def test_local_paths_stay_at_home():
    """The settings of a step may name a teacher by its folder."""
    record = make_record()
    local_paths(record)
    assert local_paths_in(render_card(record, RECIPE)) == []


def test_own_words_are_kept_and_free():
    """Authors write numbers that no record holds; they must neither be lost nor block the push."""
    record = make_record()
    text = render_card(record, own_words="Used by 3,000 people.")
    assert "Used by 3,000 people." in text
    assert lint_card(text, None, record) == []


def test_untouched_card_is_known():
    """An edited card that is taken for ours is written over; ours that is taken for edited keeps the wrong snippets."""
    text = golden()
    assert is_untouched(text)
    assert is_untouched(text.replace("<!-- Text between", "I wrote this. <!-- Text between"))
    assert not is_untouched(text.replace("## Limitations", "## Limits"))
    assert not is_untouched("# another card\n")


def test_card_after_json_is_the_same():
    """The card is rendered again from record.json by another process."""
    record = make_record()
    again = run_from_dict(json.loads(to_json(record)))
    assert render_card(again, RECIPE) == render_card(record, RECIPE)


def test_recipe_in_the_card_is_yaml():
    """A recipe that does not parse reproduces nothing."""
    found = re.search(r"^```yaml\n(.*?)^```$", golden(), re.DOTALL | re.MULTILINE)
    assert found is not None
    assert yaml.safe_load(found.group(1))["encoder"] == {
        "path": "example/artificial-encoder",
        "hub_id": "example/artificial-encoder",
        "max_length": 64,
    }
