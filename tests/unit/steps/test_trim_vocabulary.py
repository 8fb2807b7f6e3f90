"""The step trim_vocabulary of a recipe, and the steps after it, which read the tokenizer that it saved."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer, BertTokenizer

from hf_mtcompress.artifacts import CARD
from hf_mtcompress.cli import main
from hf_mtcompress.data.sources import load_sources
from hf_mtcompress.formats.predictor import load_predictor
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.publishing.lint import lint_card
from hf_mtcompress.publishing.report import report_rows, report_table
from hf_mtcompress.recipe.load import load_recipe
from hf_mtcompress.records import RunRecord
from hf_mtcompress.runs.results import load_record
from hf_mtcompress.runs.run import do_step, prepare_output, run
from hf_mtcompress.steps.run_context import RunContext, recipe_reader
from tests.tiny import tiny_text_rows, tiny_tokenizer
from tests.tiny_recipe import write_tiny_recipe

TEACHER = {"kind": "finetune", "name": "teacher", "epochs": 1}
TRIMMED = {"kind": "trim_vocabulary", "name": "trimmed"}
SHORT = {"max_steps": 2}


def steps_done(path: Path) -> dict[str, Any]:
    """Do the steps of a recipe, without measuring."""
    recipe = load_recipe(path)
    context = RunContext(recipe, path.parent / "run", load_sources(recipe.tasks, recipe.seed), recipe_reader(recipe))
    prepare_output(context.output)
    done: dict[str, Any] = {}
    for step in recipe.steps:
        done[str(step.name)] = do_step(step, done, context)
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunRecord]:
    """A whole run: every step after the cut starts from it, and the teacher reads with the whole vocabulary."""
    folder = tmp_path_factory.mktemp("vocabulary")
    steps = [
        TEACHER,
        TRIMMED,
        {"kind": "distill", "name": "student", "teacher": "teacher", "from": "trimmed", **SHORT},
        {
            "kind": "prune",
            "name": "pruned",
            "heads": 0.25,
            "rows": 16,
            "recover": {"kind": "distill", "teacher": "teacher", "criteria": ["logits"], **SHORT},
        },
        {"kind": "distill", "name": "shallow", "teacher": "trimmed", "student": {"layers": 2}, **SHORT},
        {"kind": "export", "name": "plain", "from": "shallow", "formats": ["vanilla", "onnx"]},
        {"kind": "quantize", "name": "int8", "from": "pruned", "backend": "bitsandbytes", "bits": 8},
        {"kind": "distill", "name": "again", "teacher": "trimmed", "from": "teacher", "criteria": ["logits"], **SHORT},
    ]
    path = write_tiny_recipe(folder, steps=steps)
    tokenizer_with_spare_words().save_pretrained(folder / "encoder")
    return folder / "run", run(load_recipe(path), folder / "run")


def tokenizer_with_spare_words() -> BertTokenizer:
    """The tiny tokenizer with words that no text holds, instead of names that no text can spell."""
    pieces = sorted(tiny_tokenizer().get_vocab(), key=tiny_tokenizer().get_vocab().__getitem__)
    spare = ("".join(letters) + "aa" for letters in itertools.product("aeio", repeat=3))
    return BertTokenizer(
        vocab={(next(spare) if "unused" in piece else piece): place for place, piece in enumerate(pieces)},
        model_max_length=tiny_tokenizer().model_max_length,
    )


@pytest.mark.slow
def test_the_cut_changes_no_score(finished: tuple[Path, RunRecord]) -> None:
    """All training and validation tokens are kept, so validation answers are the same bits."""
    output, record = finished
    teacher, trimmed = record.steps[:2]
    assert trimmed.artefacts[0].scores["validation"] == teacher.artefacts[0].scores["validation"]
    cut = trimmed.vocabulary
    assert cut is not None
    tokenizer = AutoTokenizer.from_pretrained(output / "trimmed")
    assert cut["tokens_after"] == len(tokenizer) < cut["tokens_before"] == 160
    assert cut["embedding_bytes_after"] == len(tokenizer) * 64 * 4
    assert cut["splits"]["train"]["texts"] == 48  # two tasks over the same column
    assert {role: split["same"] for role, split in cut["splits"].items() if role != "test"} == {
        "train": 1.0,
        "validation": 1.0,
    }
    assert {split["unknown_after"] for split in cut["splits"].values()} == {0.0}
    before, after = (MultiTaskModel.from_pretrained(output / name) for name in ("teacher", "trimmed"))
    text = tiny_text_rows(48)["text"][0]
    readers = [AutoTokenizer.from_pretrained(output / name) for name in ("teacher", "trimmed")]
    with torch.inference_mode():
        one, other = (
            model(**reader(text, return_tensors="pt")) for model, reader in zip((before, after), readers, strict=True)
        )
    assert torch.equal(one.logits_mood, other.logits_mood)


@pytest.mark.slow
def test_later_steps_read_what_their_source_saved(finished: tuple[Path, RunRecord]) -> None:
    """One that read the recipe's tokenizer would look up the rows of other tokens, and only quality would tell."""
    output, record = finished
    small = len(AutoTokenizer.from_pretrained(output / "trimmed"))
    for place in ("student", "pruned", "shallow", "plain/vanilla/mood", "plain/onnx", "int8"):
        assert len(AutoTokenizer.from_pretrained(output / place)) == small, place
    for name in ("student", "pruned", "shallow"):
        assert MultiTaskModel.from_pretrained(output / name).encoder.config.vocab_size == small
    assert len(AutoTokenizer.from_pretrained(output / "again")) == 160
    # A teacher with another vocabulary is asked before the training, one with the same is not.
    caches = {step.name: "teacher_cache" in (step.training or {}) for step in record.steps}
    assert caches == {
        "teacher": False,
        "trimmed": False,
        "student": True,
        "pruned": True,
        "shallow": False,
        "plain": False,
        "int8": False,
        "again": True,
    }
    sentence = "the very sad fox waits near the market square"
    torch_answer, graph_answer = (
        load_predictor(output / place).predict([sentence])[0] for place in ("shallow", "plain/onnx")
    )
    assert torch_answer["strength"] == pytest.approx(graph_answer["strength"], abs=1e-4)


@pytest.mark.slow
def test_every_artefact_reloads(finished: tuple[Path, RunRecord]) -> None:
    for step in finished[1].steps:
        for artefact in step.artefacts:
            assert artefact.reload is not None
            assert artefact.reload["passed"], (artefact.folder, artefact.reload)
            if artefact.form in ("torch", "vanilla"):
                assert artefact.reload["max_difference"] == 0.0, artefact.folder


@pytest.mark.slow
def test_figures_stand_in_card_and_report(finished: tuple[Path, RunRecord]) -> None:
    output, record = finished
    loaded = load_record(output)
    assert [step.vocabulary for step in loaded.steps] == [step.vocabulary for step in record.steps]
    card = (output / CARD).read_text()
    assert lint_card(card, output, loaded) == []
    cut = record.steps[1].vocabulary
    assert cut is not None
    line = f"Step trimmed kept {cut['tokens_after']} of 160 tokens"
    assert line in card
    assert line in report_table(record)
    assert report_rows(record)[1]["vocabulary"] == cut
    sizes = [step.artefacts[0].size.embedding_parameters for step in record.steps[:2] if step.artefacts[0].size]
    assert sizes == [160 * 64, cut["tokens_after"] * 64]


def test_a_corpus_and_the_recipe_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before any training, with texts of one's own; words outside of them fall into pieces."""
    (tmp_path / "texts.jsonl").write_text(json.dumps({"line": "the fox waits"}) + "\n")
    corpus = {"path": "json", "data_files": "texts.jsonl"}
    steps = [{**TRIMMED, "corpus": corpus, "column": "line"}, {**TEACHER, **SHORT}]
    path = write_tiny_recipe(tmp_path, steps=steps, reference="teacher")
    assert main(["plan", str(path), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["steps"]
    done = steps_done(path)
    cut = done["trimmed"].vocabulary
    assert planned[0]["tokens"] == cut["tokens_after"]
    assert planned[1]["parameters"] == planned[0]["parameters"] < 160 * 64 + planned[0]["parameters"]
    assert cut["splits"]["test"]["same"] < 1
    assert cut["splits"]["test"]["tokens_after"] > cut["splits"]["test"]["tokens_before"]
    assert MultiTaskModel.from_pretrained(tmp_path / "run" / "teacher").encoder.config.vocab_size == cut["tokens_after"]
    assert main(["plan", str(path)]) == 0
    assert f"{cut['tokens_after']} tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"size": 20}, "steps.trimmed.size: expected at least"),
        ({"minimum_count": 0}, "expected a whole number of at least 1, found 0"),
        ({"column": "line"}, "names a column of 'corpus'"),
        ({"corpus": {"path": "json", "data_files": "nowhere.jsonl"}}, "steps.trimmed.corpus"),
        ({"minimum_counts": 2}, "did you mean 'minimum_count'"),
    ],
)
def test_mistakes_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], step: dict[str, Any], message: str
) -> None:
    path = write_tiny_recipe(tmp_path, steps=[TEACHER, {**TRIMMED, **step}], reference=None)
    assert main(["plan", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_images_have_no_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tiny_recipe(tmp_path, steps=[TEACHER, TRIMMED], reference=None)
    recipe = yaml.safe_load(path.read_text())
    data = {"path": "imagefolder", "data_dir": "pictures"}
    recipe["tasks"] = {"colour": {"kind": "image-classification", "data": data, "image": "image", "label": "label"}}
    path.write_text(yaml.safe_dump(recipe))
    assert main(["validate", str(path)]) == 2
    error = capsys.readouterr().err
    assert "steps.trimmed: expected a task with texts, whose tokens are kept, found images only" in error
    assert "1 problem" in error
