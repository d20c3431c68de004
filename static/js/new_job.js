// The forms of a new job and a new comparison work without this. It asks for the estimate as one types, keeps the address
// equal to the form, so that Back, reload and a link show the same form.
const form = document.getElementById("order");
const start = () => document.getElementById("start");
let waiting = null; // the timer of the next estimate
let folds = new Map();

function keepAddress() {
  const data = [...new FormData(form)];
  const last = new Map(data); // of a name sent twice the last counts: a checkbox overrules the hidden field before it
  for (const { name, dataset } of form.querySelectorAll("[data-default]")) if (last.get(name) === dataset.default) last.delete(name);
  const typed = data.filter(([name, value]) => value && last.has(name) && name !== "key");
  const page = document.getElementById("form").getAttribute("hx-get");
  history.replaceState(history.state, "", `${page}?${new URLSearchParams(typed)}`);
}

function renew() {
  waiting = null;
  document.getElementById("form").dispatchEvent(new Event("renew"));
}

/** What the server rendered is what is chosen: a browser keeps a choice of its own when its element gets another meaning. */
function takeChoices() {
  for (const radio of form.querySelectorAll("[type=radio]")) radio.checked = radio.defaultChecked;
  for (const option of form.querySelectorAll("option")) if (option.defaultSelected) option.selected = true;
}

/** A preset that is chosen decides again what was set by hand before. */
function takePreset() {
  for (const name of document.getElementById("presets").dataset.clears.split(" ")) {
    if (form.elements[name]) form.elements[name].value = "";
  }
}

form?.addEventListener("input", (event) => {
  if (!event.target.name) return;
  if (event.target.name === "preset") takePreset();
  keepAddress();
  const chosen = event.target.matches("select, [type=radio], [type=checkbox]");
  if (chosen) start().disabled = true; // until the settings and the estimate of this choice are there
  clearTimeout(waiting);
  waiting = setTimeout(renew, chosen ? 0 : 250);
});
form?.addEventListener("change", (event) => {
  if (event.target.type !== "radio") return;
  for (const card of form.querySelectorAll(".card")) {
    const radio = card.querySelector("[type=radio]");
    if (radio?.name === event.target.name) card.classList.toggle("on", radio.checked);
  }
});

document.addEventListener("htmx:before:swap", () => {
  folds = new Map([...document.querySelectorAll("#order details[id]")].map((details) => [details.id, details.open]));
});
document.addEventListener("htmx:after:swap", () => {
  if (!form) return; // a page that offers a first model instead
  for (const [id, open] of folds) {
    const details = document.getElementById(id);
    if (details && !details.querySelector(".wrong")) details.open = open;
  }
  if (waiting === null) takeChoices();
  else start().disabled = true;
});
document.addEventListener("htmx:error", (event) => {
  if (event.detail.error?.name !== "AbortError" && start()) start().disabled = false; // the server still refuses what was not shown
});

if (form && location.pathname !== document.getElementById("form").getAttribute("hx-get")) keepAddress(); // an answer to Start
