// The form of a new job works without this. It keeps opened folds open while parts of the form are renewed, marks the
// chosen card at once, and copies the order as text.
let open = [];

document.addEventListener("htmx:before:swap", () => {
  open = [...document.querySelectorAll("#order details[open]")].map((details) => details.id);
});
document.addEventListener("htmx:after:swap", () => {
  for (const id of open) document.getElementById(id)?.setAttribute("open", "");
});

document.addEventListener("change", (event) => {
  if (event.target.name !== "strategy") return;
  for (const card of document.querySelectorAll(".card")) card.classList.toggle("on", card.contains(event.target));
});

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy-text]");
  if (!button) return;
  await navigator.clipboard.writeText(document.getElementById(button.dataset.copyText).textContent);
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
});
