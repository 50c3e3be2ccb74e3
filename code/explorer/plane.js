// The plane: latents of the VAE with two of them, at equal shares of its prior N(0, I).

const MAP = 560; // units of the map's width
const TILES = 20; // decoded images along it
const EDGE = 0.002; // share of the prior beyond each edge that pointer and keys do not reach
const REACH = normalQuantile(1 - EDGE); // the number of z at that edge
const COLOURS = ["#6db6f2", "#f5a95b", "#ee6b6b", "#5fd0c5", "#8fd16a", "#f3dc6b", "#c89be0", "#ffa8c0", "#c99b6d", "#d8d4cc"];

const plane = { z: [0, 0], dots: [], hovered: null, milliseconds: 0 };

// z to a place on a map of width 1, from the top left, and back.
const placeOf = ([z1, z2]) => [normalCdf(z1), 1 - normalCdf(z2)];
const latentAt = ([x, y]) => [x, 1 - y].map((share) => normalQuantile(Math.min(Math.max(share, EDGE), 1 - EDGE)));

// The outline of what is within two standard deviations of a mean, in units of `size` a map's width.
function ellipse(context, { mu, deviation }, size) {
  context.beginPath();
  for (let i = 0; i <= 72; i++) {
    const angle = (i / 72) * 2 * Math.PI;
    const [x, y] = placeOf([mu[0] + 2 * deviation[0] * Math.cos(angle), mu[1] + 2 * deviation[1] * Math.sin(angle)]);
    context.lineTo(size * x, size * y);
  }
  context.stroke();
}

function disc(context, x, y, radius, colour) {
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.fillStyle = colour;
  context.fill();
}

// Decodes z, shows it, and marks it on the map.
function moveTo(z) {
  const begin = performance.now();
  plane.z = z;
  paint(byId("decoded"), decoderMeans(PLANE, Float64Array.from(z)));
  byId("z").textContent = z.map((each) => signed(each, 2)).join(", ");
  plane.hovered = nearestDot(z);
  drawDots();
  plane.milliseconds = performance.now() - begin;
  byId("frame").textContent = `${plane.milliseconds.toFixed(1)} ms`;
}

// The dot within a fingertip of z, if dots are shown.
function nearestDot(z) {
  if (!byId("show-dots").checked) return null;
  const [x, y] = placeOf(z);
  let best = null, least = 0.02 ** 2;
  for (const dot of plane.dots) {
    const squared = (dot.place[0] - x) ** 2 + (dot.place[1] - y) ** 2;
    if (squared < least) [best, least] = [dot, squared];
  }
  return best;
}

function drawDots() {
  const context = fresh(byId("dots"), MAP);
  if (byId("show-dots").checked) {
    for (const { place, label } of plane.dots) disc(context, MAP * place[0], MAP * place[1], 3.2, COLOURS[label]);
  }
  const dot = plane.hovered;
  byId("hovered-figure").classList.toggle("empty", !dot);
  byId("hovered-name").textContent = dot ? nameOf(dot.index) : "no test image at this place";
  if (dot) {
    paint(byId("hovered"), TEST_IMAGES()[dot.index]);
    outlined(context, () => ellipse(context, dot, MAP));
    disc(context, MAP * dot.place[0], MAP * dot.place[1], 2, "#fff");
  } else {
    byId("hovered").getContext("2d").clearRect(0, 0, SIDE, SIDE);
  }
  const [x, y] = placeOf(plane.z).map((share) => MAP * share);
  outlined(context, () => {
    context.beginPath();
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      context.moveTo(x + 4 * dx, y + 4 * dy);
      context.lineTo(x + 11 * dx, y + 11 * dy);
    }
    context.stroke();
  });
}

// Strokes in white with a black edge, to be seen on anything.
function outlined(context, stroke) {
  for (const [colour, width] of [["#000", 4.5], ["#fff", 2]]) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    stroke();
  }
}

// Decodes the map row by row, in the worker, into every canvas that shows it.
async function drawMap() {
  const shares = Array.from({ length: TILES }, (_, i) => (i + 0.5) / TILES);
  const row = document.createElement("canvas");
  row.width = row.height = SIDE;
  for (const y of shares) {
    const images = await ask("plane", shares.map((x) => latentAt([x, y])));
    images.forEach((image, i) => {
      paint(row, image);
      for (const map of [byId("map"), byId("small-map")]) {
        map.getContext("2d").drawImage(row, i * SIDE, Math.floor(y * TILES) * SIDE);
      }
    });
  }
}

async function startPlane() {
  const dots = byId("dots");
  const follow = (event) => {
    const box = dots.getBoundingClientRect();
    moveTo(latentAt([(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height]));
  };
  dots.addEventListener("pointerdown", (event) => {
    dots.setPointerCapture(event.pointerId);
    follow(event);
  });
  dots.addEventListener("pointermove", follow);
  dots.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!step || isForBrowser(event)) return;
    event.preventDefault();
    moveTo(plane.z.map((each, i) => Math.min(Math.max(each + step[i] * (event.shiftKey ? 0.5 : 0.1), -REACH), REACH)));
  });
  byId("show-dots").addEventListener("change", (event) => {
    byId("map").classList.toggle("dimmed", event.target.checked);
    moveTo(plane.z);
  });
  window.addEventListener("resize", () => drawDots());
  COLOURS.forEach((colour, digit) => {
    const item = document.createElement("li");
    item.textContent = digit;
    item.style.setProperty("--colour", colour);
    byId("legend").append(item);
  });
  moveTo([0, 0]);
  await drawMap();
  const positions = await ask("positions", TEST_IMAGES());
  plane.dots = positions.map((each, index) => {
    return { ...each, index, label: FACTS.labels[index], place: placeOf(each.mu) };
  });
  moveTo(plane.z);
}
