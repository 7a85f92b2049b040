// Requests to the server, with the API key of this tab if there is one.

const STORED = "branchynet-key";

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function keepKey(key) {
  sessionStorage.setItem(STORED, key);
}

export const hasKey = () => Boolean(sessionStorage.getItem(STORED));

export async function call(path, options = {}) {
  const headers = new Headers(options.headers);
  const key = sessionStorage.getItem(STORED);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer; look whether it still runs.", 0);
  }
  const found = await response.json().catch(() => ({}));
  if (!response.ok) throw new ServerError(found.error ?? `The server answered ${response.status}.`, response.status);
  return found;
}

const model = (name) => `/models/${encodeURIComponent(name)}`;

export const models = () => call("/v2/repository/index", { method: "POST", body: "{}" });
export const about = (name) => call(model(name));
export const metadata = (name) => call(`/v2${model(name)}`);
export const frontier = (name) => call(`${model(name)}/frontier`);
export const traffic = (name) => call(`${model(name)}/traffic`);

// Send an image file; `policy` has the name of a preset, or thresholds, or neither for those of the file.
export function predict(name, image, policy, signal) {
  const query = new URLSearchParams({ model: name });
  if (policy.name) query.set("policy", policy.name);
  else if (policy.sent) query.set("thresholds", policy.sent.map((t) => t ?? "never").join(","));
  return call(`/predict?${query}`, {
    method: "POST", body: image, signal, headers: { "Content-Type": image.type || "application/octet-stream" },
  });
}
