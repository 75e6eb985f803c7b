"""A scheduler in forty lines: just enough to drive a ModelRunner through scattered pages."""

import random
from dataclasses import dataclass, field

import torch

from engine.execution.forward_batch import ForwardBatch, ForwardMode, SamplingBatch, TopRows
from engine.execution.logit_edits import LogitEdits
from engine.memory.kv_pool import PageMajorKVPool


@dataclass
class Row:
    """One request: its tokens so far, and how many of them have KV."""

    index: int
    tokens: list[int]
    computed: int = 0
    pages: list[int] = field(default_factory=list)


class Harness:
    """Hands out pages in random order, and writes batches for chosen rows and chunks."""

    def __init__(self, kv_pool: PageMajorKVPool, *, max_rows: int = 16, seed: int = 0) -> None:
        self._pool = kv_pool
        self._free = list(range(kv_pool.num_pages))
        random.Random(seed).shuffle(self._free)
        # Rubbish beyond a row's length must never be read.
        self._table = torch.full((max_rows, 2048), 2**30, dtype=torch.int32, device=kv_pool.device)
        self._rows = 0

    def row(self, tokens: list[int]) -> Row:
        # Row numbers start above 0, so that confusing a row with its place in the batch shows.
        self._rows += 1
        return Row(index=self._table.shape[0] - self._rows, tokens=list(tokens))

    def extend(
        self, *steps: tuple[Row, int], mode: ForwardMode = ForwardMode.EXTEND
    ) -> ForwardBatch:
        """The next `count` tokens of each row; afterwards their KV counts as computed."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        prefixes, lengths = [], []
        for row, count in steps:
            start, end = row.computed, row.computed + count
            if end > len(row.tokens):
                raise ValueError("a row has fewer tokens than asked for")
            self._grow(row, end)
            ids += row.tokens[start:end]
            positions += range(start, end)
            slots += [self._slot(row, position) for position in range(start, end)]
            prefixes.append(start)
            lengths.append(count)
            row.computed = end
        seq_lens = [row.computed for row, _ in steps]
        return ForwardBatch(
            forward_mode=mode,
            input_ids=self._int64(ids),
            positions=self._int64(positions),
            out_cache_loc=self._int64(slots),
            req_pool_indices=self._int64([row.index for row, _ in steps]),
            seq_lens=self._int64(seq_lens),
            seq_lens_cpu=seq_lens,
            extend_prefix_lens=prefixes,
            extend_lens=lengths,
            req_to_token=self._table,
            sampling=greedy(len(steps), self._pool.device),
        )

    def decode(self, *rows: Row) -> ForwardBatch:
        return self.extend(*((row, 1) for row in rows), mode=ForwardMode.DECODE)

    def _grow(self, row: Row, length: int) -> None:
        page_size = self._pool.page_size
        while len(row.pages) * page_size < length:
            page = self._free.pop()
            first = len(row.pages) * page_size
            slots = torch.arange(page * page_size, (page + 1) * page_size, dtype=torch.int32)
            self._table[row.index, first : first + page_size] = slots.to(self._table.device)
            row.pages.append(page)

    def _slot(self, row: Row, position: int) -> int:
        page_size = self._pool.page_size
        return row.pages[position // page_size] * page_size + position % page_size

    def _int64(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._pool.device)


def sampling_batch(
    rows: list[dict[str, float]],
    *,
    device: torch.device,
    logprobs: bool = False,
    edits: LogitEdits | None = None,
) -> SamplingBatch:
    """One dict a request: temperature, top_p, top_k, min_p, seed, position, top_logprobs; what is
    absent is neutral."""

    def column(name: str, default: float) -> list[float]:
        return [row.get(name, default) for row in rows]

    def integers(name: str) -> torch.Tensor:
        values = [int(value) for value in column(name, 0)]
        wrapped = [value - 2**64 if value >= 2**63 else value for value in values]
        return torch.tensor(wrapped, dtype=torch.int64, device=device)

    temperatures, top_ps = column("temperature", 0.0), column("top_p", 1.0)
    min_ps, tops = column("min_p", 0.0), [int(count) for count in column("top_logprobs", 0)]
    top_rows = [row for row, count in enumerate(tops) if count]
    top = None
    if top_rows:
        on_device = torch.tensor(top_rows, dtype=torch.int64, device=device)
        top = TopRows(rows=top_rows, rows_on_device=on_device, count=max(tops))
    return SamplingBatch(
        temperature=torch.tensor(temperatures, dtype=torch.float32, device=device),
        top_p=torch.tensor(top_ps, dtype=torch.float32, device=device),
        top_k=integers("top_k"),
        seed=integers("seed"),
        position=integers("position"),
        all_greedy=all(value == 0 for value in temperatures),
        any_top_k=any(column("top_k", 0)),
        any_top_p=any(value < 1 for value in top_ps),
        any_logprobs=logprobs,
        min_p=torch.tensor(min_ps, dtype=torch.float32, device=device) if any(min_ps) else None,
        edits=edits,
        top=top,
    )


def greedy(count: int, device: torch.device) -> SamplingBatch:
    return sampling_batch([{}] * count, device=device)
