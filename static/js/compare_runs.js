// The loss curves of several runs, drawn over each other.
import { Chart, Line, onThemeChange } from "./charts.js";

const points = JSON.parse(document.getElementById("points").textContent);
const charts = [...document.querySelectorAll("[data-chart]")].map((element) => {
  const found = Object.entries(points.charts[element.dataset.chart]);
  return new Chart(element, Object.fromEntries(found.map(([name, columns]) => [name, new Line(columns)])), () => points.total);
});
onThemeChange(() => charts.forEach((chart) => chart.redraw()));
