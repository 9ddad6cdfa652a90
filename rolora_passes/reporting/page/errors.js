// How far the quantized graph is from its float twin.

function errors() {
  const section = $("errors"), found = data.errors;
  if (!found) {
    section.append(element("p", {}, "The recipe quantizes nothing: there is no error to show beyond that of the passes below."));
    return;
  }
  section.append(element("p", {},
    `Against its float twin (the same graph without quantizers) the predictions move by ${figures(found.kl)} nats a token (KL), ` +
    `the likeliest token is the same at ${figures(100 * found.top1)} % of the tokens, and the logits have ` +
    `${figures(found.sqnr)} dB of signal to noise.`));
  const names = found.series.map((series) => series.name);
  const value = choice("Value", names, () => bars.update());
  value.list.value = Math.max(0, names.findLastIndex((name) => name.startsWith("residual")));
  section.append(element("div", { className: "controls" }, value.shown));
  const bars = figure(section, "signal to noise and KL by layer", PAIR.tall,
    (width) => errorBars(found, value.value, width));
  section.append(element("p", { className: "caption" },
    "Signal to quantization noise of the chosen value, with everything before it quantized too: higher is better, and 6 dB " +
    "is one bit. KL from the twin's predictions where both are read off behind each layer, by the final norm and the head: " +
    "lower is better, and the last bar is the model's own."));
  if (found.skipped.length) {
    section.append(details(`${found.skipped.length} values that cannot be compared`, () => table(["value", "why"], found.skipped)));
  }
}

function errorBars(found, name, width) {
  const series = found.series.find((one) => one.name === name), place = PAIR.at(width);
  const bar = (x, y, n, kind, unit) => ({
    type: "bar", x, y, xaxis: `x${n}`, yaxis: `y${n}`, marker: { color: colour(kind) }, showlegend: false,
    hovertemplate: `layer %{x}<br>%{y:.3g} ${unit}<extra></extra>`,
  });
  const traces = [
    bar(series.layer, series.sqnr, "", "after", "dB"),
    bar(found.lens.map((row) => row.layer), found.lens.map((row) => row.kl), "2", "before", "nats"),
  ];
  const layout = {
    annotations: [heading("signal to noise, dB", place.x(0), place.y(0)), heading(found.lens.length ? "KL, nats a token" : "KL: the logits need more than this stream", place.x(1), place.y(1))],
    xaxis: layerAxis(series.layer, { domain: place.x(0), anchor: "y" }), yaxis: axis("", { domain: place.y(0), anchor: "x" }),
    xaxis2: layerAxis(found.lens, { domain: place.x(1), anchor: "y2" }), yaxis2: axis("", { domain: place.y(1), anchor: "x2" }),
  };
  return [traces, layout];
}
