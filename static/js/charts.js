// Line charts over training steps, drawn by uPlot. Colours come from the stylesheet, so a chart follows the theme;
// sizes come from its place, so it follows the window. The table under each chart says the same in figures.
import uPlot from "../vendor/uplot/uPlot.esm.js";
import { bytes, localized, number } from "./format.js";
import { _ } from "./words.js";

const MAX_POINTS = 2400; // per line; beyond this every second one goes, which no screen can show

/** A value as the page writes it, by the unit of its chart. */
export function write(value, unit) {
  if (unit === "bytes") return bytes(value);
  if (unit === "tokens/s" && value != null) return _("%(number)s tokens/s", { number: number(value, 0) });
  return number(value);
}

/** Points of one line, rising in step. A step said again replaces what was said. */
export class Line {
  constructor([steps, values] = [[], []]) {
    this.steps = [...steps];
    this.values = [...values];
  }

  put(step, value) {
    while (this.steps.length && this.steps.at(-1) >= step) this.pop();
    if (!Number.isFinite(value)) return;
    this.steps.push(step);
    this.values.push(value);
    if (this.steps.length > MAX_POINTS) this.thin();
  }

  forgetAfter(step) {
    while (this.steps.length && this.steps.at(-1) > step) this.pop();
  }

  pop() {
    this.steps.pop();
    this.values.pop();
  }

  thin() {
    const keep = (_, i, all) => i % 2 === 0 || i === all.length - 1;
    this.steps = this.steps.filter(keep);
    this.values = this.values.filter(keep);
  }
}

/** The values as an exponential moving average, corrected for its start, as TensorBoard smooths. */
function smoothed(values, share) {
  if (!share) return values;
  let mean = 0;
  let weight = 0;
  return values.map((value) => {
    mean = mean * share + value * (1 - share);
    weight = weight * share + (1 - share);
    return mean / weight;
  });
}

/** All lines of a chart over one rising list of steps, with null where a line has no point: the form uPlot takes. */
function align(lines, share) {
  const steps = [...new Set(lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
  const columns = lines.map((line) => {
    const values = smoothed(line.values, share);
    const at = new Map(line.steps.map((step, i) => [step, values[i]]));
    return steps.map((step) => at.get(step) ?? null);
  });
  return [steps, ...columns];
}

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

export class Chart {
  /** `element` says which lines it shows; `lines` maps their names to Line; `total()` gives the planned steps. */
  constructor(element, lines, total) {
    this.element = element;
    this.unit = element.dataset.unit;
    this.total = total;
    this.legend = document.querySelector(`[data-legend="${element.dataset.chart}"]`);
    this.names = element.dataset.lines.trim().split(/\s+/).map((word) => word.split(":"));
    this.lines = this.names.map(([name]) => lines[name]);
    this.smoothing = 0;
    this.logarithmic = false;
    this.plot = new uPlot(this.options(), this.data(), element);
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(element);
    this.showLatest();
  }

  data() {
    return align(this.lines, this.smoothing);
  }

  /** Draw other points of the same lines. */
  show(lines) {
    this.lines = this.names.map(([name]) => lines[name] ?? new Line());
    this.draw();
  }

  /** Smooth the lines, or draw their logarithm; both are only a way of looking, so the table keeps the figures. */
  look(smoothing, logarithmic) {
    this.smoothing = smoothing;
    if (logarithmic !== this.logarithmic) {
      this.logarithmic = logarithmic;
      this.plot.destroy();
      this.plot = new uPlot(this.options(), this.data(), this.element);
    }
    this.draw();
  }

  options() {
    const axis = {
      stroke: () => color("--muted"),
      grid: { stroke: () => color("--hairline"), width: 1 },
      ticks: { show: false },
      font: "12px system-ui, sans-serif",
    };
    return {
      ...this.size(),
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false }, points: { size: 7 }, sync: { key: "steps", setSeries: false, scales: ["x", null] } },
      scales: {
        x: { time: false, range: (_, min, max) => [0, Math.max(this.total() ?? 0, max ?? 0, 1)] },
        y: { distr: this.logarithmic ? 3 : 1, range: (_, min, max) => this.range(min, max) },
      },
      axes: [
        { ...axis, grid: { show: false }, space: 60, size: 26, label: _("step"), labelSize: 18, labelGap: 0, labelFont: "12px system-ui, sans-serif", incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000, 1000000], values: (_, ticks) => ticks.map((tick) => number(tick, 0)) },
        { ...axis, size: this.unit === "" ? 46 : 62, space: 40, values: (_, ticks, _axis, _space, gap) => ticks.map((tick) => this.tick(tick, gap)) },
      ],
      series: [{}, ...this.names.map(([, hue, shape]) => this.series(hue, shape))],
      hooks: { setCursor: [(plot) => this.hover(plot)] },
    };
  }

  series(hue, shape) {
    const stroke = () => color(`--series-${hue}`);
    const points = shape === "dots" ? { show: true, size: 7, fill: stroke, stroke } : { show: (_, i) => this.lines[i - 1].steps.length === 1, size: 6, fill: stroke };
    return { stroke, width: shape === "dots" ? 2 : 1.5, spanGaps: true, points };
  }

  /** Amounts begin at zero, so that small changes look small; losses and scores take the room they need. */
  range(min, max) {
    if (min == null || max == null) return this.logarithmic ? [0.1, 1] : [0, 1];
    if (this.logarithmic) return uPlot.rangeLog(min, max, 10, false);
    if (this.unit !== "") return [0, max > 0 ? max * 1.08 : 1];
    const room = (max - min || Math.abs(max) || 1) * 0.08;
    return [min >= 0 ? Math.max(0, min - room) : min - room, max + room];
  }

  /** A figure on the axis. `gap` lies between two of them and decides how many decimals they need. */
  tick(value, gap) {
    if (this.logarithmic) return value == null ? "" : localized(String(Number(value.toPrecision(3))));
    if (this.unit === "bytes") return value === 0 ? "0" : bytes(value);
    if (this.unit === "rate") return value === 0 ? "0" : number(Number(value.toPrecision(2)));
    if (gap < 1e-4) return value === 0 ? "0" : localized(value.toExponential(1));
    return number(value, Math.max(0, Math.min(6, -Math.floor(Math.log10(gap) + 1e-9))));
  }

  size() {
    return { width: Math.max(this.element.clientWidth, 120), height: Math.max(this.element.clientHeight, 120) };
  }

  resize() {
    const { width, height } = this.size();
    if (width !== this.plot.width || height !== this.plot.height) this.plot.setSize({ width, height });
  }

  /** Draw what the lines hold now, at the next frame. */
  draw() {
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = 0;
      this.plot.setData(this.data());
      if (this.plot.cursor.idx == null) this.showLatest();
    });
  }

  redraw() {
    this.plot.redraw(false, true);
  }

  hover(plot) {
    const index = plot.cursor.idx;
    if (index == null) return this.showLatest();
    const values = this.names.map((_, i) => {
      let at = index;
      while (at >= 0 && plot.data[i + 1][at] == null) at -= 1;
      return at < 0 ? null : plot.data[i + 1][at];
    });
    this.say(values, _("step %(step)s", { step: number(plot.data[0][index], 0) }));
  }

  showLatest() {
    this.say(this.lines.map((line) => line.values.at(-1)), "");
  }

  say(values, at) {
    if (!this.legend) return;
    this.names.forEach(([name], i) => {
      const place = this.legend.querySelector(`[data-line="${name}"] output`);
      if (place) place.textContent = write(values[i], this.unit);
    });
    const place = this.legend.querySelector("[data-at]");
    if (place) place.textContent = at;
  }

  remove() {
    this.observer.disconnect();
    this.plot.destroy();
  }
}

/** Call `action` when the page changes between light and dark, by its own switch or the system's. */
export function onThemeChange(action) {
  new MutationObserver(action).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme", "class"] });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", action);
}
