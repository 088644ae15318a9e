"use strict";
// Replaces the content of the page when the server tells of a newer one. Open tables stay open.
const source = new EventSource("events");
source.addEventListener("open", () => load().catch(() => {})); // what has changed while there was no connection
source.addEventListener("message", () => load().catch(() => {}));

async function load() {
  const response = await fetch("", { cache: "no-store" });
  if (!response.ok) return;
  const fresh = new DOMParser().parseFromString(await response.text(), "text/html").querySelector("main");
  const main = document.querySelector("main");
  if (!fresh || fresh.innerHTML === load.last) return;
  load.last = fresh.innerHTML;
  const open = [...main.querySelectorAll("details")].map((details) => details.open);
  fresh.querySelectorAll("details").forEach((details, i) => { details.open = open[i] || false; });
  main.replaceWith(fresh);
  document.dispatchEvent(new Event("replaced"));
}
