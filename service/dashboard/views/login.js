// Who has a token is in.

import { ask } from "../api.js";
import { h, replace } from "../dom.js";
import { title } from "../page.js";
import { session } from "../session.js";

/** `why`: what ended the session before, if there was one. */
export function showLogin(root, why) {
  title("Sign in");
  const trouble = h("p", { class: "small", role: "alert", style: { color: "var(--bad)" } }, why);
  const input = h("input", {
    class: "input",
    id: "token",
    type: "password",
    autocomplete: "off",
    spellcheck: "false",
    required: true,
    "aria-describedby": "token-help",
  });
  const button = h("button", { class: "button main", type: "submit" }, "Sign in");
  const help = h(
    "p",
    { class: "small muted", id: "token-help" },
    "Made by ",
    h("code", {}, "maestro tokens create"),
    "; that of ",
    h("code", {}, "maestro up"),
    " is in ",
    h("code", {}, "~/.maestro/client.json"),
    ". It is forgotten with this tab.",
  );
  const form = h(
    "form",
    { on: { submit } },
    h("h1", { class: "brand" }, "MAEstro"),
    h("div", { class: "stack", style: { gap: "6px" } }, h("label", { for: "token", class: "small" }, "Your token"), input),
    trouble,
    button,
    help,
  );

  async function submit(event) {
    event.preventDefault();
    const token = input.value.trim();
    if (!/^[\x21-\x7e]+$/.test(token)) {
      trouble.textContent = "A token has neither spaces nor letters with accents. Copy all of it.";
      return;
    }
    button.disabled = true;
    try {
      await ask("/jobs", { query: { limit: 1, fields: "id" }, token });
      session.begin(token);
    } catch (error) {
      trouble.textContent = error.status === 401 ? "This token is not good here. Copy all of it, or ask for a new one." : error.message;
      button.disabled = false;
      input.focus();
    }
  }

  replace(root, h("main", { class: "login", id: "main", tabindex: "-1" }, form));
  input.focus();
}
