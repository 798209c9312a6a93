// Training states that are kept, why each is, and which are pinned.

import { ask, call } from "../api.js";
import { h, replace } from "../dom.js";
import { bytes, count, grouped, moment, words } from "../format.js";
import { toast } from "../page.js";
import { poll } from "../poll.js";

const POLL_SECONDS = 10;
const SHOWN = 100;

export class States {
  constructor(context, signal) {
    Object.assign(this, { context, signal });
    this.body = h("tbody");
    this.note = h("span", { class: "muted small" });
    const head = ["Step", "Attempt", "Size", "When", "Kept because"].map((text, place) =>
      h("th", { scope: "col", class: place < 3 ? "number" : null }, text),
    );
    const table = h(
      "table",
      {},
      h("thead", {}, h("tr", {}, head, h("th", { scope: "col" }, h("span", { class: "unseen" }, "Pin")))),
      this.body,
    );
    this.element = h(
      "section",
      { class: "card", "aria-label": "Training states", hidden: true },
      h("header", {}, h("h2", { class: "grow" }, "Training states"), this.note),
      h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Training states, as a table" }, table),
    );
    this.poller = poll(() => this.refresh(), { seconds: POLL_SECONDS, signal });
  }

  async refresh() {
    const page = await call(`/jobs/${this.context.id}/checkpoints`, { query: { limit: SHOWN }, signal: this.signal });
    const key = JSON.stringify(page);
    if (key === this.key) return;
    this.key = key;
    this.element.hidden = page.checkpoints.length === 0;
    replace(
      this.note,
      page.num_deleted ? `${count(page.num_deleted, "state goes", "states go")} by the policy: ${bytes(page.bytes_deleted)}` : "",
    );
    replace(
      this.body,
      page.checkpoints.map((state) => this.row(state)),
    );
  }

  row(state) {
    const why = state.kept_because.map(words).join(", ") || "nothing: it goes";
    const pin = h(
      "button",
      {
        class: "button slim",
        type: "button",
        "aria-pressed": String(state.pinned),
        "aria-label": `Pin the state of step ${state.step}`,
        on: { click: () => this.pin(state) },
      },
      state.pinned ? "Pinned" : "Pin",
    );
    const figures = [grouped(state.step), state.attempt, bytes(state.bytes)].map((text) => h("td", { class: "number" }, text));
    return h(
      "tr",
      {},
      figures,
      h("td", { class: "nowrap" }, moment(state.created_at)),
      h("td", {}, why),
      h("td", { class: "number" }, pin),
    );
  }

  async pin({ name, pinned }) {
    try {
      await ask(`/jobs/${this.context.id}/artifacts/${name.split("/").map(encodeURIComponent).join("/")}/pin`, {
        method: pinned ? "DELETE" : "PUT",
      });
    } catch (error) {
      toast(error.message, "bad");
    }
    this.poller.soon();
  }
}
