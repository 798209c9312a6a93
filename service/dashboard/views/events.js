// What happened, newest first.

import { h, replace } from "../dom.js";
import { ago, moment, words } from "../format.js";
import { sentence } from "./timeline.js";

const SHOWN = 500;

export function show(host, context) {
  const body = h("tbody");
  const note = h("span", { class: "muted small" });
  replace(
    host,
    h(
      "section",
      { class: "card" },
      h("header", {}, h("h2", { class: "grow" }, "Events"), note),
      h(
        "div",
        { class: "scroll", tabindex: "0", role: "region", "aria-label": "Events" },
        h(
          "table",
          {},
          h(
            "thead",
            {},
            h(
              "tr",
              {},
              h("th", { scope: "col" }, "When"),
              h("th", { scope: "col", class: "number" }, "Attempt"),
              h("th", { scope: "col" }, "What"),
              h("th", { scope: "col" }, "Details"),
            ),
          ),
          body,
        ),
      ),
    ),
  );
  let drawn = 0;
  const update = () => {
    const last = context.events.at(-1)?.id ?? 0;
    if (last === drawn) return;
    drawn = last;
    replace(body, context.events.slice(-SHOWN).reverse().map(row));
    replace(note, context.events.length > SHOWN ? `the newest ${SHOWN} of ${context.events.length}` : "");
  };
  update();
  return { update };
}

function row(event) {
  const details = Object.entries(event.data)
    .filter(([key, value]) => value !== null && !["from", "to", "step"].includes(key))
    .map(([key, value]) => `${words(key)}: ${typeof value === "string" ? value : JSON.stringify(value)}`)
    .join("\n");
  return h(
    "tr",
    {},
    h("td", { class: "nowrap", title: moment(event.at) }, ago(event.at)),
    h("td", { class: "number" }, event.attempt ?? ""),
    h("td", {}, sentence(event)),
    h("td", { class: "details" }, h("code", {}, details.slice(0, 2000))),
  );
}
