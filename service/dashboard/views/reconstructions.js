// What the model makes of the same images as it learns: pictures over the time of training.

import { call } from "../api.js";
import { stepsPerEpoch } from "../axis.js";
import { h, replace, say } from "../dom.js";
import { grouped, measure } from "../format.js";
import { poll } from "../poll.js";
import { TERMINAL, ICONS, icon } from "../status.js";

const POLL_SECONDS = 5;
const LINK_MINUTES = 50; // presigned addresses are good for an hour
const FRAME_SECONDS = 0.9;
const COLUMNS = ["Original", "What it sees", "Reconstruction", "With the visible patches"];

export function show(host, context, signal) {
  const view = new PictureView(context, signal);
  replace(host, view.element);
  return { update: () => view.poller.soon() };
}

class PictureView {
  constructor(context, signal) {
    Object.assign(this, { context, signal });
    this.pictures = []; // {step, name}
    this.links = new Map();
    this.slider = h("input", {
      type: "range",
      min: 0,
      step: 1,
      value: 0,
      "aria-label": "Time of training",
      on: { input: () => this.turn(Number(this.slider.value)) },
    });
    this.when = h("output", { class: "figures" });
    this.playButton = h(
      "button",
      { class: "button slim", type: "button", "aria-pressed": "false", on: { click: () => this.play() } },
      icon(ICONS.play),
      "Play",
    );
    this.frame = h("div", { class: "frame" });
    this.note = h("p", { class: "empty" });
    this.stage = h(
      "div",
      { class: "body", hidden: true },
      h("div", { class: "turner" }, this.playButton, this.slider, this.when),
      h(
        "div",
        { class: "columns", "aria-hidden": "true" },
        COLUMNS.map((text) => h("span", {}, text)),
      ),
      this.frame,
    );
    this.element = h("section", { class: "card pictures", "aria-label": "Reconstructions" }, this.stage, this.note);
    this.poller = poll(() => this.refresh(), { seconds: POLL_SECONDS, signal, failed: (error) => say(this.note, error.message) });
    signal.addEventListener("abort", () => clearInterval(this.timer));
  }

  /** Those that are new: each is asked for once. */
  async refresh() {
    const found = [...this.pictures];
    for (let after = found.at(-1)?.step ?? -1; after !== null;) {
      const page = await call(`/jobs/${this.context.id}/reconstructions`, { query: { after, limit: 1000 }, signal: this.signal });
      found.push(...page.reconstructions.map(({ step, picture }) => ({ step, name: picture.name })));
      after = page.next_after;
    }
    const wasAtEnd = Number(this.slider.value) >= this.pictures.length - 1;
    const isNew = found.length !== this.pictures.length;
    this.pictures = found;
    this.stage.hidden = found.length === 0;
    this.note.hidden = found.length > 0;
    if (!found.length) {
      replace(
        this.note,
        h("strong", {}, "No pictures yet"),
        TERMINAL.has(this.context.job.status)
          ? "This job has left none."
          : "The first one comes with the first evaluation (evaluation.every_epochs).",
      );
      return;
    }
    this.slider.max = found.length - 1;
    if (isNew && wasAtEnd && !this.timer) this.turn(found.length - 1);
  }

  async turn(place) {
    this.slider.value = place;
    this.place = place;
    const { step } = this.pictures[place];
    const perEpoch = stepsPerEpoch(this.context.job);
    const text = `step ${grouped(step)}${perEpoch ? `, epoch ${measure(step / perEpoch, 3)}` : ""}`;
    say(this.when, text);
    this.slider.setAttribute("aria-valuetext", text);
    try {
      const image = await this.load(place);
      if (this.place !== place || this.signal.aborted) return;
      image.alt = `Images, what the model sees of them, and what it makes of that at ${text}`;
      replace(this.frame, image);
      for (const next of [place + 1, place - 1]) if (this.pictures[next]) this.load(next).catch(() => {});
    } catch (error) {
      if (this.place === place && !this.signal.aborted)
        replace(
          this.frame,
          h(
            "p",
            { class: "empty", role: "alert" },
            h("strong", {}, "This picture cannot be loaded"),
            error.status
              ? error.message
              : "Object storage does not give it to this browser: is its address (MAESTRO_S3_PUBLIC_ENDPOINT) one that you can reach?",
          ),
        );
    }
  }

  /** The picture, decoded. */
  load(place) {
    const { name } = this.pictures[place];
    const known = this.links.get(name);
    if (known && Date.now() - known.at < LINK_MINUTES * 60_000) return known.image;
    const path = `/jobs/${this.context.id}/artifacts/${name.split("/").map(encodeURIComponent).join("/")}`;
    const image = call(path, { query: { redirect: "false" }, signal: this.signal }).then(async ({ url }) => {
      const picture = new Image();
      picture.src = url;
      await picture.decode();
      return picture;
    });
    this.links.set(name, { at: Date.now(), image });
    image.catch(() => this.links.delete(name));
    return image;
  }

  /** From here to the end, or from the beginning. */
  play() {
    const isPlaying = Boolean(this.timer);
    clearInterval(this.timer);
    this.timer = null;
    this.playButton.setAttribute("aria-pressed", String(!isPlaying));
    replace(this.playButton, icon(isPlaying ? ICONS.play : ICONS.pause), isPlaying ? "Play" : "Stop");
    if (isPlaying) return;
    if (this.place >= this.pictures.length - 1) this.turn(0);
    this.timer = setInterval(
      () => (this.place >= this.pictures.length - 1 ? this.play() : this.turn(this.place + 1)),
      FRAME_SECONDS * 1000,
    );
  }
}
