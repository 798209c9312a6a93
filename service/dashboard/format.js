// Numbers, times and sizes as people read them.

const NOTHING = "–";
const UNITS = [
  ["d", 86400],
  ["h", 3600],
  ["min", 60],
  ["s", 1],
];

/** `2 d 3 h`, `12 min`, `45 s`: the largest unit, and the next one while it says something. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return NOTHING;
  const whole = Math.max(0, Math.round(seconds));
  const first = UNITS.findIndex(([, size]) => whole >= size);
  if (first === -1) return "0 s";
  const [unit, size] = UNITS[first];
  const count = Math.floor(whole / size);
  const next = UNITS[first + 1];
  const rest = next && count < 10 ? Math.floor((whole - count * size) / next[1]) : 0;
  return rest > 0 ? `${count} ${unit} ${rest} ${next[0]}` : `${count} ${unit}`;
}

/** How long ago: `5 min ago`. */
export function ago(iso, now = Date.now()) {
  if (!iso) return NOTHING;
  const seconds = (now - Date.parse(iso)) / 1000;
  return seconds < 2 ? "just now" : `${duration(seconds)} ago`;
}

/** Seconds between two times; the second may be yet to come. */
export function between(from, to, now = Date.now()) {
  return from ? ((to ? Date.parse(to) : now) - Date.parse(from)) / 1000 : null;
}

/** Date and time in the reader's own zone. */
export function moment(iso) {
  return iso ? new Date(iso).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "medium" }) : NOTHING;
}

/** A measured value, to some significant digits; NaN and infinity by name. */
export function measure(value, digits = 4) {
  if (value === null || value === undefined) return NOTHING;
  if (typeof value === "string") return value;
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "NaN" : value > 0 ? "∞" : "−∞";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e7) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e").replaceAll("-", "−");
  if (size >= 1000) return grouped(Math.round(value));
  return String(Number(value.toPrecision(digits))).replace("-", "−");
}

/** `12 345`, with narrow spaces. */
export function grouped(value) {
  return value === null || value === undefined ? NOTHING : String(value).replace(/\B(?=(\d{3})+$)/g, "\u202f");
}

/** A count in short: `86 M`, `1.2 k`. */
export function short(value) {
  if (value === null || value === undefined) return NOTHING;
  for (const [size, unit] of [
    [1e12, "T"],
    [1e9, "G"],
    [1e6, "M"],
    [1e3, "k"],
  ]) {
    if (Math.abs(value) >= size) return `${Number((value / size).toPrecision(3))} ${unit}`;
  }
  return String(Number(value.toPrecision(3)));
}

export function bytes(value) {
  if (value === null || value === undefined) return NOTHING;
  for (const [size, unit] of [
    [2 ** 40, "TiB"],
    [2 ** 30, "GiB"],
    [2 ** 20, "MiB"],
    [2 ** 10, "KiB"],
  ]) {
    if (value >= size) return `${Number((value / size).toPrecision(3))} ${unit}`;
  }
  return `${value} B`;
}

/** A share of one. */
export function percent(share, digits = 0) {
  return share === null || share === undefined || !Number.isFinite(share) ? NOTHING : `${(share * 100).toFixed(digits)} %`;
}

/** `ray_job_lost` → `ray job lost`. */
export function words(name) {
  return String(name).replaceAll("_", " ");
}

/** One of many, many of many: `1 job`, `3 jobs`. */
export function count(number, one, many = `${one}s`) {
  return `${grouped(number)} ${number === 1 ? one : many}`;
}
