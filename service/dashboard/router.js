// Where one is, in the address behind `#`: `#/jobs/abc/logs?worker=0`. Reloading, going back and sending a link work as they should.

/** {parts: ["jobs", "abc"], query: URLSearchParams} */
export function parse(hash) {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split("?", 2);
  return { parts: path.split("/").filter(Boolean).map(decode), query: new URLSearchParams(query) };
}

function decode(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

/** The address of a place. Values that are empty are left out. */
export function link(parts, query = {}) {
  const given = query instanceof URLSearchParams ? query : new URLSearchParams();
  if (given !== query) {
    for (const [name, value] of Object.entries(query)) {
      for (const item of Array.isArray(value) ? value : [value])
        if (item !== null && item !== undefined && item !== "") given.append(name, item);
    }
  }
  const text = given.toString();
  return `#/${parts.map(encodeURIComponent).join("/")}${text ? `?${text}` : ""}`;
}

export function go(parts, query) {
  location.hash = link(parts, query);
}

/** The same place otherwise seen: no step back leads to each of these. */
export function amend(parts, query) {
  const place = link(parts, query);
  if (place !== location.hash) history.replaceState(null, "", place);
}
