"""Histograms, sheets, log lines and trace context, by themselves."""

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from observability import trace_context
from observability.histogram import ITL_S, Histogram
from observability.logs import JsonLines, TextLines
from observability.sheet import Sheet


@given(st.lists(st.floats(0, 100), max_size=50))
def test_a_histogram_counts_each_value_once_and_below_its_bound(values: list[float]) -> None:
    histogram = Histogram(ITL_S)
    for value in values:
        histogram.observe(value)
    assert histogram.count == len(values)
    assert histogram.sum == pytest.approx(sum(values))
    for bound, count in histogram.cumulative():
        assert count == sum(value <= float(bound) for value in values)


def test_a_sheet_reads_as_prometheus_reads_it() -> None:
    sheet = Sheet({"role": "decode"})
    sheet.gauge("a_gauge", "text", 3)
    sheet.counter("b_total", "text", {("x", 'q"\n'): 2.0}, by=["one", "two"])
    sheet.histogram("c_seconds", "text", Histogram((1, 2), counts=[1, 0, 4], total=9.0))
    families = {f.name: f for f in text_string_to_metric_families(sheet.render().decode())}
    assert families["a_gauge"].samples[0].labels == {"role": "decode"}
    assert families["b"].samples[0].labels == {"role": "decode", "one": "x", "two": 'q"\n'}
    buckets = [s for s in families["c_seconds"].samples if s.name == "c_seconds_bucket"]
    assert [(b.labels["le"], b.value) for b in buckets] == [("1.0", 1), ("2.0", 1), ("+Inf", 5)]


def record(message: str, **extra: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"msg": message, "levelname": "INFO", "name": "a.b", **extra})
    made.created = 0.0
    return made


@pytest.mark.parametrize("sent", ["two\nlines", "\x1b[31mred", "a\u2028b", "\r\x00"])
def test_what_a_client_sends_cannot_forge_a_line(sent: str) -> None:
    text = TextLines().format(record(sent))
    assert text.isprintable()
    line = JsonLines({"role": "router"}).format(record(sent, request_id=sent))
    assert len(line.splitlines()) == 1
    assert json.loads(line)["message"] == json.loads(line)["request_id"] == sent


def test_a_json_line_has_the_facts_and_the_error() -> None:
    try:
        raise ValueError("broken")
    except ValueError as error:
        failed = record("it failed", exc_info=(ValueError, error, error.__traceback__))
    line = json.loads(JsonLines({"role": "decode", "worker": "decode-1"}).format(failed))
    assert (line["role"], line["worker"], line["level"]) == ("decode", "decode-1", "info")
    assert line["time"].startswith("1970-01-01T00:00:00.")
    assert "ValueError: broken" in line["exception"]


VALID = f"00-{'a' * 32}-{'b' * 16}-01"


@pytest.mark.parametrize(
    ("header", "taken"),
    [
        (VALID, True),
        (f" {VALID} ", True),
        (VALID.replace("00-", "01-") + "-later", True),
        (f"{VALID}-more", False),
        (VALID.upper(), False),
        (VALID.replace("00-", "ff-"), False),
        (VALID.replace("a" * 32, "0" * 32), False),
        (VALID.replace("b" * 16, "0" * 16), False),
        ("", False),
    ],
)
def test_a_trace_context_is_taken_where_it_is_well_formed(header: str, taken: bool) -> None:
    assert bool(trace_context.checked(header)) == taken
    assert trace_context.trace_id(trace_context.checked(header)) == ("a" * 32 if taken else "")
