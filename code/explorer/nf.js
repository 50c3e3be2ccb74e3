// The flow: functions of code/nf.py by the same names, for one image. Numbers are Float64Arrays; a half of the numbers
// is (channels, side, side), and side says the size of its grid.

const FLOOR = { weight: 1e-6, rate: 0.1 };
const FARTHEST = 100;

const logSigmoidSlope = (y) => -softplus(y) - softplus(-y);

// Grey values plus u of q(u|x), and log q(u|x), from uniform noise in [0, 1). The network sees 2 x 2 blocks of pixels.
// Where none is learned, u is the noise itself.
function dequantise({ dequantiser }, image, noise) {
  if (!dequantiser) return { v: Float64Array.from(noise, (each, i) => image[i] + each), logQ: 0 };
  const side = Math.sqrt(image.length), half = side / 2;
  const at = (i) => {
    const row = Math.floor(i / side), column = i % side;
    return ((2 * (row % 2) + (column % 2)) * half + (row >> 1)) * half + (column >> 1);
  };
  const blocks = new Float64Array(image.length);
  for (let i = 0; i < image.length; i++) blocks[at(i)] = image[i] / 128 - 1;
  const out = run(dequantiser, blocks, half);
  let logQ = 0;
  const v = Float64Array.from(noise, (each, i) => {
    const inside = Math.min(Math.max(each, 2 ** -25), 1 - 2 ** -24);
    const logistic = Math.log(inside) - Math.log1p(-inside);
    const logScale = 2 * Math.tanh(out[at(i)]);
    const y = logistic * Math.exp(logScale) + out[image.length + at(i)];
    logQ -= logScale + logSigmoidSlope(y) - logSigmoidSlope(logistic);
    return image[i] + sigmoid(y);
  });
  return { v, logQ };
}

// The logit of r1 = lambda/2 + (1 - lambda) v/256, lambda = shrink, and the ladj of all numbers together.
function toLogits(v, shrink) {
  const constant = Math.log1p(-shrink) - Math.log(256);
  let ladj = 0;
  const y = v.map((value) => {
    const logR1 = Math.log(shrink / 2 + ((1 - shrink) / 256) * value);
    const logR0 = Math.log(shrink / 2 + ((1 - shrink) / 256) * (256 - value));
    ladj += constant - logR1 - logR0;
    return logR1 - logR0;
  });
  return { y, ladj };
}

const fromLogits = (y, shrink) => y.map((value) => (256 * (sigmoid(value) - shrink / 2)) / (1 - shrink));

// z = logit F(x) with the CDF F of a mixture of logistics, and its ladj.
function mixtureLogit(x, { weight, mu, rate }) {
  let below = FLOOR.weight * sigmoid(FLOOR.rate * x), above = FLOOR.weight * sigmoid(-FLOOR.rate * x);
  let density = (FLOOR.rate * below * above) / FLOOR.weight;
  for (let j = 0; j < mu.length; j++) {
    const u = (x - mu[j]) * rate[j];
    const left = sigmoid(u), right = sigmoid(-u);
    below += weight[j] * left;
    above += weight[j] * right;
    density += weight[j] * left * right * rate[j];
  }
  const logBelow = Math.log(below), logAbove = Math.log(above);
  return { z: logBelow - logAbove, ladj: Math.log(density) + Math.log(below + above) - logBelow - logAbove };
}

// x with logit F(x) = z: Newton's method inside a bracket, a bisection step where it would leave that or is too long.
// Throws an Error if it has not converged after 300 steps.
function invertMixture(z, mixture) {
  const { weight, mu, rate } = mixture;
  const ends = mu.map((each, j) => each + z / rate[j]);
  let low = Math.min(...ends, z / FLOOR.rate), high = Math.max(...ends, z / FLOOR.rate);
  const total = weight.reduce((sum, each) => sum + each, 0);
  let x = ends.reduce((sum, end, j) => sum + (weight[j] / total) * end, 0), length = high - low;
  for (let step = 0; step < 300; step++) {
    const reached = mixtureLogit(x, mixture);
    if (reached.z < z) low = x;
    if (reached.z > z) high = x;
    const newton = (z - reached.z) * Math.exp(-reached.ladj);
    const close = 1e-12 * (1 + Math.abs(x));
    if (Math.abs(newton) <= close || high - low <= close || Math.abs(z - reached.z) <= 1e-12 * (1 + Math.abs(z))) {
      return x;
    }
    const inside = low < x + newton && x + newton < high && Math.abs(newton) <= length / 2;
    const next = inside ? x + newton : low + (high - low) / 2;
    length = Math.abs(next - x);
    x = next;
  }
  throw new Error("the inverse of a mixture did not converge");
}

// What x_a says of each number of x_b: a list of {logScale, shift, mixture}.
function maps(coupling, xA, side) {
  const out = run(coupling.conditioner, xA, side);
  const numbers = xA.length, components = coupling.components;
  const clamped = (value, limit = coupling.limit) => Math.min(Math.max(value, -limit), limit);
  return Array.from({ length: numbers }, (_, n) => {
    const channel = Math.floor(n / (side * side)), channels = numbers / (side * side);
    const of = (kind) => Array.from({ length: components }, (_, j) => out[(2 + kind * components + j) * numbers + n]);
    const mixture = {
      weight: of(0).map((logWeight) => Math.exp(clamped(logWeight))),
      rate: of(1).map((logRate) => Math.exp(clamped(logRate))),
      mu: of(2).map((mu, j) => mu + coupling.spread[j * channels + channel]),
    };
    const shift = clamped(out[numbers + n], FARTHEST);
    return { logScale: coupling.gain[channel] * Math.tanh(out[n]), shift, mixture };
  });
}

// The transformed x_b, and the coupling's ladj.
function couplingForward(coupling, xA, xB, side) {
  let ladj = 0;
  const said = maps(coupling, xA, side);
  const zB = xB.map((x, n) => {
    const { logScale, shift, mixture } = said[n];
    const { z, ladj: more } = coupling.components ? mixtureLogit(x, mixture) : { z: x, ladj: 0 };
    ladj += logScale + more;
    return z * Math.exp(logScale) + shift;
  });
  return { zB, ladj };
}

function couplingInverse(coupling, xA, zB, side) {
  const said = maps(coupling, xA, side);
  return zB.map((z, n) => {
    const { logScale, shift, mixture } = said[n];
    const x = (z - shift) * Math.exp(-logScale);
    return coupling.components ? invertMixture(x, mixture) : x;
  });
}

// The two colours of a grid's checkerboard: of a square grid (1, side, side) two of (2, side/2, side/2), main diagonals
// of its 2 x 2 blocks and the others; of such a half, (2, side, side), its two channels.
function split(x, side) {
  if (x.length === 2 * side * side) return [x.slice(0, side * side), x.slice(side * side), side];
  const half = side / 2;
  const blocks = (place) => Array.from({ length: half * half }, (_, i) => {
    const row = 2 * Math.floor(i / half) + (place >> 1), column = 2 * (i % half) + (place & 1);
    return x[row * side + column];
  });
  return [Float64Array.of(...blocks(0), ...blocks(3)), Float64Array.of(...blocks(1), ...blocks(2)), half];
}

// The inverse of split: the grid and its side.
function join(xA, xB, side) {
  if (xA.length === side * side) return [Float64Array.of(...xA, ...xB), side];
  const x = new Float64Array(4 * side * side);
  for (let i = 0; i < side * side; i++) {
    const at = 2 * Math.floor(i / side) * 2 * side + 2 * (i % side);
    x[at] = xA[i];
    x[at + 1] = xB[i];
    x[at + 2 * side] = xB[side * side + i];
    x[at + 2 * side + 1] = xA[side * side + i];
  }
  return [x, 2 * side];
}

// Values in [0, 256] to z and ladj.
function forward(model, v) {
  let { y: rest, ladj } = toLogits(v, model.shrink);
  let side = Math.sqrt(v.length), xA, xB;
  const z = new Float64Array(v.length);
  let done = 0;
  for (const level of model.levels) {
    [xA, xB, side] = split(rest, side);
    for (const coupling of level) {
      const moved = couplingForward(coupling, xA, xB, side);
      [xA, xB, ladj] = [moved.zB, xA, ladj + moved.ladj]; // the next one transforms what this one saw
    }
    z.set(xA, done);
    done += xA.length;
    rest = xB;
  }
  z.set(rest, done);
  return { z, ladj };
}

// z to the values that forward maps to it.
function inverse(model, z) {
  let side = Math.sqrt(z.length) >> ((model.levels.length + 1) >> 1);
  let rest = z.slice(z.length - (z.length >> model.levels.length));
  for (const level of [...model.levels].reverse()) {
    const n = rest.length;
    let xA = z.slice(z.length - 2 * n, z.length - n), xB = rest;
    for (const coupling of [...level].reverse()) [xA, xB] = [xB, couplingInverse(coupling, xB, xA, side)];
    [rest, side] = join(xA, xB, side);
  }
  return fromLogits(rest, model.shrink);
}

// log p(v), in nats.
function logProb(model, v) {
  const { z, ladj } = forward(model, v);
  return ladj - 0.5 * z.reduce((sum, value) => sum + value * value + Math.log(2 * Math.PI), 0);
}

// log p(x + u) - log q(u|x) for one image, in nats.
function bound(model, image, noise) {
  const { v, logQ } = dequantise(model, image, noise);
  return logProb(model, v) - logQ;
}

const bitsPerDim = (logPx, dimensions) => -logPx / (dimensions * Math.log(2));
