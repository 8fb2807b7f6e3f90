"""What is wrong with pictures is told by `validate` and `plan`, before anything is trained: each by its name."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LayoutLMv3Config, LayoutLMv3Model

from hf_mtcompress.cli import main
from hf_mtcompress.data.sources import load_sources
from hf_mtcompress.recipe.load import load_recipe
from tests.tiny import COLOUR_LABELS, HIDDEN, tiny_encoder, tiny_image_processor, tiny_image_rows, tiny_tokenizer
from tests.tiny_recipe import write_tiny_recipe

SPLITS = {"train": 8, "validation": 4, "test": 4}


def write_rows(folder: Path) -> None:
    """Pictures in `folder/pictures`, and JSON lines with their paths."""
    (folder / "pictures").mkdir(parents=True)
    for seed, (split, count) in enumerate(SPLITS.items()):
        rows = []
        for number, row in enumerate(tiny_image_rows(count, seed=seed)):
            name = f"pictures/{split}-{number}.png"
            row["image"].save(folder / name)
            rows.append({"picture": name, "colour": COLOUR_LABELS[row["label"]]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_recipe(folder: Path, **encoder: Any) -> Path:
    tiny_encoder("vit").save_pretrained(folder / "encoder")
    tiny_image_processor("vit").save_pretrained(folder / "encoder")
    write_rows(folder)
    data = {"path": "json", "data_files": {split: f"{split}.jsonl" for split in SPLITS}}
    task = {"kind": "image-classification", "data": data, "image": "picture", "label": "colour"}
    recipe = {
        "name": "colours",
        "encoder": {"path": "encoder", **encoder},
        "tasks": {"colour": {**task, "labels": list(COLOUR_LABELS)}},
        "steps": [{"kind": "finetune", "name": "teacher", "max_steps": 1}],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def test_paths_in_json_lines_are_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """They were taken for pictures by `validate`, and were texts in training."""
    recipe = write_recipe(tmp_path)
    assert main(["validate", str(recipe)]) == 0
    rows = load_sources(load_recipe(recipe).tasks, 0).splits["colour"]["train"]
    assert rows[3]["picture"].tobytes() == tiny_image_rows(SPLITS["train"], seed=0)[3]["image"].tobytes()


@pytest.mark.parametrize("verb", ["validate", "plan", "run"])
def test_every_broken_picture_is_named(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """One of fifty thousand, in the test split, ended a run after all of its steps."""
    recipe = write_recipe(tmp_path)
    broken = tmp_path / "pictures" / "test-2.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:400])
    (tmp_path / "pictures" / "train-1.png").unlink()
    assert main([verb, str(recipe)]) == 2
    told = capsys.readouterr().err
    assert "task 'colour': expected pictures that open, found 2 that do not" in told
    assert "row 2 of the test split: expected a picture that opens, found" in told
    assert "test-2.png' (" in told
    assert "row 1 of the train split: expected a picture at" in told
    assert "train-1.png', found no file" in told
    # What was found is not remembered of files that have changed.
    broken.write_bytes(whole)
    assert main([verb, str(recipe)]) == 2
    assert "found 1 that do not" in capsys.readouterr().err


def test_paths_start_from_data_dir_or_from_their_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A name that two folders have could be either picture."""
    recipe = write_recipe(tmp_path)
    values = yaml.safe_load(recipe.read_text())
    data = values["tasks"]["colour"]["data"]
    (tmp_path / "lists").mkdir()
    for split in SPLITS:
        (tmp_path / f"{split}.jsonl").rename(tmp_path / "lists" / f"{split}.jsonl")
    values["tasks"]["colour"]["data"] = {**data, "data_files": {split: f"lists/{split}.jsonl" for split in SPLITS}}
    recipe.write_text(yaml.safe_dump(values))
    assert main(["validate", str(recipe)]) == 2
    assert f"expected a picture at '{tmp_path}/lists/pictures/train-0.png', found no file" in capsys.readouterr().err
    values["tasks"]["colour"]["data"]["data_dir"] = "."
    recipe.write_text(yaml.safe_dump(values))
    assert main(["validate", str(recipe)]) == 0
    write_rows(tmp_path / "more")
    both = ["lists/train.jsonl", "more/train.jsonl"]
    (tmp_path / "pictures").rename(tmp_path / "lists" / "pictures")
    values["tasks"]["colour"]["data"] = {**data, "data_files": {**data["data_files"], "train": both}}
    del values["tasks"]["colour"]["data"]["data_files"]["validation"]
    del values["tasks"]["colour"]["data"]["data_files"]["test"]
    recipe.write_text(yaml.safe_dump(values))
    assert main(["validate", str(recipe)]) == 2
    assert "expected one picture 'pictures/train-0.png', found" in capsys.readouterr().err


def test_addresses_are_not_fetched_row_by_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = write_recipe(tmp_path)
    rows = (tmp_path / "train.jsonl").read_text().replace("pictures/train-0.png", "https://example.org/fox.png")
    (tmp_path / "train.jsonl").write_text(rows)
    assert main(["validate", str(recipe)]) == 2
    assert "found 'https://example.org/fox.png'; download it first" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["validate", "plan", "run"])
def test_a_size_without_places_is_refused(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = write_recipe(tmp_path, image_size=48)
    assert main([verb, str(recipe)]) == 2
    told = capsys.readouterr().err
    assert "encoder.image_size: expected pictures of 32 x 32 pixels" in told
    assert "found 48 x 48; set image_size to 32" in told


def test_a_student_of_another_size_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """After the training of its teacher."""
    recipe = write_recipe(tmp_path, image_size=32)
    tiny_encoder("vit", image_size=64).save_pretrained(tmp_path / "larger")
    tiny_image_processor("vit").save_pretrained(tmp_path / "larger")
    values = yaml.safe_load(recipe.read_text())
    student = {"kind": "distill", "name": "student", "teacher": "teacher", "student": {"path": "larger"}}
    recipe.write_text(yaml.safe_dump({**values, "steps": [*values["steps"], student]}))
    assert main(["validate", str(recipe)]) == 2
    assert "steps.student.student, encoder.image_size: expected pictures of 64 x 64" in capsys.readouterr().err


def test_a_graph_of_texts_alone_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """An encoder of pages: its graph would read no page."""
    graphs = {"kind": "export", "name": "graphs", "formats": ["onnx"]}
    teacher = {"kind": "finetune", "name": "teacher", "max_steps": 1}
    recipe = write_tiny_recipe(tmp_path, steps=[teacher, graphs])
    config = LayoutLMv3Config(
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_hidden_layers=2,
        intermediate_size=HIDDEN,
        vocab_size=len(tiny_tokenizer()),
        coordinate_size=4,
        shape_size=8,
        max_position_embeddings=64,
    )
    LayoutLMv3Model(config).save_pretrained(tmp_path / "encoder")
    assert main(["validate", str(recipe)]) == 2
    told = capsys.readouterr().err
    assert "steps.graphs: expected all inputs of LayoutLMv3Model, found none for bbox, pixel_values" in told
