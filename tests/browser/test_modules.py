"""The parts of the dashboard that need no page, asked inside of one: numbers, lists, streams, references, forms."""

from typing import Any

import pytest
from playwright.sync_api import Page

from service.routes import dashboard


@pytest.fixture(scope="module")
def modules(chromium: Any, live: Any) -> Any:
    """`ask(module, expression)`: the value of a JavaScript expression over a module `m`."""
    page: Page = chromium.new_page(base_url=live.url)
    page.goto("/")

    def ask(module: str, expression: str, *given: Any) -> Any:
        code = f"async (given) => {{ const m = await import('/dashboard/{dashboard.version()}/{module}.js'); return ({expression}); }}"
        return page.evaluate(code, list(given))

    yield ask
    page.close()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (59, "59 s"),
        (61, "1 min 1 s"),
        (3600, "1 h"),
        (3660, "1 h 1 min"),
        (90_000, "1 d 1 h"),
        (1_000_000, "11 d"),
    ],
)
def test_durations(modules: Any, seconds: float, text: str) -> None:
    assert modules("format", "m.duration(given[0])", seconds) == text


def test_numbers_are_read_easily(modules: Any) -> None:
    shown = modules("format", "[0.123456, 1234567, 1.5e-4, 0, -2.5, 'NaN', null, Infinity].map((value) => m.measure(value))")
    assert shown == ["0.1235", "1\u202f234\u202f567", "1.5e−4", "0", "−2.5", "NaN", "–", "∞"]
    assert modules("format", "[1536, 5 * 2 ** 30, 12].map(m.bytes)") == ["1.5 KiB", "5 GiB", "12 B"]
    assert modules("format", "[86e6, 950, 1.2e9].map(m.short)") == ["86 M", "950", "1.2 G"]


def test_a_series_with_gaps_and_what_is_not_finite(modules: Any) -> None:
    curve = modules("series", "m.curveOf({steps: [1, 2, 3, 4], values: [0.5, 'NaN', 'Infinity', 0.25]})")
    assert curve["xs"] == [1, 2, 3, 4]
    assert curve["ys"] == [0.5, None, None, 0.25]
    assert [place["x"] for place in curve["odd"]] == [2, 3]
    joined = modules("series", "m.withGaps({xs: [1, 2, 3, 4, 900, 901], ys: [1, 1, 1, 1, 2, 2], odd: []})")
    assert joined["xs"] == [1, 2, 3, 4, 452, 900, 901]
    assert joined["ys"][4] is None
    assert modules("series", "m.smooth([1, 1, 9, 1, 1], 3)") == [1, 1, 1, 1, 1]
    assert modules("series", "[0, 1, 1.5, 3, 4].map((x) => m.valueAt([1, 2, 3], [10, 20, 40], x))") == [None, 10, 15, 40, None]


def test_a_run_is_outside_of_its_reference_when_it_stays_there(modules: Any) -> None:
    script = """(() => {
      const xs = Array.from({ length: 200 }, (_, place) => place / 2);
      const band = m.bandOf({ xs, ys: xs.map((x) => Math.exp(-x / 40) + 0.4) });
      const run = (change) => ({ xs: xs.slice(0, 120), ys: xs.slice(0, 120).map((x) => (Math.exp(-x / 40) + 0.4) * change(x)), odd: [] });
      return {
        same: m.departure(band, run(() => 1.03)),
        spike: m.departure(band, run((x) => (x === 30 ? 9 : 1))),
        above: m.departure(band, run((x) => (x > 40 ? 1.3 : 1))),
        below: m.departure(band, run((x) => (x > 40 ? 0.8 : 1))),
        back: m.departure(band, run((x) => (x > 20 && x < 40 ? 1.3 : 1))),
        nan: m.departure(band, { ...run(() => 1), odd: [{ x: 59.5, value: NaN }] }),
      };
    })()"""
    found = modules("reference", script)
    assert (found["same"], found["spike"], found["back"]) == (None, None, None)
    assert found["above"]["side"] == "above"
    assert 40 <= found["above"]["since"] <= 47
    assert found["below"]["side"] == "below"
    assert found["nan"] == {"side": "above", "since": 59.5}


def test_the_band_of_a_few_points_follows_them(modules: Any) -> None:
    """Of the published curve there are twelve."""
    band, curve = modules("reference", "[m.bandOf(m.PUBLISHED[0].curve()), m.PUBLISHED[0].curve()]")
    known = [(x, y) for x, y in zip(curve["xs"], curve["ys"], strict=True) if y is not None]
    assert list(zip(band["xs"], band["centre"], strict=True)) == known
    assert all(low < y < high for (_, y), low, high in zip(known, band["low"], band["high"], strict=True))
    faithful = "m.PUBLISHED[0].curve()"
    assert modules("reference", f"m.departure(m.bandOf({faithful}), {faithful})") is None
    astray = "{ ...m.PUBLISHED[0].curve(), ys: m.PUBLISHED[0].curve().ys.map((y) => y && y * 1.3) }"
    assert modules("reference", f"m.departure(m.bandOf({faithful}), {astray})") == {"side": "above", "since": 1}


def test_a_stream_rests_while_nobody_looks_and_goes_on_where_it_was(modules: Any) -> None:
    """Each is one of the six connections that a browser has to a host, for all tabs."""
    script = """(async () => {
      const asked = [];
      const heard = [];
      const ours = window.fetch;
      const show = (isShown) => {
        Object.defineProperty(document, "hidden", { get: () => !isShown, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
      };
      const until = async (isSo) => {
        for (let turn = 0; turn < 100 && !isSo(); turn += 1) await new Promise((resolve) => setTimeout(resolve, 50));
      };
      window.fetch = async (address, { headers, signal }) => {
        const call = { last: headers["Last-Event-ID"] ?? null, isOpen: true };
        asked.push(call);
        if (asked.length === 1) return new Response("{}", { status: 429 });
        const body = new ReadableStream({
          start(controller) {
            controller.enqueue(new TextEncoder().encode(`id: ${asked.length}\nevent: event\ndata: {}\n\n`));
            signal.addEventListener("abort", () => { call.isOpen = false; controller.error(signal.reason); });
          },
        });
        return new Response(body);
      };
      const view = new AbortController();
      const found = [];
      try {
        const ended = m.follow("/events", { signal: view.signal, told: ({ id }) => id && heard.push(id) });
        await until(() => heard.length === 1);
        show(false);
        await until(() => !asked[1].isOpen);
        await new Promise((resolve) => setTimeout(resolve, 1500));
        found.push(asked.map(({ isOpen }) => isOpen), [...heard]);
        show(true);
        await until(() => heard.length === 2);
        found.push(asked.map(({ last }) => last), [...heard]);
        view.abort();
        await ended;
        found.push(asked[2].isOpen);
      } finally {
        window.fetch = ours;
        delete document.hidden;
      }
      return found;
    })()"""
    assert modules("stream", f"await {script}") == [[True, False], ["2"], [None, None, "2"], ["2", "3"], False]


def test_a_stream_in_pieces_is_read_as_it_was_sent(modules: Any) -> None:
    text = 'id: 7\nevent: event\ndata: {"a":\ndata: 1}\n\n: keep alive\n\nevent: end\r\ndata: x\r\n\r\n'
    script = "(() => { const parser = new m.EventParser(); return given[0].flatMap((part) => parser.push(part)); })()"
    whole = [{"id": "7", "event": "event", "data": '{"a":\n1}'}, {"id": None, "event": "end", "data": "x"}]
    for size in (1, 3, 7, 1000):
        assert modules("stream", script, [text[at : at + size] for at in range(0, len(text), size)]) == whole


def test_a_list_that_changes_while_it_is_read(modules: Any) -> None:
    script = """(() => {
      const job = (id) => ({ id: String(id), name: `n${id}`, created_at: String(1000 + id) });
      const list = new m.JobList();
      const seen = () => list.sorted({ column: "created", isDescending: true }).map(({ id }) => Number(id));
      const found = [];
      list.refresh({ jobs: [9, 8, 7].map(job), next_cursor: "7" });
      list.append({ jobs: [6, 5].map(job), next_cursor: null });
      found.push(seen(), list.cursor);
      list.refresh({ jobs: [10, 9, 7].map(job), next_cursor: "7" });      // a new one came, 8 was deleted
      found.push(seen(), list.cursor);
      list.refresh({ jobs: [40, 39, 38].map(job), next_cursor: "38" });  // so many came that there is a hole below
      found.push(seen(), list.cursor);
      return found;
    })()"""
    assert modules("joblist", script) == [[9, 8, 7, 6, 5], None, [10, 9, 7, 6, 5], None, [40, 39, 38], "38"]


def test_jobs_are_sorted_by_figures_that_are_not_finite(modules: Any) -> None:
    script = """(() => {
      const list = new m.JobList();
      const losses = [0.9, "NaN", 0.1, "Infinity", null, 5];
      const jobs = losses.map((loss, place) => ({ id: String(place), name: ["10", "9", "NaN", "b", "a", "B"][place], progress: { loss } }));
      list.refresh({ jobs, next_cursor: null });
      const sorted = (column, isDescending) => list.sorted({ column, isDescending });
      const shown = [false, true].map((isDescending) => sorted("loss", isDescending).map((job) => job.progress.loss));
      return [...shown, sorted("name", false).map((job) => job.name)];
    })()"""
    up, down, names = modules("joblist", script)
    assert up[:4] == [0.1, 0.9, 5, "Infinity"]
    assert down[:4] == ["Infinity", 5, 0.9, 0.1]
    assert [set(up[4:]), set(down[4:])] == [{"NaN", None}] * 2
    assert names == ["10", "9", "a", "b", "B", "NaN"]


def test_changes_of_status_and_attempts_outlast_a_flood_of_events(modules: Any) -> None:
    script = """(() => {
      const events = [];
      const flood = Array(8).fill("images_skipped");
      const told = ["status_changed", "attempt_created", ...flood, "attempt_ended", ...Array(4).fill("evaluated")];
      for (const [id, type] of told.entries()) m.keep(events, { id, type }, 6);
      return events.map(({ id }) => id);
    })()"""
    assert modules("views/timeline", script) == [0, 1, 10, 12, 13, 14]


def test_lines_that_arrive_in_pieces(modules: Any) -> None:
    script = """(() => {
      const store = new m.LineStore(10);
      store.push("one\\ntw"); store.push("o\\n\\u001b[31mred\\u001b[0m\\n10 %\\r50 %\\r\\n");
      const first = [...store.all()];
      for (let place = 0; place < 30; place += 1) store.push(`line ${place}\\n`);
      return [first, store.lines.length <= 10, store.lines.at(-1), store.numDropped + store.lines.length];
    })()"""
    assert modules("lines", script) == [["one", "two", "red", "50 %"], True, "line 29", 34]


def test_the_form_knows_every_field_of_every_kind(modules: Any, live: Any) -> None:
    script = """await (async () => {
      const openapi = await (await fetch("/openapi.json")).json();
      const leaf = (field) => (field.type === "section" ? leaves(field.fields) : [[field.path, field.type]]);
      const leaves = (fields) => fields.flatMap(leaf);
      const types = (schema) => Object.fromEntries(leaves(m.fieldsOf(schema, openapi)));
      return Object.fromEntries(m.kindsOf(openapi).map(({ kind, schema }) => [kind, types(schema)]));
    })()"""
    kinds = modules("schema", script)
    assert set(kinds) == {"pretrain", "probe", "finetune", "evaluate", "embed"}
    assert (
        kinds["pretrain"]
        | {
            "name": "text",
            "labels": "labels",
            "model.image_size": "json",
            "optim.batch_size": "number",
            "masking.strategy": "choice",
            "evaluation.labelled.source": "text",
            "data.transform.flip": "flag",
            "export.formats": "choices",
            "resources.num_workers": "json",
        }
        == kinds["pretrain"]
    )
    nested = modules("schema", "m.nest({'optim.lr': 1, 'optim.epochs': undefined, name: 'x', 'data.transform.flip': false})")
    assert nested == {"optim": {"lr": 1}, "name": "x", "data": {"transform": {"flip": False}}}
    choice = "{type: 'choice', options: [0, 1]}"
    assert modules("schema", f"[1, 0].map((value) => m.read({choice}, m.write({choice}, value)))") == [1, 0]
