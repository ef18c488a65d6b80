// Small helpers: elements, numbers, figures that redraw at their width, marks that pointer and keyboard reach.

const report = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

/** An HTML element with attributes and children (elements or text). */
function html(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** An SVG element with attributes and children. */
function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

function canvas(width, height, ...children) {
  return svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, ...children);
}

const label = (x, y, text, anchor = "start", kind = null) =>
  svg("text", { x, y, "text-anchor": anchor, class: kind }, text);
const rect = (x, y, width, height, more = {}) =>
  svg("rect", {
    x: round(x),
    y: round(y),
    width: round(Math.max(width, 0)),
    height: round(Math.max(height, 0)),
    ...more,
  });
const line = (x1, y1, x2, y2, kind, more = {}) =>
  svg("line", { x1: round(x1), y1: round(y1), x2: round(x2), y2: round(y2), class: kind, ...more });
const circle = (x, y, radius, kind) => svg("circle", { cx: round(x), cy: round(y), r: radius, class: kind });

const round = (value) => Math.round(value * 100) / 100;
const sum = (values) => values.reduce((total, value) => total + value, 0);
const mean = (values) => sum(values) / values.length;
const count = (value) => value.toLocaleString("en");
const plural = (n, word) => `${count(n)}\u00a0${word}${n === 1 ? "" : "s"}`;
const signed = (value, digits) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);

/** A share as a percentage of two significant digits; of what is not finite, words. */
function percent(share) {
  if (share === null) return "not finite";
  const value = 100 * share;
  const digits = value === 0 ? 0 : Math.min(4, Math.max(0, 1 - Math.floor(Math.log10(Math.abs(value)) + 1e-9)));
  return `${value.toFixed(digits)}\u00a0%`;
}

/** A number with three significant digits and a unit of thousands. */
function short(value, units = ["", "K", "M", "B", "T"], base = 1000) {
  let power = 0;
  while (Math.abs(value) >= base && power < units.length - 1) [value, power] = [value / base, power + 1];
  const digits = power === 0 ? 0 : value >= 100 ? 0 : value >= 10 ? 1 : 2;
  return `${value.toFixed(digits)}${units[power] ? " " + units[power] : ""}`;
}

const bytes = (value) => short(value, ["B", "kB", "MB", "GB", "TB"]);

/** Values for an axis: about `wanted` round steps that cover low to high. */
function ticks(low, high, wanted = 4) {
  const rough = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const first = Math.floor(low / step + 1e-9);
  const last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

/** Text of an axis value: as many decimals as the step needs. */
const tick = (value, all) => value.toFixed(Math.max(0, -Math.floor(Math.log10(all[1] - all[0]) + 1e-9)));

/**
 * A card with a title, a note, a drawing, a line that tells what is pointed at, and a table of the same numbers.
 *
 * `draw(width)` gives an SVG whose marks have `data-i`; `describe(i)` puts mark i into words, `pick(i)` acts on it,
 * `columns` is how many marks the up and down keys skip.  All of them are functions, called when they are needed.
 */
function figure(
  parent,
  { id, title, note, legend = [], controls = null, text, draw, table, marks = null, wide = false },
) {
  const plot = html("div", { class: "plot", role: marks ? "group" : "img", "aria-label": text });
  const readout = marks && html("p", { class: "readout", "aria-live": "polite" }, marks.hint);
  const keys = legend.length
    ? html(
        "ul",
        { class: "legend" },
        legend.map((item) => html("li", {}, ...item)),
      )
    : null;
  const card = html(
    "figure",
    { class: wide ? "card wide" : "card", id, "aria-labelledby": `${id}-title` },
    html("figcaption", {}, html("h3", { id: `${id}-title` }, title), html("p", { class: "note" }, note)),
    controls,
    keys,
    plot,
    readout,
    table && foldedTable(table),
  );
  parent.append(card);
  const redraw = () => plot.replaceChildren(draw(Math.max(240, Math.floor(plot.clientWidth - 6))));
  if (marks) reachable(plot, readout, marks);
  redraw();
  let width = plot.clientWidth;
  const observer = new ResizeObserver(() => {
    if (!plot.isConnected)
      observer.disconnect(); // another layer was chosen
    else if (plot.clientWidth !== width) {
      width = plot.clientWidth;
      redraw();
    }
  });
  observer.observe(plot);
  return { card, redraw };
}

/** A card that only says why there is no figure. */
function absent(parent, id, title, note, wide = false) {
  const heading = html("h3", { id: `${id}-title` }, title);
  const words = html("figcaption", {}, heading, html("p", { class: "note" }, note));
  parent.append(html("figure", { class: wide ? "card wide" : "card", id, "aria-labelledby": `${id}-title` }, words));
}

/** Pointer, touch and arrow keys all move one cursor over the marks of a plot. */
function reachable(plot, readout, { describe, pick, total, columns = () => 1, cursor = null, hint }) {
  let current = null;
  plot.tabIndex = 0;
  const move = (i) => {
    const found = plot.querySelectorAll(`[data-i="${i}"]`);
    if (!found.length) return;
    current = i;
    plot.querySelectorAll(".cursor").forEach((old) => old.remove());
    plot.querySelectorAll(".on").forEach((old) => old.classList.remove("on"));
    if (cursor) cursor(plot, i);
    else plot.firstChild.append(outline(found[0]));
    readout.textContent = describe(i);
  };
  const leave = () => {
    plot.querySelectorAll(".cursor").forEach((old) => old.remove());
    plot.querySelectorAll(".on").forEach((old) => old.classList.remove("on"));
    plot.firstChild.classList.remove("quiet");
    readout.textContent = hint;
  };
  const choose = () => {
    if (!pick || current === null) return;
    pick(current);
    move(current); // choosing may have drawn the plot anew
  };
  const marked = (event) => event.target.closest("[data-i]");
  plot.addEventListener("pointerover", (event) => marked(event) && move(Number(marked(event).dataset.i)));
  plot.addEventListener("pointerleave", () => document.activeElement === plot || leave());
  plot.addEventListener("click", (event) => {
    if (!marked(event)) return;
    move(Number(marked(event).dataset.i));
    choose();
  });
  plot.addEventListener("focus", () => plot.matches(":focus-visible") && move(Math.min(current ?? 0, total() - 1)));
  plot.addEventListener("blur", leave);
  plot.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns() };
    if (event.key in steps) move(Math.max(0, Math.min(total() - 1, (current ?? 0) + steps[event.key])));
    else if (event.key === "Home") move(0);
    else if (event.key === "End") move(total() - 1);
    else if (event.key === "Enter") choose();
    else return;
    event.preventDefault();
    plot.querySelector(".cursor")?.scrollIntoView({ block: "nearest", inline: "nearest" });
  });
}

function outline(mark) {
  const box = mark.getBBox();
  return rect(box.x - 1, box.y - 1, box.width + 2, box.height + 2, { class: "cursor", rx: 2 });
}

/** A table in a fold, filled when it is opened: large reports have many numbers. */
function foldedTable(content) {
  const fold = html("details", {}, html("summary", {}, "Show the numbers as a table"));
  fold.addEventListener("toggle", () => {
    fold.querySelector(".scroll")?.remove();
    if (fold.open) fold.append(html("div", { class: "scroll", tabindex: "0" }, plainTable(content())));
  });
  return fold;
}

/** `{head, rows}` as a table; the first cell of a row is its header. */
function plainTable({ head, rows }) {
  const cells = ([first, ...rest]) => [
    html("th", { scope: "row" }, first),
    ...rest.map((cell) => html("td", {}, `${cell}`)),
  ];
  return html(
    "table",
    {},
    html(
      "thead",
      {},
      html(
        "tr",
        {},
        head.map((name) => html("th", { scope: "col" }, name)),
      ),
    ),
    html(
      "tbody",
      {},
      rows.map((row) => html("tr", {}, cells(row.map(String)))),
    ),
  );
}

/** A mark for a legend. */
const sample = (...shapes) => svg("svg", { width: 16, height: 14, "aria-hidden": "true" }, ...shapes);
