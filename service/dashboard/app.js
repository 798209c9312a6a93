// The frame round all views: login, navigation, what is open, and whether the service answers.

import { connection } from "./api.js";
import { h, replace, say, svg } from "./dom.js";
import { corners, open, title, toast } from "./page.js";
import { link, parse } from "./router.js";
import { session } from "./session.js";
import { ICONS, icon } from "./status.js";
import { showLogin } from "./views/login.js";
import * as jobs from "./views/jobs.js";

const VIEWS = {
  jobs: async () => jobs,
  job: () => import("./views/job.js"),
  compare: () => import("./views/compare.js"),
  cluster: () => import("./views/cluster.js"),
  submit: () => import("./views/submit.js"),
};
const PLACES = [
  ["jobs", "Jobs", ICONS.jobs],
  ["compare", "Compare", ICONS.compare],
  ["cluster", "Cluster", ICONS.cluster],
  ["submit", "Submit", ICONS.submit],
];
const SHORTCUTS = [
  ["/", "Search jobs"],
  ["j  k", "Next, previous job"],
  ["Enter", "Open it"],
  ["x", "Select it, to compare"],
  ["g j", "Jobs"],
  ["g c", "Cluster"],
  ["g s", "Submit"],
  ["?", "These shortcuts"],
];

const root = document.getElementById("app");
const notice = h("div", { class: "notice", role: "status", hidden: true }, icon(ICONS.warning), h("span"));
const main = h("main", { id: "main", tabindex: "-1" });
const links = PLACES.map(([name, text, paths]) => h("a", { href: link([name]), data: { place: name } }, icon(paths), text));
let header = null;
let current = null; // {key, controller, update}

document.body.append(...corners());
addEventListener("hashchange", show);
session.addEventListener("begin", show);
session.addEventListener("end", show);
connection.addEventListener("change", tellConnection);
addEventListener("keydown", onKey);
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // its own address would be a place to go to
  document.getElementById("main").focus();
});
show();

async function show() {
  if (session.token() === null) {
    leave();
    document.body.classList.remove("signed-in");
    showLogin(root, arguments[0]?.detail ?? "");
    return;
  }
  if (!root.contains(main)) replace(root, (header ??= frame()), notice, main);
  const route = parse(location.hash);
  const place = route.parts[0] ?? "jobs";
  const name = place === "jobs" && route.parts[1] ? "job" : place;
  const key = name === "job" ? `job ${route.parts[1]}` : name;
  for (const item of links) {
    if (item.dataset.place === place) item.setAttribute("aria-current", "page");
    else item.removeAttribute("aria-current");
  }
  if (current?.key === key && current.update) {
    current.update(route);
    return;
  }
  const isFirst = current === null;
  leave();
  const controller = new AbortController();
  current = { key, controller };
  await build(name, route, controller.signal);
  if (!isFirst && !controller.signal.aborted) main.querySelector("h1")?.focus();
}

async function build(name, route, signal) {
  replace(main);
  if (!(name in VIEWS)) {
    title("No such page");
    replace(
      main,
      h(
        "div",
        { class: "empty" },
        h("h1", { tabindex: "-1" }, "There is no such page"),
        h("p", {}, h("a", { href: link(["jobs"]) }, "All jobs")),
      ),
    );
    return;
  }
  try {
    const view = await VIEWS[name]();
    if (signal.aborted) return;
    const shown = view.show(main, route, signal);
    current.update = shown?.update;
  } catch (error) {
    if (signal.aborted) return;
    console.warn(error);
    const again = h("button", { class: "button main", on: { click: () => location.reload() } }, "Load the page again");
    replace(
      main,
      h(
        "div",
        { class: "empty", role: "alert" },
        h("h1", { tabindex: "-1" }, "This view cannot be shown"),
        h("p", {}, "The dashboard may be of another version now."),
        again,
      ),
    );
  }
}

function leave() {
  current?.controller.abort();
  current = null;
}

function brand() {
  const squares = [0, 1, 2].flatMap((y) =>
    [0, 1, 2].map((x) => svg("rect", { x: 2 + x * 7, y: 2 + y * 7, width: 6, height: 6, rx: 1.2, opacity: x === y ? 1 : 0.3 })),
  );
  return svg("svg", { viewBox: "0 0 24 24", "aria-hidden": "true" }, squares);
}

function frame() {
  return h(
    "header",
    { class: "bar" },
    h("a", { class: "brand", href: link(["jobs"]), "aria-label": "MAEstro, all jobs" }, brand(), "MAEstro"),
    h("nav", { class: "nav", "aria-label": "Views" }, links),
    h(
      "div",
      { class: "tools" },
      themeButton(),
      h(
        "button",
        { class: "button bare square", type: "button", "aria-label": "Sign out", title: "Sign out", on: { click: () => session.end() } },
        icon(ICONS.leave),
      ),
    ),
  );
}

function themeButton() {
  const button = h("button", { class: "button bare square", type: "button" });
  const draw = () => {
    const isDark = document.documentElement.dataset.theme === "dark";
    button.setAttribute("aria-label", isDark ? "Use light colours" : "Use dark colours");
    button.title = button.getAttribute("aria-label");
    replace(button, icon(isDark ? ICONS.sun : ICONS.moon));
  };
  button.addEventListener("click", () =>
    globalThis.maestroTheme.choose(document.documentElement.dataset.theme === "dark" ? "light" : "dark"),
  );
  addEventListener("themechange", draw);
  draw();
  return button;
}

function tellConnection() {
  say(notice.lastChild, connection.trouble || "The service answers again.");
  if (connection.trouble) notice.hidden = false;
  else if (!notice.hidden) {
    notice.hidden = true;
    toast("The service answers again.");
  }
}

let leader = -Infinity; // when g was pressed
function onKey(event) {
  if (
    event.ctrlKey ||
    event.metaKey ||
    event.altKey ||
    event.target.closest("input, textarea, select, dialog, [contenteditable]") ||
    session.token() === null
  )
    return;
  const places = { j: "jobs", c: "cluster", s: "submit" };
  if (event.timeStamp - leader < 1200 && event.key in places) {
    event.stopImmediatePropagation();
    leader = -Infinity;
    location.hash = link([places[event.key]]);
  } else if (event.key === "g") leader = event.timeStamp;
  else if (event.key === "?") showShortcuts();
}

function showShortcuts() {
  const rows = SHORTCUTS.flatMap(([keys, text]) => [
    h(
      "dt",
      {},
      keys.split(/\s+/).map((key) => [h("kbd", {}, key), " "]),
    ),
    h("dd", {}, text),
  ]);
  const close = h("button", { class: "button", type: "button", on: { click: (event) => event.target.closest("dialog").close() } }, "Close");
  open(
    h(
      "dialog",
      { "aria-labelledby": "keys-heading" },
      h("h2", { id: "keys-heading" }, "Keyboard"),
      h("dl", { class: "keys" }, rows),
      h("div", { class: "row" }, close),
    ),
  );
}
