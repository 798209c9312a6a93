// Something that is done again and again while a view is open; less often while it fails, not at all while nobody looks.

const MAX_PAUSE_SECONDS = 30;

/** Calls `work` now and every `seconds`; its errors go to `failed`. `stop` it by the signal; `.soon()` has it done at once, or right after. */
export function poll(work, { seconds, signal, failed = () => {} }) {
  let timer = 0;
  let isAtWork = false;
  let isWanted = false;
  let pause = seconds;

  async function run() {
    clearTimeout(timer);
    if (signal.aborted) return;
    if (document.hidden) return; // `visibilitychange` goes on
    isAtWork = true;
    isWanted = false;
    try {
      await work();
      pause = seconds;
    } catch (error) {
      if (signal.aborted) return;
      pause = Math.min(Math.max(pause, 1) * 1.6, MAX_PAUSE_SECONDS);
      failed(error);
    } finally {
      isAtWork = false;
    }
    if (!signal.aborted) timer = setTimeout(run, isWanted && pause === seconds ? 0 : pause * 1000);
  }

  function soon() {
    if (isAtWork) isWanted = true;
    else run();
  }

  document.addEventListener("visibilitychange", () => document.hidden || soon(), { signal });
  signal.addEventListener("abort", () => clearTimeout(timer));
  run();
  return { soon };
}

/** Calls that come thick and fast, as one in so many seconds: the last one counts. */
export function calm(work, seconds, signal) {
  let timer = null;
  signal?.addEventListener("abort", () => clearTimeout(timer));
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...given), seconds * 1000);
  };
}
