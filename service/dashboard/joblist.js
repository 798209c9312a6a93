// The jobs that are at hand, newest first: pages of a list that goes on changing while it is read.

/** No page tells of a deletion: what a page should have and has not, is gone. */
export class JobList {
  constructor() {
    this.clear();
  }

  clear() {
    this.byId = new Map();
    this.cursor = undefined; // null: these are all
  }

  get size() {
    return this.byId.size;
  }

  /** The first page, as it is now. */
  refresh({ jobs, next_cursor: cursor }) {
    const known = this.cursor !== undefined;
    const overlaps = jobs.some((job) => this.byId.has(job.id));
    if (!known || !overlaps || cursor === null) {
      this.byId = new Map(jobs.map((job) => [job.id, job]));
      this.cursor = cursor;
      return;
    }
    const last = jobs.at(-1);
    const older = [...this.byId.values()].filter((job) => isOlder(job, last));
    this.byId = new Map([...jobs, ...older].map((job) => [job.id, job]));
    if (older.length === 0) this.cursor = cursor;
  }

  /** The page after all that are here. */
  append({ jobs, next_cursor: cursor }) {
    for (const job of jobs) this.byId.set(job.id, job);
    this.cursor = cursor;
  }

  /** News of jobs, where they are here. */
  update(jobs) {
    for (const job of jobs) if (this.byId.has(job.id)) this.byId.set(job.id, { ...this.byId.get(job.id), ...job });
  }

  remove(id) {
    this.byId.delete(id);
  }

  /** `{column, isDescending}`; what has no value comes last. */
  sorted({ column, isDescending }) {
    const jobs = [...this.byId.values()];
    const value = VALUES[column];
    if (!value || (column === "created" && isDescending)) return jobs;
    const sign = isDescending ? -1 : 1;
    return jobs
      .map((job) => [value(job), job])
      .sort(([a], [b]) => compare(a, b, sign))
      .map(([, job]) => job);
  }
}

function isOlder(job, other) {
  return job.created_at < other.created_at || (job.created_at === other.created_at && job.id < other.id);
}

const VALUES = {
  name: (job) => job.name.toLowerCase(),
  status: (job) => job.status,
  kind: (job) => job.kind,
  progress: (job) => share(job),
  loss: (job) => figure(job.progress?.loss),
  speed: (job) => figure(job.progress?.images_per_second),
  eta: (job) => (job.finished_at ? null : figure(job.progress?.eta_seconds)),
  created: (job) => job.created_at,
};

/** JSON has no number that is not finite: these come as strings. */
function figure(value) {
  return typeof value === "string" ? Number(value) : value;
}

function compare(a, b, sign) {
  const isNone = (value) => value === null || value === undefined || Number.isNaN(value);
  if (isNone(a) || isNone(b)) return isNone(a) - isNone(b);
  return a < b ? -sign : a > b ? sign : 0;
}

/** How much of a run is done, 0 to 1; null where it has not begun. */
export function share(job) {
  return job.progress ? Math.min(job.progress.step / job.progress.num_steps, 1) : null;
}
