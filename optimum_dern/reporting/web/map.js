// The map of experts and layers.

/** Experts of a layer in the order that the map shows. */
function order(layer, by) {
  const experts = layer.saliency.map((_, expert) => expert);
  return by === "saliency" ? experts.sort((a, b) => layer.saliency[b] - layer.saliency[a] || a - b) : experts;
}

/** Saliency as a share of the layer's largest, which colours are made from. */
function shade(layer, expert) {
  const largest = Math.max(...layer.saliency);
  return largest > 0 ? Math.max(0, layer.saliency[expert] / largest) : 0;
}

function experts() {
  if (!report.layers.length) {
    absent(document.querySelector("#experts .figures"), "map-figure", "All of them", "No layer was compressed.");
    return;
  }
  let by = "index";
  const columns = Math.max(...report.layers.map((layer) => layer.saliency.length));
  const place = (i) => [report.layers[Math.floor(i / columns)], i % columns];
  const words = (i) => {
    const [layer, position] = place(i);
    const expert = order(layer, by)[position];
    const rank = order(layer, "saliency").indexOf(expert) + 1;
    const fate = stays[Math.floor(i / columns)].has(expert)
      ? `stays, as expert ${layer.retained.indexOf(expert)}`
      : "dropped";
    const guarded = layer.protected?.includes(expert) ? ", protected" : "";
    const score = `saliency ${layer.saliency[expert].toPrecision(3)}, rank ${rank} of ${layer.saliency.length}`;
    const share = `${percent(layer.load[expert])} of the routed tokens`;
    return `${layerName(layer)}, expert ${expert}: ${fate}${guarded}; ${score}; ${share}`;
  };
  const drawn = figure(document.querySelector("#experts .figures"), {
    id: "map-figure",
    title: "Experts by layers",
    note:
      "A row is a layer, a tile an expert that stays, a dot one that was dropped. The deeper the colour, the larger " +
      "the saliency by which experts were ranked, within the layer.",
    legend: [
      [sample(rect(2, 1, 12, 12, { class: "heat", style: "--v:70%", rx: 2 })), "stays"],
      [sample(rect(5.5, 4.5, 5, 5, { class: "heat", style: "--v:70%", rx: 2.5 })), "dropped"],
      ["saliency low", html("span", { class: "ramp", "aria-hidden": "true" }), "high"],
    ],
    controls: orderChoice((value) => {
      by = value;
      drawn.redraw();
    }),
    text:
      `${plural(report.layers.length, "layer")} of ${plural(columns, "expert")}, of which ` +
      `${report.layers[0].retained.length} stay in each. The table lists them.`,
    draw: (width) => drawMap(width, columns, by),
    marks: {
      hint: "Point at an expert, or press the arrow keys; click or Enter opens its layer below.",
      describe: words,
      pick: (i) => chooseLayer(Math.floor(i / columns)),
      total: () => report.layers.length * columns,
      columns: () => columns,
    },
    table: () => ({
      head: ["Layer", "Stay", "Dropped"],
      rows: report.layers.map((layer, i) => [
        layer.layer,
        layer.retained.join(", "),
        order(layer, "index")
          .filter((expert) => !stays[i].has(expert))
          .join(", "),
      ]),
    }),
  });
  onLayer(drawn.redraw);
}

function orderChoice(change) {
  const option = (value, words, checked) => {
    const input = html("input", { type: "radio", name: "order", value, checked: checked && "" });
    input.addEventListener("change", () => change(value));
    return html("label", {}, input, words);
  };
  const legend = html("legend", { class: "hidden" }, "Order of the experts");
  return html(
    "fieldset",
    { class: "choice" },
    legend,
    option("index", "by index", true),
    option("saliency", "by saliency", false),
  );
}

function drawMap(width, columns, by) {
  const left = 34;
  const cell = Math.min(64, Math.max(8, (width - left) / columns));
  const height = Math.min(Math.max(cell, 11), 24);
  const every = Math.ceil(13 / height);
  const step = [1, 2, 4, 8, 16, 32, 64].find((n) => n * cell >= 26) ?? 128;
  const rows = report.layers.map((layer, row) => {
    const y = 4 + row * height;
    const tiles = order(layer, by).map((expert, i) => {
      const kept = stays[row].has(expert);
      const size = kept ? [cell - 1.5, height - 1.5] : Array(2).fill(Math.min(cell, height) * 0.42);
      const style = `--v:${Math.round(100 * shade(layer, expert))}%`;
      const box = rect(left + (i + 0.5) * cell - size[0] / 2, y + height / 2 - size[1] / 2, ...size, {
        class: "heat",
        style,
        rx: kept ? 2 : size[0] / 2,
      });
      const area = kept ? null : rect(left + i * cell, y, cell, height, { class: "band" });
      return svg("g", { "data-i": row * columns + i, class: "pickable" }, area, box);
    });
    const behind =
      row === selected ? rect(0, y, left + columns * cell, height, { class: "band chosen", rx: 3 }) : null;
    const name =
      row % every ? null : label(left - 8, y + height / 2 + 4, layer.layer, "end", row === selected ? "strong" : null);
    return [behind, name, tiles];
  });
  const bottom = 4 + report.layers.length * height;
  const numbers =
    by === "saliency"
      ? [
          label(left, bottom + 16, "largest saliency"),
          label(left + columns * cell, bottom + 16, columns * cell > 230 ? "smallest" : "", "end"),
        ]
      : Array.from({ length: Math.ceil(columns / step) }, (_, i) =>
          label(left + (i * step + 0.5) * cell, bottom + 16, i * step, "middle"),
        );
  return canvas(left + columns * cell + 2, bottom + 24, rows, numbers);
}
