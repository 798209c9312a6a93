// A form made of fields (see schema.js): inputs with their help and their errors.

import { freshId, h, replace } from "./dom.js";
import { nest, pick, read, write } from "./schema.js";

const OPEN = new Set(["model", "data", "encoder", "optim"]);

export class SpecForm {
  /** `changed()` whenever something is written. */
  constructor(fields, changed) {
    this.changed = changed;
    this.inputs = new Map(); // path → {field, input, error, box}
    this.sections = new Map(); // path → {element, note}
    const basics = fields.filter(({ type }) => type !== "section");
    const sections = fields.filter(({ type }) => type === "section").sort((a, b) => b.isRequired - a.isRequired);
    this.element = h(
      "div",
      { class: "stack" },
      h(
        "section",
        { class: "card" },
        h(
          "div",
          { class: "body fields" },
          basics.map((field) => this.row(field)),
        ),
      ),
      sections.map((field) => this.section(field)),
    );
  }

  section(field, isInside = false) {
    const note = h("span", { class: "muted small" });
    const inner = field.fields.map((item) => (item.type === "section" ? this.section(item, true) : this.row(item)));
    const heading = h("summary", {}, h("strong", {}, label(field.name)), h("span", { class: "muted small" }, field.text), note);
    const element = h(
      "details",
      { class: isInside ? "inner" : "card", open: !isInside && OPEN.has(field.name) && (field.isRequired || field.name === "optim") },
      heading,
      h("div", { class: "body fields" }, inner),
    );
    this.sections.set(field.path, { element, note });
    return element;
  }

  row(field) {
    const id = freshId("field");
    const help = h("p", { class: "help", id: `${id}-help` }, field.text);
    const error = h("p", { class: "error", id: `${id}-error` });
    const input = this.input(field, id);
    input.addEventListener("input", () => {
      this.clearError(field.path);
      this.count();
      this.changed();
    });
    this.inputs.set(field.path, { field, input, error });
    const name =
      field.type === "choices"
        ? h("span", { class: "name", id: `${id}-name` }, label(field.name))
        : h("label", { class: "name", for: id }, label(field.name), field.isRequired ? h("span", { class: "needed" }, " needed") : null);
    return h("div", { class: "field" }, name, input, field.text ? help : null, error);
  }

  input(field, id) {
    const told = {
      id,
      "aria-describedby": `${field.text ? `${id}-help ` : ""}${id}-error`,
      "aria-required": field.isRequired ? "true" : null,
    };
    if (field.type === "choice" || field.type === "flag") {
      const options = field.type === "flag" ? ["true", "false"] : field.options;
      const usual = field.usual === undefined || field.usual === null ? "as the recipe says" : `${field.usual}, as usual`;
      return h(
        "select",
        { class: "input", ...told },
        h("option", { value: "" }, usual),
        options.map((option) => h("option", { value: option }, option)),
      );
    }
    if (field.type === "choices") {
      return h(
        "div",
        { class: "boxes", role: "group", "aria-labelledby": `${id}-name`, ...told, "aria-required": null },
        field.options.map((option) => h("label", {}, h("input", { type: "checkbox", value: option }), option)),
      );
    }
    const shown = field.example ?? (field.type === "labels" ? "team=cells, stage=final" : placeholder(field.usual));
    return h("input", {
      class: "input",
      autocomplete: "off",
      spellcheck: "false",
      inputmode: field.type === "number" ? "decimal" : null,
      placeholder: shown === undefined ? "" : typeof shown === "string" ? shown : JSON.stringify(shown),
      ...told,
    });
  }

  /** What is written, as a spec. */
  spec() {
    const values = {};
    for (const [path, { field, input }] of this.inputs) values[path] = read(field, valueOf(field, input));
    return nest(values);
  }

  fill(spec) {
    for (const [path, { field, input }] of this.inputs) {
      const text = write(field, pick(spec, path));
      if (field.type === "choices") for (const box of input.querySelectorAll("input")) box.checked = text.includes(box.value);
      else input.value = text;
    }
    this.count();
  }

  /** Shows what a spec has where nothing is written. */
  hint(spec) {
    for (const [path, { field, input }] of this.inputs) {
      const value = pick(spec, path);
      if (value === undefined || value === null || ["choices", "labels"].includes(field.type) || input.value !== "") continue;
      if (input.tagName === "SELECT") input.options[0].textContent = `${value}, by the recipe`;
      else input.placeholder = write(field, value);
    }
  }

  /** Fields that must be written and are not. */
  missing() {
    return [...this.inputs.values()]
      .filter(({ field, input }) => field.isRequired && this.isWanted(field) && read(field, valueOf(field, input)) === undefined)
      .map(({ field }) => field.path);
  }

  /** A needed field of a section that is itself left out is not needed. */
  isWanted({ within }) {
    return within === null || this.written(within) > 0;
  }

  written(prefix) {
    return [...this.inputs].filter(
      ([path, { field, input }]) => path.startsWith(`${prefix}.`) && read(field, valueOf(field, input)) !== undefined,
    ).length;
  }

  count() {
    for (const [path, { note }] of this.sections) {
      const number = this.written(path);
      replace(note, number ? h("span", { class: "chip" }, `${number} given`) : null);
    }
  }

  /** Those of the errors that belong to no field here. */
  showErrors(errors) {
    this.clearErrors();
    const left = [];
    for (const error of errors) {
      const path = this.nearest(error.field);
      if (path === null) left.push(error);
      else this.showError(path, path === error.field ? error.message : `${error.field}: ${error.message}`);
    }
    return left;
  }

  nearest(path) {
    for (let parts = path.split("."); parts.length; parts = parts.slice(0, -1)) {
      const name = parts.join(".");
      if (this.inputs.has(name)) return name;
      const inside = [...this.inputs.keys()].find((key) => key.startsWith(`${name}.`));
      if (inside) return inside;
    }
    return null;
  }

  showError(path, message) {
    const { input, error } = this.inputs.get(path);
    error.textContent = error.textContent ? `${error.textContent} ${message}` : message;
    input.setAttribute("aria-invalid", "true");
    for (const [section, { element }] of this.sections) if (path.startsWith(`${section}.`)) element.open = true;
  }

  clearError(path) {
    const { input, error } = this.inputs.get(path);
    error.textContent = "";
    input.removeAttribute("aria-invalid");
  }

  clearErrors() {
    for (const path of this.inputs.keys()) this.clearError(path);
  }

  focusFirstError() {
    const wrong = [...this.inputs.values()].find(({ input }) => input.getAttribute("aria-invalid"));
    wrong?.input.focus();
    return Boolean(wrong);
  }
}

function valueOf(field, input) {
  if (field.type === "choices") return [...input.querySelectorAll("input:checked")].map(({ value }) => value);
  return input.value;
}

function placeholder(usual) {
  return usual === null || usual === undefined ? undefined : usual;
}

function label(name) {
  const text = name.replaceAll("_", " ");
  return text[0].toUpperCase() + text.slice(1);
}
