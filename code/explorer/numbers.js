// Numbers out of text: what `packed` and `text` of code/explorer.py wrote.

// Base 85 as Python's base64.b85encode writes it, but for a dot where that has "<", which HTML could take for a tag.
const ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;.=>?@^_`{|}~";

// The `size` bytes that `text` stands for, five digits for each four.
function fromBase85(text, size) {
  const digit = new Uint8Array(128);
  for (let i = 0; i < ALPHABET.length; i++) digit[ALPHABET.charCodeAt(i)] = i;
  const bytes = new Uint8Array((text.length / 5) * 4);
  for (let i = 0, at = 0; i < text.length; i += 5) {
    let value = 0;
    for (let k = 0; k < 5; k++) value = value * 85 + digit[text.charCodeAt(i + k)];
    for (let k = 3; k >= 0; k--) {
      bytes[at + k] = value % 256;
      value = Math.floor(value / 256);
    }
    at += 4;
  }
  return bytes.subarray(0, size);
}

// What zlib made `bytes` of.
async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// A part's layers: `part` is {content, bits, size}, and each {type, shape} in its content becomes an array of numbers.
async function unpack(part, text) {
  const stream = { bytes: await inflate(fromBase85(text.trim(), part.size)), at: 0, bits: part.bits };
  return restore(part.content, stream);
}

function restore(value, stream) {
  if (Array.isArray(value)) return value.map((each) => restore(each, stream));
  if (value === null || typeof value !== "object") return value;
  if (value.type) return READERS[value.type](stream, ...value.shape);
  return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, restore(each, stream)]));
}

const READERS = {
  bytes: (stream, ...shape) => take(stream, shape.reduce((a, b) => a * b)),
  vector: (stream, size) => new Float32Array(take(stream, 4 * size).slice().buffer),
  matrix: readMatrix,
};

function take(stream, size) {
  stream.at += size;
  return stream.bytes.subarray(stream.at - size, stream.at);
}

// A matrix, row by row: each row's step, then the upper 8 of every number's `bits`, then the lower ones, close together.
function readMatrix(stream, rows, columns) {
  const steps = READERS.vector(stream, rows);
  const low = stream.bits - 8; // bits of a number's lower part
  const upper = new Int8Array(take(stream, rows * columns).slice().buffer);
  const lower = take(stream, Math.ceil((rows * columns * low) / 8));
  const matrix = new Float32Array(rows * columns);
  const mask = 2 ** low - 1;
  for (let i = 0, bit = 0; i < matrix.length; i++, bit += low) {
    const byte = bit >> 3;
    const three = lower[byte] | (lower[byte + 1] << 8) | (lower[byte + 2] << 16); // past the end: 0
    matrix[i] = (upper[i] * 2 ** low + ((three >> (bit & 7)) & mask)) * steps[Math.floor(i / columns)];
  }
  return matrix;
}

// All models and facts, from the descriptions of their parts and the texts of their numbers; a part "" is all of it.
async function unpackAll(parts, texts) {
  const models = {};
  for (const [run, described] of Object.entries(parts)) {
    const found = {};
    for (const [name, part] of Object.entries(described)) found[name] = await unpack(part, texts[`${run}.${name}`]);
    models[run] = "" in found ? found[""] : found;
  }
  const { facts } = models;
  facts.draws = rowsOf(facts.eps, facts.eps.length / facts.zDim);
  return models;
}

// An array of numbers as `rows` arrays of equal length.
function rowsOf(numbers, rows) {
  const length = numbers.length / rows;
  return Array.from({ length: rows }, (_, i) => numbers.subarray(i * length, (i + 1) * length));
}
