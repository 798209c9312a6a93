// What the job left, and how to take it away.

import { Watched, call } from "../api.js";
import { h, replace } from "../dom.js";
import { bytes, measure, moment, percent, words } from "../format.js";
import { toast } from "../page.js";
import { poll } from "../poll.js";
import { command } from "./copy.js";
import { States } from "./states.js";

const POLL_SECONDS = 5;
const FORMATS = {
  timm: "timm",
  hf: "transformers",
  "hf-mae": "transformers, with the decoder",
  torch: "plain torch",
  onnx: "ONNX Runtime",
  "torch-export": "torch.export",
};
const FOLDERS = { pretrain: "encoder", finetune: "model", probe: "heads", evaluate: "evaluation", embed: "features" };

export function show(host, context, signal) {
  const commands = h("div", { class: "body stack", style: { gap: "10px" } });
  const figures = h("section", { class: "card", hidden: true });
  const body = h("tbody");
  const note = h("p", { class: "empty" }, "Nothing yet.");
  const table = h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": "Artifacts" },
    h(
      "table",
      {},
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          ["Name", "Kind", "Size", "When", ""].map((text, place) =>
            h("th", { scope: "col", class: place === 2 ? "number" : null }, text || h("span", { class: "unseen" }, "Download")),
          ),
        ),
      ),
      body,
    ),
  );
  replace(
    host,
    h(
      "div",
      { class: "stack" },
      h("section", { class: "card" }, h("header", {}, h("h2", {}, "Take it away")), commands),
      figures,
      new States(context, signal).element,
      h("section", { class: "card" }, h("header", {}, h("h2", {}, "Artifacts")), table, note),
    ),
  );
  const watched = new Watched();
  let key = "";

  async function refresh() {
    const { data } = await watched.get(`/jobs/${context.id}/artifacts`, { signal });
    const now = JSON.stringify([data, context.job.result_uri, context.job.metrics]);
    if (now === key) return;
    key = now;
    replace(commands, offers(context.job));
    drawFigures(figures, context.job.metrics);
    note.hidden = data.artifacts.length > 0;
    table.hidden = !note.hidden;
    replace(
      body,
      [...data.artifacts].reverse().map((artifact) => row(context.id, artifact)),
    );
  }

  const poller = poll(refresh, { seconds: POLL_SECONDS, signal });
  return { update: () => poller.soon() };
}

function offers(job) {
  if (!job.result_uri) return h("p", { class: "muted small" }, "There is no result yet. It comes when the job has succeeded.");
  const folder = FOLDERS[job.kind];
  const formats =
    job.kind === "pretrain" || job.kind === "finetune"
      ? (job.spec.export?.formats ?? Object.keys(FORMATS)).filter((format) => format in FORMATS && format !== "timm")
      : [];
  const each = formats.map((format) =>
    h(
      "div",
      { class: "offer" },
      h("span", { class: "small" }, `For ${FORMATS[format]}`),
      command(`maestro fetch ${job.id} --format ${format} --to ${folder}-${format}`),
    ),
  );
  const next =
    job.kind === "pretrain"
      ? h("div", { class: "offer" }, h("span", { class: "small" }, "Start another job from it"), command(`"encoder": {"job": "${job.id}"}`))
      : null;
  return [
    h(
      "div",
      { class: "offer" },
      h("span", { class: "small" }, job.kind === "pretrain" || job.kind === "finetune" ? "For timm" : "All of it"),
      command(`maestro fetch ${job.id} --to ${folder}`),
    ),
    each,
    next,
    h("div", { class: "offer" }, h("span", { class: "small" }, "Where it lies"), command(job.result_uri)),
  ];
}

function drawFigures(section, metrics) {
  const entries = Object.entries(metrics ?? {});
  section.hidden = entries.length === 0;
  const shown = ([name, value]) =>
    h(
      "div",
      {},
      h("dt", {}, words(name)),
      h(
        "dd",
        { class: "figures" },
        Array.isArray(value)
          ? value.map((item) => measure(item)).join(", ")
          : name.includes("accuracy")
            ? percent(value, 2)
            : measure(value),
      ),
    );
  replace(section, h("header", {}, h("h2", {}, "Final figures")), h("dl", { class: "facts body" }, entries.map(shown)));
}

function row(id, { name, kind, bytes: size, created_at: at, sha256 }) {
  const isFile = !name.endsWith("/") && kind !== "log";
  return h(
    "tr",
    {},
    h("td", {}, h("code", { title: sha256 ? `SHA-256 ${sha256}` : null }, name)),
    h("td", { class: "nowrap" }, words(kind)),
    h("td", { class: "number" }, bytes(size)),
    h("td", { class: "nowrap" }, moment(at)),
    h(
      "td",
      { class: "number" },
      isFile
        ? h(
            "button",
            { class: "button slim", type: "button", "aria-label": `Download ${name}`, on: { click: () => download(id, name) } },
            "Download",
          )
        : null,
    ),
  );
}

async function download(id, name) {
  try {
    const { url } = await call(`/jobs/${id}/artifacts/${name.split("/").map(encodeURIComponent).join("/")}`, {
      query: { redirect: "false" },
    });
    h("a", { href: url, target: "_blank", rel: "noopener noreferrer" }).click();
  } catch (error) {
    toast(error.message, "bad");
  }
}
