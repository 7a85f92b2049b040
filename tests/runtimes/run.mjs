// node run.mjs FOLDER PACKAGE: compares a runtime of npm with the answers that cells.py wrote to FOLDER.
// It needs no code of this project: the loop over stages below is all that a scheduler does.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const [folder, runtime] = process.argv.slice(2);
const found = createRequire(join(process.cwd(), "package.json"))(runtime);
const ort = found.default ?? found;
const { tolerance, networks } = JSON.parse(readFileSync(join(folder, "cases.json"), "utf8"));
const options = { executionProviders: [runtime === "onnxruntime-web" ? "wasm" : "cpu"], logSeverityLevel: 3 };
const ARRAYS = { float32: Float32Array, int64: BigInt64Array };

const open = (path) => ort.InferenceSession.create(new Uint8Array(readFileSync(path)), options);
const float = (values) => new ort.Tensor("float32", Float32Array.from([values].flat()), [[values].flat().length]);

function tensor({ dtype, shape, values }) {
  return new ort.Tensor(dtype, ARRAYS[dtype].from(values, dtype === "int64" ? BigInt : Number), shape);
}

function rowsOf(value, rows) {
  const size = value.dims.slice(1).reduce((a, b) => a * b, 1);
  const data = new value.data.constructor(rows.length * size);
  rows.forEach((row, k) => data.set(value.data.subarray(row * size, (row + 1) * size), k * size));
  return new ort.Tensor(value.type, data, [rows.length, ...value.dims.slice(1)]);
}

const mapped = (values, change) => Object.fromEntries(Object.entries(values).map(([name, v]) => [name, change(v)]));
const range = (count) => [...Array(count).keys()];

function differ(name, values, wanted, allowed) {
  const got = Array.from(values, Number), expected = wanted.flat(Infinity);
  if (got.length !== expected.length) return `${name}: ${got.length} values instead of ${expected.length}`;
  const limit = allowed * expected.reduce((most, v) => Math.max(most, Math.abs(v)), 1);
  const place = got.findIndex((value, k) => !(Math.abs(value - expected[k]) <= limit));
  return place < 0 ? "" : `${name}[${place}] is ${got[place]} instead of ${expected[place]}`;
}

function answersDiffer(answer, wanted) {
  const allowed = { label: 0, exit: 0, score: tolerance, output: tolerance };
  return Object.keys(allowed).map((name) => differ(name, answer[name], wanted[name], allowed[name])).find(Boolean) ?? "";
}

const arraysOf = (answer) => mapped(answer, (value) => Array.from(value.data, Number));

// One nested file: a call with its thresholds as inputs, or without.
async function nested(session, inputs, thresholds) {
  const given = (thresholds ?? []).map((t, n) => [`threshold_${n + 1}`, float(t)]);
  return arraysOf(await session.run({ ...inputs, ...Object.fromEntries(given) }));
}

// Stages: after each, the samples whose score is not below the threshold go on.
async function staged(stages, inputs, thresholds) {
  let rows = range(Object.values(inputs)[0].dims[0]), held = inputs;
  const answers = [];
  for (const [n, { session, exit, threshold, feeds }] of stages.entries()) {
    const given = Object.fromEntries(feeds.map((name) => [name, held[name]]));
    const { label, score, output, ...carried } = await session.run(given);
    const own = thresholds?.[n] ?? threshold;
    const below = (k) => score.data[k] < Math.fround(Array.isArray(own) ? own[rows[k]] : own);
    const leaves = rows.map((_, k) => n === stages.length - 1 || below(k));
    const width = output.data.length / rows.length;
    rows.forEach((row, k) => {
      const values = Array.from(output.data.subarray(k * width, (k + 1) * width));
      if (leaves[k]) answers[row] = { label: [Number(label.data[k])], exit: [exit], score: [score.data[k]], output: values };
    });
    const stay = range(rows.length).filter((k) => !leaves[k]);
    if (!stay.length) break;
    held = mapped({ ...held, ...carried }, (value) => rowsOf(value, stay));
    rows = stay.map((k) => rows[k]);
  }
  return joined(answers);
}

const joined = (answers) => mapped(answers[0], () => []) && Object.fromEntries(
  Object.keys(answers[0]).map((name) => [name, answers.flatMap((answer) => answer[name])]));

async function openStages(path) {
  const manifest = JSON.parse(readFileSync(join(path, "stages.json"), "utf8")).stages;
  const stages = manifest.stages ?? manifest;
  return Promise.all(stages.map(async ({ file, exit, threshold, inputs }) => (
    { session: await open(join(path, file)), exit, threshold, feeds: inputs.map((input) => input.name) })));
}

async function cell(network, layout) {
  const path = join(folder, network.files[layout]);
  const all = Object.fromEntries(network.inputs.map((input) => [input.name, tensor(input)]));
  const first = (count) => mapped(all, (value) => rowsOf(value, range(count)));
  if (layout === "flat") {
    const session = await open(path), outputs = await session.run(all);
    return session.outputNames.map((name, k) => differ(name, outputs[name].data, network.flat[k], k ? tolerance : 0))
      .find(Boolean) ?? "";
  }
  const session = layout === "stages" ? await openStages(path) : await open(path);
  const call = layout === "stages" ? staged : nested;
  const takesThresholds = layout === "input" || layout === "stages";
  for (const { rows, thresholds, answer } of network.cases) {
    if (layout === "batch 1" && rows > 1) continue;
    const own = JSON.stringify(thresholds) === JSON.stringify(network.own);
    const calls = [...(takesThresholds ? [thresholds] : []), ...(own && layout !== "input" ? [undefined] : [])];
    for (const given of calls) {
      const problem = answersDiffer(await call(session, first(rows), given), answer);
      if (problem) return `${rows} samples, thresholds ${given ? JSON.stringify(given).slice(0, 60) : "of the file"}: ${problem}`;
    }
  }
  return takesThresholds ? "" : hidesThresholds(session, first(1));
}

// These packages do not know inputs with default values: -node drops a given threshold, and -web refuses it.
async function hidesThresholds(session, inputs) {
  if (session.inputNames.some((name) => name.startsWith("threshold_"))) return "it shows thresholds; mend docs/runtimes.md";
  const own = await nested(session, inputs), exits = [-1, 1e30].map((t) => nested(session, inputs, [t]));
  const kept = (answer) => answersDiffer(answer, own) === "";
  const found = (await Promise.allSettled(exits)).map((one) => (one.status === "fulfilled" ? kept(one.value) : "refused"));
  const wanted = runtime === "onnxruntime-web" ? "refused" : true;
  return found.every((one) => one === wanted) ? "" : "it takes given thresholds; mend docs/runtimes.md";
}

let failed = 0;
for (const [name, network] of Object.entries(networks)) {
  for (const layout of Object.keys(network.files)) {
    const problem = await cell(network, layout).catch((error) => `it stops with ${error.message.split("\n")[0]}`);
    console.log(`${runtime}: ${name}, ${layout}: ${problem || "answers agree"}`);
    failed += problem ? 1 : 0;
  }
}
process.exit(failed ? 1 : 0);
