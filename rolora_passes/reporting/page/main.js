// From the packed data to a page: words and tables at once, figures as they come into view.

function cards() {
  const card = (label, ...shown) => element("div", { className: "card" }, element("span", {}, label), element("b", {}, shown.flat()));
  const made = data.headline.filter((row) => /before attention|down projection/.test(row.kind))
    .map((row) => card(`kurtosis, ${row.kind} (median of ${row.sites})`, change(row, "kurtosis", "")));
  if (data.errors) made.push(card("KL from the float twin", `${figures(data.errors.kl)} nats`));
  made.push(card("weights", `${figures(data.sizes.megabytes)} MB, ${figures(data.sizes.bits)} bits each`));
  return made;
}

async function draw() {
  const [library, arrays] = await Promise.all([unpack("library"), unpack("arrays")]);
  bytes = new Uint8Array(await arrays.arrayBuffer());
  document.head.append(element("script", { textContent: await library.text() }));
  performance.mark("figures"); // from here on whatever comes into view is drawn
  ready = true;
  for (const place of waiting.keys()) watcher.observe(place);
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return; // a phone's address bar comes and goes
    width = window.innerWidth;
    for (const place of drawn.keys()) redraw(place);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { for (const place of drawn.keys()) redraw(place); });
}

async function show() {
  data = await (await unpack("data")).json();
  $("model").textContent = data.about.model;
  $("subtitle").textContent = `${data.about.recipe}, seen on ${data.about.tokens} tokens of ${data.about.text}`;
  $("cards").append(...cards());
  for (const section of [outliers, errors, grids, bases, pipeline, sizes, about]) section();
  performance.mark("words");
}

document.addEventListener("DOMContentLoaded", () => show().then(draw).catch((error) => {
  document.querySelector("main").prepend(element("p", { className: "error" }, `This report cannot be drawn: ${error.message}`));
  throw error;
}));
