// The mapping of a dataset's columns: only the fields of the chosen format are asked and sent, and each column of the
// preview says what it is used as.
import { _ } from "./words.js";

const choice = document.getElementById("format");
const groups = [...document.querySelectorAll("[data-format]")];

function show() {
  const used = new Map();
  for (const group of groups) {
    group.hidden = group.disabled = group.dataset.format !== choice.value;
    if (group.hidden) continue;
    for (const select of group.querySelectorAll("select")) {
      select.required = "required" in select.dataset;
      if (select.value) used.set(select.value, [...(used.get(select.value) ?? []), select.dataset.field]);
    }
  }
  for (const mark of document.querySelectorAll("[data-column]")) {
    const fields = used.get(mark.dataset.column);
    mark.textContent = fields ? `→ ${fields.join(", ")}` : _("extra column");
    mark.classList.toggle("pill", Boolean(fields));
  }
}

choice?.closest("form").addEventListener("change", show);
if (choice) show();
