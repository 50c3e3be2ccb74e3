// The worker: computes for the page what would make it wait. It answers one question after the other.

const rounded = (image) => Uint8ClampedArray.from(image); // to the nearest grey value, as PyTorch's side does

const ANSWERS = {
  // Pixel means at latents of the VAE on the plane.
  plane: ({ vae_z2 }, latents) => latents.map((z) => rounded(decoderMeans(vae_z2, z))),
  // Where the VAE on the plane puts images: mean and standard deviation.
  positions: (models, images) => images.map((image) => position(models, image)),
  // Pixel means of the VAE with a flow prior, from u of N(0, I).
  vae: ({ vae_best }, u) => rounded(decoderMeans(vae_best, priorInverse(vae_best.prior, u))),
  gan: ({ gan }, z) => rounded(generated(gan, z)),
  flow: ({ nf }, z) => Uint8ClampedArray.from(inverse(nf, z), Math.floor),
  // Latents of an image: the VAE's, at its posterior mean, and the flow's.
  latents: (models, image) => ({
    vae: priorForward(models.vae_best.prior, encode(models.vae_best, seen(models, image)).mu).u,
    flow: forward(models.nf, dequantise(models.nf, image, models.facts.noise).v).z,
  }),
  // What the quick ones say of an image.
  opinions(models, image) {
    const x = seen(models, image);
    const q = encode(models.vae_best, x);
    return {
      reconstruction: rounded(decoderMeans(models.vae_best, q.mu)),
      elbo: elbo(models.vae_best, x, q, models.facts.draws),
      real: sigmoid(discriminate(models.gan, image)),
      classes: classify(models.judge, image),
      position: position(models, image),
    };
  },
  bits({ nf, facts }, image) {
    return bitsPerDim(bound(nf, image, facts.noise), image.length);
  },
};

const seen = ({ facts }, image) => binarise(image, facts.thresholds);

function position(models, image) {
  const { mu, logvar } = encode(models.vae_z2, seen(models, image));
  return { mu, deviation: logvar.map((each) => Math.exp(each / 2)) };
}

let models;

onmessage = async ({ data }) => {
  if (data.parts) {
    models = unpackAll(data.parts, data.texts);
    return;
  }
  const { id, name, given } = data;
  try {
    postMessage({ id, answer: ANSWERS[name](await models, ...given) });
  } catch (error) {
    postMessage({ id, error: String(error) });
  }
};
