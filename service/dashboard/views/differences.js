// In what several jobs differ: their specs, and what came of them.

import { h, replace } from "../dom.js";
import { measure } from "../format.js";
import { flatten } from "./spec.js";

/** The colour of a job by its place: the name of the property, or what CSS takes. */
export function colour(place, form) {
  const name = `--curve-${(place % 6) + 1}`;
  return form === "var" ? `var(${name})` : name;
}

export class Differences {
  constructor() {
    this.element = h("section", { class: "card", "aria-label": "Differences", hidden: true });
  }

  show(jobs) {
    this.element.hidden = jobs.length < 2;
    if (jobs.length < 2) return;
    const specs = jobs.map((job) => new Map([...flatten(job.spec), ...(job.metrics ? flatten(job.metrics, "result") : [])]));
    const all = [...new Set(specs.flatMap((spec) => [...spec.keys()]))].filter((path) => path !== "name");
    const paths = all.filter((path) => new Set(specs.map((spec) => spec.get(path))).size > 1);
    const values = paths.map((path) => specs.map((spec) => shorten(spec.get(path))));
    const key = JSON.stringify([jobs.map(({ name }) => name), paths, values]);
    if (key === this.key) return;
    this.key = key;
    replace(
      this.element,
      h("header", {}, h("h2", {}, "In what they differ")),
      paths.length ? table(jobs, paths, values) : h("p", { class: "empty" }, "In nothing but their names."),
    );
  }
}

function table(jobs, paths, values) {
  const names = jobs.map((job, place) =>
    h("th", { scope: "col" }, h("span", { class: "key", style: { "--key": colour(place, "var") } }, job.name)),
  );
  const rows = paths.map((path, place) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, path),
      values[place].map((value) => h("td", {}, h("code", {}, value))),
    ),
  );
  const head = h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Field"), names));
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": "Differences of the specs" },
    h("table", { class: "spec" }, head, h("tbody", {}, rows)),
  );
}

function shorten(value) {
  if (value === undefined) return "–";
  return /^-?\d+\.\d{5,}$/.test(value) ? measure(Number(value)) : value;
}
