// A job's time from end to end: how long it was in which status, its attempts, and what happened when.

import { h, replace } from "../dom.js";
import { duration, measure, moment, words } from "../format.js";
import { TERMINAL, tone } from "../status.js";

const TOLD = {
  workers_failed: "bad",
  run_hung: "bad",
  run_failed: "bad",
  went_back: "bad",
  steps_dropped: "bad",
  save_failed: "warn",
  upload_delayed: "warn",
  images_skipped: "warn",
  evaluated: "good",
  training_state_committed: "quiet",
  result_committed: "good",
  workers_started: "live",
  cancel_requested: "warn",
  pause_requested: "warn",
  resume_requested: "live",
};
const LASTING = new Set(["status_changed", "attempt_created", "attempt_ended"]); // without these the time has no beginning
const MAX_MARKS = 300;

export class Timeline {
  constructor(context) {
    this.context = context;
    this.bands = h("div", { class: "bands" });
    this.tries = h("div", { class: "bands tries" });
    this.ticks = h("div", { class: "ticks" });
    this.scale = h("div", { class: "scale muted figures", "aria-hidden": "true" });
    this.legend = h("div", { class: "keys-line" });
    this.words = h("p", { class: "unseen" });
    this.element = h(
      "section",
      { class: "card timeline", "aria-label": "Time" },
      h("header", {}, h("h2", {}, "Time"), this.legend),
      h("div", { class: "body" }, this.words, this.bands, this.tries, this.ticks, this.scale),
    );
  }

  draw() {
    const { job, events } = this.context;
    const begin = Date.parse(job.created_at);
    const end = Math.max(
      job.finished_at ? Date.parse(job.finished_at) : Date.now(),
      begin + 1000,
      ...events.slice(-1).map(({ at }) => Date.parse(at)),
    );
    const at = (time) => ((Math.min(Math.max(time, begin), end) - begin) / (end - begin)) * 100;
    const spans = stretches(job, events, end);
    replace(
      this.bands,
      spans.map((span) => bar(at, span, span.status, `tone-${tone(span.status)} ${span.status}`, span.status)),
    );
    const tries = attempts(events, end);
    this.tries.hidden = tries.length < 2;
    replace(
      this.tries,
      tries.map((span) =>
        bar(
          at,
          span,
          `attempt ${span.number}${span.reason ? `: ${words(span.reason)}` : ""}`,
          span.reason ? "tone-bad" : "tone-try",
          String(span.number),
        ),
      ),
    );
    const marks = events.filter(({ type }) => type in TOLD).slice(-MAX_MARKS);
    replace(
      this.ticks,
      marks.map((event) =>
        h("span", {
          class: `tick tone-${TOLD[event.type]}`,
          title: `${sentence(event)}, ${moment(event.at)}`,
          style: { left: `${at(Date.parse(event.at))}%` },
        }),
      ),
    );
    replace(
      this.scale,
      [0, 0.25, 0.5, 0.75, 1].map((part) => h("span", {}, part === 0 ? "submitted" : duration(((end - begin) / 1000) * part))),
    );
    this.tell(spans, tries);
  }

  tell(spans, tries) {
    const times = new Map();
    for (const { status, from, to } of spans) times.set(status, (times.get(status) ?? 0) + (to - from) / 1000);
    const told = [...times].filter(([status, seconds]) => seconds >= 0.5 && !TERMINAL.has(status));
    replace(
      this.legend,
      told.map(([status, seconds]) =>
        h("span", { class: `key block tone-${tone(status)} ${status}` }, `${status} `, h("span", { class: "figures muted" }, duration(seconds))),
      ),
    );
    replace(this.words, `${told.map(([status, seconds]) => `${status} for ${duration(seconds)}`).join(", ")}. ${tries.length} attempts.`);
  }
}

function bar(at, { from, to }, title, look, text) {
  const width = at(to) - at(from);
  return h(
    "span",
    {
      class: `band ${look}`,
      title: `${title}, ${duration((to - from) / 1000)}`,
      style: { left: `${at(from)}%`, width: `max(2px, ${width}%)` },
    },
    width > 9 ? text : "",
  );
}

/** Adds an event; of more than `limit` the oldest goes that is neither of a status nor of an attempt. */
export function keep(events, event, limit) {
  events.push(event);
  if (events.length <= limit) return;
  const oldest = events.findIndex(({ type }) => !LASTING.has(type));
  if (oldest !== -1) events.splice(oldest, 1);
}

/** {status, from, to}, one after the other. */
export function stretches(job, events, end) {
  const changes = events.filter(({ type }) => type === "status_changed");
  const spans = [{ status: "queued", from: Date.parse(job.created_at) }];
  for (const { at, data } of changes) {
    spans.at(-1).to = Date.parse(at);
    spans.push({ status: data.to, from: Date.parse(at) });
  }
  spans.at(-1).to = end;
  return spans.filter(({ status, from, to }) => to > from && !TERMINAL.has(status));
}

/** {number, from, to, reason} */
export function attempts(events, end) {
  const found = new Map();
  for (const { type, attempt, at, data } of events) {
    if (type === "attempt_created") found.set(attempt, { number: attempt, from: Date.parse(at), to: end });
    if (type === "attempt_ended" && found.has(attempt)) Object.assign(found.get(attempt), { to: Date.parse(at), reason: data.reason });
  }
  return [...found.values()];
}

/** An event in a few words. */
export function sentence({ type, data }) {
  const name = words(type);
  if (type === "status_changed") return `${data.from} → ${data.to}${data.reason ? `: ${words(data.reason)}` : ""}`;
  if (type === "evaluated")
    return `evaluated at step ${data.step}: ${Object.entries(data.metrics ?? {})
      .map(([metric, value]) => `${words(metric)} ${measure(value)}`)
      .join(", ")}`;
  if (data.reason) return `${name}: ${words(data.reason)}`;
  if (data.step !== undefined) return `${name} at step ${data.step}`;
  if (data.count !== undefined) return `${name}: ${data.count}`;
  return name;
}
