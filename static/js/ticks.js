// One box ticks all others of a name that are in sight, those of rows that come later too.
const all = document.querySelector("[data-tick-all]");
const boxes = () => [...document.querySelectorAll(`input[type=checkbox][name="${all.dataset.tickAll}"]`)].filter((box) => box.checkVisibility());

function show() {
  const found = boxes();
  const ticked = found.filter((box) => box.checked).length;
  all.checked = ticked > 0 && ticked === found.length;
  all.indeterminate = ticked > 0 && !all.checked;
}

if (all) {
  document.addEventListener("change", (event) => {
    if (event.target === all) for (const box of boxes()) box.checked = all.checked;
    else if (event.target.name === all.dataset.tickAll) show();
  });
  document.addEventListener("htmx:after:swap", show);
  all.closest("label").hidden = false;
  show();
}
