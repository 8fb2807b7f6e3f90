// The page: loads the model, takes a text or an image, shows the answers of all tasks.

import { openEngine } from "./engine.mjs";
import { MOST_PIXELS, onWhite } from "./image.mjs";

const $ = (id) => document.getElementById(id);
const SHOWN = 5; // labels of a task with a bar of their own
const TYPING_PAUSE = 250; // milliseconds without a key until a text is answered

/** A new element; `content` is text or elements, never markup. */
function element(tag, attributes = {}, ...content) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...content);
  return made;
}

async function fetchBytes(path, report) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`${path}: the server answered ${answer.status}`);
  const parts = [];
  let bytes = 0;
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    report((bytes += value.length));
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

const fetchJson = async (path) => JSON.parse(new TextDecoder().decode(await fetchBytes(path, () => {})));

async function open() {
  const page = await fetchJson("page.json");
  document.title = page.title;
  $("title").textContent = page.title;
  $("summary").textContent = page.summary;
  for (const [name, value] of page.facts) $("facts").append(element("div", {}, element("dt", {}, name), element("dd", {}, value)));
  const started = performance.now();
  const ort = await import("./libraries/ort.wasm.min.mjs");
  ort.env.wasm.wasmPaths = new URL("libraries/", import.meta.url).href;
  // Threads need shared memory, which browsers give to isolated pages only.
  ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, 4) : 1;
  const parts = { ort };
  if (page.text) {
    ({ Tokenizer: parts.Tokenizer } = await import("./libraries/tokenizers.min.mjs"));
    parts.tokenizer = await fetchJson("model/tokenizer.json");
    parts.tokenizerConfig = await fetchJson("model/tokenizer_config.json");
  }
  parts.model = await fetchBytes("model/model.onnx", (bytes) => {
    $("progress").value = bytes / page.bytes;
    $("state").textContent = `${(bytes / 1e6).toFixed(1)} of ${(page.bytes / 1e6).toFixed(1)} MB`;
  });
  $("state").textContent = "Opening the model";
  const engine = await openEngine(page, parts);
  $("loading").hidden = true;
  $("form").hidden = false;
  $("note").textContent = `Ready after ${((performance.now() - started) / 1000).toFixed(1)} s.`;
  return { page, engine };
}

/** Red, green and blue of an image file: upright, on white, colours not adapted to the screen. */
async function readImage(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    throw new Error(`${file.name} is no picture that this browser can open`);
  }
  const { width, height } = bitmap;
  if (width * height > MOST_PIXELS) throw new Error(`${file.name} has ${width} x ${height} pixels, more than ${MOST_PIXELS}`);
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return { width, height, data: onWhite(context.getImageData(0, 0, width, height).data) };
}

/** The same colour for the same label, in every text. */
function hueOf(label) {
  let hash = 0;
  for (const letter of label) hash = (hash * 31 + letter.codePointAt(0)) % 360;
  return hash;
}

function showWords(task, answer, encoding) {
  const spans = new Map((answer.spans ?? []).flatMap((span) => Array.from({ length: span.end - span.start }, (_, place) => [span.start + place, [span.label, place === 0]])));
  const words = answer.labels.map((label, index) => {
    const [name, first] = task.bio ? (spans.get(index) ?? ["", false]) : [label ?? "", true];
    const mark = element("small", {}, first ? name : "\u00a0");
    const word = element("span", { class: name ? "word marked" : "word" }, encoding.words[index], mark);
    word.style.setProperty("--hue", hueOf(name));
    return word;
  });
  return [element("div", { class: "words" }, ...words)];
}

function showLabels(task, answer, ranking) {
  const chosen = Array.isArray(answer) ? answer.map(({ label }) => label).join(", ") || "none" : answer.label;
  const bars = ranking.slice(0, SHOWN).map(({ label, score }) => {
    const fill = element("span", { class: "fill" });
    fill.style.width = `${(100 * score).toFixed(1)}%`;
    return element("li", {}, fill, element("span", {}, label), element("span", { class: "score" }, `${(100 * score).toFixed(1)} %`));
  });
  return [element("p", { class: "answer" }, chosen), element("ul", { class: "bars" }, ...bars)];
}

function show({ page }, result) {
  const cards = page.tasks.map((task) => {
    const answer = result.answers[task.name];
    const words = task.problem === "token_classification";
    let content = [element("p", { class: "answer" }, typeof answer === "number" ? answer.toFixed(2) : "")];
    if (words) content = showWords(task, answer, result.encoding);
    else if (typeof answer !== "number") content = showLabels(task, answer, result.rankings[task.name]);
    return element("article", { "data-task": task.name, class: words ? "wide" : "" }, element("h2", {}, task.name), ...content);
  });
  $("answers").replaceChildren(...cards);
  $("time").textContent = `${page.tasks.length} ${page.tasks.length === 1 ? "task" : "tasks"} in ${result.milliseconds.toFixed(0)} ms`;
  $("note").textContent = result.encoding.cut ? `Only the first ${page.text.max_length} tokens were read.` : "";
}

function fail(error) {
  $("note").textContent = `This did not work: ${error.message}`;
  console.error(error);
}

async function main() {
  const opened = await open();
  const { page, engine } = opened;
  let [timer, image, given, running] = [0, null, 0, Promise.resolve()];
  // One call after the other, the newest input last.
  const answer = () => {
    clearTimeout(timer);
    running = running
      .then(async () => {
        const input = page.image ? { image } : { text: $("text").value, pair: $("pair").value.trim() };
        if (page.image ? image === null : input.text.trim() === "") return;
        const result = await engine.predict(input);
        if (page.image && image !== input.image) return; // another picture was given meanwhile
        // For tests and for the curious: what the cards show, in numbers.
        globalThis.lastResult = result;
        show(opened, result);
      })
      .catch(fail);
    return running;
  };
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    answer();
  });
  if (page.text) {
    $("text-input").hidden = false;
    $("pair-box").hidden = !page.text.pairs;
    for (const box of [$("text"), $("pair")]) {
      box.addEventListener("input", () => {
        clearTimeout(timer);
        timer = setTimeout(answer, TYPING_PAUSE);
      });
    }
    for (const example of page.examples) {
      const button = element("button", { type: "button" }, example);
      button.addEventListener("click", () => {
        $("text").value = example;
        answer();
      });
      $("examples").append(button);
    }
    $("text").focus();
  } else {
    $("image-input").hidden = false;
    const take = async (file) => {
      if (!file) return;
      // Whatever comes of this file, nothing more is said of the picture before.
      image = null;
      const number = ++given;
      $("answers").replaceChildren();
      for (const id of ["time", "note"]) $(id).textContent = "";
      $("preview").hidden = true;
      $("drop-words").hidden = false;
      const read = await readImage(file).catch((error) => number === given && fail(error));
      if (number !== given || !read) return;
      image = read;
      $("preview").src = URL.createObjectURL(file);
      $("preview").hidden = false;
      $("drop-words").hidden = true;
      await answer();
    };
    $("image").addEventListener("change", () => take($("image").files[0]).catch(fail));
    for (const name of ["dragover", "dragleave", "drop"]) {
      $("drop").addEventListener(name, (event) => {
        event.preventDefault();
        $("drop").classList.toggle("over", name === "dragover");
        if (name === "drop") take(event.dataTransfer.files[0]).catch(fail);
      });
    }
  }
}

main().catch((error) => {
  $("state").textContent = `The model could not be opened: ${error.message}`;
  console.error(error);
});
