// The curves of one job: each figure in a chart of its own, all over the same stretch of the run.

import { Watched, call } from "../api.js";
import { AXES, axisOf, stepsPerEpoch } from "../axis.js";
import { Chart } from "../chart.js";
import { h, replace } from "../dom.js";
import { FIGURES, figureOf } from "../figures.js";
import { grouped, measure } from "../format.js";
import { poll } from "../poll.js";
import { bandOf, departure, publishedAccuracy } from "../reference.js";
import { curveOf, smooth, summary, withGaps } from "../series.js";
import { TERMINAL } from "../status.js";
import { ReferenceChoice } from "./references.js";

const POLL_SECONDS = 2;
const MAX_POINTS = 1200;
const MARKED = { workers_started: "--accent", went_back: "--bad", steps_dropped: "--bad", workers_failed: "--bad", run_stopped: "--warn" };

export class Curves {
  constructor(context, signal) {
    this.context = context;
    this.signal = signal;
    this.charts = new Map();
    this.axisName = "step";
    this.zoom = null; // steps
    this.isLog = false;
    this.watched = new Watched();
    this.grid = h("div", { class: "charts" });
    this.from = this.stepInput("From step");
    this.to = this.stepInput("To step");
    this.whole = h("button", { class: "button slim", type: "button", hidden: true, on: { click: () => this.zoomTo(null) } }, "Whole run");
    this.axisChoice = h(
      "select",
      { class: "input slim", "aria-label": "Curves over", on: { change: () => ((this.axisName = this.axisChoice.value), this.draw()) } },
      AXES.map(([name, text]) => h("option", { value: name }, text)),
    );
    this.log = h(
      "button",
      { class: "button slim", type: "button", "aria-pressed": "false", on: { click: () => this.toggleLog() } },
      "Log scale",
    );
    this.reference = new ReferenceChoice(context, signal, () => this.draw());
    this.element = h(
      "section",
      { "aria-label": "Curves" },
      h(
        "div",
        { class: "curve-tools" },
        this.axisChoice,
        this.log,
        this.reference.element,
        h("span", { class: "steps" }, h("span", { class: "muted small" }, "Steps"), this.from, "–", this.to, this.whole),
      ),
      this.grid,
    );
    this.poller = poll(() => this.refresh(), { seconds: POLL_SECONDS, signal });
  }

  stepInput(label) {
    return h("input", {
      class: "input slim",
      inputmode: "numeric",
      "aria-label": label,
      on: { change: () => this.zoomTo([Number(this.from.value) || 0, Number(this.to.value) || Infinity]) },
    });
  }

  toggleLog() {
    this.isLog = !this.isLog;
    this.log.setAttribute("aria-pressed", String(this.isLog));
    this.draw();
  }

  /** Asks the service for this stretch with as many points as the whole had: what happened inside shows. */
  zoomTo(range) {
    const [from, to] = (range ?? []).map((step) => (Number.isFinite(step) ? Math.max(0, Math.round(step)) : step));
    this.zoom = range && to > from ? [from, Number.isFinite(to) ? to : this.lastStep()] : null;
    this.poller.soon();
  }

  lastStep() {
    return Math.max(1, ...Object.values(this.series ?? {}).map(({ steps }) => steps.at(-1) ?? 0));
  }

  async refresh() {
    if (TERMINAL.has(this.context.job.status) && this.series && this.seen === JSON.stringify([this.zoom, this.context.job.version])) return;
    const seen = JSON.stringify([this.zoom, this.context.job.version]);
    const stretch = this.zoom ? { from_step: this.zoom[0], to_step: this.zoom[1] } : {};
    const { data, isNew } = await this.watched.get(`/jobs/${this.context.id}/metrics`, {
      query: { max_points: MAX_POINTS, ...stretch },
      signal: this.signal,
    });
    if (!this.zoom && isNew) this.speed = data.series.images_per_second;
    if (this.zoom && !this.speed)
      this.speed = (
        await call(`/jobs/${this.context.id}/metrics`, { query: { names: "images_per_second" }, signal: this.signal })
      ).series.images_per_second;
    this.series = data.series;
    this.seen = seen;
    if (isNew) this.draw();
  }

  /** Called, too, when the job or its events are others. */
  draw() {
    if (!this.series) return;
    const axis = axisOf(this.axisName, this.context.job, this.speed);
    for (const option of this.axisChoice.options)
      option.disabled = option.value !== "step" && axisOf(option.value, this.context.job, this.speed).name === "step";
    const names = Object.keys(this.series);
    const groups = FIGURES.map(([title, fits, ...rest]) => [title, names.filter(fits), ...rest]).filter(([, found]) => found.length);
    const others = names.filter((name) => !FIGURES.some(([, fits]) => fits(name)));
    groups.push(...others.map((name) => [name, [name], measure, true]));
    const shown = groups.map((group) => this.drawChart(axis, ...group));
    if (shown.length === 0)
      replace(this.grid, h("p", { class: "empty card" }, h("strong", {}, "No figures yet"), "Curves appear with the first steps."));
    else if (this.grid.children.length !== shown.length || shown.some((chart, place) => this.grid.children[place] !== chart.element))
      replace(
        this.grid,
        shown.map((chart) => chart.element),
      );
    for (const chart of shown) chart.resize();
    this.tellZoom();
  }

  tellZoom() {
    this.whole.hidden = this.zoom === null;
    if (document.activeElement !== this.from) this.from.value = this.zoom ? this.zoom[0] : 0;
    if (document.activeElement !== this.to) this.to.value = this.zoom ? this.zoom[1] : this.lastStep();
  }

  drawChart(axis, title, names, format, mayBeLog) {
    if (!this.charts.has(title)) {
      const zoomed = (range) => this.zoomTo(range && range.map((x) => this.axis.toStep(x)));
      this.charts.set(title, new Chart({ title, format, zoomed, signal: this.signal }));
    }
    this.axis = axis;
    const chart = this.charts.get(title);
    const curves = names.map((name) => curveOf(this.series[name], axis.toX));
    const lines = names.flatMap((name, place) => this.lines(name, curves[place], place));
    const extra = title === "Loss" ? this.referenceLines(curves[0], axis) : title === "Accuracy" ? this.publishedLines(curves[0]) : {};
    const odd = curves.flatMap((curve) => curve.odd);
    const range = this.zoom ? this.zoom.map(axis.toX) : [axis.toX(0), axis.toX(this.lastStep())];
    chart.show({
      lines: [...lines, ...(extra.lines ?? [])],
      band: extra.band,
      odd,
      marks: this.marks(axis),
      range,
      isLog: this.isLog && mayBeLog,
      words: this.words(names, curves, format),
    });
    this.key(chart, names, extra, odd.length);
    return chart;
  }

  lines(name, curve, place) {
    const { xs, ys } = withGaps(curve);
    const colour = `--curve-${(place % 6) + 1}`;
    const isNoisy = ["loss", "grad_norm"].includes(name) && xs.length > 120;
    if (!isNoisy) return [{ label: name, colour, xs, ys }];
    return [
      { label: name, colour, xs, ys, quiet: true, width: 1 },
      { label: name, colour, xs, ys: smooth(ys), width: 1.75 },
    ];
  }

  /** The chosen reference and its band, laid over this run's axis by epochs. */
  referenceLines(curve, axis) {
    const reference = this.reference.curve;
    const perEpoch = stepsPerEpoch(this.context.job);
    if (!reference || !perEpoch) {
      this.context.depart(null);
      return {};
    }
    const band = bandOf(reference);
    const toX = (epoch) => axis.toX(epoch * perEpoch);
    const xs = band.xs.map(toX);
    const own = curveOf(this.series.loss, (step) => step / perEpoch);
    if (!this.zoom) this.context.depart(departure(band, own), this.reference.name);
    return {
      lines: [{ label: this.reference.name, colour: "--muted", xs, ys: band.centre, dash: [5, 4], width: 1.25, isGuide: true }],
      band: { xs, low: band.low, high: band.high },
    };
  }

  publishedLines(curve) {
    const value = this.reference.isPublished ? publishedAccuracy(this.context.job) : null;
    if (value === null || !curve.xs.length) return {};
    const ends = [0, Math.max(...curve.xs)];
    return { lines: [{ label: "published", colour: "--muted", xs: ends, ys: [value, value], dash: [5, 4], isGuide: true }] };
  }

  marks(axis) {
    return this.context.events
      .filter(({ type, data }) => MARKED[type] && Number.isInteger(stepOf(data)) && stepOf(data) > 0)
      .map(({ type, data }) => ({ x: axis.toX(stepOf(data)), colour: MARKED[type] }));
  }

  key(chart, names, extra, numOdd) {
    const parts =
      names.length > 1
        ? names.map((name, place) =>
            h("span", { class: "key", style: { "--key": `var(--curve-${place + 1})` } }, figureOf(name).title),
          )
        : [];
    for (const line of extra.lines ?? []) parts.push(h("span", { class: "key dashed" }, line.label));
    if (numOdd) parts.push(h("span", { class: "odd" }, `✕ ${grouped(numOdd)} not finite`));
    const text = parts.map((part) => part.textContent).join();
    if (chart.keyText !== text) replace(chart.keys, parts);
    chart.keyText = text;
    chart.keys.hidden = parts.length === 0;
  }

  words(names, curves, format) {
    return names
      .map((name, place) => {
        const told = summary(curves[place]);
        const odd = told.numOdd ? `, ${told.numOdd} values not finite` : "";
        return told.count
          ? `${name}: last ${format(told.last)}, lowest ${format(told.low)}, highest ${format(told.high)}${odd}`
          : `${name}: no values${odd}`;
      })
      .join(". ");
  }
}

function stepOf(data) {
  if (Number.isInteger(data.step)) return data.step;
  const resumed = /step=0*(\d+)/.exec(data.resumed_from ?? "");
  return resumed ? Number(resumed[1]) : null;
}
