// What curves lie over: steps, epochs, or hours of training.

import { valueAt } from "./series.js";

export const AXES = [
  ["step", "Steps"],
  ["epoch", "Epochs"],
  ["time", "Hours trained"],
];

/** {name, toX(step), toStep(x)} for a job. Steps, where the job does not say enough for another one. `speed`: its images_per_second. */
export function axisOf(name, job, speed) {
  if (name === "epoch") {
    const perEpoch = stepsPerEpoch(job);
    if (perEpoch) return { name, toX: (step) => step / perEpoch, toStep: (x) => Math.round(x * perEpoch) };
  }
  if (name === "time" && speed?.steps.length && job.spec.optim?.batch_size) return timeAxis(speed, job.spec.optim.batch_size);
  return { name: "step", toX: (step) => step, toStep: (x) => Math.round(x) };
}

/** Steps of an epoch; null where the job has none, or has not begun. */
export function stepsPerEpoch(job) {
  const epochs = job.spec.optim?.epochs;
  return epochs && job.progress?.num_steps ? job.progress.num_steps / epochs : null;
}

/** The time that the steps took, by the speed told at each: pauses and lost work are none of it. */
function timeAxis(speed, batch) {
  const steps = [0];
  const hours = [0];
  for (const [place, step] of speed.steps.entries()) {
    const rate = Number(speed.values[place]);
    const before = steps.at(-1);
    if (!(rate > 0) || !Number.isFinite(rate) || step <= before) continue;
    hours.push(hours.at(-1) + ((step - before) * batch) / rate / 3600);
    steps.push(step);
  }
  const beyond = hours.at(-1) / (steps.at(-1) || 1);
  return {
    name: "time",
    toX: (step) => valueAt(steps, hours, step) ?? step * beyond,
    toStep: (x) => Math.round(valueAt(hours, steps, x) ?? x / (beyond || 1)),
  };
}
