// Provenance: the command, the text it was calibrated on, every option, the tools.

function made() {
  const parent = document.querySelector("#made .figures");
  parent.append(
    commandCard(),
    factsCard("Calibration", calibrationFacts()),
    factsCard("Run", runFacts()),
    optionsCard(),
  );
}

function commandCard() {
  const copy = html("button", { type: "button", class: "copy" }, "Copy the command");
  copy.addEventListener("click", () => {
    const done = () => {
      copy.textContent = "Copied";
      setTimeout(() => {
        copy.textContent = "Copy the command";
      }, 1500);
    };
    const marked = () => {
      getSelection().selectAllChildren(document.getElementById("command"));
      copy.textContent = "Marked: press Ctrl+C";
    };
    navigator.clipboard ? navigator.clipboard.writeText(report.command).then(done, marked) : marked();
  });
  const note = report.in_memory ? "DATA stands for the calibration data, which was given in memory." : null;
  return html(
    "div",
    { class: "card wide" },
    html("h3", {}, "Make it again"),
    note && html("p", { class: "note" }, note),
    html("pre", { id: "command", tabindex: "0" }, report.command),
    copy,
  );
}

function factsCard(title, facts) {
  const rows = facts.flatMap(([name, value]) => [html("dt", {}, name), html("dd", {}, value)]);
  return html("div", { class: "card" }, html("h3", {}, title), html("dl", { class: "facts" }, rows));
}

function calibrationFacts() {
  const { dataset, sequences, tokens, sha256 } = report.calibration;
  const first = report.layers[0];
  return [
    ["Data", dataset],
    ["Sequences", count(sequences)],
    ["Tokens", count(tokens)],
    ["Held out for the guard", first ? plural(first.held_out_tokens, "token") : "–"],
    ["SHA-256 of the tokens", html("code", { title: sha256 }, sha256.slice(0, 16))],
  ];
}

function runFacts() {
  const minutes = report.seconds / 60;
  return [
    ["Source", report.source ?? "a model in memory"],
    ["Revision", report.revision ?? "–"],
    ["Method, preset", `${report.method}, ${report.config.preset ?? "–"}`],
    [
      "Time",
      minutes < 2
        ? `${report.seconds.toFixed(0)} s`
        : minutes < 120
          ? `${minutes.toFixed(0)} min`
          : `${(minutes / 60).toFixed(1)} h`,
    ],
    ["Peak memory", short(report.peak_memory_bytes, ["B", "KiB", "MiB", "GiB", "TiB"], 1024)],
    [
      "Tools",
      Object.entries(report.versions)
        .map(([tool, version]) => `${tool} ${version}`)
        .join(", ") || "–",
    ],
  ];
}

function optionsCard() {
  const rows = Object.entries(report.config).map(([name, value]) => [
    name,
    typeof value === "object" ? JSON.stringify(value) : String(value),
  ]);
  const fold = html("details", {}, html("summary", {}, `Show all ${rows.length} options`));
  fold.append(html("div", { class: "scroll", tabindex: "0" }, plainTable({ head: ["Option", "Value"], rows })));
  const limits = [
    "Calibration text decides what a compressed model keeps: on text unlike it the loss may rise further than shown.",
    "The error of a layer's output is no measure of the model's; only the loss is.",
    ...(report.layers.some((layer) => layer.dense)
      ? []
      : ["One token's work hardly changes: as many experts as before are active for it."]),
  ].map((text) => html("li", {}, text));
  return html(
    "div",
    { class: "card wide" },
    html("h3", {}, "Limits and options"),
    html("ul", { class: "plain" }, limits),
    fold,
  );
}
