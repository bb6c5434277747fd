"use strict";
// Times in the reader's own zone, and what is left of a budget, counted down. Pages say both without this, too.
(() => {
  const shown = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
  const left = (seconds) => {
    const s = Math.max(0, Math.round(seconds));
    if (s < 60) return `${s} s`;
    if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
    return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  };
  const tell = () => {
    for (const at of document.querySelectorAll("time[datetime]:not([title])")) {
      at.title = at.textContent;
      at.textContent = shown.format(new Date(at.dateTime));
    }
    for (const one of document.querySelectorAll("[data-until]")) {
      const text = left((new Date(one.dataset.until) - Date.now()) / 1000);
      if (one.textContent !== text) one.textContent = text;
    }
  };
  document.addEventListener("DOMContentLoaded", tell);
  document.addEventListener("htmx:afterSettle", tell);
  setInterval(tell, 1000);
  // What is folded open stays so when the page's live part comes anew.
  let open = [];
  document.addEventListener("htmx:sseBeforeMessage", () => (open = [...document.querySelectorAll("#live details[open]")].map((d) => d.id)));
  document.addEventListener("htmx:sseMessage", () => {
    for (const id of open) document.getElementById(id)?.setAttribute("open", "");
    tell();
  });
  // Browsers open few connections to one service: a page that nobody looks at gives its one back after a while.
  let source;
  let hidden;
  document.addEventListener("htmx:sseOpen", (event) => (source = event.detail.source));
  document.addEventListener("htmx:sseClose", () => (source = undefined));
  document.addEventListener("visibilitychange", () => {
    clearTimeout(hidden);
    if (document.hidden) hidden = setTimeout(() => source?.close(), 30000);
    else if (source?.readyState === EventSource.CLOSED) location.reload();
  });
  document.addEventListener("DOMContentLoaded", () => document.getElementById("errors")?.focus());
})();
