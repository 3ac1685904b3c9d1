"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// Charts follow the page's colors.
const dark = matchMedia("(prefers-color-scheme: dark)").matches;
const [ink, grid] = dark ? ["#c8cdd2", "#3a424a"] : ["#3a424a", "#e2e6ea"];
const axis = { labelColor: ink, titleColor: ink, gridColor: grid, domainColor: grid, tickColor: grid, labelFontSize: 12, titleFontSize: 12 };
const config = {
  background: "transparent", view: { stroke: grid }, axis, text: { color: ink },
  legend: { labelFontSize: 12, labelColor: ink, titleColor: ink },
};
const views = [];
for (const element of all("[data-chart]")) {
  vegaEmbed(element, charts[element.dataset.chart], { actions: false, config, ast: false })
    .then((result) => { views.push(result.view); })
    .catch((error) => { element.textContent = `chart not drawn: ${error}`; });
}

// Checkboxes show and hide a model everywhere.
for (const box of all("[data-toggle]")) {
  box.addEventListener("change", () => {
    const shown = all("[data-toggle]").map((x) => x.checked);
    for (const e of all("[data-model]")) e.toggleAttribute("hidden", !shown[e.dataset.model]);
    for (const view of views) view.signal("shown", names.filter((_, i) => shown[i])).runAsync();
  });
}

// Sortable tables: the first click puts the best (or first) on top; missing values come last.
for (const table of all("table.sortable")) {
  for (const button of all("th button", table)) {
    button.addEventListener("click", () => {
      const head = button.parentElement, { better } = head.dataset;
      const first = better === "max" ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === first ? other : first;
      all("th", table).forEach((h) => h.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const value = (row) => row.cells[head.cellIndex].dataset.v;
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        return sign * (better ? x - y : x.localeCompare(y));
      });
      table.tBodies[0].append(...rows);
    });
  }
}

// A panel of the gallery, larger.
const zoom = document.getElementById("zoom");
for (const button of all(".enlarge")) {
  button.addEventListener("click", () => {
    const { src, alt } = button.querySelector("img");
    Object.assign(zoom.querySelector("img"), { src, alt });
    zoom.showModal();
  });
}
zoom.addEventListener("click", (event) => event.target === zoom && zoom.close());
