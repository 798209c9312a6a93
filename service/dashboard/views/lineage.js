// Where a job's encoder comes from, and what was made of its own: pretraining, probes, fine-tunings.

import { call } from "../api.js";
import { h, replace } from "../dom.js";
import { percent } from "../format.js";
import { link } from "../router.js";
import { badge } from "../status.js";

const REFRESH_SECONDS = 15;

export class Lineage {
  constructor(context, signal) {
    Object.assign(this, { context, signal });
    this.tree = h("ul", { class: "tree" });
    this.element = h(
      "section",
      { class: "card lineage", "aria-label": "Lineage", hidden: true },
      h("header", {}, h("h2", {}, "Lineage")),
      h("div", { class: "body scroll", tabindex: "0", role: "group", "aria-label": "Lineage, as a tree" }, this.tree),
    );
    this.at = 0;
  }

  /** Read again now and then: others may start from this job's result. */
  async draw() {
    if (Date.now() - this.at < REFRESH_SECONDS * 1000) return;
    this.at = Date.now();
    const found = await call(`/jobs/${this.context.id}/lineage`, { signal: this.signal }).catch(() => null);
    if (!found) return;
    this.element.hidden = found.ancestors.length + found.descendants.length === 0;
    const { job } = this.context;
    const own = { ...job, metrics: job.metrics };
    let branch = this.branch(own, found.descendants, true);
    for (const ancestor of found.ancestors.reverse()) branch = h("li", {}, this.card(ancestor, false), h("ul", {}, branch));
    replace(this.tree, branch, found.is_whole ? null : h("li", { class: "muted small" }, "… and more"));
  }

  branch(job, all, isHere = false) {
    const children = all.filter(({ parent }) => parent === job.id);
    return h(
      "li",
      {},
      this.card(job, isHere),
      children.length
        ? h(
            "ul",
            {},
            children.map((child) => this.branch(child, all)),
          )
        : null,
    );
  }

  card(job, isHere) {
    const accuracy = job.metrics?.accuracy ?? job.metrics?.probe_accuracy ?? job.metrics?.knn_accuracy;
    const parts = [
      h("span", { class: "muted small" }, job.kind),
      h("strong", {}, job.name),
      badge(job.status),
      typeof accuracy === "number" ? h("span", { class: "figures small" }, percent(accuracy, 1)) : null,
    ];
    return isHere
      ? h("span", { class: "leaf here", "aria-current": "true" }, parts)
      : h("a", { class: "leaf", href: link(["jobs", job.id]) }, parts);
  }
}
