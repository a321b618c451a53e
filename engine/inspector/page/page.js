// The page's state is its address: every change goes there, and everything shown comes from there.
const TABS = { similarity: "Similarity", match: "Matches", cosegment: "Co-segment", parts: "Parts", pca: "PCA", discover: "Discover" };
const DEFAULTS = {
  tab: "similarity", photo: "0", x: "", y: "", hierarchy: "0", facet: "", a: "0", b: "1", binning: "2", threshold: "0.05",
  pairs: "10", elbow: "0.975", votes: "75", salient: "0.065", parts: "4", joint: "1", method: "tokencut",
};
const NS = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);
let about = null, waiting = null, shown = 0;

const state = () => ({ ...DEFAULTS, ...Object.fromEntries(new URLSearchParams(location.hash.slice(1))) });

function change(values, { replace = false } = {}) {
  const next = { ...state(), ...values };
  const kept = Object.entries(next).filter(([name, value]) => String(value) !== DEFAULTS[name]);
  const address = "#" + new URLSearchParams(kept);
  history[replace ? "replaceState" : "pushState"](null, "", address);
  render();
}

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in node && typeof value !== "string") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);  // strings become text, never markup
  return node;
}

function say(text, error = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("error", error);
}

async function ask(path, options = {}) {
  const answer = await fetch(path, options);
  const found = await answer.json().catch(() => ({ error: `${answer.status} ${answer.statusText}` }));
  if (!answer.ok) throw new Error(found.error || answer.statusText);
  return found;
}

// ---- what there is to choose

function control(label, node, output) {
  return make("label", {}, label, output ? make("span", {}, node, " ", output) : node);
}

function choice(label, name, options, texts = options) {
  const node = make("select", { name });
  options.forEach((value, i) => node.append(make("option", { value: String(value) }, String(texts[i]))));
  node.value = state()[name] || String(options[0]);
  node.addEventListener("change", () => change({ [name]: node.value }));
  return control(label, node);
}

function slider(label, name, low, high, step) {
  const output = make("output", {}, state()[name]);
  const node = make("input", { type: "range", name, min: String(low), max: String(high), step: String(step) });
  node.value = state()[name];
  node.addEventListener("input", () => { output.textContent = node.value; });
  node.addEventListener("change", () => change({ [name]: node.value }));
  return control(label, node, output);
}

function facetOf(tab = state().tab) {
  return state().facet || (["cosegment", "parts"].includes(tab) ? about.cosegment_facet : about.facet);
}

function facetChoice() {
  const label = choice("Facet", "facet", about.facets);
  label.querySelector("select").value = facetOf();
  return label;
}

function controls() {
  const { tab } = state(), form = byId("controls");
  const photos = about.photos.map((photo) => photo.id), names = about.photos.map((photo) => photo.name);
  const focused = document.activeElement?.name;
  const all = {
    similarity: () => [facetChoice(), choice("Binning", "hierarchy", [0, 1, 2])],
    match: () => [
      choice("First", "a", photos, names), choice("Second", "b", photos, names), facetChoice(), choice("Binning", "binning", [0, 1, 2]),
      slider("Saliency above", "threshold", 0, 0.5, 0.01), slider("Pairs", "pairs", 1, 60, 1),
    ],
    cosegment: () => [facetChoice(), slider("Elbow", "elbow", 0.8, 0.999, 0.001), slider("Votes, %", "votes", 0, 100, 5), slider("Saliency above", "salient", 0, 0.5, 0.005)],
    parts: () => [facetChoice(), slider("Parts", "parts", 1, 10, 1), slider("Saliency above", "salient", 0, 0.5, 0.005)],
    pca: () => [facetChoice(), choice("Components", "joint", [1, 0], ["of all together", "of each alone"])],
    discover: () => [choice("Method", "method", about.methods)],
  };
  form.replaceChildren(...all[tab]());
  if (focused) form.elements[focused]?.focus();
}

function tabs() {
  const { tab } = state(), list = byId("tabs");
  list.replaceChildren(...Object.entries(TABS).map(([name, text]) => {
    const chosen = name === tab;
    const node = make("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-selected": String(chosen), "aria-controls": "panel", tabindex: chosen ? "0" : "-1" }, text);
    node.addEventListener("click", () => change({ tab: name }));
    return node;
  }));
  byId("panel").setAttribute("aria-labelledby", `tab-${tab}`);
}

byId("tabs").addEventListener("keydown", (event) => {
  const names = Object.keys(TABS), step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  const name = names[(names.indexOf(state().tab) + step + names.length) % names.length];
  change({ tab: name });
  byId(`tab-${name}`).focus();
});

// ---- photographs and what is drawn on them

function svg(tag, attributes) {
  const node = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
  return node;
}

function frame(photo, ...over) {
  const image = make("img", { src: `/api/photo/${photo.id}`, alt: "" });
  image.width = photo.width; image.height = photo.height; image.style.height = "auto";
  return [image, ...over];
}

function figure(photo, content, note = "") {
  return make("figure", { "data-photo": String(photo.id) }, content, make("figcaption", {}, make("span", { class: "name", title: photo.name }, photo.name), make("span", {}, note)));
}

function still(photo, overlay, note = "", marks = null) {
  const over = overlay ? [make("img", { class: "over", src: overlay, alt: "" })] : [];
  if (marks) over.push(marks);
  return figure(photo, make("div", { class: "photo", role: "img", "aria-label": `${photo.name} ${note}` }, ...frame(photo, ...over)), note);
}

const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];  // viridis, at five places

function coloured(value) {
  const at = (value / 255) * (RAMP.length - 1), i = Math.min(Math.floor(at), RAMP.length - 2), t = at - i;
  return RAMP[i].map((low, c) => Math.round(low + t * (RAMP[i + 1][c] - low)));
}
const COLOURS = Array.from({ length: 256 }, (_, value) => coloured(value));

function heat(canvas, map) {
  const [rows, columns] = map.grid, bytes = Uint8Array.from(atob(map.values), (c) => c.charCodeAt(0));
  canvas.width = columns; canvas.height = rows;
  const context = canvas.getContext("2d"), picture = context.createImageData(columns, rows);
  bytes.forEach((value, i) => { const [r, g, b] = COLOURS[value]; picture.data.set([r, g, b, 255], 4 * i); });
  context.putImageData(picture, 0, 0);
  const [left, top, width, height] = map.covers.map((share) => `${100 * share}%`);
  Object.assign(canvas.style, { left, top, width, height, inset: "auto", insetInlineStart: left, insetBlockStart: top });
}

function ring(photo, [x, y], colour, radius = 0.022) {
  const size = Math.max(photo.width, photo.height), node = svg("g", {});
  for (const [stroke, width] of [["#000", 0.009], [colour, 0.005]]) {
    node.append(svg("circle", { cx: x, cy: y, r: radius * size, fill: "none", stroke, "stroke-width": width * size }));
  }
  return node;
}

function point() {
  const { photo, x, y } = state(), shownPhoto = about.photos[Number(photo)] ?? about.photos[0];
  return { photo: shownPhoto, x: x === "" ? shownPhoto.width / 2 : Number(x), y: y === "" ? shownPhoto.height / 2 : Number(y) };
}

async function showSimilarity(signal) {
  const panel = byId("panel"), { photo, x, y } = point();
  if (panel.dataset.kind !== "similarity") {
    panel.replaceChildren(...about.photos.map((item) => {
      const button = make("button", { type: "button", class: "photo pick plain", "aria-label": `${item.name}: click a point, or move it with the arrow keys` }, ...frame(item, make("canvas", {}), svg("svg", { viewBox: `0 0 ${item.width} ${item.height}` })));
      button.addEventListener("click", (event) => {
        if (!event.detail) return;  // the keyboard's
        const box = button.getBoundingClientRect();
        change({ photo: item.id, x: Math.round((event.clientX - box.left) / box.width * item.width), y: Math.round((event.clientY - box.top) / box.height * item.height) }, { replace: true });
      });
      button.addEventListener("keydown", (event) => move(event, item));
      return figure(item, button);
    }));
    panel.dataset.kind = "similarity";
  }
  const began = performance.now();
  const query = new URLSearchParams({ photo: photo.id, x, y, facet: facetOf(), hierarchy: state().hierarchy });
  const { maps } = await ask(`/api/similarity?${query}`, { signal });
  about.photos.forEach((item, i) => {
    const place = panel.querySelector(`[data-photo="${item.id}"]`), button = place.querySelector("button");
    heat(button.querySelector("canvas"), maps[i]);
    button.classList.remove("plain");
    const own = item.id === photo.id, marks = own ? [ring(item, [x, y], "#ff4d4d")] : maps[i].mutual ? [ring(item, maps[i].best, "#fff")] : [];
    button.querySelector("svg").replaceChildren(...marks);
    place.querySelector("figcaption :last-child").textContent = own ? "the point" : `${maps[i].high.toFixed(2)}${maps[i].mutual ? ", best buddy" : ""}`;
  });
  say(`${photo.name}, ${Math.round(x)}, ${Math.round(y)}: ${maps.filter((map) => map.mutual).length - 1} best buddies, ${Math.round(performance.now() - began)} ms`);
}

function move(event, item) {
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!step && event.key !== "Enter" && event.key !== " ") return;
  event.preventDefault();
  const at = point(), here = at.photo.id === item.id ? at : { x: item.width / 2, y: item.height / 2 };
  const by = Math.max(item.width, item.height) / (event.shiftKey ? 10 : 50), [dx, dy] = step ?? [0, 0];
  const clamp = (value, high) => Math.round(Math.min(Math.max(value, 0), high - 1));
  change({ photo: item.id, x: clamp(here.x + by * dx, item.width), y: clamp(here.y + by * dy, item.height) }, { replace: true });
}

async function showMatch(signal) {
  const { a, b, threshold, pairs, binning } = state(), [first, second] = [about.photos[Number(a)], about.photos[Number(b)]];
  if (!first || !second) throw new Error("matches need two photographs: add more");
  const found = await ask(`/api/match?${new URLSearchParams({ a, b, facet: facetOf(), hierarchy: binning, threshold, pairs })}`, { signal });
  const side = (photo, points) => {
    const marks = svg("svg", { viewBox: `0 0 ${photo.width} ${photo.height}` });
    points.forEach((at, i) => {
      const size = Math.max(photo.width, photo.height), text = svg("text", { x: at[0], y: at[1] - 0.03 * size, "font-size": 0.035 * size, "text-anchor": "middle", fill: "#fff", stroke: "#000", "stroke-width": 0.004 * size, "paint-order": "stroke" });
      text.textContent = String(i + 1);
      marks.append(ring(photo, at, `hsl(${(i * 137.5) % 360} 90% 60%)`), text);
    });
    return still(photo, null, "", marks);
  };
  show("pair", make("div", { class: "pairs" }, side(first, found.a), side(second, found.b)));
  say(found.why ?? `${found.a.length} pairs, confidence ${found.confidence}`);
}

const DRAWN = {
  cosegment: async (signal) => {
    const { elbow, votes, salient } = state();
    const found = await ask(`/api/cosegment?${new URLSearchParams({ facet: facetOf(), elbow, votes, threshold: salient })}`, { signal });
    show("grid", ...about.photos.map((photo, i) => still(photo, found.overlays[i])));
    say(found.why ?? `${found.clusters} clusters`);
  },
  parts: async (signal) => {
    const { parts, salient } = state();
    const found = await ask(`/api/parts?${new URLSearchParams({ facet: facetOf(), parts, threshold: salient })}`, { signal });
    show("grid", ...about.photos.map((photo, i) => still(photo, found.overlays[i])));
    say(found.why ?? `${parts} parts, colours mean the same in all photographs`);
  },
  pca: async (signal) => {
    const found = await ask(`/api/pca?${new URLSearchParams({ facet: facetOf(), joint: state().joint })}`, { signal });
    show("grid", ...about.photos.map((photo, i) => still(photo, found.overlays[i])));
    say(`the first components hold ${found.shares.map((share) => `${Math.round(100 * share)} %`).join(", ")} of the variance`);
  },
  discover: async (signal) => {
    const found = await ask(`/api/discover?${new URLSearchParams({ method: state().method })}`, { signal });
    show("grid", ...about.photos.map((photo, i) => {
      const marks = svg("svg", { viewBox: `0 0 ${photo.width} ${photo.height}` });
      for (const [left, top, right, bottom] of found.boxes[i]) {
        marks.append(svg("rect", { x: left, y: top, width: right - left, height: bottom - top, fill: "none", stroke: "#fff", "stroke-width": 0.008 * photo.width }));
      }
      return still(photo, found.overlays[i], found.why[i] ?? `${found.boxes[i].length} found`, marks);
    }));
    say("");
  },
};

function show(kind, ...nodes) {
  const panel = byId("panel");
  panel.dataset.kind = kind;
  panel.className = kind === "pair" ? "pair" : "";
  panel.replaceChildren(...nodes);
}

// ---- the calls that make this picture

const quoted = (text) => `"${String(text).replace(/[\\"]/g, "\\$&")}"`;
const shell = (text) => (/^[\w./@:,+-]+$/.test(text) ? text : `'${String(text).replaceAll("'", "'\\''")}'`);

function calls() {
  const s = state(), facet = facetOf(), place = (id) => about.photos[Number(id)]?.place ?? about.photos[Number(id)]?.name ?? "photo.jpg";
  const every = about.photos.map((photo) => photo.place ?? photo.name), size = about.load_size === null ? "" : `, load_size=${about.load_size}`;
  const flag = about.load_size === null ? "" : ` --load-size ${about.load_size}`;
  const list = (paths) => `[${paths.map(quoted).join(", ")}]`, line = (paths) => paths.map(shell).join(" ");
  const python = (imports, body) => [`from facetrt import Engine`, ...imports, ``, `with Engine.open(${quoted(about.bundle)}) as engine:`, ...body.map((each) => `    ${each}`)].join("\n");
  const end = ` --facet ${facet} --bundle ${shell(about.bundle)}${flag} --out`;
  const { x, y } = about.photos.length ? point() : { x: 0, y: 0 }, other = place(Number(s.photo) === 0 ? 1 : 0);
  return {
    similarity: () => [
      python(["from facetrt.engine import similarity_map"], [`a, b = engine.encode(${list([place(s.photo), other])}${size})`, `found = similarity_map(a, b, facet=${quoted(facet)}, point_xy=(${x}, ${y}), hierarchy=${s.hierarchy})`]),
      `facetrt similarity ${line([place(s.photo), other])} --at ${x},${y} --hierarchy ${s.hierarchy}${end} similarity`,
    ],
    match: () => [
      python([], [`matches = engine.match(${quoted(place(s.a))}, ${quoted(place(s.b))}, facet=${quoted(facet)}, hierarchy=${s.binning}, saliency_threshold=${s.threshold}, num_pairs=${s.pairs}${size})`]),
      `facetrt match ${line([place(s.a), place(s.b)])} --hierarchy ${s.binning} --saliency-threshold ${s.threshold} --num-pairs ${s.pairs}${end} matches`,
    ],
    cosegment: () => [
      python([], [`masks = engine.cosegment(${list(every)}, facet=${quoted(facet)}, elbow=${s.elbow}, votes_percentage=${s.votes}, saliency_threshold=${s.salient}, saliency="full", refine="none"${size})`]),
      `facetrt cosegment ${line(every)} --elbow ${s.elbow} --votes-percentage ${s.votes} --saliency-threshold ${s.salient} --saliency full --refine none${end} masks`,
    ],
    parts: () => [
      python([], [`parts = engine.segment_parts(${list(every)}, facet=${quoted(facet)}, num_parts=${s.parts}, saliency_threshold=${s.salient}, saliency="full", refine="none"${size})`]),
      `facetrt parts ${line(every)} --num-parts ${s.parts} --saliency-threshold ${s.salient} --saliency full --refine none${end} parts`,
    ],
    pca: () => [
      python(["from facetrt.engine import fit_pca"], [`features = engine.encode(${list(every)}${size})`, `pca = fit_pca(features, ${quoted(facet)}, 3)`, `components = [pca.project(item) for item in features]`]),
      `facetrt pca ${line(every)} --components 3${s.joint === "1" ? "" : " --per-image"}${end} pca`,
    ],
    discover: () => [
      python([], [`objects = engine.discover(engine.encode(${list(every)}${size}), ${quoted(s.method)})`]),
      `facetrt discover ${line(every)} --method ${s.method} --bundle ${shell(about.bundle)}${flag} --out objects`,
    ],
  }[s.tab]();
}

for (const [id, which, what] of [["copy-python", 0, "Python"], ["copy-command", 1, "Command line"]]) {
  byId(id).addEventListener("click", async () => {
    byId("code").textContent = calls()[which];
    byId("code").setAttribute("aria-label", what);
    try { await navigator.clipboard.writeText(calls()[which]); say(`${what} copied`); } catch { say(`${what} is below`); }
  });
}

// ---- adding photographs: files, or a frame of a video

async function still_of(file) {
  if (!file.type.startsWith("video/")) return file;
  const video = make("video", { muted: true, src: URL.createObjectURL(file) });
  await new Promise((resolve, reject) => { video.onloadeddata = resolve; video.onerror = () => reject(new Error(`${file.name} is no video that this browser reads`)); });
  const canvas = make("canvas", {});
  canvas.width = video.videoWidth; canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

async function add(files) {
  for (const file of files) {
    say(`adding ${file.name}`);
    try {
      about = await ask(`/api/photos?name=${encodeURIComponent(file.name)}`, { method: "POST", body: await still_of(file) });
    } catch (error) { say(error.message, true); return; }
  }
  byId("panel").dataset.kind = "";
  render();
}
byId("files").addEventListener("change", (event) => add([...event.target.files]));
for (const kind of ["dragenter", "dragover"]) document.addEventListener(kind, (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
for (const kind of ["dragleave", "drop"]) document.addEventListener(kind, () => document.body.classList.remove("dropping"));
document.addEventListener("drop", (event) => { event.preventDefault(); add([...event.dataTransfer.files]); });

// ----

async function render() {
  waiting?.abort();
  waiting = new AbortController();
  const turn = ++shown, { signal } = waiting, { tab } = state();
  tabs();
  controls();
  byId("code").textContent = calls()[0];
  if (!about.photos.length) { show("grid"); say("drop photographs here, or choose some below"); return; }
  const later = setTimeout(() => say("working…"), 150);
  try {
    await ({ similarity: showSimilarity, match: showMatch, ...DRAWN }[tab])(signal);
  } catch (error) {
    if (error.name !== "AbortError" && turn === shown) { show("grid"); say(error.message, true); }
  } finally { clearTimeout(later); }
}

byId("controls").addEventListener("submit", (event) => event.preventDefault());
addEventListener("popstate", render);
addEventListener("hashchange", render);
about = await ask("/api/about");
render();
