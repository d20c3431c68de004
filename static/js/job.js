// The life of a job's page. Events come over one stream: their points go into the charts at once, and the rest of the
// page is asked for again (at most once a second) and laid over what stands. A reload shows the same.
import { Chart, Line, onThemeChange } from "./charts.js";
import { watched, watchJobs } from "./shell.js";
import { _ } from "./words.js";

const PER_STEP = ["learning_rate", "grad_norm", "tokens_per_second", "memory_bytes"];

const live = () => document.getElementById("live");
const told = document.getElementById("points"); // on tabs with charts
const points = told ? JSON.parse(told.textContent) : { total: null, last_event_id: Number(live().dataset.last), charts: {} };
let total = points.total;
let last = points.last_event_id;
const lines = {};
for (const [chart, found] of Object.entries(points.charts)) {
  lines[chart] = Object.fromEntries(Object.entries(found).map(([name, columns]) => [name, new Line(columns)]));
}
const charts = new Map();

function line(chart, name) {
  lines[chart] ??= {};
  return (lines[chart][name] ??= new Line());
}

/** Make a chart for every place that has none yet, and drop those whose place has gone. */
function place() {
  for (const [element, chart] of charts) {
    if (!element.isConnected) {
      chart.remove();
      charts.delete(element);
    }
  }
  for (const element of document.querySelectorAll("[data-chart]")) {
    if (charts.has(element)) continue;
    const name = element.dataset.chart;
    for (const word of element.dataset.lines.trim().split(/\s+/)) line(name, word.split(":")[0]);
    charts.set(element, new Chart(element, lines[name], () => total));
  }
  for (const controls of document.querySelectorAll("[data-controls][hidden]")) {
    controls.hidden = ![...charts.keys()].some((element) => element.dataset.chart === controls.dataset.controls);
  }
}

const take = {
  started(event) {
    total = event.total_steps;
    for (const chart of Object.values(lines)) for (const each of Object.values(chart)) each.forgetAfter(event.resumed_from ?? 0);
  },
  step(event) {
    line("loss", "loss").put(event.step, event.loss);
    for (const name of PER_STEP) line(name, name).put(event.step, event[name]);
    for (const [name, value] of Object.entries(event.metrics ?? {})) line(name, "training").put(event.step, value);
  },
  evaluated(event) {
    line("loss", "validation").put(event.step, event.loss);
    for (const [name, value] of Object.entries(event.metrics ?? {})) line(name, name).put(event.step, value);
  },
};

function receive(event) {
  if (event.id <= last) return; // said before a reconnect
  last = event.id;
  if (take[event.type]) {
    take[event.type](event);
    for (const chart of charts.values()) chart.draw();
  }
  refresh();
}

function refresh() {
  live().dispatchEvent(new CustomEvent("luthier:changed"));
}

let source = null;
let retry = 0;

function follow() {
  if (source || live().dataset.live !== "true") return;
  source = new EventSource(`${live().dataset.stream}?after=${last}`);
  source.onmessage = (message) => receive(JSON.parse(message.data));
  source.onopen = () => {
    retry = 0;
  };
  source.onerror = () => {
    if (source.readyState !== EventSource.CLOSED) return; // the browser tries again by itself
    close();
    retry = Math.min(retry + 1, 6);
    setTimeout(follow, 1000 * retry);
  };
}

function close() {
  source?.close();
  source = null;
}

/** Times of day as the reader's clock has them; the server writes UTC. */
function localTimes() {
  for (const time of document.querySelectorAll("time[data-hour]")) {
    const precise = time.dataset.hour === "second" ? { second: "2-digit" } : {};
    const text = new Date(time.dateTime).toLocaleTimeString(document.documentElement.lang, { hour: "2-digit", minute: "2-digit", ...precise, hourCycle: "h23" });
    if (time.textContent !== text) time.textContent = text;
  }
}

/** What a person opened stays open when the page is laid over, and a finished job is followed no longer. */
let open = [];
document.addEventListener("htmx:before:swap", () => {
  open = [...live().querySelectorAll("details")].map((details) => [details.id, details.open]);
});
document.addEventListener("htmx:after:swap", () => {
  for (const [id, was] of open) document.getElementById(id)?.toggleAttribute("open", was);
  place();
  localTimes();
  tellEnd();
  if (live().dataset.live === "true") follow();
  else close();
});

/** Smoothing and scale of a chart are this reader's way of looking. */
document.addEventListener("input", (event) => {
  const controls = event.target.closest("[data-controls]");
  if (!controls) return;
  const chart = [...charts].find(([element]) => element.dataset.chart === controls.dataset.controls)?.[1];
  chart?.look(Number(controls.querySelector("[data-smooth]").value), controls.querySelector("[data-log]").checked);
});

/** Another prompt or level is shown as soon as it is chosen. */
document.addEventListener("change", (event) => {
  if (event.target.matches("form[data-now] select")) event.target.form.requestSubmit();
});

/** How far the job is, in the title and the icon of the browser's tab. */
function tellEnd() {
  document.title = `${live().dataset.title} · Luthier`;
  const icon = document.querySelector('link[rel="icon"]');
  if (icon.getAttribute("href") !== live().dataset.icon) icon.href = live().dataset.icon;
}

/** Only a person's own click asks the browser for the right to notify. */
const notify = document.getElementById("notify");
if (notify && "Notification" in window && Notification.permission !== "denied") {
  const id = live().dataset.id;
  const waiting = () => id in watched() && Notification.permission === "granted";
  const label = () => { notify.textContent = waiting() ? _("Will notify") : _("Notify me"); notify.setAttribute("aria-pressed", String(waiting())); };
  notify.hidden = false;
  label();
  notify.addEventListener("click", async () => {
    const found = watched();
    if (waiting()) delete found[id];
    else if ((await Notification.requestPermission()) === "granted") found[id] = document.querySelector("h1").textContent;
    watchJobs(found);
    label();
  });
}

place();
localTimes();
follow();
setInterval(() => source && refresh(), 30_000); // a start that says nothing, and how long ago things were
onThemeChange(() => charts.forEach((chart) => chart.redraw()));
addEventListener("pagehide", close);
addEventListener("pageshow", (event) => {
  if (!event.persisted) return;
  refresh(); // back from the browser's memory: time has passed
  follow();
});
