// The run at a glance: its time, its lineage, its curves.

import { h, replace } from "../dom.js";
import { Curves } from "./curves.js";
import { Lineage } from "./lineage.js";
import { Timeline } from "./timeline.js";

export function show(host, context, signal) {
  const timeline = new Timeline(context);
  const lineage = new Lineage(context, signal);
  const curves = new Curves(context, signal);
  replace(host, h("div", { class: "stack" }, timeline.element, lineage.element, curves.element));
  const update = () => {
    timeline.draw();
    lineage.draw();
    curves.draw();
  };
  update();
  return { update };
}
