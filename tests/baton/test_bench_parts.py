"""The load generator's parts: workload, trace, plan, samples, figures."""

import importlib.util
import itertools
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from baton.bench import plan, workload
from baton.bench.figures import Slo, figures
from baton.bench.sample import Sample
from baton.bench.settings import BenchConfig
from baton.bench.tables import slo_text
from baton.bench.trace import read_trace
from baton.config import SettingsError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shared() -> ModuleType:
    """bench/workloads.py, which other engines are measured with."""
    spec = importlib.util.spec_from_file_location("workloads", ROOT / "bench" / "workloads.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", [0, 5])
def test_the_workload_is_the_shared_one(shared: ModuleType, seed: int) -> None:
    assert workload.mix(512, seed=seed) == shared.mix(512, seed)
    arrivals = workload.poisson(3.5, duration_s=40.0, seed=seed)
    planned = shared.poisson(3.5, 40.0, seed)
    assert arrivals == [at for at, _, _ in planned]
    inputs, outputs = workload.mix(len(arrivals), seed=seed)
    assert list(zip(inputs, outputs, strict=True)) == [(i, o) for _, i, o in planned]
    ids = workload.token_ids([3, 9, 1], vocab_size=shared.VOCAB, seed=seed)
    assert list(ids) == shared.tokens([3, 9, 1], seed)


def write(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_trace_in_milliseconds_starts_at_zero_and_is_sorted(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl",
        {"timestamp": 4500, "input_length": 7, "output_length": 2},
        {"timestamp": 3000, "input_length": 5, "output_length": 1},
    )
    entries = read_trace(path, ms_per_unit=1.0)
    assert [(e.at_s, e.input_length, e.output_length) for e in entries] == [(0, 5, 1), (1.5, 7, 2)]


def test_azures_names_and_dates_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl",
        {"TIMESTAMP": "2023-11-16 18:15:46.5", "ContextTokens": 374, "GeneratedTokens": 44},
        {"TIMESTAMP": "2023-11-16 18:15:48", "ContextTokens": 396, "GeneratedTokens": 109},
    )
    entries = read_trace(path, ms_per_unit=1.0)
    assert [(e.at_s, e.input_length) for e in entries] == [(0.0, 374), (1.5, 396)]


def test_equal_hash_ids_give_equal_blocks(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl",
        {"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [4, 5]},
        {"timestamp": 1, "input_length": 1024, "output_length": 1, "hash_ids": [4, 6]},
    )
    config = BenchConfig(trace=str(path))
    first, second = plan.open_loop(config, vocab_size=100)
    assert (len(first.prompt), len(second.prompt)) == (600, 1024)
    assert first.prompt[:512] == second.prompt[:512]
    assert first.prompt[512:] != second.prompt[512:600]
    assert max(first.prompt + second.prompt) < 100


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"timestamp": 0, "input_length": 1}, "line 1: needs one of output_length"),
        ({"timestamp": 0, "input_length": 0, "output_length": 1}, "input_length must be"),
        ({"timestamp": "x", "input_length": 1, "output_length": 1}, "'x' is no date"),
        ({"timestamp": 0, "input_length": 1, "output_length": 1, "odd": 1}, "unknown field odd"),
        (
            {"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1]},
            "do not cover 600 tokens",
        ),
    ],
)
def test_a_line_that_is_no_request_is_named(
    tmp_path: Path, row: dict[str, object], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        read_trace(write(tmp_path / "t.jsonl", row), ms_per_unit=1.0)


def test_a_poisson_plan_bounded_by_number_has_that_many_requests() -> None:
    requests = plan.open_loop(BenchConfig(rate=20.0, requests=100), vocab_size=50)
    assert len(requests) == 100
    gaps = np.diff([0.0, *(request.at_s for request in requests)])
    assert 0.7 / 20 < float(np.mean(gaps)) < 1.4 / 20


def test_the_trace_can_be_replayed_faster_and_cut(tmp_path: Path) -> None:
    rows = [{"timestamp": i, "input_length": 10, "output_length": 10} for i in range(10)]
    path = write(tmp_path / "t.jsonl", *rows)
    config = BenchConfig(
        trace=str(path), trace_time_unit="s", trace_speed=2.0, duration_s=2.0, length_scale=0.5
    )
    requests = plan.open_loop(config, vocab_size=50)
    assert [request.at_s for request in requests] == [0.0, 0.5, 1.0, 1.5]
    assert {(len(request.prompt), request.output_length) for request in requests} == {(5, 5)}


def test_a_closed_loop_goes_on_past_one_block_with_new_prompts() -> None:
    config = BenchConfig(concurrency=1, input_length=8, output_length=2)
    requests = list(itertools.islice(plan.closed_loop(config, vocab_size=1000), 1030))
    assert [request.index for request in requests] == list(range(1030))
    assert len({tuple(request.prompt) for request in requests}) == 1030


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give one of"),
        ({"rate": 1.0, "concurrency": 1}, "give one of"),
        ({"rate": -1.0, "concurrency": 1}, "rate must not be negative"),
        ({"rate": 1.0, "url": "ftp://x"}, "url must be"),
        ({"rate": 1.0, "plot": "x.pdf"}, "plot must end in"),
        ({"rate": 1.0, "length_scale": 0.0}, "length_scale must be above 0"),
    ],
)
def test_wrong_settings_are_refused_by_name(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchConfig(**given)  # type: ignore[arg-type]


def sample(*arrivals_s: float, error: str = "", sent_s: float = 0.0) -> Sample:
    return Sample(
        index=0,
        planned_s=sent_s,
        sent_s=sent_s,
        input_length=10,
        output_length=len(arrivals_s),
        arrivals_s=list(arrivals_s),
        ended_s=arrivals_s[-1] if arrivals_s else sent_s,
        completion_tokens=len(arrivals_s),
        error=error,
    )


def test_latencies_are_what_their_names_say() -> None:
    one = sample(1.5, 1.6, 1.9, sent_s=1.0)
    assert one.ttft_ms == pytest.approx(500)
    assert one.itl_ms == pytest.approx([100, 300])
    assert one.handover_ms == pytest.approx(100)
    assert one.tpot_ms == pytest.approx(200)
    assert one.e2e_ms == pytest.approx(900)
    assert (sample(1.0).handover_ms, sample(1.0).tpot_ms) == (None, None)


def test_figures_count_failures_and_take_latencies_of_successes() -> None:
    samples = [
        sample(0.1, 0.2, 0.3),
        sample(0.3, 0.4, 2.0),
        sample(error="Unavailable"),
        sample(error="Unavailable"),
        sample(0.05, error="HTTP 503"),
    ]
    result = figures(samples, slo=Slo(ttft_ms=200), lags_ms=[1.0])
    assert (result.sent, result.succeeded, result.failed) == (5, 2, 3)
    assert result.errors == {"Unavailable": 2, "HTTP 503": 1}
    assert result.ttft_ms is not None
    assert result.ttft_ms.count == 2
    assert result.ttft_ms.p50 == pytest.approx(200)
    assert result.span_s == pytest.approx(2.0)
    assert result.output_tokens_per_s == pytest.approx(3.0)
    assert result.requests_per_s == pytest.approx(1.0)
    assert (result.good, result.good_share) == (1, 0.2)
    assert result.goodput_per_s == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (Slo(), True),
        (Slo(ttft_ms=100.1), True),
        (Slo(ttft_ms=99), False),
        (Slo(itl_ms=199), False),
        (Slo(itl_ms=201), True),
        (Slo(p99_itl_ms=297), False),
        (Slo(p99_itl_ms=300), True),
    ],
)
def test_an_slo_bounds_the_first_token_the_mean_and_the_tail(slo: Slo, good: bool) -> None:
    assert slo.met_by(sample(0.1, 0.2, 0.5)) is good


def test_a_failed_request_meets_no_slo() -> None:
    assert not Slo().met_by(sample(0.1, error="x"))


def test_nothing_succeeded_is_no_division_by_zero() -> None:
    result = figures([sample(error="x")], slo=Slo(), lags_ms=[])
    assert result.ttft_ms is None
    assert result.requests_per_s == 0.0


def test_an_slo_reads_like_one() -> None:
    assert slo_text(Slo(ttft_ms=500, p99_itl_ms=50)) == "TTFT ≤ 500 ms, p99 ITL ≤ 50 ms"
