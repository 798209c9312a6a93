// The figures that runs tell, as people call them.

import { measure, percent, words } from "./format.js";

const share = (value) => percent(value, Math.abs(value * 100 - Math.round(value * 100)) < 0.05 ? 0 : 1);
const rate = (value) => measure(value, 3);

/** In the order in which they are shown: [title, which series, how values are written, whether a log scale makes sense]. */
export const FIGURES = [
  ["Loss", (name) => name === "loss", measure, true],
  ["Accuracy", (name) => name.includes("accuracy"), share, false],
  ["Learning rate", (name) => name === "lr", measure, true],
  ["Gradient norm", (name) => name === "grad_norm", measure, true],
  ["Images per second", (name) => name === "images_per_second", rate, true],
  ["Waiting for images", (name) => name === "data_wait", share, false],
];

/** {title, format, mayBeLog, place} of one series. */
export function figureOf(name) {
  const place = FIGURES.findIndex(([, fits]) => fits(name));
  if (place === -1) return { title: capital(words(name)), format: measure, mayBeLog: true, place: FIGURES.length };
  const [title, , format, mayBeLog] = FIGURES[place];
  return { title: title === "Accuracy" ? capital(words(name)).replace("Knn", "k-NN") : title, format, mayBeLog, place };
}

function capital(text) {
  return text[0].toUpperCase() + text.slice(1);
}
