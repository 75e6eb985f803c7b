"""A runner whose tokens prove that the scheduler's bookkeeping is right.

It keeps a 'KV' of its own (slot → token id and position), writes the inputs where it is told, and
draws each next token as a hash of everything it can gather through the request-to-token table. A
wrong slot, length, prefix or page changes a token.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.execution.forward_batch import ForwardBatch, ForwardMode, ForwardResult
from engine.memory.pools import MemoryPools, make_memory_pools
from engine.sampling_params import SamplingParams
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.req import Req
from engine.scheduler.role import SchedulerRole
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.step_result import StepResult, TokenOutput
from engine.types import HostWritePolicy, RadixEvictionPolicy, RequestId
from tests.engine.memory.fake_copier import FakeCopier
from tests.engine.scheduler.async_runner import AsyncRunner

VOCAB = 40
EOS = 0
CONTEXT = 96
NUM_LAYERS = 5


def next_token(tokens: Sequence[int], seed: int = 0) -> int:
    """What the stub draws after `tokens`."""
    digest = hashlib.blake2b(bytes([seed % 251, *tokens]), digest_size=2).digest()
    return int.from_bytes(digest, "little") % VOCAB


def undisturbed(req: Req) -> list[int]:
    """Outputs of a run of `req` alone; the same rules for its end, written once more."""
    params, tokens = req.sampling_params, list(req.origin_input_ids)
    outputs: list[int] = []
    while True:
        outputs.append(next_token(tokens + outputs, params.seed))
        stops = params.stop_token_ids | (set() if params.ignore_eos else {EOS})
        if (
            outputs[-1] in stops
            or len(outputs) >= params.max_new_tokens
            or len(tokens) + len(outputs) >= CONTEXT
        ):
            return outputs


@dataclass
class Split:
    """A step that runs in parts."""

    batch: ForwardBatch
    slots: list[list[int]]
    next_layer: int = 0


class StubRunner:
    """Implements `SplitRunner` on lists."""

    def __init__(self, memory: MemoryPools) -> None:
        tokens = memory.allocator.total_tokens
        self.kv_token = torch.full((tokens,), -1)
        self.kv_position = torch.full((tokens,), -1)
        self.forwards: list[tuple[ForwardMode, list[int]]] = []
        self.parts: list[tuple[int, int]] = []
        self.split: Split | None = None
        self._page_size = memory.allocator.page_size

    def forward(self, batch: ForwardBatch) -> ForwardResult:
        b = len(batch.seq_lens_cpu)
        assert batch.seq_lens.tolist() == batch.seq_lens_cpu
        assert batch.sampling.position.tolist() == batch.seq_lens_cpu
        assert sum(batch.extend_lens) == batch.input_ids.numel() == batch.out_cache_loc.numel()
        assert batch.input_ids.dtype == batch.out_cache_loc.dtype == torch.int64
        for name in ("temperature", "top_p", "top_k", "seed"):
            assert getattr(batch.sampling, name).shape == (b,)
        expected_positions = [
            position
            for prefix, extend in zip(batch.extend_prefix_lens, batch.extend_lens, strict=True)
            for position in range(prefix, prefix + extend)
        ]
        assert batch.positions.tolist() == expected_positions
        slots = batch.out_cache_loc.tolist()
        assert len(set(slots)) == len(slots)
        self.kv_token[batch.out_cache_loc] = batch.input_ids
        self.kv_position[batch.out_cache_loc] = batch.positions
        histories: list[list[int]] = []
        rows = batch.req_pool_indices.tolist()
        assert len(set(rows)) == b
        assert batch.pages is not None
        for row, length, pages in zip(rows, batch.seq_lens_cpu, batch.pages, strict=True):
            where = batch.req_to_token[row, :length].long()
            in_pages = (where // self._page_size)[:: self._page_size].tolist()
            assert list(pages[: len(in_pages)]) == in_pages
            assert self.kv_position[where].tolist() == list(range(length))
            histories.append(self.kv_token[where].tolist())
        self.forwards.append((batch.forward_mode, list(batch.extend_lens)))
        return self.draw(batch, histories)

    @property
    def num_layers(self) -> int:
        return NUM_LAYERS

    def forward_split(
        self, batch: ForwardBatch, first_layer: int, last_layer: int
    ) -> ForwardResult:
        """Layer 0 to `NUM_LAYERS - 1` in order, or `AssertionError`; the KV is there with the last
        one. The batch's slots must still be those of its first part."""
        if first_layer == 0:
            assert self.split is None
            self.split = Split(batch, self._slots(batch))
        assert self.split is not None
        assert self.split.next_layer == first_layer < last_layer <= NUM_LAYERS
        assert self.split.slots == self._slots(batch)
        self.split.next_layer = last_layer
        self.parts.append((first_layer, last_layer))
        if last_layer < NUM_LAYERS:
            # Neither old nor new: nobody may read it.
            self.kv_token[batch.out_cache_loc] = -2
            return ForwardResult(batch.input_ids[:0], None)
        self.split = None
        return self.forward(batch)

    def drop_split(self) -> None:
        assert self.split is not None
        self.split = None

    def _slots(self, batch: ForwardBatch) -> list[list[int]]:
        return [
            batch.req_to_token[row, :length].tolist()
            for row, length in zip(batch.req_pool_indices.tolist(), batch.seq_lens_cpu, strict=True)
        ]

    def draw(self, batch: ForwardBatch, histories: list[list[int]]) -> ForwardResult:
        """A token a request, after `histories`, all that its KV holds."""
        drawn = [
            next_token(tokens, seed)
            for tokens, seed in zip(histories, batch.sampling.seed.tolist(), strict=True)
        ]
        logprobs = None
        if batch.sampling.any_logprobs:
            logprobs = torch.tensor([-float(token) for token in drawn])
        return ForwardResult(torch.tensor(drawn, dtype=torch.int64), logprobs)


def make_req(
    rid: str,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 4,
    ignore_eos: bool = True,
    seed: int = 0,
    logprobs: bool = False,
    stop_token_ids: frozenset[int] = frozenset(),
    prior: Sequence[int] = (),
    priority: int = 0,
    lora_id: str = "",
    cache_salt: str = "",
    deadline: float | None = None,
) -> Req:
    return Req(
        RequestId(rid),
        prompt,
        SamplingParams(
            max_new_tokens=max_new_tokens,
            ignore_eos=ignore_eos,
            seed=seed,
            logprobs=logprobs,
            stop_token_ids=stop_token_ids,
        ),
        eos_token_ids=[EOS],
        prior_output_ids=prior,
        priority=priority,
        lora_id=lora_id,
        extra_key=cache_salt,
        deadline=deadline,
    )


class Engine:
    """A scheduler over small pools, and what came out of it."""

    def __init__(
        self,
        *,
        pages: int = 32,
        page_size: int = 4,
        rows: int = 8,
        radix: bool = True,
        role: SchedulerRole | None = None,
        chunked_prefill_size: int | None = 16,
        max_prefill_tokens: int = 64,
        mixed: bool = False,
        max_running_requests: int = 8,
        max_queued_requests: int = 64,
        priorities: bool = False,
        conservativeness: float = 1.0,
        split: int = 0,
        overlap: bool = False,
        late: bool = True,
        runner: Callable[[MemoryPools], StubRunner] = StubRunner,
        eviction: RadixEvictionPolicy = "lru",
        host_pages: int = 0,
        retract_pages: int = 0,
        host_write: HostWritePolicy = "write_through",
        copy_delay: Callable[[], int] = lambda: 0,
        **settings: Any,
    ) -> None:
        """`overlap` runs over a device that is as late as it can be (`AsyncRunner`; `late` is its
        setting). `copy_delay`: passes that a copy between device and host memory lasts. `settings`:
        further fields of `SchedulerConfig`."""
        self.host_copier = self._copier(host_pages, page_size, copy_delay)
        self.retract_copier = self._copier(retract_pages, page_size, copy_delay)
        self.memory = make_memory_pools(
            num_pages=pages,
            page_size=page_size,
            num_rows=rows,
            max_context_len=CONTEXT,
            enable_radix_cache=radix,
            eviction_policy=eviction,
            host_copier=self.host_copier,
            host_write_policy=host_write,
            retract_copier=self.retract_copier,
        )
        self.runner = runner(self.memory)
        self.device = AsyncRunner(self.runner, self.memory, late=late)
        self.scheduler = Scheduler(
            SchedulerConfig(
                page_size=page_size,
                context_length=CONTEXT,
                vocab_size=VOCAB,
                chunked_prefill_size=chunked_prefill_size,
                max_prefill_tokens=max_prefill_tokens,
                max_running_requests=max_running_requests,
                max_queued_requests=max_queued_requests,
                enable_mixed_chunk=mixed,
                enable_priority_scheduling=priorities,
                schedule_conservativeness=conservativeness,
                decode_reserve_tokens=8,
                enable_overlap=overlap,
                **settings,
                split_prefill_layers=split,
            ),
            self.device if overlap else self.runner,
            self.memory,
            role,
        )
        self.outputs: dict[str, list[TokenOutput]] = {}
        self.errors: dict[str, Exception] = {}
        self.aborted: list[str] = []
        self.released: list[str] = []

    def _copier(
        self, num_pages: int, page_size: int, delay: Callable[[], int]
    ) -> FakeCopier | None:
        """For the stub's KV, behind the steps that were launched before each copy."""
        if num_pages == 0:
            return None

        def slots(page: int) -> slice:
            return slice(page * page_size, (page + 1) * page_size)

        def read(page: int) -> bytes:
            kv = torch.stack(
                [self.runner.kv_token[slots(page)], self.runner.kv_position[slots(page)]]
            )
            return kv.numpy().tobytes()

        def write(page: int, content: bytes) -> None:
            kv = torch.frombuffer(bytearray(content), dtype=torch.int64).view(2, page_size)
            self.runner.kv_token[slots(page)], self.runner.kv_position[slots(page)] = kv[0], kv[1]

        def steps_so_far() -> Callable[[], None]:
            last = self.device.last_step
            return lambda: self.device.run_up_to(last)

        return FakeCopier(num_pages, read=read, write=write, delay=delay, behind=steps_so_far)

    def add(self, *reqs: Req) -> None:
        for req in reqs:
            self.scheduler.add_request(req)

    def step(self) -> StepResult:
        """One pass, with the invariant behind it."""
        result = self.scheduler.step()
        for output in result.outputs:
            self.outputs.setdefault(output.rid, []).append(output)
        self.errors.update(result.errors)
        self.aborted.extend(result.aborted)
        self.released.extend(result.released)
        self.scheduler.check_invariant()
        self.device.check_pages()
        return result

    def drain(self, max_passes: int = 500) -> None:
        """Passes until nothing is left to do."""
        for _ in range(max_passes):
            if not self.scheduler.has_work():
                return
            self.step()
        raise AssertionError(f"not done after {max_passes} passes: {self.scheduler.__dict__}")

    def tokens(self, rid: str) -> list[int]:
        """Tokens of `rid`, after a look at their indices."""
        outputs = self.outputs.get(rid, [])
        if outputs:
            first = outputs[0].index
            assert [o.index for o in outputs] == list(range(first, first + len(outputs)))
            assert all(o.finish_reason is None for o in outputs[:-1])
        return [output.token for output in outputs]

    @property
    def modes(self) -> list[ForwardMode]:
        return [mode for mode, _ in self.runner.forwards]
