// How alike the experts of a layer are: as wholes, and neuron by neuron.

function similarity(parent) {
  const map = current().similarity_map;
  if (!map) {
    absent(
      parent,
      "alike-figure",
      "How alike its experts are",
      "The report does not say: it was written by an earlier version.",
    );
    return;
  }
  wholes(parent, map);
  neurons(parent, map);
}

/** Cosine of two experts of the map, by their positions in it. */
function cosine(map, i, j) {
  if (i === j) return 100;
  const [a, b] = [Math.min(i, j), Math.max(i, j)];
  return map.cosines[a * map.experts.length - (a * (a + 1)) / 2 + b - a - 1];
}

const hundredths = (value) => (value / 100).toFixed(2);

function wholes(parent, map) {
  const total = map.experts.length;
  const scope =
    total < current().saliency.length ? ` ${total} of ${current().saliency.length} experts, drawn at random.` : "";
  const words = (k) => {
    const [i, j] = [Math.floor(k / total), k % total];
    return `Experts ${map.experts[i]} and ${map.experts[j]}: cosine ${hundredths(cosine(map, i, j))}`;
  };
  const typical = hundredths(mean(map.cosines));
  figure(parent, {
    id: "alike-figure",
    title: "Alike as wholes",
    note: `Cosine of the experts' weights taken together; ${typical} on average.${scope}`,
    legend: [
      ["cosine 0", html("span", { class: "ramp", "aria-hidden": "true" }), "1"],
      [sample(rect(6.5, 1, 3, 12, { class: "lost-fill" })), "dropped"],
      [sample(rect(6.5, 1, 3, 12, { class: "kept-fill" })), "stays"],
    ],
    text: `Cosines between ${plural(total, "expert")}, ${typical} on average. The table lists each expert's nearest.`,
    draw: (width) => drawWholes(width, map),
    marks: {
      hint: "Point at a tile, or press the arrow keys.",
      describe: words,
      total: () => total * total,
      columns: () => total,
    },
    table: () => ({
      head: ["Expert", "Most like", "Cosine"],
      rows: map.nearest.map(([other, value], i) => [map.experts[i], other, hundredths(value)]),
    }),
  });
}

function drawWholes(width, map) {
  const total = map.experts.length;
  const left = 34;
  const cell = Math.min(40, (width - left) / total);
  const every = Math.ceil(16 / cell);
  const gap = cell > 10 ? 1.5 : cell > 6 ? 0.75 : 0;
  const tiles = map.experts.flatMap((_, i) =>
    map.experts.map((_, j) =>
      rect(left + j * cell, 10 + i * cell, cell - gap, cell - gap, {
        "data-i": i * total + j,
        class: "heat",
        style: `--v:${Math.max(0, cosine(map, i, j))}%`,
      }),
    ),
  );
  const sides = map.experts.map((expert, i) => {
    const kind = stays[selected].has(expert) ? "kept-fill" : "lost-fill";
    return [
      rect(left - 6, 10 + i * cell, 3, cell - gap, { class: kind }),
      rect(left + i * cell, 3, cell - gap, 3, { class: kind }),
      i % every ? null : label(left - 10, 10 + (i + 0.5) * cell + 4, expert, "end"),
    ];
  });
  return canvas(Math.ceil(left + total * cell) + 2, Math.ceil(10 + total * cell) + 2, tiles, sides);
}

function neurons(parent, map) {
  const ranked = map.experts.map((_, i) => i).sort((a, b) => map.nearest[b][1] - map.nearest[a][1]);
  const words = (k) => {
    const [other, value, low, middle, high] = map.nearest[ranked[k]];
    const whole = `Expert ${map.experts[ranked[k]]} is most like ${other}, cosine ${hundredths(value)}`;
    const spread = `median ${hundredths(middle)}, 80 % from ${hundredths(low)} to ${hundredths(high)}`;
    return `${whole}; its neurons' best matches there: ${spread}`;
  };
  const looked =
    map.neurons < (current().segment_flow?.width ?? Infinity)
      ? ` Of each expert, ${plural(map.neurons, "neuron")} ${map.neurons === 1 ? "was" : "were"} looked at.`
      : "";
  figure(parent, {
    id: "neuron-figure",
    title: "Alike neuron by neuron",
    note:
      "Every expert beside the one most like it: whole weights, and the best match of each neuron. Where the two " +
      `disagree, experts cannot be merged as wholes.${looked}`,
    legend: [
      [sample(diamond(8, 7, 5)), "whole expert"],
      [sample(line(1, 7, 15, 7, "range"), circle(8, 7, 3.5, "kept-fill")), "its neurons: median and middle 80 %"],
    ],
    text: `Best matches of neurons, by expert. ${ranked.length ? words(0) : ""}`,
    wide: true,
    draw: (width) => drawNeurons(width, map, ranked),
    marks: { hint: "Point at an expert, or press the arrow keys.", describe: words, total: () => ranked.length },
    table: () => ({
      head: ["Expert", "Most like", "Cosine", "Neurons: 10 %", "median", "90 %"],
      rows: ranked.map((i) => [map.experts[i], map.nearest[i][0], ...map.nearest[i].slice(1).map(hundredths)]),
    }),
  });
}

const diamond = (x, y, size) =>
  svg("path", {
    class: "lost-fill",
    d: `M${round(x)} ${round(y - size)}l${size} ${size}l${-size} ${size}l${-size} ${-size}Z`,
  });

function drawNeurons(width, map, ranked) {
  const tail = width > 600 ? 180 : 64; // the histogram of all neurons, at the right
  const [left, top, bottom] = [34, 26, 224];
  const low = Math.min(0, ...map.nearest.flatMap((row) => row.slice(1))) < -5 ? -100 : 0;
  const y = (value) => bottom - ((Math.max(low, value) - low) / (100 - low)) * (bottom - top);
  const marks = low ? [-100, -50, 0, 50, 100] : [0, 25, 50, 75, 100];
  const axis = marks.map((value) => [
    line(left, y(value), width, y(value), "axis"),
    label(left - 8, y(value) + 4, hundredths(value), "end"),
  ]);
  const step = (width - left - tail - 10) / ranked.length;
  const size = Math.min(5, Math.max(2, step / 3));
  const every = Math.ceil(30 / step);
  const columns = ranked.map((i, k) => {
    const [, value, tenth, middle, ninetieth] = map.nearest[i];
    const x = left + (k + 0.5) * step;
    return svg(
      "g",
      { "data-i": k },
      rect(left + k * step, top, step, bottom - top, { class: "band" }),
      line(x, y(tenth), x, y(ninetieth), "range"),
      circle(x, y(middle), Math.min(4, size), "kept-fill"),
      diamond(x, y(value), size),
      k % every ? null : label(x, bottom + 16, map.experts[i], "middle"),
    );
  });
  const most = Math.max(...map.histogram);
  const tall = (y(0) - y(100)) / map.histogram.length;
  const bars = map.histogram.map((n, i) =>
    rect(width - tail, y((100 / map.histogram.length) * (i + 1)) + 0.5, (n / most) * tail, tall - 1, {
      class: "kept-fill",
    }),
  );
  const alpha = report.config.similarity_threshold;
  const threshold =
    alpha === undefined
      ? []
      : [
          line(left, y(100 * alpha), width, y(100 * alpha), "threshold"),
          label(left + 4, y(100 * alpha) - 5, `α = ${alpha}`, "start", "strong halo"),
        ];
  return canvas(
    width,
    bottom + 24,
    axis,
    bars,
    columns,
    threshold,
    label(width - tail, bottom + 16, "all neurons"),
    label(0, 10, "cosine"),
  );
}
