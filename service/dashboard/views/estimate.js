// What a run would take, beside the form of its spec.

import { h, replace } from "../dom.js";
import { bytes, duration, measure, short } from "../format.js";

const ROOM = {
  now: ["good", "It can start at once."],
  later: ["live", "It waits until others have ended."],
  never: ["bad", "This cluster has no room for it, as it is."],
  unknown: ["quiet", "Whether there is room is not known now."],
};

export class Estimate {
  /** `again()` when the number of images is another. */
  constructor(again) {
    this.images = h("input", {
      class: "input",
      id: "num-images",
      inputmode: "numeric",
      placeholder: "for the hours",
      on: { change: again },
    });
    this.body = h("div", { class: "body stack", role: "status" });
    this.element = h(
      "aside",
      { class: "card estimate", "aria-label": "Estimate" },
      h("header", {}, h("h2", {}, "What it would take")),
      this.body,
      h("div", { class: "body images" }, h("label", { class: "small muted", for: "num-images" }, "Images it trains on"), this.images),
    );
  }

  get numImages() {
    const number = Number(this.images.value.replaceAll(/[\s_.,\u202f]/g, ""));
    return Number.isInteger(number) && number > 0 ? number : null;
  }

  wait(missing) {
    replace(
      this.body,
      h(
        "p",
        { class: "muted small" },
        "Fill in ",
        missing.map((path, place) => [place ? ", " : "", h("code", {}, path)]),
        ", and it is told here.",
      ),
    );
  }

  fail(error) {
    replace(
      this.body,
      h("p", { class: "small muted" }, error.status === 422 ? "The spec is not valid yet; its fields say why." : error.message),
    );
  }

  show(found) {
    const [tone, room] = ROOM[found.fits];
    const facts = [
      ["Parameters", short(found.num_parameters)],
      ["of these trained", short(found.num_trained_parameters)],
      ["FLOPs per image", short(found.flops_per_image)],
      ["Memory per worker", bytes(found.memory_bytes_per_worker && Math.round(found.memory_bytes_per_worker))],
      ["Images per second", measure(found.images_per_second, 3)],
      ["Time", found.hours === null ? "–" : duration(found.hours * 3600)],
      [
        "Needs",
        [found.needs.num_gpus ? `${measure(found.needs.num_gpus)} GPUs` : null, `${measure(found.needs.num_cpus)} CPUs`]
          .filter(Boolean)
          .join(", "),
      ],
    ];
    replace(
      this.body,
      h("p", { class: `room tone-${tone}` }, room),
      h("p", { class: "small muted" }, found.detail),
      h(
        "dl",
        { class: "figures-list" },
        facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", { class: "figures" }, value))),
      ),
      found.images_per_second === null ? h("p", { class: "small muted" }, "Memory and speed of GPUs are not known before a run.") : null,
    );
  }
}
