// While a click waits for answers the page says so, and no second click starts the same again.
addEventListener("submit", (event) => {
  const form = event.target.closest("form[data-learn]");
  if (!form) return;
  form.querySelector("[data-waiting]").hidden = false;
  setTimeout(() => form.querySelectorAll("button").forEach((button) => (button.disabled = true))); // after the button's own value was taken
});
addEventListener("pageshow", (event) => event.persisted && location.reload());
