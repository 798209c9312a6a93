// The spec as it was resolved, and what was given beside it.

import { h, replace } from "../dom.js";
import { copyButton } from "./copy.js";

export function show(host, context) {
  const { job } = context;
  const rows = flatten(job.spec).map(([path, value]) => h("tr", {}, h("th", { scope: "row" }, path), h("td", {}, h("code", {}, value))));
  replace(
    host,
    job.notes
      ? h(
          "section",
          { class: "card", style: { "margin-bottom": "16px" } },
          h("header", {}, h("h2", {}, "Notes")),
          h("p", { class: "body notes" }, job.notes),
        )
      : null,
    h(
      "section",
      { class: "card" },
      h(
        "header",
        {},
        h("h2", { class: "grow" }, "Spec, with all that it left to its recipe"),
        copyButton(JSON.stringify(job.spec, null, 2), "Copy the spec as JSON"),
      ),
      h(
        "div",
        { class: "scroll", tabindex: "0", role: "region", "aria-label": "Spec" },
        h("table", { class: "spec" }, h("tbody", {}, rows)),
      ),
    ),
  );
  return {};
}

/** [["optim.lr", "0.001"], …]: lists and what is empty stay one value. */
export function flatten(value, path = "") {
  const isSection = value !== null && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length > 0;
  if (!isSection) return [[path, typeof value === "string" ? value : JSON.stringify(value)]];
  return Object.entries(value).flatMap(([key, item]) => flatten(item, path ? `${path}.${key}` : key));
}
