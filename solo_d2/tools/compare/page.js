"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// Checkboxes show and hide a model everywhere.
for (const box of all("[data-toggle]")) {
  const update = () => {
    for (const e of all(`[data-model="${box.dataset.toggle}"]`)) {
      e.dataset.off = box.checked ? "" : "1";
      show(e);
    }
  };
  box.addEventListener("change", update);
}

// An element is shown when its model is, it is the one chosen, and its score is high enough.
function show(e) {
  const { off, other, low } = e.dataset;
  e.toggleAttribute("hidden", Boolean(off || other || low));
}

// Selects: what has the chosen name is shown.
for (const group of all(".choices")) {
  const selects = all("select", group);
  const update = () => {
    const chosen = selects.map((s) => s.value).join("/");
    for (const e of all("[data-choice]", group)) {
      e.dataset.other = e.dataset.choice === chosen ? "" : "1";
      show(e);
    }
  };
  selects.forEach((s) => s.addEventListener("change", update));
  update();
}

// Sortable tables: first click best (or first) on top, second click reversed; missing values last.
for (const table of all("table.sortable")) {
  const body = table.tBodies[0];
  for (const button of all("th button", table)) {
    button.addEventListener("click", () => {
      const head = button.parentElement;
      const first = head.dataset.better === "max" ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === first ? other : first;
      all("th", table).forEach((h) => h.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const value = (row) => row.cells[head.cellIndex].dataset.v;
      const compare = (a, b) => (head.dataset.better || head.cellIndex ? a - b : a.localeCompare(b));
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        return x === "" || y === "" ? (x === "") - (y === "") : sign * compare(x, y);
      });
      body.append(...rows);
    });
  }
}

// The gallery's score threshold.
const slider = document.getElementById("score");
if (slider) {
  const update = () => {
    document.querySelector("output").value = Number(slider.value).toFixed(2);
    for (const e of all("[data-score]")) {
      e.dataset.low = Number(e.dataset.score) < Number(slider.value) ? "1" : "";
      show(e);
    }
  };
  slider.addEventListener("input", update);
  update(); // a browser may have kept the value of an earlier visit
}

// A panel of the gallery, larger.
const zoom = document.getElementById("zoom");
for (const button of all(".enlarge")) {
  button.addEventListener("click", () => {
    zoom.querySelector("div").replaceChildren(button.querySelector("svg").cloneNode(true));
    zoom.setAttribute("aria-label", button.getAttribute("aria-label").replace("Enlarge ", ""));
    zoom.showModal();
  });
}
zoom.addEventListener("click", (event) => event.target === zoom && zoom.close());

// Text at the pointer, or at what has the focus.
const tip = document.getElementById("tip");
function showTip(event) {
  const target = event.target.closest?.("[data-tip]");
  tip.hidden = !target;
  if (!target) return;
  (zoom.open ? zoom : document.body).append(tip);
  tip.textContent = target.dataset.tip;
  const box = target.getBoundingClientRect();
  const [x, y] = event.type === "focusin" ? [box.right, box.top] : [event.clientX, event.clientY];
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${Math.max(4, Math.min(y + 14, innerHeight - tip.offsetHeight - 8))}px`;
}
document.addEventListener("pointermove", showTip);
document.addEventListener("focusin", showTip);
document.addEventListener("focusout", () => (tip.hidden = true));
document.addEventListener("keydown", (event) => event.key === "Escape" && (tip.hidden = true));
