// What the sections share: the worker, elements, canvases, random numbers.

const byId = (id) => document.getElementById(id);

const PARTS = JSON.parse(byId("parts").textContent); // how the models' numbers are packed
const TEXTS = Object.fromEntries([...document.querySelectorAll(".numbers")].map(({ id, textContent }) => [id, textContent]));

// Asks the worker: a promise of what ANSWERS[name] of worker.js returns for `given`.
const asked = new Map(); // a question's number -> what waits for its answer
const ask = (() => {
  const source = ["numerics", "worker"].map((id) => byId(id).textContent).join("\n");
  const worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
  let count = 0;
  worker.onerror = ({ message }) => fail(message || "the worker did not start");
  worker.onmessage = ({ data: { id, answer, error } }) => {
    const { resolve, reject } = asked.get(id);
    asked.delete(id);
    if (error) reject(new Error(error));
    else resolve(answer);
  };
  worker.postMessage({ parts: PARTS, texts: TEXTS });
  return (name, ...given) =>
    new Promise((resolve, reject) => {
      asked.set(++count, { resolve, reject });
      worker.postMessage({ id: count, name, given });
    });
})();

// A function that runs the asynchronous `task` with what it is called with; while that runs only the newest call waits.
function latest(task) {
  let running = false, waiting = null;
  return async (...given) => {
    waiting = given;
    if (running) return;
    running = true;
    try {
      while (waiting) {
        const now = waiting;
        waiting = null;
        await task(...now);
      }
    } finally {
      running = false;
    }
  };
}

// Shows an image of grey values in a canvas of 28 x 28.
function paint(canvas, image) {
  const context = canvas.getContext("2d");
  const data = context.createImageData(SIDE, SIDE);
  const grey = Uint8ClampedArray.from(image);
  for (let i = 0; i < grey.length; i++) data.data.fill(grey[i], 4 * i, 4 * i + 3);
  for (let i = 3; i < data.data.length; i += 4) data.data[i] = 255;
  context.putImageData(data, 0, 0);
}

// A new canvas of 28 x 28 in `parent`; label: what it shows, for those who do not see it.
function addTile(parent, label) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = SIDE;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", label);
  parent.append(canvas);
  return canvas;
}

// A canvas's context, cleared, with as many pixels as the screen has for it, and a unit of 1/size of its width.
function fresh(canvas, size) {
  const pixels = Math.round(canvas.clientWidth * (window.devicePixelRatio || 1)) || size;
  if (canvas.width !== pixels) canvas.width = canvas.height = pixels;
  const context = canvas.getContext("2d");
  context.setTransform(pixels / size, 0, 0, pixels / size, 0, 0);
  context.clearRect(0, 0, size, size);
  return context;
}

// n numbers of N(0, 1), by Box and Muller's method.
const normal = (n) =>
  Float64Array.from({ length: n }, () => {
    return Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
  });

// Spherical interpolation, as training.slerp: the point at t of 0 to 1 between two vectors.
function slerp(start, end, t) {
  const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
  const cosine = dot(start, end) / Math.sqrt(dot(start, start) * dot(end, end));
  const angle = Math.acos(Math.min(Math.max(cosine, -1), 1));
  const weight = (share) => (angle ? Math.sin(share * angle) / Math.sin(angle) : share);
  const [a, b] = [weight(1 - t), weight(t)];
  return start.map((value, i) => a * value + b * end[i]);
}

// The share of N(0, 1) below x (Abramowitz and Stegun 7.1.26, to 1e-7), and the x below which lies a share.
function normalCdf(x) {
  const a = Math.abs(x) / Math.SQRT2, t = 1 / (1 + 0.3275911 * a);
  const sum = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  const above = (sum * Math.exp(-a * a)) / 2;
  return x < 0 ? above : 1 - above;
}

function normalQuantile(share) {
  let low = -8, high = 8;
  for (let i = 0; i < 50; i++) {
    const middle = (low + high) / 2;
    if (normalCdf(middle) < share) low = middle;
    else high = middle;
  }
  return (low + high) / 2;
}

const TEST_IMAGES = () => rowsOf(FACTS.images, FACTS.labels.length);
const anyOf = (list) => list[Math.floor(Math.random() * list.length)];
const nameOf = (index) => `test image ${index}: ${FACTS.labels[index]}`;
const signed = (x, digits) => x.toFixed(digits).replace("-", "\u2212");

// Whether a key is pressed together with one that makes it the browser's or the system's.
const isForBrowser = ({ altKey, ctrlKey, metaKey }) => altKey || ctrlKey || metaKey;
