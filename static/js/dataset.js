// A dataset's page while its file is read: the bar moves, and the page is loaded again when there is a report.
import { reload, whenLoaded } from "./reload.js";

const reading = document.getElementById("reading");
if (reading) {
  const bar = reading.querySelector("progress");
  const look = async () => {
    try {
      const answer = await fetch(`${location.pathname}/state`, { headers: { accept: "application/json" } });
      const state = await answer.json();
      if (state.status !== "reading") return reload();
      if (state.progress !== null) bar.value = state.progress;
      document.getElementById("so-far").textContent = state.so_far;
    } catch {
      // the studio is restarting; the next look will tell
    }
    setTimeout(look, 1000);
  };
  whenLoaded(() => setTimeout(look, 700));
}
