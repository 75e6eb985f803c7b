"""Several choices of one HTTP request: each is a request of its own to the router."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

from router.callers import Caller
from router.core import Admitted, Router
from router.output import Delta
from router.request import Arrival, RequestSpec
from router.sampling import MAX_UINT64
from router.tokenizer import TextCodec


class Choices:
    """Runs all choices of one request. Iterate `deltas` once, and always `close`."""

    def __init__(self, request_id: str, admitted: Sequence[Admitted], *, per_prompt: int) -> None:
        self.id = request_id
        self.per_prompt = per_prompt
        """Choices i * per_prompt to (i + 1) * per_prompt - 1 answer prompt i."""
        self._admitted = admitted

    @classmethod
    async def admit(
        cls,
        router: Router,
        specs: Sequence[RequestSpec],
        *,
        per_prompt: int,
        caller: Caller,
        arrival: Arrival,
    ) -> "Choices":
        """Gives every choice its place, or none.

        Args:
            router: runs them.
            specs: one a prompt.
            per_prompt: choices for each; choice i draws with the prompt's seed + i.
            arrival: of the HTTP request; its id names the choices.
            caller: whose they are.

        Raises:
            BatonError: as Router.admit, for the first that is refused.
        """
        request_id = router.unused_id(arrival.request_id, caller)
        admitted: list[Admitted] = []
        try:
            for spec in specs:
                for index in range(per_prompt):
                    many = len(specs) * per_prompt > 1
                    own_id = f"{request_id}-{len(admitted)}" if many else request_id
                    own = replace(
                        spec,
                        request_id=own_id,
                        seed=_seed(spec.seed, index),
                        caller=caller,
                        arrival=arrival,
                    )
                    if index:
                        # The first choice has made the tokens.
                        own = replace(own, prompt=admitted[-1].journey.request.prompt_ids)
                    admitted.append(await router.admit(own))
        except BaseException:
            for one in admitted:
                one.journey.close()
            raise
        return cls(request_id, admitted, per_prompt=per_prompt)

    def __len__(self) -> int:
        return len(self._admitted)

    @property
    def model(self) -> str:
        return self._admitted[0].journey.request.model

    @property
    def codec(self) -> TextCodec | None:
        return self._admitted[0].codec

    def prompt_ids(self, choice: int) -> list[int]:
        return self._admitted[choice].journey.request.prompt_ids

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """(choice, delta) as they become ready; a slow reader gets more tokens at a time.

        Raises:
            BatonError: one choice failed, which ends all.
        """
        sources = [one.journey.deltas() for one in self._admitted]
        if len(sources) == 1:
            async with contextlib.aclosing(sources[0]) as only:
                async for delta in only:
                    yield 0, delta
            return
        waiting = {asyncio.create_task(_next(source)): i for i, source in enumerate(sources)}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=waiting.__getitem__):
                    index = waiting.pop(task)
                    delta = task.result()
                    if not delta.last:
                        waiting[asyncio.create_task(_next(sources[index]))] = index
                    yield index, delta
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            for source in sources:
                await source.aclose()

    def close(self) -> None:
        """Leaves the workers, aborting what still runs there. Safe to call twice."""
        for one in self._admitted:
            one.journey.close()


async def _next(source: AsyncGenerator[Delta, None]) -> Delta:
    return await anext(source)


def _seed(seed: int | None, index: int) -> int | None:
    if seed is None or not index:
        return seed  # the router judges its range
    return (seed + index) & MAX_UINT64
