"""Opens saved folders that were damaged at random, in a process of its own: `python -m ... SEED COUNT`.

Prints, as JSON, what was neither answered nor refused by an error of this package, and by how much memory grew.
"""

import json
import random
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, BertForMaskedLM
from transformers import logging as transformers_logging

from hf_mtcompress import MTCompressError, MultiTaskModel, load_predictor, save_sparse
from hf_mtcompress.errors import ArtifactError
from hf_mtcompress.evaluation.worker import peak_mb
from hf_mtcompress.model.surgery import cut
from hf_mtcompress.records import to_json
from hf_mtcompress.runs.commands import card
from tests.tiny import tiny_config, tiny_tokenizer
from tests.unit.formats.artefacts import saved_text
from tests.unit.publishing.factory import make_record

WEIGHTS = "model.safetensors"
_VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 3, 10**9, 10**12, 10**30, -(10**9), 0.5, 1e308, float("nan"), "", "x", "../../x"),
    *([], {}, [1], [[]], {"a": 1}, ["x"] * 3, list(range(1000))),
]


def _opened(folder: Path) -> None:
    load_predictor(folder).predict(["the old fox sleeps"])


def _auto(folder: Path) -> None:
    try:
        AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers' own, before anything of this package is asked
        raise ArtifactError(str(error)) from error
    AutoModel.from_pretrained(folder)


def _adapters(folder: Path) -> None:
    MultiTaskModel.from_pretrained(saved_text().folders["torch"]).load_adapters(folder)


def _encoder(folder: Path) -> None:
    MultiTaskModel.from_encoder(folder, list(saved_text().model.tasks.values()))


def make_folders(root: Path) -> dict[str, tuple[Path, Callable[[Path], Any]]]:
    """Whole folders by name, each with what opens it."""
    saved, tokenizer = saved_text(), tiny_tokenizer()
    found: dict[str, tuple[Path, Callable[[Path], Any]]] = {
        form: (saved.folders[form], _opened) for form in ("torch", "vanilla", "onnx", "int8")
    }
    found["auto"] = (saved.folders["torch"], _auto)
    uneven, zeros, adapted = (MultiTaskModel.from_pretrained(saved.folders["torch"]) for _ in range(3))
    cut(uneven.encoder, heads={0: [0], 1: [0, 1]}, feed_forward={0: list(range(10))})
    uneven.save_pretrained(root / "uneven")
    uneven.export_task("mood", root / "uneven_stock" / "mood", tokenizer)
    with torch.no_grad():
        zeros.encoder.embeddings.word_embeddings.weight[3:] = 0
    save_sparse(zeros, root / "sparse")
    adapted.add_adapters(rank=2)
    adapted.save_pretrained(root / "adapted")
    adapted.save_adapters(root / "adapters")
    BertForMaskedLM(tiny_config("bert")).save_pretrained(root / "encoder")
    (root / "run").mkdir()
    (root / "run" / "record.json").write_text(to_json(make_record()))
    for name in ("uneven", "sparse", "adapted"):
        tokenizer.save_pretrained(root / name)
    opens = {"adapters": _adapters, "encoder": _encoder, "run": card}
    return found | {path.name: (path, opens.get(path.name, _opened)) for path in sorted(root.iterdir())}


def damage(folder: Path, dice: random.Random) -> str:
    """Do one thing to one file; what."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "tokenizer.json")
    file = dice.choice(files)
    kinds = {".json": [_value] * 8 + [_key], ".safetensors": [_tensor] * 6 + [_header] * 2}.get(file.suffix, [])
    kind = dice.choice([*kinds, _bytes, _whole])
    return f"{file.relative_to(folder)}: {kind(file, dice)}"


def _places(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(values, dict | list):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            found += _places(value, (*path, key))
    return found


def _value(file: Path, dice: random.Random, *, taken: bool = False) -> str:
    values = json.loads(file.read_text())
    path = dice.choice(_places(values) or [()])
    holder = values
    for key in path[:-1]:
        holder = holder[key]
    new = dice.choice(_VALUES)
    if not path:
        values = new
    elif taken:
        del holder[path[-1]]
    else:
        holder[path[-1]] = new
    file.write_text(json.dumps(values))
    return f"{path} {'taken out' if taken else f'= {new!r}'}"[:150]


def _key(file: Path, dice: random.Random) -> str:
    return _value(file, dice, taken=True)


def _tensor(file: Path, dice: random.Random) -> str:
    tensors = load_file(file)
    name = dice.choice(sorted(tensors))
    value = tensors.pop(name)
    match dice.randrange(6):
        case 0:
            what = "taken out"
        case 1:
            tensors[f"{name}x"], what = value, "renamed"
        case 2:
            tensors[name], what = value[None].clone(), "one axis more"
        case 3:
            tensors[name], what = torch.cat([value, value]), "twice as long"
        case 4:
            tensors[name], what = torch.zeros(10**7, dtype=torch.uint8), "bytes"
        case _:
            tensors, what = {}, "all taken out"
    save_file(tensors, file, {"format": "pt"})
    return f"{name} {what}"


def _header(file: Path, dice: random.Random) -> str:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = dice.choice([name for name in header if name != "__metadata__"] or ["a"])
    new = dice.choice([{"shape": [10**9, 10**9]}, {"shape": [-1]}, {"dtype": "F99"}, {"data_offsets": [0, 10**12]}, {}])
    header[name] = {**header.get(name, {}), **new} if new else 3
    text = json.dumps(header).encode()
    lie = dice.choice([0, 0, 0, 2**40])
    file.write_bytes((len(text) + lie).to_bytes(8, "little") + text + data[8 + length :])
    return f"{name} {new} {lie}"


def _bytes(file: Path, dice: random.Random) -> str:
    data = bytearray(file.read_bytes())
    match dice.randrange(3):
        case 0:
            data, what = data[: int(dice.random() * len(data))], "cut"
        case 1:
            data, what = bytearray(b"[" * 10**5), "nested"
        case _:
            for _ in range(8):
                data[dice.randrange(len(data))] = dice.randrange(256)
            what = "bytes changed"
    file.write_bytes(data)
    return what


def _whole(file: Path, dice: random.Random) -> str:
    what = dice.choice(["gone", "a folder", "a link to nowhere", "a pickle"])
    file.unlink()
    match what:
        case "a folder":
            file.mkdir()
        case "a link to nowhere":
            file.symlink_to("nowhere")
        case "a pickle":
            (file.parent / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n(X\x02\x00\x00\x00idtR.")
        case _:
            pass
    return what


def main(seed: int, count: int) -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    dice, raw, refused = random.Random(seed), [], 0
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        (place / "whole").mkdir()
        folders = make_folders(place / "whole")
        for folder, opens in folders.values():
            opens(folder)
        before = peak_mb() or 0.0
        for number in range(count):
            name = dice.choice(sorted(folders))
            folder, opens = folders[name]
            damaged = Path(shutil.copytree(folder, place / f"{number}"))
            what = damage(damaged, dice)
            try:
                opens(damaged)
            except MTCompressError:
                refused += 1
            except BaseException:
                raw.append(f"{number} {name} {what}\n{traceback.format_exc()[-1500:]}")
            shutil.rmtree(damaged)
    sys.stdout.write(json.dumps({"raw": raw, "refused": refused, "grown_mb": (peak_mb() or 0.0) - before}) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
