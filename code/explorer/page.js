// Starts the page, once the VAE of the plane and the facts are unpacked. What fails is shown: page.html sees to that.

let PLANE, FACTS;

(async () => {
  const only = { vae_z2: { decoder: PARTS.vae_z2.decoder }, facts: PARTS.facts };
  ({ vae_z2: PLANE, facts: FACTS } = await unpackAll(only, TEXTS));
  const plane = startPlane();
  startDraw();
  await plane;
  await startBetween();
  await startSample();
  document.body.dataset.ready = "yes";
})();
