// Between: the great circle between two latents, in all three models.

const POINTS = 9; // images in a row, both ends included
const ROWS = ["vae", "gan", "flow"]; // questions to the worker, and the rows' names
const DIMENSIONS = () => ({ vae: FACTS.zDim, gan: FACTS.noiseDim, flow: SIDE * SIDE });

const between = { ends: [null, null], tiles: {}, turn: 0 };

// An end: latents for each model, drawn afresh, or those of a test image: not the old end's, nor of the other's class.
async function drawEnd(ofImages, old, other) {
  if (!ofImages) return Object.fromEntries(ROWS.map((row) => [row, normal(DIMENSIONS()[row])]));
  const allowed = (each) => each !== old?.index && FACTS.labels[each] !== FACTS.labels[other?.index];
  const index = anyOf(FACTS.ends.filter(allowed));
  const noises = rowsOf(FACTS.endNoise, FACTS.ends.length);
  const gan = Float64Array.from(noises[FACTS.ends.indexOf(index)]);
  return { index, gan, ...(await ask("latents", TEST_IMAGES()[index])) };
}

// Shows the images at the slider's place.
const showPoint = latest(async () => {
  const t = byId("turn").value / 100;
  const [start, end] = between.ends;
  for (const row of ROWS) paint(byId(`now-${row}`), await ask(row, slerp(start[row], end[row], t)));
});

// Shows the rows between the ends anew, model by model; a newer call ends an older one.
async function showRows() {
  const turn = ++between.turn;
  const [start, end] = between.ends;
  [["from", start], ["to", end]].forEach(([id, { index }]) => {
    byId(id).hidden = byId(`${id}-name`).hidden = index === undefined;
    if (index === undefined) return;
    paint(byId(id), TEST_IMAGES()[index]);
    byId(`${id}-name`).textContent = nameOf(index);
  });
  showPoint();
  for (const row of ROWS) {
    for (let i = 0; i < POINTS; i++) {
      const image = await ask(row, slerp(start[row], end[row], i / (POINTS - 1)));
      if (turn !== between.turn) return;
      paint(between.tiles[row][i], image);
    }
  }
}

async function startBetween() {
  for (const row of ROWS) {
    between.tiles[row] = Array.from({ length: POINTS }, (_, i) => addTile(byId(`row-${row}`), `image ${i + 1} of ${POINTS}`));
  }
  const ofImages = () => byId("of-images").checked;
  const fits = (end) => end && (end.index !== undefined) === ofImages();
  const renew = latest(async (...which) => {
    const ends = between.ends.map((end, i) => (which.includes(i) || !fits(end) ? null : end));
    for (const i of [0, 1]) ends[i] ??= await drawEnd(ofImages(), between.ends[i], ends[1 - i]);
    between.ends = ends;
    showRows();
  });
  byId("new-start").addEventListener("click", () => renew(0));
  byId("new-end").addEventListener("click", () => renew(1));
  for (const id of ["of-noise", "of-images"]) byId(id).addEventListener("change", () => renew(0, 1));
  await renew(0, 1);
  byId("turn").addEventListener("input", () => showPoint());
  byId("between").inert = false;
}
