"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const { domains, layers, measures, skew, examples } = data;
const STEP = 24;  // experts that are listed at once
const by = (id) => document.getElementById(id);
const percent = (value) => `${(100 * value).toFixed(1)} %`;

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;  // never as HTML: it is a model's text
  if (className) made.className = className;
  return made;
}

function heatMap(domain, values, name) {
  const card = element("figure", undefined, "card");
  const caption = element("figcaption");
  caption.append(element("h3", domains[domain]));
  const map = element("div", undefined, "map");
  const readout = element("p", "Layers downwards, experts to the right; choose one to see its text.", "readout");
  const largest = Math.max(...values.flat().map(Math.abs), 1e-12);
  map.style.gridTemplateColumns = `auto repeat(${values[0].length}, minmax(4px, 1fr))`;
  map.setAttribute("role", "group");
  map.setAttribute("aria-label", `${name} by layer and expert for ${domains[domain]}`);
  values.forEach((row, layer) => {
    map.append(element("span", layers[layer]));
    row.forEach((value, expert) => {
      const cell = element("button");
      const title = `Layer ${layers[layer]}, expert ${expert}: ${percent(value)}`;
      cell.type = "button";
      cell.style.setProperty("--v", `${Math.max(0, 100 * value / largest)}%`);
      cell.title = title;
      cell.setAttribute("aria-label", title);
      cell.tabIndex = layer || expert ? -1 : 0;
      cell.addEventListener("focus", () => { readout.textContent = title; });
      cell.addEventListener("mouseenter", () => { readout.textContent = title; });
      cell.addEventListener("keydown", (event) => move(event, map, layer, expert, row.length));
      cell.addEventListener("click", () => {
        by("search").value = `L${layers[layer]} E${expert}`;
        list();
        by("list-title").scrollIntoView();
      });
      map.append(cell);
    });
  });
  card.append(caption, map, readout);
  return card;
}

function move(event, map, layer, expert, width) {
  const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
  if (!step) return;
  event.preventDefault();
  const row = Math.min(Math.max(layer + step[0], 0), layers.length - 1);
  const column = Math.min(Math.max(expert + step[1], 0), width - 1);
  map.querySelectorAll("button")[row * width + column].focus();
}

function drawMaps() {
  const name = by("measure").value;
  const values = name === "skew" ? skew : measures[name];
  by("description").textContent = name === "skew"
    ? "Share of a domain's choices, less the largest share of any other: what is a domain's own is dark."
    : `${data.descriptions[name]}, of each layer in all.`;
  by("maps").replaceChildren(...domains.map((_, domain) => heatMap(domain, values[domain], name)));
}

function card(layer, expert) {
  const made = element("article", undefined, "card");
  made.append(element("h3", `Layer ${layers[layer]}, expert ${expert}`));
  const shares = element("p", undefined, "shares");
  domains.forEach((name, domain) => {
    shares.append(element("span", `${name} ${percent(measures.share[domain][layer][expert])}`));
  });
  made.append(shares);
  for (const example of examples[layer][expert]) {
    const line = element("p", undefined, "example");
    line.append(element("strong", `${example.domain}: `), example.before, element("mark", example.token), example.after);
    made.append(line);
  }
  if (!examples[layer][expert].length) made.append(element("p", "No token was routed to it.", "example"));
  return made;
}

function matches(layer, expert, wanted) {
  const place = /^l(\d+)\s*e(\d+)$/i.exec(wanted);
  if (place) return Number(place[1]) === layers[layer] && Number(place[2]) === expert;
  return !wanted || examples[layer][expert].some((example) =>
    `${example.domain} ${example.before}${example.token}${example.after}`.toLowerCase().includes(wanted));
}

let shown = STEP;
function list() {
  const wanted = by("search").value.trim().toLowerCase(), found = [];
  layers.forEach((_, layer) => examples[layer].forEach((_, expert) => {
    if (matches(layer, expert, wanted)) found.push([layer, expert]);
  }));
  by("found").textContent = `${found.length} experts` + (wanted ? ` for “${wanted}”` : "") +
    ", each with the tokens to whose output it contributes most.";
  by("experts").replaceChildren(...found.slice(0, shown).map(([layer, expert]) => card(layer, expert)));
  by("more").hidden = found.length <= shown;
}

for (const name of [...(domains.length > 1 ? ["skew"] : []), ...Object.keys(measures)]) {
  by("measure").append(new Option(name, name));
}
by("measure").addEventListener("change", drawMaps);
by("search").addEventListener("input", () => { shown = STEP; list(); });
by("more").addEventListener("click", () => { shown += STEP; list(); });
drawMaps();
list();
