// The drawing area. A drawing is sent as MNIST digits are: white on black, its longer side 20 of 28 pixels, its center
// of mass in the center. That is done here; the server resizes any other image to the input, and normalizes both.

const SIZE = 280;
const PEN = 24;
const INK = 24; // of 255; fainter pixels are background

// Samples, as paths in a square of 100.
const DIGITS = [
  "M50 15C30 15 26 40 26 52C26 70 34 86 50 86C66 86 74 70 74 50C74 30 66 15 50 15Z",
  "M56 14L46 86",
  "M28 32C30 16 44 12 54 14C70 17 74 32 64 46C54 60 36 74 28 84C44 80 60 82 76 82",
  "M30 20C44 10 70 14 68 30C66 44 52 47 44 48C58 47 74 54 72 68C70 86 44 90 28 78",
  "M36 14L28 52L72 52M64 22L60 88",
  "M72 16L38 16L34 46C50 38 72 46 70 66C68 86 42 88 28 78",
  "M62 12C42 22 30 46 30 66C30 90 70 92 70 68C70 48 40 48 32 66",
  "M28 20L74 20L46 88",
  "M64 22C54 8 30 18 38 34C44 46 68 54 68 70C68 90 34 90 34 70C34 54 66 44 66 30C66 26 66 24 64 22",
  "M68 34C66 14 34 14 34 34C34 52 64 52 68 34L60 88",
];

export class Drawing {
  constructor(canvas, changed) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.changed = changed;
    this.open = true; // whether one can draw
    this.photo = false; // whether an image file is shown
    this.last = null;
    canvas.addEventListener("pointerdown", (event) => this.start(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => this.end());
    this.clear();
  }

  clear() {
    this.context.fillStyle = "#000";
    this.context.fillRect(0, 0, SIZE, SIZE);
    this.photo = false;
    this.last = null;
  }

  sample(digit) {
    this.clear();
    this.context.save();
    this.context.scale(SIZE / 100, SIZE / 100);
    this.pen(9);
    this.context.stroke(new Path2D(DIGITS[digit]));
    this.context.restore();
    this.changed();
  }

  show(bitmap) {
    this.clear();
    const scale = Math.min(SIZE / bitmap.width, SIZE / bitmap.height);
    const [w, h] = [bitmap.width * scale, bitmap.height * scale];
    this.context.imageSmoothingEnabled = scale < 1;
    this.context.drawImage(bitmap, (SIZE - w) / 2, (SIZE - h) / 2, w, h);
    this.photo = true;
  }

  pen(width) {
    Object.assign(this.context, { lineWidth: width, lineCap: "round", lineJoin: "round", strokeStyle: "#fff" });
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    return [((event.clientX - box.left) * SIZE) / box.width, ((event.clientY - box.top) * SIZE) / box.height];
  }

  start(event) {
    if (!this.open || event.button !== 0) return;
    if (this.photo) this.clear();
    this.canvas.setPointerCapture(event.pointerId);
    this.last = this.at(event);
    this.line(this.last, this.last);
  }

  move(event) {
    if (!this.last) return;
    for (const one of event.getCoalescedEvents?.() ?? [event]) {
      const next = this.at(one);
      this.line(this.last, next);
      this.last = next;
    }
  }

  end() {
    if (!this.last) return;
    this.last = null;
    this.changed();
  }

  line(from, to) {
    this.pen(PEN);
    this.context.beginPath();
    this.context.moveTo(...from);
    this.context.lineTo(...to);
    this.context.stroke();
  }

  // Return the drawing as PNG of height x width, also drawn on `seen`; null if it is empty.
  async image(seen, height, width) {
    const pixels = this.context.getImageData(0, 0, SIZE, SIZE).data;
    const gray = Float32Array.from({ length: SIZE * SIZE }, (_, n) => pixels[4 * n]);
    const found = centered(gray, SIZE, height, width);
    if (!found) return null;
    seen.width = width;
    seen.height = height;
    const data = new ImageData(width, height);
    found.forEach((value, n) => data.data.set([value, value, value, 255], 4 * n));
    seen.getContext("2d").putImageData(data, 0, 0);
    return new Promise((done) => seen.toBlob(done, "image/png"));
  }
}

// Return height x width values of a square of gray values, prepared as MNIST digits; null if all are background.
export function centered(gray, size, height, width) {
  let [left, top, right, bottom] = [size, size, -1, -1];
  for (let y = 0; y < size; y++) {
    for (let x = 0; x < size; x++) {
      if (gray[y * size + x] < INK) continue;
      [left, right] = [Math.min(left, x), Math.max(right, x)];
      [top, bottom] = [Math.min(top, y), Math.max(bottom, y)];
    }
  }
  if (right < 0) return null;
  const [w, h] = [right - left + 1, bottom - top + 1];
  const scale = ((20 / 28) * Math.min(height, width)) / Math.max(w, h);
  const [tw, th] = [Math.max(1, Math.round(w * scale)), Math.max(1, Math.round(h * scale))];
  const small = new Float32Array(tw * th);
  let [mass, mx, my] = [0, 0, 0];
  for (let y = 0; y < th; y++) {
    for (let x = 0; x < tw; x++) {
      const value = mean(gray, size, left + (x * w) / tw, top + (y * h) / th, w / tw, h / th);
      small[y * tw + x] = value;
      mass += value;
      mx += value * (x + 0.5);
      my += value * (y + 0.5);
    }
  }
  const place = (full, part, center) => Math.max(0, Math.min(full - part, Math.round(full / 2 - center)));
  const [dx, dy] = [place(width, tw, mx / mass), place(height, th, my / mass)];
  const found = new Uint8ClampedArray(width * height);
  for (let y = 0; y < th; y++) {
    for (let x = 0; x < tw; x++) found[(y + dy) * width + x + dx] = small[y * tw + x];
  }
  return found;
}

// The mean of the whole pixels in a box, at least one.
function mean(gray, size, left, top, w, h) {
  const [x0, y0] = [Math.floor(left), Math.floor(top)];
  const [x1, y1] = [Math.max(x0 + 1, Math.floor(left + w)), Math.max(y0 + 1, Math.floor(top + h))];
  let sum = 0;
  for (let y = y0; y < y1; y++) for (let x = x0; x < x1; x++) sum += gray[y * size + x];
  return sum / ((x1 - x0) * (y1 - y0));
}
