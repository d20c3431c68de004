// The loss curves of several runs, drawn over each other. While a run is open the page below its head is asked for again and
// laid over what stands, with new points.
import { Chart, Line, onThemeChange } from "./charts.js";

const live = () => document.getElementById("live");
const charts = new Map();
let points;

/** Draw the points that the page holds now: in the charts that stand, and in those whose first point has come. */
function draw() {
  points = JSON.parse(document.getElementById("points").textContent);
  for (const [element, chart] of charts) {
    if (element.isConnected) continue;
    chart.remove();
    charts.delete(element);
  }
  for (const element of document.querySelectorAll("[data-chart]")) {
    const found = Object.entries(points.charts[element.dataset.chart] ?? {});
    const lines = Object.fromEntries(found.map(([name, columns]) => [name, new Line(columns)]));
    if (charts.has(element)) charts.get(element).show(lines);
    else charts.set(element, new Chart(element, lines, () => points.total));
  }
}

/** What a person opened stays open when the page is laid over. */
let open = [];
document.addEventListener("htmx:before:swap", () => {
  open = [...live().querySelectorAll("details")].map((details) => [details.id, details.open]);
});
document.addEventListener("htmx:after:swap", () => {
  for (const [id, was] of open) document.getElementById(id)?.toggleAttribute("open", was);
  draw();
});

draw();
onThemeChange(() => charts.forEach((chart) => chart.redraw()));
