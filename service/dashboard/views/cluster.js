// What the cluster has, and who holds it.

import { Watched } from "../api.js";
import { h, replace, say } from "../dom.js";
import { ago, count, measure, moment } from "../format.js";
import { title } from "../page.js";
import { poll } from "../poll.js";
import { link } from "../router.js";

const POLL_SECONDS = 5;

export function show(main, route, signal) {
  title("Cluster");
  const note = h("div", { class: "sub", role: "status" }, "Asking Ray …");
  const content = h("div", { class: "stack" });
  replace(main, h("div", { class: "head" }, h("div", { class: "grow" }, h("h1", { tabindex: "-1" }, "Cluster"), note)), content);
  const watched = new Watched();

  async function refresh() {
    const { data } = await watched.get("/cluster", { signal });
    const waiting = data.num_waiting ? `, ${count(data.num_waiting, "job waits", "jobs wait")} for devices` : "";
    say(note, `${count(data.nodes.length, "machine")}, ${count(data.runs.length, "run")} under way${waiting}`);
    replace(
      content,
      h("div", { class: "devices" }, device("GPUs", "num_gpus", data), device("CPUs", "num_cpus", data)),
      runs(data),
      machines(data),
    );
  }

  poll(refresh, { seconds: POLL_SECONDS, signal, failed: (error) => say(note, error.message) });
}

function device(name, field, { total, used, runs, other_runs: others }) {
  const [all, taken] = [total[field], used[field]];
  const shares = runs
    .filter((run) => run[field] > 0)
    .map((run) => h("span", { class: "share", title: `${run.name}: ${measure(run[field])} ${name}`, style: { "flex-grow": run[field] } }));
  const ours = runs.reduce((sum, run) => sum + run[field], 0) + others[field];
  const rest = Math.max(0, all - Math.max(taken, ours));
  const elsewhere = Math.max(0, taken - ours);
  return h(
    "section",
    { class: "card device", "aria-label": name },
    h(
      "div",
      { class: "row" },
      h("h2", { class: "grow" }, name),
      h(
        "span",
        { class: "figures" },
        all ? h("strong", {}, measure(Math.max(taken, ours))) : "none",
        all ? ` of ${measure(all)} in use` : "",
      ),
    ),
    h(
      "div",
      { class: "shares", "aria-hidden": "true" },
      shares,
      others[field] > 0
        ? h("span", { class: "share others", title: `other projects: ${measure(others[field])}`, style: { "flex-grow": others[field] } })
        : null,
      elsewhere > 0
        ? h("span", { class: "share others", title: `others in Ray: ${measure(elsewhere)}`, style: { "flex-grow": elsewhere } })
        : null,
      h("span", { class: "share free", style: { "flex-grow": rest || (all ? 0 : 1) } }),
    ),
  );
}

function runs({ runs: all, other_runs: others }) {
  const rows = all.map((run) =>
    h(
      "tr",
      {},
      h("td", {}, h("a", { href: link(["jobs", run.job]) }, run.name)),
      h("td", { class: "number" }, run.attempt),
      h("td", { class: "number" }, measure(run.num_gpus)),
      h("td", { class: "number" }, measure(run.num_cpus)),
      h("td", { class: "number nowrap", title: moment(run.since) }, ago(run.since)),
    ),
  );
  if (others.num_cpus || others.num_gpus)
    rows.push(
      h(
        "tr",
        {},
        h("td", { class: "muted" }, "runs of other projects"),
        h("td"),
        h("td", { class: "number" }, measure(others.num_gpus)),
        h("td", { class: "number" }, measure(others.num_cpus)),
        h("td"),
      ),
    );
  return section("Who holds it", ["Job", "Attempt", "GPUs", "CPUs", "Since"], rows, "Nobody: all of it is free.");
}

function machines({ nodes }) {
  const rows = nodes.map((node) =>
    h(
      "tr",
      {},
      h(
        "td",
        {},
        h("code", {}, node.id.slice(0, 12)),
        node.is_head ? h("span", { class: "chip", style: { "margin-left": "8px" } }, "head") : null,
      ),
      h("td", { class: "number" }, measure(node.num_gpus)),
      h("td", { class: "number" }, measure(node.num_cpus)),
    ),
  );
  return section("Machines", ["Machine", "GPUs", "CPUs"], rows, "Ray tells of no machine.");
}

function section(heading, columns, rows, none) {
  const head = h(
    "tr",
    {},
    columns.map((text, place) => h("th", { scope: "col", class: place ? "number" : null }, text)),
  );
  const table = h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": heading },
    h("table", {}, h("thead", {}, head), h("tbody", {}, rows)),
  );
  return h("section", { class: "card" }, h("header", {}, h("h2", {}, heading)), rows.length ? table : h("p", { class: "empty" }, none));
}
