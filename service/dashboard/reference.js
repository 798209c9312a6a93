// Reference curves: what a run's loss is held against, and when it has left the band.
//
// The band round a reference, at each epoch: its smoothed loss (the median of 25 points, or of a fifth of all where they are few) plus and minus
// the larger of a tenth of it and six times the median distance of its raw points from that. A run is outside where its own smoothed loss
// is, or a loss that is not finite.

import { median, smooth, valueAt } from "./series.js";

export const LABEL = "reference"; // a finished job with this label is a reference of its project; the label's value is its name
const SHARE = 0.1;
const DEVIATIONS = 6;
const GRACE = 5; // points in a row that are outside before it is told

/** {xs, centre, low, high} of a curve over epochs. */
export function bandOf({ xs, ys }) {
  const known = ys.map((y, place) => [xs[place], y]).filter(([, y]) => y !== null);
  const places = known.map(([x]) => x);
  const raw = known.map(([, y]) => y);
  const centre = smooth(raw);
  const spread = DEVIATIONS * (median(raw.map((y, place) => Math.abs(y - centre[place]))) ?? 0);
  const width = centre.map((y) => Math.max(SHARE * Math.abs(y), spread));
  return { xs: places, centre, low: centre.map((y, place) => y - width[place]), high: centre.map((y, place) => y + width[place]) };
}

/** `above`, `below` or `inside`; null where the reference says nothing of that epoch. */
export function sideOf(band, x, y) {
  const low = valueAt(band.xs, band.low, x);
  const high = valueAt(band.xs, band.high, x);
  if (low === null || high === null) return null;
  if (!Number.isFinite(y)) return "above";
  return y > high ? "above" : y < low ? "below" : "inside";
}

/** Where a curve is outside now: {side, since} of the stretch at its end; null while it is inside. */
export function departure(band, { xs, ys, odd }) {
  const last = odd.at(-1);
  if (last && last.x >= (xs.at(-1) ?? 0)) return { side: "above", since: last.x };
  const smoothed = smooth(ys);
  let found = null;
  let length = 0;
  for (let place = xs.length - 1; place >= 0; place -= 1) {
    if (smoothed[place] === null) continue;
    const side = sideOf(band, xs[place], smoothed[place]);
    if (side === null) continue;
    if (side === "inside" || (found && side !== found.side)) break;
    found = { side, since: xs[place] };
    length += 1;
  }
  return length >= Math.min(GRACE, xs.length) ? found : null;
}

/** Losses at the end of each epoch with the authors' code, as users have published them (ViT-B, norm_pix, ImageNet). */
const PAPER_LOSS = [0.95, 0.782, 0.757, 0.727, 0.703, 0.681, 0.653, 0.635, 0.618, 0.602, 0.588, null, 0.568];

/** Curves that no job of this service has made. `band` widths follow the same rule. */
export const PUBLISHED = [
  {
    id: "published:mae-base-loss",
    name: "MAE, ViT-B on ImageNet, first epochs",
    curve: () => ({ xs: PAPER_LOSS.map((_, epoch) => epoch + 1), ys: PAPER_LOSS, odd: [] }),
  },
];

/** Accuracies that the paper and its repository publish, by what measures them and the size of the model (ImageNet-1K, 1600 epochs). */
export const PUBLISHED_ACCURACY = {
  probe: { base: 0.68, large: 0.758, huge: 0.766 },
  finetune: { base: 0.836, large: 0.859, huge: 0.869 },
};

/** The published accuracy for a job, or null. */
export function publishedAccuracy(job) {
  const size = /^vit_(base|large|huge)_/.exec(job.spec.model?.arch ?? "")?.[1];
  const kind = job.kind === "finetune" ? "finetune" : "probe";
  return size ? PUBLISHED_ACCURACY[kind][size] : null;
}
