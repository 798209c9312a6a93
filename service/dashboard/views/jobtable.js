// A table of any number of jobs, of which only the rows in sight exist.

import { h, replace } from "../dom.js";
import { ago, between, duration, grouped, measure, percent } from "../format.js";
import { share } from "../joblist.js";
import { link } from "../router.js";
import { TERMINAL, badge, tone } from "../status.js";

const OVERSCAN = 8; // rows above and below what is in sight
const NARROW = matchMedia("(max-width: 720px)");
const COLUMNS = [
  ["status", "Status", "150px"],
  ["name", "Name", "auto"],
  ["kind", "Kind", "92px"],
  ["progress", "Progress", "170px"],
  ["loss", "Loss", "84px", "number"],
  ["speed", "Images/s", "90px", "number"],
  ["eta", "Left, or took", "112px", "number"],
  ["created", "Age", "112px", "number"],
];

export class JobTable {
  /** `mark(job)`: whether it is outside of its reference; `more()`: the end is near; `sort(order)`; `selected()`: other rows are chosen. */
  constructor({ signal, mark, more, sort, selected }) {
    Object.assign(this, { mark, more, sort, selected });
    this.jobs = [];
    this.chosen = new Set();
    this.here = null; // the id of the row that j and k move from
    this.rows = new Map();
    this.heads = COLUMNS.map(([name, text, width, kind]) =>
      h(
        "th",
        { scope: "col", class: kind ?? null, style: { width } },
        h("button", { type: "button", on: { click: () => this.click(name) } }, text),
      ),
    );
    this.above = h("tr", { class: "space", "aria-hidden": "true" }, h("td", { colspan: COLUMNS.length + 1 }));
    this.below = this.above.cloneNode(true);
    this.body = h("tbody", {}, this.above, this.below);
    this.tableElement = h(
      "table",
      { "aria-label": "Jobs" },
      h("thead", {}, h("tr", {}, h("th", { class: "select", scope: "col" }, h("span", { class: "unseen" }, "Compare")), this.heads)),
      this.body,
    );
    this.empty = h("div", { class: "empty", hidden: true });
    this.element = h(
      "div",
      { class: "card list", tabindex: "0", role: "region", "aria-label": "List of jobs" },
      this.tableElement,
      this.empty,
    );
    this.element.addEventListener("scroll", () => this.plan(), { passive: true });
    addEventListener("resize", () => this.plan(), { signal });
  }

  show(jobs, state) {
    this.jobs = jobs;
    this.state = state;
    for (const [place, head] of this.heads.entries()) {
      const isIt = COLUMNS[place][0] === state.sort.column;
      if (isIt) head.setAttribute("aria-sort", state.sort.isDescending === (COLUMNS[place][0] !== "created") ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
    this.tableElement.setAttribute("aria-rowcount", state.isWhole ? jobs.length + 1 : -1);
    this.draw();
    this.tellEmpty();
  }

  tellEmpty() {
    const { isLoaded, isWhole, isFiltered, trouble } = this.state;
    this.empty.hidden = this.jobs.length > 0 || !(isLoaded || trouble);
    if (this.empty.hidden) return;
    if (trouble) replace(this.empty, h("strong", {}, "This filter cannot be used"), trouble);
    else if (isFiltered) replace(this.empty, h("strong", {}, "No job is like that"), "Change the filter, or clear it.");
    else
      replace(
        this.empty,
        h("strong", {}, "No jobs yet"),
        h("a", { href: link(["submit"]) }, "Submit the first one"),
        ", or use ",
        h("code", {}, "maestro submit deploy/specs/digits-pretrain.yaml"),
        ".",
      );
    if (!isWhole && isLoaded) this.more();
  }

  click(column) {
    if (!this.state) return; // before the first page
    const { sort } = this.state;
    this.sort({ column, isDescending: sort.column === column ? !sort.isDescending : column === "created" || column === "progress" });
  }

  toTop() {
    this.element.scrollTop = 0;
  }

  plan() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.draw();
    });
  }

  get rowHeight() {
    return NARROW.matches ? 72 : 54;
  }

  /** The rows in sight, made anew only where they look different. `next`: whose row is to have the focus; else it stays where it is. */
  draw(next = null) {
    const height = this.rowHeight;
    const from = Math.max(0, Math.floor(this.element.scrollTop / height) - OVERSCAN);
    const to = Math.min(this.jobs.length, Math.ceil((this.element.scrollTop + this.element.clientHeight) / height) + OVERSCAN);
    const focused = next ?? (this.body.contains(document.activeElement) ? document.activeElement.closest("tr")?.dataset.id : null);
    const isBox = next === null && document.activeElement?.type === "checkbox";
    const kept = new Map();
    const now = Date.now();
    const shown = this.jobs.slice(from, to).map((job, place) => {
      const look = { ...cells(job, now), mark: this.mark(job) };
      const key = JSON.stringify([look, job.labels, this.chosen.has(job.id), job.id === this.here]);
      const before = this.rows.get(job.id);
      const row = before?.key === key ? before.row : this.row(job, look);
      row.setAttribute("aria-rowindex", from + place + 2);
      kept.set(job.id, { key, row });
      return row;
    });
    this.rows = kept;
    this.above.firstChild.style.height = `${from * height}px`;
    this.below.firstChild.style.height = `${(this.jobs.length - to) * height}px`;
    this.arrange(shown);
    if (focused && kept.has(focused) && !kept.get(focused).row.contains(document.activeElement)) {
      kept
        .get(focused)
        .row.querySelector(isBox ? "input" : "a")
        .focus({ preventScroll: true });
    }
    if (to >= this.jobs.length - OVERSCAN && this.state?.isLoaded && !this.state.isWhole && this.jobs.length) this.more();
  }

  /** Touches only rows that come, go or move. */
  arrange(shown) {
    const wanted = new Set(shown);
    for (const row of [...this.body.children]) if (row !== this.above && row !== this.below && !wanted.has(row)) row.remove();
    let place = this.above.nextSibling;
    for (const row of shown) {
      if (row === place) place = place.nextSibling;
      else this.body.insertBefore(row, place);
    }
  }

  row(job, look) {
    const box = h("input", {
      type: "checkbox",
      "aria-label": `Compare ${job.name}`,
      on: { change: () => this.choose(job.id, box.checked) },
    });
    box.checked = this.chosen.has(job.id);
    const labels = Object.entries(job.labels ?? {})
      .slice(0, 4)
      .map(([key, value]) => h("span", { class: "chip" }, value ? `${key}: ${value}` : key));
    return h(
      "tr",
      { class: `job${job.id === this.here ? " here" : ""}`, data: { id: job.id } },
      h("td", { class: "select" }, box),
      h("td", { class: "status" }, badge(job.status, { wish: job.desired_state })),
      h(
        "td",
        { class: "name" },
        look.mark ? off(look.mark) : null,
        h("a", { href: link(["jobs", job.id]), title: job.name, on: { focus: () => (this.here = job.id) } }, job.name),
        h("div", { class: "under" }, h("code", {}, job.id), labels),
      ),
      h("td", {}, job.kind),
      h("td", { class: "bar-cell" }, progress(job, look)),
      h("td", { class: "number" }, look.loss),
      h("td", { class: "number" }, look.speed),
      h("td", { class: "number" }, look.left),
      h("td", { class: "number when", title: new Date(job.created_at).toLocaleString() }, look.age),
    );
  }

  choose(id, isChosen) {
    if (isChosen) this.chosen.add(id);
    else this.chosen.delete(id);
    const box = this.rows.get(id)?.row.querySelector("input");
    if (box) box.checked = isChosen;
    this.selected();
  }

  toggle() {
    if (this.here) this.choose(this.here, !this.chosen.has(this.here));
  }

  /** To the next row, or the one before. */
  move(by) {
    if (!this.jobs.length) return;
    const place = this.jobs.findIndex((job) => job.id === this.here);
    const next = Math.min(Math.max(place + by, 0), this.jobs.length - 1);
    this.here = this.jobs[next].id;
    const top = next * this.rowHeight;
    const room = this.element.clientHeight - 2 * this.rowHeight;
    if (top < this.element.scrollTop) this.element.scrollTop = top;
    else if (top > this.element.scrollTop + room) this.element.scrollTop = top - room;
    this.draw(this.here);
  }
}

/** A run that has left the band of its reference. */
function off({ side, name }) {
  return h(
    "span",
    { class: `off ${side}`, title: `${side} the band of its reference “${name}”` },
    h("span", { class: "unseen" }, `${side} its reference `),
    h("span", { "aria-hidden": "true" }, side === "above" ? "▲ " : "▼ "),
  );
}

/** What the columns say. */
function cells(job, now) {
  const isOver = TERMINAL.has(job.status);
  const done = share(job);
  return {
    status: job.status,
    wish: job.desired_state,
    name: job.name,
    done,
    percent: done === null ? "" : percent(done),
    loss: measure(job.progress?.loss),
    speed: isOver ? "–" : measure(job.progress?.images_per_second, 3),
    left: isOver ? duration(between(job.started_at ?? job.created_at, job.finished_at)) : duration(job.progress?.eta_seconds),
    age: ago(job.created_at, now).replace(" ago", ""),
  };
}

function progress(job, look) {
  if (look.done === null) return h("span", { class: "muted" }, job.reason ? job.reason.replaceAll("_", " ") : "–");
  const text = `${grouped(job.progress.step)} of ${grouped(job.progress.num_steps)} steps`;
  const meter = h(
    "span",
    {
      class: `meter tone-${tone(job.status)}`,
      role: "progressbar",
      "aria-label": "Progress",
      "aria-valuenow": Math.round(look.done * 100),
      "aria-valuemin": 0,
      "aria-valuemax": 100,
      "aria-valuetext": text,
    },
    h("span", { style: { width: `${look.done * 100}%` } }),
  );
  return h("div", { class: "progress", title: text }, meter, h("small", {}, look.percent));
}
