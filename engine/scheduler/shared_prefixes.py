"""De-duplication inside a batch: of several waiting requests that share a long prefix without KV,
only the first is computed; the others follow as cache hits (scheduling.md section 6).

Both the first (the leader) and a follower match the prefix tree up to the same node; they share
what comes next if their next tokens agree. So a leader is known by that node and those tokens, and
asking whether a request follows one costs one lookup, however many wait.
"""

from dataclasses import dataclass
from typing import Final

from engine.memory.prefix_cache import TreeNode
from engine.scheduler.req import Req, RequestPhase

MIN_SHARED_TOKENS: Final = 32
"""Common tokens, beyond what is cached, from which on a follower waits for its leader; in whole
pages, as only these can be shared. Fewer are computed faster than waited for."""

MAX_HELD_BACK: Final = 128
"""Followers passed over in one pass. Each costs a match, so a pass looks no further after them."""

_Branch = tuple[str, TreeNode | None, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Leader:
    """A request as it was when it began to lead."""

    outputs: int
    tree_len: int


class SharedPrefixes:
    """Prefixes that are being computed and not in the tree yet.

    No follower starves: a leader counts from its admission until its prefix is in the tree, or its
    result is there, or it has ended. In the next pass the follower matches the tree further, or is
    the leader itself.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._least_shared = -(-MIN_SHARED_TOKENS // page_size) * page_size
        self._leaders: dict[Req, _Leader] = {}
        self._branches: set[_Branch] = set()
        self.held_back = 0
        """Followers passed over since `begin_pass`."""

    def begin_pass(self, chunked_req: Req | None) -> None:
        """Forgets leaders whose result is there."""
        self.held_back = 0
        self._leaders = {
            req: leader
            for req, leader in self._leaders.items()
            if req.phase in (RequestPhase.RUNNING, RequestPhase.CHUNKED)
            and not req.finished()
            and len(req.output_ids) == leader.outputs
        }
        if chunked_req is not None and chunked_req not in self._leaders:
            self._leaders[chunked_req] = _as_it_is(chunked_req)
        self._branches = set()
        for req, leader in self._leaders.items():
            # Of a leader in chunks, even the last common page is waited for: that is one pass.
            goes_on = req.tree_len > leader.tree_len
            self._note(req, self._page_size if goes_on else self._least_shared)

    def hold_back(self, req: Req) -> bool:
        """Whether `req`, matched but not admitted, waits for a leader. Counts those that do."""
        if not self._branches or req.wants_prompt_logprobs:
            return False
        # Its last token is computed in any case.
        for length in {self._page_size, self._least_shared}:
            branch = _branch(req, length, req.seqlen - 1)
            if branch is not None and branch in self._branches:
                self.held_back += 1
                return True
        return False

    @property
    def looked_far_enough(self) -> bool:
        return self.held_back >= MAX_HELD_BACK

    def admitted(self, req: Req) -> None:
        """`req` leads from now on."""
        self._leaders[req] = _as_it_is(req)
        self._note(req, self._least_shared)

    def _note(self, leader: Req, length: int) -> None:
        branch = _branch(leader, length, leader.seqlen)
        if branch is not None:
            self._branches.add(branch)


def _as_it_is(req: Req) -> _Leader:
    return _Leader(len(req.output_ids), req.tree_len)


def _branch(req: Req, length: int, end: int) -> _Branch | None:
    """Where the tree ends for `req` and the `length` tokens after it; None if they pass `end`."""
    start = req.tree_len
    if end - start < length:
        return None
    node = req.last_node
    if node is not None and node.parent is None:
        node = None  # a name space's root, which may be another object in each match
    return req.extra_key, node, tuple(req.input_ids(start, start + length))
