"use strict";
/* What the table and the charts share: the page's data, colours and markers, the switch of looks. */
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = new DOMParser().parseFromString("<svg>", "text/html").body.firstChild.namespaceURI;
const SHAPES = [
  "M0-4.5A4.5 4.5 0 1 1 0 4.5A4.5 4.5 0 1 1 0-4.5Z",
  "M-4-4H4V4H-4Z",
  "M0-5L5 4H-5Z",
  "M0-5.5L5 0L0 5.5L-5 0Z",
  "M0 5L-5-4H5Z",
  "M-1.7-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z",
  "M-5-3L-3-5L0-2L3-5L5-3L2 0L5 3L3 5L0 2L-3 5L-5 3L-2 0Z",
  "M0-5.8L1.7-1.8L5.8-1.6L2.6 1L3.7 5L0 2.7L-3.7 5L-2.6 1L-5.8-1.6L-1.7-1.8Z",
];
const DASHES = ["", "6 4", "2 3", "7 3 2 3"];

/* One SVG element inside another. */
function draw(parent, name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

/* The colours come round after eight, with other markers and dashes then. */
function paint(element, place) {
  element.style.setProperty("--c", `var(--c${place % 8})`);
  return element;
}

function mark(parent, place, x, y, size = 1) {
  const shape = SHAPES[(place + Math.floor(place / 8)) % 8];
  const attributes = { d: shape, class: "mark", transform: `translate(${x} ${y}) scale(${size})` };
  return paint(draw(parent, "path", attributes), place);
}

function stroke(parent, place, d) {
  const dash = DASHES[Math.floor(place / 8) % 4];
  return paint(draw(parent, "path", { d, class: "line", "stroke-dasharray": dash }), place);
}

/* A bit of line with its marker, for the table and the legend. */
function swatch(parent, place) {
  const box = draw(parent, "svg", { width: 22, height: 12, "aria-hidden": "true" });
  stroke(box, place, "M0 6H22");
  mark(box, place, 11, 6, 0.9);
}

document.documentElement.classList.add("script");
{
  const root = document.documentElement, button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try { chosen = localStorage.getItem("fedlora-theme"); } catch { /* a page may not be let */ }
  const show = () => {
    const dark = chosen ? chosen === "dark" : system.matches;
    if (chosen) root.dataset.theme = chosen;
    button.setAttribute("aria-pressed", String(dark));
  };
  button.addEventListener("click", () => {
    chosen = button.getAttribute("aria-pressed") === "true" ? "light" : "dark";
    try { localStorage.setItem("fedlora-theme", chosen); } catch { /* likewise */ }
    show();
  });
  system.addEventListener("change", show);
  show();
}
