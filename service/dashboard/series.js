// Series as the service tells them, as curves that can be drawn: numbers, gaps, and what is not finite.

const NOT_FINITE = { NaN: NaN, Infinity: Infinity, "-Infinity": -Infinity };
const GAP_FACTOR = 12; // steps this many times the usual distance apart are not joined
const WINDOW = 25; // values that a smoothed one is made of
const WINDOW_SHARE = 0.2; // of all values at most: of few, the median of 25 would be one flat line

/** {xs, ys, odd}: ys has null where a value is not finite; odd lists these, as {x, value}. `toX` makes a place of a step. */
export function curveOf({ steps, values }, toX = (step) => step) {
  const xs = [];
  const ys = [];
  const odd = [];
  for (const [place, step] of steps.entries()) {
    const raw = values[place];
    const value = typeof raw === "string" ? NOT_FINITE[raw] : raw;
    xs.push(toX(step));
    ys.push(Number.isFinite(value) ? value : null);
    if (!Number.isFinite(value)) odd.push({ x: xs.at(-1), value });
  }
  return { xs, ys, odd };
}

/** The same with a null between points that are unusually far apart. */
export function withGaps(curve) {
  const distances = curve.xs.slice(1).map((x, place) => x - curve.xs[place]);
  const usual = median(distances);
  if (!(usual > 0)) return curve;
  const xs = [];
  const ys = [];
  for (const [place, x] of curve.xs.entries()) {
    if (place > 0 && distances[place - 1] > usual * GAP_FACTOR) {
      xs.push((x + curve.xs[place - 1]) / 2);
      ys.push(null);
    }
    xs.push(x);
    ys.push(curve.ys[place]);
  }
  return { ...curve, xs, ys };
}

/** Each value as the median of those round it: spikes do not move it. Holes stay holes. */
export function smooth(ys, window = Math.min(WINDOW, ys.length * WINDOW_SHARE)) {
  const half = Math.max(Math.floor((window - 1) / 2), 0);
  return ys.map((y, place) =>
    y === null ? null : median(ys.slice(Math.max(0, place - half), place + half + 1).filter((value) => value !== null)),
  );
}

export function median(values) {
  if (values.length === 0) return null;
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** The value at x, on straight lines between points; null outside of them. */
export function valueAt(xs, ys, x) {
  if (xs.length === 0 || x < xs[0] || x > xs.at(-1)) return null;
  let low = 0;
  let high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle;
    else high = middle;
  }
  if (xs[high] <= x) return ys[high];
  if (ys[low] === null || ys[high] === null || xs[high] === xs[low]) return ys[low];
  return ys[low] + ((ys[high] - ys[low]) * (x - xs[low])) / (xs[high] - xs[low]);
}

/** What there is to say of a curve in words. */
export function summary({ xs, ys, odd }) {
  const known = ys.filter((y) => y !== null);
  if (known.length === 0) return { last: null, low: null, high: null, numOdd: odd.length, count: 0 };
  let [low, high] = [Infinity, -Infinity];
  for (const y of known) [low, high] = [Math.min(low, y), Math.max(high, y)];
  return { last: known.at(-1), lastX: xs.at(-1), low, high, numOdd: odd.length, count: known.length };
}
