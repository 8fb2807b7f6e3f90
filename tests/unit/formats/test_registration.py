import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.pipelines import PIPELINE_REGISTRY

import hf_mtcompress
from hf_mtcompress.compression.sparsity import trim_weights
from hf_mtcompress.errors import ArtifactError, TaskError
from hf_mtcompress.formats.registration import PIPELINE, register, register_pipeline
from hf_mtcompress.model.anatomy import encoder_of
from hf_mtcompress.model.configuration import MultiTaskConfig
from hf_mtcompress.model.marking import OUR_METHODS, StructureConfig, read_mark
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.sparse import save_sparse
from hf_mtcompress.model.structured import QUANTIZERS
from hf_mtcompress.model.surgery import cut, describe_structure, keep_layers, mark_structure
from hf_mtcompress.registration_hooks import PostImportFinder
from hf_mtcompress.tasks import SequenceClassification, TokenClassification
from tests import laws
from tests.tiny import (
    FAMILIES,
    FEELING_LABELS,
    TEXT_FAMILIES,
    randomize,
    tiny_config,
    tiny_encoder,
    tiny_inputs,
    tiny_tokenizer,
)

_FRESH = """
import sys, torch
from transformers import AutoModel
import hf_mtcompress
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        found = model(**torch.load(folder + "/inputs.pt")).last_hidden_state
    torch.save(found, folder + "/found.pt")
"""


def classifier(family: str = "bert", uneven: bool = True) -> PreTrainedModel:
    """A stock classifier, pruned unevenly."""
    names = dict(enumerate(FEELING_LABELS))
    model = AutoModelForSequenceClassification.from_config(tiny_config(family, id2label=names))
    assert isinstance(model, PreTrainedModel)
    randomize(model)
    if uneven:
        cut(encoder_of(model), laws.UNEVEN_HEADS, laws.UNEVEN_NEURONS)
    return model


def logits(model: PreTrainedModel, family: str = "bert") -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_inputs(family)).logits


def test_register_twice() -> None:
    """Reloading the package in a notebook must not fail, nor take back what a user put in our place."""
    own = {"impl": "own.Pipeline", "pt": (), "type": "text"}
    before, PIPELINE_REGISTRY.supported_tasks[PIPELINE] = PIPELINE_REGISTRY.supported_tasks[PIPELINE], own
    try:
        register()
        register_pipeline()
        importlib.reload(hf_mtcompress)
        assert PIPELINE_REGISTRY.supported_tasks[PIPELINE] is own
    finally:
        PIPELINE_REGISTRY.supported_tasks[PIPELINE] = before
    assert AutoConfig.for_model("mtcompress").__class__ is MultiTaskConfig
    assert not [finder for finder in sys.meta_path if isinstance(finder, PostImportFinder)]


def test_every_method_has_its_quantizer() -> None:
    """The methods are registered by their names alone: one without a quantizer would fail when a folder is opened."""
    assert set(OUR_METHODS) == set(QUANTIZERS)


def test_model_from_a_config() -> None:
    """`from_config` takes another way to the class than `from_pretrained`."""
    model = AutoModel.from_config(multi_task().config)
    assert type(model) is MultiTaskModel
    assert list(model.tasks) == ["mood", "same", "places"]


def test_fresh_process_is_bit_equal(tmp_path: Path) -> None:
    """What was saved must not depend on anything that only lives in this process. One process for all families."""
    encoders = {}
    for family in FAMILIES:
        for name, heads, neurons in (
            ("uneven", laws.UNEVEN_HEADS, laws.UNEVEN_NEURONS),
            ("empty", laws.EMPTY_HEADS, laws.EMPTY_NEURONS),
        ):
            encoder = tiny_encoder(family)
            cut(encoder, heads, neurons)
            folder = tmp_path / f"{family}-{name}"
            encoder.save_pretrained(folder)
            torch.save(tiny_inputs(family), folder / "inputs.pt")
            encoders[folder] = laws.hidden(encoder, family)
        # Cut, trimmed, and stored without zeros.
        folder = tmp_path / f"{family}-sparse"
        encoder = tiny_encoder(family)
        cut(encoder, laws.UNEVEN_HEADS, laws.UNEVEN_NEURONS)
        trim_weights(encoder, sparsity=0.7)
        assert save_sparse(encoder, folder).matrices
        torch.save(tiny_inputs(family), folder / "inputs.pt")
        encoders[folder] = laws.hidden(encoder, family)
    done = subprocess.run(
        [sys.executable, "-c", _FRESH, *map(str, encoders)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    different = [
        folder.name for folder, value in encoders.items() if not torch.equal(torch.load(folder / "found.pt"), value)
    ]
    assert different == []


# CLIP's towers have no classifier of texts.
@pytest.mark.parametrize("family", [family for family in TEXT_FAMILIES if family != "clip_text"])
def test_pipeline_of_an_uneven_classifier(family: str, tmp_path: Path) -> None:
    """`pipeline` must find the stock class with its weights: an ignored size mismatch gives random answers."""
    model = classifier(family)
    model.save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer(family)
    tokenizer.save_pretrained(tmp_path)
    found: Any = pipeline("text-classification", model=str(tmp_path), device="cpu", top_k=None)
    assert type(found.model) is type(model)
    assert torch.equal(logits(found.model, family), logits(model, family))
    (answers,) = found(["the very happy fox"])
    with torch.no_grad():
        expected = model(**tokenizer("the very happy fox", return_tensors="pt")).logits[0].softmax(-1)
    scores: Any = {answer["label"]: answer["score"] for answer in answers}
    assert scores == pytest.approx(dict(zip(FEELING_LABELS, expected.tolist(), strict=True)), abs=1e-6)


def test_config_says_what_was_cut(tmp_path: Path) -> None:
    """The file is the contract: another tool, or a later version, reads it."""
    model = classifier()
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["BertForSequenceClassification"]
    assert written["quantization_config"] == {
        "quant_method": "mtcompress",
        "format_version": 1,
        "bitsandbytes": None,
        "structure": {
            "layers": [
                {"heads": 2, "feed_forward": 16},
                {"heads": 1, "feed_forward": 32},
                {"heads": 3, "feed_forward": 1},
            ],
            "vocabulary": None,
        },
    }


def test_without_the_entry_loading_fails(tmp_path: Path) -> None:
    """A structure that is lost must be an error; weights that are silently initialised anew would be worse."""
    classifier().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_newer_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="format_version 1 or older, found 2; update"):
        StructureConfig(format_version=2)


def test_loaded_model_trains_and_saves_again(tmp_path: Path) -> None:
    """Left marked as quantized, Trainer would refuse the model; with the entry gone, the next save would not reload."""
    classifier().save_pretrained(tmp_path / "first")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "first")
    rows = [{**{key: value[row] for key, value in tiny_inputs("bert").items()}, "labels": row} for row in range(3)]
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True
    )
    before = logits(model)
    Trainer(model=model, args=arguments, train_dataset=rows).train()  # pyright: ignore[reportArgumentType] - a list has what it needs
    model.eval()
    assert not torch.equal(logits(model), before)
    model.save_pretrained(tmp_path / "second")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "second")
    assert torch.equal(logits(again), logits(model))


def test_entry_goes_when_the_model_is_uniform_again() -> None:
    """A stale structure would make a plain folder need this package, or not load."""
    model = classifier(uneven=False)
    cut(encoder_of(model), heads={0: [0]})
    assert read_mark(model.config) is not None
    keep_layers(encoder_of(model), [1, 2])
    assert read_mark(model.config) is None
    mark_structure(model)
    assert "quantization_config" not in model.config.to_dict()


# ---- multi-task folders ----


def multi_task() -> MultiTaskModel:
    tasks = [
        SequenceClassification("mood", labels=FEELING_LABELS, text="text", label="label"),
        SequenceClassification("same", labels=("no", "yes"), text="text", label="same"),
        TokenClassification("places", labels=("O", "B-place", "I-place"), tokens="tokens", label="tags"),
    ]
    return MultiTaskModel.from_encoder(tiny_encoder("bert"), tasks).eval()


def test_multi_task_folder_opens_with_auto_model(tmp_path: Path) -> None:
    model = multi_task()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is MultiTaskModel
    with torch.no_grad():
        assert torch.equal(loaded(**tiny_inputs("bert"))["logits_mood"], model(**tiny_inputs("bert"))["logits_mood"])


def test_one_task_of_a_multi_task_folder(tmp_path: Path) -> None:
    """The heads of other tasks must not be what is loaded, whatever their order."""
    model = multi_task()
    model.save_pretrained(tmp_path)
    for task in ("mood", "same"):
        stock = AutoModelForSequenceClassification.from_pretrained(tmp_path, task=task)
        assert type(stock).__name__ == "BertForSequenceClassification"
        with torch.no_grad():
            expected = model(**tiny_inputs("bert"))[f"logits_{task}"]
        assert torch.equal(logits(stock), expected)
    # The only one of its kind needs no name.
    assert type(AutoModelForTokenClassification.from_pretrained(tmp_path)).__name__ == "BertForTokenClassification"


@pytest.mark.parametrize("task", [None, "places", "weather"])
def test_one_task_that_is_not_there(task: str | None, tmp_path: Path) -> None:
    multi_task().save_pretrained(tmp_path)
    with pytest.raises(TaskError, match=r"one of \['mood', 'same'\]"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, task=task)


def test_exported_uneven_task_reloads(tmp_path: Path) -> None:
    """The stock model of a pruned multi-task model is built elsewhere than the encoder was cut: it must be marked."""
    model = multi_task()
    cut(model.encoder, laws.UNEVEN_HEADS, laws.UNEVEN_NEURONS)
    model.export_task("mood", tmp_path, None)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(logits(loaded), model(**tiny_inputs("bert"))["logits_mood"])
    assert describe_structure(encoder_of(loaded)) == describe_structure(model.encoder)
