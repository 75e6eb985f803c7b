"""Which examples are drawn: mostly ordinary lives, in engines where these meet."""

from dataclasses import replace
from typing import Any, get_args

from hypothesis import strategies as st

from engine.memory.hi_radix_cache import HostWritePolicy
from engine.scheduler.config import SchedulePolicyName
from engine.types import RadixEvictionPolicy
from tests.engine.scheduler.machine.cases import Example, RequestScript, RoleName, Setup, Squeeze
from tests.engine.scheduler.machine.chain import CONTEXT

ANY_SETUP: dict[str, st.SearchStrategy[Any]] = {
    "rows": st.sampled_from([8, 8, 8, 5, 3, 2]),
    "max_running": st.sampled_from([8, 8, 8, 4, 2, 1]),
    "chunk_pages": st.sampled_from([2, 1, 5, 16, 300, None]),
    "max_prefill_pages": st.sampled_from([300, 8, 3, 1]),
    "radix": st.sampled_from([True, True, False]),
    "mixed": st.booleans(),
    "overlap": st.booleans(),
    "split_layers": st.sampled_from([0, 0, 0, 0, 1, 2]),
    "host_pages": st.sampled_from([0, 0, 40, 5]),
    "host_write": st.sampled_from(get_args(HostWritePolicy)),
    "retract_pages": st.sampled_from([0, 0, 60, 5]),
    "copy_looks": st.sampled_from([0, 1, 4]),
    "compile_passes": st.sampled_from([0, 1, 6]),
    "policy": st.sampled_from(get_args(SchedulePolicyName)),
    "eviction": st.sampled_from(get_args(RadixEvictionPolicy)),
    "priorities": st.booleans(),
    "max_loras": st.sampled_from([8, 2, 1]),
    "max_queued": st.sampled_from([64, 64, 64, 64, 64, 2]),
    "conservativeness": st.sampled_from([1.0, 0.3, 0.02]),
}
TIGHT: dict[str, st.SearchStrategy[Any]] = {
    "rows": st.just(8),
    "max_running": st.just(8),
    "conservativeness": st.just(0.02),
    "chunk_pages": st.sampled_from([16, 5, 300]),
    "max_prefill_pages": st.just(300),
    "max_queued": st.just(64),
}
"""A low estimate of growth in a pool that many may enter and few may fill."""

TWISTS: list[dict[str, Any]] = [
    {"logprobs": True},
    {"judged": True},
    {"replayed": 1},
    {"replayed": 7},
    {"priority": 5},
    {"priority": 20},
    {"grammar": 4},
    {"grammar": 20},
    {"grammar": 0},
    {"patience": 0},
    {"patience": 3},
    {"abort_after": 0},
    {"abort_after": 1},
    {"abort_after": 2},
    {"abort_after": 5},
    {"abort_after": 12},
    {"lost": True},
    {"spoilt": True},
    {"oversize": True},
]
TENANTS: list[dict[str, Any]] = [
    {},
    {},
    {"salt": "salt"},
    {"lora": "A"},
    {"lora": "B"},
    {"lora": "C"},
]
ENDINGS: list[dict[str, Any]] = [
    {"ignore_eos": False, "seed": 0},
    {"ignore_eos": False, "seed": 1},
    {"ignore_eos": True, "seed": 0},
]


def script(
    tenant: dict[str, Any], ending: dict[str, Any], twists: list[dict[str, Any]], **fields: Any
) -> RequestScript:
    for twist in (tenant, ending, *twists):
        fields |= twist
    return RequestScript(**fields)


SCRIPTS = st.builds(
    script,
    gap=st.sampled_from([0, 0, 1, 1, 1, 2, 4, 9]),
    stem=st.sampled_from([0, 0, 5, 16, 16, 33, 64, 70]),
    own_len=st.sampled_from([1, 1, 2, 8, 15, 16, 17, 40, 66]),
    own=st.integers(0, 3),
    max_new_tokens=st.sampled_from([1, 2, 5, 9, 20, 34, 90]),
    transfer=st.sampled_from([0, 1, 2, 6, 15]),
    described=st.booleans(),
    tenant=st.sampled_from(TENANTS),
    ending=st.sampled_from(ENDINGS),
    twists=st.lists(st.sampled_from(TWISTS), max_size=2),
)
GROWERS = st.builds(
    script,
    gap=st.sampled_from([1, 1, 2]),
    stem=st.sampled_from([0, 0, 16]),
    own_len=st.sampled_from([1, 8, 17]),
    own=st.integers(0, 3),
    max_new_tokens=st.sampled_from([30, 44]),
    transfer=st.sampled_from([0, 2, 6]),
    described=st.booleans(),
    tenant=st.just({}),
    ending=st.sampled_from(ENDINGS[:2]),
    twists=st.lists(st.sampled_from(TWISTS[:6]), max_size=1),
)
"""Small when they come and large when they go: what no estimate of growth foresees."""

SQUEEZES = st.lists(
    st.builds(Squeeze, st.integers(0, 25), st.sampled_from([4, 8, 16]), st.sampled_from([3, 9])),
    max_size=2,
)


def setups(role: RoleName, pages: dict[int, tuple[int, int]], **fixed: Any) -> Any:
    """`pages`: by page size, how many the pool may have."""
    return st.one_of(
        st.builds(
            Setup,
            **(
                ANY_SETUP
                | fixed
                | {
                    "role": st.just(role),
                    "page_size": st.just(page_size),
                    "pages": st.integers(*bounds),
                }
            ),
        )
        for page_size, bounds in pages.items()
    )


def examples(role: RoleName) -> st.SearchStrategy[Example]:
    small = setups(role, {16: (3, 14), 1: (30, 130), 64: (2, 6)})
    tight = setups(role, {16: (9, 13), 1: (75, 130), 64: (5, 7)}, **TIGHT)
    few = st.lists(SCRIPTS, min_size=1, max_size=4)
    many = st.lists(SCRIPTS, min_size=5, max_size=9)
    crowd = st.lists(st.one_of(GROWERS, GROWERS, GROWERS, SCRIPTS), min_size=6, max_size=9)
    return st.one_of(
        st.builds(fitted, small, few, SQUEEZES),
        st.builds(fitted, small, many, SQUEEZES),
        st.builds(fitted, tight, crowd, SQUEEZES),
    )


def fitted(setup: Setup, requests: list[RequestScript], squeezes: list[Squeeze]) -> Example:
    """Cuts most requests to what the pool holds, since one that is refused tests little."""
    memory = min(setup.pages * setup.page_size, CONTEXT)

    def fit(request: RequestScript) -> RequestScript:
        if request.oversize:
            return request
        stem = min(request.stem, memory // 2)
        own_len = min(request.own_len, memory // 2 - 1)
        longest = min(request.max_new_tokens, memory - stem - own_len)
        return replace(request, stem=stem, own_len=own_len, max_new_tokens=longest)

    return Example(setup, [fit(request) for request in requests], squeezes)
