// The layer that is chosen, and the error of every layer.

let selected = 0; // the layer that is shown in detail
const listeners = [];
/** Call a function whenever another layer is chosen. */
const onLayer = (listener) => listeners.push(listener);

function chooseLayer(i) {
  selected = Math.max(0, Math.min(report.layers.length - 1, i));
  listeners.forEach((listener) => listener());
}

/** A layer's place in words. */
const layerName = (layer) => `Layer ${layer.layer}`;
const stays = report.layers.map((layer) => new Set(layer.retained));

function errors() {
  const parent = document.querySelector("#errors .figures");
  if (!report.layers.some((layer) => writtenError(layer) !== null)) {
    absent(
      parent,
      "error-figure",
      "Not judged",
      "The guard was off, so no candidate was compared with the original layer.",
    );
    return;
  }
  const words = (layer) => {
    const pruned = prunedError(layer) === null ? "" : `, plain pruning ${percent(prunedError(layer))}`;
    return `${layerName(layer)}: ${percent(writtenError(layer))}${pruned}; written: ${layer.winner}`;
  };
  const drawn = figure(parent, {
    id: "error-figure",
    title: "Error of the experts' output, layer by layer",
    note:
      "Squared distance to the output that is wanted (the original layer's, and a part of what layers before have " +
      "changed), as a share of it, on calibration text that no fit has seen. Of all candidates the guard wrote the " +
      "one with the lowest error.",
    legend: [
      [sample(circle(8, 7, 5.5, "lost-fill")), "written"],
      [sample(circle(8, 7, 5, "hollow")), "plain pruning"],
      [sample(line(3, 7, 13, 7, "other")), "other candidates (much higher ones at the edge)"],
    ],
    text: report.layers.map(words).join(". "),
    draw: drawErrors,
    marks: {
      hint: "Point at a layer, or press the arrow keys; click or Enter opens it below.",
      describe: (i) => words(report.layers[i]),
      pick: chooseLayer,
      total: () => report.layers.length,
    },
    table: () => ({
      head: ["Layer", "Written", "Its error", "Plain pruning", "Candidates"],
      rows: report.layers.map((layer) => [
        layer.layer,
        layer.winner,
        percent(writtenError(layer)),
        prunedError(layer) === null ? "–" : percent(prunedError(layer)),
        Object.keys(layer.errors).length,
      ]),
    }),
  });
  onLayer(drawn.redraw);
}

function drawErrors(width) {
  const values = report.layers.flatMap((layer) => Object.values(layer.errors)).filter((error) => error !== null);
  const shown = Math.min(
    Math.max(...values, 0.01),
    1.2 * Math.max(...report.layers.map((l) => Math.max(writtenError(l) ?? 0, prunedError(l) ?? 0)), 0.01),
  );
  const marks = ticks(0, 100 * shown, 4);
  const [left, bottom, top] = [44, 190, 8];
  const step = (width - left) / report.layers.length;
  const y = (error) =>
    bottom - (Math.min(100 * error, marks[marks.length - 1]) / marks[marks.length - 1]) * (bottom - top);
  const axis = marks.map((value) => [
    line(left, y(value / 100), width, y(value / 100), "axis"),
    label(left - 8, y(value / 100) + 4, `${tick(value, marks)} %`, "end"),
  ]);
  const every = Math.ceil(30 / step);
  const band = (i, kind) => rect(left + i * step, top - 6, step, bottom - top + 8, { class: kind, rx: 4 });
  const radius = Math.min(6, Math.max(2.5, step / 3));
  const columns = report.layers.map((layer, i) => {
    const x = left + (i + 0.5) * step;
    const [written, pruned] = [writtenError(layer), prunedError(layer)];
    const others = Object.values(layer.errors).filter(
      (error) => error !== null && error !== written && error !== pruned,
    );
    return svg(
      "g",
      { "data-i": i, class: "pickable" },
      band(i, "band"),
      others.map((error) => line(x - radius, y(error), x + radius, y(error), "other")),
      pruned === null || written === null ? null : line(x, y(pruned), x, y(written), "stem"),
      pruned === null ? null : circle(x, y(pruned), radius - 0.5, "hollow"),
      written === null ? null : circle(x, y(written), radius, "lost-fill"),
      i % every ? null : label(x, bottom + 18, layer.layer, "middle", i === selected ? "strong" : null),
    );
  });
  return canvas(width, bottom + 26, band(selected, "band chosen"), axis, columns, label(0, bottom + 18, "layer"));
}
