// What a job's status looks like: a shape, a word and a colour, any two of which are enough.

import { h, svg } from "./dom.js";

export const TERMINAL = new Set(["succeeded", "failed", "cancelled"]);
export const AT_WORK = ["starting", "running", "finalizing", "recovering", "pausing", "stopping"];
export const ACTIVE = ["queued", ...AT_WORK];

/** The quick filters, and the statuses of each. */
export const GROUPS = [
  ["active", "Active", ACTIVE],
  ["succeeded", "Succeeded", ["succeeded"]],
  ["failed", "Failed", ["failed"]],
  ["paused", "Paused", ["paused"]],
  ["cancelled", "Cancelled", ["cancelled"]],
];

const TONES = {
  queued: "quiet",
  starting: "live",
  running: "live",
  finalizing: "live",
  recovering: "warn",
  pausing: "warn",
  stopping: "warn",
  paused: "quiet",
  succeeded: "good",
  cancelled: "quiet",
  failed: "bad",
};
const SHAPES = {
  queued: ["M8 3a5 5 0 1 0 0 10A5 5 0 0 0 8 3Z"],
  starting: ["M8 3a5 5 0 1 0 0 10A5 5 0 0 0 8 3Z", "M8 5.5v2.7l1.8 1.1"],
  running: ["M5.5 3.5v9l7-4.5Z"],
  finalizing: ["M3.5 12.5h9", "M8 3v6.5", "M5.2 6.8 8 9.6l2.8-2.8"],
  recovering: ["M12.5 8A4.5 4.5 0 1 1 11 4.7", "M11.4 2.2v2.7H8.7"],
  pausing: ["M6 4v8", "M10 4v8"],
  paused: ["M6 4v8", "M10 4v8"],
  stopping: ["M4.5 4.5h7v7h-7Z"],
  succeeded: ["M3.5 8.5 6.7 11.7 12.5 4.8"],
  cancelled: ["M8 3a5 5 0 1 0 0 10A5 5 0 0 0 8 3Z", "M4.6 11.4 11.4 4.6"],
  failed: ["M4.5 4.5 11.5 11.5", "M11.5 4.5 4.5 11.5"],
};

export function tone(status) {
  return TONES[status] ?? "quiet";
}

export function badge(status, { wish = "run" } = {}) {
  const wanted = wish !== "run" && !TERMINAL.has(status) && status !== "paused" && !["pausing", "stopping"].includes(status);
  return h(
    "span",
    { class: `badge tone-${tone(status)}` },
    icon(SHAPES[status] ?? SHAPES.queued),
    wanted ? `${status}, to ${wish}` : status,
  );
}

/** A small drawing of lines, 16 by 16, that screen readers pass by. */
export function icon(paths, properties = {}) {
  const lines = paths.map((d) => svg("path", { d }));
  return svg("svg", { viewBox: "0 0 16 16", class: "icon", "aria-hidden": "true", focusable: "false", ...properties }, lines);
}

export const ICONS = {
  jobs: ["M2.5 4h11", "M2.5 8h11", "M2.5 12h7"],
  compare: ["M2.5 12.5 6 8.5l3 2 4.5-6", "M2.5 6.5h2", "M9 13h4.5"],
  cluster: ["M3 3.5h10v3.5H3Z", "M3 9h10v3.5H3Z", "M5.3 5.2h.1", "M5.3 10.8h.1"],
  submit: ["M8 3v10", "M3 8h10"],
  sun: [
    "M8 5a3 3 0 1 0 0 6 3 3 0 0 0 0-6Z",
    "M8 1.5v1.2M8 13.3v1.2M1.5 8h1.2M13.3 8h1.2M3.4 3.4l.9.9M11.7 11.7l.9.9M3.4 12.6l.9-.9M11.7 4.3l.9-.9",
  ],
  moon: ["M12.8 9.8A5.2 5.2 0 0 1 6.2 3.2a5.2 5.2 0 1 0 6.6 6.6Z"],
  leave: ["M6.5 3H3.5v10h3", "M7 8h6.5", "M11 5.5 13.5 8 11 10.5"],
  copy: ["M5.5 5.5h7v7h-7Z", "M3.5 10.5v-7h7"],
  pin: ["M8 14V9.5", "M5 2.5h6L10.3 7l1.7 2.5H4L5.7 7Z"],
  play: ["M5.5 3.5v9l7-4.5Z"],
  pause: ["M6 4v8", "M10 4v8"],
  back: ["M10 3.5 5.5 8 10 12.5"],
  down: ["M8 3v9", "M4.5 8.8 8 12.3l3.5-3.5"],
  warning: ["M8 2.5 14 13H2Z", "M8 6.5v3", "M8 11.2v.1"],
};
