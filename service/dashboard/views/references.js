// Which curve a run is held against: a finished job of its project that somebody has pinned, or one that was published.

import { call } from "../api.js";
import { stepsPerEpoch } from "../axis.js";
import { h, replace } from "../dom.js";
import { LABEL, PUBLISHED } from "../reference.js";
import { curveOf } from "../series.js";

const NONE = "none";

export class ReferenceChoice {
  /** `changed()` when another curve is there. Without a choice it is the newest pinned job of this kind. */
  constructor(context, signal, changed) {
    Object.assign(this, { context, signal, changed });
    this.curve = null; // over epochs
    this.name = "";
    this.isPublished = false;
    this.select = h("select", { class: "input slim", on: { change: () => this.choose(this.select.value) } });
    this.element = h("label", { class: "reference" }, h("span", { class: "muted small" }, "Reference"), this.select);
    this.element.hidden = context.job.kind === "embed" || context.job.kind === "evaluate";
    this.load();
  }

  async load() {
    const { job, id } = this.context;
    const query = { label: LABEL, kind: job.kind, status: "succeeded", project: job.project, limit: 50, fields: "id,name,labels" };
    const { jobs } = await call("/jobs", { query, signal: this.signal }).catch(() => ({ jobs: [] }));
    if (this.signal.aborted) return;
    const pinned = jobs.filter((other) => other.id !== id);
    const published =
      job.kind === "pretrain" ? PUBLISHED : [{ id: "published:accuracy", name: "MAE, published accuracy", curve: () => null }];
    this.options = [...pinned.map((other) => ({ id: other.id, name: other.labels[LABEL] || other.name })), ...published];
    replace(
      this.select,
      h("option", { value: NONE }, "none"),
      this.options.map((option) => h("option", { value: option.id }, option.name)),
    );
    await this.choose(pinned[0]?.id ?? NONE);
  }

  async choose(id) {
    this.select.value = id;
    const chosen = this.options.find((option) => option.id === id);
    this.isPublished = id.startsWith("published:");
    this.name = chosen?.name ?? "";
    if (!chosen) this.curve = null;
    else this.curve = chosen.curve ? chosen.curve() : await this.curveOfJob(id);
    if (!this.signal.aborted) this.changed();
  }

  async curveOfJob(id) {
    try {
      const [job, { series }] = await Promise.all([
        call(`/jobs/${id}`, { signal: this.signal }),
        call(`/jobs/${id}/metrics`, { query: { names: "loss" }, signal: this.signal }),
      ]);
      const perEpoch = stepsPerEpoch(job);
      return perEpoch && series.loss ? curveOf(series.loss, (step) => step / perEpoch) : null;
    } catch {
      return null;
    }
  }
}
