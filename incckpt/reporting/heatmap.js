// --- the heat map: tensors, grouped by module, × checkpoints

const ABSENT = 0, UNCHANGED = 1, FIRST = 2, UNSURE = 3, CHANGED = 4, SCALE = 5, FROM_ZERO = 254, NOT_FINITE = 255;
const ROW = 19, HEAD = 24, FONT = '12px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';
const WIDTHS = [null, 2, 5, 10, 20];  // of a column, in pixels; null: as many as there are fit

const relativeOf = (cell) =>
  10 ** (data.heat.lowest + ((cell - SCALE) / (FROM_ZERO - 1 - SCALE)) * (data.heat.highest - data.heat.lowest));

function meaning(cell) {
  if (cell === ABSENT) return "not in this checkpoint";
  if (cell === UNCHANGED) return "did not change";
  if (cell === FIRST) return "nothing earlier to compare with";
  if (cell === UNSURE) return "may have changed: it is stored together with others that did";
  if (cell === CHANGED) return "changed; by how much was not measured";
  if (cell === FROM_ZERO) return "was all zero before";
  if (cell === NOT_FINITE) return "holds NaN or infinity";
  return `relative change ${number(Number(relativeOf(cell).toPrecision(2)))}`;
}

// Modules as a tree of the names' parts; a module with one member is shown as one with it.
function modules(names) {
  const top = { children: new Map() };
  names.forEach((name, row) => {
    let node = top;
    for (const part of name.split(".")) {
      if (!node.children.has(part)) node.children.set(part, { label: part, children: new Map(), row: null });
      node = node.children.get(part);
    }
    if (node.row === null) node.row = row;
    else node.children.set(`\u0000${row}`, { label: "", children: new Map(), row });
  });
  function finish(node, label, path, depth) {
    let children = [...node.children.values()];
    while (children.length === 1 && node.row === null) {
      node = children[0];
      label = label ? `${label}.${node.label}` : node.label;
      path = path ? `${path}.${node.label}` : node.label;
      children = [...node.children.values()];
    }
    const found = { label, path, depth, rows: [], children: [], open: false, own: null };
    if (node.row !== null && children.length === 0) { found.rows.push(node.row); return found; }
    if (node.row !== null) children = [{ label: "(itself)", children: new Map(), row: node.row }, ...children];
    found.children = children.map((child) => finish(child, child.label, path ? `${path}.${child.label}` : child.label, depth + 1));
    for (const child of found.children) for (const row of child.rows) found.rows.push(row);
    return found;
  }
  const children = [...top.children.values()];
  return children.map((child) => finish(child, child.label, child.label, 0));
}

function heatMap() {
  const { rows } = data.heat;
  const columns = data.columns.step.length;
  const bytes = atob(data.heat.cells);
  const cells = new Uint8Array(bytes.length);
  for (let index = 0; index < bytes.length; index += 1) cells[index] = bytes.charCodeAt(index);
  const tops = modules(rows);

  function lineOf(node) {  // the highest cell of its tensors, by column
    if (node.own === null) {
      node.own = new Uint8Array(columns);
      for (const row of node.rows) {
        const start = row * columns;
        for (let column = 0; column < columns; column += 1)
          if (cells[start + column] > node.own[column]) node.own[column] = cells[start + column];
      }
    }
    return node.own;
  }

  // The colours span the decades that occur, but for the rarest.
  const counts = new Array(256).fill(0);
  for (const cell of cells) counts[cell] += 1;
  let measured = 0;
  for (let cell = SCALE; cell < FROM_ZERO; cell += 1) measured += counts[cell];
  function quantile(part) {
    let seen = 0;
    for (let cell = SCALE; cell < FROM_ZERO; cell += 1) {
      seen += counts[cell];
      if (seen >= part * measured && seen > 0) return cell;
    }
    return SCALE;
  }
  const decade = (cell, round) => round(Math.log10(relativeOf(cell)));
  let lowest = measured ? decade(quantile(0.01), Math.floor) : -5;
  let highest = measured ? decade(quantile(0.995), Math.ceil) : -1;
  while (highest - lowest < 2) { if (highest < 0) highest += 1; else lowest -= 1; }

  let palette = [];
  function mix(stops, place) {
    const at = Math.min(Math.max(place, 0), 1) * (stops.length - 1), index = Math.min(Math.floor(at), stops.length - 2);
    return stops[index].map((value, part) => Math.round(value + (stops[index + 1][part] - value) * (at - index)));
  }
  function paint() {
    const rgb = (text) => [1, 3, 5].map((start) => parseInt(text.slice(start, start + 2), 16));
    const stops = color("--heat").split(/\s+/).map(rgb);
    palette = Array.from({ length: 256 }, (_, cell) => {
      if (cell === ABSENT) return null;
      const named = { [UNCHANGED]: "--heat-unchanged", [FIRST]: "--heat-first", [UNSURE]: "--heat-unsure", [CHANGED]: "--heat-changed", [NOT_FINITE]: "--heat-bad" }[cell];
      if (named) return color(named);
      const place = cell === FROM_ZERO ? 1 : (Math.log10(relativeOf(cell)) - lowest) / (highest - lowest);
      return `rgb(${mix(stops, place).join(" ")})`;
    });
  }

  // --- what is shown: the open modules, or what the search finds

  let wanted = "", zoom = 0, shown = [], cursor = { row: 0, column: columns - 1 };

  function openSome(most) {  // level by level, what leaves the map no longer than this
    let size = tops.length;
    for (let level = tops; level.length;) {
      const next = [];
      for (const node of level)
        if (node.children.length && size + node.children.length <= (size === 1 ? 4 * most : most)) {
          node.open = true;
          size += node.children.length;
          next.push(...node.children);
        }
      level = next;
    }
  }
  openSome(32);

  function list() {
    shown = [];
    const text = wanted.toLowerCase();
    const visit = (node) => {
      if (text) {
        if (node.children.length === 0) { if (node.path.toLowerCase().includes(text)) shown.push(node); } else node.children.forEach(visit);
        return;
      }
      shown.push(node);
      if (node.open) node.children.forEach(visit);
    };
    tops.forEach(visit);
    cursor.row = Math.max(0, Math.min(cursor.row, shown.length - 1));
    found.textContent = text ? `${plural(shown.length, "tensor")} found` : "";
  }

  // --- drawing

  const canvas = h("canvas", {
    tabindex: 0, role: "application", "aria-roledescription": "heat map", "aria-describedby": "heat-help",
    "aria-label": `Relative change of ${plural(data.heat.tensors, "tensor")} in ${plural(columns, "checkpoint")}`,
  });
  const extent = h("div", { class: "extent" });
  const frame = h("div", { class: "heat" }, canvas, extent);
  const found = h("output", {});
  let place = null;

  function ellipsis(context, text, width) {
    if (context.measureText(text).width <= width) return text;
    let low = 0, high = text.length;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (context.measureText(`…${text.slice(text.length - middle)}`).width <= width) low = middle; else high = middle - 1;
    }
    return `…${text.slice(text.length - low)}`;
  }

  const labelOf = (node) => (wanted ? node.path : node.label) || "(no name)";
  const indentOf = (node) => (wanted ? 10 : 10 + node.depth * 14 + 14);

  function layout() {
    const context = canvas.getContext("2d");
    context.font = FONT;
    const width = frame.clientWidth;
    let label = 120;
    for (const node of shown.slice(0, 2000)) label = Math.max(label, indentOf(node) + context.measureText(labelOf(node)).width + 16);
    label = Math.ceil(Math.min(label, width * 0.42, 420));
    const room = width - label - 10;
    const cell = zoom === 0 ? Math.min(room / columns, 90) : Math.max(WIDTHS[zoom], Math.min(room / columns, 90));
    const height = Math.min(640 - 2, HEAD + Math.max(1, shown.length) * ROW + 2);
    place = { width, height, label, cell, room };
    const wide = label + columns * cell + 10;
    extent.style.width = `${Math.max(1, zoom === 0 ? 1 : wide)}px`;
    extent.style.height = `${HEAD + shown.length * ROW + 2}px`;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${Math.min(height, frame.clientHeight || height)}px`;
    frame.style.height = `${height + 2 + (wide > width + 1 && zoom !== 0 ? 14 : 0)}px`;
    place.height = Math.min(height, frame.clientHeight || height);
    canvas.style.height = `${place.height}px`;
  }

  function draw() {
    if (!place) return;
    const ratio = devicePixelRatio || 1;
    const { width, height, label, cell } = place;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.fillStyle = color("--card");
    context.fillRect(0, 0, width, height);
    context.font = FONT;
    context.textBaseline = "middle";
    const left = frame.scrollLeft, top = frame.scrollTop;
    const firstRow = Math.floor(top / ROW), lastRow = Math.min(shown.length - 1, Math.floor((top + height - HEAD) / ROW));
    const firstColumn = Math.max(0, Math.floor(left / cell)), lastColumn = Math.min(columns - 1, Math.ceil((left + width - label) / cell));
    const gap = cell >= 8 ? 1 : 0;
    const edge = (column) => label + column * cell - left;

    context.save();
    context.beginPath();
    context.rect(label, HEAD, width - label, height - HEAD);
    context.clip();
    for (let row = firstRow; row <= lastRow; row += 1) {
      const line = lineOf(shown[row]), y = HEAD + row * ROW - top;
      let column = firstColumn;
      while (column <= lastColumn) {
        const x0 = Math.round(edge(column) * ratio) / ratio;
        let after = column + 1, value = line[column];
        // Columns narrower than a pixel: the highest of them shows.
        while (after <= lastColumn && Math.round(edge(after) * ratio) / ratio <= x0) { value = Math.max(value, line[after]); after += 1; }
        if (gap === 0) while (after <= lastColumn && line[after] === value) after += 1;
        const x1 = Math.round(edge(after) * ratio) / ratio;
        if (palette[value]) { context.fillStyle = palette[value]; context.fillRect(x0, y + 1, Math.max(x1 - x0 - gap, 1 / ratio), ROW - 1); }
        column = after;
      }
    }
    context.restore();

    // Labels
    const text = color("--text"), soft = color("--soft"), grid = color("--line");
    context.save();
    context.beginPath();
    context.rect(0, HEAD, label - 6, height - HEAD);
    context.clip();
    for (let row = firstRow; row <= lastRow; row += 1) {
      const node = shown[row], y = HEAD + row * ROW - top + ROW / 2 + 0.5, indent = indentOf(node);
      if (node.children.length && !wanted) {
        context.fillStyle = soft;
        context.beginPath();
        const x = indent - 11;
        if (node.open) { context.moveTo(x, y - 2.5); context.lineTo(x + 7, y - 2.5); context.lineTo(x + 3.5, y + 2.5); }
        else { context.moveTo(x + 1, y - 3.5); context.lineTo(x + 6, y); context.lineTo(x + 1, y + 3.5); }
        context.fill();
      }
      context.fillStyle = node.children.length ? text : soft;
      context.fillText(ellipsis(context, labelOf(node), label - indent - 14), indent, y);
      if (node.children.length && !wanted) {
        const end = indent + context.measureText(labelOf(node)).width + 6, many = count(node.rows.length);
        if (end + context.measureText(many).width < label - 10) { context.fillStyle = color("--faint"); context.fillText(many, end, y); }
      }
    }
    context.restore();

    // Steps
    context.fillStyle = color("--card");
    context.fillRect(0, 0, width, HEAD);
    context.fillStyle = soft;
    context.textAlign = "left";
    context.fillText("step", 10, HEAD / 2);
    context.textAlign = "center";
    for (const column of labelled(data.columns.step, 72 / cell)) {
      const x = edge(column) + cell / 2, words = shortStep(data.columns.step[column]);
      if (x > label + 8 && x + context.measureText(words).width / 2 < width) context.fillText(words, x, HEAD / 2);
    }
    context.textAlign = "left";
    context.fillStyle = grid;
    context.fillRect(0, HEAD - 1, width, 1);

    // Where the cursor is
    if (document.activeElement === canvas && shown.length) {
      context.strokeStyle = color("--focus");
      context.lineWidth = 2;
      const y = HEAD + cursor.row * ROW - top;
      if (y >= HEAD) context.strokeRect(Math.max(label, edge(cursor.column)) - 1, y, Math.max(cell - gap, 3) + 2, ROW + 1);
      context.strokeStyle = color("--faint");
      context.lineWidth = 1;
      if (y >= HEAD) context.strokeRect(0.5, y + 0.5, width - 1, ROW);
    }
  }

  function refresh() { list(); layout(); draw(); }

  // --- pointer and keyboard

  function at(event) {
    const box = canvas.getBoundingClientRect();
    const x = event.clientX - box.left, y = event.clientY - box.top;
    if (y < HEAD) return null;
    const row = Math.floor((y - HEAD + frame.scrollTop) / ROW);
    if (row >= shown.length) return null;
    const column = x < place.label ? null : Math.floor((x - place.label + frame.scrollLeft) / place.cell);
    return column !== null && column >= columns ? null : { row, column };
  }

  function describe({ row, column }) {
    const node = shown[row], many = node.rows.length;
    const name = many > 1 ? `${node.path} (${count(many)} tensors)` : node.path;
    if (column === null) return [name, ...(node.children.length && !wanted ? [node.open ? "click to close" : "click to open"] : [])];
    let cell = lineOf(node)[column];
    let step = `step ${count(data.columns.step[column])}`;
    if (place.cell < 1) {  // several columns share a pixel: tell of the highest
      const last = Math.min(columns - 1, column + Math.ceil(1 / place.cell) - 1);
      for (let next = column + 1; next <= last; next += 1)
        if (lineOf(node)[next] > cell) { cell = lineOf(node)[next]; step = `step ${count(data.columns.step[next])}`; }
    }
    const since = data.columns.since[column], before = column > 0 ? data.columns.step[column - 1] : null;
    if (cell >= SCALE && since !== null && since !== before && data.merged === 1) step += `, since step ${count(since)}, which is not kept`;
    const most = many > 1 && cell >= CHANGED ? ", the most of any" : "";
    return [name, step, meaning(cell) + most];
  }

  function toggle(row) {
    const node = shown[row];
    if (wanted || !node || !node.children.length) return false;
    node.open = !node.open;
    refresh();
    return true;
  }

  canvas.addEventListener("pointermove", (event) => {
    const hit = at(event);
    canvas.style.cursor = hit && hit.column === null && shown[hit.row].children.length ? "pointer" : "default";
    if (hit) showTip(describe(hit), event.clientX, event.clientY); else hideTip();
  });
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("click", (event) => {
    const hit = at(event);
    if (!hit) return;
    cursor = { row: hit.row, column: hit.column ?? cursor.column };
    if (hit.column === null) toggle(hit.row); else draw();
  });
  canvas.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor((place.height - HEAD) / ROW) - 1);
    const moves = {
      ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
      PageUp: [-page, 0], PageDown: [page, 0], Home: [0, -columns], End: [0, columns],
    };
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      if (toggle(cursor.row)) announce(`${shown[cursor.row].path} ${shown[cursor.row].open ? "opened" : "closed"}`);
      return;
    }
    const move = moves[event.key];
    if (!move || !shown.length) return;
    event.preventDefault();
    cursor.row = Math.max(0, Math.min(shown.length - 1, cursor.row + move[0]));
    cursor.column = Math.max(0, Math.min(columns - 1, cursor.column + move[1]));
    const y = cursor.row * ROW, x = cursor.column * place.cell;
    if (y < frame.scrollTop) frame.scrollTop = y;
    if (y + ROW > frame.scrollTop + place.height - HEAD) frame.scrollTop = y + ROW - place.height + HEAD;
    if (x < frame.scrollLeft) frame.scrollLeft = x;
    if (x + place.cell > frame.scrollLeft + place.room) frame.scrollLeft = x + place.cell - place.room;
    draw();
    const box = canvas.getBoundingClientRect();
    const lines = describe(cursor);
    showTip(lines, box.left + place.label + x - frame.scrollLeft, box.top + HEAD + y - frame.scrollTop + 6);
    announce(lines.join(", "));
  });
  canvas.addEventListener("focus", draw);
  canvas.addEventListener("blur", () => { hideTip(); draw(); });
  frame.addEventListener("scroll", () => { hideTip(); draw(); });

  // --- tools

  const openAll = (value) => () => {
    const visit = (node) => { if (node.children.length) node.open = value; node.children.forEach(visit); };
    tops.forEach(visit);
    refresh();
  };
  const zoomOut = h("button", { type: "button", "aria-label": "Narrower columns", onclick: () => scaleTo(zoom - 1) }, "−");
  const zoomIn = h("button", { type: "button", "aria-label": "Wider columns", onclick: () => scaleTo(zoom + 1) }, "+");
  function scaleTo(to) {
    const middle = place ? (frame.scrollLeft + place.room / 2) / place.cell : 0;
    zoom = Math.max(0, Math.min(WIDTHS.length - 1, to));
    zoomOut.disabled = zoom === 0;
    zoomIn.disabled = zoom === WIDTHS.length - 1 || data.columns.step.length * WIDTHS[zoom + 1] <= (place?.room ?? 0);
    refresh();
    frame.scrollLeft = middle * place.cell - place.room / 2;
  }
  const search = h("input", { type: "search", placeholder: "Find tensors", "aria-label": "Find tensors by name" });
  search.addEventListener("input", () => { wanted = search.value.trim(); frame.scrollTop = 0; refresh(); });
  const grouped = tops.some((node) => node.children.length);
  const tools = h("div", { class: "tools" },
    search,
    grouped ? [h("button", { type: "button", onclick: openAll(true) }, "Open all"), h("button", { type: "button", onclick: openAll(false) }, "Close all")] : [],
    found, h("span", { class: "space" }), h("span", { class: "zoom" }, "Columns", zoomOut, zoomIn),
  );

  // --- what the colours mean

  const strip = h("canvas", { width: 320, height: 1, "aria-hidden": "true" });
  const ends = h("div", { class: "ends" });
  const raised = (power) => `10${[...String(power)].map((digit) => (digit === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit])).join("")}`;
  for (let power = lowest; power <= highest; power += 1) {
    const one = h("span", {}, power >= -3 && power <= 2 ? number(10 ** power) : raised(power));
    one.style.left = `${(100 * (power - lowest)) / (highest - lowest)}%`;
    ends.append(one);
  }
  const swatches = h("ul", { class: "key" });
  function legend() {
    const context = strip.getContext("2d");
    const stops = color("--heat").split(/\s+/).map((text) => [1, 3, 5].map((start) => parseInt(text.slice(start, start + 2), 16)));
    for (let x = 0; x < 320; x += 1) { context.fillStyle = `rgb(${mix(stops, x / 319).join(" ")})`; context.fillRect(x, 0, 1, 1); }
    const names = [[UNCHANGED, "unchanged"], [UNSURE, "may have changed"], [CHANGED, "changed, not measured"], [FIRST, "first seen"], [FROM_ZERO, "was zero"], [NOT_FINITE, "NaN or infinity"]];
    swatches.replaceChildren(...names.filter(([cell]) => counts[cell]).map(([cell, text]) => {
      const sample = h("i", {});
      sample.style.background = palette[cell];
      return h("li", {}, sample, text);
    }));
  }
  const scale = h("div", { class: "scale" }, measured ? h("div", { class: "bar" }, h("div", {}, "relative change since the checkpoint before"), strip, ends) : [], swatches);

  repaint.push(() => { paint(); legend(); refresh(); scaleTo(zoom); });
  const help = h("p", { class: "away", id: "heat-help" }, "Arrow keys move from cell to cell, Page Up and Page Down by pages, Enter opens or closes a module. The lists below say the same in words.");
  return [tools, frame, help, scale];
}
