// Something to take away.

import { h } from "../dom.js";
import { announce, toast } from "../page.js";
import { ICONS, icon } from "../status.js";

export function copyButton(text, label = "Copy") {
  return h(
    "button",
    {
      class: "button bare slim",
      type: "button",
      "aria-label": label,
      title: label,
      on: { click: (event) => copy(text, event.currentTarget) },
    },
    icon(ICONS.copy),
  );
}

/** A command, and the button that copies it. */
export function command(text) {
  return h("div", { class: "copy" }, h("code", { tabindex: "0" }, text), copyButton(text, `Copy: ${text}`));
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    announce("Copied");
    button.classList.add("done");
    setTimeout(() => button.classList.remove("done"), 1200);
  } catch {
    toast("The browser does not let this page copy: over plain http, only from this machine. Select the text instead.", "bad");
  }
}
