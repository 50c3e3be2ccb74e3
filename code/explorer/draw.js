// Draw: an image by hand, or an example, and what the models say of it, beside what they say of test images.

const pad = { strokes: [], base: null, open: false, pen: [SIDE / 2, SIDE / 2], down: false, image: null };

const FIGURES = {
  // what is said -> how it is written, its unit, and the ends of its scale, if that is not three times the range
  elbo: { write: (x) => signed(x, 1), unit: " nats" },
  bits: { write: (x) => signed(x, 3), unit: " bits" },
  real: { write: (x) => x.toFixed(3), unit: "", ends: [0, 1] },
  sure: { write: (x) => (100 * x).toFixed(1), unit: "%", ends: [0, 1] },
};

// The range of test images, and at which share of its scale a value is.
function scaleOf(name) {
  const [low, high] = FACTS.ranges[name];
  const [first, last] = FIGURES[name].ends || [2 * low - high, 2 * high - low];
  return { low, high, share: (x) => (x - first) / (last - first) };
}

// Writes a figure, and marks it on its scale, where a band is the range of the middle 90% of test images.
function say(name, value) {
  const { write, unit } = FIGURES[name];
  const { low, high, share } = scaleOf(name);
  const row = byId(name);
  row.querySelector("output").textContent = write(value) + unit;
  row.querySelector(".mark").style.left = `${100 * Math.min(Math.max(share(value), 0), 1)}%`;
  const place = value < low ? "below" : value > high ? "above" : "within";
  row.dataset.place = place;
  const range = `${write(low)} to ${write(high)}${unit}`;
  row.querySelector(".verdict").textContent = `${place} the range of the middle 90% of test images, ${range}`;
}

// Places the band of every figure's scale.
function drawBands() {
  for (const name of Object.keys(FIGURES)) {
    const { low, high, share } = scaleOf(name);
    const band = byId(name).querySelector(".band");
    band.style.left = `${100 * share(low)}%`;
    band.style.right = `${100 * (1 - share(high))}%`;
  }
}

const sayOpinions = latest(async (image) => {
  const said = await ask("opinions", image);
  paint(byId("reconstruction"), said.reconstruction);
  say("elbo", said.elbo);
  say("real", said.real);
  const best = said.classes.indexOf(Math.max(...said.classes));
  say("sure", said.classes[best]);
  byId("class").textContent = best;
  const context = fresh(byId("place"), MAP);
  context.lineWidth = 8;
  context.strokeStyle = COLOURS[best];
  ellipse(context, said.position, MAP);
  const [x, y] = placeOf(said.position.mu);
  disc(context, MAP * x, MAP * y, 17, "#000");
  disc(context, MAP * x, MAP * y, 13, COLOURS[best]);
});

const sayBits = latest(async (image) => say("bits", await ask("bits", image)));

// Shows the pad, makes its image, and asks for what the models say of it.
function update() {
  const { strokes, base } = pad;
  const drawn = base ? rasterise(strokes) : asMnist(strokes);
  pad.image = base ? drawn.map((grey, i) => Math.max(grey, base[i])) : drawn;
  paint(byId("base"), base || new Uint8ClampedArray(SIDE * SIDE));
  paint(byId("seen"), pad.image);
  drawStrokes();
  sayOpinions(pad.image);
  sayBits(pad.image);
}

function drawStrokes() {
  const context = fresh(byId("pad"), SIDE);
  context.lineWidth = 2 * PEN;
  context.lineCap = context.lineJoin = "round";
  context.strokeStyle = "#fff";
  for (const stroke of pad.strokes) {
    context.beginPath();
    stroke.forEach(([x, y]) => context.lineTo(x, y));
    if (stroke.length === 1) context.lineTo(stroke[0][0] + 0.01, stroke[0][1]);
    context.stroke();
  }
  if (document.activeElement === byId("pad") && byId("pad").matches(":focus-visible")) {
    context.lineWidth = 0.3;
    context.strokeStyle = pad.down ? "#f5a95b" : "#6db6f2";
    context.strokeRect(pad.pen[0] - PEN, pad.pen[1] - PEN, 2 * PEN, 2 * PEN);
  }
}

// Starts from an image, or, without one, from an empty pad.
function startFrom(base) {
  Object.assign(pad, { strokes: [], base, down: false, open: false });
  update();
}

function startDraw() {
  const canvas = byId("pad");
  const point = (event) => {
    const box = canvas.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * SIDE, ((event.clientY - box.top) / box.height) * SIDE];
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (!event.isPrimary || event.button !== 0) return; // a second finger, another button
    canvas.setPointerCapture(event.pointerId);
    Object.assign(pad, { open: true, down: false });
    pad.strokes.push([point(event)]);
    update();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!pad.open || !event.isPrimary) return;
    pad.strokes.at(-1).push(...(event.getCoalescedEvents?.() ?? []).map(point), point(event));
    update();
  });
  for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, (event) => {
      if (event.isPrimary) pad.open = false;
    });
  }
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!(step || event.key === " ") || isForBrowser(event)) return;
    event.preventDefault();
    if (step) {
      pad.pen = pad.pen.map((each, i) => Math.min(Math.max(each + step[i], 1), SIDE - 1));
      if (pad.down) pad.strokes.at(-1).push(pad.pen);
    } else if (!event.repeat) {
      pad.down = !pad.down;
      if (pad.down) pad.strokes.push([pad.pen]);
    }
    if (pad.down) update();
    else drawStrokes();
  });
  for (const name of ["focus", "blur"]) canvas.addEventListener(name, drawStrokes);
  window.addEventListener("resize", drawStrokes);
  const examples = {
    digit: () => Uint8ClampedArray.from(anyOf(TEST_IMAGES())),
    blank: () => null,
    noise: () => Uint8ClampedArray.from({ length: SIDE * SIDE }, () => Math.floor(256 * Math.random())),
    upside: () => upsideDown(anyOf(TEST_IMAGES().filter((_, i) => [2, 3, 4, 5, 7].includes(FACTS.labels[i])))),
  };
  for (const [name, image] of Object.entries(examples)) byId(name).addEventListener("click", () => startFrom(image()));
  drawBands();
  startFrom(Uint8ClampedArray.from(TEST_IMAGES()[0]));
}
