// Loss before and after, text by text.

function losses() {
  const parent = document.querySelector("#losses .figures");
  const title = "Before and after, by text";
  if (!texts.length) {
    absent(
      parent,
      "loss-figure",
      "Not measured",
      "Add --evaluate TEXT to the command, with text that is not calibration text.",
    );
    return;
  }
  figure(parent, {
    id: "loss-figure",
    title,
    note: `Nats per token${lengthNote()}; lines show two standard errors. Further right is worse.`,
    legend: [
      [sample(circle(8, 7, 5, "hollow")), "original"],
      [sample(circle(8, 7, 5.5, "lost-fill")), "compressed"],
    ],
    text: texts.map((t) => `${t.name}: ${t.before.toFixed(3)} before, ${t.after.toFixed(3)} after`).join("; "),
    draw: drawLosses,
    table: () => ({
      head: ["Text", "Original", "Compressed", "Increase", "Perplexity", "Tokens"],
      rows: texts.map((t) => [
        t.name,
        `${t.before.toFixed(4)} ± ${t.errors[0]?.toFixed(4) ?? "–"}`,
        `${t.after.toFixed(4)} ± ${t.errors[1]?.toFixed(4) ?? "–"}`,
        signed(t.after - t.before, 4),
        `× ${Math.exp(t.after - t.before).toFixed(3)}`,
        count(t.tokens),
      ]),
    }),
  });
}

/** How long the evaluated sequences are, at most; nothing where the report does not tell. */
function lengthNote() {
  const lengths = texts.flatMap((t) => t.sequence ?? []);
  return lengths.length ? `, in sequences of up to ${count(Math.max(...lengths))} tokens` : "";
}

function drawLosses(width) {
  const narrow = width < 560;
  const [left, right, row] = [narrow ? 4 : 190, 74, narrow ? 52 : 36];
  const spread = texts.flatMap((t) => [
    t.before - 2 * t.errors[0],
    t.after + 2 * t.errors[1],
    t.after - 2 * t.errors[1],
  ]);
  const marks = ticks(Math.min(...spread), Math.max(...spread), narrow ? 3 : 6);
  const [low, high] = [marks[0], marks[marks.length - 1]];
  const x = (loss) => left + 8 + ((loss - low) / (high - low)) * (width - left - right - 16);
  const bottom = texts.length * row + 4;
  const axis = marks.map((value) => [
    line(x(value), 0, x(value), bottom, "axis"),
    label(x(value), bottom + 17, tick(value, marks), "middle"),
  ]);
  const rows = texts.map((t, i) => {
    const y = i * row + (narrow ? 36 : row / 2 + 2);
    return [
      narrow ? label(left, y - 18, t.name, "start", "strong") : label(0, y + 4, t.name, "start", "strong"),
      line(x(t.before), y, x(t.after), y, "stem"),
      ...[t.before, t.after].map((loss, k) =>
        line(x(loss - 2 * t.errors[k]), y, x(loss + 2 * t.errors[k]), y, "whisker"),
      ),
      circle(x(t.before), y, 5.5, "hollow"),
      circle(x(t.after), y, 6, "lost-fill"),
      label(width, y + 4, signed(t.after - t.before, 3), "end", "strong"),
    ];
  });
  return canvas(width, bottom + 24, axis, rows);
}
