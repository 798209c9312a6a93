import sys
from datetime import UTC, datetime, timedelta

import pytest

from service import console
from service.console import parse_time, print_fields, print_table
from service.wording import age, between, clean, clean_log, duration, number, shortened, size, sparkline, width

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "said"), [(-5, "now"), (0.4, "now"), (59, "59 s ago"), (60, "1 min ago"), (7200, "2 h ago"), (90_000, "1 d ago")]
)
def test_ages(seconds: float, said: str) -> None:
    assert age((NOW - timedelta(seconds=seconds)).isoformat(), now=NOW) == said
    assert age(None) == ""


def test_durations_sizes_and_numbers() -> None:
    said = [duration(seconds) for seconds in (0, 61, 3725, 200_000, float("inf"), float("nan"), None)]
    assert said == ["0:00", "1:01", "1:02:05", "2 d 7 h", "unknown", "unknown", "unknown"]
    assert [size(n) for n in (0, 999, 1000, 1.44e9, 5e15)] == ["0 bytes", "999 bytes", "1.0 kB", "1.4 GB", "5000.0 TB"]
    assert [number(v) for v in (0.123456, 7, [1.0, 2.5], [0] * 9, "a\nb")] == ["0.1235", "7", "1, 2.5", "9 values", "a b"]
    assert between(NOW.isoformat(), (NOW + timedelta(seconds=5)).isoformat()) == 5
    assert between(None, None) is None


def test_a_course_in_a_few_characters() -> None:
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8]) == "▁▂▃▄▅▆▇█"
    assert sparkline([]) == ""
    assert sparkline([3.0] * 50, columns=4) == "▁▁▁▁"
    assert sparkline([float("nan"), 1.0, float("inf"), 2.0]) == " ▁ █"
    assert sparkline([float("nan")] * 3) == "   "
    assert len(sparkline([0.1 * n for n in range(1000)], columns=20)) == 20


def test_what_steers_a_terminal_is_taken_out() -> None:
    assert clean("a\x1b[31mb\x07c\nd\u202ee\u00a0f\x9bg") == "a\ufffd[31mb\ufffdc d\ufffde f\ufffdg"
    assert clean("Straße 東京 👩\u200d🔬") == "Straße 東京 👩\u200d🔬"
    assert clean_log("\x1b[31mred\x1b[0m\tx\r\n\x1b]0;title\x07\x1b[2J") == "\x1b[31mred\x1b[0m\tx\r\n\ufffd]0;title\ufffd\ufffd[2J"


def test_widths() -> None:
    assert [width(text) for text in ("abc", "東京", "e\u0301")] == [3, 4, 1]
    assert shortened("abcdef", 6) == "abcdef"
    assert shortened("abcdef", 4) == "abc…"
    assert shortened("東京タワー", 6) == "東京…"


ROWS = [
    ("ID", "NAME", "STATUS", "CREATED"),
    ("j1", "a name that is long, 東京", "succeeded", "3 min ago"),
    ("j22", "x", "failed (why)", "now"),
]


def lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int) -> list[str]:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    print_table(ROWS, shrinks=("NAME",), drops=("CREATED",))
    return capsys.readouterr().out.splitlines()


def test_tables_fit_the_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (200, 60, 50, 40, 30):
        table = lines(capsys, monkeypatch, columns)
        assert max(map(width, table)) <= columns, table
        assert table[2].startswith("j22  x")
        assert ("CREATED" in table[0]) == (columns >= 40)
        starts = {width(line[: line.index(word)]) for line, word in zip(table, ("STATUS", "succeeded", "failed"), strict=True)}
        assert len(starts) == 1


def test_colours_are_for_terminals_that_want_them(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert not console.has_colours()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert console.painted("failed (why)") == "\x1b[31mfailed (why)\x1b[0m"
    assert console.painted("of a later version") == "of a later version"
    monkeypatch.setenv("TERM", "dumb")
    assert not console.has_colours()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not console.has_colours()


def test_fields_of_several_lines(capsys: pytest.CaptureFixture[str]) -> None:
    print_fields([("name", "x"), ("empty", ""), ("spec", "a: 1\nb: 2")])
    assert capsys.readouterr().out == "name            x\nspec            a: 1\n                b: 2\n"


def test_times_as_they_are_written() -> None:
    before = datetime.now(UTC)
    for text, ago in (("90min", 5400), ("6h", 21600), ("3d", 259_200), ("2w", 1_209_600), ("1.5h", 5400), ("5m", 300)):
        found = parse_time(text)
        assert found is not None
        assert timedelta(seconds=ago) <= datetime.now(UTC) - found
        assert before - found <= timedelta(seconds=ago)
    assert parse_time("2026-05-01T12:00Z") == NOW
    assert parse_time("2026-05-01") == datetime(2026, 5, 1).astimezone()
