// A model in the browser: its processor's pixels, its tokenizer's ids, and its two graphs.

import * as ort from "onnxruntime-web/wasm";
import { Tokenizer } from "@huggingface/tokenizers";

const MAX_PIXELS = 4096 * 4096; // of a canvas, on phones
// Support and weight at a distance, by Pillow's numbers of its filters, as in `resample` of preprocessor_config.json.
const FILTERS = {
  2: [1, x => Math.max(0, 1 - Math.abs(x))], // bilinear
  3: [2, x => cubic(Math.abs(x))], // bicubic
};

function cubic(x) {
  return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

export class Model {
  /**
   * Download and prepare a model.
   * @param settings what the page says of it: files, sizes, logit scale and template
   * @param wasm address and integrity of the runtime
   * @param onProgress called with the share of bytes that have come, in [0, 1]
   */
  static async load(settings, wasm, onProgress) {
    const sizes = Object.values(settings.graphs).map(graph => graph.size);
    const total = sizes.reduce((sum, size) => sum + size);
    let received = 0;
    const count = bytes => onProgress(Math.min(1, (received += bytes) / total));
    const json = async name => JSON.parse(new TextDecoder().decode(await download(name)));
    const [binary, image, text, processor, tokenizer, tokens] = await Promise.all([
      download(wasm.href, { integrity: wasm.integrity }),
      download(settings.graphs.image.path, {}, count),
      download(settings.graphs.text.path, {}, count),
      json("preprocessor_config.json"),
      json("tokenizer.json"),
      json("tokenizer_config.json"),
    ]);
    ort.env.wasm.wasmBinary = binary;
    ort.env.wasm.numThreads = 1; // more need headers that a page within another page cannot have
    const model = new Model();
    model.settings = settings;
    model.processor = processor;
    model.maxTokens = tokens.model_max_length;
    model.tokenizer = new Tokenizer(tokenizer, tokens);
    model.image = await ort.InferenceSession.create(image, { executionProviders: ["wasm"] });
    model.text = await ort.InferenceSession.create(text, { executionProviders: ["wasm"] });
    model.embeddings = new Map(); // by caption
    return model;
  }

  /** Return the embedding of an image, which has length 1. */
  async embedImage(image) {
    const { height, width } = this.processor.crop_size;
    const pixel_values = new ort.Tensor("float32", toPixelValues(image, this.processor), [1, 3, height, width]);
    return (await this.image.run({ pixel_values })).image_embeds.data;
  }

  /** Return the embedding of a caption, which has length 1. */
  async embedCaption(caption) {
    if (!this.embeddings.has(caption)) {
      const ids = this.tokenize(caption);
      const row = values => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, ids.length]);
      const inputs = { input_ids: row(ids), attention_mask: row(ids.map(() => 1)) };
      this.embeddings.set(caption, (await this.text.run(inputs)).text_embeds.data);
    }
    return this.embeddings.get(caption);
  }

  /** Return the ids of a caption, cut to the model's maximum as in Python: the last one, which is special, stays. */
  tokenize(caption) {
    const { ids } = this.tokenizer.encode(caption);
    return ids.length > this.maxTokens ? [...ids.slice(0, this.maxTokens - 1), ids.at(-1)] : ids;
  }

  /** Return the probability of each label for the embedding of an image, the best first. */
  async classify(imageEmbedding, labels) {
    const logits = [];
    const known = new Map(); // labels by their ids
    for (const label of labels) {
      const ids = this.tokenize(label).join();
      if (known.has(ids)) throw new Error(`“${known.get(ids)}” and “${label}” are one text to the model; leave one out.`);
      known.set(ids, label);
      const embedding = await this.embedCaption(this.settings.template.replace("{}", () => label));
      logits.push(this.settings.logit_scale * embedding.reduce((sum, value, i) => sum + value * imageEmbedding[i], 0));
    }
    const best = Math.max(...logits);
    const weights = logits.map(logit => Math.exp(logit - best));
    const sum = weights.reduce((a, b) => a + b);
    return labels
      .map((label, i) => ({ label, score: weights[i] / sum }))
      .sort((a, b) => b.score - a.score);
  }
}

async function download(address, options, onBytes = () => {}) {
  const response = await fetch(address, options);
  if (!response.ok) throw new Error(`${address} was answered with ${response.status}`);
  const counted = new TransformStream({
    transform(chunk, controller) {
      onBytes(chunk.length);
      controller.enqueue(chunk);
    },
  });
  return new Uint8Array(await new Response(response.body.pipeThrough(counted)).arrayBuffer());
}

/** Decode a file as people see it, upright and over white: width, height, and four bytes a pixel. */
export async function readImage(file) {
  const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
  const scale = Math.min(1, Math.sqrt(MAX_PIXELS / (bitmap.width * bitmap.height)));
  const [width, height] = [Math.floor(bitmap.width * scale), Math.floor(bitmap.height * scale)];
  const context = new OffscreenCanvas(width, height).getContext("2d", { alpha: false });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}

/** Return a graph's input for an image: resized, cut to its center, and normalized; a plane a color. */
export function toPixelValues(image, { size, crop_size: crop, resample, rescale_factor, image_mean, image_std }) {
  const edge = size.shortest_edge ?? 0;
  const scaled = length => Math.floor((edge * length) / Math.min(image.width, image.height));
  const width = size.width ?? scaled(image.width);
  const height = size.height ?? scaled(image.height);
  const { data } = resizeRows(resizeRows(image, width, resample), height, resample);
  const [left, top] = [Math.floor((width - crop.width) / 2), Math.floor((height - crop.height) / 2)];
  const values = new Float32Array(3 * crop.height * crop.width);
  for (let color = 0, i = 0; color < 3; color++)
    for (let y = 0; y < crop.height; y++)
      for (let x = 0; x < crop.width; x++)
        values[i++] =
          (data[4 * ((top + y) * width + left + x) + color] * rescale_factor - image_mean[color]) / image_std[color];
  return values;
}

/**
 * Resize the rows of an image as Pillow does, antialiased and rounded to bytes, and return it transposed: what a canvas
 * draws differs by many levels. Called twice, it resizes both axes.
 */
function resizeRows({ data, width, height }, size, resample) {
  const [support, weigh] = FILTERS[resample];
  const scale = width / size;
  const stretch = Math.max(scale, 1);
  const resized = new Uint8ClampedArray(4 * size * height);
  for (let x = 0; x < size; x++) {
    const center = (x + 0.5) * scale;
    const start = Math.max(0, Math.floor(center - support * stretch + 0.5));
    const end = Math.min(width, Math.floor(center + support * stretch + 0.5));
    const weights = Float64Array.from({ length: end - start }, (_, i) => weigh((start + i + 0.5 - center) / stretch));
    const sum = weights.reduce((a, b) => a + b);
    for (let y = 0; y < height; y++) {
      const from = 4 * (y * width + start);
      let [red, green, blue] = [0, 0, 0];
      for (let i = 0; i < weights.length; i++) {
        red += weights[i] * data[from + 4 * i];
        green += weights[i] * data[from + 4 * i + 1];
        blue += weights[i] * data[from + 4 * i + 2];
      }
      resized.set([red / sum, green / sum, blue / sum], 4 * (x * height + y));
    }
  }
  return { data: resized, width: height, height: size };
}
