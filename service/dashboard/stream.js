// Server-sent events over fetch: an EventSource cannot send a token but in its address, where it does not belong.

import { Problem, ask } from "./api.js";

const FIRST_PAUSE_SECONDS = 1;
const MAX_PAUSE_SECONDS = 20;
const TOO_MANY = 429;

/** Text that arrives in pieces, as messages {event, data, id}. */
export class EventParser {
  constructor() {
    this.rest = "";
    this.message = { event: "message", data: [], id: null };
  }

  push(text) {
    const lines = (this.rest + text).split(/\r\n|\n|\r(?!$)/);
    this.rest = lines.pop();
    const found = [];
    for (const line of lines) {
      if (line !== "") this.#field(line);
      else {
        const { event, data, id } = this.message;
        if (data.length) found.push({ event, data: data.join("\n"), id });
        this.message = { event: "message", data: [], id: null };
      }
    }
    return found;
  }

  #field(line) {
    const place = line.indexOf(":");
    const name = place === -1 ? line : line.slice(0, place);
    const value = place === -1 ? "" : line.slice(place + 1).replace(/^ /, "");
    if (name === "data") this.message.data.push(value);
    else if (name === "event" || name === "id") this.message[name] = value;
  }
}

/** Calls `told(message)` for each, `told({event: "open"})` whenever it is connected. Comes back after a break where it was, until `end`.
 * While nobody looks it rests: a browser has six connections to a host, for all its tabs, and a hidden one would hold one of them for good. */
export async function follow(path, { told, signal, after = null }) {
  let last = after;
  let pause = FIRST_PAUSE_SECONDS;
  while (!signal.aborted) {
    await shown(signal);
    const seen = whileShown(signal);
    try {
      const headers = { Accept: "text/event-stream", ...(last === null ? {} : { "Last-Event-ID": String(last) }) };
      const response = await ask(path, { headers, signal: seen.signal });
      told({ event: "open" });
      pause = FIRST_PAUSE_SECONDS;
      for await (const message of messages(response)) {
        if (message.id !== null) last = message.id;
        told(message);
        if (message.event === "end") return;
      }
    } catch (error) {
      if (seen.signal.aborted) continue;
      if (error instanceof Problem && error.status < 500 && error.status !== TOO_MANY) return; // who polls tells of it
    } finally {
      seen.abort();
    }
    await sleep(pause, signal);
    pause = Math.min(pause * 2, MAX_PAUSE_SECONDS);
  }
}

async function shown(signal) {
  while (document.hidden && !signal.aborted) {
    await new Promise((resolve) => {
      document.addEventListener("visibilitychange", resolve, { once: true, signal });
      signal.addEventListener("abort", resolve, { once: true });
    });
  }
}

/** Aborted with `signal`, and as soon as the page is hidden. */
function whileShown(signal) {
  const controller = new AbortController();
  const told = { signal: controller.signal };
  document.addEventListener("visibilitychange", () => document.hidden && controller.abort(), told);
  signal.addEventListener("abort", () => controller.abort(), told);
  if (signal.aborted) controller.abort();
  return controller;
}

async function* messages(response) {
  const parser = new EventParser();
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield* parser.push(value);
  }
}

function sleep(seconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}
