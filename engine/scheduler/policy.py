"""In which order waiting requests are considered (scheduling.md section 6).

fcfs, lof and random give each request a key when it is queued: nothing is sorted afterwards. lpm
and dfs-weight depend on what the prefix tree holds, so they match every waiting request against it,
and only where few wait; an order is kept until somebody comes or goes or the tree changes.

With priorities on, the more important go first whatever the policy; it orders equals.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from engine.memory.prefix_cache import BasePrefixCache, TreeNode
from engine.scheduler.config import SchedulePolicyName
from engine.scheduler.req import Req
from engine.scheduler.waiting_queue import Key, WaitingQueue

MATCH_AT_MOST: Final = 128
"""Waiting requests above which lpm and dfs-weight go by arrival: matching them all in every pass
would cost more than a better order gains."""

RANDOM_WINDOW: Final = 1024
"""Arrivals over which the random policy shuffles. A request's place is drawn once, this far behind
its arrival at most, so no more than this many newcomers overtake it: none starves, and one that was
retracted comes back to where it was."""


class SchedulePolicy:
    """Makes the waiting queue, and says which of it comes first."""

    def __init__(
        self,
        policy: SchedulePolicyName = "fcfs",
        *,
        tree_cache: BasePrefixCache,
        enable_priority_scheduling: bool = False,
        seed: int = 0,
    ) -> None:
        self.policy = policy
        self.tree_cache = tree_cache
        self.enable_priority_scheduling = enable_priority_scheduling
        self._seed = seed
        self._order: list[Req] = []
        self._order_of: tuple[int, int] | None = None
        """Versions of queue and tree that `_order` is of."""

    @property
    def looks_at_the_tree(self) -> bool:
        """Whether the cached prefix counts; these policies also de-duplicate inside the batch."""
        return self.policy in ("lpm", "dfs-weight") and not self.tree_cache.disable

    def make_queue(self) -> WaitingQueue:
        """An empty queue in this policy's order."""
        by_arrival = _by_priority(_arrival)
        return WaitingQueue(
            _by_priority(self._own_key) if self.enable_priority_scheduling else self._own_key,
            displaces=by_arrival if self.enable_priority_scheduling else None,
        )

    def _own_key(self, req: Req) -> Key:
        match self.policy:
            case "lof":
                return (-req.max_new_tokens, *_arrival(req))
            case "random":
                # Drawn from the arrival, not in turn, so that it is the same when it comes back.
                draw = random.Random(hash((self._seed, req.arrival_order))).random()
                return (req.arrival_order + draw * RANDOM_WINDOW,)
            case _:
                return _arrival(req)

    def calc_priority(self, waiting_queue: WaitingQueue) -> Iterator[Req]:
        """Waiting requests, the first to be considered first; the caller stops where it likes.
        Requests may leave the queue meanwhile, none may come.
        """
        if not self.looks_at_the_tree or len(waiting_queue) > MATCH_AT_MOST:
            return waiting_queue.in_order()
        versions = (waiting_queue.version, self.tree_cache.version)
        if versions != self._order_of:
            reqs = list(waiting_queue.in_order())
            self._order = self._by_match(reqs) if len(reqs) > 1 else reqs
            self._order_of = versions
        return iter(self._order)

    def _by_match(self, reqs: list[Req]) -> list[Req]:
        """All sorts are stable: equals stay in order of arrival."""
        match = {
            req: self.tree_cache.match_prefix(req.token_ids(req.seqlen - 1), req.extra_key)
            for req in reqs
        }
        if self.policy == "lpm":
            reqs.sort(key=lambda req: -len(match[req].pages))
        else:
            reqs = depth_first_by_weight(reqs, lambda req: match[req].last_node)
        if self.enable_priority_scheduling:
            reqs.sort(key=lambda req: req.priority)
        return reqs


def depth_first_by_weight(reqs: Iterable[Req], node_of: Callable[[Req], TreeNode]) -> list[Req]:
    """Requests as a walk of the prefix tree meets them that always goes where most of them are, and
    that sees longer prefixes before shorter ones. Looks only at nodes above a request.
    """
    roots: dict[str, TreeNode] = {}
    own: dict[TreeNode, list[Req]] = {}
    weight: dict[TreeNode, int] = {}
    children: dict[TreeNode, dict[TreeNode, None]] = {}
    for req in reqs:
        node = _known(node_of(req), roots)
        own.setdefault(node, []).append(req)
        weight[node] = weight.get(node, 0) + 1
        while node.parent is not None:
            parent = _known(node.parent, roots)
            children.setdefault(parent, {})[node] = None
            weight[parent] = weight.get(parent, 0) + 1
            node = parent
    order: list[Req] = []
    stack: list[tuple[TreeNode, bool]] = [
        (root, False) for root in sorted(roots.values(), key=lambda node: weight[node])
    ]
    while stack:
        node, below_done = stack.pop()
        if below_done:
            order.extend(own.get(node, ()))
            continue
        stack.append((node, True))
        # The heaviest is pushed last and so walked first; of equals, the one met first.
        below = reversed(children.get(node, {}))
        stack.extend((n, False) for n in sorted(below, key=lambda n: weight[n]))
    return order


def _known(node: TreeNode, roots: dict[str, TreeNode]) -> TreeNode:
    """One object for each name space's root: a name space without pages has a new one in each
    match."""
    return node if node.parent is not None else roots.setdefault(node.namespace, node)


def _arrival(req: Req) -> Key:
    return (req.t_arrival, req.arrival_order)


def _by_priority(key: Callable[[Req], Key]) -> Callable[[Req], Key]:
    return lambda req: (req.priority, *key(req))
