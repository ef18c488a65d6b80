// Where the neurons of a layer's dropped experts went.

function flow(parent) {
  const { segment_flow: moves, winner, retained, saliency: scores } = current();
  const title = "Where dropped neurons went";
  if (!moves || !moves.moved.length) {
    absent(
      parent,
      "flow-figure",
      title,
      "Nowhere: only recombination moves neurons from expert to expert, " +
        "and there was none, or the report does not tell.",
    );
    return;
  }
  const dropped = scores.map((_, expert) => expert).filter((expert) => !stays[selected].has(expert));
  const total = moves.width * dropped.length;
  const lost = total - sum(moves.moved);
  const written = winner.startsWith("recombined");
  const fate =
    lost === total
      ? "None was that much like one of a retained expert, so there was nothing to recombine."
      : written
        ? "This recombination was written."
        : "The guard did not write this recombination: another candidate came out better.";
  const words = (i) =>
    i < dropped.length
      ? `Dropped expert ${dropped[i]}: ${count(moves.moved[i])} of ${count(moves.width)} neurons moved, ` +
        `${count(moves.width - moves.moved[i])} discarded`
      : `Retained expert ${retained[i - dropped.length]} receives ` +
        plural(moves.received[i - dropped.length], "neuron");
  figure(parent, {
    id: "flow-figure",
    title,
    note:
      "A neuron moves to the retained expert with the neuron most like it, if that cosine exceeds " +
      `${report.config.similarity_threshold ?? "a threshold"}; else it is discarded. ${fate}`,
    legend: [
      [sample(rect(3, 2, 10, 10, { class: "kept-fill", rx: 2 })), `moved, ${count(total - lost)}`],
      [sample(rect(3, 2, 10, 10, { class: "lost-fill", rx: 2 })), `discarded, ${count(lost)}`],
    ],
    text: `Of ${count(total)} neurons of dropped experts ${count(total - lost)} moved, ${count(lost)} were discarded.`,
    draw: (width) => drawFlow(width, moves, dropped, retained),
    marks: {
      hint: "Point at an expert, or press the arrow keys.",
      describe: words,
      total: () => dropped.length + retained.length,
      cursor: (plot, i) => {
        plot.firstChild.classList.add("quiet");
        const expert =
          i < dropped.length ? `[data-from="${dropped[i]}"]` : `[data-to="${retained[i - dropped.length]}"]`;
        plot.querySelectorAll(expert).forEach((ribbon) => ribbon.classList.add("on"));
        const mark = plot.querySelector(`[data-i="${i}"]`);
        plot.firstChild.append(outline(mark));
      },
    },
    table: () => ({
      head: ["Dropped expert", "Moved", "Discarded", "Largest streams"],
      rows: dropped.map((expert, i) => [
        expert,
        count(moves.moved[i]),
        count(moves.width - moves.moved[i]),
        moves.links
          .filter((l) => l[0] === expert)
          .sort((a, b) => b[2] - a[2])
          .slice(0, 4)
          .map((l) => `${l[2]} to ${l[1]}`)
          .join(", ") || "–",
      ]),
    }),
  });
}

function drawFlow(width, moves, dropped, retained) {
  const gap = dropped.length > 40 ? 2 : dropped.length > 16 ? 4 : 8;
  const nodes = Math.max(dropped.length, retained.length);
  const height = Math.max(240, nodes * (gap + (nodes > 16 ? 6 : 12)));
  const top = 26;
  const scale = (height - gap * (dropped.length - 1)) / (moves.width * dropped.length);
  const space = Math.max(gap, (height - sum(moves.received) * scale) / Math.max(1, retained.length));
  const [x0, x1, thick] = [32, width - 34, 12];
  const starts = new Map(dropped.map((expert, i) => [expert, top + i * (moves.width * scale + gap)]));
  let y = top + (space - gap) / 2;
  const ends = new Map(
    retained.map((expert, i) => {
      const here = y;
      y += moves.received[i] * scale + space;
      return [expert, here];
    }),
  );
  const named = spaced();
  const left = dropped.map((expert, i) => {
    const [start, moved] = [starts.get(expert), moves.moved[i] * scale];
    const tall = moves.width * scale;
    return [
      svg(
        "g",
        { "data-i": i },
        rect(0, start - gap / 2, x0 + thick, tall + gap, { class: "band" }),
        rect(x0, start, thick, moved, { class: "kept-fill" }),
        rect(x0, start + moved, thick, tall - moved, { class: "lost-fill" }),
      ),
      named(0, start + tall / 2) ? label(x0 - 8, start + tall / 2 + 4, expert, "end") : null,
    ];
  });
  const right = retained.map((expert, i) => {
    const tall = moves.received[i] * scale;
    return [
      svg(
        "g",
        { "data-i": dropped.length + i },
        rect(x1 - thick, ends.get(expert) - space / 2, thick + 34, tall + space, { class: "band" }),
        rect(x1 - thick, ends.get(expert), thick, Math.max(1.5, tall), { class: "kept-fill" }),
      ),
      named(1, ends.get(expert) + tall / 2) ? label(x1 + 8, ends.get(expert) + tall / 2 + 4, expert) : null,
    ];
  });
  const ribbons = moves.links.map(([from, to, segments]) => {
    const [a, b, tall] = [starts.get(from), ends.get(to), segments * scale];
    starts.set(from, a + tall);
    ends.set(to, b + tall);
    return ribbon(x0 + thick, a, x1 - thick, b, tall, from, to);
  });
  const heads = [label(0, 12, "dropped", "start", "strong"), label(width, 12, "retained", "end", "strong")];
  return canvas(width, Math.ceil(Math.max(top + height, y)) + 6, ribbons, left, right, heads);
}

/** Whether the next label of a column, at a height, is clear of the one before. */
function spaced() {
  const last = [-Infinity, -Infinity];
  return (column, y) => y - last[column] >= 13 && ((last[column] = y), true);
}

function ribbon(x0, y0, x1, y1, tall, from, to) {
  const middle = (x0 + x1) / 2;
  const curve = (x, a, b) => `C${middle} ${round(a)} ${middle} ${round(b)} ${x} ${round(b)}`;
  const d = `M${x0} ${round(y0)}${curve(x1, y0, y1)}V${round(y1 + tall)}${curve(x0, y1 + tall, y0 + tall)}Z`;
  return svg("path", { class: "ribbon", d, "data-from": from, "data-to": to });
}
