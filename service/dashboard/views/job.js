// One job: where it is, what it needs from its user, and its parts.

import { Watched } from "../api.js";
import { h, replace, say } from "../dom.js";
import { ago, between, duration, grouped, measure, moment, percent } from "../format.js";
import { share } from "../joblist.js";
import { announce, title } from "../page.js";
import { poll } from "../poll.js";
import { link } from "../router.js";
import { ICONS, TERMINAL, badge, icon, tone } from "../status.js";
import { follow } from "../stream.js";
import { actions } from "./actions.js";
import { banners } from "./banners.js";
import { copyButton } from "./copy.js";
import { keep } from "./timeline.js";

const POLL_SECONDS = 2;
const REST_SECONDS = 20; // of a job that has ended
const MAX_EVENTS = 5000; // kept here
const PARTS = [
  ["", "Overview", () => import("./overview.js")],
  ["reconstructions", "Reconstructions", () => import("./reconstructions.js")],
  ["logs", "Logs", () => import("./logs.js")],
  ["results", "Results", () => import("./results.js")],
  ["spec", "Spec", () => import("./spec.js")],
  ["events", "Events", () => import("./events.js")],
];

export function show(main, route, signal) {
  const view = new JobView(main, route.parts[1], signal);
  view.openPart(route);
  return { update: (next) => view.openPart(next) };
}

class JobView {
  constructor(main, id, signal) {
    Object.assign(this, { main, id, signal });
    this.job = null;
    this.events = [];
    this.departure = null;
    this.watched = new Watched();
    this.heading = h("h1", { tabindex: "-1" }, "…");
    this.status = h("span");
    this.sub = h("div", { class: "sub" });
    this.actions = h("div", { class: "row" });
    this.banners = h("div", { class: "stack banners" });
    this.progress = h("div", { class: "card run", hidden: true });
    this.tabs = h("nav", { class: "tabs", "aria-label": "Parts of the job" });
    this.part = h("div", { class: "part" });
    title("Job");
    replace(
      main,
      h(
        "div",
        { class: "head" },
        h(
          "div",
          { class: "grow" },
          h("a", { class: "back small", href: link(["jobs"]) }, icon(ICONS.back), "Jobs"),
          h("div", { class: "row" }, this.heading, this.status),
          this.sub,
        ),
        this.actions,
      ),
      this.banners,
      this.progress,
      this.tabs,
      this.part,
    );
    this.poller = poll(() => this.refresh(), { seconds: POLL_SECONDS, signal, failed: (error) => this.fail(error) });
    follow(`/jobs/${id}/events`, { signal, after: 0, told: (message) => this.tell(message) });
  }

  async refresh() {
    if (this.isGone) return;
    if (this.job && TERMINAL.has(this.job.status) && Date.now() - this.seenAt < REST_SECONDS * 1000 && !this.isStale) return;
    const { data, isNew } = await this.watched.get(`/jobs/${this.id}`, { signal: this.signal });
    this.isStale = false;
    this.seenAt = Date.now();
    if (!isNew && this.job) return;
    const isFirst = this.job === null;
    if (!isFirst && this.job.status !== data.status) announce(`The job is ${data.status}`);
    this.job = data;
    this.draw();
    if (isFirst) await this.openPart(this.route);
  }

  tell(message) {
    if (message.event === "event") {
      keep(this.events, JSON.parse(message.data), MAX_EVENTS);
      this.isStale = true;
      this.soon();
    } else if (message.event === "progress" && this.job) {
      this.job = { ...this.job, progress: JSON.parse(message.data) };
      this.drawProgress();
    } else if (message.event === "end") {
      this.isStale = true;
      this.soon();
    }
  }

  soon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      if (this.signal.aborted) return;
      this.poller.soon();
      this.shown?.update?.();
    }, 200);
  }

  fail(error) {
    if (error.status !== 404) return;
    this.isGone = true;
    this.partSignal?.abort();
    const wasThere = this.job !== null;
    title(wasThere ? `${this.job.name}, deleted` : "No such job");
    replace(this.actions);
    replace(this.tabs);
    this.progress.hidden = true;
    if (!wasThere) say(this.heading, "There is no such job");
    replace(
      this.banners,
      h(
        "div",
        { class: "banner tone-warn", role: "alert" },
        icon(ICONS.warning),
        h(
          "div",
          {},
          h("strong", {}, wasThere ? "This job was deleted." : "It was deleted, or belongs to another project."),
          h("p", { class: "detail" }, h("a", { href: link(["jobs"]) }, "All jobs")),
        ),
      ),
    );
    replace(this.part);
  }

  /** Called by parts: whether the run is outside of its reference's band. */
  depart(departure, name) {
    const told = departure && { ...departure, name };
    if (JSON.stringify(told) === JSON.stringify(this.departure)) return;
    this.departure = told;
    this.drawBanners();
  }

  draw() {
    const { job } = this;
    title(job.name);
    say(this.heading, job.name);
    replace(this.status, badge(job.status, { wish: job.desired_state }));
    const labels = Object.entries(job.labels).map(([key, value]) =>
      h("a", { class: "chip", href: link(["jobs"], { label: value ? `${key}:${value}` : key }) }, value ? `${key}: ${value}` : key),
    );
    replace(
      this.sub,
      h("span", {}, job.kind),
      h("span", { class: "row" }, h("code", {}, job.id), copyButton(job.id, "Copy the id")),
      h("span", {}, `project ${job.project}`),
      h("span", { title: moment(job.created_at) }, `submitted ${ago(job.created_at)}`),
      job.priority ? h("span", {}, `priority ${job.priority}`) : null,
      job.retry_of ? h("a", { href: link(["jobs", job.retry_of]) }, "a retry of another job") : null,
      labels,
    );
    const act = JSON.stringify([job.status, job.desired_state, job.labels]);
    if (act !== this.acted) replace(this.actions, actions(this));
    this.acted = act;
    this.drawBanners();
    this.drawProgress();
    this.drawTabs();
    this.shown?.update?.();
  }

  drawBanners() {
    const told = banners(this);
    const key = told.map((banner) => banner.textContent).join("\n");
    if (key !== this.bannersKey) replace(this.banners, told);
    this.bannersKey = key;
  }

  drawProgress() {
    const { job } = this;
    const done = share(job);
    this.progress.hidden = done === null;
    if (done === null) return;
    const { step, num_steps: total, epoch, loss, images_per_second: speed, eta_seconds: eta } = job.progress;
    const isOver = TERMINAL.has(job.status);
    const facts = [
      ["Step", `${grouped(step)} of ${grouped(total)}`],
      ["Epoch", measure(epoch, 3)],
      ["Loss", measure(loss)],
      isOver ? null : ["Images/s", measure(speed, 3)],
      isOver ? ["Took", duration(between(job.started_at, job.finished_at))] : ["Left", duration(eta)],
      ["Attempt", String(job.attempt)],
    ].filter(Boolean);
    if (!this.meter) {
      this.meter = h(
        "div",
        { class: "meter", role: "progressbar", "aria-label": "Progress", "aria-valuemin": 0, "aria-valuemax": 100 },
        h("span"),
      );
      this.percent = h("strong", { class: "figures" });
      this.facts = h("dl", { class: "facts" });
      replace(this.progress, h("div", { class: "meter-line" }, this.meter, this.percent), this.facts);
    }
    this.meter.className = `meter tone-${tone(job.status)}`;
    this.meter.setAttribute("aria-valuenow", Math.round(done * 100));
    this.meter.firstChild.style.width = `${done * 100}%`;
    say(this.percent, percent(done));
    replace(
      this.facts,
      facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", { class: "figures" }, value))),
    );
  }

  drawTabs() {
    const here = this.route.parts[2] ?? "";
    const there = PARTS.filter(([name]) => name !== "reconstructions" || this.job.kind === "pretrain");
    const key = JSON.stringify([here, there.length]);
    if (key === this.tabsKey) return;
    this.tabsKey = key;
    replace(
      this.tabs,
      there.map(([name, text]) =>
        h("a", { href: link(["jobs", this.id, name].filter(Boolean)), "aria-current": name === here ? "page" : null }, text),
      ),
    );
  }

  async openPart(route) {
    const name = route.parts[2] ?? "";
    const isSame = this.shown && this.route?.parts[2] === route.parts[2];
    this.route = route;
    if (!this.job || this.isGone) return;
    this.drawTabs();
    if (isSame) {
      this.shown.update?.();
      return;
    }
    this.partSignal?.abort();
    const controller = new AbortController();
    this.partSignal = controller;
    this.signal.addEventListener("abort", () => controller.abort());
    this.shown = null;
    const [, , load] = PARTS.find(([part]) => part === name) ?? PARTS[0];
    const module = await load();
    if (controller.signal.aborted) return;
    replace(this.part);
    this.shown = module.show(this.part, this, controller.signal) ?? {};
  }
}
