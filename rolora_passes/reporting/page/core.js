// What every section needs: the data, elements, and figures that are drawn when they come into view.

const $ = (id) => document.getElementById(id);
let data, bytes;

// Packed content (gzip in base64, see page.py) as a response to read from.
async function unpack(id) {
  const packed = await fetch(`data:application/gzip;base64,${$(id).textContent.trim()}`);
  return new Response(packed.body.pipeThrough(new DecompressionStream("gzip")));
}

// The numbers of an array (see arrays.py).
function numbers({ at, shape, low, high, log }) {
  const codes = bytes.subarray(at, at + shape.reduce((a, b) => a * b, 1));
  const value = log ? (c) => low * (high / low) ** (c / 255) : (c) => low + (c / 255) * (high - low);
  const table = Float64Array.from({ length: 256 }, (_, c) => value(c));
  return Array.from(codes, (c) => table[c]);
}

function rows(values, width) {
  return Array.from({ length: values.length / width }, (_, i) => values.slice(i * width, (i + 1) * width));
}

// An element with properties and children; text is text, never markup.
function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

function table(heads, lines, numeric = []) {
  const kind = (i) => (numeric.includes(i) ? "number" : "");
  const head = heads.map((text, i) => element("th", { className: kind(i), scope: "col" }, text));
  const body = lines.map((line) =>
    element("tr", {}, line.map((text, i) => element("td", { className: i ? kind(i) : "name" }, `${text ?? "–"}`))));
  return element("div", { className: "wide", tabIndex: 0 },
    element("table", {}, element("thead", {}, element("tr", {}, head)), element("tbody", {}, body)));
}

function figures(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 10000 || (size > 0 && size < 0.001)) return value.toExponential(1);
  return size >= 1000 ? value.toFixed(0) : String(Number(value.toPrecision(digits)));
}

const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;");
const breakable = (name) => name.split(/(?<=\.)/).flatMap((part) => [part, element("wbr")]);
const layerless = (name) => name.replace(/\.\d+\./g, ".*.");
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const unique = (values) => [...new Set(values)];

// Selectors: a list to choose from, and a slider over places.

function choice(label, options, changed) {
  const list = element("select", {}, options.map((text, i) => element("option", { value: i }, text)));
  list.addEventListener("change", changed);
  return { shown: element("label", {}, label, list), get value() { return options[list.value]; }, list };
}

function slider(label, changed) {
  const output = element("output");
  const range = element("input", { type: "range", min: 0, value: 0 });
  range.addEventListener("input", changed);
  return {
    shown: element("label", {}, element("span", {}, `${label}: `, output), range),
    get place() { return Number(range.value); },
    set place(value) { range.value = value; },
    set places(count) { range.max = count - 1; range.disabled = count < 2; },
    say(text) { output.textContent = text; range.setAttribute("aria-valuetext", text); },
  };
}

// Figures. `make` gives [traces, layout] for a width, and is asked again for another width or theme; `tall` is
// the height for a width, known before the figure is drawn, so that nothing below it moves.

const drawn = new Map();
const waiting = new Map();
let ready = false;
const watcher = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (isIntersecting && waiting.has(target)) {
      watcher.unobserve(target);
      drawn.set(target, waiting.get(target));
      waiting.delete(target);
      redraw(target);
    }
  }
}, { rootMargin: "250px" });

function figure(parent, label, tall, make) {
  const place = element("div", { className: "plot", role: "img", ariaLabel: label });
  parent.append(place);
  place.style.minHeight = `${tall(place.clientWidth)}px`;
  waiting.set(place, { tall, make });
  if (ready) watcher.observe(place);
  return { update: () => drawn.has(place) && redraw(place) };
}

const LEGEND = { orientation: "h", x: 1, xanchor: "right", y: 1, yanchor: "top", yref: "container" };

function redraw(place) {
  const { tall, make } = drawn.get(place), width = place.clientWidth, height = tall(width);
  const [traces, layout] = make(width);
  place.style.minHeight = `${height}px`;
  const style = { font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("ink") } };
  const base = {
    ...style, height, width, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 56, r: 14, t: 30, b: 44 }, hovermode: "closest", dragmode: false,
    legend: LEGEND,
  };
  return Plotly.react(place, traces, { ...base, ...layout }, { displaylogo: false, displayModeBar: false });
}

function axis(title, more = {}) {
  return {
    title: { text: title, standoff: 6 }, gridcolor: colour("line"), zerolinecolor: colour("line"),
    linecolor: colour("line"), automargin: true, ...more,
  };
}

// Layers are whole numbers.
const layerAxis = (layers, more) => axis("layer", { dtick: Math.max(1, Math.ceil(layers.length / 8)), tick0: 0, ...more });

// Pictures in a row, or one above the other where there is no room for it: how high all of them are for a width,
// and the part of the figure that each one takes. In a row they are `row` pixels high, else `column` pixels each.
function panels(count, row, column, gap) {
  const roomy = (width) => width >= 640;
  return {
    tall: (width) => (roomy(width) ? row : count * column),
    at(width) {
      const beside = roomy(width), apart = beside ? gap : 92 / (count * column - 80); // room for labels, in pixels
      const span = (i) => [i / count + (i ? apart / 2 : 0), (i + 1) / count - (i < count - 1 ? apart / 2 : 0)];
      return { beside, x: (i) => (beside ? span(i) : [0, 1]), y: (i) => (beside ? [0, 1] : span(count - 1 - i)) };
    },
  };
}

function heading(text, domainX, domainY, offset = 6) {
  return {
    text, x: domainX[0], y: domainY[1], xref: "paper", yref: "paper", xanchor: "left", yanchor: "bottom",
    yshift: offset, showarrow: false, font: { size: 13 },
  };
}

// Where a logarithmic axis has its numbers: decades, and more between them where there are few.
function decades(low, high) {
  const steps = high / low < 10 ? [1, 2, 3, 4, 5, 7] : high / low < 100 ? [1, 2, 5] : [1];
  const found = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) {
    found.push(...steps.map((step) => step * 10 ** e).filter((value) => value >= low && value <= high));
  }
  return { tickvals: found, ticktext: found.map((value) => String(Number(value.toPrecision(1)))) };
}
