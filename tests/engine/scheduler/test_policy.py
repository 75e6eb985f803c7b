"""The orders of the waiting queue: who is considered first, and at what price."""

import random
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.memory.prefix_cache import TreeNode
from engine.memory.radix_cache import RadixCache
from engine.scheduler.config import SchedulePolicyName, SchedulerConfig
from engine.scheduler.policy import MATCH_AT_MOST, RANDOM_WINDOW, depth_first_by_weight
from engine.scheduler.req import Req
from tests.engine.scheduler.stub import Engine, make_req, undisturbed

POLICIES: tuple[SchedulePolicyName, ...] = ("fcfs", "lpm", "dfs-weight", "lof", "random")


def one_at_a_time(policy: SchedulePolicyName, **settings: Any) -> Engine:
    """Requests of it are served strictly in the policy's order."""
    defaults: dict[str, Any] = {"pages": 128, "max_running_requests": 1, "max_queued_requests": 400}
    return Engine(schedule_policy=policy, **{**defaults, **settings})


def served(engine: Engine, *reqs: Req) -> list[str]:
    engine.add(*reqs)
    engine.drain(5000)
    return engine.released


def letters(text: str, **params: Any) -> list[Req]:
    return [make_req(rid, [ord(rid) % 40], max_new_tokens=2, **params) for rid in text]


def test_fcfs_goes_by_arrival() -> None:
    assert served(one_at_a_time("fcfs"), *letters("dacb")) == list("dacb")


def test_lof_goes_by_the_longest_output_and_equals_by_arrival() -> None:
    reqs = [
        make_req(f"{n}{rid}", [1], max_new_tokens=n)
        for rid, n in zip("abcd", (3, 9, 3, 5), strict=True)
    ]
    assert served(one_at_a_time("lof"), *reqs) == ["9b", "5d", "3a", "3c"]


def test_random_is_an_order_of_its_own_that_a_seed_repeats() -> None:
    text = "abcdefghijkl"
    orders = {
        seed: tuple(served(one_at_a_time("random", schedule_seed=seed), *letters(text)))
        for seed in (1, 2, 3)
    }
    assert all(sorted(order) == sorted(text) for order in orders.values())
    assert len({*orders.values(), tuple(text)}) == 4
    again = served(one_at_a_time("random", schedule_seed=2), *letters(text))
    assert tuple(again) == orders[2]


def test_under_random_no_more_than_a_window_of_newcomers_overtakes_anybody() -> None:
    engine = Engine(schedule_policy="random")
    queue, rng = engine.scheduler.waiting_queue, random.Random(3)
    waits: dict[Req, int] = {}
    for number in range(4 * RANDOM_WINDOW):
        req = make_req(f"{number}", [1])
        req.arrival_order = number
        queue.append(req)
        waits[req] = number
        if number > 50 or rng.random() < 0.1:  # fifty wait, one goes for each that comes
            first = queue.first()
            assert first is not None
            queue.remove(first)
            assert number - waits.pop(first) <= RANDOM_WINDOW


def test_under_random_one_that_was_retracted_comes_back_to_its_place() -> None:
    queue = Engine(schedule_policy="random").scheduler.waiting_queue
    reqs = letters("abcdefgh")
    for number, req in enumerate(reqs):
        req.arrival_order = number
    queue.extend(reqs)
    before = list(queue.in_order())
    for req in reqs[:5]:
        queue.remove(req)
        req.retraction_count += 1
        queue.append(req)
    assert list(queue.in_order()) == before


@pytest.mark.parametrize("policy", POLICIES)
def test_with_priorities_on_the_policy_orders_only_equals(policy: SchedulePolicyName) -> None:
    def reqs() -> list[Req]:
        return [
            make_req(rid, prompt, max_new_tokens=new, priority=priority)
            for rid, prompt, new, priority in (
                ("less", [7] * 20, 9, 5),
                ("a", [1, 2], 3, 0),
                ("hit", [7] * 20, 2, 0),
                ("long", [3, 4], 8, 0),
                ("more", [5, 6], 2, -5),
            )
        ]

    engine = one_at_a_time(policy, priorities=True)
    served(engine, make_req("before", [7] * 20, max_new_tokens=1))
    order = served(engine, *reqs())[1:]
    assert (order[0], order[-1]) == ("more", "less")
    expected = {"fcfs": "a", "lpm": "hit", "dfs-weight": "hit", "lof": "long"}
    if policy in expected:
        assert order[1] == expected[policy]
    engine = one_at_a_time(policy, priorities=False)
    order = served(engine, make_req("before", [7] * 20, max_new_tokens=1), *reqs())
    assert order.index("more") > 0 or policy == "random"


# ---- policies that look at the tree


def test_lpm_goes_by_the_longest_cached_prefix() -> None:
    engine = one_at_a_time("lpm")
    served(engine, make_req("warm", list(range(30)), max_new_tokens=1))
    reqs = [
        make_req("none", [39] * 10, max_new_tokens=1),
        make_req("some", [*range(10), 39], max_new_tokens=1),
        make_req("most", [*range(25), 39], max_new_tokens=1),
        make_req("some too", [*range(11), 38], max_new_tokens=1),
    ]
    assert served(engine, *reqs)[1:] == ["most", "some", "some too", "none"]


@pytest.mark.parametrize("policy", ["lpm", "dfs-weight"])
def test_where_many_wait_arrival_counts_and_the_tree_is_not_asked(
    policy: SchedulePolicyName,
) -> None:
    engine = one_at_a_time(policy)
    served(engine, make_req("warm", [7] * 20, max_new_tokens=1))
    many = [
        make_req(f"{n:03}", [n % 30, n // 30] * 2, max_new_tokens=1) for n in range(MATCH_AT_MOST)
    ]
    engine.add(*many, make_req("hit", [7] * 20, max_new_tokens=1))
    with patch.object(
        RadixCache, "match_prefix", autospec=True, side_effect=RadixCache.match_prefix
    ) as match:
        engine.step()
    assert match.call_count <= 3  # the one that was admitted
    assert engine.tokens("000")
    engine.step()  # 128 wait now
    assert engine.tokens("hit")


@pytest.mark.parametrize("policy", ["lpm", "dfs-weight"])
def test_an_order_is_kept_until_something_changes(policy: SchedulePolicyName) -> None:
    engine = one_at_a_time(policy)
    engine.add(*letters("abcdef"))
    queue, calc = engine.scheduler.waiting_queue, engine.scheduler.policy.calc_priority
    tree = engine.memory.tree_cache
    with patch.object(
        RadixCache, "match_prefix", autospec=True, side_effect=RadixCache.match_prefix
    ) as match:
        first = list(calc(queue))
        assert match.call_count == 6
        assert list(calc(queue)) == first
        assert match.call_count == 6
        newcomer = make_req("g", [1])
        queue.append(newcomer)
        calc(queue)
        assert match.call_count == 13
        queue.remove(newcomer)
        calc(queue)
        assert match.call_count == 19
        tree.insert([1, 2, 3, 4], engine.memory.alloc_pages(1))
        calc(queue)
        assert match.call_count == 25
        tree.evict(4)
        calc(queue)
        assert match.call_count == 31


def test_dfs_weight_walks_where_most_wait_and_deep_before_shallow() -> None:
    root = TreeNode(parent=None, tokens=[], pages=[])
    light, heavy = (TreeNode(parent=root, tokens=[n], pages=[n]) for n in (1, 2))
    deep = TreeNode(parent=heavy, tokens=[3], pages=[3])
    elsewhere = TreeNode(parent=None, tokens=[], pages=[], namespace="salt")
    at = {
        "l1": light,
        "h1": heavy,
        "d1": deep,
        "r1": root,
        "l2": light,
        "d2": deep,
        "e1": elsewhere,
    }
    reqs = {rid: make_req(rid, [1]) for rid in at}
    nodes = {reqs[rid]: node for rid, node in at.items()}
    order = depth_first_by_weight(reqs.values(), nodes.__getitem__)
    assert [req.rid for req in order] == ["d1", "d2", "h1", "l1", "l2", "r1", "e1"]


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=20))
def test_dfs_weight_is_what_a_recursive_walk_gives(paths: list[list[int]]) -> None:
    nodes: dict[tuple[int, ...], TreeNode] = {(): TreeNode(parent=None, tokens=[], pages=[])}

    def node_of(path: Sequence[int]) -> TreeNode:
        key = tuple(path)
        if key not in nodes:
            nodes[key] = TreeNode(parent=node_of(path[:-1]), tokens=[path[-1]], pages=[0])
        return nodes[key]

    reqs = [make_req(f"{number}", [1]) for number in range(len(paths))]
    ends = {req: tuple(path) for req, path in zip(reqs, paths, strict=True)}
    order = depth_first_by_weight(reqs, lambda req: node_of(ends[req]))

    def walk(prefix: tuple[int, ...]) -> list[Req]:
        below = [req for req in reqs if ends[req][: len(prefix)] == prefix]
        steps = dict.fromkeys(
            ends[req][len(prefix)] for req in below if len(ends[req]) > len(prefix)
        )

        def weight(step: int) -> int:
            return sum(ends[req][: len(prefix) + 1] == (*prefix, step) for req in below)

        deeper = [walk((*prefix, step)) for step in sorted(steps, key=weight, reverse=True)]
        return [r for part in deeper for r in part] + [r for r in below if ends[r] == prefix]

    assert order == walk(())


@given(
    seed=st.integers(0, 2**32),
    policy=st.sampled_from(POLICIES),
    page_size=st.sampled_from([1, 4, 16]),
    chunk=st.sampled_from([None, 16, 33]),
    priorities=st.booleans(),
    overlap=st.booleans(),
    mixed=st.booleans(),
)
@settings(max_examples=25)
def test_no_policy_changes_a_token(
    seed: int,
    policy: SchedulePolicyName,
    page_size: int,
    chunk: int | None,
    priorities: bool,
    overlap: bool,
    mixed: bool,
) -> None:
    rng = random.Random(seed)
    engine = Engine(
        pages=160 // page_size,
        page_size=page_size,
        rows=5,
        max_running_requests=5,
        chunked_prefill_size=chunk,
        schedule_policy=policy,
        priorities=priorities,
        overlap=overlap,
        mixed=mixed,
        conservativeness=0.02,
        priority_preemption_threshold=2,
    )
    reqs = [
        make_req(
            f"r{number}",
            [(i * 7) % 40 for i in range(rng.choice([0, 16, 40]))]
            + [rng.randrange(3) for _ in range(rng.choice([1, 5, 17]))],
            max_new_tokens=rng.choice([1, 3, 9, 30]),
            priority=rng.choice([0, 0, 3, 9]),
        )
        for number in range(rng.randint(1, 12))
    ]
    waiting = list(reqs)
    while waiting or engine.scheduler.has_work():
        while waiting and rng.random() < 0.5:
            engine.add(waiting.pop())
        engine.step()
    for req in reqs:
        assert engine.tokens(req.rid) == undisturbed(req)
    assert engine.scheduler.page_counts().in_use == 0


def test_settings_of_policies_are_checked() -> None:
    base: dict[str, Any] = {"page_size": 4, "context_length": 16, "vocab_size": 10}
    with pytest.raises(ConfigError, match="schedule_policy"):
        SchedulerConfig(**base, schedule_policy="sjf")
    with pytest.raises(ConfigError, match="priority_preemption_threshold"):
        SchedulerConfig(**base, priority_preemption_threshold=-1)
