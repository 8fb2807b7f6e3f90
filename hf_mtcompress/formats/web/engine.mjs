// One model: opened once, asked many times. Knows nothing of a page, so that it runs in Node too.

import { decode, ranking } from "./answers.mjs";
import { encodeImage } from "./image.mjs";
import { encodeText } from "./text.mjs";

/**
 * Open the model that page.json describes.
 *
 * @param {object} page content of page.json
 * @param {object} parts `ort` (onnxruntime-web), `Tokenizer` (@huggingface/tokenizers; not needed for images), `model`
 *   (bytes of the graph), `tokenizer` and `tokenizerConfig` (content of the two JSON files)
 */
export async function openEngine(page, { ort, Tokenizer, model, tokenizer, tokenizerConfig }) {
  const session = await ort.InferenceSession.create(model, {
    executionProviders: ["wasm"],
    graphOptimizationLevel: "all",
    logSeverityLevel: 3,
  });
  const encoder = page.text ? new Tokenizer(tokenizer, tokenizerConfig) : null;
  return new Engine(page, ort, session, encoder);
}

class Engine {
  constructor(page, ort, session, tokenizer) {
    Object.assign(this, { page, ort, session, tokenizer });
  }

  /**
   * Answers of all tasks.
   *
   * @param {{text?: string, pair?: string, image?: {width: number, height: number, data: Uint8Array}}} input
   * @returns {Promise<{answers: object, logits: object, rankings: object, encoding: object, milliseconds: number}>}
   *   by task name; the time covers everything from the input to the answers
   */
  async predict(input) {
    const started = performance.now();
    const { feeds, encoding } = this.page.image ? this.#pixels(input.image) : this.#tokens(input.text, input.pair);
    const found = await this.session.run(feeds);
    const [answers, logits, rankings] = [{}, {}, {}];
    for (const task of this.page.tasks) {
      const row = Array.from(found[task.output].data);
      logits[task.name] = row;
      answers[task.name] = decode(task, row, encoding);
      rankings[task.name] = ranking(task, row);
    }
    return { answers, logits, rankings, encoding, milliseconds: performance.now() - started };
  }

  #pixels(image) {
    const { data, shape } = encodeImage(image, this.page.image);
    return { feeds: { [this.page.inputs[0]]: new this.ort.Tensor("float32", data, shape) }, encoding: {} };
  }

  #tokens(text, pair) {
    const tokenize = (part) => this.tokenizer.encode(part, { add_special_tokens: false }).ids;
    const encoding = encodeText(tokenize, this.page.text, text, pair);
    const feeds = {};
    for (const name of this.page.inputs) {
      const values = BigInt64Array.from(encoding[name].map(BigInt));
      feeds[name] = new this.ort.Tensor("int64", values, [1, values.length]);
    }
    return { feeds, encoding };
  }
}
