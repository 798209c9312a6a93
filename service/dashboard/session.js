// The token, for as long as the tab is open. It is in no address, and in nothing that outlives the tab.

const KEY = "maestro-token";
export const session = new EventTarget();
let token = sessionStorage.getItem(KEY);

session.token = () => token;

session.begin = (text) => {
  token = text;
  sessionStorage.setItem(KEY, text);
  session.dispatchEvent(new Event("begin"));
};

/** `why` is told where one logs in again; what was shown stays in the address. */
session.end = (why = "") => {
  if (token === null) return;
  token = null;
  sessionStorage.removeItem(KEY);
  session.dispatchEvent(new CustomEvent("end", { detail: why }));
};
