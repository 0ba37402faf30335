/* The charts: lines, dots by category and stacked bars, drawn to the width that they get. */
let pinned = null; // the row that the legend brings out
const short = (value) => (value === 0 ? "0" : Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5
  ? value.toExponential(1).replace("e+", "e") : String(Number(value.toPrecision(4))));

/* Round numbers that cover a range. */
function steps(low, high, most, whole) {
  const rough = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].find((s) => s * power >= rough) * power;
  if (whole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

/* Powers of ten, and 2 and 5 of each where there are few. */
function powers(low, high) {
  const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const within = last - first <= 3 ? [1, 2, 5] : [1];
  const every = Math.ceil((last - first) / 8) || 1;
  const found = [];
  for (let p = first; p <= last; p += every) for (const s of within) found.push(s * 10 ** p);
  return found.filter((v) => v >= low && v <= high);
}

/* An axis: where a value stands between two ends in pixels, and its ticks. */
function axis(told, values, from, to, most) {
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (told.log) {
    const floored = (v) => (v <= told.exact ? told.floor : v);
    const known = values.map(floored);
    [low, high] = [Math.min(...known) / 1.5, Math.max(...known) * 1.5];
    const at = (v) => from + (to - from) * Math.log(floored(v) / low) / Math.log(high / low);
    const exact = values.some((v) => v <= told.exact) ? told.floor : null;
    const ticks = powers(low, high).filter((v) => exact === null || v > exact * 1.6);
    return { at, ticks: ticks.map((v) => [v, short(v)]), exact };
  }
  if (low === high) [low, high] = told.whole ? [low, low + 1] : [low - 0.05, high + 0.05];
  if (!told.whole && !told.ticks && !told.tight) {
    const room = 0.06 * (high - low);
    [low, high] = [low - room, high + room];
  }
  const at = (v) => from + (to - from) * (v - low) / (high - low);
  const ticks = told.ticks || steps(low, high, most, told.whole).map((v) => [v, short(v)]);
  return { at, ticks, exact: null };
}

const shown = (line) => (line.row === null ? visible.rules.has(line.rule) : visible.rows.has(line.row));

function across(svg, x, bottom, label, middle, top) {
  for (const [value, text] of x.ticks) {
    if (top !== undefined) draw(svg, "path", { d: `M${x.at(value)} ${top}V${bottom}`, class: "rule" });
    if (x.exact != null && x.at(value) - x.at(x.exact) < 40) continue; // its place is taken
    draw(svg, "text", { x: x.at(value), y: bottom + 18, "text-anchor": "middle" }, text);
  }
  if (x.exact != null) {
    if (top !== undefined) draw(svg, "path", { d: `M${x.at(x.exact)} ${top}V${bottom}`, class: "rule exact" });
    draw(svg, "text", { x: x.at(x.exact), y: bottom + 18, "text-anchor": "middle" }, "exact");
  }
  draw(svg, "text", { x: middle, y: bottom + 38, "text-anchor": "middle" }, label);
}

function upward(svg, y, left, right, label, middle) {
  for (const [value, text] of y.ticks) {
    draw(svg, "path", { d: `M${left} ${y.at(value)}H${right}`, class: "rule" });
    draw(svg, "text", { x: left - 8, y: y.at(value) + 4, "text-anchor": "end" }, text);
  }
  if (y.exact !== null) {
    draw(svg, "path", { d: `M${left} ${y.at(y.exact)}H${right}`, class: "rule exact" });
    draw(svg, "text", { x: left - 8, y: y.at(y.exact) + 4, "text-anchor": "end" }, "exact");
  }
  const turned = `translate(13 ${middle}) rotate(-90)`;
  draw(svg, "text", { transform: turned, "text-anchor": "middle" }, label);
}

const range = (p) => (p[2] < p[3] ? ` (${short(p[2])} to ${short(p[3])})` : "");

/* Each kind draws into an svg of a width, and gives its height and the marks that can be read. */
const KINDS = {
  lines(svg, chart, width) {
    const height = 310, left = 62, right = width - 14, top = 12, bottom = height - 48;
    const points = chart.lines.flatMap((line) => line.points);
    const ends = chart.y.log ? points.map((p) => p[1]) : points.flatMap((p) => p.slice(1));
    const x = axis({ tight: true, ...chart.x }, points.map((p) => p[0]), left + 8, right, width / 90);
    const y = axis(chart.y, ends, bottom, top, 6);
    upward(svg, y, left, right, chart.y.label, (top + bottom) / 2);
    across(svg, x, bottom, chart.x.label, (left + right) / 2);
    const marks = [], chosen = chart.lines.filter(shown);
    svg.classList.toggle("crowded", chosen.length > 5); // bands then show of what is brought out
    for (const line of chosen) {
      const one = draw(svg, "g", { class: "one", "data-place": line.place });
      const at = line.points.map((p) => [x.at(p[0]), y.at(p[1]), y.at(p[2]), y.at(p[3])]);
      if (!chart.y.log && line.points.some((p) => p[2] < p[3])) {
        const edge = [...at.map((p) => [p[0], p[3]]), ...at.map((p) => [p[0], p[2]]).reverse()];
        paint(draw(one, "path", { d: `M${edge.join("L")}Z`, class: "band" }), line.place);
      }
      stroke(one, line.place, `M${at.map((p) => p.slice(0, 2)).join("L")}`);
      const every = Math.ceil(at.length / 24);
      at.forEach((p, i) => {
        if (i % every === 0 || i === at.length - 1) mark(one, line.place, p[0], p[1]);
        const [value, tick] = [line.points[i], (chart.x.ticks || []).find((t) => t[0] === line.points[i][0])];
        const words = `${chart.x.ticks ? "epsilon" : chart.x.label} ${tick ? tick[1] : short(value[0])}`;
        marks.push({ x: p[0], y: p[1], line, text: `${line.name}\n${words}: ${short(value[1])}${range(value)}` });
      });
    }
    return { height, marks };
  },
  dots(svg, chart, width) {
    const chosen = chart.lines.filter(shown);
    const band = Math.max(34, Math.min(10 * chosen.length + 14, 150)), top = 8;
    const longest = Math.max(...chart.categories.map((name) => name.length));
    const left = Math.min(7 * longest + 22, width * 0.38), right = width - 14;
    const bottom = top + band * chart.categories.length, height = bottom + 48;
    const ends = chart.lines.flatMap((line) => line.points.flatMap((p) => p.slice(1)));
    const x = axis(chart.x, ends, left + 6, right, width / 90);
    across(svg, x, bottom, chart.x.label, (left + right) / 2, top);
    chart.categories.forEach((name, i) => {
      draw(svg, "path", { d: `M0 ${top + band * (i + 1)}H${right}`, class: "rule" });
      const most = Math.floor((left - 10) / 7);
      const text = name.length > most ? `${name.slice(0, most - 1)}…` : name;
      draw(svg, "text", { x: 0, y: top + band * (i + 0.5) + 4 }, text);
    });
    const marks = [];
    chosen.forEach((line, k) => {
      const one = draw(svg, "g", { class: "one", "data-place": line.place });
      for (const p of line.points) {
        const y = top + band * p[0] + 8 + (band - 16) * (k + 0.5) / chosen.length;
        if (p[2] < p[3]) {
          const whisker = { d: `M${x.at(p[2])} ${y}H${x.at(p[3])}`, class: "whisker" };
          paint(draw(one, "path", whisker), line.place);
        }
        mark(one, line.place, x.at(p[1]), y);
        marks.push({ x: x.at(p[1]), y, line,
          text: `${line.name}\n${chart.categories[p[0]]}: ${short(p[1])}${range(p)}` });
      }
    });
    return { height, marks };
  },
  bars(svg, chart, width) {
    const height = 290, left = 62, right = width - 6, top = 12, bottom = height - 48;
    const sums = chart.bars.map((bar) => bar.reduce((a, b) => a + b, 0));
    const y = axis({ tight: true }, [0, ...sums], bottom, top, 6);
    const pitch = (right - left) / chart.bars.length, gap = Math.min(pitch * 0.2, 14);
    const every = Math.ceil(chart.bars.length / (width / 40));
    const ticks = chart.bars.map((_, i) => [i, String(i)]).filter(([i]) => i % every === 0);
    upward(svg, y, left, right, chart.y.label, (top + bottom) / 2);
    across(svg, { at: (i) => left + pitch * (i + 0.5), ticks }, bottom, chart.x.label, (left + right) / 2);
    const pattern = draw(draw(svg, "defs"), "pattern",
      { id: "hatch", width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" });
    draw(pattern, "path", { d: "M0 0V5", class: "rule" });
    const marks = [];
    chart.bars.forEach((bar, i) => {
      let below = 0;
      bar.forEach((count, part) => {
        if (!count) return;
        const box = { x: left + pitch * i + gap / 2, width: Math.max(pitch - gap, 0.5),
          y: y.at(below + count), height: y.at(below) - y.at(below + count) };
        const one = paint(draw(svg, "rect", { ...box, class: "bar" }), part);
        if (pitch - gap < 6) one.setAttribute("stroke-width", 0);
        if (part >= 8) draw(svg, "rect", { ...box, class: "hatch" });
        below += count;
        marks.push({ x: box.x + box.width / 2, y: box.y + box.height / 2, line: null,
          text: `client ${i}, ${sums[i]} examples\n${chart.parts[part]}: ${count}` });
      });
    });
    return { height, marks };
  },
};

/* Bring one row out in all charts; null shows all alike. */
function bringOut(place) {
  for (const svg of document.querySelectorAll(".chart > svg")) {
    const own = [...svg.querySelectorAll(".one")];
    const there = own.some((one) => Number(one.dataset.place) === place);
    svg.classList.toggle("away", place !== null && there && svg.dataset.rows === "true");
    for (const one of own) one.classList.toggle("on", Number(one.dataset.place) === place);
  }
}

/* Pointing and arrow keys: the nearest mark, told in a box beside it and to screen readers. */
function readable(figure, svg, marks) {
  const tip = figure.querySelector(".tip") || document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  svg.parentElement.append(tip);
  let at = -1, ring = null;
  const hide = () => { tip.hidden = true; ring?.remove(); ring = null; bringOut(pinned); };
  const show = (i, aloud) => {
    if (i < 0) return hide();
    at = i;
    const found = marks[i];
    ring?.remove();
    ring = draw(svg, "circle", { cx: found.x, cy: found.y, r: 8, class: "shown" });
    tip.textContent = found.text;
    tip.hidden = false;
    const width = svg.clientWidth, beside = found.x + 14 + tip.offsetWidth > width;
    tip.style.left = `${Math.max(0, beside ? found.x - 14 - tip.offsetWidth : found.x + 14)}px`;
    tip.style.top = `${Math.max(0, svg.offsetTop + found.y - tip.offsetHeight - 6)}px`;
    bringOut(found.line && found.line.row !== null ? found.line.row : pinned);
    if (aloud) document.getElementById("said").textContent = found.text;
  };
  const nearest = (event) => {
    const box = svg.getBoundingClientRect();
    let best = -1, least = 60 ** 2;
    marks.forEach((m, i) => {
      const away = (m.x - event.clientX + box.left) ** 2 + (m.y - event.clientY + box.top) ** 2;
      if (away < least) [best, least] = [i, away];
    });
    return best;
  };
  const lineEnds = (forward) => {
    const others = marks.map((m, i) => [m, i]).filter(([m]) => m.line !== marks[at].line);
    const order = [...new Set(marks.map((m) => m.line))];
    const next = order[(order.indexOf(marks[at].line) + (forward ? 1 : order.length - 1)) % order.length];
    const near = (m) => Math.hypot(m.x - marks[at].x, (m.y - marks[at].y) / 8);
    const inNext = others.filter(([m]) => m.line === next).sort(([a], [b]) => near(a) - near(b));
    return inNext.length ? inNext[0][1] : (at + (forward ? 1 : marks.length - 1)) % marks.length;
  };
  svg.onpointermove = (event) => show(nearest(event), false);
  svg.onpointerdown = (event) => show(nearest(event), false);
  svg.onpointerleave = (event) => { // a finger leaves when it lifts; what it showed stays
    if (event.pointerType !== "mouse" || document.activeElement === svg) return;
    hide();
    at = -1;
  };
  svg.onfocus = () => { if (svg.matches(":focus-visible") && marks.length) show(Math.max(at, 0), true); };
  svg.onblur = hide;
  svg.onkeydown = (event) => {
    if (event.key === "Escape") return hide();
    if (!marks.length) return;
    const moves = {
      ArrowRight: () => (at + 1) % marks.length, ArrowLeft: () => (at - 1 + marks.length) % marks.length,
      ArrowUp: () => lineEnds(false), ArrowDown: () => lineEnds(true),
      Home: () => 0, End: () => marks.length - 1,
    };
    if (!moves[event.key]) return;
    event.preventDefault();
    show(at < 0 ? 0 : moves[event.key](), true);
  };
}

function render(figure) {
  const chart = data.charts.find((one) => one.id === figure.dataset.chart);
  const holder = figure.querySelector(".chart");
  const width = Math.floor(holder.clientWidth);
  if (!width) return;
  let svg = holder.querySelector("svg");
  if (!svg) {
    svg = draw(holder, "svg", { tabindex: 0, role: "group", "aria-roledescription": "chart" });
    svg.setAttribute("aria-label", `${chart.title}. Arrow keys read its numbers.`);
    svg.dataset.rows = String((chart.lines || []).every((line) => line.row !== null));
  }
  svg.replaceChildren();
  const { height, marks } = KINDS[chart.kind](svg, chart, width);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  readable(figure, svg, marks);
  key(holder, chart);
  bringOut(pinned);
}

/* The names of what is no row: the parts of bars, the lines of a chart with lines of its own. */
function key(holder, chart) {
  const own = chart.parts ? chart.parts.map((name, place) => ({ name, place }))
    : chart.lines.filter((line) => line.row === null && shown(line));
  holder.querySelector(".key")?.remove();
  if (!own.length) return;
  const list = document.createElement("ul");
  list.className = "key";
  for (const { name, place } of own) {
    const item = document.createElement("li");
    const svg = draw(item, "svg", { width: 12, height: 12, "aria-hidden": "true" });
    if (!chart.parts) mark(svg, place, 6, 6);
    else {
      paint(draw(svg, "rect", { width: 12, height: 12, class: "bar" }), place);
      if (place >= 8) draw(svg, "rect", { width: 12, height: 12, class: "hatch" });
    }
    item.append(name);
    list.append(item);
  }
  holder.append(list);
}

function legend() {
  const bar = document.getElementById("legend");
  bar.classList.toggle("many", data.rows.length > 8);
  bar.replaceChildren();
  if (!visible.rows.has(pinned)) pinned = null;
  for (const place of visible.rows) {
    const button = document.createElement("button"), name = document.createElement("span");
    const holder = document.createElement("span");
    holder.className = "swatch";
    name.className = "name";
    swatch(holder, place);
    name.textContent = button.title = data.names[place];
    button.type = "button";
    button.setAttribute("aria-pressed", String(pinned === place));
    button.append(holder, name);
    button.onclick = () => {
      pinned = pinned === place ? null : place;
      for (const other of bar.children) other.setAttribute("aria-pressed", String(other === button && pinned !== null));
      bringOut(pinned);
    };
    button.onpointerenter = () => bringOut(place);
    button.onpointerleave = () => bringOut(pinned);
    bar.append(button);
  }
}

const figures = [...document.querySelectorAll("figure[data-chart]")];
const renderAll = () => { legend(); figures.forEach(render); };
const watch = new ResizeObserver((entries) => entries.forEach((entry) => {
  const figure = entry.target.closest("figure"), width = String(Math.floor(entry.contentRect.width));
  if (figure.dataset.width !== width) { figure.dataset.width = width; render(figure); }
}));
document.addEventListener("filtered", renderAll);
if (form) filter(); else renderAll();
figures.forEach((figure) => watch.observe(figure.querySelector(".chart")));
