// Sample: new images of each model; VAE and flow at a temperature, which multiplies the noise.

const SAMPLES = 16; // of each model

const samples = { tiles: {}, noise: {}, turn: 0 };

const temperature = () => byId("temperature").value / 100;

// Computes the images of the noise one after the other; a newer call ends an older one.
async function showSamples() {
  const turn = ++samples.turn;
  const progress = byId("progress");
  progress.max = ROWS.length * SAMPLES;
  progress.value = 0;
  progress.style.visibility = "visible";
  for (const row of ROWS) {
    const factor = row === "gan" ? 1 : temperature();
    for (let i = 0; i < SAMPLES; i++) {
      const image = await ask(row, samples.noise[row][i].map((value) => factor * value));
      if (turn !== samples.turn) return;
      paint(samples.tiles[row][i], image);
      progress.value++;
    }
  }
  progress.style.visibility = "hidden";
}

function drawNoise() {
  for (const row of ROWS) samples.noise[row] = Array.from({ length: SAMPLES }, () => normal(DIMENSIONS()[row]));
}

async function startSample() {
  for (const row of ROWS) {
    samples.tiles[row] = Array.from({ length: SAMPLES }, (_, i) => addTile(byId(`samples-${row}`), `sample ${i + 1}`));
  }
  byId("new-samples").addEventListener("click", () => {
    drawNoise();
    showSamples();
  });
  byId("temperature").addEventListener("input", () => {
    byId("temperature-value").textContent = temperature().toFixed(2);
    showSamples();
  });
  drawNoise();
  byId("sampling").inert = false;
  await showSamples();
}
