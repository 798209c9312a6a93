import { h, replace } from "../dom.js"; export function show(main) { replace(main, h("h1", { tabindex: "-1" }, "Later")); }
