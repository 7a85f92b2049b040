// Elements and numbers as text. Names from the server reach the page as text alone.

export const byId = (id) => document.getElementById(id);

export function element(tag, attributes = {}, ...children) {
  const found = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") found.textContent = value;
    else found.setAttribute(name, value);
  }
  found.append(...children);
  return found;
}

export function shape(tag, attributes, text = "") {
  const found = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) found.setAttribute(name, value);
  found.textContent = text;
  return found;
}

export const percent = (share, digits = 1) => (share === null ? "–" : `${(100 * share).toFixed(digits)}%`);
export const number = (value) => (value === null ? "–" : Number(value.toPrecision(3)).toString());

export function time(us) {
  if (us === null || us === undefined) return "–";
  if (us < 1000) return `${us < 10 ? us.toFixed(1) : us.toFixed(0)} µs`;
  return us < 1e6 ? `${number(us / 1e3)} ms` : `${number(us / 1e6)} s`;
}

// The strength of the accent color for the nth of several exits.
export const strength = (n, count) => (count < 2 ? 1 : 1 - (0.72 * n) / (count - 1)).toFixed(3);
