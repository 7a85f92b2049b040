// The page: it sends what is drawn or dropped, and shows what the server answers.

import { drawTraffic } from "./chart.js";
import { Drawing } from "./drawing.js";
import { byId, element } from "./elements.js";
import { PolicyPanel } from "./policy.js";
import * as server from "./server.js";
import { nothing, pass, rest, stagesOf } from "./stages.js";

const EVERY = 1000; // milliseconds between looks at the traffic
const SETTLED = 90; // milliseconds after which a moved slider sends

let model = null; // { name, about, shape, stages }
let panel = null;
let upload = null; // the image file that is shown
let sending = new AbortController();
let waiting = 0;
let lost = false; // whether the server did not answer

const drawing = new Drawing(byId("canvas"), () => {
  upload = null;
  send();
});

function failed(error) {
  if (error.name === "AbortError") return;
  lost = error.status === 0;
  const asked = error.status === 401 && !server.hasKey();
  if (error.status === 401) {
    byId("key-form").hidden = false;
    byId("key").focus();
  }
  const text = asked ? "" : error.message;
  if (byId("error").textContent !== text) byId("error").textContent = text; // the same text is not read again
}

async function guarded(work) {
  try {
    await work();
  } catch (error) {
    failed(error);
  }
}

const send = () => guarded(async () => {
  if (!model?.shape) return;
  sending.abort();
  const mine = (sending = new AbortController());
  byId("error").textContent = "";
  const [, height, width] = model.shape;
  const image = upload ?? (await drawing.image(byId("seen"), height, width));
  byId("seen-box").hidden = upload !== null || image === null;
  if (image === null || mine.signal.aborted) return;
  const answer = await server.predict(model.name, image, panel.current, mine.signal);
  const score = typeof model.about.policy?.score === "string" ? model.about.policy.score.replaceAll("_", " ") : "score";
  await pass(model.stages, answer, score);
});

async function take(file) {
  upload = file;
  drawing.clear();
  nothing("The image is being sent.");
  try {
    drawing.show(await createImageBitmap(file));
  } catch {
    // the server says what is wrong with it
  }
  await send();
  if (byId("error").textContent) nothing("There is no answer for this image.");
}

// Return (channels, height, width) if the model reads one image, else null.
function imageShape(metadata) {
  const [input, ...others] = metadata.inputs;
  const shape = input.shape.slice(1);
  const fits = !others.length && input.datatype === "FP32" && shape.length === 3 && Math.min(...shape) > 0;
  return fits && [1, 3].includes(shape[0]) ? shape : null;
}

const choose = (name) => guarded(async () => {
  byId("error").textContent = "";
  const [about, metadata, curve] = await Promise.all([server.about(name), server.metadata(name), server.frontier(name)]);
  if (byId("model").value !== name) return; // another one was chosen meanwhile
  model = { name, about, shape: about.policy ? imageShape(metadata) : null, stages: stagesOf(about) };
  panel = new PolicyPanel(about, curve, () => {
    clearTimeout(waiting);
    rest(model.stages, panel.current.thresholds);
    waiting = setTimeout(send, SETTLED);
  });
  rest(model.stages, panel.current.thresholds);
  nothing("Nothing has been sent yet.");
  const gray = model.shape?.[0] === 1;
  drawing.open = gray;
  byId("pad").classList.toggle("closed", !gray);
  byId("samples").hidden = byId("seen-box").hidden = !gray;
  byId("seen-box").hidden = true;
  byId("file").disabled = byId("clear").disabled = !model.shape;
  byId("input-text").textContent = gray ? "Draw a digit, or drop an image."
    : model.shape ? "Drop an image here, or choose one."
      : `This model does not read one image; send requests to /v2/models/${name}/infer.`;
  if (upload || gray) await send();
  await look();
});

const look = () => guarded(async () => {
  if (!model || document.hidden) return;
  const { name, stages } = model;
  const traffic = await server.traffic(name);
  if (lost) byId("error").textContent = "";
  lost = false;
  if (name === model.name) drawTraffic(traffic, stages.map((one) => one.exit));
});

const start = () => guarded(async () => {
  const found = await server.models();
  const wanted = new URLSearchParams(location.search).get("model");
  byId("key-form").hidden = true;
  byId("error").textContent = "";
  byId("model").replaceChildren(...found.map((one) => {
    const ready = one.state === "READY";
    const option = element("option", { value: one.name, text: ready ? one.name : `${one.name} (not ready)` });
    option.disabled = !ready;
    return option;
  }));
  const ready = found.filter((one) => one.state === "READY").map((one) => one.name);
  byId("model-field").hidden = found.length < 2;
  if (!ready.length) throw new server.ServerError("No model is ready; the log of the server says why.", 503);
  byId("model").value = ready.includes(wanted) ? wanted : ready[0];
  await choose(byId("model").value);
});

for (let digit = 0; digit < 10; digit++) {
  const button = element("button", { type: "button", text: digit, "aria-label": `Draw a ${digit}` });
  button.addEventListener("click", () => drawing.sample(digit));
  byId("samples").append(button);
}
byId("clear").addEventListener("click", () => {
  sending.abort();
  upload = null;
  drawing.clear();
  byId("error").textContent = "";
  byId("seen-box").hidden = true;
  rest(model.stages, panel.current.thresholds);
  nothing("Nothing has been sent yet.");
});
byId("file").addEventListener("change", (event) => {
  if (event.target.files.length) take(event.target.files[0]);
  event.target.value = "";
});
byId("model").addEventListener("change", (event) => choose(event.target.value));
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  server.keepKey(byId("key").value);
  start();
});
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    byId("pad").classList.toggle("over", model?.shape && (name === "dragenter" || name === "dragover"));
    const file = event.dataTransfer?.files[0];
    if (name === "drop" && file && model?.shape) take(file);
  });
}
async function follow() {
  await look();
  setTimeout(follow, EVERY);
}

start().then(follow);
