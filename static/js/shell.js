// What every page has: the theme switch, copy buttons, questions before a step that cannot be undone, local times.

const csrf = () => document.querySelector('meta[name="csrf-token"]').content;

/** fetch() with the token that everything which changes something needs. */
export function send(url, options = {}) {
  return fetch(url, { ...options, headers: { "x-csrf-token": csrf(), ...options.headers } });
}

function setTheme(value) {
  const root = document.documentElement;
  if (value) root.dataset.theme = value;
  else delete root.dataset.theme;
  document.querySelector('meta[name="color-scheme"]').content = value || "light dark";
  for (const button of document.querySelectorAll("[data-themes] button")) button.setAttribute("aria-pressed", String(button.value === value));
}

document.addEventListener("submit", (event) => {
  const form = event.target;
  if (form.dataset.confirm && !window.confirm(form.dataset.confirm)) event.preventDefault();
  if (form.matches("[data-themes]")) {
    event.preventDefault();
    setTheme(event.submitter.value);
    send(form.action, { method: "POST", body: new URLSearchParams({ theme: event.submitter.value }), redirect: "manual" });
  }
});

for (const button of document.querySelectorAll("[data-copy]")) {
  button.hidden = !navigator.clipboard;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent.trim());
    const title = button.textContent;
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = title; }, 1500);
  });
}

for (const time of document.querySelectorAll("time[data-clock]")) {
  time.title = time.textContent;
  time.textContent = new Date(time.dateTime).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

document.addEventListener("htmx:config:request", (event) => {
  const { request } = event.detail.ctx;
  if (request.method !== "GET") request.headers["x-csrf-token"] = csrf();
});
