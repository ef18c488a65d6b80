// One layer: its candidates and its experts' saliency; flow.js and similarity.js draw the rest.

const current = () => report.layers[selected];

function layerDetails() {
  const section = document.getElementById("layer");
  if (!report.layers.length) {
    section.hidden = true;
    return;
  }
  const [pick, previous, next] = ["pick", "previous", "next"].map((id) => document.getElementById(id));
  const option = (layer, i) => html("option", { value: i }, `${layerName(layer)} · ${layer.name}`);
  pick.append(...report.layers.map(option));
  pick.addEventListener("change", () => chooseLayer(Number(pick.value)));
  previous.addEventListener("click", () => chooseLayer(selected - 1));
  next.addEventListener("click", () => chooseLayer(selected + 1));
  const parent = section.querySelector(".figures");
  const show = () => {
    pick.value = selected;
    previous.disabled = selected === 0;
    next.disabled = selected === report.layers.length - 1;
    document.getElementById("layer-summary").textContent = summary(current(), stays[selected].size);
    parent.replaceChildren();
    candidates(parent);
    saliency(parent);
    flow(parent);
    similarity(parent);
  };
  onLayer(show);
  show();
}

function summary(layer, kept) {
  if (layer.dense) {
    const own = writtenError(layer) === null ? "" : ` Its output is off by ${percent(writtenError(layer))}.`;
    return `${layerName(layer)} is dense: all tokens use the same ${plural(kept, "routed expert")}.${own}`;
  }
  const dropped = layer.saliency.length - kept;
  const share = sum(layer.load.filter((_, expert) => !stays[selected].has(expert)));
  const moved =
    layer.moved_share === null
      ? ""
      : ` ${layer.moved_share ? percent(layer.moved_share) : "None"} of their neurons ` +
        "found a retained expert with one like them.";
  const error = writtenError(layer) === null ? "" : ` Its output is off by ${percent(writtenError(layer))}.`;
  const experts = `${layerName(layer)} dropped ${plural(dropped, "expert")}, to which`;
  return `${experts} ${percent(share)} of its routed tokens went.${moved}${error}`;
}

/** "pruned+refit+router" in words. */
function steps(name) {
  const words = {
    pruned: "plain pruning",
    recombined: "recombined neurons",
    merged: "merged experts",
    condensed: "a dense layer",
    refit: "refit of the down projections",
    router: "of the router",
    neurons: "of gate and up",
  };
  const known = name.split("+").map((step) => words[step] ?? step);
  return known.length > 1 ? `${known[0]}, ${known.slice(1).join(", ")}` : known[0];
}

function candidates(parent) {
  const layer = current();
  const judged = Object.entries(layer.errors).sort((a, b) => (a[1] ?? Infinity) - (b[1] ?? Infinity));
  if (!judged.length) {
    absent(
      parent,
      "candidate-figure",
      "Candidates",
      `The guard was off: ${steps(layer.winner)} was written without a comparison.`,
    );
    return;
  }
  const largest = Math.max(...judged.map(([, error]) => error ?? 0), 1e-12);
  const item = ([name, error]) => {
    const written = name === layer.winner;
    return html(
      "li",
      { class: written ? "written" : null },
      html(
        "div",
        { class: "name" },
        html("span", {}, steps(name), written ? html("span", { class: "tag" }, "written") : null),
        html("span", { class: "value" }, percent(error)),
      ),
      html(
        "div",
        { class: "track" },
        html("div", { class: "fill", style: `width:${100 * Math.min(1, (error ?? largest) / largest)}%` }),
      ),
    );
  };
  const tokens = plural(layer.held_out_tokens, "token");
  const sources = Object.entries(layer.source_errors ?? {}); // earlier reports have none
  const lowest = sources.length ? "the lowest that is on no source above plain pruning's" : "the lowest";
  const note = `Error of the layer's output on ${tokens} that no fit has seen; ${lowest} was written.`;
  parent.append(
    html(
      "figure",
      { class: "card", id: "candidate-figure", "aria-labelledby": "candidate-figure-title" },
      html(
        "figcaption",
        {},
        html("h3", { id: "candidate-figure-title" }, "Candidates, and what the guard chose"),
        html("p", { class: "note" }, note),
      ),
      html("ol", { class: "candidates" }, judged.map(item)),
      sources.length ? sourceTable(sources, layer.winner) : null,
    ),
  );
}

/** The errors by source of the held-out text: of plain pruning and of what was written. */
function sourceTable(sources, winner) {
  const rows = sources.map(([source, errors]) => {
    const [pruned] = Object.values(errors);
    return [source, percent(pruned), percent(errors[winner] ?? pruned)];
  });
  return plainTable({ head: ["Held-out text", "Plain pruning", "Written"], rows });
}

function saliency(parent) {
  const layer = current();
  const kept = stays[selected];
  const ranked = order(layer, "saliency");
  const words = (i) => {
    const expert = ranked[i];
    const [score, share] = [layer.saliency[expert].toPrecision(3), percent(layer.load[expert])];
    const fate = kept.has(expert) ? "stays" : "dropped";
    return `Expert ${expert}: saliency ${score}, ${share} of the routed tokens, ${fate}`;
  };
  figure(parent, {
    id: "saliency-figure",
    title: "Saliency of its experts",
    note: "In falling order: how much the router relies on each expert, by the criterion that ranked them.",
    legend: [
      [sample(rect(3, 2, 10, 10, { class: "kept-fill", rx: 2 })), "stays"],
      [sample(rect(3.5, 2.5, 9, 9, { class: "dropped-bar", rx: 2 })), "dropped"],
    ],
    text: `Saliency of ${plural(ranked.length, "expert")}; ${kept.size} stay: ${layer.retained.join(", ")}`,
    draw: (width) => drawSaliency(width, layer, kept, ranked),
    marks: { hint: "Point at a bar, or press the arrow keys.", describe: words, total: () => ranked.length },
    table: () => ({
      head: ["Expert", "Saliency", "Share of tokens", "Stays"],
      rows: ranked.map((e) => [
        e,
        layer.saliency[e].toPrecision(4),
        percent(layer.load[e]),
        kept.has(e) ? "yes" : "no",
      ]),
    }),
  });
}

function drawSaliency(width, layer, kept, ranked) {
  const [height, bottom] = [196, 174];
  const largest = Math.max(...layer.saliency, 1e-300);
  const step = width / ranked.length;
  const gap = step > 6 ? Math.min(6, step * 0.2) : 0.75;
  const every = Math.ceil(30 / step);
  const bars = ranked.map((expert, i) => {
    const tall = Math.max(1.5, (Math.max(0, layer.saliency[expert]) / largest) * (bottom - 6));
    return svg(
      "g",
      { "data-i": i },
      rect(i * step, 0, step, bottom, { class: "band" }),
      rect(i * step + gap / 2, bottom - tall, step - gap, tall, {
        class: kept.has(expert) ? "kept-fill" : "dropped-bar",
        rx: Math.min(2, step / 4),
      }),
    );
  });
  const inside = (x) => Math.min(width - 11, Math.max(11, x));
  const names = ranked.map((expert, i) =>
    i % every ? null : label(inside((i + 0.5) * step), bottom + 16, expert, "middle"),
  );
  return canvas(width, height, line(0, bottom, width, bottom, "axis"), bars, names);
}
