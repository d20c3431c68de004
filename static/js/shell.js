// What every page has: the menu kept true, the bar while the studio is away, actions that never end on the browser's own error
// page, the theme switch, copy buttons, the list of keys, questions before a step that cannot be undone, local times.

import { _ } from "./words.js";

const csrf = () => document.querySelector('meta[name="csrf-token"]').content;

/** fetch() with the token that everything which changes something needs. */
export function send(url, options = {}) {
  return fetch(url, { ...options, headers: { "x-csrf-token": csrf(), ...options.headers } });
}

// The menu, and whether the studio is there ---------------------------------------------------------------------------

const LOOK_MS = 4000;
const HIDDEN_MS = 15_000; // a tab nobody sees still tells when a job has ended
const AWAY_MS = 2000;
const WATCHED = "luthier-watched";
const OPEN = ["queued", "running", "paused"];
const ENDED = { succeeded: _("succeeded"), failed: _("failed"), cancelled: _("cancelled") };
let timer = 0;

/** Jobs whose end this browser is to tell of: id → name. */
export function watched() {
  try {
    return JSON.parse(localStorage.getItem(WATCHED)) ?? {};
  } catch {
    return {};
  }
}

export function watchJobs(found) {
  localStorage.setItem(WATCHED, JSON.stringify(found));
}

function lost(away) {
  const bar = document.getElementById("lost");
  const text = away ? _("Connection lost, trying again…") : "";
  if (bar.textContent !== text) bar.textContent = text;
}

/** Ask how things stand, show it, and ask again later. */
async function look() {
  clearTimeout(timer);
  let pause = document.hidden ? HIDDEN_MS : LOOK_MS;
  try {
    const answer = await fetch(`/shell?watch=${Object.keys(watched()).join(",")}`, { redirect: "manual" });
    if (answer.status === 401 || answer.type === "opaqueredirect") return; // signed out: the next click says so
    if (answer.status >= 500) throw new Error(answer.statusText);
    if (answer.ok) show(await answer.json());
    lost(false);
  } catch {
    lost(true);
    pause = AWAY_MS;
  }
  timer = setTimeout(look, pause);
}

function show({ counts, foot, jobs }) {
  for (const place of document.querySelectorAll("[data-count]")) {
    const text = counts[place.dataset.count] ?? "";
    if (place.textContent !== text) place.textContent = text;
  }
  const place = document.querySelector("[data-foot]");
  if (place.innerText.trim() !== foot.join("\n")) place.replaceChildren(...foot.flatMap((line) => [line, document.createElement("br")]));
  tell(jobs);
}

/** A notification for each watched job that has ended, from whichever tab hears of it first. */
function tell(jobs) {
  const left = watched();
  for (const [id, name] of Object.entries(left)) {
    if (OPEN.includes(jobs[id]?.status)) continue;
    delete left[id];
    watchJobs(left);
    if (!jobs[id] || Notification.permission !== "granted") continue;
    const note = new Notification(`${name}: ${ENDED[jobs[id].status] ?? jobs[id].status}`, { tag: id });
    note.onclick = () => {
      window.focus();
      location.href = `/jobs/${id}`;
    };
  }
}

if (document.querySelector("[data-foot]")) {
  timer = setTimeout(look, LOOK_MS);
  document.addEventListener("visibilitychange", () => document.hidden || look());
  addEventListener("pageshow", (event) => event.persisted && look());
}

// Forms ------------------------------------------------------------------------------------------------------------------

/** What a person asks of a job, without leaving the page: what the studio answers is shown here, and so is its silence. */
async function ask(form) {
  const button = form.querySelector("button");
  button.disabled = true;
  try {
    const answer = await send(form.action, { method: "POST", body: new URLSearchParams(new FormData(form)) });
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const said = [...page.querySelectorAll(".messages > p")].map((line) => [line.className, line.textContent]);
    if (!answer.ok) said.push(["message bad", [page.querySelector("h1"), page.querySelector(".lead")].map((part) => part?.textContent ?? "").join(" ").trim()]);
    say(said);
  } catch {
    lost(true);
    say([["message bad", _("The studio could not be reached, so nothing was changed. Try again when it is back.")]]);
    button.disabled = false;
  }
  document.getElementById("live")?.dispatchEvent(new CustomEvent("luthier:changed"));
  look();
}

function say(lines) {
  document.querySelector(".messages").replaceChildren(...lines.map(([look, text]) => Object.assign(document.createElement("p"), { className: look, textContent: text })));
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
  const asks = event.submitter?.dataset.confirm ?? form.dataset.confirm;
  if (asks && !window.confirm(asks)) {
    event.preventDefault();
  } else if (form.matches("[data-ask]")) {
    event.preventDefault();
    ask(form);
  } else if (form.matches("[data-themes]")) {
    event.preventDefault();
    setTheme(event.submitter.value);
    send(form.action, { method: "POST", body: new URLSearchParams({ theme: event.submitter.value }), redirect: "manual" });
  }
});

// The list of keys -----------------------------------------------------------------------------------------------------------

const shortcuts = document.getElementById("shortcuts");
if (shortcuts) {
  const opener = document.querySelector("[data-keys]");
  opener.hidden = false;
  opener.addEventListener("click", () => shortcuts.showModal());
  document.addEventListener("keydown", (event) => {
    if (event.key !== "?" || event.target.closest("input, textarea, select, [contenteditable]")) return;
    event.preventDefault();
    if (!shortcuts.open) shortcuts.showModal();
  });
}

// Copying and times --------------------------------------------------------------------------------------------------------

/** Put text into the clipboard, also where plain http keeps the browser's own way shut. */
async function copy(element) {
  const text = element.textContent.trim();
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = Object.assign(document.createElement("textarea"), { value: text, className: "hidden" });
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  if (!done) getSelection().selectAllChildren(element); // the person's own keys copy it
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  await copy(document.getElementById(button.dataset.copy));
  const title = button.textContent;
  button.textContent = _("Copied");
  setTimeout(() => { button.textContent = title; }, 1500);
});

function prepare() {
  for (const button of document.querySelectorAll("[data-copy][hidden]")) button.hidden = false;
  for (const time of document.querySelectorAll("time[data-clock]:not([title])")) {
    time.title = time.textContent;
    time.textContent = new Date(time.dateTime).toLocaleString(document.documentElement.lang, { dateStyle: "medium", timeStyle: "short" });
  }
}

prepare();
document.querySelector(".tabs [aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" }); // tabs scroll on phones
document.addEventListener("htmx:after:swap", prepare);

document.addEventListener("htmx:config:request", (event) => {
  const { request } = event.detail.ctx;
  if (request.method !== "GET") request.headers["x-csrf-token"] = csrf();
});
