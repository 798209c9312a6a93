// Which runs of a list are outside of their reference's band now, by the loss that they told last.

import { call } from "../api.js";
import { stepsPerEpoch } from "../axis.js";
import { LABEL, bandOf, sideOf } from "../reference.js";
import { curveOf } from "../series.js";
import { TERMINAL } from "../status.js";

const KEPT_MINUTES = 5;

export class Marks {
  constructor(signal) {
    this.signal = signal;
    this.bands = new Map(); // project and kind → {at, band}
  }

  /** Reads what is needed for these jobs, at most every few minutes. Whether anything is other than before. */
  async look(jobs) {
    const wanted = new Map(jobs.filter((job) => job.progress && !TERMINAL.has(job.status)).map((job) => [keyOf(job), job]));
    const old = [...wanted].filter(([key]) => Date.now() - (this.bands.get(key)?.at ?? 0) > KEPT_MINUTES * 60_000);
    await Promise.all(old.map(async ([key, job]) => this.bands.set(key, { at: Date.now(), ...(await this.read(job)) })));
    return old.length > 0;
  }

  /** The newest reference of a job's project and kind. */
  async read({ project, kind }) {
    try {
      const query = { label: LABEL, kind, project, status: "succeeded", limit: 1, fields: "id" };
      const [found] = (await call("/jobs", { query, signal: this.signal })).jobs;
      if (!found) return {};
      const job = await call(`/jobs/${found.id}`, { signal: this.signal });
      const { series } = await call(`/jobs/${found.id}/metrics`, { query: { names: "loss" }, signal: this.signal });
      const perEpoch = stepsPerEpoch(job);
      return perEpoch && series.loss
        ? { band: bandOf(curveOf(series.loss, (step) => step / perEpoch)), name: job.labels[LABEL] || job.name }
        : {};
    } catch {
      return {}; // a list without marks is a list
    }
  }

  /** {side, name}, or null while a job is inside of it, or has none. */
  of(job) {
    const found = this.bands.get(keyOf(job));
    if (!found?.band || !job.progress || TERMINAL.has(job.status)) return null;
    const { epoch, loss } = job.progress;
    if (loss === null) return null;
    const side = sideOf(found.band, epoch, typeof loss === "string" ? NaN : loss);
    return side === "above" || side === "below" ? { side, name: found.name } : null;
  }
}

function keyOf({ project, kind }) {
  return `${project} ${kind}`;
}
