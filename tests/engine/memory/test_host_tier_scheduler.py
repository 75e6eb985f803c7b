"""Host memory as the scheduler uses it: hits that come back, retracted requests that return."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import InvalidRequestError
from engine.execution.forward_batch import ForwardMode
from engine.memory import hi_radix_cache
from engine.memory.host_pool import Rate
from engine.memory.prefix_cache import LoadBack
from engine.memory.retracted_kv import KeptState, restore_is_cheaper
from engine.scheduler.req import Req
from engine.types import RequestId
from tests.engine.scheduler.stub import Engine, make_req, undisturbed

PAGE = 4


def conversation(topic: int, length: int) -> list[int]:
    return [topic, *((topic * 7 + i) % 37 + 1 for i in range(length - 1))]


def evict_everything(engine: Engine) -> None:
    engine.memory.tree_cache.evict(engine.memory.allocator.total_tokens)
    engine.scheduler.check_invariant()


def hopeful(rid: str, prompt: list[int], new_tokens: int, **more: Any) -> Req:
    """It never stops, though the estimate of memory hopes so: such requests are retracted."""
    req = make_req(rid, prompt, max_new_tokens=new_tokens, ignore_eos=False, **more)
    req.stop_token_ids = frozenset()
    return req


def expected_of(req: Req) -> list[int]:
    params = req.sampling_params
    return undisturbed(make_req("x", req.origin_input_ids, max_new_tokens=params.max_new_tokens))


def computed(engine: Engine) -> int:
    """Prompt tokens that were computed."""
    return sum(
        sum(extends) for mode, extends in engine.runner.forwards if mode is not ForwardMode.DECODE
    )


# ---- hits in host memory


@pytest.mark.parametrize("host_write", ["write_through", "write_back"])
@pytest.mark.parametrize("delay", [0, 2])
def test_a_conversation_that_was_evicted_comes_back_from_the_host(
    host_write: Any, delay: int
) -> None:
    engine = Engine(host_pages=32, host_write=host_write, copy_delay=lambda: delay)
    prompt = conversation(1, 30)
    engine.add(make_req("first", prompt, max_new_tokens=6))
    engine.drain()
    evict_everything(engine)
    assert engine.memory.tree_cache.total_pages() == 0
    before = computed(engine)
    turn = prompt + engine.tokens("first") + [5, 6]
    second = make_req("second", turn, max_new_tokens=6)
    engine.add(second)
    engine.drain()
    assert engine.tokens("second") == undisturbed(second)
    # Whole pages of all that had KV: the prompt and all outputs but the last.
    assert second.cached_tokens == 35 // PAGE * PAGE
    assert computed(engine) - before == len(turn) - second.cached_tokens


def test_under_write_back_an_eviction_finds_its_pages_saved() -> None:
    waited = {}
    for share in (4, 10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hi_radix_cache, "CLEAN_SHARE", share)
            engine = Engine(
                pages=64, host_pages=128, host_write="write_back", copy_delay=lambda: 1, rows=2
            )
            for n in range(12):
                req = make_req(f"r{n}", conversation(n, 20), max_new_tokens=8)
                engine.add(req)
                engine.drain()
                assert engine.tokens(req.rid) == undisturbed(req)
        copier = engine.host_copier
        assert copier is not None
        assert len(copier.copies) > 0
        waited[share] = sum(copy.waited_for for copy in copier.copies)
    # With a page at hand in place of sixteen, evictions wait for their copies.
    assert waited[4] == 0 < waited[10**9]


def test_under_write_back_only_what_goes_next_is_copied() -> None:
    engine = Engine(pages=64, host_pages=128, host_write="write_back")
    for n in range(14):
        engine.add(make_req(f"r{n}", conversation(n, 20), max_new_tokens=4))
        engine.drain()
    tree = engine.memory.tree_cache
    written = engine.memory.host_cache.counters.written  # type: ignore[union-attr]
    assert tree.total_pages() > 40
    assert 0 < written < 24


def test_nobody_waits_for_a_load_but_who_wants_it() -> None:
    engine = Engine(host_pages=32, copy_delay=lambda: 4)
    engine.add(make_req("first", conversation(1, 24), max_new_tokens=2))
    engine.drain()
    evict_everything(engine)
    back = make_req("back", conversation(1, 25), max_new_tokens=2)
    other = make_req("other", conversation(2, 9), max_new_tokens=2)
    engine.add(back, other)
    engine.step()
    assert "other" in engine.outputs
    assert back.pages == []
    held = engine.scheduler.page_counts().held
    assert held == 6
    engine.drain()
    assert back.cached_tokens == 24
    assert engine.tokens("back") == undisturbed(back)
    assert engine.scheduler.page_counts().held == 0


def test_nobody_takes_the_room_of_one_whose_kv_is_on_its_way() -> None:
    engine = Engine(pages=14, host_pages=32, copy_delay=lambda: 2, chunked_prefill_size=None)
    engine.add(make_req("first", conversation(1, 24), max_new_tokens=2))
    engine.drain()
    evict_everything(engine)
    # 6 of 14 pages are being loaded for the first, whose growth the second would fit into.
    back = make_req("back", conversation(1, 26), max_new_tokens=9)
    greedy = make_req("greedy", conversation(2, 12), max_new_tokens=15)
    engine.add(back, greedy)
    engine.drain()
    assert back.t_first_token < greedy.t_first_token
    assert back.retraction_count == 0
    assert engine.tokens("back") == undisturbed(back)
    assert engine.tokens("greedy") == undisturbed(greedy)


def test_an_abort_during_a_load_frees_nothing_under_the_copy() -> None:
    engine = Engine(host_pages=32, copy_delay=lambda: 3)
    engine.add(make_req("first", conversation(1, 24), max_new_tokens=2))
    engine.drain()
    evict_everything(engine)
    engine.add(make_req("back", conversation(1, 25)))
    engine.step()
    assert engine.scheduler.page_counts().held == 6
    engine.scheduler.abort_request(RequestId("back"))
    engine.step()
    assert engine.released[-1] == "back"
    assert engine.scheduler.page_counts().held == 6
    engine.drain()
    assert engine.scheduler.page_counts().held == 0
    assert len(engine.memory.tree_cache.match_prefix(conversation(1, 24)).pages) == 6


def test_a_hit_that_does_not_fit_whole_is_computed_instead() -> None:
    engine = Engine(pages=12, host_pages=32)
    engine.add(make_req("first", conversation(1, 24), max_new_tokens=2))
    engine.drain()
    tree = engine.memory.tree_cache
    evict_everything(engine)
    taken = engine.memory.alloc_pages(8)
    match = tree.match_prefix(conversation(1, 24))
    assert match.last_host_node is not None
    assert tree.load_back(match.last_host_node) is LoadBack.NOTHING
    assert tree.match_prefix(conversation(1, 24)).pages == []
    engine.memory.free_pages(taken)
    tree.check_host()
    assert tree.load_back(match.last_host_node) is LoadBack.DONE
    assert len(tree.match_prefix(conversation(1, 24)).pages) == 6


def test_a_spoilt_host_page_is_computed_again_with_all_behind_it() -> None:
    engine = Engine(host_pages=32)
    prompt = conversation(1, 24)
    engine.add(make_req("first", prompt, max_new_tokens=2))
    engine.drain()
    evict_everything(engine)
    assert engine.host_copier is not None
    node = engine.memory.tree_cache.match_prefix(prompt[: 3 * PAGE]).last_host_node
    assert node is not None
    third = node.host_pages[2]
    spoilt = bytearray(engine.host_copier.host[third])
    spoilt[0] ^= 1
    engine.host_copier.host[third] = bytes(spoilt)
    back = make_req("back", [*prompt, 3], max_new_tokens=4)
    engine.add(back)
    engine.drain()
    assert engine.tokens("back") == undisturbed(back)
    assert back.cached_tokens == 2 * PAGE
    assert "1 spoilt" in engine.memory.tree_cache.pretty_print()


def test_tenants_do_not_share_host_memory_either() -> None:
    engine = Engine(host_pages=32)
    engine.add(make_req("first", conversation(1, 24), max_new_tokens=2, cache_salt="a"))
    engine.drain()
    evict_everything(engine)
    for salt, cached in (("b", 0), ("", 0), ("a", 24)):
        req = make_req(f"salt {salt}", conversation(1, 25), max_new_tokens=2, cache_salt=salt)
        engine.add(req)
        engine.drain()
        assert req.cached_tokens == cached
        assert engine.tokens(req.rid) == undisturbed(req)


def test_the_tree_is_printed_with_what_is_where() -> None:
    engine = Engine(host_pages=8, copy_delay=lambda: 1)
    engine.add(make_req("first", conversation(1, 8), max_new_tokens=2))
    while "writing" not in engine.memory.tree_cache.pretty_print():
        engine.step()
    engine.drain()
    text = engine.memory.tree_cache.pretty_print()
    assert "pages=2 locks=0 host=2" in text
    assert "host memory: 2 of 8 pages in use; 2 written, 0 loaded, 0 spoilt" in text
    evict_everything(engine)
    assert "pages=0 locks=0 host=2" in engine.memory.tree_cache.pretty_print()


def test_a_prefix_for_a_transfer_can_be_loaded_before_it_is_locked() -> None:
    engine = Engine(host_pages=32, copy_delay=lambda: 1)
    engine.add(make_req("first", conversation(1, 24), max_new_tokens=2))
    engine.drain()
    evict_everything(engine)
    req = make_req("a", conversation(1, 30))
    scheduler = engine.scheduler
    assert scheduler.lock_prefix(req) == []
    assert scheduler.load_prefix(req) is LoadBack.PENDING
    scheduler.unlock_prefix(req)
    while scheduler.has_work():
        engine.step()
    assert len(scheduler.lock_prefix(req)) == 6
    assert scheduler.load_prefix(req) is LoadBack.NOTHING
    scheduler.unlock_prefix(req)
    assert engine.memory.tree_cache.protected_size() == 0


# ---- retracted requests


def crowd(engine: Engine, prompts: int = 3, new_tokens: int = 40) -> list[Req]:
    reqs = [hopeful(f"r{i}", conversation(i + 1, 9 + i), new_tokens) for i in range(prompts)]
    engine.add(*reqs)
    return reqs


def small_engine(**settings_: Any) -> Engine:
    return Engine(**{"pages": 20, "conservativeness": 0.01, "retract_pages": 40, **settings_})


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("radix", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
def test_a_retracted_request_returns_with_its_kv(delay: int, radix: bool, overlap: bool) -> None:
    engine = small_engine(copy_delay=lambda: delay, radix=radix, overlap=overlap)
    reqs = crowd(engine)
    engine.drain()
    assert engine.scheduler.num_retractions > 0
    for req in reqs:
        assert engine.tokens(req.rid) == expected_of(req)
    # Nothing was computed twice but each returning request's last token.
    prompts = sum(req.prompt_len for req in reqs)
    assert computed(engine) == prompts + engine.scheduler.num_retractions
    assert engine.memory.retracted is not None
    assert engine.memory.retracted.host.free_pages == 40


def test_a_request_whose_kv_came_by_transfer_returns_without_a_prefill() -> None:
    engine = small_engine()
    reqs = [hopeful(f"r{i}", conversation(i + 1, 9 + i), 40) for i in range(3)]
    for req in reqs:
        pages = engine.memory.alloc_pages(-(-req.prompt_len // PAGE))
        for position, token in enumerate(req.origin_input_ids):
            slot = pages[position // PAGE] * PAGE + position % PAGE
            engine.runner.kv_token[slot], engine.runner.kv_position[slot] = token, position
        engine.scheduler.add_prebuilt(req, pages, expected_of(req)[0])
    engine.drain()
    assert engine.scheduler.num_retractions > 0
    for req in reqs:
        assert engine.tokens(req.rid) == expected_of(req)[1:]
    assert computed(engine) == engine.scheduler.num_retractions


def test_without_room_on_the_host_a_retracted_request_computes_it_again() -> None:
    engine = small_engine(retract_pages=1, radix=False)
    reqs = crowd(engine)
    engine.drain()
    assert engine.scheduler.num_retractions > 0
    for req in reqs:
        assert engine.tokens(req.rid) == expected_of(req)
    assert computed(engine) > sum(req.prompt_len for req in reqs) + engine.scheduler.num_retractions


def test_kept_kv_that_is_spoilt_is_not_used() -> None:
    engine = small_engine(radix=False, copy_delay=lambda: 1)
    reqs = crowd(engine)
    copier = engine.retract_copier
    assert copier is not None
    spoil_when_kept(engine, reqs, lambda page: bytes([copier.host[page][0] ^ 1]))
    engine.drain()
    for req in reqs:
        assert engine.tokens(req.rid) == expected_of(req)
    assert engine.memory.retracted is not None
    assert engine.memory.retracted.host.counters.spoilt > 0


def spoil_when_kept(engine: Engine, reqs: list[Req], first_byte: Callable[[int], bytes]) -> None:
    retracted, copier = engine.memory.retracted, engine.retract_copier
    assert retracted is not None
    assert copier is not None
    while not any(retracted.state(req) is KeptState.SAVED for req in reqs):
        engine.step()
    for page in range(copier.num_pages):
        if not retracted.host.allocator.is_free(page):
            copier.host[page] = first_byte(page) + copier.host[page][1:]


@pytest.mark.parametrize("state", [KeptState.SAVING, KeptState.SAVED, KeptState.LOADING])
@pytest.mark.parametrize("radix", [True, False])
def test_a_retracted_request_can_be_aborted_at_any_time(state: KeptState, radix: bool) -> None:
    engine = small_engine(copy_delay=lambda: 3, radix=radix)
    reqs = crowd(engine)
    retracted = engine.memory.retracted
    assert retracted is not None
    for _ in range(300):
        engine.step()
        found = [req for req in reqs if retracted.state(req) is state]
        if found:
            break
    assert found, f"nobody was {state.name}"
    for req in found:
        assert engine.scheduler.abort_request(req.rid)
        engine.step()
        assert retracted.state(req) is None
    engine.drain()
    for req in reqs:
        if req not in found:
            assert engine.tokens(req.rid) == expected_of(req)
    assert retracted.host.free_pages == 40
    counts = engine.scheduler.page_counts()
    assert (counts.in_use, counts.held) == (0, 0)


def test_what_is_loaded_gives_way_to_one_that_goes_first() -> None:
    engine = small_engine(pages=20, copy_delay=lambda: 2, priorities=True)
    reqs = crowd(engine, prompts=2, new_tokens=50)
    retracted = engine.memory.retracted
    assert retracted is not None
    for _ in range(300):
        engine.step()
        loading = [req for req in reqs if retracted.state(req) is KeptState.LOADING]
        if loading:
            break
    assert loading
    urgent = make_req("urgent", conversation(9, 30), max_new_tokens=20, priority=-100)
    engine.add(urgent)
    engine.drain()
    for req in [*reqs, urgent]:
        assert engine.tokens(req.rid) == expected_of(req)


def test_the_cheaper_way_back_is_taken() -> None:
    def cheaper(num_bytes: int, num_tokens: int, copy: float | None, prefill: float | None) -> bool:
        return restore_is_cheaper(
            num_bytes=num_bytes,
            num_tokens=num_tokens,
            copy_bytes_per_s=copy,
            prefill_tokens_per_s=prefill,
        )

    assert cheaper(10**9, 1000, 50e9, 10_000)  # 20 ms or 100 ms
    assert not cheaper(10**9, 100, 5e9, 10_000)  # 200 ms or 10 ms
    # What was never tried is tried first, where it would tell something.
    assert cheaper(10**9, 1000, None, 1e12)
    assert not cheaper(1, 1000, 1e12, None)
    assert cheaper(10**9, 100, 1.0, None)


def test_many_tokens_say_more_of_a_speed_than_few() -> None:
    rate = Rate()
    rate.observe(8000, 0.2)
    for _ in range(3):
        rate.observe(10, 0.005)
    assert rate.per_s is not None
    assert rate.per_s > 30_000
    for _ in range(40):
        rate.observe(4000, 0.2)
    assert rate.per_s == pytest.approx(20_000, rel=0.01)


def test_where_computing_is_cheaper_nothing_is_kept() -> None:
    engine = small_engine()
    retracted = engine.memory.retracted
    assert retracted is not None
    retracted.host.rate.observe(1, 1000.0)
    retracted.prefill_rate.observe(1e9, 1.0)
    reqs = crowd(engine)
    engine.drain()
    assert engine.scheduler.num_retractions > 0
    assert retracted.host.counters.written == 0
    for req in reqs:
        assert engine.tokens(req.rid) == expected_of(req)


# ---- anything


@given(
    seed=st.integers(0, 2**32),
    page_size=st.sampled_from([1, 4, 16]),
    memory_tokens=st.sampled_from([96, 128, 192]),
    host_tokens=st.sampled_from([0, 64, 400]),
    retract_tokens=st.sampled_from([0, 64, 400]),
    host_write=st.sampled_from(["write_through", "write_back"]),
    delay=st.sampled_from([0, 1, 4]),
    overlap=st.booleans(),
    mixed=st.booleans(),
    abort_share=st.sampled_from([0.0, 0.0, 0.1]),
)
@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
def test_conversations_over_far_too_little_memory_are_exact(
    seed: int,
    page_size: int,
    memory_tokens: int,
    host_tokens: int,
    retract_tokens: int,
    host_write: Any,
    delay: int,
    overlap: bool,
    mixed: bool,
    abort_share: float,
) -> None:
    rng = random.Random(seed)
    engine = Engine(
        pages=memory_tokens // page_size,
        page_size=page_size,
        rows=4,
        mixed=mixed,
        overlap=overlap,
        conservativeness=0.02,
        host_pages=host_tokens // page_size,
        retract_pages=retract_tokens // page_size,
        host_write=host_write,
        copy_delay=lambda: rng.randint(0, delay),
    )
    histories: dict[int, list[int]] = {topic: conversation(topic, 20) for topic in range(4)}
    plan: dict[str, tuple[Req, int]] = {}
    aborted: set[str] = set()
    turns, passes = 10, 0
    while turns or engine.scheduler.has_work():
        passes += 1
        assert passes < 2000
        if turns and rng.random() < 0.4:
            turns -= 1
            topic = rng.randrange(4)
            salt = rng.choice(["", "", "", "tenant"])
            prompt = [*histories[topic][:70], rng.randrange(1, 40)]
            req = hopeful(f"r{turns}", prompt, rng.choice([2, 9, 25]), cache_salt=salt)
            try:
                engine.add(req)
                plan[req.rid] = (req, topic)
            except InvalidRequestError:
                histories[topic] = conversation(topic, 20)
        if plan and rng.random() < abort_share:
            rid = rng.choice(sorted(plan))
            if engine.scheduler.abort_request(plan[rid][0].rid):
                aborted.add(rid)
        for output in engine.step().outputs:
            if output.finish_reason is not None:
                req, topic = plan[output.rid]
                histories[topic] = req.origin_input_ids + req.output_ids
    assert not engine.errors
    for rid, (req, _) in plan.items():
        tokens, expected = engine.tokens(rid), expected_of(req)
        assert tokens == (expected[: len(tokens)] if rid in aborted else expected)
    counts = engine.scheduler.page_counts()
    assert (counts.in_use, counts.held) == (0, 0)
    tree = engine.memory.tree_cache
    assert tree.protected_size() == 0
    tree.evict(memory_tokens)
    assert engine.memory.allocator.free_pages == memory_tokens // page_size
    tree.check_host()
