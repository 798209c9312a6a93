// What can be done with a job, as it is now. Whatever cannot be taken back is asked for first.

import { ask, call, freshKey } from "../api.js";
import { h } from "../dom.js";
import { bytes, count } from "../format.js";
import { confirm, open, toast } from "../page.js";
import { LABEL } from "../reference.js";
import { go, link } from "../router.js";
import { ICONS, TERMINAL, icon } from "../status.js";

/** Buttons. `view` has id, job and soon(). */
export function actions(view) {
  const { job } = view;
  const isOver = TERMINAL.has(job.status);
  const goesOn = !isOver && job.desired_state !== "cancel";
  return [
    goesOn && job.desired_state === "run" && !["stopping", "finalizing"].includes(job.status) ? button("Pause", () => pause(view)) : null,
    job.status === "paused" && goesOn ? button("Resume", () => resume(view), "main") : null,
    goesOn ? button("Cancel", () => cancel(view), "danger") : null,
    ["failed", "cancelled"].includes(job.status) ? button("Retry", () => retry(view), "main") : null,
    job.status === "succeeded" && !["embed", "evaluate"].includes(job.kind) ? pinButton(view) : null,
    h("a", { class: "button", href: link(["compare"], { jobs: job.id }) }, "Compare"),
    h("a", { class: "button", href: link(["submit"], { like: job.id }) }, "Submit alike"),
    isOver ? button("Delete", () => remove(view), "danger") : null,
  ];
}

function button(text, work, look = "") {
  return h("button", { class: `button ${look}`, type: "button", on: { click: work } }, text);
}

async function post(view, what) {
  await call(`/jobs/${view.id}/${what}`, { method: "POST" });
  view.isStale = true;
  view.soon();
}

const pause = (view) =>
  confirm({
    heading: "Pause this job?",
    text: "It saves its training state, releases its devices, and goes on at that very step when it is resumed.",
    action: "Pause",
    work: () => post(view, "pause"),
  });

const resume = (view) =>
  confirm({
    heading: "Resume this job?",
    text: "It stands in line at its old place, and goes on from its last training state.",
    action: "Resume",
    work: () => post(view, "resume"),
  });

const cancel = (view) =>
  confirm({
    heading: "Cancel this job?",
    text: `${view.job.name} stops at its next step and does not go on. Its last training state is not a result: there is no encoder of it.`,
    action: "Cancel the job",
    isDangerous: true,
    work: () => post(view, "cancel"),
  });

async function retry(view) {
  const key = freshKey(); // once for this question, however often it is sent
  let made = null;
  const work = async () => (made = await call(`/jobs/${view.id}/retry`, { method: "POST", headers: { "Idempotency-Key": key } }));
  if (
    await confirm({ heading: "Retry this job?", text: "A new job of the same spec is submitted. It starts anew.", action: "Retry", work })
  )
    go(["jobs", made.id]);
}

async function remove(view) {
  const { name } = view.job;
  const left = await call(`/jobs/${view.id}`, { method: "DELETE", query: { dry_run: "true" } }).catch(() => null);
  const much =
    left && left.num_objects ? `: ${left.is_complete ? "" : "more than "}${count(left.num_objects, "object")}, ${bytes(left.bytes)}` : "";
  const work = () => ask(`/jobs/${view.id}`, { method: "DELETE" });
  const text = `${name} and all it left in object storage${much} are deleted, for everybody and for good.`;
  if (await confirm({ heading: "Delete this job?", text, action: "Delete for good", isDangerous: true, work })) {
    toast(`${name} is deleted.`);
    go(["jobs"]);
  }
}

function pinButton(view) {
  const name = view.job.labels[LABEL];
  const isPinned = name !== undefined;
  const shown = h(
    "button",
    { class: "button", type: "button", "aria-pressed": String(isPinned), on: { click: () => (isPinned ? unpin(view) : pin(view)) } },
    icon(ICONS.pin),
    isPinned ? `Reference ${name}` : "Use as reference",
  );
  shown.title = isPinned ? "Runs of this project are held against it" : "Hold other runs of this project against it";
  return shown;
}

/** With the tag of what was read, so that nobody's change is lost. */
async function label(view, change) {
  const response = await ask(`/jobs/${view.id}`);
  const { labels } = await response.json();
  await call(`/jobs/${view.id}`, {
    method: "PATCH",
    body: { labels: change(labels) },
    headers: { "If-Match": response.headers.get("ETag") },
  });
  view.isStale = true;
  view.soon();
}

function pin(view) {
  const input = h("input", { class: "input", id: "reference-name", maxlength: 200, required: true, value: view.job.name });
  const trouble = h("p", { role: "alert", style: { color: "var(--bad)" } });
  const cancelled = h("button", { class: "button", type: "button", on: { click: () => dialog.close() } }, "Not now");
  const submit = async (event) => {
    event.preventDefault();
    try {
      await label(view, (labels) => ({ ...labels, [LABEL]: input.value.trim() }));
      dialog.close();
    } catch (error) {
      trouble.textContent = error.message;
    }
  };
  const text = `Runs of kind ${view.job.kind} in this project are held against its loss, and marked when they leave its band. It becomes the job's label “${LABEL}”.`;
  const form = h(
    "form",
    { on: { submit } },
    h("h2", { id: "pin-heading" }, "Use as reference"),
    h("p", {}, text),
    h("label", { for: "reference-name", class: "small" }, "Name"),
    input,
    trouble,
    h("div", { class: "row" }, cancelled, h("button", { class: "button main", type: "submit" }, "Use it")),
  );
  const dialog = h("dialog", { "aria-labelledby": "pin-heading" }, form);
  open(dialog);
}

const unpin = (view) =>
  confirm({
    heading: "No longer a reference?",
    text: "Runs are not held against this job any more.",
    action: "Take it away",
    work: () => label(view, ({ [LABEL]: _, ...labels }) => labels),
  });
