// From pixels to model inputs, as Pillow and the image processors of transformers compute them, to the last bit of a
// pixel: a canvas scales in its own way, which would change answers.

export const MOST_PIXELS = 89478485; // of a picture, as Pillow's MAX_IMAGE_PIXELS

const FILTERS = {
  nearest: null,
  box: { support: 0.5, at: (x) => (x > -0.5 && x <= 0.5 ? 1 : 0) },
  bilinear: { support: 1, at: (x) => Math.max(0, 1 - Math.abs(x)) },
  hamming: {
    support: 1,
    at: (x) => {
      const d = Math.abs(x);
      if (d === 0) return 1;
      if (d >= 1) return 0;
      return (Math.sin(d * Math.PI) / (d * Math.PI)) * (0.54 + 0.46 * Math.cos(d * Math.PI));
    },
  },
  bicubic: {
    support: 2,
    at: (x) => {
      const [a, d] = [-0.5, Math.abs(x)];
      if (d < 1) return ((a + 2) * d - (a + 3)) * d * d + 1;
      return d < 2 ? (((d - 5) * d + 8) * d - 4) * a : 0;
    },
  },
  lanczos: {
    support: 3,
    at: (x) => {
      const sinc = (y) => (y === 0 ? 1 : Math.sin(y * Math.PI) / (y * Math.PI));
      return x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0;
    },
  },
};
const ONE = 2 ** 22; // Pillow computes with so many steps to a whole

/** For each place of the result: the first source place and the weights from there on, in Pillow's whole numbers. */
function weightsOf(from, to, filter) {
  const scale = from / to;
  const stretch = Math.max(scale, 1);
  const support = filter.support * stretch;
  return Array.from({ length: to }, (_, place) => {
    const center = (place + 0.5) * scale;
    const first = Math.max(Math.trunc(center - support + 0.5), 0);
    const end = Math.min(Math.trunc(center + support + 0.5), from);
    const raw = Array.from({ length: end - first }, (_unused, index) =>
      filter.at((index + first - center + 0.5) * (1 / stretch)), // a product, not a quotient: they round differently
    );
    const sum = raw.reduce((total, value) => total + value, 0);
    const weights = raw.map((value) => {
      const share = (sum === 0 ? value : value / sum) * ONE;
      return Math.trunc(share < 0 ? share - 0.5 : share + 0.5);
    });
    return { first, weights };
  });
}

/** One direction: `count` lines of `from` pixels, with `step` values between pixels and `stride` between lines. */
function scaleLines(source, count, from, to, filter, source_steps, target_steps) {
  const target = new Uint8Array(count * to * 3);
  const places = weightsOf(from, to, filter);
  for (let line = 0; line < count; line++) {
    for (let place = 0; place < to; place++) {
      const { first, weights } = places[place];
      for (let channel = 0; channel < 3; channel++) {
        let sum = ONE / 2;
        for (let index = 0; index < weights.length; index++) {
          sum += weights[index] * source[line * source_steps[0] + (first + index) * source_steps[1] + channel];
        }
        const value = Math.floor(sum / ONE);
        target[line * target_steps[0] + place * target_steps[1] + channel] = value < 0 ? 0 : value > 255 ? 255 : value;
      }
    }
  }
  return target;
}

/**
 * Red, green and blue of pixels that may be transparent: what lies behind them is white, as Pillow computes it.
 *
 * @param {Uint8Array | Uint8ClampedArray} colours red, green, blue and alpha of every pixel, row by row
 * @returns {Uint8Array}
 */
export function onWhite(colours) {
  const data = new Uint8Array((colours.length / 4) * 3);
  for (let from = 0, to = 0; from < colours.length; from += 4) {
    const alpha = colours[from + 3];
    for (let channel = 0; channel < 3; channel++) {
      const scaled = 128 * (colours[from + channel] * alpha + 255 * (255 - alpha) + 128);
      data[to++] = ((scaled >> 8) + scaled) >> 15;
    }
  }
  return data;
}

/** Source places for `nearest`; Pillow adds the steps up, and so rounds in its own way. */
function nearestPlaces(from, to) {
  const step = from / to;
  let place = step * 0.5;
  return Array.from({ length: to }, () => {
    const found = Math.floor(place);
    place += step;
    return found;
  });
}

/**
 * Scale an image as `PIL.Image.resize` does.
 *
 * @param {{width: number, height: number, data: Uint8Array}} image red, green and blue of every pixel, row by row
 * @param {number} width
 * @param {number} height
 * @param {string} resample a key of FILTERS
 * @param {boolean} tallFirst height before width where it shrinks more than twice as much, as Pillow does from 13 on
 */
export function resizeImage(image, width, height, resample, tallFirst) {
  if (image.width === width && image.height === height) return image;
  const filter = FILTERS[resample];
  if (filter === null) {
    const [columns, rows] = [nearestPlaces(image.width, width), nearestPlaces(image.height, height)];
    const data = new Uint8Array(width * height * 3);
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const from = (rows[y] * image.width + columns[x]) * 3;
        data.set(image.data.subarray(from, from + 3), (y * width + x) * 3);
      }
    }
    return { width, height, data };
  }
  const across = (source) => ({
    ...source,
    width,
    data: scaleLines(source.data, source.height, source.width, width, filter, [source.width * 3, 3], [width * 3, 3]),
  });
  const down = (source) => ({
    ...source,
    height,
    data: scaleLines(source.data, source.width, source.height, height, filter, [3, source.width * 3], [3, source.width * 3]),
  });
  if (image.width === width) return down(image);
  if (image.height === height) return across(image);
  // Pixels are rounded between the two, so the order shows.
  const [narrower, lower] = [image.width - width, image.height - height];
  return tallFirst && lower > 0 && lower > 2 * narrower ? across(down(image)) : down(across(image));
}

/** The middle of an image; what lies outside of it is black. */
export function centerCrop(image, width, height) {
  const [left, top] = [Math.floor((image.width - width) / 2), Math.floor((image.height - height) / 2)];
  const data = new Uint8Array(width * height * 3);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const [from_x, from_y] = [x + left, y + top];
      if (from_x < 0 || from_y < 0 || from_x >= image.width || from_y >= image.height) continue;
      const from = (from_y * image.width + from_x) * 3;
      data.set(image.data.subarray(from, from + 3), (y * width + x) * 3);
    }
  }
  return { width, height, data };
}

/** Width and height after `size` of an image processor: both sides, or the shortest one with the shape kept. */
export function targetSize(image, size) {
  if (size.shortest_edge === undefined) return [size.width, size.height];
  const [short, long] = [Math.min(image.width, image.height), Math.max(image.width, image.height)];
  const other = Math.trunc((size.shortest_edge * long) / short);
  return image.width <= image.height ? [size.shortest_edge, other] : [other, size.shortest_edge];
}

/**
 * Pixel values of one image, channel by channel.
 *
 * @param {{width: number, height: number, data: Uint8Array}} image
 * @param {object} settings `image` of page.json
 * @returns {{data: Float32Array, shape: number[]}} shape (1, 3, height, width)
 */
export function encodeImage(image, settings) {
  let scaled = image;
  if (settings.size) {
    scaled = resizeImage(scaled, ...targetSize(scaled, settings.size), settings.resample, settings.tall_first);
  }
  if (settings.crop) scaled = centerCrop(scaled, settings.crop.width, settings.crop.height);
  const { width, height } = scaled;
  const data = new Float32Array(3 * width * height);
  for (let channel = 0; channel < 3; channel++) {
    for (let place = 0; place < width * height; place++) {
      const value = scaled.data[place * 3 + channel] * settings.factor;
      data[channel * width * height + place] = (value - settings.mean[channel]) / settings.std[channel];
    }
  }
  return { data, shape: [1, 3, height, width] };
}
