// Very many lines of text, of which those in sight exist.

import { h } from "./dom.js";

const LINE_HEIGHT = 18; // pixels; that of the style
const OVERSCAN = 20;
const MAX_LINES = 200_000;
const MAX_LENGTH = 4000; // characters of a line that are shown

/** Text that arrives in pieces, as whole lines; the oldest go when there are too many. */
export class LineStore {
  constructor(maxLines = MAX_LINES) {
    this.maxLines = maxLines;
    this.clear();
  }

  clear() {
    this.lines = [];
    this.rest = "";
    this.numDropped = 0;
  }

  push(text) {
    const parts = (this.rest + text).split("\n");
    this.rest = parts.pop();
    for (const part of parts) this.lines.push(clean(part));
    if (this.lines.length > this.maxLines) {
      const gone = this.lines.length - Math.floor(this.maxLines * 0.9);
      this.lines = this.lines.slice(gone);
      this.numDropped += gone;
    }
  }

  /** With the last one, which may not be whole yet. */
  all() {
    return this.rest === "" ? this.lines : [...this.lines, clean(this.rest)];
  }
}

/** As a terminal would show it: without colours, and of what a progress bar wrote over itself the last. */
function clean(line) {
  const plain = line.includes("\u001b") ? line.replace(/\u001b\[[0-9;?]*[A-Za-z]/g, "") : line;
  const last = plain.replace(/\r+$/, "");
  const shown = last.includes("\r") ? last.slice(last.lastIndexOf("\r") + 1) : last;
  return shown.length > MAX_LENGTH ? `${shown.slice(0, MAX_LENGTH)} …` : shown;
}

/** `.element` scrolls; it stays at its end while it is there. `followed(isAtEnd)` when that changes. */
export class LineList {
  constructor({ label, followed = () => {} }) {
    this.lines = [];
    this.isAtEnd = true;
    this.followed = followed;
    this.text = h("pre", { class: "lines" });
    this.sizer = h("div", { class: "sizer" }, this.text);
    this.element = h("div", { class: "log", tabindex: "0", role: "region", "aria-label": label }, this.sizer);
    this.element.addEventListener("scroll", () => this.onScroll(), { passive: true });
    new ResizeObserver(() => this.plan()).observe(this.element);
  }

  show(lines) {
    this.lines = lines;
    this.plan();
  }

  toEnd() {
    this.isAtEnd = true;
    this.followed(true);
    this.plan();
  }

  onScroll() {
    const isAtEnd = this.element.scrollTop + this.element.clientHeight >= this.element.scrollHeight - 2 * LINE_HEIGHT;
    if (isAtEnd !== this.isAtEnd) {
      this.isAtEnd = isAtEnd;
      this.followed(isAtEnd);
    }
    this.plan();
  }

  plan() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.draw();
    });
  }

  draw() {
    this.sizer.style.height = `${this.lines.length * LINE_HEIGHT + 16}px`;
    if (this.isAtEnd) this.element.scrollTop = this.element.scrollHeight;
    const from = Math.max(0, Math.floor(this.element.scrollTop / LINE_HEIGHT) - OVERSCAN);
    const to = Math.ceil((this.element.scrollTop + this.element.clientHeight) / LINE_HEIGHT) + OVERSCAN;
    this.text.style.transform = `translateY(${from * LINE_HEIGHT}px)`;
    const text = this.lines.slice(from, to).join("\n");
    if (this.text.textContent !== text) this.text.textContent = text;
  }
}
