// Strokes to an image as MNIST has them: in a box of 20 x 20, centred by mass. A stroke is a list of points [x, y] in
// pixels of the 28 x 28 image.

const SIDE = 28;
const BOX = 20;
const PEN = 1.1; // pixels: half of a stroke's width

// Grey values of strokes that a pen of that width draws: a pixel within half a pixel of a stroke's edge is grey.
function rasterise(strokes) {
  const image = new Uint8ClampedArray(SIDE * SIDE);
  for (const stroke of strokes) {
    for (let i = 0; i < stroke.length; i++) {
      const [x0, y0] = stroke[Math.max(i - 1, 0)], [x1, y1] = stroke[i];
      const reach = PEN + 1;
      const within = (a, b) => [Math.max(0, Math.floor(Math.min(a, b) - reach)), Math.min(SIDE, Math.max(a, b) + reach)];
      const [left, right] = within(x0, x1), [top, bottom] = within(y0, y1);
      const squared = (x1 - x0) ** 2 + (y1 - y0) ** 2;
      for (let row = top; row < bottom; row++) {
        for (let column = left; column < right; column++) {
          const x = column + 0.5 - x0, y = row + 0.5 - y0;
          const along = squared && Math.min(Math.max((x * (x1 - x0) + y * (y1 - y0)) / squared, 0), 1);
          const distance = Math.hypot(x - along * (x1 - x0), y - along * (y1 - y0));
          const at = row * SIDE + column;
          image[at] = Math.max(image[at], 255 * (PEN + 0.5 - distance));
        }
      }
    }
  }
  return image;
}

// Where the mass of an image is, [x, y].
function centreOfMass(image) {
  let mass = 0, x = 0, y = 0;
  image.forEach((grey, i) => {
    mass += grey;
    x += grey * ((i % SIDE) + 0.5);
    y += grey * (Math.floor(i / SIDE) + 0.5);
  });
  return [x / mass, y / mass];
}

// The image that MNIST would have of these strokes: the larger of width and height fills the box.
function asMnist(strokes) {
  const points = strokes.flat();
  if (!points.length) return new Uint8ClampedArray(SIDE * SIDE);
  const [xs, ys] = [points.map(([x]) => x), points.map(([, y]) => y)];
  const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const extent = Math.max(right - left, bottom - top);
  const scale = extent > 1 ? (BOX - 2 * PEN) / extent : 1; // a dot stays one
  const moved = (x, y) => strokes.map((stroke) => stroke.map(([a, b]) => [scale * a + x, scale * b + y]));
  const centred = [SIDE / 2 - (scale * (left + right)) / 2, SIDE / 2 - (scale * (top + bottom)) / 2];
  const [massX, massY] = centreOfMass(rasterise(moved(...centred)));
  return rasterise(moved(centred[0] + SIDE / 2 - massX, centred[1] + SIDE / 2 - massY));
}

// The image turned by 180 degrees.
const upsideDown = (image) => Uint8ClampedArray.from(image).reverse();
