// Elements, made of data. Text becomes text: there is no way here to insert markup.

/** An element. Of `properties`, `on` has listeners, `data` the data attributes, `style` CSS properties; true, false and null do as one expects. */
export function h(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** The same, of SVG. */
export function svg(tag, properties = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), properties, children);
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name === "style") for (const [key, text] of Object.entries(value)) element.style.setProperty(key, text);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Other children, only where they differ from what is there: a reader's place and selection stay. */
export function replace(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Text, only where it is another one: screen readers say what changes. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
  return element;
}

let counted = 0;
/** An id that no other element has. */
export function freshId(name) {
  counted += 1;
  return `${name}-${counted}`;
}
