// Activations before and after: surfaces, channels, and figures by layer.

const STATES = { before: "as captured", after: "as the quantizers see it" };

function outliers() {
  const section = $("outliers"), sites = data.activations;
  const states = Object.keys(STATES).filter((state) => sites.some((site) => site[state]));
  const kinds = data.headline.map((row) => row.kind);
  const kind = choice("Value", kinds, () => { settle(); update(); });
  const layer = slider("Layer", update);
  const view = choice("View", ["map", "surface"], () => surfaces.update());
  const those = () => sites.filter((site) => site.kind === kind.value);
  const site = () => those()[Math.min(layer.place, those().length - 1)];
  const settle = () => { layer.places = those().length; };
  const said = element("p", { ariaLive: "polite" });
  section.append(
    element("p", {}, states.length > 1
      ? "What linears and norms read, token by channel, before the recipe and just before its quantizers. A few " +
        "large channels make every scale coarse; after a rotation they are spread over all channels."
      : "What linears and norms read, token by channel. The recipe has no pass that changes these values before it " +
        "quantizes, so nothing moves the outliers."),
    element("div", { className: "controls" }, kind.shown, layer.shown, view.shown), said,
  );
  const pictures = panels(states.length, 400, 340, 0.06);
  const surfaces = figure(section, "magnitudes, token by channel", pictures.tall,
    (width) => (view.value === "map" ? maps : hills)(site(), states, pictures.at(width)));
  const under = element("p", { className: "caption" });
  section.append(under, element("h3", {}, "By channel"));
  const channels = figure(section, "largest magnitude and kurtosis by channel", PAIR.tall,
    (width) => profiles(site(), states, width));
  section.append(element("p", { className: "caption" },
    "Each channel's largest magnitude, and its kurtosis over tokens; a Gaussian has 3. A spike is an outlier channel. " +
    "Where there are more than 256 channels, neighbours share a point: the largest of them."));
  section.append(element("h3", {}, "By layer"));
  const layers = figure(section, "kurtosis and max/median by layer", PAIR.tall,
    (width) => byLayer(those(), site(), states, width));
  section.append(element("p", { className: "caption" },
    "The chosen value in every layer; the dotted line is the layer shown above. Kurtosis is of all elements, about their " +
    "token's mean; max/median is of a token's magnitudes, the median token's."));
  section.append(details("The numbers of all sites", () => siteTable(sites, states)));

  function update() {
    const { layer: number, readers } = site();
    layer.say(number === null ? "behind the last" : String(number));
    said.replaceChildren(`Read by ${readers.map(shortName).join(", ")}: `, ...change(site(), "kurtosis", "kurtosis"),
      "; ", ...change(site(), "peak", "max/median"), ". A Gaussian has kurtosis 3.");
    const { shape } = site()[states[0]].surface;
    under.textContent = `Magnitude, in colours of one logarithmic scale. ${data.about.tokens - 1} tokens by ` +
      `${site().channels} channels, shown as ${shape[0]} by ${shape[1]}: a cell has the largest of its values. The first token ` +
      `is left out of all figures here, for it is an attention sink: it reaches ${figures(site().before.first)}.`;
    for (const shown of [surfaces, channels, layers]) shown.update();
  }
  settle();
  layer.place = those().indexOf(those().reduce((worst, one) => (one.before.peak > worst.before.peak ? one : worst)));
  update();
}

// The last part of a site's name, and the one before it where the last is a number.
const shortName = (name) => name.match(/[^.]+(\.\d+)?$/)[0];

function details(title, make) {
  const made = element("details", {}, element("summary", {}, title));
  made.addEventListener("toggle", () => { if (made.open && made.children.length < 2) made.append(make()); });
  return made;
}

function change(from, part, name) {
  const before = element("span", { className: "before" }, figures(from.before[part]));
  if (!from.after) return [`${name} `, before];
  return [`${name} `, before, " → ", element("span", { className: "after" }, figures(from.after[part]))];
}

function magnitudes(site, state) {
  const { surface } = site[state], [tokens, columns] = surface.shape;
  const spread = (count, total) => Array.from({ length: count }, (_, i) => Math.floor((i * total) / count));
  return {
    z: rows(numbers(surface), columns), x: spread(columns, site.channels), y: spread(tokens, data.about.tokens - 1).map((token) => token + 1),
    low: surface.low, high: surface.high,
  };
}

function maps(site, states, place) {
  const layout = { annotations: [], margin: { l: 52, r: 14, t: 30, b: 76 } };
  const traces = states.map((state, i) => {
    const { z, x, y, low, high } = magnitudes(site, state), n = i ? i + 1 : "";
    const { tickvals, ticktext } = decades(low, high);
    layout.coloraxis = {
      colorscale: "Viridis", cmin: Math.log10(low), cmax: Math.log10(high),
      colorbar: {
        orientation: "h", y: 0, yanchor: "top", ypad: 42, thickness: 12, len: 0.8,
        tickvals: tickvals.map(Math.log10), ticktext,
      },
    };
    layout[`xaxis${n}`] = axis("channel", { domain: place.x(i), anchor: `y${n}`, showgrid: false });
    layout[`yaxis${n}`] = axis(i && place.beside ? "" : "token",
      { domain: place.y(i), anchor: `x${n}`, autorange: "reversed", showgrid: false });
    layout.annotations.push(heading(titleOf(site, state), place.x(i), place.y(i)));
    return {
      type: "heatmap", z: z.map((row) => row.map(Math.log10)), customdata: z, x, y, coloraxis: "coloraxis",
      xaxis: `x${n}`, yaxis: `y${n}`, hovertemplate: "token %{y}, channel %{x}<br>%{customdata:.3g}<extra></extra>",
    };
  });
  return [traces, layout];
}

function hills(site, states, place) {
  const layout = { annotations: [], margin: { l: 0, r: 0, t: 30, b: 0 } };
  const traces = states.map((state, i) => {
    const { z, x, y, low, high } = magnitudes(site, state), n = i ? i + 1 : "";
    const plainAxis = (text, more) => ({ ...axis(text), ...more });
    layout[`scene${n}`] = {
      domain: { x: place.x(i), y: place.y(i) }, dragmode: "turntable", aspectmode: "manual", aspectratio: { x: 1.4, y: 1, z: 0.7 },
      xaxis: plainAxis("channel"), yaxis: plainAxis("token"), zaxis: plainAxis("magnitude", { range: [0, high] }),
      camera: { eye: { x: 1.25, y: -1.35, z: 0.75 }, center: { x: 0, y: 0, z: -0.18 } },
    };
    layout.annotations.push(heading(titleOf(site, state), place.x(i), place.y(i), place.beside ? 6 : -16));
    return {
      type: "surface", z, x, y, scene: `scene${n}`, colorscale: "Viridis", showscale: false,
      surfacecolor: z.map((row) => row.map(Math.log10)), cmin: Math.log10(low), cmax: Math.log10(high),
      hovertemplate: "token %{y}, channel %{x}<br>%{z:.3g}<extra></extra>",
    };
  });
  return [traces, layout];
}

const titleOf = (site, state) => `<b>${state}</b>, ${STATES[state]}: kurtosis ${figures(site[state].kurtosis)}`;

function profiles(site, states, width) {
  return pair(width, ["channel_max", "channel_kurtosis"], ["largest magnitude", "kurtosis over tokens"], "channel",
    states, (part, state) => {
      const y = numbers(site[state][part]), scale = site[state][part];
      return { y, x: y.map((_, i) => Math.floor((i * site.channels) / y.length)), range: [scale.low, scale.high * 1.2], mode: "lines" };
    });
}

function byLayer(sites, shown, states, width) {
  const names = sites.map((site, i) => site.layer ?? i);
  const [traces, layout] = pair(width, ["kurtosis", "peak"], ["kurtosis", "max/median"], "layer", states, (part, state) => {
    const all = sites.flatMap((site) => states.map((s) => site[s][part])).filter((v) => v > 0);
    return { x: names, y: sites.map((site) => site[state][part]), range: [Math.min(...all) / 1.3, Math.max(...all) * 1.3], mode: "lines+markers" };
  });
  for (const name of ["xaxis", "xaxis2"]) Object.assign(layout[name], layerAxis(names, layout[name]));
  const at = names[sites.indexOf(shown)];
  layout.shapes = ["", "2"].map((n) => ({
    type: "line", x0: at, x1: at, y0: 0, y1: 1, xref: `x${n}`, yref: `y${n} domain`,
    line: { color: colour("soft"), width: 1, dash: "dot" },
  }));
  return [traces, layout];
}

const PAIR = panels(2, 300, 270, 0.12);

// Two figures on logarithmic axes, each with a line for before and one for after.
function pair(width, parts, titles, across, states, lines) {
  const place = PAIR.at(width), traces = [], layout = { annotations: [], margin: { l: 56, r: 14, t: 46, b: 44 } };
  parts.forEach((part, i) => {
    const n = i ? "2" : "";
    let range = [1, 10];
    for (const state of states) {
      const line = lines(part, state);
      range = line.range;
      traces.push({
        type: "scatter", mode: line.mode, name: state, x: line.x, y: line.y, xaxis: `x${n}`, yaxis: `y${n}`,
        legendgroup: state, showlegend: i === 0, marker: { size: 5, symbol: state === "before" ? "circle" : "diamond" },
        line: { color: colour(state), width: 1.4 }, hovertemplate: `${across} %{x}<br>%{y:.3g}<extra>${state}</extra>`,
      });
    }
    layout[`xaxis${n}`] = axis(across, { domain: place.x(i), anchor: `y${n}`, showgrid: false });
    layout[`yaxis${n}`] = axis("", {
      domain: place.y(i), anchor: `x${n}`, type: "log", range: range.map(Math.log10), ...decades(...range),
    });
    layout.annotations.push(heading(titles[i], place.x(i), place.y(i)));
  });
  return [traces, layout];
}

function siteTable(sites, states) {
  const heads = ["value", "layer", "read by", ...["kurtosis", "max/median"].flatMap((name) => states.map((s) => `${name}, ${s}`))];
  const lines = sites.map((site) => [
    site.kind, site.layer, site.readers.map(shortName).join(", "),
    ...["kurtosis", "peak"].flatMap((part) => states.map((s) => figures(site[s][part]))),
  ]);
  return table(heads, lines, [1, 3, 4, 5, 6]);
}
