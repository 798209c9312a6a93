// Requests to the service: its errors as they are told (RFC 9457), and whether it answers at all.

import { session } from "./session.js";

/** An answer that says what is wrong. `errors`: {field, message}, where fields are. */
export class Problem extends Error {
  constructor(status, told) {
    super(told.detail || told.title || `The service answered ${status}.`);
    this.status = status;
    this.type = String(told.type ?? "").replace("urn:maestro:", "");
    this.title = told.title ?? `Error ${status}`;
    this.errors = told.errors ?? [];
  }
}

/** No answer. */
export class Unreachable extends Error {
  constructor() {
    super("The service does not answer.");
  }
}

/** Tells `change` when the service is away, or is back: `connection.trouble` says what, or is empty. */
export const connection = new EventTarget();
connection.trouble = "";

function note(trouble) {
  if (connection.trouble === trouble) return;
  connection.trouble = trouble;
  connection.dispatchEvent(new Event("change"));
}

/** A `Response` that is well (or 304). Throws Problem, Unreachable, and AbortError where `signal` says so. */
export async function ask(path, { method = "GET", query, body, headers = {}, signal, token = session.token() } = {}) {
  const sent = { Authorization: `Bearer ${token}`, Accept: "application/json", ...headers };
  if (body !== undefined) sent["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(address(path, query), {
      method,
      headers: sent,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store", // tags are kept here, for each thing that is watched
      credentials: "omit",
      redirect: "error",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    note("The service does not answer. Trying again…");
    throw new Unreachable();
  }
  if (response.ok || response.status === 304) {
    note("");
    return response;
  }
  const problem = new Problem(response.status, await response.json().catch(() => ({})));
  note(response.status >= 502 || response.status === 429 ? `${problem.message} Trying again…` : "");
  if (response.status === 401 && token === session.token()) session.end(problem.message);
  throw problem;
}

/** What a request answers, as data. */
export async function call(path, options) {
  const response = await ask(path, options);
  return response.status === 204 ? null : response.json();
}

function address(path, query = {}) {
  const given = new URLSearchParams();
  for (const [name, value] of Object.entries(query)) {
    for (const item of Array.isArray(value) ? value : [value]) {
      if (item !== null && item !== undefined && item !== "") given.append(name, item);
    }
  }
  const text = given.toString();
  return text ? `/v1${path}?${text}` : `/v1${path}`;
}

/** Something that is asked for again and again: each time only what is new travels. */
export class Watched {
  constructor() {
    this.key = "";
    this.tag = null;
    this.data = null;
  }

  /** {data, isNew}; another path or query begins anew. */
  async get(path, { query, signal } = {}) {
    const key = address(path, query);
    const tag = key === this.key ? this.tag : null;
    const response = await ask(path, { query, signal, headers: tag ? { "If-None-Match": tag } : {} });
    if (response.status === 304) return { data: this.data, isNew: false };
    const data = await response.json();
    [this.key, this.tag, this.data] = [key, response.headers.get("ETag"), data];
    return { data, isNew: true };
  }
}

/** For an `Idempotency-Key`. Pages from elsewhere over plain http have no `crypto.randomUUID`. */
export function freshKey() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
