// What belongs to the page and to no view: its title, short messages, questions.

import { h } from "./dom.js";

const TOAST_SECONDS = 7;
const toasts = h("div", { class: "toasts", role: "status", "aria-live": "polite" });
const spoken = h("div", { class: "unseen", role: "status", "aria-live": "polite" });

/** Once, where the page is built. */
export function corners() {
  return [toasts, spoken];
}

export function title(text) {
  document.title = text ? `${text} · MAEstro` : "MAEstro";
}

/** Told to screen readers alone. */
export function announce(text) {
  spoken.textContent = text;
}

/** A short message that goes away by itself; `tone` bad for what went wrong. */
export function toast(text, tone = "live") {
  const shown = h("div", { class: `toast tone-${tone}` }, text);
  toasts.append(shown);
  setTimeout(() => shown.remove(), TOAST_SECONDS * 1000);
}

/** Asks before something is done. `work` is done while the dialog is open: what goes wrong is told in it. Whether it was done. */
export function confirm({ heading, text, action, isDangerous = false, work }) {
  return new Promise((resolve) => {
    const trouble = h("p", { class: "small", role: "alert", style: { color: "var(--bad)" } });
    const yes = h("button", { class: `button main${isDangerous ? " danger" : ""}`, type: "button" }, action);
    const no = h("button", { class: "button", type: "button", autofocus: true, on: { click: () => dialog.close() } }, "Not now");
    const dialog = h(
      "dialog",
      { "aria-labelledby": "ask-heading" },
      h("h2", { id: "ask-heading" }, heading),
      h("p", {}, text),
      trouble,
      h("div", { class: "row" }, no, yes),
    );
    let isDone = false;
    yes.addEventListener("click", async () => {
      yes.disabled = true;
      try {
        await work();
        isDone = true;
        dialog.close();
      } catch (error) {
        trouble.textContent = error.message;
        yes.disabled = false;
      }
    });
    open(dialog, () => resolve(isDone));
  });
}

/** A dialog of its own content; gone when it is closed. */
export function open(dialog, closed = () => {}) {
  dialog.addEventListener("close", () => {
    dialog.remove();
    closed();
  });
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // on the backdrop
  document.body.append(dialog);
  dialog.showModal();
}
