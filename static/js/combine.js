// The form that combines datasets: only what the chosen operation uses is shown. Without this module all of it is.
const form = document.getElementById("combine");

function show() {
  const chosen = form.elements.operation.value;
  for (const part of form.querySelectorAll("[data-for]")) part.hidden = !part.dataset.for.split(" ").includes(chosen);
}

if (form) {
  form.addEventListener("change", show);
  show();
}
