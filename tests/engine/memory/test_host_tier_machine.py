"""Random use of the prefix tree with a host tier: contents are followed page by page."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.memory.audit import count_pages
from engine.memory.hi_radix_cache import HiRadixCache
from engine.memory.host_pool import HostPool
from engine.memory.page_allocator import PageAllocator
from engine.memory.prefix_cache import LoadBack, TreeNode
from engine.memory.req_to_token import ReqToTokenPool
from engine.types import HostWritePolicy, RadixEvictionPolicy
from tests.engine.memory.fake_copier import FakeCopier

DEVICE_PAGES = 20
GARBAGE = b"somebody else's"

# Conversations in pages: a few beginnings, which all share their first page, and what comes then.
_BEGINNINGS = ([0, 1, 2, 3, 4, 5], [0, 1, 2, 9, 9, 9], [0, 7, 7, 7, 7, 7])
conversations = st.builds(
    lambda beginning, own, pages: (_BEGINNINGS[beginning] + [20 + own] * 8)[:pages],
    st.integers(0, 2),
    st.integers(0, 1),
    st.integers(2, 11),
)
keys = st.sampled_from(["", "", "", "tenant"])


def content(tokens: Sequence[int], key: str) -> bytes:
    """What a page must hold whose last token is the last of `tokens`."""
    return hashlib.blake2b(bytes(tokens), key=key.encode(), digest_size=16).digest()


@dataclass
class Holder:
    """A request that reads a prefix."""

    node: TreeNode
    pages: list[int]
    expected: list[bytes]


class HostTierMachine(RuleBasedStateMachine):
    """Each page's content is a function of all tokens up to its end, and of the namespace."""

    @initialize(
        page_size=st.sampled_from([1, 2, 3]),
        host_pages=st.sampled_from([40, 40, 9, 3]),
        write_policy=st.sampled_from(["write_through", "write_back"]),
        eviction_policy=st.sampled_from(["lru", "lfu"]),
        delays=st.sampled_from([4, 4, 0]),
        seed=st.integers(0, 99),
    )
    def start(
        self,
        page_size: int,
        host_pages: int,
        write_policy: HostWritePolicy,
        eviction_policy: RadixEvictionPolicy,
        delays: int,
        seed: int,
    ) -> None:
        rng = random.Random(seed)
        self.page_size = page_size
        self.device = [b"empty"] * DEVICE_PAGES
        self.copier = FakeCopier(
            host_pages,
            read=lambda page: self.device[page],
            write=self._write,
            delay=lambda: rng.randint(0, delays),
        )
        self.allocator = PageAllocator(DEVICE_PAGES, page_size)
        self.host = HostPool(self.copier, page_size)
        self.tree = HiRadixCache(
            self.allocator,
            ReqToTokenPool(2, 64),
            self.host,
            write_policy=write_policy,
            eviction_policy=eviction_policy,
        )
        self.holders: list[Holder] = []
        self.others: list[list[int]] = []
        self.spoilt: set[int] = set()

    def _write(self, page: int, data: bytes) -> None:
        self.device[page] = data

    def _alloc(self, count: int) -> list[int] | None:
        missing = count - self.allocator.free_pages
        if missing > self.tree.evictable_size() // self.page_size:
            return None
        if missing > 0:
            self.tree.evict(missing * self.page_size)
        pages = self.allocator.alloc(count)
        assert pages is not None, "what is evictable could not be evicted"
        return pages

    def _expected(self, tokens: list[int], key: str) -> list[bytes]:
        ends = range(self.page_size, len(tokens) + 1, self.page_size)
        return [content(tokens[:end], key) for end in ends]

    def _tokens(self, conversation: list[int]) -> list[int]:
        return [token for page in conversation for token in [page] * self.page_size]

    @rule(conversation=conversations, key=keys, keep=st.sampled_from([False, False, True]))
    def compute(self, conversation: list[int], key: str, keep: bool) -> None:
        """A request without a load-back: takes the device's hit, computes the rest, ends."""
        whole = self._tokens(conversation)
        match = self.tree.match_prefix(whole, key)
        self.tree.inc_lock_ref(match.last_node)
        fresh = self._alloc(len(whole) // self.page_size - len(match.pages))
        if fresh is not None:
            pages = match.pages + fresh
            expected = self._expected(whole, key)
            for page, data in zip(fresh, expected[len(match.pages) :], strict=True):
                self.device[page] = data
            existing, node = self.tree.insert(whole, pages, key)
            self.allocator.free(pages[len(match.pages) : len(existing)])
            if keep and len(self.holders) < 2:
                self.tree.inc_lock_ref(node)
                kept = existing + pages[len(existing) :]
                self.holders.append(Holder(node, kept, expected))
        self.tree.dec_lock_ref(match.last_node)

    @rule(conversation=conversations, key=keys, keep=st.sampled_from([False, False, True]))
    def come_back(self, conversation: list[int], key: str, keep: bool) -> None:
        """A request that loads back what is in host memory."""
        tokens = self._tokens(conversation)
        match = self.tree.match_prefix(tokens, key)
        expected = self._expected(tokens, key)
        assert [self.device[page] for page in match.pages] == expected[: len(match.pages)]
        self.tree.inc_lock_ref(match.last_node)
        if match.last_host_node is not None:
            spoilt_before = self.host.counters.spoilt
            outcome = self.tree.load_back(match.last_host_node)
            again = self.tree.match_prefix(tokens, key)
            if self.host.counters.spoilt == spoilt_before:
                loaded = match.host_hit_pages if outcome is LoadBack.DONE else 0
                assert len(again.pages) == len(match.pages) + loaded
            assert [self.device[page] for page in again.pages] == expected[: len(again.pages)]
            if keep and len(self.holders) < 2:
                self.tree.inc_lock_ref(again.last_node)
                self.holders.append(
                    Holder(again.last_node, again.pages, expected[: len(again.pages)])
                )
        self.tree.dec_lock_ref(match.last_node)

    @precondition(lambda self: self.holders)
    @rule(which=st.integers(0, 99))
    def let_go(self, which: int) -> None:
        holder = self.holders.pop(which % len(self.holders))
        self.tree.dec_lock_ref(holder.node)

    @rule(count=st.integers(1, 10))
    def evict(self, count: int) -> None:
        evictable = self.tree.evictable_size()
        freed = self.tree.evict(count * self.page_size)
        assert freed >= min(count * self.page_size, evictable)

    @rule()
    def everything_leaves_the_device(self) -> None:
        self.tree.evict(DEVICE_PAGES * self.page_size)

    @precondition(lambda self: not self.others)
    @rule(count=st.integers(1, 6))
    def take_for_others(self, count: int) -> None:
        """Tickets and the like: they write what they get at once."""
        pages = self._alloc(count)
        if pages is not None:
            self.others.append(pages)
            for page in pages:
                self.device[page] = GARBAGE

    @precondition(lambda self: self.others)
    @rule()
    def give_back(self) -> None:
        self.allocator.free(self.others.pop(0))

    @rule()
    def poll(self) -> None:
        self.tree.check_hicache_events()

    @rule(which=st.integers(0, 99), really=st.sampled_from([False] * 9 + [True]))
    def spoil(self, which: int, really: bool) -> None:
        page = which % self.copier.num_pages
        if really:
            self.copier.host[page] += b"?"
            self.spoilt.add(page)

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        for page in self.allocator.free_list():
            self.device[page] = GARBAGE  # whoever reads or fills it by mistake is found out
        counts = count_pages(
            allocator=self.allocator,
            tree_cache=self.tree,
            other_in_use=[*self.others, *(holder.pages for holder in self.holders)],
            held=self.tree.pages_under_copy(),
        )
        assert counts.balanced
        self.tree.check_host()
        counted = self.tree.evictable_size() + self.tree.protected_size()
        assert counted == self.tree.total_pages() * self.page_size

    @invariant()
    def every_page_holds_what_its_tokens_say(self) -> None:
        for holder in self.holders:
            assert [self.device[page] for page in holder.pages] == holder.expected
        stack: list[tuple[TreeNode, list[int], str]] = [
            (root, [], key) for key, root in self.tree._roots.items()
        ]
        while stack:
            node, above, key = stack.pop()
            tokens = above + node.tokens
            expected = self._expected(tokens, key)[len(above) // self.page_size :]
            if node.pages:
                assert [self.device[page] for page in node.pages] == expected
            for page, data in zip(node.host_pages, expected, strict=False):
                assert self.copier.host[page] == data or page in self.spoilt
            stack.extend((child, tokens, key) for child in node.children.values())
        if not self.spoilt:
            assert self.host.counters.spoilt == 0

    def teardown(self) -> None:
        if not hasattr(self, "tree"):
            return
        for holder in self.holders:
            self.tree.dec_lock_ref(holder.node)
        for pages in self.others:
            self.allocator.free(pages)
        for _ in range(99):
            self.tree.check_hicache_events()
        assert not self.tree.has_pending_copies()
        assert self.tree.protected_size() == 0
        self.tree.evict(DEVICE_PAGES * self.page_size)
        assert self.allocator.free_pages == DEVICE_PAGES
        self.tree.check_host()


TestHostTier = HostTierMachine.TestCase
TestHostTier.settings = settings(
    max_examples=30, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow]
)


def drive(seed: int) -> HostTierMachine:
    """The machine's rules in an order that brings conversations back after they were evicted, which
    a search over rules rarely does."""
    rng = random.Random(seed)
    machine = HostTierMachine()
    machine.start(
        page_size=rng.choice([1, 2]),
        host_pages=rng.choice([40, 40, 9, 3]),
        write_policy=rng.choice(["write_through", "write_back"]),
        eviction_policy=rng.choice(["lru", "lfu"]),
        delays=rng.choice([4, 4, 0]),
        seed=seed,
    )

    def conversation() -> list[int]:
        return (rng.choice(_BEGINNINGS) + [20 + rng.randrange(2)] * 8)[: rng.randint(2, 11)]

    may_spoil = rng.random() < 0.3
    for _ in range(60):
        key, keep = rng.choice(["", "", "", "tenant"]), rng.random() < 0.3
        match rng.choice("ccccbbbbbbpppeeExgls"):
            case "c":
                machine.compute(conversation(), key, keep)
            case "b":
                machine.come_back(conversation(), key, keep)
            case "p":
                machine.poll()
            case "e":
                machine.evict(rng.randint(1, 10))
            case "E":
                machine.everything_leaves_the_device()
            case "x" if not machine.others:
                machine.take_for_others(rng.randint(1, 6))
            case "g" if machine.others:
                machine.give_back()
            case "l" if machine.holders:
                machine.let_go(rng.randrange(9))
            case "s":
                machine.spoil(rng.randrange(99), may_spoil)
            case _:
                pass
        machine.every_page_is_accounted_for()
        machine.every_page_holds_what_its_tokens_say()
    machine.teardown()
    return machine


@given(st.integers(0, 2**32))
@settings(max_examples=150)
def test_conversations_that_leave_and_return_find_what_was_theirs(seed: int) -> None:
    drive(seed)


def test_the_driven_machine_meets_what_it_is_there_for() -> None:
    counters = [drive(seed).host.counters for seed in range(30)]
    assert sum(c.loaded for c in counters) > 100
    assert sum(c.written for c in counters) > 100
    assert sum(c.spoilt for c in counters) > 0
