// A dataset's page while its file is read: the bar moves, and the page is loaded again when there is a report.
// Also: one box ticks all issues.
const reading = document.getElementById("reading");
if (reading) {
  const bar = reading.querySelector("progress");
  const look = async () => {
    try {
      const answer = await fetch(`${location.pathname}/state`, { headers: { accept: "application/json" } });
      const state = await answer.json();
      if (state.status !== "reading") return location.reload();
      if (state.progress !== null) bar.value = state.progress;
      document.getElementById("so-far").textContent = state.so_far;
    } catch {
      // the studio is restarting; the next look will tell
    }
    setTimeout(look, 1000);
  };
  setTimeout(look, 700);
}

const all = document.querySelector("[data-tick-all]");
if (all) {
  const boxes = [...document.querySelectorAll(`input[type=checkbox][name="${all.dataset.tickAll}"]`)];
  const show = () => {
    const ticked = boxes.filter((box) => box.checked).length;
    all.checked = ticked === boxes.length;
    all.indeterminate = ticked > 0 && !all.checked;
  };
  all.addEventListener("change", () => boxes.forEach((box) => (box.checked = all.checked)));
  boxes.forEach((box) => box.addEventListener("change", show));
  all.closest("label").hidden = false;
  show();
}
