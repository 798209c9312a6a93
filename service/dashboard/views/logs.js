// What the processes of a run print, as they print it.

import { ask, call } from "../api.js";
import { h, replace, say } from "../dom.js";
import { bytes, grouped } from "../format.js";
import { LineList, LineStore } from "../lines.js";
import { poll } from "../poll.js";
import { amend } from "../router.js";
import { TERMINAL } from "../status.js";

const POLL_SECONDS = 1;
const TAIL = 2000; // lines to begin with

export function show(host, context, signal) {
  const view = new LogView(context, signal);
  replace(host, view.element);
  view.start();
  return { update: () => view.tellAttempts() };
}

class LogView {
  constructor(context, signal) {
    Object.assign(this, { context, signal });
    const query = context.route.query;
    this.attempt = Number(query.get("attempt")) || context.job.attempt || 0;
    this.isNewest = this.attempt === context.job.attempt; // and goes on to the next one; who has chosen an older one stays there
    this.worker = query.get("worker") ?? "driver";
    this.store = new LineStore();
    this.list = new LineList({ label: "Log", followed: (isAtEnd) => this.follow.setAttribute("aria-pressed", String(isAtEnd)) });
    this.attempts = h("select", {
      class: "input slim",
      "aria-label": "Attempt",
      on: { change: () => this.choose(Number(this.attempts.value), "driver") },
    });
    this.workers = h("select", {
      class: "input slim",
      "aria-label": "Process",
      on: { change: () => this.choose(this.attempt, this.workers.value) },
    });
    this.find = h("input", {
      class: "input slim",
      type: "search",
      placeholder: "Only lines with …",
      "aria-label": "Only lines with",
      on: { input: () => this.draw() },
    });
    this.follow = h(
      "button",
      { class: "button slim", type: "button", "aria-pressed": "true", on: { click: () => this.list.toEnd() } },
      "Follow",
    );
    this.begin = h(
      "button",
      { class: "button slim", type: "button", on: { click: () => this.restart({ offset: 0 }) } },
      "From the beginning",
    );
    this.note = h("span", { class: "muted small grow", role: "status" });
    this.element = h(
      "section",
      { class: "card", "aria-label": "Logs" },
      h("header", {}, this.attempts, this.workers, this.find, this.follow, this.begin, this.note),
      this.list.element,
    );
  }

  start() {
    this.tellAttempts();
    this.restart({ tail: TAIL });
    poll(() => this.readWorkers(), { seconds: 10, signal: this.signal });
    this.poller = poll(() => this.read(), { seconds: POLL_SECONDS, signal: this.signal, failed: (error) => this.tell(error.message) });
  }

  restart(where) {
    this.where = where; // {tail} or {offset}
    this.round = (this.round ?? 0) + 1;
    this.decoder = new TextDecoder();
    this.isOver = false;
    this.trouble = "";
    this.store.clear();
    this.list.isAtEnd = where.offset !== 0;
    this.begin.hidden = where.offset === 0;
    this.draw();
    this.poller?.soon();
  }

  choose(attempt, worker) {
    this.attempt = attempt;
    this.isNewest = attempt === this.context.job.attempt;
    this.worker = worker;
    amend(["jobs", this.context.id, "logs"], { attempt, worker });
    this.restart({ tail: TAIL });
    this.readWorkers().catch(() => {});
  }

  tellAttempts() {
    const { attempt } = this.context.job;
    const isFollowed = this.attempt === 0 || (this.isNewest && this.list.isAtEnd);
    if (attempt > this.attempt && isFollowed) this.choose(attempt, this.worker);
    const key = `${attempt} ${this.attempt}`;
    if (key === this.attemptsKey) return;
    this.attemptsKey = key;
    replace(
      this.attempts,
      Array.from({ length: attempt }, (_, place) => h("option", { value: attempt - place }, `Attempt ${attempt - place}`)),
    );
    this.attempts.value = String(this.attempt);
    this.attempts.hidden = attempt === 0;
  }

  async readWorkers() {
    if (!this.attempt) return;
    const { workers } = await call(`/jobs/${this.context.id}/logs/workers`, { query: { attempt: this.attempt }, signal: this.signal });
    const there = workers.some(({ worker }) => worker === "driver") ? workers : [{ worker: "driver", bytes: null }, ...workers];
    const options = there.map(({ worker, bytes: size }) => [
      worker,
      `${worker === "driver" ? "Driver" : `Worker ${worker}`}${size === null ? "" : `, ${bytes(size)}`}`,
    ]);
    const key = JSON.stringify(options);
    if (key === this.workersKey || document.activeElement === this.workers) return;
    this.workersKey = key;
    replace(
      this.workers,
      options.map(([worker, text]) => h("option", { value: worker }, text)),
    );
    this.workers.value = this.worker;
  }

  async read() {
    if (this.isOver || !this.attempt) {
      this.tell();
      return;
    }
    const { round } = this;
    const query = { attempt: this.attempt, worker: this.worker, ...this.where };
    const response = await ask(`/jobs/${this.context.id}/logs`, { query, signal: this.signal, headers: { Accept: "text/plain" } });
    const content = await response.arrayBuffer();
    if (round !== this.round) return;
    this.where = { offset: Number(response.headers.get("Maestro-Log-Next-Offset")) };
    this.isOver = response.headers.get("Maestro-Log-End") === "true";
    this.trouble = "";
    if (content.byteLength) {
      this.store.push(this.decoder.decode(content, { stream: true }));
      this.draw();
      this.poller.soon(); // there may be more
    }
    this.tell();
  }

  draw() {
    const wanted = this.find.value.toLowerCase();
    const lines = this.store.all();
    const shown = wanted ? lines.filter((line) => line.toLowerCase().includes(wanted)) : lines;
    this.list.show(shown);
    this.counted = wanted ? `${grouped(shown.length)} of ${grouped(lines.length)} lines` : `${grouped(lines.length)} lines`;
    this.tell();
  }

  tell(trouble = this.trouble) {
    this.trouble = trouble;
    const isEmpty = this.store.lines.length === 0 && this.store.rest === "";
    const dropped = this.store.numDropped ? `, ${grouped(this.store.numDropped)} older ones left out` : "";
    const state = this.isOver ? ", ended" : TERMINAL.has(this.context.job.status) ? "" : ", live";
    if (trouble) say(this.note, trouble);
    else if (!this.attempt) say(this.note, "Nothing is printed before the first attempt.");
    else if (isEmpty) say(this.note, this.isOver ? "It has printed nothing." : "Nothing is printed yet.");
    else say(this.note, `${this.counted}${dropped}${state}`);
  }
}
