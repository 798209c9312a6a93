// A spec's JSON schema as fields of a form, and what is written in them as a spec.

/** The kinds of specs that the interface's description (OpenAPI) has: [{kind, text, schema}]. */
export function kindsOf(openapi) {
  const body = openapi.paths["/v1/jobs"].post.requestBody.content["application/json"].schema;
  return Object.entries(body.discriminator.mapping).map(([kind, ref]) => {
    const schema = resolve({ $ref: ref }, openapi);
    return { kind, text: firstSentence(schema.description), schema };
  });
}

/**
 * Fields, in the schema's order: {path, name, within, text, type, isRequired, usual, options, example, fields}.
 * within: the section round it, if any, that may be left out as a whole.
 * type: text, number, flag, choice, choices, labels, json (anything else), or section, which has fields of its own.
 */
export function fieldsOf(schema, openapi, path = "", within = null) {
  const required = new Set(schema.required ?? []);
  return Object.entries(schema.properties ?? {})
    .filter(([name]) => !(path === "" && name === "kind"))
    .map(([name, given]) =>
      fieldOf(name, given, openapi, { path: path ? `${path}.${name}` : name, isRequired: required.has(name), within }),
    );
}

function fieldOf(name, given, openapi, { path, isRequired, within }) {
  const { schema, isOptional } = plain(given, openapi);
  const field = {
    path,
    name,
    within,
    text: given.description ?? "",
    isRequired,
    usual: given.default ?? schema.default,
    example: (given.examples ?? schema.examples)?.[0],
  };
  if (schema.enum) return { ...field, type: "choice", options: schema.enum };
  if (schema.type === "object" && schema.properties) {
    return {
      ...field,
      type: "section",
      isOptional,
      text: field.text || firstSentence(schema.description),
      fields: fieldsOf(schema, openapi, path, isOptional ? path : within),
    };
  }
  if (schema.type === "object") return { ...field, type: "labels" };
  if (schema.type === "array" && schema.items?.enum) return { ...field, type: "choices", options: schema.items.enum };
  if (schema.type === "boolean") return { ...field, type: "flag" };
  if (schema.type === "integer" || schema.type === "number") return { ...field, type: "number", isWhole: schema.type === "integer" };
  if (schema.type === "string") return { ...field, type: "text" };
  return { ...field, type: "json" };
}

/** Without references, and without the null of what may be left out. */
function plain(given, openapi) {
  const schema = resolve(given, openapi);
  const choices = (schema.anyOf ?? []).filter((item) => item.type !== "null");
  if (choices.length === 1) return { schema: plain(choices[0], openapi).schema, isOptional: true };
  if ("const" in schema) return { schema: { ...schema, enum: [schema.const] }, isOptional: false };
  return { schema, isOptional: false };
}

function resolve(schema, openapi) {
  if (!schema.$ref) return schema;
  const found = schema.$ref
    .replace("#/", "")
    .split("/")
    .reduce((at, part) => at[part], openapi);
  return { ...resolve(found, openapi), ...Object.fromEntries(Object.entries(schema).filter(([name]) => name !== "$ref")) };
}

function firstSentence(text = "") {
  return text
    .split(/\.\s|\n\n/)[0]
    .replace(/\.$/, "")
    .replaceAll("`", "");
}

/** What somebody wrote in a field; undefined where that is nothing. */
export function read(field, text) {
  if (text === undefined || text === null || (typeof text === "string" && text.trim() === "") || text.length === 0) return undefined;
  if (field.type === "number") return number(text);
  if (field.type === "flag") return text === "true";
  if (field.type === "labels") return labels(text);
  if (field.type === "json") return json(text);
  if (field.type === "choice") return field.options.find((option) => String(option) === text) ?? text; // of a number the number
  return typeof text === "string" ? text.trim() : text;
}

/** A value as it is written in a field. */
export function write(field, value) {
  if (value === undefined || value === null) return "";
  if (field.type === "labels")
    return Object.entries(value)
      .map(([key, item]) => (item ? `${key}=${item}` : key))
      .join(", ");
  if (field.type === "choices") return value;
  return typeof value === "string" ? value : JSON.stringify(value);
}

function number(text) {
  const value = Number(text.trim().replaceAll(/[\s_\u202f]/g, ""));
  return Number.isFinite(value) ? value : text.trim(); // the service says what is wrong with it
}

function labels(text) {
  return Object.fromEntries(
    text
      .split(",")
      .map((part) => part.trim())
      .filter(Boolean)
      .map((part) => {
        const [key, ...rest] = part.split("=");
        return [key.trim(), rest.join("=").trim()];
      }),
  );
}

function json(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text.trim();
  }
}

/** {"optim.lr": 1} as {optim: {lr: 1}}. */
export function nest(values) {
  const spec = {};
  for (const [path, value] of Object.entries(values)) {
    if (value === undefined) continue;
    const parts = path.split(".");
    const last = parts.pop();
    let at = spec;
    for (const part of parts) at = at[part] ??= {};
    at[last] = value;
  }
  return spec;
}

/** The value at a path, if it is there. */
export function pick(spec, path) {
  return path.split(".").reduce((at, part) => (at === null || at === undefined ? undefined : at[part]), spec);
}
