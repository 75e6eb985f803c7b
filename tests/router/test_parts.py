"""Ordering, phases and settings, by themselves."""

import subprocess
import sys
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.baton.v1 import inference_pb2, worker_pb2
from protos.errors import BatonError, ErrorCode
from router.config import POSITIVE, RouterConfig
from router.ordering import TokenOrder
from router.phases import AttemptTimes, RequestTimes, hand_out
from router.registry import RegistryUnavailableError
from router.registry_choice import make_registry


def token(index: int, token_id: int | None = None) -> inference_pb2.Token:
    return inference_pb2.Token(index=index, id=10 + index if token_id is None else token_id)


def test_tokens_in_any_order_leave_in_order() -> None:
    for arrival in permutations(range(5)):
        order = TokenOrder(max_tokens=5)
        out = [t.index for index in arrival for t in order.add([token(index), token(index)])]
        assert out == list(range(5))
        assert order.ids == [10, 11, 12, 13, 14]


def test_a_double_that_contradicts_is_refused() -> None:
    order = TokenOrder(max_tokens=5)
    order.add([token(0), token(2)])
    for wrong in (token(0, 99), token(2, 99)):
        with pytest.raises(BatonError) as caught:
            order.add([wrong])
        assert caught.value.code is ErrorCode.DATA_LOSS


def test_an_index_beyond_the_request_is_refused() -> None:
    with pytest.raises(BatonError):
        TokenOrder(max_tokens=5).add([token(5)])


DURATION = st.floats(0, 1e4)


@given(total=DURATION, wanted=st.lists(DURATION))
def test_shares_are_never_negative_and_sum_to_the_total(total: float, wanted: list[float]) -> None:
    shares, rest = hand_out(total, wanted)
    assert rest >= 0
    assert all(0 <= share <= want for share, want in zip(shares, wanted, strict=True))
    assert sum(shares) + rest == pytest.approx(total)


@given(st.lists(st.floats(0, 1), min_size=8, max_size=8))
def test_phases_sum_whatever_the_workers_claim(durations: list[float]) -> None:
    sent, first, second, *ms = durations
    attempt = AttemptTimes(
        sent_at=sent,
        reserve_ms=1e3 * ms[0],
        prefill=worker_pb2.WorkerTiming(queue_ms=1e3 * ms[1], prefill_ms=1e3 * ms[2]),
        decode=worker_pb2.WorkerTiming(join_ms=1e3 * ms[3], verify_ms=1e3 * ms[4]),
    )
    times = RequestTimes(
        arrived_at=0.0,
        first_at=sent + first,
        second_at=sent + first + second,
        first_attempt=attempt,
        second_attempt=attempt,
    )
    p = times.phases()
    ttft = p.admission_ms + p.reserve_ms + p.queue_ms + p.prefill_ms + p.network_ms
    handover = (
        p.transfer_tail_ms
        + p.verify_ms
        + p.join_ms
        + p.first_decode_step_ms
        + p.handover_network_ms
    )
    assert ttft == pytest.approx(p.ttft_ms)
    assert handover == pytest.approx(p.handover_ms)
    assert min(p.network_ms, p.handover_network_ms) >= 0


def test_settings_that_mean_nothing_are_refused() -> None:
    for name in POSITIVE:
        with pytest.raises(ValueError, match=name):
            RouterConfig(**{name: 0})
    with pytest.raises(ValueError, match="http_port"):
        RouterConfig(http_port=70000)
    with pytest.raises(ValueError, match="ping_interval_s"):
        RouterConfig(ping_interval_s=3.0)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"registry": "redis", "redis_url": "http://:pass-word@x"}, "redis_url"),
        ({"redis_prefix": ""}, "redis_prefix"),
        ({"redis_prefix": "a{b"}, "redis_prefix"),
        ({"redis_ttl_s": 1.0}, "redis_ttl_s"),
    ],
)
def test_a_registry_that_cannot_work_is_refused_without_telling_secrets(
    settings: dict[str, Any], word: str
) -> None:
    with pytest.raises(ValueError, match=word) as caught:
        RouterConfig(**settings)
    assert "pass-word" not in str(caught.value)


@pytest.mark.parametrize("package", ["redis", "kubernetes"])
def test_a_registry_whose_package_is_missing_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("router.registry_redis", "router.discovery_kubernetes"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RegistryUnavailableError, match=rf"baton-serve\[{package}\]"):
        make_registry(RouterConfig(registry=package))


def test_a_router_of_one_machine_loads_neither_redis_nor_kubernetes() -> None:
    program = (
        "import sys, router.main; from router.config import RouterConfig as C;"
        "router.main.make_registry(C());"
        "print([m for m in ('redis', 'kubernetes', 'torch') if m in sys.modules])"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert said.stdout.strip() == "[]"
