"""Eviction of the least often used prefix, beside the least recently used one."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from engine.memory.page_allocator import PageAllocator
from engine.memory.prefix_cache import TreeNode
from engine.memory.radix_cache import RadixCache
from engine.memory.req_to_token import ReqToTokenPool
from engine.types import RadixEvictionPolicy
from tests.engine.scheduler.stub import Engine, make_req

PAGE = 2


def make_cache(policy: RadixEvictionPolicy = "lfu", pages: int = 64) -> RadixCache:
    return RadixCache(PageAllocator(pages, PAGE), ReqToTokenPool(2, 64), eviction_policy=policy)


def keep(cache: RadixCache, tokens: Sequence[int]) -> None:
    pages = cache.allocator.alloc(len(tokens) // PAGE)
    assert pages is not None
    existing, _ = cache.insert(tokens, pages)
    cache.allocator.free(pages[: len(existing)])


def use(cache: RadixCache, tokens: Sequence[int], times: int = 1) -> TreeNode:
    for _ in range(times):
        node = cache.match_prefix(tokens).last_node
        cache.record_hit(node)
    return node


def cached(cache: RadixCache, tokens: Sequence[int]) -> int:
    return len(cache.match_prefix(tokens).pages)


def test_what_is_used_often_outlives_what_was_used_last() -> None:
    for policy, survivor in (("lfu", [1] * 4), ("lru", [2] * 4)):
        cache = make_cache(policy)  # type: ignore[arg-type]
        keep(cache, [1] * 4)
        use(cache, [1] * 4, 3)
        keep(cache, [2] * 4)
        use(cache, [2] * 4, 2)
        assert cache.evict(4) == 4
        assert cached(cache, survivor) == 2
        assert cache.total_pages() == 2


def test_of_those_used_equally_often_the_least_recently_used_goes() -> None:
    cache = make_cache()
    for token in (1, 2, 3):
        keep(cache, [token] * 2)
        use(cache, [token] * 2)
    cache.match_prefix([1, 1])  # looked at last
    assert cache.evict(2) == 2
    assert [cached(cache, [token] * 2) for token in (1, 2, 3)] == [1, 0, 1]


def test_a_look_is_no_use() -> None:
    cache = make_cache()
    keep(cache, [1, 1])
    use(cache, [1, 1])
    keep(cache, [2, 2])
    for _ in range(9):  # a waiting request looks in every pass
        cache.match_prefix([2, 2])
    assert cache.evict(2) == 2
    assert cached(cache, [1, 1]) == 1


def test_both_parts_of_a_split_keep_the_count() -> None:
    cache = make_cache()
    keep(cache, [1] * 8)
    lower = use(cache, [1] * 8, 5)
    upper = cache.match_prefix([1] * 4).last_node
    assert upper is lower.parent
    assert (upper.hit_count, lower.hit_count) == (5, 5)
    use(cache, [1] * 4)
    assert (upper.hit_count, lower.hit_count) == (6, 5)
    keep(cache, [2] * 2)
    use(cache, [2] * 2, 4)
    assert cache.evict(2) == 2
    assert cached(cache, [1] * 8) == 4


def test_an_admitted_request_is_one_use_however_many_chunks_it_takes() -> None:
    engine = Engine(chunked_prefill_size=4, eviction="lfu", pages=64)
    tree = engine.memory.tree_cache
    for rid in ("first", "second", "third"):
        engine.add(make_req(rid, [1] * 8 + [ord(rid[0]) % 40] * 16, max_new_tokens=2))
        engine.drain()
    node = tree.match_prefix([1] * 8).last_node
    assert node.hit_count == 2  # the first computed it


def test_in_the_engine_a_system_prompt_survives_a_flood() -> None:
    survivors = {}
    for policy in ("lru", "lfu"):
        engine = Engine(pages=24, eviction=policy)  # type: ignore[arg-type]
        system = [7] * 16
        for user in range(3):
            engine.add(make_req(f"chat{user}", [*system, user], max_new_tokens=1))
            engine.drain()
        for number in range(8):
            engine.add(make_req(f"flood{number}", [20 + number] * 16, max_new_tokens=1))
            engine.drain()
        survivors[policy] = len(engine.memory.tree_cache.match_prefix(system).pages)
    assert survivors == {"lru": 0, "lfu": 4}


def test_what_was_used_often_once_does_not_stay_for_ever() -> None:
    cache = make_cache(pages=4)
    keep(cache, [1] * 2)
    use(cache, [1] * 2, 10)
    turnovers = 0
    while cached(cache, [1] * 2):
        for number in range(3):
            if not cache.allocator.free_pages:
                cache.evict(PAGE)
            keep(cache, [2 + turnovers * 3 + number] * 2)
        turnovers += 1
        assert turnovers < 20
    assert turnovers > 8


@given(
    st.lists(st.tuples(st.sampled_from(["keep", "use", "evict"]), st.integers(0, 9)), max_size=60)
)
def test_single_pages_go_in_the_order_of_a_count_that_ages(
    moves: list[tuple[str, int]],
) -> None:
    cache = make_cache()
    hits: dict[int, int] = {}
    worth: dict[int, int] = {}
    age = 0
    last: dict[int, int] = {}
    for now, (move, which) in enumerate(moves):
        if move == "keep":
            keep(cache, [which] * PAGE)
            if which not in hits:
                hits[which], worth[which] = 0, age + 1
            last[which] = now
        elif move == "use" and which in hits:
            use(cache, [which] * PAGE)
            hits[which] += 1
            worth[which] = age + 1 + hits[which]
            last[which] = now
        elif move == "evict" and hits:
            gone = min(hits, key=lambda key: (worth[key], last[key]))
            age = max(age, worth[gone])
            cache.evict(PAGE)
            del hits[gone], last[gone]
        children = {node.tokens[0] for _, node in cache._nodes() if node.parent is not None}
        assert children == set(hits)
