charts.show(document.getElementById("curves"), false);

for (const button of document.querySelectorAll("button.run")) {
  button.querySelector(".swatch").style.background = charts.color(+button.dataset.color);
  button.addEventListener("click", () => charts.toggle(button.dataset.hides));
}

/** The table is sorted by the column whose head is clicked; a second click turns it around, what is missing comes last. */
const table = document.getElementById("runs");
for (const button of table.querySelectorAll("button[data-sort]")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, down = head.getAttribute("aria-sort") === "ascending";
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const cell = (row) => row.cells[+button.dataset.sort];
    const order = (a, b) => {
      const [one, two] = [cell(a), cell(b)], [m, n] = [one.dataset.number, two.dataset.number];
      if ((m === undefined) !== (n === undefined)) return m === undefined ? 1 : -1;
      const difference = m === undefined ? one.textContent.localeCompare(two.textContent) : m - n;
      return down ? -difference : difference;
    };
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort(order));
  });
}
