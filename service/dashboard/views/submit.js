// A new job: a form of the spec's own schema, with what the run would take beside it.

import { call, freshKey } from "../api.js";
import { h, replace, say } from "../dom.js";
import { SpecForm } from "../form.js";
import { title } from "../page.js";
import { calm } from "../poll.js";
import { go } from "../router.js";
import { fieldsOf, kindsOf } from "../schema.js";
import { Estimate } from "./estimate.js";

const ESTIMATE_SECONDS = 0.6; // after the last key

export function show(main, route, signal) {
  title("Submit");
  const body = h("div", { class: "stack" }, h("p", { class: "muted", role: "status" }, "Asking the service what a job is …"));
  replace(main, h("div", { class: "head" }, h("h1", { class: "grow", tabindex: "-1" }, "Submit a job")), body);
  begin(body, route, signal).catch(
    (error) => signal.aborted || replace(body, h("p", { class: "banner tone-bad", role: "alert" }, error.message)),
  );
}

async function begin(body, route, signal) {
  const like = route.query.get("like");
  const [openapi, job] = await Promise.all([describe(signal), like ? call(`/jobs/${like}`, { signal }) : null]);
  if (!signal.aborted) new SubmitView(body, openapi, job, signal);
}

async function describe(signal) {
  const response = await fetch("/openapi.json", { signal });
  if (!response.ok) throw new Error("The service does not describe its interface now; try again.");
  return response.json();
}

class SubmitView {
  constructor(body, openapi, job, signal) {
    Object.assign(this, { openapi, signal });
    this.kinds = kindsOf(openapi);
    this.isText = false;
    this.estimate = new Estimate(() => this.foretell());
    this.choices = this.kinds.map(({ kind, text }) =>
      h("button", { type: "button", title: text, on: { click: () => this.choose(kind) } }, kind),
    );
    this.about = h("p", { class: "muted small" });
    this.mode = h("button", { class: "button", type: "button", "aria-pressed": "false", on: { click: () => this.turn() } }, "As JSON");
    this.place = h("div");
    this.text = h("textarea", {
      class: "input",
      rows: 26,
      spellcheck: "false",
      "aria-label": "Spec as JSON",
      hidden: true,
      on: { input: () => this.changed() },
    });
    this.project = h("input", {
      class: "input",
      id: "project",
      placeholder: "the token's own",
      autocomplete: "off",
      on: { input: () => this.changed() },
    });
    this.trouble = h("div", { role: "alert" });
    this.button = h("button", { class: "button main", type: "submit" }, "Submit");
    this.foretellSoon = calm(() => this.foretell(), ESTIMATE_SECONDS, signal);
    const foot = h(
      "div",
      { class: "submit-foot" },
      h("label", { class: "small muted", for: "project" }, "Project"),
      this.project,
      this.button,
    );
    const form = h(
      "form",
      { class: "stack", novalidate: true, on: { submit: (event) => this.submit(event) } },
      h("div", { class: "row" }, h("div", { class: "segments", role: "group", "aria-label": "Kind of job" }, this.choices), this.mode),
      this.about,
      this.trouble,
      this.place,
      this.text,
      foot,
    );
    replace(body, h("div", { class: "submit" }, form, this.estimate.element));
    this.choose(job?.kind ?? "pretrain");
    if (job) this.likeJob(job);
  }

  likeJob({ spec, name, project }) {
    this.form.fill({ ...spec, name: `${name} again`.slice(0, 200) });
    this.project.value = project;
    this.foretell();
  }

  /** Another kind; what is written stays, in a text also what no field is for. */
  choose(kind) {
    const before = this.isText ? this.parse() : (this.form?.spec() ?? {});
    if (before === null) return;
    this.kind = kind;
    for (const button of this.choices) button.setAttribute("aria-pressed", String(button.textContent === kind));
    const { schema, text } = this.kinds.find((found) => found.kind === kind);
    say(this.about, text);
    this.form = new SpecForm(fieldsOf(schema, this.openapi), () => this.changed());
    this.form.fill(before);
    replace(this.place, this.form.element);
    if (this.isText) this.text.value = JSON.stringify({ ...before, kind }, null, 2);
    this.changed();
  }

  /** Another key for another spec: a repeat of the same one submits nothing twice. */
  changed() {
    this.key = null;
    this.foretellSoon();
  }

  spec() {
    return { kind: this.kind, ...this.form.spec() };
  }

  /** Between form and text; a text that cannot be read stays. */
  turn() {
    if (this.isText) {
      const spec = this.parse();
      if (spec === null) return;
      if (this.kinds.some(({ kind }) => kind === spec.kind) && spec.kind !== this.kind) this.choose(spec.kind);
      this.form.fill(spec);
    } else this.text.value = JSON.stringify(this.spec(), null, 2);
    this.isText = !this.isText;
    this.mode.setAttribute("aria-pressed", String(this.isText));
    this.text.hidden = !this.isText;
    this.place.hidden = this.isText;
    this.changed();
  }

  parse() {
    try {
      const spec = JSON.parse(this.text.value);
      replace(this.trouble);
      return spec;
    } catch (error) {
      this.tell([{ field: "JSON", message: error.message }]);
      return null;
    }
  }

  async foretell() {
    if (this.signal.aborted) return;
    const missing = this.isText ? [] : this.form.missing().filter((path) => path !== "name");
    if (missing.length) {
      this.estimate.wait(missing);
      return;
    }
    const spec = this.isText ? this.parse() : { ...this.spec(), name: this.spec().name ?? "unnamed" };
    if (spec === null) return;
    const asked = (this.asked = {});
    try {
      const found = await call("/estimates", {
        method: "POST",
        body: spec,
        query: { num_images: this.estimate.numImages, project: this.project.value.trim() },
        signal: this.signal,
      });
      if (asked !== this.asked) return;
      if (!this.isText) {
        this.form.clearErrors();
        this.form.hint(found.spec);
      }
      replace(this.trouble);
      this.estimate.show(found);
    } catch (error) {
      if (this.signal.aborted || asked !== this.asked) return;
      this.estimate.fail(error);
      if (error.status === 422) this.tell(error.errors);
    }
  }

  /** At their fields; above the form what belongs to none. */
  tell(errors) {
    const left = this.isText ? errors : this.form.showErrors(errors);
    replace(
      this.trouble,
      left.length
        ? h(
            "div",
            { class: "banner tone-bad" },
            h(
              "ul",
              {},
              left.map(({ field, message }) => h("li", {}, h("strong", {}, field), `: ${message}`)),
            ),
          )
        : null,
    );
  }

  async submit(event) {
    event.preventDefault();
    const missing = this.isText ? [] : this.form.missing();
    if (missing.length) {
      this.tell(missing.map((field) => ({ field, message: "This is needed." })));
      this.form.focusFirstError();
      return;
    }
    const spec = this.isText ? this.parse() : this.spec();
    if (spec === null) return;
    this.button.disabled = true;
    this.key ??= freshKey();
    try {
      const job = await call("/jobs", {
        method: "POST",
        body: spec,
        query: { project: this.project.value.trim() },
        headers: { "Idempotency-Key": this.key },
      });
      go(["jobs", job.id]);
    } catch (error) {
      this.tell(error.errors?.length ? error.errors : [{ field: "Not submitted", message: error.message }]);
      if (this.isText || !this.form.focusFirstError()) this.trouble.scrollIntoView({ block: "center" });
    } finally {
      this.button.disabled = false;
    }
  }
}
