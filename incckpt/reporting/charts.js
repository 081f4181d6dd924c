// --- axes

function ticks(low, high, wanted) {
  if (!(high > low)) return [low];
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  const found = [];
  for (let index = first; index * step <= high + step * 1e-9; index += 1) found.push(index * step);
  return found;
}

function wholeTicks(low, high, wanted) {
  return ticks(low, high, wanted).filter((value) => Math.abs(value - Math.round(value)) < 1e-6).map(Math.round);
}

function byteTicks(high) {
  return ticks(0, high, 4);
}

// Which of the columns, which stand side by side, get a label: those at round steps, at least `apart` columns from each other.
function labelled(steps, apart) {
  if (apart <= 1) return steps.map((_, index) => index);
  const first = steps[0], last = steps[steps.length - 1], found = [];
  let column = 0;
  for (const value of wholeTicks(first, last, Math.max(1, steps.length / apart))) {
    while (column < steps.length - 1 && steps[column] < value) column += 1;
    if (!found.length || column - found[found.length - 1] >= apart) found.push(column);
  }
  return found.length ? found : [steps.length - 1];
}

const shortStep = (value) => (value >= 1e6 ? `${number(value / 1e6)}M` : value >= 1e5 ? `${number(value / 1e3)}k` : count(value));

// A chart over steps. `series` have x (steps), y (NaN for gaps), and how they are drawn; `stack` draws bars instead.
function chart({ title, note, summary, height = 190, unit, log = false, zero = false, series = [], stack = null, key = null, describe }) {
  const svg = s("svg", { role: "img", "aria-label": `${title}. ${summary}`, tabindex: 0, height });
  const figure = h("figure", { class: "chart" }, h("figcaption", {}, h("h3", {}, title), h("span", { class: "figure-note" }, note || "")), svg, key);
  let hover = null;

  function draw() {
    const width = Math.max(240, svg.getBoundingClientRect().width || 400);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren();
    const bars = stack ? stack.x : [];
    const allX = [...series.flatMap((one) => one.x), ...bars];
    const tops = stack ? stack.x.map((_, index) => sum(stack.parts.map((part) => part.y[index] ?? 0))) : [];
    const allY = [...series.flatMap((one) => one.y), ...tops].filter(Number.isFinite);
    let low = Math.min(...fold(allY, Math.min)), high = Math.max(...fold(allY, Math.max));
    if (zero || stack) low = 0;
    if (!log && !(high > low)) { const pad = zero || stack ? 1 : Math.abs(high) * 0.1 || 1; if (!(zero || stack)) low -= pad; high = zero || stack ? high || 1 : high + pad; }
    let marks;
    if (log) {
      const from = Math.floor(Math.log10(low) + 1e-9), to = Math.max(from + 1, Math.ceil(Math.log10(high) - 1e-9));
      const every = Math.ceil((to - from) / 4);
      marks = [];
      for (let power = from; power <= to; power += every) marks.push(10 ** power);
      low = 10 ** from; high = 10 ** to;
    } else {
      marks = unit === size ? byteTicks(high) : ticks(low, high, 4);
      if (!(zero || stack) && marks.length > 1) { const step = marks[1] - marks[0]; low = Math.min(low, marks[0] - (marks[0] > low ? step : 0)); high = Math.max(high, marks[marks.length - 1] + (marks[marks.length - 1] < high ? step : 0)); marks = ticks(low, high, 5); }
      else if (marks.length > 1) { const step = marks[1] - marks[0]; if (marks[marks.length - 1] < high) { high = marks[marks.length - 1] + step; marks.push(high); } }
    }
    const labels = marks.map((value) => unit(value));
    const left = Math.max(...labels.map((label) => label.length)) * 7 + 10, right = 14, top = 8, bottom = 24;
    const firstX = Math.min(...fold(allX, Math.min)), lastX = Math.max(...fold(allX, Math.max));
    const slot = stack ? Math.min(90, (width - left - right) / Math.max(1, stack.x.length)) : 0;
    const even = stack !== null;  // bars stand side by side, one for each checkpoint
    const span = width - left - right;
    const x = even
      ? (value, index) => left + slot * (index + 0.5)
      : (value) => (lastX > firstX ? left + ((value - firstX) / (lastX - firstX)) * span : left + span / 2);
    const position = log
      ? (value) => Math.log(value / low) / Math.log(high / low)
      : (value) => (value - low) / (high - low);
    const y = (value) => height - bottom - position(value) * (height - bottom - top);
    marks.forEach((value, index) => {
      svg.append(
        s("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), stroke: "var(--grid)" }),
        s("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, labels[index]),
      );
    });
    if (even) {
      for (const index of labelled(stack.x, 72 / slot))
        svg.append(s("text", { x: x(0, index), y: height - 6, "text-anchor": "middle" }, shortStep(stack.x[index])));
    } else {
      for (const value of lastX > firstX ? wholeTicks(firstX, lastX, Math.max(2, span / 90)) : [firstX])
        svg.append(s("text", { x: x(value), y: height - 6, "text-anchor": "middle" }, shortStep(value)));
    }
    svg.append(s("text", { x: 0, y: height - 6 }, "step"));

    if (stack) {
      const gap = slot > 6 ? Math.min(4, slot * 0.2) : slot > 2 ? 0.5 : 0;
      const from = stack.x.map(() => 0);
      for (const part of stack.parts) {
        let path = "";
        part.y.forEach((value, index) => {
          if (!value) return;
          const y0 = y(from[index]), y1 = y(from[index] + value);
          from[index] += value;
          path += `M${(x(0, index) - slot / 2 + gap / 2).toFixed(2)} ${y0.toFixed(2)}h${(slot - gap).toFixed(2)}V${y1.toFixed(2)}h${(gap - slot).toFixed(2)}z`;
        });
        svg.append(s("path", { d: path, fill: part.color }));
      }
    }
    for (const one of series) {
      const points = one.x.map((value, index) => [x(value), one.y[index]]);
      if (one.area) {
        const shape = points.map(([px, value]) => `${px.toFixed(1)} ${y(value).toFixed(1)}`).join("L");
        svg.append(s("path", { d: `M${points[0][0].toFixed(1)} ${y(0)}L${shape}L${points[points.length - 1][0].toFixed(1)} ${y(0)}z`, fill: one.color, opacity: 0.16 }));
      }
      let path = "", pen = false;
      for (const [px, value] of points) {
        const drawn = Number.isFinite(value) && !(log && value <= 0);
        if (drawn) path += `${pen ? "L" : "M"}${px.toFixed(1)} ${y(value).toFixed(1)}`;
        pen = drawn;
      }
      svg.append(s("path", { d: path, fill: "none", stroke: one.color, "stroke-width": one.thin ? 1.3 : 1.9, "stroke-linejoin": "round", "stroke-linecap": "round", "stroke-dasharray": one.dashed ? "4 4" : null }));
      if (one.x.length === 1 || (one.x.length <= 60 && !one.dashed)) {
        const dots = points.filter(([, value]) => Number.isFinite(value) && !(log && value <= 0));
        const radius = one.x.length > 30 ? 1.8 : 2.6;
        svg.append(...dots.map(([px, value]) => s("circle", { cx: px.toFixed(1), cy: y(value).toFixed(1), r: one.thin ? 1.8 : radius, fill: one.color })));
      }
      for (const index of one.bad || [])
        svg.append(s("path", { d: `M${points[index][0] - 3.5} ${top - 3}h7l-3.5 6z`, fill: "var(--heat-bad)" }));
    }
    hover = { x, count: (stack || series[0]).x.length, xs: (stack || series[0]).x, left, right, top, bottom, width };
    mark = null;
  }

  let mark = null, at = null;

  function show(index, clientX, clientY) {
    if (!hover || hover.count === 0) return;
    at = Math.max(0, Math.min(hover.count - 1, index));
    const px = hover.x(hover.xs[at], at);
    if (mark === null) { mark = s("line", { stroke: "var(--soft)", y1: hover.top, y2: height - hover.bottom }); svg.append(mark); }
    mark.setAttribute("x1", px);
    mark.setAttribute("x2", px);
    const box = svg.getBoundingClientRect();
    showTip(describe(at), clientX ?? box.left + px, clientY ?? box.top + box.height / 2);
  }

  function clear() {
    hideTip();
    if (mark) mark.remove();
    mark = null;
  }

  svg.addEventListener("pointermove", (event) => {
    const px = event.clientX - svg.getBoundingClientRect().left;
    let best = 0;
    for (let index = 1; index < hover.count; index += 1)
      if (Math.abs(hover.x(hover.xs[index], index) - px) < Math.abs(hover.x(hover.xs[best], best) - px)) best = index;
    show(best, event.clientX, event.clientY);
  });
  svg.addEventListener("pointerleave", clear);
  svg.addEventListener("blur", clear);
  svg.addEventListener("keydown", (event) => {
    const last = hover.count - 1;
    const to = { ArrowLeft: (at ?? hover.count) - 1, ArrowRight: (at ?? -1) + 1, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(to);
    announce(describe(at).join(", "));
  });
  repaint.push(draw);
  return figure;
}

// Math.min(...values) overflows the stack for very long lists.
const fold = (values, pick) => (values.length ? [values.reduce((a, b) => pick(a, b))] : [0]);

const key = (...items) =>
  h("ul", { class: "key" }, items.map(([text, ink, kind]) => {
    const sample = h("i", { class: kind || "" });
    sample.style[kind ? "borderTopColor" : "background"] = ink;
    return h("li", {}, sample, text);
  }));

const live = h("div", { class: "away", "aria-live": "polite" });
document.body.append(live);
const announce = (text) => { live.textContent = text; };
