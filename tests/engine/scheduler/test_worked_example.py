"""The numbers of docs/scheduling.md's worked example, from the code."""

from pathlib import Path

from engine.memory.pools import make_memory_pools
from engine.scheduler.prefill_adder import AddReqResult, PrefillAdder
from engine.scheduler.req import Req
from engine.scheduler.schedule_batch import ScheduleBatch
from tests.engine.scheduler.stub import make_req

PAGE = 16
DOCS = Path(__file__).parents[3] / "docs" / "scheduling.md"


def running(rid: str, *, out: int, max_new_tokens: int, ignore_eos: bool = False) -> Req:
    req = make_req(rid, [1] * 50, max_new_tokens=max_new_tokens, ignore_eos=ignore_eos)
    req.output_ids = [2] * out
    return req


def test_the_numbers_of_the_worked_example() -> None:
    memory = make_memory_pools(num_pages=64, page_size=PAGE, num_rows=8, max_context_len=512)
    assert memory.allocator.alloc(22) is not None  # what the three that run own
    cached = memory.allocator.alloc(10)
    assert cached is not None
    memory.tree_cache.insert([3] * 48 + [4] * 112, cached)
    adder = PrefillAdder(
        PAGE,
        memory.tree_cache,
        memory.allocator,
        ScheduleBatch(
            reqs=[
                running("a", out=40, max_new_tokens=200),
                running("b", out=90, max_new_tokens=100),
                running("c", out=10, max_new_tokens=60, ignore_eos=True),
            ],
            memory=memory,
        ),
        0.7,
        16384,
        256,
    )
    assert (adder.available_tokens, adder.rem_total_tokens) == (672, 503)

    first = make_req("d", [3] * 48 + [5] * 152, max_new_tokens=80)
    assert adder.add_req(first) is AddReqResult.CONTINUE
    assert (first.prefix_len, first.extend_input_len) == (48, 152)
    assert (adder.available_tokens, adder.rem_total_tokens) == (624, 199)
    assert (adder.cur_rem_tokens, adder.rem_chunk_tokens) == (448, 96)

    second = make_req("e", [6] * 150, max_new_tokens=20)
    assert adder.add_req(second) is AddReqResult.OTHER
    assert adder.new_chunked_req is second
    assert second.extend_input_len == 96
    assert (adder.rem_total_tokens, adder.rem_chunk_tokens) == (87, 0)
    assert adder.can_run_list == [first, second]


def test_the_page_shows_these_numbers() -> None:
    text = DOCS.read_text()
    for number in ("672", "503", "624", "455", "199", "448", "96", "87"):
        assert f"**{number}**" in text, number
