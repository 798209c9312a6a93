// All jobs: found, watched, chosen.

import { Watched, call } from "../api.js";
import { h, replace, say } from "../dom.js";
import { count } from "../format.js";
import { JobList } from "../joblist.js";
import { title } from "../page.js";
import { calm, poll } from "../poll.js";
import { amend, go, link } from "../router.js";
import { ACTIVE, AT_WORK, GROUPS } from "../status.js";
import { follow } from "../stream.js";
import { JobTable } from "./jobtable.js";
import { Marks } from "./marks.js";

const PAGE = 100;
const POLL_SECONDS = 3;
const MAX_DIRTY = 20; // jobs below the first page that are looked at again in one round
const FIELDS = "id,project,name,kind,status,desired_state,reason,labels,progress,created_at,started_at,finished_at";
const KINDS = ["pretrain", "probe", "finetune", "evaluate", "embed"];
const SORT = { column: "created", isDescending: true };

export function show(main, route, signal) {
  title("Jobs");
  const view = new JobsView(main, signal);
  view.read(route.query);
  view.start();
  return { update: (next) => view.read(next.query) && view.restart() };
}

class JobsView {
  constructor(main, signal) {
    this.signal = signal;
    this.list = new JobList();
    this.first = new Watched();
    this.active = new Watched();
    this.dirty = new Set();
    this.loading = null; // the page that is on its way
    this.isHeld = false; // a page did not come: none is asked for until the service has answered a poll
    this.filter = {};
    this.sort = SORT;
    this.marks = new Marks(signal);
    this.table = new JobTable({
      signal,
      mark: (job) => this.marks.of(job),
      more: () => this.more(),
      sort: (sort) => this.sortBy(sort),
      selected: () => this.draw(),
    });
    this.build(main);
  }

  build(main) {
    this.search = h("input", { class: "input", type: "search", placeholder: "Name or id", "aria-label": "Search by name or id" });
    this.kind = h(
      "select",
      { class: "input", "aria-label": "Kind" },
      h("option", { value: "" }, "All kinds"),
      KINDS.map((kind) => h("option", { value: kind }, kind)),
    );
    this.label = h("input", { class: "input label", placeholder: "Label, as team:cells", "aria-label": "Label" });
    this.groups = [["", "All"], ...GROUPS].map(([name, text]) =>
      h("button", { type: "button", data: { group: name }, on: { click: () => this.choose(name) } }, text),
    );
    this.note = h("span", { role: "status" });
    this.compare = h("a", { class: "button slim", hidden: true });
    this.allButton = h(
      "button",
      { class: "button slim bare", type: "button", hidden: true, on: { click: () => this.loadAll() } },
      "Load all",
    );
    const later = calm(() => this.apply(), 0.25, this.signal);
    this.search.addEventListener("input", later);
    this.label.addEventListener("input", later);
    this.kind.addEventListener("change", () => this.apply());
    addEventListener("keydown", (event) => this.onKey(event), { signal: this.signal });
    replace(
      main,
      h("h1", { class: "unseen", tabindex: "-1" }, "Jobs"),
      h(
        "form",
        { class: "filters", role: "search", on: { submit: (event) => event.preventDefault() } },
        h("div", { class: "search" }, this.search, h("kbd", { "aria-hidden": "true" }, "/")),
        h("div", { class: "segments", role: "group", "aria-label": "Status" }, this.groups),
        this.kind,
        this.label,
        h("a", { class: "button main", href: link(["submit"]), style: { "margin-left": "auto" } }, "New job"),
      ),
      this.table.element,
      h("div", { class: "foot" }, this.note, this.compare, this.allButton),
    );
  }

  /** The filter of an address; whether it is another one. */
  read(query) {
    const filter = {
      text: query.get("text") ?? "",
      kind: query.get("kind") ?? "",
      label: query.get("label") ?? "",
      status: query.getAll("status"),
    };
    const isNew = JSON.stringify(filter) !== JSON.stringify(this.filter);
    this.filter = filter;
    if (document.activeElement !== this.search) this.search.value = filter.text;
    if (document.activeElement !== this.label) this.label.value = filter.label;
    this.kind.value = KINDS.includes(filter.kind) ? filter.kind : "";
    for (const button of this.groups) button.setAttribute("aria-pressed", String(button.dataset.group === this.group()));
    return isNew;
  }

  group() {
    const wanted = [...this.filter.status].sort().join();
    return wanted === "" ? "" : (GROUPS.find(([, , statuses]) => [...statuses].sort().join() === wanted)?.[0] ?? null);
  }

  choose(name) {
    this.filter = { ...this.filter, status: GROUPS.find(([group]) => group === name)?.[2] ?? [] };
    this.apply(this.filter.status);
  }

  apply(status = this.filter.status) {
    const query = { text: this.search.value.trim(), status, kind: this.kind.value, label: this.label.value.trim() };
    amend(["jobs"], query);
    this.filter = {};
    this.read(new URLSearchParams(link([], query).split("?")[1] ?? ""));
    this.restart();
  }

  start() {
    this.poller = poll(() => this.refresh(), { seconds: POLL_SECONDS, signal: this.signal, failed: (error) => this.fail(error) });
    const soon = calm(() => this.poller.soon(), 0.5, this.signal);
    follow("/events", {
      signal: this.signal,
      told: (message) => {
        if (message.event === "event") this.dirty.add(JSON.parse(message.data).job_id);
        soon();
      },
    });
    const clock = setInterval(() => document.hidden || this.table.draw(), 10_000); // ages
    this.signal.addEventListener("abort", () => clearInterval(clock));
  }

  restart() {
    this.list.clear();
    this.allButton.hidden = true; // there is nothing to go on from until the first page is here
    this.trouble = "";
    this.round = (this.round ?? 0) + 1;
    this.table.toTop();
    this.poller.soon();
  }

  query(extra) {
    return { ...this.filter, fields: FIELDS, limit: PAGE, ...extra };
  }

  async refresh() {
    const round = this.round;
    const { data, isNew } = await this.first.get("/jobs", { query: this.query(), signal: this.signal });
    if (round !== this.round) return;
    this.trouble = "";
    if (isNew || this.list.cursor === undefined) this.list.refresh(data);
    await this.refreshOthers(new Set(data.jobs.map((job) => job.id)));
    this.isHeld = false;
    if (round === this.round) this.draw();
    if ((await this.marks.look([...this.list.byId.values()])) && round === this.round) this.draw();
  }

  /** Those that are not on the first page: at work, or told of. */
  async refreshOthers(seen) {
    const statuses = this.filter.status.length ? this.filter.status.filter((status) => ACTIVE.includes(status)) : AT_WORK;
    if (this.list.size > seen.size && statuses.length) {
      const { data } = await this.active.get("/jobs", { query: this.query({ status: statuses, limit: 200 }), signal: this.signal });
      this.list.update(data.jobs);
      for (const job of data.jobs) seen.add(job.id);
    }
    for (const id of this.dirty) if (!this.list.byId.has(id) || seen.has(id)) this.dirty.delete(id);
    await Promise.all([...this.dirty].slice(0, MAX_DIRTY).map((id) => this.refreshOne(id)));
  }

  /** What could not be looked up is left for the next round. */
  async refreshOne(id) {
    this.dirty.delete(id);
    try {
      const job = await call(`/jobs/${id}`, { signal: this.signal });
      const fits = this.filter.status.length === 0 || this.filter.status.includes(job.status);
      if (fits) this.list.update([job]);
      else this.list.remove(id);
    } catch (error) {
      if (error.status !== 404) {
        this.dirty.add(id);
        throw error;
      }
      this.list.remove(id);
    }
  }

  /** One page at a time: who wants more meanwhile waits for it. */
  async more() {
    if (!this.list.cursor || this.isHeld) return;
    this.loading ??= this.loadPage();
    await this.loading;
  }

  async loadPage() {
    const round = this.round;
    try {
      const page = await call("/jobs", { query: this.query({ cursor: this.list.cursor, limit: 200 }), signal: this.signal });
      if (round === this.round) this.list.append(page);
    } catch (error) {
      if (this.signal.aborted || round !== this.round) return;
      this.isHeld = true;
      this.fail(error);
    } finally {
      this.loading = null;
    }
    if (round === this.round && !this.signal.aborted) this.draw();
  }

  async loadAll() {
    const round = this.round;
    this.allButton.disabled = true;
    while (this.list.cursor && round === this.round && !this.signal.aborted && !this.isHeld) await this.more();
    this.allButton.disabled = false;
  }

  fail(error) {
    this.trouble = error.status === 422 ? error.message : "";
    this.draw();
  }

  sortBy(sort) {
    this.sort = sort;
    this.draw();
  }

  draw() {
    this.table.show(this.list.sorted(this.sort), {
      sort: this.sort,
      isWhole: this.list.cursor === null,
      isLoaded: this.list.cursor !== undefined,
      trouble: this.trouble,
      isFiltered: Object.values(this.filter).some((value) => value.length),
    });
    const there =
      this.list.cursor === undefined
        ? ""
        : count(this.list.size, "job") + (this.list.cursor ? " loaded, older ones follow as you scroll" : "");
    const isSorted = this.list.cursor && !(this.sort.column === "created" && this.sort.isDescending);
    say(this.note, this.trouble || (isSorted ? `Sorted among the ${there.replace(", older ones follow as you scroll", "")}` : there));
    this.allButton.hidden = !isSorted;
    const chosen = [...this.table.chosen];
    this.compare.hidden = chosen.length === 0;
    this.compare.href = link(["compare"], { jobs: chosen.join(",") });
    say(this.compare, `Compare ${count(chosen.length, "job")}`);
  }

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && event.target === this.search) {
      this.search.value = "";
      this.apply();
      this.table.element.focus();
    }
    if (event.target.closest("input:not([type=checkbox]), textarea, select, dialog")) return;
    const actions = {
      j: () => this.table.move(1),
      k: () => this.table.move(-1),
      x: () => this.table.toggle(),
      "/": () => this.search.select(),
      Enter: null,
    };
    if (event.key === "Enter" && event.target.closest("a, button, input") === null && this.table.here) go(["jobs", this.table.here]);
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }
}
