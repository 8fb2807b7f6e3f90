// From logits to the answers of the tasks, with the same keys as `predict` in Python.

export function softmax(logits) {
  const top = Math.max(...logits);
  const raised = logits.map((value) => Math.exp(value - top));
  const sum = raised.reduce((total, value) => total + value, 0);
  return raised.map((value) => value / sum);
}

function argmax(values) {
  return values.reduce((best, value, index) => (value > values[best] ? index : best), 0);
}

/** Spans `{label, start, end}` of BIO or IOBES labels by the lenient rules of conlleval, counted in words. */
export function bioSpans(labels) {
  const spans = [];
  let [start, previous, previousType] = [0, "O", ""];
  [...labels, "O"].forEach((label, index) => {
    const [tag, type] = [label[0], label.slice(2) || "_"];
    const starts =
      "BS".includes(tag) || ("IE".includes(tag) && ("OES".includes(previous) || previousType !== type));
    if (previous !== "O" && (starts || tag === "O")) spans.push({ label: previousType, start, end: index });
    if (starts) start = index;
    [previous, previousType] = [tag, type];
  });
  return spans;
}

/**
 * One task's answer.
 *
 * @param {object} task of page.json: `name`, `problem`, `labels`, `bio`
 * @param {number[]} logits (labels,), or (tokens x labels,) row by row for words
 * @param {{word_ids?: (number | null)[], words?: string[]}} encoding
 */
export function decode(task, logits, encoding) {
  if (task.problem === "regression") return logits[0];
  if (task.problem === "multi_label_classification") {
    const scores = logits.map((value) => 1 / (1 + Math.exp(-value)));
    return task.labels.map((label, index) => ({ label, score: scores[index] })).filter(({ score }) => score > 0.5);
  }
  if (task.problem === "single_label_classification") {
    const scores = softmax(logits);
    const best = argmax(scores);
    return { label: task.labels[best], score: scores[best] };
  }
  // A word that was not read (cut, or dropped by the tokenizer) keeps its place, and neither ends a span nor begins one.
  const labels = encoding.words.map(() => null);
  encoding.word_ids.forEach((word, token) => {
    if (word === null || labels[word] !== null) return;
    labels[word] = task.labels[argmax(logits.slice(token * task.labels.length, (token + 1) * task.labels.length))];
  });
  if (!task.bio) return { labels };
  const read = labels.flatMap((label, word) => (label === null ? [] : [word]));
  const spans = bioSpans(read.map((word) => labels[word])).map((span) => {
    const [start, end] = [read[span.start], read[span.end - 1] + 1];
    return { ...span, start, end, text: encoding.words.slice(start, end).join(" ") };
  });
  return { labels, spans };
}

/** Every label with its score, best first; empty for words and numbers. */
export function ranking(task, logits) {
  if (!["single_label_classification", "multi_label_classification"].includes(task.problem)) return [];
  const scores =
    task.problem === "single_label_classification"
      ? softmax(logits)
      : logits.map((value) => 1 / (1 + Math.exp(-value)));
  return task.labels
    .map((label, index) => ({ label, score: scores[index] }))
    .sort((first, second) => second.score - first.score);
}
