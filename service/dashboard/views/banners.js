// What a job's user should know first: why it failed and what to do, why it waits, what is amiss, and whether it has left its reference.

import { h } from "../dom.js";
import { ago, measure, words } from "../format.js";
import { ICONS, TERMINAL, icon } from "../status.js";

export function banners(view) {
  const { job } = view;
  const found = [];
  if (job.status === "failed")
    found.push(banner("bad", `Failed: ${words(job.reason ?? "unknown")}`, [job.reason_message, job.detail, ...remedy(view)], "alert"));
  else if (job.status === "cancelled" || job.status === "paused")
    found.push(banner("quiet", job.reason_message ?? job.status, [job.detail]));
  else if (job.reason)
    found.push(banner(job.status === "recovering" ? "warn" : "live", capital(words(job.reason)), [job.reason_message, job.detail]));
  for (const [name, condition] of Object.entries(job.conditions))
    found.push(banner("warn", capital(words(name)), [condition.message, `Since ${ago(condition.since, Date.now()).replace(" ago", "")}: ${condition.detail}`]));
  if (view.departure) found.push(departed(view));
  return found;
}

function banner(tone, heading, lines, role = null) {
  const told = [...new Set(lines.filter(Boolean))];
  return h(
    "div",
    { class: `banner tone-${tone}`, role },
    icon(ICONS.warning),
    h(
      "div",
      { class: "grow" },
      h("strong", {}, heading),
      told.map((line) => h("p", { class: "detail" }, line)),
    ),
  );
}

/** What the last failure of an attempt was, where the reason is that there were too many. */
function remedy(view) {
  if (view.job.reason !== "retries_exhausted") return [];
  const failed = view.events.filter(({ type, data }) => type === "attempt_ended" && data.reason);
  return failed.slice(-1).map(({ attempt, data }) => `Attempt ${attempt}: ${words(data.reason)}${data.message ? `, ${data.message}` : ""}`);
}

function departed({ departure: { side, since, name }, job }) {
  const verb = TERMINAL.has(job.status) ? "ended" : "is";
  return banner(side === "above" ? "warn" : "live", `The loss ${verb} ${side} its reference`, [
    `It left the band of “${name}” at epoch ${measure(since, 3)}, and has not come back.`,
  ]);
}

function capital(text) {
  return text[0].toUpperCase() + text.slice(1);
}
