const data = JSON.parse(document.getElementById("data").textContent);
const main = document.getElementById("main");

// --- elements: text goes in as text, never as markup

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...[children ?? []].flat(3).filter((child) => child !== null && child !== undefined));
  return element;
}

const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

// A name that a line may break after its dots.
const breakable = (name) => name.split(/(?<=\.)/).flatMap((part, index) => (index ? [h("wbr"), part] : [part]));

// --- numbers

const count = (value) => value.toLocaleString("en-US");
const plural = (value, noun, many = `${noun}s`) => `${count(value)} ${value === 1 ? noun : many}`;

function number(value) {
  if (!Number.isFinite(value)) return value > 0 ? "∞" : value < 0 ? "−∞" : "NaN";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 1e-4 && size < 1e6
    ? String(Number(value.toPrecision(4)))
    : value.toExponential(2).replace(/\.?0*e/, "e").replace("e+", "e");
  return text.replace("-", "−").replace("e-", "e−");
}

function size(bytes) {
  const units = ["B", "KB", "MB", "GB", "TB", "PB"];
  let power = 0;
  while (Math.abs(bytes) >= 999.5 && power < units.length - 1) { bytes /= 1000; power += 1; }
  return `${power === 0 || bytes >= 99.95 ? Math.round(bytes) : bytes.toFixed(1)} ${units[power]}`;
}

function duration(seconds) {
  if (seconds === 0) return "0 s";
  if (seconds < 0.9995e-3) return `${Number((seconds * 1e6).toPrecision(2))} µs`;
  if (seconds < 0.9995) return `${Number((seconds * 1e3).toPrecision(3))} ms`;
  if (seconds < 120) return `${Number(seconds.toPrecision(3))} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

const percent = (part) => (part > 0 && part < 0.001 ? "< 0.1 %" : `${(100 * part).toFixed(part < 0.0995 ? 1 : 0)} %`);

function when(seconds) {
  const date = new Date(seconds * 1000);
  return Number.isNaN(date.getTime()) ? "" : date.toISOString().slice(0, 16).replace("T", " ");
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted.length === 0 ? NaN : (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2;
}

const sum = (values) => values.reduce((total, value) => total + value, 0);

// --- theme

const root = document.documentElement;
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const repaint = [];  // what is drawn anew when the theme or the width changes
let choice = "auto";

const color = (name) => getComputedStyle(root).getPropertyValue(name).trim();

function applyTheme() {
  root.dataset.theme = choice === "auto" ? (prefersDark.matches ? "dark" : "light") : choice;
  for (const button of document.querySelectorAll(".theme button"))
    button.setAttribute("aria-pressed", String(button.dataset.choice === choice));
  for (const draw of repaint) draw();
}

for (const [name, text] of [["auto", "Auto"], ["light", "Light"], ["dark", "Dark"]]) {
  const press = () => { choice = name; applyTheme(); };
  document.querySelector(".theme").append(h("button", { type: "button", "data-choice": name, onclick: press }, text));
}
prefersDark.addEventListener("change", applyTheme);

// --- the box that follows the pointer

const tip = document.querySelector(".tip");

function showTip(lines, x, y) {
  tip.replaceChildren(...lines.map((line, index) => h("div", {}, index === 0 ? h("b", {}, line) : line)));
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = x + 14 + box.width > innerWidth - 8 ? x - 14 - box.width : x + 14;
  const top = y + 16 + box.height > innerHeight - 8 ? y - 12 - box.height : y + 16;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${Math.max(8, top)}px`;
}

const hideTip = () => { tip.hidden = true; };
addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
