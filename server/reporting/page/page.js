"use strict";
// Optional: without scripts the charts have the titles of their parts, and tables have all values.
document.addEventListener("DOMContentLoaded", () => {
  prepare();
  window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
});
document.addEventListener("replaced", prepare);

function prepare() {
  document.querySelectorAll(".chart").forEach(addTip);
  addFilters();
}

// A tip beside the round or point under the pointer, or chosen with the arrow keys.
function addTip(chart) {
  const area = chart.querySelector(".area");
  const hits = [...chart.querySelectorAll(".hit")].map((part) => {
    const title = part.querySelector("title");
    const text = title.textContent.replace(": ", "\n").replaceAll(", ", "\n");
    title.remove(); // the browser would show it as well
    return { part, text };
  });
  if (!hits.length) return;
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  area.append(tip);
  let at = -1;
  const show = (index) => {
    hits.forEach(({ part }, i) => part.classList.toggle("on", i === index));
    at = index;
    tip.textContent = index < 0 ? "" : hits[index].text;
    if (index < 0) return;
    const mark = (hits[index].part.querySelector(".guide") || hits[index].part).getBoundingClientRect();
    const frame = area.getBoundingClientRect();
    const x = mark.left + mark.width / 2 - frame.left;
    const left = x > frame.width / 2 ? x - tip.offsetWidth - 12 : x + 12;
    tip.style.left = `${Math.max(-40, left)}px`;
  };
  hits.forEach(({ part }, i) => part.addEventListener("pointerenter", () => show(i)));
  chart.addEventListener("pointerleave", () => show(-1));
  chart.addEventListener("blur", () => show(-1));
  chart.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) {
      event.preventDefault();
      show(at < 0 ? (step > 0 ? 0 : hits.length - 1) : Math.min(hits.length - 1, Math.max(0, at + step)));
    } else if (event.key === "Escape") {
      show(-1);
    }
  });
}

// A field above long tables of sites that hides the rows of other sites.
function addFilters() {
  document.querySelectorAll("table.sites").forEach((table) => {
    const rows = [...table.tBodies[0].rows];
    if (rows.length <= 20) return;
    const label = document.createElement("label");
    const input = document.createElement("input");
    label.className = "filter";
    input.type = "search";
    label.append("Show only sites that contain", input);
    input.addEventListener("input", () => {
      const words = input.value.trim().toLowerCase();
      rows.forEach((row) => { row.hidden = !row.cells[0].textContent.toLowerCase().includes(words); });
    });
    table.parentElement.before(label);
  });
}
