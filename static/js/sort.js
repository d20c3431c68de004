// Tables that can be sorted: a click on a column's title, again for the other direction. Cells carry their value in data-value.

function sortable(table) {
  const body = table.tBodies[0];
  for (const [place, th] of [...table.tHead.rows[0].cells].entries()) {
    if (!("sort" in th.dataset)) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "plain";
    button.append(...th.childNodes);
    th.append(button);
    button.addEventListener("click", () => {
      const down = th.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      th.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[place].dataset.value ?? row.cells[place].textContent.trim();
      const compare = (a, b) => (th.dataset.sort === "text" ? value(a).localeCompare(value(b)) : Number(value(a)) - Number(value(b)));
      body.append(...[...body.rows].sort((a, b) => (down ? compare(b, a) : compare(a, b))));
    });
  }
}

/** Every table that is not sortable yet: a part of a page may have been loaded anew. */
function all() {
  for (const table of document.querySelectorAll("table[data-sortable]:not(:has(button.plain))")) sortable(table);
}

all();
document.addEventListener("htmx:after:swap", all);
