"""The prefix tree: whole pages, locks, least recently used leaves, duplicates."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.memory.page_allocator import PageAllocator
from engine.memory.prefix_cache import ChunkCache, TreeNode
from engine.memory.radix_cache import PrefixCacheError, RadixCache
from engine.memory.req_to_token import ReqToTokenPool, page_slots


@dataclass
class FakeReq:
    tokens: list[int]
    pages: list[int]
    kv_committed_len: int
    req_pool_idx: int | None = None
    tree_len: int = 0
    last_node: TreeNode | None = None
    extra_key: str = field(default="")

    def token_ids(self, end: int) -> list[int]:
        return self.tokens[:end]


def make_cache(pages: int = 32, page_size: int = 2) -> RadixCache:
    return RadixCache(PageAllocator(pages, page_size), ReqToTokenPool(4, 64))


def alloc(cache: RadixCache, n: int) -> list[int]:
    pages = cache.allocator.alloc(n)
    assert pages is not None
    return pages


def insert(cache: RadixCache, tokens: list[int], key: str = "") -> list[int]:
    pages = alloc(cache, len(tokens) // cache.page_size)
    existing, _ = cache.insert(tokens, pages, key)
    cache.allocator.free(pages[: len(existing)])
    return existing + pages[len(existing) :]


def test_a_match_is_the_longest_prefix_in_whole_pages() -> None:
    cache = make_cache()
    pages = insert(cache, [1, 2, 3, 4, 5, 6])
    assert cache.match_prefix([1, 2, 3, 4, 5, 6, 7]).pages == pages
    assert cache.match_prefix([1, 2, 3, 4, 5, 9]).pages == pages[:2]
    assert cache.match_prefix([1, 2, 3]).pages == pages[:1]
    assert cache.match_prefix([1]).pages == []
    assert cache.match_prefix([2, 1]).pages == []


def test_branches_share_what_they_have_in_common() -> None:
    cache = make_cache()
    first = insert(cache, [1, 2, 3, 4, 5, 6])
    second = insert(cache, [1, 2, 3, 4, 7, 8])
    assert second[:2] == first[:2]
    assert second[2] != first[2]
    assert cache.total_pages() == 4
    assert cache.match_prefix([1, 2, 3, 4, 7, 8]).pages == second


def test_namespaces_never_share() -> None:
    cache = make_cache()
    insert(cache, [1, 2], "tenant a")
    assert cache.match_prefix([1, 2], "tenant b").pages == []
    assert cache.match_prefix([1, 2]).pages == []
    assert len(cache.match_prefix([1, 2], "tenant a").pages) == 1


def test_a_namespace_without_pages_is_forgotten() -> None:
    cache = make_cache()
    insert(cache, [1, 2], "tenant")
    assert cache.evict(2) == 2
    assert "tenant" not in cache.pretty_print()


def test_pages_and_tokens_must_agree() -> None:
    with pytest.raises(PrefixCacheError):
        make_cache().insert([1, 2, 3], [0])


def test_eviction_takes_the_least_recently_used_and_only_what_is_asked() -> None:
    cache = make_cache()
    insert(cache, [1, 1, 1, 1])
    insert(cache, [2, 2, 2, 2])
    cache.match_prefix([1, 1, 1, 1])
    assert cache.evict(2) == 2
    assert len(cache.match_prefix([2, 2, 2, 2]).pages) == 1
    assert len(cache.match_prefix([1, 1, 1, 1]).pages) == 2


def test_a_parent_goes_after_its_children() -> None:
    cache = make_cache()
    insert(cache, [1, 1, 2, 2])
    insert(cache, [1, 1, 3, 3])
    assert cache.evict(4) == 4
    assert len(cache.match_prefix([1, 1]).pages) == 1
    assert cache.evict(100) == 2
    assert cache.total_pages() == 0
    assert cache.allocator.free_pages == 32


def test_locked_prefixes_stay_and_are_not_counted_as_evictable() -> None:
    cache = make_cache()
    pages = insert(cache, [1, 1, 2, 2, 3, 3])
    node = cache.match_prefix([1, 1, 2, 2]).last_node
    cache.inc_lock_ref(node)
    assert (cache.evictable_size(), cache.protected_size()) == (2, 4)
    assert cache.evict(100) == 2
    assert cache.match_prefix([1, 1, 2, 2]).pages == pages[:2]
    cache.dec_lock_ref(node)
    assert (cache.evictable_size(), cache.protected_size()) == (4, 0)
    assert cache.evict(100) == 4
    with pytest.raises(PrefixCacheError):
        cache.dec_lock_ref(TreeNode(parent=node, tokens=[], pages=[]))


def test_a_lock_survives_a_split_of_its_node() -> None:
    cache = make_cache()
    insert(cache, [1, 1, 2, 2, 3, 3])
    node = cache.match_prefix([1, 1, 2, 2, 3, 3]).last_node
    cache.inc_lock_ref(node)
    insert(cache, [1, 1, 9, 9])
    assert (cache.evictable_size(), cache.protected_size()) == (2, 6)
    cache.dec_lock_ref(node)
    assert cache.protected_size() == 0


def test_an_unfinished_request_shares_its_pages_and_keeps_them_locked() -> None:
    cache = make_cache()
    req = FakeReq([1, 2, 3, 4, 5], alloc(cache, 3), 5)
    cache.cache_unfinished_req(req)
    assert req.tree_len == 4
    assert cache.match_prefix([1, 2, 3, 4]).pages == req.pages[:2]
    assert cache.protected_size() == 4
    cache.cache_finished_req(req)
    assert cache.protected_size() == 0
    assert cache.evictable_size() == 4
    assert cache.allocator.free_pages == 30


def test_duplicates_give_way_to_the_trees_pages_also_in_the_row() -> None:
    cache = make_cache()
    pages = insert(cache, [1, 2, 3, 4])
    row = cache.req_to_token.alloc(1)
    assert row is not None
    req = FakeReq([1, 2, 3, 4, 5], alloc(cache, 3), 5, row[0])
    own = list(req.pages)
    cache.cache_unfinished_req(req)
    assert req.pages == [*pages, own[2]]
    assert all(cache.allocator.is_free(page) for page in own[:2])
    expected = page_slots(pages, 2, 0, 4)
    assert cache.req_to_token.req_to_token[row[0], :4].tolist() == expected.tolist()


def test_a_request_that_is_being_read_keeps_its_duplicates_until_it_ends() -> None:
    cache = make_cache()
    pages = insert(cache, [1, 2, 3, 4])
    req = FakeReq([1, 2, 3, 4, 5, 6], alloc(cache, 3), 6)
    own = list(req.pages)
    cache.cache_unfinished_req(req, replace_duplicates=False)
    assert req.pages == own
    assert req.tree_len == 0
    cache.cache_finished_req(req)
    assert cache.match_prefix([1, 2, 3, 4, 5, 6]).pages == [*pages, own[2]]
    assert cache.allocator.free_pages == 29


def test_kv_that_is_not_to_be_trusted_is_freed() -> None:
    cache = make_cache()
    req = FakeReq([1, 2, 3, 4], alloc(cache, 2), 4)
    cache.cache_finished_req(req, insert=False)
    assert cache.total_pages() == 0
    assert cache.allocator.free_pages == 32


def test_the_disabled_cache_keeps_nothing() -> None:
    allocator = PageAllocator(4, 2)
    cache = ChunkCache(allocator, ReqToTokenPool(1, 8))
    pages = allocator.alloc(2)
    assert pages is not None
    req = FakeReq([1, 2, 3, 4], pages, 4)
    cache.cache_unfinished_req(req)
    assert req.tree_len == 0
    cache.cache_finished_req(req)
    assert allocator.free_pages == 4
    assert cache.match_prefix([1, 2]).pages == []
    assert cache.disable


token_lists = st.lists(st.integers(0, 1), max_size=12)


@given(
    st.lists(
        st.tuples(st.sampled_from(["insert", "match", "lock", "unlock", "evict"]), token_lists),
        max_size=40,
    ),
    st.sampled_from([1, 2, 3]),
)
def test_the_tree_agrees_with_a_dictionary(
    actions: list[tuple[str, list[int]]], page_size: int
) -> None:
    cache = make_cache(pages=200, page_size=page_size)
    known: dict[tuple[int, ...], int] = {}  # tokens up to the end of a page → page
    locks: list[tuple[TreeNode, list[int]]] = []
    for action, tokens in actions:
        whole = tokens[: len(tokens) // page_size * page_size]
        if action == "insert" and cache.allocator.free_pages >= len(whole) // page_size:
            for i, page in enumerate(insert(cache, whole)):
                key = tuple(whole[: (i + 1) * page_size])
                assert known.setdefault(key, page) == page
        elif action in ("match", "lock"):
            match = cache.match_prefix(tokens)
            expected = []
            for end in range(page_size, len(tokens) + 1, page_size):
                if tuple(tokens[:end]) not in known:
                    break
                expected.append(known[tuple(tokens[:end])])
            assert match.pages == expected
            if action == "lock":
                cache.inc_lock_ref(match.last_node)
                locks.append((match.last_node, match.pages))
        elif action == "unlock" and locks:
            cache.dec_lock_ref(locks.pop()[0])
        elif action == "evict":
            evictable = cache.evictable_size()
            assert cache.evict(len(tokens)) >= min(len(tokens), evictable)
            left = set(cache.iter_pages())
            known = {key: page for key, page in known.items() if page in left}
        in_tree = list(cache.iter_pages())
        assert sorted(in_tree) == sorted(known.values())
        assert {page for _, pages in locks for page in pages} <= set(in_tree)
        assert cache.protected_size() == page_size * len({p for _, ps in locks for p in ps})
        assert cache.evictable_size() + cache.protected_size() == page_size * len(in_tree)
        assert cache.allocator.free_pages + len(in_tree) == 200
