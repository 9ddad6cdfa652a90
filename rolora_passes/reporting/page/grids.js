// Histograms of what quantizers read, with the values that they can give.

function grids() {
  const section = $("grids"), sets = { weights: data.weights, activations: data.quantizers };
  const there = Object.keys(sets).filter((name) => sets[name].length);
  if (!there.length) {
    section.append(element("p", {}, "The recipe quantizes nothing, so there are no grids."));
    return;
  }
  const names = () => unique(sets[what.value].map(roleOf));
  const what = choice("Of", there, () => { refill(); update(); });
  const role = choice("Site", [""], () => { settle(); update(); });
  const layer = slider("Layer", () => update());
  let roles = [];
  const those = () => sets[what.value].filter((site) => roleOf(site) === roles[role.list.value]);
  const site = () => those()[Math.min(layer.place, those().length - 1)];
  const settle = () => { layer.places = those().length; };
  const refill = () => {
    roles = names();
    role.list.replaceChildren(...roles.map((text, i) => element("option", { value: i }, text)));
    settle();
  };
  const said = element("p", { ariaLive: "polite" });
  section.append(
    element("p", {}, "The values that share one scale, as a histogram, and the values they are rounded to, as lines. " +
      "Where the histogram is narrow between wide lines, an outlier has stretched the grid."),
    element("div", { className: "controls" }, what.shown, role.shown, layer.shown), said);
  const three = panels(3, 310, 280, 0.06);
  const pictures = figure(section, "histograms and grids", three.tall, (width) => histograms(site(), three.at(width)));
  section.append(element("p", { className: "caption" },
    "Of all groups of the site (rows or groups of a weight; tokens, or heads of a token, of an activation): the one that " +
    "rounding changes most, the median one, and the one it changes least. Error: norm of the change over the norm of the values."));
  function update() {
    const { name, layer: number, bits, group } = site();
    layer.say(number === null ? "–" : String(number));
    said.textContent = `${name}: ${bits} bits, ${group} values share a scale.`;
    pictures.update();
  }
  refill();
  update();
}

const roleOf = (site) => (site.layer === null ? site.name : site.name.split(`.${site.layer}.`).slice(-1)[0]);

const levelsOf = (levels) => (Array.isArray(levels) ? levels : Array.from({ length: levels.count },
  (_, i) => levels.first + (i * (levels.last - levels.first)) / (levels.count - 1)));

function histograms(site, place) {
  const traces = [], layout = { annotations: [], bargap: 0, showlegend: false };
  site.samples.forEach((sample, i) => {
    const counts = numbers(sample.counts), n = i ? i + 1 : "", step = (sample.high - sample.low) / counts.length;
    const levels = levelsOf(sample.levels), top = Math.max(...counts) * 1.08;
    traces.push({
      type: "bar", x: counts.map((_, j) => sample.low + (j + 0.5) * step), y: counts, xaxis: `x${n}`, yaxis: `y${n}`,
      width: step, marker: { color: colour("after"), line: { width: 0 } }, hovertemplate: "%{x:.3g}: %{y:.0f} values<extra></extra>",
    }, {
      type: "scatter", mode: "lines", x: levels.flatMap((v) => [v, v, null]), y: levels.flatMap(() => [0, top, null]),
      xaxis: `x${n}`, yaxis: `y${n}`, line: { color: colour("before"), width: levels.length > 40 ? 0.4 : 1 }, hoverinfo: "skip",
    });
    layout[`xaxis${n}`] = axis("value", { domain: place.x(i), anchor: `y${n}`, showgrid: false, nticks: 4, ticklabelstandoff: 6 });
    layout[`yaxis${n}`] = axis(i && place.beside ? "" : "values",
      { domain: place.y(i), anchor: `x${n}`, range: [0, top], showgrid: false });
    layout.annotations.push(heading(`<b>${sample.label}</b>, ${sample.where}`, place.x(i), place.y(i), 20));
    layout.annotations.push(heading(`error ${figures(100 * sample.error, 2)} %, ${sample.used} of ${levels.length} levels used`,
      place.x(i), place.y(i), 3));
  });
  layout.margin = { l: 56, r: 14, t: 48, b: 44 };
  return [traces, layout];
}
