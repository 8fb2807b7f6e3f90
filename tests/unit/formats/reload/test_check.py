"""The reload check passes what is right and catches what was changed after saving."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_mtcompress.compression.quantization import quantize_bitsandbytes
from hf_mtcompress.errors import ArtifactError
from hf_mtcompress.formats.reload.check import ReloadCheck, check_reload
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.model.surgery import cut, describe_structure
from tests.unit.formats.artefacts import Saved, saved_images, saved_text


def check(saved: Saved, folder: Path, tolerance: float = 0.0, *, samples: bool = True) -> ReloadCheck:
    return ReloadCheck(
        folder=folder,
        inputs=saved.inputs,
        expected=saved.logits(),
        tolerance=tolerance,
        samples=saved.samples if samples else None,
        labels={name: list(task.labels) for name, task in saved.model.tasks.items() if task.labels},
    )


def tampered(source: Path, folder: Path, key_part: str) -> Path:
    """A copy of a folder in which the smallest possible change was made to one weight."""
    shutil.copytree(source, folder)
    file = next(folder.rglob("model.safetensors"))
    tensors = load_file(file)
    key = next(name for name in tensors if key_part in name and tensors[name].dim() == 2)
    tensors[key][0, 0] = torch.nextafter(tensors[key][0, 0], torch.tensor(10.0)) + 1e-4
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def cut_model(saved: Saved, root: Path) -> Saved:
    """The same model with layers of unequal shape, which plain transformers cannot build."""
    model = MultiTaskModel.from_pretrained(saved.folders["torch"]).eval()
    cut(model.encoder, heads={0: [0, 2]}, feed_forward={1: list(range(40))})
    model.config.structure = {"main": describe_structure(model.encoder)}
    folders = {"torch": root / "torch", "vanilla": root / "vanilla"}
    model.save_pretrained(folders["torch"])
    saved.processor.save_pretrained(folders["torch"])
    for name in model.tasks:
        model.export_task(name, folders["vanilla"] / name, saved.processor)
    return replace(saved, model=model, folders=folders)


def few_bits(saved: Saved, folder: Path) -> Saved:
    """The same model with 8-bit weights."""
    model = quantize_bitsandbytes(saved.model, 8)
    assert isinstance(model, MultiTaskModel)
    model.save_pretrained(folder)
    saved.processor.save_pretrained(folder)
    return replace(saved, model=model.eval(), folders={"bitsandbytes": folder})


def test_every_form_reloads_and_tampering_is_caught(tmp_path: Path):
    """One process for all folders: a result that lands at the wrong folder would pass a broken one."""
    text, images = saved_text(), saved_images()
    broken = tampered(text.folders["torch"], tmp_path / "torch", "query.weight")
    broken_task = tampered(text.folders["vanilla"], tmp_path / "vanilla", "classifier.weight")
    relabelled = tmp_path / "relabelled"
    shutil.copytree(text.folders["vanilla"], relabelled)
    config = json.loads((relabelled / "mood" / "config.json").read_text())
    config["id2label"] = {"0": "good", "1": "plain", "2": "bad"}
    config["label2id"] = {"good": 0, "plain": 1, "bad": 2}
    (relabelled / "mood" / "config.json").write_text(json.dumps(config))
    short = tmp_path / "short"
    shutil.copytree(text.folders["vanilla"], short)
    (short / "tags" / "model.safetensors").unlink()
    uneven, eight = cut_model(text, tmp_path / "cut"), few_bits(text, tmp_path / "eight")
    results = check_reload(
        [
            check(text, text.folders["torch"]),
            check(text, text.folders["vanilla"]),
            check(text, text.folders["onnx"], 1e-4),
            check(images, images.folders["torch"]),
            check(images, images.folders["vanilla"]),
            check(text, broken, samples=False),
            check(text, broken_task, samples=False),
            check(text, text.folders["int8"], 1e-6),
            check(text, short, samples=False),
            check(text, relabelled, samples=False),
            check(uneven, uneven.folders["torch"]),
            check(uneven, uneven.folders["vanilla"]),
            check(eight, eight.folders["bitsandbytes"]),
        ]
    )
    assert [result["passed"] for result in results] == [True] * 5 + [False] * 5 + [True] * 3, results
    for result, how in zip(
        results, ["AutoModel", "without hf_mtcompress", "ONNX", "AutoModel", "without"], strict=False
    ):
        assert how in result["how"]
        assert result["problems"] == []
    assert [result["max_difference"] for result in results[:2]] == [0.0, 0.0]
    assert "pipeline(multi-task)" in results[0]["how"]
    assert "pipeline(text-classification)" in results[1]["how"]
    assert results[5]["max_difference"] > 0
    assert results[8]["max_difference"] is None
    assert results[8]["problems"][0].startswith("tags: OSError")
    assert "in this order" in results[9]["problems"][0]
    assert [result["max_difference"] for result in results[10:]] == [0.0] * 3
    assert "without" not in results[11]["how"]


def test_a_process_that_dies_is_an_error(tmp_path: Path):
    """No results must never count as passed."""
    saved = saved_text()
    with pytest.raises(ArtifactError, match="within 0 s"):
        check_reload([check(saved, saved.folders["torch"])], timeout=0.01)
    with pytest.raises(ArtifactError, match="found no folder"):
        check(saved, tmp_path / "nowhere")
