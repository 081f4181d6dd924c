// --- the sections

const { columns } = data;
const steps = columns.step;
const several = data.merged > 1 ? ` Each column stands for ${data.merged} checkpoints.` : "";

function section(title, note, ...body) {
  const id = title.toLowerCase().replace(/\W+/g, "-");
  main.append(h("section", { "aria-labelledby": id }, h("h2", { id }, title), note ? h("p", { class: "note" }, note) : null, body));
}

const wide = (...table) => h("div", { class: "wide" }, table);
const empty = (text) => h("p", { class: "empty" }, text);
const parsed = (values) => values.map((value) => (value === null ? NaN : { nan: NaN, inf: Infinity, "-inf": -Infinity }[value] ?? value));
const waits = ["wait", "flatten", "stage"].map((phase) => columns.blocked[phase]);
const waited = steps.map((_, index) => (waits[0][index] === null ? NaN : sum(waits.map((values) => values[index]))));
const measuredWaits = waited.filter(Number.isFinite);
const meanFull = data.checkpoints ? data.totals.full / data.checkpoints : 0;

function problems() {
  if (!data.problems.length) return;
  const more = data.hidden_problems ? h("li", {}, `and ${count(data.hidden_problems)} more`) : null;
  main.append(h("div", { class: "notice", role: "note" }, "Not all of this run could be read:", h("ul", {}, data.problems.map((text) => h("li", {}, text)), more)));
}

function tiles() {
  const tile = (name, value, sub) => h("div", { class: "tile" }, h("dt", {}, name), h("dd", { class: "value" }, value), h("dd", { class: "sub" }, sub));
  const abandoned = sum(data.branches.map((branch) => branch.count));
  const last = steps.length - 1;
  const ratio = data.totals.stored ? data.totals.full / data.totals.stored : 0;
  const attempts = new Set([...data.attempts.map(([attempt]) => attempt), ...data.branches.map((branch) => branch.attempt)]).size;
  main.append(h("dl", { class: "tiles" },
    tile("Checkpoints", count(data.checkpoints), `${data.checkpoints > 1 ? `steps ${count(steps[0])} to ${count(steps[last])}` : `step ${count(steps[0])}`}${abandoned ? `, ${count(abandoned)} more abandoned` : ""}`),
    tile("Stored", size(data.totals.stored), `full saves: ${size(data.totals.full)}${ratio >= 1.05 ? `, ${number(Number(ratio.toPrecision(2)))} times as much` : ""}`),
    tile("State", size(meanFull), data.heat.tensors ? plural(data.heat.tensors, "tensor") : "no tensors"),
    tile("Training waited", measuredWaits.length ? duration(median(measuredWaits)) : "–", measuredWaits.length ? `a save, median; at most ${duration(measuredWaits.reduce((a, b) => Math.max(a, b)))}` : "was not recorded"),
    tile("Last save", when(columns.time[last]).slice(0, 10), `${when(columns.time[last]).slice(11)} UTC; ${plural(attempts, "attempt")}`),
  ));
}

function metrics() {
  const note = data.branches.length ? "Dashed: checkpoints that were abandoned by going back behind them." : "";
  const figures = data.metrics.map((name, which) => {
    const y = parsed(columns.metrics[which]);
    const finite = y.filter(Number.isFinite);
    const bad = y.map((value, index) => (columns.metrics[which][index] !== null && !Number.isFinite(value) ? index : -1)).filter((index) => index >= 0);
    const branches = data.branches.map((branch) => ({ x: branch.step, y: parsed(branch.metrics[which]), color: "var(--faint)", dashed: true, thin: true }))
      .filter((branch) => branch.y.some(Number.isFinite));
    const low = finite.reduce((a, b) => Math.min(a, b), Infinity), high = finite.reduce((a, b) => Math.max(a, b), -Infinity);
    const others = branches.flatMap((branch) => branch.y).filter(Number.isFinite);
    // Not for a few outliers, nor for a learning rate that ends at zero.
    const sorted = [...finite].sort((a, b) => a - b), middle = (part) => sorted[Math.floor(part * (sorted.length - 1))];
    const log = finite.length > 2 && low > 0 && middle(0.95) / middle(0.05) > 1000 && others.every((value) => value > 0);
    const last = finite.length ? finite[finite.length - 1] : NaN;
    const text = finite.length ? `last ${number(last)} · lowest ${number(low)} · highest ${number(high)}${log ? " · logarithmic" : ""}` : "no finite value";
    return chart({
      title: name, log, unit: number, series: [{ x: steps, y, color: "var(--one)", bad }, ...branches],
      note: bad.length ? `${text} · ${count(bad.length)} not finite` : text,
      summary: `${plural(finite.length, "value")} over steps: ${text}.`,
      describe: (index) => [`${name} ${columns.metrics[which][index] === null ? "was not given" : number(y[index])}`, `step ${count(steps[index])}`, when(columns.time[index])],
    });
  });
  const body = figures.length
    ? [h("div", { class: "body grid" }, figures), data.hidden_metrics ? empty(`${count(data.hidden_metrics)} more are not shown.`) : null]
    : empty("No metrics were saved. Give them to save: manager.save(step, state, metrics={\"loss\": loss}).");
  section("Metrics", figures.length ? note + several : "", body);
}

function bytes() {
  let full = 0, stored = 0;
  const fulls = columns.full.map((value) => (full += value)), storeds = columns.stored.map((value) => (stored += value));
  const part = full ? stored / full : 0;
  section("Bytes stored", `What these checkpoints take in the store, beside what full saves of the same states would.${several}`,
    h("div", { class: "body halves" },
      chart({
        title: "All checkpoints so far", unit: size, zero: true,
        series: [{ x: steps, y: fulls, color: "var(--two)" }, { x: steps, y: storeds, color: "var(--one)", area: steps.length > 1 }],
        note: `${size(stored)} of ${size(full)}, ${percent(part)}`,
        summary: `${size(stored)} are stored; full saves would take ${size(full)}.`,
        key: key(["full saves", "var(--two)", "line"], ["stored", "var(--one)", "line"]),
        describe: (index) => [`${size(storeds[index])} stored`, `full saves: ${size(fulls[index])}`, `up to step ${count(steps[index])}`],
      }),
      chart({
        title: "Added by each checkpoint", unit: size, stack: { x: steps, parts: [{ y: columns.stored, color: "var(--one)" }] },
        note: `a full save: ${size(meanFull * data.merged)}`,
        summary: `Median ${size(median(columns.stored))}; a full save takes ${size(meanFull * data.merged)}.`,
        describe: (index) => [`${size(columns.stored[index])} added`, `a full save: ${size(columns.full[index])}`, `step ${count(steps[index])}`],
      }),
    ));
}

function blocking() {
  if (!measuredWaits.length) {
    section("Waiting for saves", "", empty("Not recorded: incckpt.save waits until all is stored, and managers record it from version 0.2 on."));
    return;
  }
  const names = ["waiting for earlier saves", "walking through the state", "finding and copying what changed"];
  const inks = ["var(--wait)", "var(--flatten)", "var(--stage)"];
  const longest = waited.map((value, index) => [Number.isFinite(value) ? value : -1, index]).reduce((a, b) => (b[0] > a[0] ? b : a))[1];
  section("Waiting for saves", `How long training stood still for each save. The rest of it happens in the background.${several}`,
    h("div", { class: "body" }, chart({
      title: "Time in save()", unit: duration, height: 200,
      stack: { x: steps, parts: waits.map((y, index) => ({ y, color: inks[index] })).reverse() },
      note: `median ${duration(median(measuredWaits))} · longest ${duration(waited[longest])} at step ${count(steps[longest])}`,
      summary: `Median ${duration(median(measuredWaits))}, longest ${duration(waited[longest])} at step ${steps[longest]}.`,
      key: key(...names.map((name, index) => [name, inks[index]]).reverse()),
      describe: (index) => Number.isFinite(waited[index])
        ? [`${duration(waited[index])} in all`, ...names.map((name, part) => `${duration(waits[part][index])} ${name}`), `step ${count(steps[index])}`]
        : ["not recorded", `step ${count(steps[index])}`],
    })));
}

function changes() {
  const { heat } = data;
  const note = `How far each tensor moved since the checkpoint before: ‖now − before‖ / ‖before‖, estimated from a sample unless there is a threshold. A module shows the most of any of its tensors.${several}${heat.depth ? ` There are ${count(heat.tensors)} tensors; each row stands for those whose names begin with it.` : ""}`;
  if (!heat.rows.length) { section("What changed", "", empty("The state has no tensor of more than one element.")); return; }
  if (data.checkpoints < 2) { section("What changed", "", empty("There is one checkpoint: nothing to compare it with yet.")); return; }
  const entry = ([name, relative, usual], withUsual) =>
    h("li", {}, h("span", {}, breakable(name)), h("span", {}, number(Number(relative.toPrecision(2))), withUsual && usual ? ` = ${number(Number((relative / usual).toPrecision(2)))} × usual` : ""));
  const group = (title, text, items) => h("div", {}, h("h3", {}, title), items.length ? h("ol", {}, items) : h("p", { class: "note" }, text));
  const frozen = heat.frozen.slice(0, 12).map((name) => h("li", {}, h("span", {}, breakable(name)), h("span", {}, "")));
  if (heat.frozen_count > 12) frozen.push(h("li", {}, h("span", {}, `and ${count(heat.frozen_count - 12)} more`), h("span", {})));
  section("What changed", note, heatMap(), h("div", { class: "lists" },
    group("Just jumped", "Nothing moved more than four times as far as it usually does.", heat.jumped.map((mover) => entry(mover, true))),
    group(`Moved most at step ${count(steps[steps.length - 1])}`, "No change was measured at the last checkpoint.", heat.learning.map((mover) => entry(mover, false))),
    group(`Frozen${heat.frozen_count ? `: ${count(heat.frozen_count)} of ${plural(heat.rows.length, heat.depth ? "group" : "tensor")}` : ""}`, "Every tensor changed at some checkpoint.", frozen)));
}

function lineage() {
  const first = steps[0], branches = data.branches;
  const low = Math.min(first, ...branches.map((branch) => branch.parent ?? branch.step[0])), high = Math.max(steps[steps.length - 1], ...branches.map((branch) => branch.step[branch.step.length - 1]));
  // Branches that do not overlap share a lane.
  const lanes = [];
  const laneOf = branches.map((branch) => {
    const from = branch.parent ?? branch.step[0], to = branch.step[branch.step.length - 1];
    const room = (high - low) * 0.06;
    let lane = lanes.findIndex((end) => end + room < from);
    if (lane < 0) lane = lanes.push(-Infinity) - 1;
    lanes[lane] = to;
    return lane;
  });
  const drop = Math.min(34, 300 / Math.max(1, lanes.length));
  const height = 62 + lanes.length * drop + 22;
  const text = branches.length
    ? `${plural(data.attempts.length, "attempt")} made the checkpoints of this run; ${plural(branches.length, "branch", "branches")} abandoned.`
    : `${plural(data.attempts.length, "attempt")} made the checkpoints of this run; none was abandoned.`;
  const svg = s("svg", { role: "img", "aria-label": `Lineage. ${text}`, height });
  function draw() {
    const width = Math.max(240, svg.getBoundingClientRect().width || 400), left = 12, right = 16, y = 46;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren();
    const x = (step) => (high > low ? left + ((step - low) / (high - low)) * (width - left - right) : width / 2);
    for (const step of high > low ? wholeTicks(low, high, Math.max(2, (width - left - right) / 90)) : [low])
      svg.append(
        s("line", { x1: x(step), x2: x(step), y1: 30, y2: height - 22, stroke: "var(--grid)" }),
        s("text", { x: x(step), y: height - 5, "text-anchor": "middle" }, shortStep(step)));
    branches.forEach((branch, index) => {
      const level = y + 24 + laneOf[index] * drop, from = x(branch.parent ?? branch.step[0]), start = x(branch.step[0]), end = x(branch.step[branch.step.length - 1]);
      const bend = Math.min(16, Math.max(4, start - from));
      const path = branch.parent === null ? `M${start} ${level}H${end}` : `M${from} ${y}C${from} ${level} ${from} ${level} ${from + bend} ${level}H${Math.max(end, from + bend)}`;
      const words = `attempt ${branch.attempt}: ${plural(branch.count, "checkpoint")} abandoned, step${branch.count > 1 ? `s ${count(branch.step[0])} to ${count(branch.step[branch.step.length - 1])}` : ` ${count(branch.step[0])}`}`;
      const lane = s("g", {}, s("path", { d: path, fill: "none", stroke: "var(--faint)", "stroke-width": 2, "stroke-dasharray": "5 4" }),
        (end - start) / branch.step.length >= 9 || branch.step.length === 1 ? branch.step.map((step) => s("circle", { cx: x(step), cy: level, r: 3, fill: "var(--card)", stroke: "var(--faint)", "stroke-width": 1.6 })) : [],
        s("path", { d: path, fill: "none", stroke: "transparent", "stroke-width": 16 }));
      lane.addEventListener("pointermove", (event) => showTip([words, `size of its saves: ${size(branch.written)}`, branch.parent === null ? "from the beginning" : `from step ${count(branch.parent)}`], event.clientX, event.clientY));
      lane.addEventListener("pointerleave", hideTip);
      svg.append(lane);
    });
    let room = -Infinity;
    data.attempts.forEach(([attempt, from, to, many], index) => {
      const start = index > 0 ? x(data.attempts[index - 1][2]) : x(from), ink = index % 2 ? "var(--two)" : "var(--one)";
      svg.append(s("line", { x1: start, x2: x(to), y1: y, y2: y, stroke: ink, "stroke-width": 3, "stroke-linecap": "round" }));
      const label = `attempt ${attempt}`, at = index > 0 ? start : x(from);
      if (at > room && at + label.length * 6.6 < width) {
        svg.append(s("line", { x1: at, x2: at, y1: 20, y2: y, stroke: ink, "stroke-width": 1 }), s("text", { x: at + 5, y: 26 }, label));
        room = at + label.length * 6.6 + 14;
      }
      const line = s("line", { x1: start, x2: Math.max(x(to), start + 4), y1: y, y2: y, stroke: "transparent", "stroke-width": 18 });
      line.addEventListener("pointermove", (event) => showTip([`attempt ${attempt}`, `${plural(many, "checkpoint")}, step${many > 1 ? `s ${count(from)} to ${count(to)}` : ` ${count(from)}`}`], event.clientX, event.clientY));
      line.addEventListener("pointerleave", hideTip);
      svg.append(line);
    });
    if ((x(steps[steps.length - 1]) - x(first)) / steps.length >= 9 || steps.length === 1)
      svg.append(s("g", { "pointer-events": "none" }, steps.map((step) => s("circle", { cx: x(step), cy: y, r: 3.6, fill: "var(--card)", stroke: "var(--text)", "stroke-width": 1.6 }))));
  }
  repaint.push(draw);
  const rows = branches.map((branch) => h("tr", {}, h("th", { class: "name", scope: "row" }, `attempt ${branch.attempt}`), h("td", {}, count(branch.count)), h("td", {}, `${count(branch.step[0])} to ${count(branch.step[branch.step.length - 1])}`), h("td", {}, branch.parent === null ? "the beginning" : `step ${count(branch.parent)}`), h("td", {}, size(branch.written))));
  const table = branches.length ? h("table", {}, h("caption", { class: "away" }, "Abandoned checkpoints"), h("thead", {}, h("tr", {}, h("th", { class: "name", scope: "col" }, "Abandoned"), ["Checkpoints", "Steps", "Went on from", "Written"].map((name) => h("th", { scope: "col" }, name)))), h("tbody", {}, rows)) : null;
  section("Lineage", text, h("div", { class: "body" }, svg, table ? wide(table) : null), data.hidden_branches ? empty(`${count(data.hidden_branches)} more are not shown.`) : null);
}

function sizes() {
  if (!data.components.length) return;
  const total = sum(data.components.map((component) => component.bytes)) || 1;
  const share = (value, ink) => h("td", { class: "share" }, s("svg", { "aria-hidden": "true", height: 12, viewBox: "0 0 100 12", preserveAspectRatio: "none" }, s("rect", { width: 100, height: 12, fill: "var(--grid)" }), s("rect", { width: (100 * value) / total, height: 12, fill: ink })));
  const cells = (component, ink) => [
    h("td", {}, component.tensors ? count(component.tensors) : ""), h("td", { class: "text" }, component.dtypes.join(", ")),
    h("td", {}, size(component.bytes)), share(component.bytes, ink), h("td", {}, percent(component.bytes / total)), h("td", {}, size(component.stored))];
  const body = h("tbody", {});
  for (const component of data.components) {
    const parts = component.parts.length > 1 ? component.parts : [];
    const rows = parts.map((part) => h("tr", { class: "part", hidden: true }, h("th", { class: "name", scope: "row" }, part.name === null ? `${count(component.others)} more` : breakable(part.name || "(itself)")), cells(part, "var(--faint)")));
    const name = component.name === null ? "plain values" : component.name || "(no name)";
    const button = parts.length ? h("button", { type: "button", class: "toggle", "aria-expanded": "false", "aria-label": `Parts of ${name}` }, "▸") : h("span", { class: "indent" });
    if (parts.length) button.addEventListener("click", () => {
      const open = button.getAttribute("aria-expanded") !== "true";
      button.setAttribute("aria-expanded", String(open));
      button.textContent = open ? "▾" : "▸";
      for (const row of rows) row.hidden = !open;
    });
    body.append(h("tr", {}, h("th", { class: "name", scope: "row" }, h("div", { class: "named" }, button, h("span", {}, breakable(name)))), cells(component, "var(--one)")), ...rows);
  }
  section("Sizes", `What the checkpoint of step ${count(steps[steps.length - 1])} consists of. Stored: the objects that it needs, those shared with other checkpoints included.`,
    h("div", { class: "body" }, wide(h("table", {}, h("thead", {}, h("tr", {}, h("th", { class: "name", scope: "col" }, "Component"), h("th", { scope: "col" }, "Tensors"), h("th", { scope: "col", class: "text" }, "Types"), h("th", { scope: "col" }, "Size"), h("th", { scope: "col", colspan: 2 }, "Part of the state"), h("th", { scope: "col" }, "Stored"))), body))));
}

function table() {
  const holder = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table of checkpoints" });
  const details = h("details", {}, h("summary", {}, "Checkpoints as a table"), holder);
  const shown = data.metrics.slice(0, 12);
  details.addEventListener("toggle", () => {
    if (holder.childElementCount) return;
    const names = ["Step", "Attempt", "Time (UTC)", "State", "Added", "Waited"];
    holder.append(h("table", {},
      h("thead", {}, h("tr", {}, [...names, ...shown].map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, steps.map((step, index) => h("tr", {}, [count(step), count(columns.attempt[index]), when(columns.time[index]), size(columns.full[index]), size(columns.stored[index]), Number.isFinite(waited[index]) ? duration(waited[index]) : "",
        ...shown.map((_, which) => (columns.metrics[which][index] === null ? "" : number(parsed([columns.metrics[which][index]])[0])))].map((text) => h("td", {}, text)))))));
  });
  main.append(h("section", {}, details));
}

problems();
if (data.checkpoints === 0) {
  main.append(h("section", {}, h("h2", {}, "This run has no checkpoint yet"), h("p", { class: "note" }, "Once a save is committed, a new report shows it.")));
} else {
  tiles();
  metrics();
  bytes();
  blocking();
  changes();
  lineage();
  sizes();
  table();
}
applyTheme();
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; for (const draw of repaint) draw(); } });
