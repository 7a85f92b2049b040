// Which thresholds the next request has: those of the file, a preset, a point of the frontier, or your own.

import { byId, element, number, percent, shape, time } from "./elements.js";

const FINE = 200; // positions of a slider of one threshold

export class PolicyPanel {
  constructor(about, curve, changed) {
    this.about = about;
    this.curve = curve;
    this.changed = changed;
    this.own = about.policy?.thresholds ?? [];
    this.buttons = new Map();
    this.sliders = [];
    this.current = { thresholds: this.own };
    this.presets();
    if (curve.points.length) this.along();
    else this.each();
    byId("record-text").textContent = curve.points.length
      ? `Predicted from ${curve.samples.toLocaleString("en")} recorded samples. Speed is relative to the network without exits.`
      : curve.reason;
    this.take(null, { thresholds: this.own }, curve.own);
  }

  presets() {
    const all = [["As shipped", null, { thresholds: this.own }, this.curve.own]];
    for (const [name, one] of Object.entries(this.about.policies)) {
      all.push([name, name, { name, thresholds: one.policy.thresholds }, this.curve.presets[name] ?? null]);
    }
    byId("presets").replaceChildren(...all.map(([title, name, policy, point]) => {
      const button = element("button", { type: "button", text: title });
      if (point) button.append(element("small", { text: outcome(point) }));
      button.addEventListener("click", () => {
        this.take(name, policy, point);
        this.changed();
      });
      this.buttons.set(name, button);
      return button;
    }));
  }

  // One slider along the frontier of the record.
  along() {
    const { points, own } = this.curve;
    const input = element("input", { type: "range", id: "sure", min: 0, max: points.length - 1, step: 1 });
    const nearest = (us) => points.reduce((best, p, n) => (Math.abs(p.mean_us - us) < Math.abs(points[best].mean_us - us) ? n : best), 0);
    this.place = (point) => {
      input.value = point?.mean_us == null ? input.value : nearest(point.mean_us);
      input.setAttribute("aria-valuetext", point ? outcome(point) : "");
    };
    this.place(own);
    input.addEventListener("input", () => {
      const point = points[Number(input.value)];
      input.setAttribute("aria-valuetext", outcome(point));
      this.take(undefined, { sent: point.thresholds, thresholds: point.thresholds }, point, false);
      this.changed();
    });
    const ends = element("div", { class: "ends", "aria-hidden": "true" }, element("span", { text: "Faster" }), element("span", { text: "Surer" }));
    byId("sliders").replaceChildren(element("label", { for: "sure", text: "From fast to sure" }), input, ends);
    this.draw(points);
  }

  // One slider per threshold, where nothing is known about accuracy.
  each() {
    this.place = () => {};
    byId("curve").toggleAttribute("hidden", true);
    const shown = this.curve.settable ? [...this.own.keys()].filter((n) => this.own[n] !== null) : [];
    const most = shown.map((n) => largest(this.about.policy.score, this.about.labels.length, this.own[n]));
    const inputs = shown.map((n, i) => {
      const at = Math.round(FINE * Math.cbrt(Math.min(1, Math.max(0, this.own[n] / most[i]))));
      return element("input", { type: "range", id: `threshold-${n + 1}`, min: 0, max: FINE, step: 1, value: at });
    });
    const values = shown.map((n) => element("span", { text: number(this.own[n]) }));
    inputs.forEach((input, i) => input.addEventListener("input", () => {
      const sent = [...this.current.thresholds];
      const t = Number((most[i] * (input.value / FINE) ** 3).toPrecision(4));
      sent[shown[i]] = t > 0 ? t : null;
      values[i].textContent = t > 0 ? number(t) : "never";
      input.setAttribute("aria-valuetext", values[i].textContent);
      this.take(undefined, { sent, thresholds: sent }, null, false);
      this.changed();
    }));
    this.place = () => inputs.forEach((input, i) => {
      const t = this.current.thresholds[shown[i]];
      values[i].textContent = t === null ? "never" : number(t);
      input.value = FINE * Math.cbrt(Math.min(1, Math.max(0, (t ?? 0) / most[i])));
      input.setAttribute("aria-valuetext", values[i].textContent);
    });
    byId("sliders").replaceChildren(...shown.flatMap((n, i) => [
      element("label", { for: `threshold-${n + 1}`, text: `Threshold of exit ${n + 1}: ` }), values[i], inputs[i],
    ]));
  }

  take(name, policy, point, place = true) {
    this.current = policy;
    for (const [key, button] of this.buttons) button.setAttribute("aria-pressed", String(key === name));
    if (place) this.place(point);
    byId("accuracy").textContent = point ? percent(point.accuracy, 2) : "unknown";
    byId("speed").textContent = point?.speedup ? `${point.speedup.toFixed(2)}×` : point?.mean_us ? time(point.mean_us) : "unknown";
    byId("promise").textContent = promise(name === null ? this.about : this.about.policies[name]);
    this.mark(point);
  }

  // Accuracy against time, on a logarithmic axis. The last point, without early exits, lies at or beyond its right end.
  draw(points) {
    const all = [...points.slice(0, -1), this.curve.own, ...Object.values(this.curve.presets)];
    const [us, accuracy] = [all.map((p) => p.mean_us), all.map((p) => p.accuracy)];
    const scale = (values, from, to) => {
      const [low, high] = [Math.min(...values), Math.max(...values)];
      return (v) => from + (to - from) * Math.max(0, Math.min(1, (v - low) / (high - low || 1)));
    };
    const [x, y] = [scale(us.map(Math.log), 56, 310), scale(accuracy, 86, 10)];
    this.spot = (point) => [x(Math.log(point.mean_us)), y(point.accuracy)];
    const line = points.slice(0, -1).map((p, n) => (n ? "L" : "M") + this.spot(p).map((v) => v.toFixed(1)).join(" ")).join("");
    this.dot = shape("circle", { r: 6 });
    byId("curve").replaceChildren(
      shape("path", { d: line }), this.dot,
      shape("text", { x: 0, y: 14 }, percent(Math.max(...accuracy))),
      shape("text", { x: 0, y: 90 }, percent(Math.min(...accuracy))),
      shape("text", { x: 56, y: 114 }, time(Math.min(...us))),
      shape("text", { x: 310, y: 114, "text-anchor": "end" }, `${time(Math.max(...us))} per sample`),
    );
    byId("curve").toggleAttribute("hidden", false);
  }

  mark(point) {
    if (!this.dot) return;
    this.dot.setAttribute("visibility", point?.mean_us == null ? "hidden" : "visible");
    if (point?.mean_us == null) return;
    const [x, y] = this.spot(point);
    this.dot.setAttribute("cx", x);
    this.dot.setAttribute("cy", y);
  }
}

// The sentence of a promise; a file without one says "none" and why.
const promise = (one) => (one?.promise && !one.promise.startsWith("none") ? one.promise : "");

const outcome = (point) =>
  `${percent(point.accuracy, 2)}${point.speedup ? `, ${point.speedup.toFixed(2)} times as fast` : ""}`;

// The largest value that a slider gives: that of the score if it is known, else twice the threshold of the file.
function largest(score, classes, own) {
  if (score === "entropy") return Math.log(Math.max(classes, 10));
  return score === "max_probability" || score === "margin" ? 1 : Math.max(2 * own, 1);
}
