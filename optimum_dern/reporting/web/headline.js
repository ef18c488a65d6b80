// In short: what was gained, what was lost, where.

const texts = Object.entries(report.evaluation).map(([name, pair]) => ({
  name,
  before: pair.before.loss,
  after: pair.after.loss,
  errors: [pair.before.standard_error, pair.after.standard_error],
  tokens: pair.after.tokens,
  sequence: pair.after.sequence_length ?? null, // not in older reports
}));

/** Relative error of what was written for a layer, and of plain pruning; null where it was not judged. */
const writtenError = (layer) => layer.errors[layer.winner] ?? null;
const prunedError = (layer) => layer.errors.pruned ?? null;

function headline() {
  const section = document.getElementById("headline");
  section.append(gain(), cost(), where());
}

function headlineCard(title, kind, big, words, rows) {
  const facts = rows.flatMap(([name, value]) => [html("dt", {}, name), html("dd", {}, value)]);
  return html(
    "div",
    { class: "card" },
    html("h2", {}, title),
    html("p", { class: `big ${kind}` }, big),
    html("p", { class: "note" }, words),
    facts.length ? html("dl", { class: "facts" }, facts) : null,
  );
}

function gain() {
  const { before, after } = report;
  const dense = report.layers.filter((layer) => layer.dense).length;
  const arrow = (name, form) => `${form(before[name])} → ${form(after[name])}`;
  return headlineCard(
    "What was gained",
    "kept",
    `−${(100 * (1 - report.ratio)).toFixed(0)} % bytes`,
    `${arrow("bytes", bytes)}, an ordinary checkpoint that needs no further code.`,
    [
      ...(dense ? [["Layers made dense", count(dense)]] : [["Experts a layer", arrow("experts", count)]]),
      ...(after.width === before.width ? [] : [["Neurons an expert", arrow("width", count)]]),
      ["Parameters", arrow("parameters", short)],
      ["Active for a token", arrow("active_parameters", short)],
    ],
  );
}

function cost() {
  if (!texts.length) {
    return headlineCard(
      "What was lost",
      "lost",
      "not measured",
      "No loss was measured on held-out text. Compress with --evaluate TEXT to see it here.",
      [],
    );
  }
  const increase = mean(texts.map((text) => text.after - text.before));
  const worst = texts.reduce((most, text) => (text.after - text.before > most.after - most.before ? text : most));
  const level = (name) => mean(texts.map((text) => text[name])).toFixed(3);
  return headlineCard(
    "What was lost",
    increase > 0 ? "lost" : "kept",
    `${signed(increase, 3)} nats`,
    `per token of held-out text, mean of ${plural(texts.length, "text")}: ` +
      `perplexity × ${Math.exp(increase).toFixed(2)}.`,
    [
      ["Mean loss", `${level("before")} → ${level("after")}`],
      ["Worst text", `${worst.name} ${signed(worst.after - worst.before, 3)}`],
    ],
  );
}

function where() {
  const judged = report.layers.filter((layer) => writtenError(layer) !== null);
  if (!judged.length) {
    return headlineCard(
      "Where",
      "lost",
      "not judged",
      "The guard was off: no layer was compared with the original.",
      [],
    );
  }
  const ordered = [...judged].sort((a, b) => writtenError(b) - writtenError(a));
  const [worst, best] = [ordered[0], ordered[ordered.length - 1]];
  const better = judged.filter(
    (layer) => prunedError(layer) !== null && writtenError(layer) < prunedError(layer),
  ).length;
  const card = headlineCard(
    "Where",
    "lost",
    `layer ${worst.layer}`,
    `changed most: its experts' output is off by ${percent(writtenError(worst))} of its energy on held-out tokens.`,
    [
      ["Least changed", `layer ${best.layer}, ${percent(writtenError(best))}`],
      ["Mean of the layers", percent(mean(judged.map(writtenError)))],
      ["Better than plain pruning", `${better} of ${plural(judged.length, "layer")}`],
    ],
  );
  const link = html("a", { href: "#layer", class: "more" }, `Look at layer ${worst.layer}`);
  link.addEventListener("click", () => chooseLayer(report.layers.indexOf(worst)));
  card.append(link);
  return card;
}
