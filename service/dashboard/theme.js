// Light or dark, before anything is painted: a plain script, because modules come later. `auto` is what the system says.
(() => {
  const KEY = "maestro-theme";
  const read = () => {
    try {
      return localStorage.getItem(KEY) ?? "auto";
    } catch {
      return "auto"; // a browser that keeps nothing
    }
  };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    const choice = read();
    document.documentElement.dataset.theme = choice === "auto" ? (dark.matches ? "dark" : "light") : choice;
    dispatchEvent(new CustomEvent("themechange"));
  };
  dark.addEventListener("change", apply);
  apply();
  globalThis.maestroTheme = {
    read,
    choose(choice) {
      try {
        localStorage.setItem(KEY, choice);
      } catch {
        // it holds until the page is left
      }
      apply();
    },
  };
})();
