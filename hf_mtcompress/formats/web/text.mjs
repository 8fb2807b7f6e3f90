// From texts to token ids, as the Python side encodes them: cutting to the longest length, special tokens.

// White space of Python's `str.split()`; `\s` of JavaScript lacks some of it, and has the byte order mark.
const WORD = /[^\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/gu;

/** Words of a text, as Python's `str.split()` finds them. */
export function splitWords(text) {
  return [...text.matchAll(WORD)].map(([word]) => word);
}

/**
 * The word that each token begins in, or null.
 *
 * The text is read as a whole; where a word begins and ends among its tokens is seen by reading the text up to there,
 * as long as tokens are kept.
 */
export function wordsOfTokens(tokenize, text, ids, kept) {
  const before = (end) => {
    const part = tokenize(text.slice(0, end));
    let count = 0;
    while (count < part.length && part[count] === ids[count]) count += 1;
    return count;
  };
  const owners = ids.map(() => null);
  let [last, end, word] = [0, 0, 0];
  for (const found of text.matchAll(WORD)) {
    if (last >= kept) break;
    // The space before a word is its first piece's, where there is a token for it; further ones are nobody's.
    const start = Math.max(found.index - 1, 0);
    const first = start === end ? last : Math.max(last, before(start));
    end = found.index + found[0].length;
    last = Math.max(first, before(end));
    owners.fill(word, first, last);
    word += 1;
  }
  return owners;
}

/**
 * How many tokens of two texts fit, by the rule `longest_first` of the tokenizers library.
 *
 * @param {number} first tokens of the first text
 * @param {number} second tokens of the second text, 0 if there is none
 * @param {number} room tokens that fit, special ones not counted
 * @returns {[number, number]}
 */
export function fitLengths(first, second, room) {
  if (first + second <= room) return [first, second];
  if (second === 0) return [Math.min(first, room), 0];
  const [short, long] = first > second ? [second, first] : [first, second];
  let kept = [short, short > room ? short : Math.max(short, room - short)];
  if (kept[0] + kept[1] > room) {
    const half = Math.floor(room / 2);
    kept = [half, half + (room % 2)];
  }
  const [fewer, more] = [Math.min(kept[0], short), Math.min(kept[1], long)];
  return first > second ? [more, fewer] : [fewer, more];
}

/**
 * Encode one text, or a pair.
 *
 * @param {(text: string) => number[]} tokenize token ids of a text, without special tokens
 * @param {object} settings `text` of page.json: `templates` of one text and of two, `max_length` in tokens,
 *   `truncation_side`, `words` (there are tasks that label them)
 * @param {string} text
 * @param {string} [pair]
 * @returns {{input_ids: number[], attention_mask: number[], token_type_ids: number[], word_ids: (number | null)[],
 *   words: string[], cut: boolean}}
 */
export function encodeText(tokenize, settings, text, pair) {
  const second = pair === undefined || pair === "" ? undefined : pair;
  const template = settings.templates[second === undefined ? "single" : "pair"];
  const special = template.reduce((count, part) => count + (part.ids ? part.ids.length : 0), 0);
  const words = settings.words ? splitWords(text) : [];
  const texts = [tokenize(text), []];
  const end = settings.truncation_side === "left" ? Infinity : settings.max_length;
  const places = settings.words ? wordsOfTokens(tokenize, text, texts[0], end) : [];
  if (second !== undefined) texts[1] = tokenize(second);
  const room = Math.max(settings.max_length - special, 0);
  const kept = fitLengths(texts[0].length, texts[1].length, room);
  const result = { input_ids: [], attention_mask: [], token_type_ids: [], word_ids: [], words };
  for (const part of template) {
    const whole = part.ids ?? texts[part.text];
    const count = part.ids ? whole.length : kept[part.text];
    const start = settings.truncation_side === "left" ? whole.length - count : 0;
    const ids = whole.slice(start, start + count);
    const owners = part.text === 0 && settings.words ? places.slice(start) : [];
    ids.forEach((id, index) => {
      result.input_ids.push(id);
      result.attention_mask.push(1);
      result.token_type_ids.push(part.type);
      result.word_ids.push(part.text === undefined ? null : (owners[index] ?? null));
    });
  }
  return { ...result, cut: kept[0] < texts[0].length || kept[1] < texts[1].length };
}
