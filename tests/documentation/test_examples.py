"""Every Python example of the documents runs, on tiny models and rows that lie where the examples look for them."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from hf_mtcompress import MultiTaskModel, SequenceClassification, export_onnx, quantize_onnx
from hf_mtcompress.records import to_json
from tests.documentation.test_documents import NAMES, blocks
from tests.tiny import randomize, tiny_config, tiny_encoder, tiny_text_rows, tiny_tokenizer
from tests.unit.publishing.factory import make_record

EXAMPLES = [(name, number) for name in NAMES for number in range(len(blocks(name, "python")))]
POLARITIES = ["negative", "neutral", "positive"]
SOURCES = ["tweets", "reviews", "films", "news"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the examples open by name."""
    folder = tmp_path_factory.mktemp("examples")
    tokenizer = tiny_tokenizer()
    encoder = folder / "sentence-transformers" / "all-MiniLM-L6-v2"
    tiny_encoder("bert").save_pretrained(encoder)
    tokenizer.save_pretrained(encoder)

    data = folder / "recipes" / "quickstart" / "data"
    data.mkdir(parents=True)
    for seed, split in enumerate(("train", "validation", "test")):
        rows = tiny_text_rows(12, seed=seed)
        lines = [
            {"text": row["text"], "polarity": POLARITIES[number % 3], "intensity": row["intensity"]}
            for number, row in enumerate(rows)
        ]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    run = folder / "runs" / "quickstart"
    tasks = [
        SequenceClassification("polarity", labels=POLARITIES),
        SequenceClassification("intensity", problem_type="regression"),
        SequenceClassification("source", labels=SOURCES),
    ]
    model = randomize(MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks, max_length=32))
    model.save_pretrained(run / "student")
    tokenizer.save_pretrained(run / "student")
    model.export_task("polarity", run / "vanilla" / "vanilla" / "polarity", tokenizer)
    export_onnx(model, tokenizer, folder / "onnx")
    quantize_onnx(folder / "onnx", run / "int8")
    (run / "record.json").write_text(to_json(make_record()))

    for name, labels in (("my/model", 2), ("student", 2), ("teacher", 2)):
        stock = AutoModelForSequenceClassification.from_config(tiny_config("bert", num_labels=labels))
        stock.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    encoded_rows().save_to_disk(folder / "my" / "encoded_rows")

    base = MultiTaskModel.from_encoder(tiny_encoder("bert"), [SequenceClassification("intent", labels=list("abcdefg"))])
    # Beside no folder that is called like the encoder on the Hub.
    base.save_pretrained(folder / "elsewhere" / "base")
    base.add_adapters(rank=2)
    base.save_adapters(folder / "adapters")
    return folder


def encoded_rows() -> Dataset:
    rows = tiny_text_rows(8)
    encoded = tiny_tokenizer()(list(rows["text"]), padding=True)
    return Dataset.from_dict({**encoded, "labels": [number % 2 for number in range(8)]})


def known(name: str, number: int) -> dict[str, Any]:
    """What a page says in words before an example."""
    names: dict[str, Any] = {"rows": encoded_rows(), "tokenizer": tiny_tokenizer()}
    if name == "docs/concepts.md":
        names |= {
            "MultiTaskModel": MultiTaskModel,
            "PeftModel": PeftModel,
            "AutoModelForSequenceClassification": AutoModelForSequenceClassification,
        }
        if number == 0:
            model = MultiTaskModel.from_pretrained("base")
            model.add_adapters(rank=2)
            names["model"] = model
    return names


@pytest.mark.parametrize(("name", "number"), EXAMPLES)
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")  # the examples leave it to transformers
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks transformers for it
def test_an_example_runs(name: str, number: int, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first thing a reader does is copy one."""
    monkeypatch.chdir(place / "elsewhere" if (name, number) == ("docs/concepts.md", 0) else place)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(place / "cache"))
    exec(compile(blocks(name, "python")[number], f"{name}, example {number + 1}", "exec"), known(name, number))
