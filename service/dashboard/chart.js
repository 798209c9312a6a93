// A chart on a canvas (uPlot): curves that share a cursor, zoom by dragging, bands, marks, and values that are not finite.

import { h, say } from "./dom.js";
import { measure } from "./format.js";
import uPlot from "./vendor/uPlot.js";

const HEIGHT = 190;
const EXPAND = 2; // of uPlot: a hole of one curve stays one among the points of others

/** `zoomed([from, to] | null)` is called when somebody drags over the chart, or clicks twice. */
export class Chart {
  constructor({ title, format = measure, zoomed = () => {}, signal }) {
    Object.assign(this, { format, zoomed });
    this.value = h("span", { class: "value figures" });
    this.place = h("span", { class: "place muted figures" });
    this.keys = h("span", { class: "keys-line" });
    this.host = h("div", { class: "canvas", role: "img" });
    this.element = h(
      "figure",
      { class: "chart card" },
      h("figcaption", {}, h("h3", {}, title), this.place, this.value),
      this.host,
      this.keys,
    );
    this.title = title;
    this.plot = null;
    this.data = null;
    const observer = new ResizeObserver(() => this.resize());
    observer.observe(this.host);
    addEventListener("themechange", () => this.rebuild(), { signal });
    signal.addEventListener("abort", () => (observer.disconnect(), this.destroy()));
  }

  /** lines: {label, colour, xs, ys, dash?, width?, quiet?, isGuide?}, of which quiet ones and guides tell no values; band: {xs, low, high}; odd, marks: {x, text}; range: [from, to] of x; isLog: of y. */
  show(content) {
    this.content = content;
    const tables = content.lines.map(({ xs, ys }) => [xs, content.isLog ? ys.map((y) => (y > 0 ? y : null)) : ys]);
    if (content.band) tables.push([content.band.xs, content.band.low], [content.band.xs, content.band.high]);
    const joins =
      tables.length === 1
        ? tables[0]
        : tables.length
          ? uPlot.join(
              tables,
              tables.map(() => [0, EXPAND]),
            )
          : [[]];
    const look = JSON.stringify([
      content.lines.map(({ label, colour, dash, width, quiet }) => [label, colour, dash, width, quiet]),
      Boolean(content.band),
      content.isLog,
    ]);
    this.data = joins;
    if (this.plot && look === this.look) {
      this.plot.batch(() => {
        this.plot.setData(joins, false);
        this.plot.setScale("x", this.range());
      });
    } else {
      this.look = look;
      this.rebuild();
    }
    this.host.setAttribute("aria-label", `${this.title}. ${content.words ?? ""}`);
    this.tell(null);
  }

  range() {
    const [from, to] = this.content.range ?? [this.data[0][0] ?? 0, this.data[0].at(-1) ?? 1];
    return { min: from, max: to > from ? to : from + 1 };
  }

  rebuild() {
    this.destroy();
    if (!this.content || !this.host.clientWidth) return;
    this.plot = new uPlot(this.options(), this.data, this.host);
    this.plot.setScale("x", this.range());
  }

  destroy() {
    if (!this.plot) return;
    this.plot.destroy();
    this.plot = null;
  }

  resize() {
    if (!this.plot) this.rebuild();
    else if (this.host.clientWidth && this.host.clientWidth !== this.plot.width)
      this.plot.setSize({ width: this.host.clientWidth, height: HEIGHT });
  }

  options() {
    const colours = getComputedStyle(document.documentElement);
    const colour = (name) => colours.getPropertyValue(name).trim();
    const axis = {
      stroke: colour("--muted"),
      grid: { stroke: colour("--grid"), width: 1 },
      ticks: { show: false },
      font: `11px ${colour("--sans")}`,
    };
    const lines = this.content.lines.map((line) => ({
      label: line.label,
      stroke: colour(line.colour) + (line.quiet ? "55" : ""),
      width: line.width ?? 1.5,
      dash: line.dash,
      points: { show: line.xs.length < 30, size: 5, fill: colour("--surface") },
    }));
    const edges = this.content.band
      ? [
          { label: "", stroke: "transparent", points: { show: false } },
          { label: "", stroke: "transparent", points: { show: false } },
        ]
      : [];
    return {
      width: this.host.clientWidth,
      height: HEIGHT,
      padding: [8, 16, 0, 0],
      legend: { show: false },
      cursor: {
        sync: {
          key: "curves",
          setSeries: false,
          scales: ["x", null],
          filters: { pub: (type) => type === "mousemove" || type === "mouseleave" },
        },
        drag: { x: true, y: false, setScale: false },
        points: { size: 6 },
        bind: { dblclick: () => () => this.zoomed(null) },
        y: false,
      },
      scales: { x: { time: false }, y: this.content.isLog ? { distr: 3 } : { range: (_, low, high) => spread(low, high) } },
      axes: [
        { ...axis, size: 26, gap: 4, values: (_, places) => places.map((place) => measure(place)) },
        { ...axis, size: 54, gap: 4, space: 34, values: (_, places) => places.map((place) => (place === null ? "" : this.format(place))) },
      ],
      series: [{}, ...lines, ...edges],
      bands: this.content.band ? [{ series: [lines.length + 2, lines.length + 1], fill: `${colour("--muted")}26` }] : [],
      hooks: {
        setSelect: [(plot) => this.select(plot)],
        setCursor: [(plot) => this.tell(plot.cursor.idx)],
        draw: [(plot) => this.drawMarks(plot, colour)],
      },
    };
  }

  select(plot) {
    if (plot.select.width < 6) return;
    const range = [plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x")];
    plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    this.zoomed(range);
  }

  /** What is under the cursor, or what came last. */
  tell(place) {
    const { lines } = this.content;
    const at = place ?? null;
    say(this.place, at === null || !this.data[0].length ? "" : `at ${measure(this.data[0][at])}`);
    const texts = lines
      .filter((line) => !line.quiet && !line.isGuide)
      .map((line) => {
        const column = this.data[lines.indexOf(line) + 1] ?? [];
        const value = at === null ? column.findLast((y) => y !== null && y !== undefined) : column[at];
        return value === null || value === undefined ? "–" : this.format(value);
      });
    say(this.value, texts.length <= 2 ? texts.join(" · ") : "");
    this.content.told?.(texts, at);
  }

  /** Vertical lines where something happened; crosses at the edge where a value is not finite. */
  drawMarks(plot, colour) {
    const { ctx, bbox } = plot;
    const ratio = devicePixelRatio;
    const inside = (x) => x >= plot.scales.x.min && x <= plot.scales.x.max;
    ctx.save();
    ctx.lineWidth = ratio;
    for (const mark of this.content.marks ?? []) {
      if (!inside(mark.x)) continue;
      const left = Math.round(plot.valToPos(mark.x, "x", true)) + 0.5;
      ctx.strokeStyle = colour(mark.colour ?? "--line-strong");
      ctx.setLineDash([3 * ratio, 3 * ratio]);
      line(ctx, left, bbox.top, left, bbox.top + bbox.height);
    }
    ctx.setLineDash([]);
    ctx.strokeStyle = colour("--bad");
    ctx.lineWidth = 1.5 * ratio;
    const size = 3 * ratio;
    for (const { x, value } of this.content.odd ?? []) {
      if (!inside(x)) continue;
      const left = plot.valToPos(x, "x", true);
      const top = value === -Infinity ? bbox.top + bbox.height - 2 * size : bbox.top + 2 * size;
      line(ctx, left - size, top - size, left + size, top + size);
      line(ctx, left - size, top + size, left + size, top - size);
    }
    ctx.restore();
  }
}

function line(ctx, x1, y1, x2, y2) {
  ctx.beginPath();
  ctx.moveTo(x1, y1);
  ctx.lineTo(x2, y2);
  ctx.stroke();
}

/** The range of y: some room round the values, and none below zero where there are no such values. */
function spread(low, high) {
  if (low === null || high === null) return [0, 1];
  const room = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
  return [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
}
