// Folds, and diagrams that can be zoomed and read. Without it the page has everything unfolded and still diagrams.
"use strict";

// ------------------------------------------------------------------------------------------------------------ folds
// They are open in the file, so that no script is needed to read or print all of it.
const folds = [...document.querySelectorAll("details")];
let opened = [];
for (const fold of folds) fold.open = false;
addEventListener("beforeprint", () => {
  opened = folds.filter((fold) => fold.open);
  for (const fold of folds) fold.open = true;
});
addEventListener("afterprint", () => {
  for (const fold of folds) fold.open = opened.includes(fold);
});
addEventListener("hashchange", unfoldTarget);
unfoldTarget();

function unfoldTarget() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const fold = target && target.closest("details");
  if (fold) fold.open = true;
}

// --------------------------------------------------------------------------------------------------------- diagrams
const SVG = "http://www.w3.org/2000/svg";
const ROOM = 0.06; // of the range of values, above and below
const TICKS = 8;
const DRAG = 6; // units; less is a click

for (const figure of document.querySelectorAll("figure.diagram")) makeDiagram(figure);

function makeDiagram(figure) {
  const plot = figure.querySelector("svg.plot");
  const frame = plot.querySelector("rect.frame");
  const [left, top, width, height] = ["x", "y", "width", "height"].map((name) => Number(frame.getAttribute(name)));
  const curves = JSON.parse(figure.dataset.curves);
  const lines = [...plot.querySelectorAll("svg.lines > g")];
  const positions = [...new Set(curves.flatMap((curve) => curve.points.map((point) => point[0])))].sort((a, b) => a - b);
  const room = 0.02 * (positions[positions.length - 1] - positions[0]) || 0.5;
  const whole = [positions[0] - room, positions[positions.length - 1] + room];
  let xs = whole;
  let ys = heights(whole);
  let at = null; // index in positions of what is read off
  let dragFrom = null;

  const cursor = add(plot, "line", { class: "cursor", y1: top, y2: top + height, visibility: "hidden" });
  const dots = curves.map((curve, index) => add(plot, "circle", { class: `dot ${lines[index].getAttribute("class")}`, r: 5, visibility: "hidden" }));
  const selection = add(plot, "rect", { class: "selection", y: top, height, visibility: "hidden" });
  const readout = document.createElement("div");
  readout.className = "readout";
  readout.hidden = true;
  const spoken = document.createElement("p"); // for screen readers, who meet each change once
  spoken.className = "unseen";
  spoken.setAttribute("role", "status");
  const holder = document.createElement("div");
  holder.className = "holder";
  plot.replaceWith(holder);
  holder.append(plot, readout, spoken);

  const bar = document.createElement("div");
  bar.className = "tools";
  const title = figure.querySelector("h4").textContent;
  const button = (sign, name, act) => {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = sign;
    made.title = name;
    made.setAttribute("aria-label", `${name}: ${title}`);
    made.addEventListener("click", act);
    bar.append(made);
    return made;
  };
  button("+", "Zoom in", () => zoomBy(0.5));
  const out = button("−", "Zoom out", () => zoomBy(2));
  const reset = button("↺", "Show all", () => show(whole));
  holder.after(bar);

  plot.setAttribute("tabindex", "0");
  plot.setAttribute("role", "application");
  plot.setAttribute("aria-roledescription", "diagram");
  const hint = document.createElement("p");
  hint.className = "unseen";
  hint.id = `${figure.id}-keys`;
  hint.textContent = "Arrow keys read values, plus and minus zoom, 0 shows all.";
  holder.append(hint);
  plot.setAttribute("aria-describedby", hint.id);
  buttons();

  // What is under the pointer, in units of the picture.
  function place(event) {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(plot.getScreenCTM().inverse());
    return Math.min(Math.max(point.x, left), left + width);
  }
  const across = (x) => left + ((x - xs[0]) / (xs[1] - xs[0])) * width;
  const down = (y) => top + ((ys[1] - y) / (ys[1] - ys[0])) * height;
  const value = (px) => xs[0] + ((px - left) / width) * (xs[1] - xs[0]);

  plot.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    dragFrom = place(event);
    plot.setPointerCapture(event.pointerId);
    read(nearest(value(dragFrom)), false);
  });
  plot.addEventListener("pointermove", (event) => {
    const here = place(event);
    if (dragFrom !== null && Math.abs(here - dragFrom) > DRAG) {
      set(selection, { x: Math.min(here, dragFrom), width: Math.abs(here - dragFrom), visibility: "visible" });
    }
    read(nearest(value(here)), false);
  });
  plot.addEventListener("pointerup", (event) => {
    const here = place(event);
    if (dragFrom !== null && Math.abs(here - dragFrom) > DRAG) {
      show([value(dragFrom), value(here)].sort((a, b) => a - b));
    }
    endDrag();
  });
  plot.addEventListener("pointercancel", endDrag);
  plot.addEventListener("pointerleave", () => {
    if (dragFrom === null) hide();
  });
  plot.addEventListener("blur", hide);
  plot.addEventListener("dblclick", () => show(whole));
  plot.addEventListener("keydown", (event) => {
    const visible = positions.map((x, index) => index).filter((index) => inside(positions[index]));
    const step = visible.indexOf(at);
    const acts = {
      ArrowRight: () => read(visible[Math.min(step + 1, visible.length - 1)], true),
      ArrowLeft: () => read(visible[step < 0 ? visible.length - 1 : Math.max(step - 1, 0)], true),
      Home: () => read(visible[0], true),
      End: () => read(visible[visible.length - 1], true),
      "+": () => zoomBy(0.5),
      "=": () => zoomBy(0.5),
      "-": () => zoomBy(2),
      0: () => show(whole),
      Escape: () => (xs === whole ? hide() : show(whole)),
    };
    if (!(event.key in acts) || event.ctrlKey || event.metaKey || event.altKey) return;
    acts[event.key]();
    event.preventDefault();
  });

  function endDrag() {
    dragFrom = null;
    set(selection, { visibility: "hidden" });
  }

  function inside(x) {
    return x >= xs[0] && x <= xs[1];
  }

  function nearest(x) {
    let best = null;
    positions.forEach((position, index) => {
      if (inside(position) && (best === null || Math.abs(position - x) < Math.abs(positions[best] - x))) best = index;
    });
    return best;
  }

  // Zooms around what is read off, else around the middle.
  function zoomBy(factor) {
    const middle = at !== null && inside(positions[at]) ? positions[at] : (xs[0] + xs[1]) / 2;
    const half = ((xs[1] - xs[0]) / 2) * factor;
    show([Math.max(middle - half, whole[0]), Math.min(middle + half, whole[1])]);
  }

  function show(limits) {
    const smallest = (whole[1] - whole[0]) / 200;
    if (limits[1] - limits[0] < smallest || !positions.some((x) => x >= limits[0] && x <= limits[1])) return;
    xs = limits[0] <= whole[0] && limits[1] >= whole[1] ? whole : limits;
    ys = heights(xs);
    lines.forEach((line, index) => {
      const points = curves[index].points.map(([x, y]) => [across(x) - left, down(y) - top]);
      line.querySelector("path").setAttribute("d", "M" + points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L"));
      line.querySelectorAll("use").forEach((mark, number) => set(mark, { x: points[number][0], y: points[number][1] }));
    });
    const xAxis = plot.querySelector("g.x-axis");
    xAxis.replaceChildren();
    for (const tick of steps(xs).filter((tick) => Number.isInteger(tick))) {
      add(xAxis, "text", { x: across(tick), y: top + height + 17, "text-anchor": "middle" }).textContent = tick.toLocaleString("en");
    }
    const yAxis = plot.querySelector("g.y-axis");
    yAxis.replaceChildren();
    const ticks = steps(ys);
    const decimals = Math.max(0, -Math.floor(Math.log10(ticks[1] - ticks[0]) + 1e-9));
    const plain = { minimumFractionDigits: decimals, maximumFractionDigits: decimals };
    for (const tick of ticks) {
      add(yAxis, "line", { class: "grid", x1: left, x2: left + width, y1: down(tick), y2: down(tick) });
      add(yAxis, "text", { x: left - 7, y: down(tick) + 4.5, "text-anchor": "end" }).textContent =
        decimals <= 4 && Math.abs(tick) < 1e6 ? tick.toLocaleString("en", plain) : short(tick, 3);
    }
    if (at !== null && inside(positions[at])) read(at, false);
    else hide();
    buttons();
  }

  // The limits of what is seen between two limits of the other axis: of points, and of lines where they leave it.
  function heights(limits) {
    const seen = [];
    for (const { points } of curves) {
      points.forEach(([x, y], index) => {
        if (x >= limits[0] && x <= limits[1]) seen.push(y);
        if (index === 0) return;
        const [earlier, before] = points[index - 1];
        for (const limit of limits) {
          if (earlier < limit && limit < x) seen.push(before + ((y - before) * (limit - earlier)) / (x - earlier));
        }
      });
    }
    const low = Math.min(...seen);
    const high = Math.max(...seen);
    const more = (high - low) * ROOM || Math.abs(high) * ROOM || 1;
    return [low - more, high + more];
  }

  function read(index, aloud) {
    if (index === null || index === undefined) return;
    at = index;
    const x = positions[index];
    set(cursor, { x1: across(x), x2: across(x), visibility: "visible" });
    const rows = [];
    curves.forEach((curve, number) => {
      const point = curve.points.find(([px]) => px === x);
      set(dots[number], point ? { cx: across(x), cy: down(point[1]), visibility: "visible" } : { visibility: "hidden" });
      if (point) rows.push([curve.label, short(point[1], 6), number]);
    });
    readout.replaceChildren();
    const head = document.createElement("div");
    head.textContent = `${figure.dataset.x} ${x.toLocaleString("en")}`;
    readout.append(head);
    for (const [label, text, number] of rows) {
      const row = document.createElement("div");
      const key = document.createElement("span");
      key.className = `key ${lines[number].getAttribute("class")}`;
      const strong = document.createElement("b");
      strong.textContent = text;
      row.append(key, `${label} `, strong);
      readout.append(row);
    }
    readout.hidden = false;
    const share = (across(x) / 480) * holder.clientWidth;
    const beside = share > holder.clientWidth / 2 ? share - readout.offsetWidth - 12 : share + 12;
    readout.style.left = `${Math.min(Math.max(beside, 0), holder.clientWidth - readout.offsetWidth)}px`;
    if (aloud) spoken.textContent = [head.textContent, ...rows.map(([label, text]) => `${label} ${text}`)].join(", ");
  }

  function hide() {
    at = null;
    readout.hidden = true;
    for (const mark of [cursor, ...dots]) set(mark, { visibility: "hidden" });
  }

  function buttons() {
    out.disabled = reset.disabled = xs === whole;
  }
}

function add(parent, name, attributes) {
  const made = document.createElementNS(SVG, name);
  set(made, attributes);
  parent.append(made);
  return made;
}

function set(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
}

// Round numbers between two limits, as diagram.py has them.
function steps([low, high]) {
  const power = 10 ** Math.floor(Math.log10((high - low) / TICKS));
  const step = [1, 2, 5, 10].map((factor) => power * factor).find((size) => (high - low) / size <= TICKS);
  const ticks = [];
  for (let index = Math.ceil(low / step - 1e-9); index <= Math.floor(high / step + 1e-9); index++) {
    ticks.push(Number((index * step).toPrecision(12)));
  }
  return ticks;
}

function short(value, digits) {
  if (Math.abs(value) >= 1000 || value === 0) return value.toLocaleString("en", { maximumSignificantDigits: digits });
  const text = Number(value.toPrecision(digits));
  return Math.abs(text) < 1e-3 ? text.toExponential().replace(/e-(\d)$/, "e-0$1") : String(text);
}
