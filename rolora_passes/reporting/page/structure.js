// What the graph is made of: basis classes, passes, sizes; and where all of it came from.

// Okabe and Ito's colours, which stay apart for the colour-blind.
const MARKS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b3a500", "#888888"];

function bases() {
  const section = $("bases"), { classes, rows: lines, pinned } = data.bases;
  section.append(element("p", {},
    "Parameters (layers folded together) by basis class. All marked axes of one column must change basis together: where an axis " +
    "writes, the matrix is multiplied in; where it reads, its inverse transpose. A striped column is blocked."));
  const mark = (i) => `--mark: ${MARKS[i % MARKS.length]}`;
  const heads = classes.map((one, i) => {
    const state = one.turned ? `rotated: ${one.turned}` : one.free ? "free, left as it is" : "blocked";
    const head = element("th", { scope: "col" }, element("b", {}, one.name), element("br"), `${one.size} channels, admits ${one.admits}`,
      element("br"), element("span", { className: "chip" }, state));
    head.style = mark(i);
    return head;
  });
  const body = lines.map((line) => element("tr", {},
    element("th", { scope: "row", className: "name" }, breakable(line.name), line.count > 1 ? ` (${line.count})` : ""),
    classes.map((one, i) => {
      const marks = line.cells[i];
      const cell = element("td", { className: marks ? `cell${one.free ? "" : " blocked"}` : "" }, marks ? marks.join(", ") : "");
      cell.style = mark(i);
      return cell;
    })));
  section.append(element("div", { className: "wide map", tabIndex: 0 }, element("table", {},
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "parameter"), heads)), element("tbody", {}, body))));
  const blocked = classes.filter((one) => one.blocked);
  if (blocked.length) {
    section.append(element("h3", {}, "What blocks the others"),
      element("ul", {}, blocked.map((one) => element("li", {}, element("b", {}, one.name), `: ${one.blocked}`))));
  }
  section.append(element("p", { className: "caption" },
    `${pinned} more axes are fixed by their meaning: vocabulary rows, heads, positions, tables.`));
}

function pipeline() {
  const section = $("pipeline"), steps = data.pipeline;
  if (!steps.length) {
    section.append(element("p", {}, "The recipe has no passes."));
    return;
  }
  const errors = steps.map((step) => step.error).filter((error) => error !== null);
  const sum = (part) => steps.reduce((total, step) => total + step[part], 0).toFixed(1);
  section.append(element("p", {}, `${steps.length} passes took ${sum("seconds")} s, and their checks ${sum("verify_seconds")} s. ` +
    (errors.length ? `The exact passes that were compared with the graph before them changed a logit by ` +
      `${figures(Math.max(...errors), 2)} of the largest logit at most.` : "No pass could be compared with the graph before it.")));
  const tall = 26 * steps.length + 110, two = panels(2, tall, tall, 0.06);
  figure(section, "seconds and memory by pass", two.tall, (width) => timeline(steps, two.at(width)));
  section.append(element("p", { className: "caption" },
    "The passes one after the other, and the process's peak memory so far: a step up is a pass that needed more than all before it."));
  section.append(table(
    ["pass", "kind", "seconds", "check, s", "peak MB", "nodes", "changed", "left", "error"],
    steps.map((step) => [step.name, step.kind, step.seconds.toFixed(2), step.verify_seconds.toFixed(2), step.peak_mb.toFixed(0),
      step.nodes.join(" → "), step.changed, step.left.reduce((sum, one) => sum + one.count, 0), errorOf(step)]),
    [2, 3, 4, 5, 6, 7, 8]));
}

function errorOf(step) {
  if (step.error !== null) return figures(step.error, 2);
  return ["lossy", "trained"].includes(step.kind) ? step.kind : step.changed ? "not compared" : "unchanged";
}

function timeline(steps, place) {
  const labels = steps.map((step, i) => `${i + 1} ${plain(step.name)}`);
  let now = 0;
  const starts = steps.map((step) => { const start = now; now += step.seconds + step.verify_seconds; return start; });
  const bar = (name, x, base, n, kind, unit) => ({
    type: "bar", orientation: "h", name, y: labels, x, base, xaxis: `x${n}`, yaxis: `y${n}`, marker: { color: colour(kind) },
    showlegend: n === "", hovertemplate: `%{y}<br>${name} ${unit}<extra></extra>`,
  });
  const seconds = steps.map((step) => step.seconds), checks = steps.map((step) => step.verify_seconds);
  const traces = [
    { ...bar("pass", seconds, starts, "", "after", "%{customdata:.3g} s"), customdata: seconds },
    { ...bar("check", checks, starts.map((s, i) => s + seconds[i]), "", "before", "%{customdata:.3g} s"), customdata: checks },
    bar("peak memory", steps.map((step) => step.peak_mb), undefined, "2", "third", "%{x:.0f} MB"),
  ];
  const rows = { autorange: "reversed", showgrid: false, type: "category" };
  const layout = {
    barmode: "overlay", bargap: 0.3, margin: { l: 10, r: 14, t: 40, b: 44 }, legend: { ...LEGEND, x: place.x(0)[1] },
    xaxis: axis("seconds", { domain: place.x(0), anchor: "y" }), yaxis: axis("", { ...rows, domain: place.y(0), anchor: "x" }),
    xaxis2: axis("MB", { domain: place.x(1), anchor: "y2", nticks: 5 }),
    yaxis2: axis("", { ...rows, domain: place.y(1), anchor: "x2", showticklabels: !place.beside }),
    annotations: [heading("time", place.x(0), place.y(0)), heading("peak memory", place.x(1), place.y(1))],
  };
  return [traces, layout];
}

function sizes() {
  const section = $("sizes"), found = data.sizes;
  const widths = found.by_bits.map(([bits, count]) => `${figures(count / 1e6)} M at ${bits} bits`).join(", ");
  section.append(element("p", {}, `${figures(found.elements / 1e6, 4)} M weights (${widths}) take ${figures(found.megabytes, 4)} MB, ` +
    `${figures(found.bits)} bits each with scales.`));
  const folded = new Map();
  for (const site of found.sites) {
    const key = [layerless(site.name), site.bits, site.group, site.reads].join(" ");
    const row = folded.get(key) ?? { ...site, name: layerless(site.name), count: 0, mb: 0 };
    folded.set(key, { ...row, count: row.count + 1, mb: row.mb + site.mb });
  }
  const lines = [...folded.values()];
  figure(section, "megabytes by weight", () => 26 * lines.length + 110, () => weightBars(lines));
  section.append(element("p", { className: "caption" },
    "What each kind of weight takes, all layers together, scales included. Weights of more than 8 bits are floating point."));
  const heads = ["site", "sites", "shape", "weight bits", "share a scale", "reads, bits", "MB"], right = [1, 3, 4, 5, 6];
  const line = (row) => [row.name, row.count, row.shape.join(" × "), row.bits, row.group, row.reads ?? "float", figures(row.mb)];
  section.append(table(heads, lines.map(line), right));
  section.append(details("Every site", () => table(heads, found.sites.map((site) => line({ ...site, count: 1 })), right)));
  const left = data.pipeline.flatMap((step) => step.left.map((one) => [step.name, one.count,
    one.sites.join(", ") + (one.count > one.sites.length ? " …" : ""), one.reason]));
  section.append(element("h3", {}, "What was left alone, and why"), left.length
    ? table(["pass", "sites", "such as", "why"], left, [1]) : element("p", {}, "Nothing was."));
}

function weightBars(lines) {
  const widths = unique(lines.map((row) => row.bits)).sort((a, b) => a - b), places = lines.map((_, i) => i);
  const traces = widths.map((bits, i) => {
    const those = places.filter((place) => lines[place].bits === bits);
    return {
      type: "bar", orientation: "h", name: `${bits} bits`, x: those.map((place) => lines[place].mb), y: those,
      marker: { color: [colour("after"), colour("before"), colour("third"), colour("soft")][i % 4] }, showlegend: true,
      customdata: those.map((place) => plain(lines[place].name)), hovertemplate: "%{customdata}: %{x:.3g} MB<extra></extra>",
    };
  });
  const ticktext = lines.map((row) => plain(row.name.split("*.").slice(-1)[0]));
  const layout = {
    barmode: "overlay", bargap: 0.3, margin: { l: 10, r: 14, t: 40, b: 44 }, xaxis: axis("MB"),
    yaxis: axis("", { autorange: "reversed", showgrid: false, zeroline: false, tickvals: places, ticktext }),
  };
  return [traces, layout];
}

function about() {
  const section = $("about"), { about: from } = data;
  section.append(
    element("h3", {}, "Recipe"), element("pre", { tabIndex: 0 }, from.yaml),
    element("p", {}, `Seed: ${from.seed ?? "the recipe's own"}.`),
    element("h3", {}, "Text"), element("p", {}, `The first ${from.tokens} tokens of ${from.text}, which begin:`),
    element("pre", { tabIndex: 0, style: "white-space: pre-wrap" }, from.beginning),
    element("h3", {}, "Versions"), table(["package", "version"], Object.entries(from.versions)),
    element("p", { className: "caption" }, `Made in ${figures(from.seconds)} s, the passes and the measurements.`));
}
