// The layers that the models are made of. Numbers are in PyTorch's order: vectors, or (channels, side, side).

const sigmoid = (x) => 1 / (1 + Math.exp(-x));
const softplus = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));

const LAYERS = {
  dense: (layer, x) => dense(layer, x),
  convolution,
  residual: (layer, x, side) => run(layer.layers, x, side).map((value, i) => x[i] + value),
  pool: (layer, x, side) => maxPool(x, side),
  silu: (layer, x) => x.map((value) => value * sigmoid(value)),
  relu: (layer, x) => x.map((value) => Math.max(value, 0)),
  leaky: (layer, x) => x.map((value) => (value < 0 ? layer.slope * value : value)),
  tanh: (layer, x) => x.map(Math.tanh),
};

// x, a Float64Array, through the layers one after the other; side: of the grid that x is, if it is one.
function run(layers, x, side) {
  for (const layer of layers) {
    x = LAYERS[layer.kind](layer, x, side);
    if (layer.kind === "pool") side /= 2;
  }
  return x;
}

// W x + b: y[start], y[start + stride], ... Four sums at a time, as each addition waits for the one before.
function dense({ weight, bias }, x, y = new Float64Array(bias.length), start = 0, stride = 1) {
  const inputs = x.length;
  const whole = inputs - (inputs % 4);
  for (let o = 0, w = 0; o < bias.length; o++, start += stride) {
    let a = bias[o], b = 0, c = 0, d = 0;
    for (let i = 0; i < whole; i += 4, w += 4) {
      a += weight[w] * x[i];
      b += weight[w + 1] * x[i + 1];
      c += weight[w + 2] * x[i + 2];
      d += weight[w + 3] * x[i + 3];
    }
    for (let i = whole; i < inputs; i++, w++) a += weight[w] * x[i];
    y[start] = a + b + (c + d);
  }
  return y;
}

// A convolution of `width` x `width`, zeros around the grid: `dense` of what each of its places sees.
function convolution(layer, x, side) {
  const { width, bias } = layer;
  const around = (width - 1) / 2;
  const channels = x.length / (side * side);
  const y = new Float64Array(bias.length * side * side);
  const seen = new Float64Array(channels * width * width);
  for (let row = 0; row < side; row++) {
    for (let column = 0; column < side; column++) {
      let at = 0;
      for (let channel = 0; channel < channels; channel++) {
        for (let r = row - around; r <= row + around; r++) {
          for (let c = column - around; c <= column + around; c++) {
            const inside = r >= 0 && r < side && c >= 0 && c < side;
            seen[at++] = inside ? x[(channel * side + r) * side + c] : 0;
          }
        }
      }
      dense(layer, seen, y, row * side + column, side * side);
    }
  }
  return y;
}

// The greatest of every 2 x 2 block.
function maxPool(x, side) {
  const half = side / 2;
  return Float64Array.from({ length: x.length / 4 }, (_, i) => {
    const row = Math.floor(i / half); // of all channels, one below the other
    const at = 2 * row * side + 2 * (i % half);
    return Math.max(x[at], x[at + 1], x[at + side], x[at + side + 1]);
  });
}
