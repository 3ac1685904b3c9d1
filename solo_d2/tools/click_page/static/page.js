"use strict";
const $ = (id) => document.getElementById(id);
const canvas = $("canvas"), context = canvas.getContext("2d");
const LARGEST_ZOOM = 16;

// Image name -> page: its size, the list of its objects, lists to undo and redo, the list as saved.
// Lists and objects are never modified, so that a list stands for a state.
const pages = new Map();
const bitmaps = new WeakMap(); // object -> its mask within its box, a byte a pixel
const pictures = new WeakMap(); // object -> the mask as a canvas
let state, page, picture, selected = null;
let zoom = 1, crosshair = null, requests = Promise.resolve(), waiting = 0;

async function ask(path, content) {
  const headers = { "Content-Type": "application/json" };
  const response = await fetch(path, content && { method: "POST", headers, body: JSON.stringify(content) });
  const answer = await response.json().catch(() => ({ error: `error ${response.status}` }));
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

// One request after the other: each needs the objects that the one before it found.
function enqueue(work) {
  waiting++;
  canvas.setAttribute("aria-busy", "true");
  requests = requests.then(work).catch((error) => say(error.message, true)).then(() => {
    if (!--waiting) canvas.setAttribute("aria-busy", "false");
  });
  return requests;
}

// --- objects

function bitmap(object) {
  if (!bitmaps.has(object)) {
    const [left, top, width, height] = object.box, mask = new Uint8Array(width * height);
    let position = 0;
    object.counts.forEach((run, i) => { // down the columns, background first
      if (i % 2) {
        for (let p = position; p < position + run; p++) {
          mask[((p % page.height) - top) * width + Math.floor(p / page.height) - left] = 1;
        }
      }
      position += run;
    });
    bitmaps.set(object, mask);
  }
  return bitmaps.get(object);
}

function contains(object, x, y) {
  const [left, top, width, height] = object.box, column = x - left, row = y - top;
  const isInBox = column >= 0 && row >= 0 && column < width && row < height;
  return isInBox && bitmap(object)[row * width + column] === 1;
}

const color = (object) => state.colors[object.color % state.colors.length];

function maskPicture(object) {
  if (!pictures.has(object)) {
    const [, , width, height] = object.box, mask = bitmap(object);
    const image = new ImageData(width, height), pixels = new Uint32Array(image.data.buffer);
    const [red, green, blue] = color(object);
    const edge = Math.max(1, Math.round(Math.sqrt(page.width * page.height) / 500));
    const inside = (x, y) => x >= 0 && y >= 0 && x < width && y < height && mask[y * width + x];
    for (let y = 0, i = 0; y < height; y++) {
      for (let x = 0; x < width; x++, i++) {
        if (!mask[i]) continue;
        const isInterior = inside(x - edge, y) && inside(x + edge, y) && inside(x, y - edge) && inside(x, y + edge);
        pixels[i] = ((isInterior ? 102 : 255) << 24) | (blue << 16) | (green << 8) | red;
      }
    }
    const small = new OffscreenCanvas(width, height);
    small.getContext("2d").putImageData(image, 0, 0);
    pictures.set(object, small);
  }
  return pictures.get(object);
}

function change(target, objects, choice) {
  target.undo.push(target.objects);
  target.redo = [];
  target.objects = objects;
  if (target === page) show(choice);
}

function step(from, to) {
  if (!page || !page[from].length) return;
  page[to].push(page.objects);
  page.objects = page[from].pop();
  show(page.objects.at(-1) ?? null);
  say(`${page.objects.length} objects`);
}

function replace(target, object, changed) {
  change(target, target.objects.map((other) => (other === object ? changed : other)), changed);
}

function remove() {
  if (!selected) return;
  change(page, page.objects.filter((other) => other !== selected), null);
  say("Deleted");
}

function addAll(target, found) {
  const objects = found.map((object) => ({ ...object, color: target.colors++ }));
  if (objects.length) change(target, [...target.objects, ...objects], objects.at(-1));
  return objects;
}

const named = (object) => `${object.class}, ${Math.round(100 * object.score)} %, ${object.area} pixels`;

// --- what a click does

function click(x, y, tool) {
  const target = page, began = performance.now();
  const under = target.objects.find((object) => contains(object, x, y));
  if (tool === "new" && under) {
    show(under);
    return say("Selected. The object is known already.");
  }
  enqueue(async () => {
    const object = tool === "new" ? null : selected;
    if (target !== page) return;
    if (tool !== "new" && !object) return say("Select an object first: click it with the first tool.", true);
    const points = [...(object?.points ?? []), [x, y]];
    const labels = [...(object?.labels ?? []), tool === "less" ? 0 : 1];
    const base = object?.base ?? (object && !object.points ? [object.counts] : []); // a mask not from clicks
    const known = target.objects.filter((other) => other !== object).map((other) => other.counts);
    const { objects: [found] } = await ask("click", { image: target.name, points, labels, known, base });
    const seconds = `${((performance.now() - began) / 1000).toFixed(2)} s`;
    if (!found) return say(`Nothing found there (${seconds}).`);
    if (!object) {
      addAll(target, [{ ...found, points, labels }]);
    } else if (target.objects.includes(object)) {
      replace(target, object, { ...found, points, labels, base, class: object.class, color: object.color });
    }
    say(`${named(found)} (${seconds})`);
  });
}

function automatic() {
  const target = page;
  if (!target) return;
  say("Looking for objects");
  enqueue(async () => {
    const known = target.objects.map((object) => object.counts);
    const { objects } = await ask("automatic", { image: target.name, known });
    say(`${addAll(target, objects).length} more objects found`);
  });
}

const unsaved = () => [...pages.values()].filter((one) => one.objects !== one.saved);

function save() {
  enqueue(async () => {
    let number = 0;
    for (const one of unsaved()) {
      const objects = one.objects;
      const entries = objects.map(({ id, class: name, counts }) => ({ id, class: name, counts }));
      await ask("save", { image: one.name, objects: entries });
      one.saved = objects;
      state.counts[one.name] = objects.length;
      number += objects.length;
    }
    say(`Saved ${number} objects in ${state.file}`);
    show(selected);
  });
}

// --- images

function open(name) {
  if (!state.images.includes(name)) return;
  page = null;
  history.replaceState(null, "", `#${encodeURIComponent(name)}`);
  $("image").value = name;
  show(null);
  say("Preparing the image");
  enqueue(async () => {
    const image = new Image();
    image.src = `pixels?image=${encodeURIComponent(name)}`;
    const answer = await ask(`objects?image=${encodeURIComponent(name)}`);
    await image.decode();
    if ($("image").value !== name) return; // another one was opened meanwhile
    if (!pages.has(name)) {
      const objects = answer.objects.map((object, i) => ({ ...object, color: i }));
      const lists = { objects, saved: objects, undo: [], redo: [] };
      pages.set(name, { name, height: answer.height, width: answer.width, colors: objects.length, ...lists });
    }
    page = pages.get(name);
    picture = image;
    [canvas.width, canvas.height] = [page.width, page.height];
    crosshair = [page.width >> 1, page.height >> 1];
    zoom = 1;
    fit();
    show(null);
    say(page.objects.length ? `${page.objects.length} objects` : "Click on an object.");
  });
}

const neighbor = (offset) => open(state.images[state.images.indexOf($("image").value) + offset]);

function fit() {
  if (!page) return;
  const frame = $("frame"), highest = parseFloat(getComputedStyle(frame).maxHeight);
  const whole = Math.min(frame.offsetWidth / page.width, highest / page.height);
  frame.style.height = `${Math.ceil(whole * page.height)}px`;
  canvas.style.width = `${Math.floor(whole * zoom * page.width)}px`;
  draw();
}

function zoomBy(factor) {
  const frame = $("frame"), before = zoom;
  zoom = Math.min(LARGEST_ZOOM, Math.max(1, zoom * factor));
  const x = frame.scrollLeft + frame.clientWidth / 2, y = frame.scrollTop + frame.clientHeight / 2;
  fit();
  center(x * zoom / before, y * zoom / before);
}

function center(x, y) {
  const frame = $("frame");
  frame.scrollTo(x - frame.clientWidth / 2, y - frame.clientHeight / 2);
}

// --- what is shown

function draw() {
  if (!page) return context.clearRect(0, 0, canvas.width, canvas.height);
  context.drawImage(picture, 0, 0, page.width, page.height);
  const pixel = page.width / (canvas.clientWidth || page.width); // image pixels in one of the screen
  for (const object of page.objects) context.drawImage(maskPicture(object), object.box[0], object.box[1]);
  const line = (width, style, path) => {
    context.lineWidth = width * pixel;
    context.strokeStyle = style;
    context.beginPath();
    path();
    context.stroke();
  };
  const twice = (path) => { line(4, "#000", path); line(2, "#fff", path); }; // visible on anything
  if (selected) {
    const [left, top, width, height] = selected.box, space = 3 * pixel;
    context.setLineDash([6 * pixel, 4 * pixel]);
    twice(() => context.rect(left - space, top - space, width + 2 * space, height + 2 * space));
    context.setLineDash([]);
    (selected.points ?? []).forEach(([x, y], i) => {
      const size = 5 * pixel, [cx, cy] = [x + 0.5, y + 0.5];
      context.fillStyle = selected.labels[i] ? "#0a7d33" : "#c22417";
      context.beginPath();
      context.arc(cx, cy, 1.8 * size, 0, 7);
      context.fill();
      line(2, "#fff", () => {
        context.arc(cx, cy, 1.8 * size, 0, 7);
        context.moveTo(cx - size, cy);
        context.lineTo(cx + size, cy);
        if (selected.labels[i]) {
          context.moveTo(cx, cy - size);
          context.lineTo(cx, cy + size);
        }
      });
    });
  }
  if (crosshair && canvas.matches(":focus-visible")) {
    const [x, y] = crosshair.map((c) => c + 0.5), size = 14 * pixel;
    twice(() => {
      context.moveTo(x - size, y);
      context.lineTo(x + size, y);
      context.moveTo(x, y - size);
      context.lineTo(x, y + size);
    });
  }
}

function element(tag, ...content) {
  const made = document.createElement(tag);
  made.append(...content);
  return made;
}

function listObjects() {
  const list = $("objects"), focus = [...list.children].findIndex((row) => row.contains(document.activeElement));
  const rows = (page?.objects ?? []).map((object, i) => {
    const swatch = element("i");
    swatch.style.background = `rgb(${color(object)})`;
    const name = element("span", `${i + 1} ${object.class}`), size = element("small", `${object.area} px`);
    const button = element("button", swatch, name, size);
    button.setAttribute("aria-pressed", String(object === selected));
    button.addEventListener("click", () => show(object === selected ? null : object));
    return element("li", button);
  });
  list.replaceChildren(...rows);
  if (focus >= 0) (rows[Math.min(focus, rows.length - 1)]?.firstChild ?? canvas).focus();
  const row = rows[page?.objects.indexOf(selected)];
  if (row) { // scrollIntoView would also scroll the page
    const lowest = row.offsetTop + row.offsetHeight - list.clientHeight;
    list.scrollTop = Math.max(lowest, Math.min(row.offsetTop, list.scrollTop));
  }
}

function show(choice) {
  selected = choice;
  listObjects();
  $("number").textContent = page ? page.objects.length : "";
  $("class").value = selected?.class ?? "";
  $("class").disabled = $("delete").disabled = !selected;
  $("undo").disabled = !page?.undo.length;
  $("redo").disabled = !page?.redo.length;
  $("automatic").disabled = !page;
  $("save").disabled = !unsaved().length;
  $("previous").disabled = $("image").selectedIndex <= 0;
  $("next").disabled = $("image").selectedIndex === state.images.length - 1;
  for (const option of $("image").options) {
    const one = pages.get(option.value), number = one?.objects.length ?? state.counts[option.value];
    const isUnsaved = one && one.objects !== one.saved;
    option.textContent = `${option.value}${number === undefined ? "" : ` (${number})`}${isUnsaved ? " •" : ""}`;
  }
  draw();
}

// --- mouse and keyboard

const tool = (event) => {
  if (event.shiftKey || event.altKey) return "less";
  if (event.ctrlKey || event.metaKey) return "more";
  return document.querySelector("[name=tool]:checked").value;
};
const choose = (value) => { document.querySelector(`[name=tool][value=${value}]`).checked = true; };
const clamp = (value, length) => Math.min(length - 1, Math.max(0, Math.floor(value)));

canvas.addEventListener("click", (event) => {
  if (!page) return;
  const scale = page.width / canvas.clientWidth;
  crosshair = [clamp(event.offsetX * scale, page.width), clamp(event.offsetY * scale, page.height)];
  click(...crosshair, tool(event));
});
canvas.addEventListener("focus", draw);
canvas.addEventListener("blur", draw);
canvas.addEventListener("keydown", (event) => {
  const directions = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (!page) return;
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    click(...crosshair, tool(event));
  } else if (event.key in directions) {
    event.preventDefault();
    const scale = canvas.clientWidth / page.width, [dx, dy] = directions[event.key];
    const length = event.shiftKey ? 1 : Math.max(1, Math.round(12 / scale));
    crosshair = [clamp(crosshair[0] + dx * length, page.width), clamp(crosshair[1] + dy * length, page.height)];
    if (zoom > 1) center(crosshair[0] * scale, crosshair[1] * scale);
    draw();
  }
});

const undo = () => step("undo", "redo"), redo = () => step("redo", "undo");
const enlarge = () => zoomBy(1.5), reduce = () => zoomBy(1 / 1.5);
const previous = () => neighbor(-1), next = () => neighbor(1);
const keys = {
  n: () => choose("new"), m: () => choose("more"), l: () => choose("less"), escape: () => show(null),
  a: automatic, delete: remove, backspace: remove, "+": enlarge, "-": reduce, ",": previous, ".": next,
};
document.addEventListener("keydown", (event) => {
  const control = event.ctrlKey || event.metaKey, key = event.key.toLowerCase();
  if (event.altKey || (event.target.matches("select") && !control)) return;
  const action = (control ? { z: event.shiftKey ? redo : undo, y: redo, s: save } : keys)[key];
  if (!action) return;
  event.preventDefault();
  action();
});
const buttons = { undo, redo, automatic, save, previous, next, delete: remove, in: enlarge, out: reduce };
for (const [id, action] of Object.entries(buttons)) $(id).addEventListener("click", action);
$("class").addEventListener("change", () => replace(page, selected, { ...selected, class: $("class").value }));
$("image").addEventListener("change", () => open($("image").value));
window.addEventListener("resize", fit);
window.addEventListener("beforeunload", (event) => { if (unsaved().length) event.preventDefault(); });

ask("state").then((answer) => {
  state = answer;
  $("image").replaceChildren(...state.images.map((name) => new Option(name, name)));
  $("class").replaceChildren(...state.classes.map((name) => new Option(name, name)));
  let first = "";
  try { first = decodeURIComponent(location.hash.slice(1)); } catch { /* not a name */ }
  open(state.images.includes(first) ? first : state.images[0]);
}, (error) => say(error.message, true));
