/* The comparison table: sorting by its headings, and filters that the charts follow. */
const table = document.getElementById("comparison");
const lines = [...table.tBodies[0].rows];
for (const line of lines) swatch(line.querySelector(".swatch"), Number(line.dataset.row));

const valueOf = (line, column) => {
  const cell = line.cells[column];
  if (column === 0) return cell.textContent;
  return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
};

function sort(column, direction) {
  const sign = direction === "ascending" ? 1 : -1;
  const sorted = lines.toSorted((one, other) => {
    const [a, b] = [valueOf(one, column), valueOf(other, column)];
    if (a === null || b === null) return (a === null) - (b === null); // what is missing comes last
    if (typeof a === "string") return sign * a.localeCompare(b);
    return a === b ? 0 : sign * (a < b ? -1 : 1);
  });
  table.tBodies[0].append(...sorted);
  for (const head of table.tHead.rows[0].cells) {
    head.setAttribute("aria-sort", head.cellIndex === column ? direction : "none");
  }
}

for (const head of table.tHead.rows[0].cells) {
  const button = head.querySelector("button");
  button.addEventListener("click", () => {
    const opposite = { ascending: "descending", descending: "ascending" };
    sort(head.cellIndex, opposite[head.getAttribute("aria-sort")] || button.dataset.first);
  });
}

/* What is shown: rules by name, and rows by their place. */
const visible = { rules: new Set(data.rules), rows: new Set(data.rules.keys()) };
const form = document.querySelector(".filters");

function filter() {
  const boxes = [...form.querySelectorAll("[name=rule]")];
  if (boxes.length) visible.rules = new Set(boxes.filter((b) => b.checked).map((b) => b.value));
  const choice = form.querySelector("[name=condition]");
  visible.rows.clear();
  for (const line of lines) {
    const { rule, condition, row } = line.dataset;
    const all = !choice || choice.value === "*" || choice.value === condition;
    line.hidden = !(all && visible.rules.has(rule));
    if (!line.hidden) visible.rows.add(Number(row));
  }
  for (const one of document.querySelectorAll("details[data-rule]")) {
    one.hidden = !visible.rules.has(one.dataset.rule);
  }
  document.getElementById("count").textContent = `${visible.rows.size} of ${lines.length} rows`;
  document.dispatchEvent(new Event("filtered"));
}
if (form) {
  form.addEventListener("change", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
}
