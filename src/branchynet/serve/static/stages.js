// The stages that a sample passes, its answer, and the probabilities.

import { byId, element, number, percent, time } from "./elements.js";

const PAUSE = 260; // milliseconds per stage
const still = matchMedia("(prefers-reduced-motion: reduce)");
let running = 0; // the latest answer that lights up

function stage(exit, last, whole) {
  const [meter, fill, mark] = [element("div", { class: "meter", "aria-hidden": "true" }), element("i"), element("u")];
  meter.append(fill, mark);
  meter.hidden = true;
  const took = element("span");
  const text = element("p");
  const found = element("li", { class: "stage" }, element("b", {}, `Exit ${exit}`, took), meter, text);
  return { exit, last, whole, found, meter, fill, mark, took, text };
}

// Return the stages of a model, one per exit in use, drawn without a sample.
export function stagesOf(about) {
  const thresholds = about.policy?.thresholds ?? [];
  const exits = about.exits.filter((exit) => exit > thresholds.length || thresholds[exit - 1] !== null);
  const whole = exits.length > 1 && about.stages.length === 1;
  const stages = exits.map((exit, n) => stage(exit, n === exits.length - 1, whole));
  byId("stages-text").hidden = !whole;
  byId("stages").replaceChildren(...stages.map((one) => one.found));
  return stages;
}

const rule = (one, thresholds) => (one.last ? "takes all that come" : `leaves below ${limit(thresholds, one)}`);
const limit = (thresholds, one) => (thresholds[one.exit - 1] == null ? "no score" : number(thresholds[one.exit - 1]));

export function rest(stages, thresholds) {
  running += 1;
  for (const one of stages) {
    one.found.dataset.state = "idle";
    one.took.textContent = "";
    one.text.textContent = rule(one, thresholds);
    one.meter.hidden = true;
  }
}

// Light up the stages that a sample passed, in their order, then show the answer.
export async function pass(stages, answer, score) {
  const { thresholds } = answer;
  rest(stages, thresholds);
  const mine = running;
  const steps = new Map(answer.stages.map((step) => [step.exit, step]));
  for (const one of stages) {
    const step = steps.get(one.exit);
    if (one.exit > answer.exit) {
      one.found.dataset.state = "unused";
      one.text.textContent = "not needed";
      continue;
    }
    one.found.dataset.state = "running";
    if (!still.matches) await new Promise((done) => setTimeout(done, PAUSE));
    if (mine !== running) return;
    one.found.dataset.state = one.exit === answer.exit ? "answered" : "passed";
    one.took.textContent = step && !one.whole ? time(step.us) : "";
    const value = one.exit === answer.exit ? answer.score : (step?.score ?? null);
    show(one, value, thresholds[one.exit - 1] ?? null, one.exit === answer.exit, score);
  }
  told(answer, stages);
}

function show(one, value, threshold, answered, score) {
  if (one.last) one.text.textContent = value === null ? "takes all that come" : `${score} ${number(value)}; takes all that come`;
  else if (threshold === null) one.text.textContent = "its threshold is never, so it continues";
  else if (value === null) one.text.textContent = `not below ${number(threshold)}, so it continues`;
  else {
    const [sign, then] = answered ? ["below", "it leaves"] : ["not below", "it continues"];
    one.text.textContent = `${score} ${number(value)} is ${sign} ${number(threshold)}: ${then}`;
  }
  one.meter.hidden = value === null || (threshold === null && !one.last);
  if (one.meter.hidden) return;
  const scale = 1.15 * Math.max(value, threshold ?? value, 1e-12);
  one.fill.style.width = `${Math.max(1, (100 * Math.max(value, 0)) / scale)}%`;
  one.mark.hidden = threshold === null || one.last;
  one.mark.style.left = `${(100 * Math.max(threshold ?? 0, 0)) / scale}%`;
}

function told(answer, stages) {
  byId("class").textContent = answer.class ?? "no class";
  const probability = answer.probability == null ? "" : ` with probability ${percent(answer.probability)}`;
  const late = answer.unfinished ? " The deadline passed, so this is an early answer." : "";
  const last = stages.at(-1).exit;
  byId("sentence").textContent =
    `Answered by exit ${answer.exit} of ${last}${probability}, after ${time(answer.us)} in the server.${late}`;
  bars(answer.top ?? []);
}

function bars(top) {
  const whole = top.every((one) => one.class.length < 3);
  const shown = whole ? [...top].sort((a, b) => a.label - b.label) : top.slice(0, 6);
  byId("bars").classList.toggle("named", !whole);
  byId("bars").replaceChildren(...shown.map((one) => {
    const fill = element("i");
    fill.style.width = percent(one.probability ?? 0);
    return element("li", one.label === top[0].label ? { class: "first" } : {},
      element("span", { text: one.class, title: one.class }),
      element("span", { class: "bar", "aria-hidden": "true" }, fill),
      element("span", { text: percent(one.probability) }));
  }));
}

export function nothing(text) {
  running += 1;
  byId("class").textContent = "–";
  byId("sentence").textContent = text;
  byId("bars").replaceChildren(element("li", { class: "quiet", text: "They appear with the first answer." }));
}
