// The VAE: functions of code/vae.py by the same names, for one image or latent. Numbers are Float64Arrays.

// Pixels 0 or 1 of an image's grey values, by fixed thresholds: a grey value is the share of 255 that lie below it.
const binarise = (image, thresholds) => Float64Array.from(image, (grey, i) => (thresholds[i] < grey ? 1 : 0));

// mu and logvar of q(z|x).
function encode(model, x) {
  const out = run(model.encoder, x);
  const zDim = out.length / 2;
  const bounded = (a) => Math.min(Math.max(a, -12), 0) + Math.log1p(Math.max(a, 0));
  return { mu: out.slice(0, zDim), logvar: out.slice(zDim).map(bounded) };
}

// Logits of the pixels' means.
const decode = (model, z) => run(model.decoder, z);

// The pixels' means as grey values, not rounded.
const decoderMeans = (model, z) => decode(model, z).map((logit) => 255 * sigmoid(logit));

const reparameterize = (mu, logvar, eps) => mu.map((value, i) => value + Math.exp(0.5 * logvar[i]) * eps[i]);

// What a coupling of the prior does to z_b, given z_a: log-scale and shift.
function priorMaps(coupling, zA) {
  const out = run(coupling.conditioner, zA);
  return { logScale: out.slice(0, out.length / 2).map(Math.tanh), shift: out.slice(out.length / 2) };
}

// z to u, which is N(0, I), and the ladj; without couplings u is z.
function priorForward(couplings, z) {
  const moved = z.length >> 1;
  let ladj = 0;
  for (const coupling of couplings) {
    const zA = z.slice(0, z.length - moved);
    const zB = z.slice(z.length - moved);
    const { logScale, shift } = priorMaps(coupling, zA);
    z = Float64Array.of(...zB.map((value, i) => value * Math.exp(logScale[i]) + shift[i]), ...zA);
    ladj += logScale.reduce((a, b) => a + b);
  }
  return { u: z, ladj };
}

// z = g(u).
function priorInverse(couplings, u) {
  const moved = u.length >> 1;
  for (const coupling of [...couplings].reverse()) {
    const uB = u.slice(0, moved);
    const zA = u.slice(moved);
    const { logScale, shift } = priorMaps(coupling, zA);
    u = Float64Array.of(...zA, ...uB.map((value, i) => (value - shift[i]) * Math.exp(-logScale[i])));
  }
  return u;
}

// log p(x|z) of pixels 0 or 1, in nats.
const bernoulliLogProb = (x, logits) => x.reduce((sum, pixel, i) => sum + pixel * logits[i] - softplus(logits[i]), 0);

// log p(x|z) + log p(z) - log q(z|x) at z = mu + exp(logvar/2) eps, in nats.
function logWeight(model, x, { mu, logvar }, eps) {
  const z = reparameterize(mu, logvar, eps);
  const { u, ladj } = priorForward(model.prior, z);
  const logPrior = ladj - 0.5 * u.reduce((sum, value) => sum + value * value, 0);
  const logQ = -0.5 * eps.reduce((sum, value, i) => sum + logvar[i] + value * value, 0);
  return bernoulliLogProb(x, decode(model, z)) + logPrior - logQ;
}

// The evidence lower bound, the mean of logWeight over several eps.
function elbo(model, x, q, draws) {
  return draws.reduce((sum, eps) => sum + logWeight(model, x, q, eps), 0) / draws.length;
}
