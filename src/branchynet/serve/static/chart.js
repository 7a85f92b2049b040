// The traffic of the last minute as a chart that follows it.

import { byId, element, percent, shape, strength, time } from "./elements.js";

const [WIDTH, HEIGHT] = [600, 120];

export function drawTraffic(traffic, exits) {
  const rows = exits.map((exit) => traffic.exits[exit] ?? new Array(traffic.seconds).fill(0));
  const sums = Array.from({ length: traffic.seconds }, (_, s) => rows.reduce((sum, row) => sum + row[s], 0));
  const total = sums.reduce((a, b) => a + b, 0);
  const most = Math.max(1, ...sums);
  const width = WIDTH / traffic.seconds;
  const below = new Array(traffic.seconds).fill(0);
  const bars = rows.flatMap((row, n) => row.flatMap((count, s) => {
    if (!count) return [];
    const height = (HEIGHT * count) / most;
    below[s] += height;
    return [shape("rect", {
      x: (s * width + 1).toFixed(1), width: (width - 2).toFixed(1), y: (HEIGHT - below[s]).toFixed(1),
      height: height.toFixed(1), "fill-opacity": strength(n, exits.length),
    })];
  }));
  byId("chart").replaceChildren(...bars);
  const shares = exits.map((exit, n) => {
    const count = rows[n].reduce((a, b) => a + b, 0);
    return `exit ${exit}: ${percent(total ? count / total : null, 0)}`;
  });
  byId("chart").setAttribute("aria-label",
    total ? `${total} samples in the last minute; ${shares.join(", ")}` : "No requests in the last minute");
  byId("legend").replaceChildren(...shares.map((text, n) => {
    const key = element("i", { "aria-hidden": "true" });
    key.style.opacity = strength(n, exits.length);
    return element("li", {}, key, text[0].toUpperCase() + text.slice(1));
  }));
  byId("p50").textContent = time(traffic.p50_us);
  byId("p99").textContent = time(traffic.p99_us);
  byId("requests").textContent = traffic.requests.toLocaleString("en");
}
