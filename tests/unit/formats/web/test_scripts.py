"""What the page computes is what Python computes: pixels, tokens, answers. Needs Node.js, which most machines have."""

import json
import random
import shutil
import subprocess
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image

from hf_mtcompress.data.pixels import picture_of
from hf_mtcompress.data.readers import reader_of
from hf_mtcompress.formats.web.page import _describe_task
from hf_mtcompress.tasks import SequenceClassification, Task, TokenClassification
from hf_mtcompress.tasks.metrics import bio_spans
from tests.tiny import IMAGE_FAMILIES, tiny_bpe_tokenizer, tiny_image_processor, tiny_tokenizer, tiny_unigram_tokenizer

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed")

# A table stands for a function of a text; bytes travel as lists.
_RUNNER = """
import { readFileSync } from "node:fs";
const { folder, calls } = JSON.parse(readFileSync(0, "utf8"));
const alive = (value) => {
  if (value === null || typeof value !== "object" || Array.isArray(value)) return value;
  if ("$table" in value) return (text) => value.$table[text];
  if ("$bytes" in value) return Uint8Array.from(value.$bytes);
  return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, alive(part)]));
};
const results = [];
for (const [name, function_, args] of calls) {
  const module = await import(`${folder}/${name}.mjs`);
  results.push(module[function_](...args.map(alive)));
}
const plain = (_, value) => (ArrayBuffer.isView(value) ? Array.from(value) : value);
process.stdout.write(JSON.stringify(results, plain));
"""


def run(calls: Sequence[tuple[str, str, list[Any]]]) -> list[Any]:
    """Results of functions of the page's modules, in one process."""
    folder = files("hf_mtcompress.formats.web")
    done = subprocess.run(
        ["node", "--input-type=module", "--eval", _RUNNER],
        input=json.dumps({"folder": f"file://{folder}", "calls": calls}),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


_TALL_FIRST = int(PIL.__version__.partition(".")[0]) >= 13


def _image(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _as_js(image: Image.Image) -> dict[str, Any]:
    return {"width": image.width, "height": image.height, "data": {"$bytes": list(image.tobytes())}}


def test_images_are_scaled_to_the_same_bits():
    """A canvas scales in its own way, and then the browser answers otherwise than the scores in the card say."""
    cases = [
        (filter_, (width, height), target)
        for filter_ in ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
        for (width, height), target in (
            ((23, 41), (8, 9)),
            ((9, 8), (31, 20)),
            ((16, 16), (16, 7)),
            ((30, 12), (5, 12)),
        )
    ]
    images = [_image(*size, seed=number) for number, (_, size, _) in enumerate(cases)]
    found = run(
        [
            ("image", "resizeImage", [_as_js(image), *target, name, _TALL_FIRST])
            for image, (name, _, target) in zip(images, cases, strict=True)
        ]
    )
    for image, (name, _, target), result in zip(images, cases, found, strict=True):
        expected = np.asarray(image.resize(target, Image.Resampling[name.upper()]))
        np.testing.assert_array_equal(np.asarray(result["data"]), expected.reshape(-1), err_msg=f"{name} {target}")


def test_transparent_pixels_are_seen_on_white_to_the_same_bits():
    """Every value with every alpha."""
    values = np.arange(256, dtype=np.uint8)
    grid = np.stack(np.broadcast_arrays(values[:, None], values[:, None], 7, values[None, :]), 2).astype(np.uint8)
    (found,) = run([("image", "onWhite", [{"$bytes": grid.ravel().tolist()}])])
    np.testing.assert_array_equal(found, np.asarray(picture_of(grid)).ravel())


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_pixel_values_equal_those_of_the_processor(family: str):
    """Sides in another order, a crop from the corner, a mean of another channel."""
    processor = tiny_image_processor(family)
    images = [_image(*size, seed=5) for size in ((53, 40), (40, 71), (32, 32), (20, 25))]
    settings = reader_of(processor).describe()[0]["image"]
    found = run([("image", "encodeImage", [_as_js(image), settings]) for image in images])
    for image, result in zip(images, found, strict=True):
        expected = processor([image], return_tensors="np")["pixel_values"]
        assert result["shape"] == list(expected.shape)
        np.testing.assert_allclose(np.asarray(result["data"]), expected.reshape(-1), atol=1e-6)


TOKENIZERS = {"wordpiece": tiny_tokenizer, "bpe": tiny_bpe_tokenizer, "unigram": tiny_unigram_tokenizer}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_texts_are_cut_and_framed_as_the_tokenizer_does(name: str, side: str):
    """Special tokens in the wrong place, a pair cut by another rule: nothing fails, answers are only worse."""
    tokenizer = TOKENIZERS[name]()
    generator = random.Random(7)
    vocabulary = ["fox", "river", "sleepy", "runs", "blue", "near"]

    def text(most: int) -> str:
        return " ".join(generator.choice(vocabulary) for _ in range(generator.randint(0, most)))

    cases = [(text(20), text(20) if number % 2 else None, generator.randint(5, 24)) for number in range(40)]
    before = tokenizer.truncation_side
    tokenizer.truncation_side = side
    try:
        calls, expected = [], []
        for first, second, length in cases:
            settings = reader_of(tokenizer, length).describe()[0]["text"]
            table = {part: tokenizer(part, add_special_tokens=False)["input_ids"] for part in (first, second or "")}
            calls.append(("text", "encodeText", [{"$table": table}, settings, first, second or ""]))
            texts = (first, second) if second else (first,)
            expected.append(tokenizer(*texts, truncation=True, max_length=length, return_token_type_ids=True))
        for found, wanted in zip(run(calls), expected, strict=True):
            for key in ("input_ids", "attention_mask", "token_type_ids"):
                assert found[key] == wanted[key], key
    finally:
        tokenizer.truncation_side = before


@pytest.mark.parametrize("name", TOKENIZERS)
def test_words_keep_their_tokens(name: str):
    """A label one token off marks the neighbour of every name."""
    tokenizer = TOKENIZERS[name]()
    reader = reader_of(tokenizer, 14)
    settings = reader.describe(words=True)[0]["text"]
    texts = [
        "the sleepy fox  runs",
        "  near the blue river\tby the old house of the miller",
        "",
        "a\u200b \ufeff\x1c\ufe0f \x85gwen",
    ]
    calls, expected = [], []
    for text in texts:
        parts = {text[:end] for end in range(len(text) + 1)}
        table = {part: tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts}
        calls.append(("text", "encodeText", [{"$table": table}, settings, text]))
        expected.append(reader.encode([[text]], words=True))
    found = run(calls)
    for text, result, wanted in zip(texts, found, expected, strict=True):
        assert result["input_ids"] == wanted["input_ids"][0]
        assert result["word_ids"] == wanted["word_ids"][0]
        assert result["words"] == text.split()
    assert [result["cut"] for result in found][:3] == [False, True, False]


def test_spans_equal_those_of_the_metrics():
    """A page that reads I-x after O otherwise shows other spans than were scored."""
    generator = random.Random(3)
    names = ["O", "B-a", "I-a", "B-b", "I-b", "E-a", "S-b", "B", "I"]
    rows = [[generator.choice(names) for _ in range(generator.randint(0, 8))] for _ in range(200)]
    found = run([("answers", "bioSpans", [row]) for row in rows])
    for row, spans in zip(rows, found, strict=True):
        assert [(span["label"], span["start"], span["end"]) for span in spans] == bio_spans(row)


def test_answers_equal_those_of_the_tasks():
    """The same logits, another label."""
    rng = np.random.default_rng(1)
    tasks: list[Task] = [
        SequenceClassification("mood", labels=["calm", "angry", "glad"]),
        SequenceClassification("topics", labels=["a", "b", "c"], problem_type="multi_label_classification"),
        SequenceClassification("size", problem_type="regression"),
        TokenClassification("tags", labels=["O", "B-x", "I-x"]),
        TokenClassification("pos", labels=["NOUN", "VERB", "DET"]),
    ]
    encoding = {"word_ids": [None, 0, 0, 2, 3, 3, None], "words": ["one", "two", "three", "four", "five"]}
    calls, expected = [], []
    for task in tasks:
        for _ in range(5):
            words = isinstance(task, TokenClassification)
            logits = rng.normal(0, 3, (7, 3) if words else (task.num_outputs,)).astype(np.float32)
            calls.append(("answers", "decode", [_describe_task(task), logits.reshape(-1).tolist(), encoding]))
            expected.append(task.decode(logits, encoding))
    for found, wanted in zip(run(calls), expected, strict=True):
        assert _rounded(found) == _rounded(wanted)


def _rounded(value: Any) -> Any:
    if isinstance(value, float | int):
        return round(float(value), 6)
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value


def test_ranking_holds_every_label_best_first():
    """Bars in another order than their lengths."""
    task = _describe_task(SequenceClassification("mood", labels=["calm", "angry", "glad"]))
    (found,) = run([("answers", "ranking", [task, [0.0, 2.0, 1.0]])])
    assert [item["label"] for item in found] == ["angry", "glad", "calm"]
    assert sum(item["score"] for item in found) == pytest.approx(1.0)


# A browser in as many words as the page of pictures needs: what it shows is read off the elements.
_BROWSER = """
const elements = {};
const made = () => {
  const listeners = {};
  return {
    hidden: true, textContent: "", children: [], style: { setProperty() {} }, classList: { toggle() {} },
    append(...parts) { this.children.push(...parts); }, replaceChildren(...parts) { this.children = parts; },
    setAttribute() {}, addEventListener(name, listener) { listeners[name] = listener; },
    fire: (name, event) => listeners[name]({ preventDefault() {}, ...event }),
  };
};
globalThis.document = { getElementById: (id) => (elements[id] ??= made()), createElement: made };
const tasks = [{ name: "size", problem: "regression", labels: [] }];
const page = { title: "", summary: "", facts: [], bytes: 1, image: {}, tasks };
globalThis.fetch = async () => new Response(JSON.stringify(page));
globalThis.options = [];
globalThis.createImageBitmap = async (file, options) => {
  globalThis.options.push(options);
  if (file.broken) throw new Error("The source image could not be decoded.");
  return { width: file.side, height: file.side, close() {} };
};
globalThis.OffscreenCanvas = class {
  constructor(width, height) { this.bytes = width * height * 4; }
  getContext() { return { drawImage() {}, getImageData: () => ({ data: new Uint8ClampedArray(this.bytes) }) }; }
};
URL.createObjectURL = () => "";
console.error = () => {};
const settled = () => new Promise((done) => setTimeout(done, 60));
await import("FOLDER/app.mjs");
for (let tries = 0; tries < 100 && !elements.drop; tries += 1) await settled(); // on a busy machine
await settled();
const seen = [];
for (const file of FILES) {
  elements.drop.fire("drop", { dataTransfer: { files: [file] } });
  await settled();
  elements.form.fire("submit");
  await settled();
  const { answers, time, note, preview } = elements;
  const texts = { time: time.textContent !== "", note: note.textContent };
  seen.push({ answers: answers.children.length, ...texts, shown: !preview.hidden });
}
process.stdout.write(JSON.stringify({ seen, options: globalThis.options }));
"""
_ENGINE = """
export const openEngine = async () => ({
  predict: async ({ image }) => ({ answers: { size: image.width }, rankings: {}, encoding: {}, milliseconds: 1 }),
});
"""


def test_nothing_is_said_of_the_picture_before(tmp_path: Path):
    """A file that does not open, or is too large, under answers about another one looks answered."""
    for name in ("app.mjs", "image.mjs"):
        (tmp_path / name).write_text(files("hf_mtcompress.formats.web").joinpath(name).read_text())
    (tmp_path / "engine.mjs").write_text(_ENGINE)
    (tmp_path / "libraries").mkdir()
    (tmp_path / "libraries" / "ort.wasm.min.mjs").write_text("export const env = { wasm: {} };")
    given = [{"name": "fox.png", "side": 2}, {"name": "owl.png", "broken": True}, {"name": "bomb.png", "side": 30_000}]
    script = _BROWSER.replace("FOLDER", f"file://{tmp_path}").replace("FILES", json.dumps([*given, given[0]]))
    done = subprocess.run(
        ["node", "--input-type=module", "--eval", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    fox, broken, bomb, again = found["seen"]
    assert fox == again == {"answers": 1, "time": True, "note": "", "shown": True}
    assert (broken["answers"], broken["time"], broken["shown"]) == (0, False, False)
    assert "owl.png is no picture that this browser can open" in broken["note"]
    assert (bomb["answers"], bomb["shown"]) == (0, False)
    assert "bomb.png has 30000 x 30000 pixels, more than 89478485" in bomb["note"]
    assert {options["imageOrientation"] for options in found["options"]} == {"from-image"}
