// Several jobs side by side: their curves in one chart each, and in what their specs differ.

import { call } from "../api.js";
import { AXES, axisOf } from "../axis.js";
import { Chart } from "../chart.js";
import { h, replace } from "../dom.js";
import { figureOf } from "../figures.js";
import { title, toast } from "../page.js";
import { calm, poll } from "../poll.js";
import { amend, link } from "../router.js";
import { curveOf, smooth, summary, withGaps } from "../series.js";
import { TERMINAL, badge } from "../status.js";
import { Differences, colour } from "./differences.js";

const POLL_SECONDS = 4;
const MAX_JOBS = 12;
const MAX_POINTS = 800;

export function show(main, route, signal) {
  title("Compare");
  const view = new CompareView(main, signal);
  view.read(route.query);
  return { update: (next) => view.read(next.query) };
}

class CompareView {
  constructor(main, signal) {
    this.signal = signal;
    this.ids = [];
    this.jobs = new Map(); // id → {job, series, speed}
    this.charts = new Map();
    this.axisName = "epoch";
    this.zoom = null; // in the axis' own unit
    this.chosen = h("ul", { class: "chosen", "aria-label": "Jobs that are compared" });
    this.input = h("input", {
      class: "input",
      list: "found-jobs",
      placeholder: "Add a job: name or id",
      "aria-label": "Add a job by name or id",
    });
    this.found = h("datalist", { id: "found-jobs" });
    this.axis = h(
      "select",
      {
        class: "input slim",
        "aria-label": "Curves over",
        on: { change: () => this.change(() => ([this.axisName, this.zoom] = [this.axis.value, null])) },
      },
      AXES.map(([name, text]) => h("option", { value: name }, text)),
    );
    this.axis.value = this.axisName;
    this.log = h(
      "button",
      {
        class: "button slim",
        type: "button",
        "aria-pressed": "false",
        on: {
          click: () => this.change(() => this.log.setAttribute("aria-pressed", String(this.log.getAttribute("aria-pressed") !== "true"))),
        },
      },
      "Log scale",
    );
    this.smoothing = h(
      "button",
      {
        class: "button slim",
        type: "button",
        "aria-pressed": "true",
        on: {
          click: () =>
            this.change(() => this.smoothing.setAttribute("aria-pressed", String(this.smoothing.getAttribute("aria-pressed") !== "true"))),
        },
      },
      "Smoothed",
    );
    this.whole = h("button", { class: "button slim", type: "button", hidden: true, on: { click: () => this.zoomTo(null) } }, "Whole runs");
    this.grid = h("div", { class: "charts" });
    this.differences = new Differences();
    this.note = h("div", { class: "empty card" });
    this.input.addEventListener(
      "input",
      calm(() => this.look(), 0.2, signal),
    );
    this.input.addEventListener("change", () => this.add());
    replace(
      main,
      h(
        "div",
        { class: "head" },
        h("h1", { class: "grow", tabindex: "-1" }, "Compare"),
        h("form", { class: "adder", on: { submit: (event) => (event.preventDefault(), this.add()) } }, this.input, this.found),
      ),
      h(
        "div",
        { class: "stack" },
        this.chosen,
        h("div", { class: "curve-tools" }, this.axis, this.log, this.smoothing, this.whole),
        this.note,
        this.grid,
        this.differences.element,
      ),
    );
    this.poller = poll(() => this.refresh(), {
      seconds: POLL_SECONDS,
      signal,
      failed: (error) => error.status < 500 && toast(error.message, "bad"),
    });
  }

  read(query) {
    this.ids = [...new Set((query.get("jobs") ?? "").split(",").filter(Boolean))].slice(0, MAX_JOBS);
    this.poller.soon();
  }

  set(ids) {
    this.ids = ids.slice(0, MAX_JOBS);
    amend(["compare"], { jobs: this.ids.join(",") });
    this.poller.soon();
  }

  async look() {
    const text = this.input.value.trim();
    if (!/[\p{L}\p{N}]/u.test(text)) return;
    const { jobs } = await call("/jobs", { query: { text, limit: 10, fields: "id,name,kind,status" }, signal: this.signal }).catch(() => ({
      jobs: [],
    }));
    replace(
      this.found,
      jobs.map((job) => h("option", { value: job.id }, `${job.name} (${job.kind}, ${job.status})`)),
    );
  }

  add() {
    const text = this.input.value.trim();
    if (!/^[a-z0-9]{1,40}$/.test(text) || ![...this.found.children].some(({ value }) => value === text)) return;
    this.input.value = "";
    this.set([...new Set([...this.ids, text])]);
  }

  change(what) {
    what();
    this.draw();
    this.poller.soon();
  }

  zoomTo(range) {
    this.change(() => (this.zoom = range));
  }

  async refresh() {
    const all = await Promise.all(this.ids.map((id) => this.readOne(id)));
    if (all.includes(null)) this.set(this.ids.filter((_, place) => all[place] !== null));
    this.draw();
  }

  /** null: there is no such job (any more). */
  async readOne(id) {
    const known = this.jobs.get(id);
    const stretch = JSON.stringify([this.zoom, this.axisName]);
    if (known && TERMINAL.has(known.job.status) && known.stretch === stretch) return known;
    try {
      const job = await call(`/jobs/${id}`, { signal: this.signal });
      const speed = known?.speed ?? (await this.series(id, { names: "images_per_second" })).images_per_second;
      const axis = axisOf(this.axisName, job, speed);
      const [from, to] = (this.zoom ?? []).map((x) => Math.max(0, axis.toStep(x)));
      const series = await this.series(id, { max_points: MAX_POINTS, from_step: from, to_step: to });
      const found = { job, series, speed, stretch };
      this.jobs.set(id, found);
      return found;
    } catch (error) {
      if (error.status !== 404) throw error;
      toast(`There is no job ${id} any more.`, "bad");
      this.jobs.delete(id);
      return null;
    }
  }

  async series(id, query) {
    return (await call(`/jobs/${id}/metrics`, { query, signal: this.signal })).series;
  }

  draw() {
    const shown = this.ids.filter((id) => this.jobs.has(id)).map((id) => this.jobs.get(id));
    this.note.hidden = this.ids.length > 0;
    if (!this.ids.length)
      replace(
        this.note,
        h("strong", {}, "Nothing to compare yet"),
        "Add jobs above, or select them in the list of jobs with ",
        h("kbd", {}, "x"),
        ".",
      );
    this.whole.hidden = this.zoom === null;
    const chips = JSON.stringify(shown.map(({ job }) => [job.id, job.name, job.status]));
    if (chips !== this.chips)
      replace(
        this.chosen,
        shown.map(({ job }, place) => this.chip(job, place)),
      );
    this.chips = chips;
    const names = [...new Set(shown.flatMap(({ series }) => Object.keys(series)))];
    const order = names.sort((a, b) => figureOf(a).place - figureOf(b).place || (a < b ? -1 : 1));
    const charts = order.map((name) => this.drawChart(name, shown));
    if (this.grid.children.length !== charts.length || charts.some((chart, place) => this.grid.children[place] !== chart.element))
      replace(
        this.grid,
        charts.map((chart) => chart.element),
      );
    for (const chart of charts) chart.resize();
    this.differences.show(shown.map(({ job }) => job));
  }

  chip(job, place) {
    const remove = h(
      "button",
      {
        class: "button bare slim",
        type: "button",
        "aria-label": `Leave out ${job.name}`,
        on: { click: () => this.set(this.ids.filter((id) => id !== job.id)) },
      },
      "✕",
    );
    return h(
      "li",
      { class: "row" },
      h("span", { class: `key${place >= 6 ? " dashed" : ""}`, style: { "--key": colour(place, "var") } }),
      h("a", { href: link(["jobs", job.id]) }, job.name),
      badge(job.status),
      remove,
    );
  }

  drawChart(name, shown) {
    const { title: heading, format, mayBeLog } = figureOf(name);
    if (!this.charts.has(name))
      this.charts.set(
        name,
        new Chart({
          title: heading,
          format,
          zoomed: (range) => this.zoomTo(range),
          signal: this.signal,
        }),
      );
    const chart = this.charts.get(name);
    const isSmooth = this.smoothing.getAttribute("aria-pressed") === "true";
    const lines = [];
    const told = [];
    const odd = [];
    for (const [place, { job, series, speed }] of shown.entries()) {
      if (!series[name]) continue;
      const curve = curveOf(series[name], axisOf(this.axisName, job, speed).toX);
      const { xs, ys } = withGaps(curve);
      lines.push({
        label: job.name,
        colour: colour(place),
        dash: place >= 6 ? [6, 3] : undefined,
        xs,
        ys: isSmooth && xs.length > 120 ? smooth(ys) : ys,
      });
      odd.push(...curve.odd);
      const { last, numOdd } = summary(curve);
      told.push(`${job.name}: last ${last === null ? "none" : format(last)}${numOdd ? `, ${numOdd} not finite` : ""}`);
    }
    const xs = lines.flatMap((line) => [line.xs[0], line.xs.at(-1)]).filter((x) => x !== undefined);
    const isLog = this.log.getAttribute("aria-pressed") === "true" && mayBeLog;
    chart.show({
      lines,
      odd,
      isLog,
      range: this.zoom ?? [Math.min(0, ...xs), Math.max(1e-9, ...xs)],
      words: told.join(". "),
      told: (texts) => this.tellValues(chart, shown, lines, texts),
    });
    return chart;
  }

  /** The value of each job, beside its colour. */
  tellValues(chart, shown, lines, texts) {
    const key = texts.join("|");
    if (key === chart.toldKey) return;
    chart.toldKey = key;
    replace(
      chart.keys,
      lines.map((line, place) =>
        h("span", { class: `key figures${line.dash ? " dashed" : ""}`, style: { "--key": `var(${line.colour})` } }, texts[place]),
      ),
    );
    chart.value.hidden = true;
  }
}
