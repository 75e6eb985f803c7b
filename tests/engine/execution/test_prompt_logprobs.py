"""Log probabilities of prompt tokens, chunk by chunk, against `transformers`."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from engine.execution import model_runner
from engine.execution.forward_batch import PromptTargets
from engine.execution.model_runner import ModelRunner
from tests.checkpoints import random_prompt
from tests.engine.execution.harness import Harness


@pytest.mark.parametrize("slice_tokens", [3, 1024])
def test_prompt_logprobs_equal_the_reference_in_any_slices_and_cost_no_token(
    runner: Callable[[str], ModelRunner],
    reference_logits: Callable[[str, list[int]], torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    slice_tokens: int,
) -> None:
    monkeypatch.setattr(model_runner, "PROMPT_LOGITS_TOKENS", slice_tokens)
    engine = runner("llama-gqa")
    harness = Harness(engine.kv_pool)
    asked, other = random_prompt(20, seed=1), random_prompt(9, seed=2)
    a, b = harness.row(asked), harness.row(other)
    # The other request's nine inputs lie before those that are asked for.
    judged = torch.log_softmax(reference_logits("llama-gqa", asked), -1)
    start = 0
    for steps, inputs in (([(b, 9), (a, 12)], range(9, 21)), ([(a, 8)], range(7))):
        batch = harness.extend(*steps)
        count = len(inputs)
        targets = PromptTargets(
            inputs=torch.tensor(inputs),
            target_ids=torch.tensor(asked[start + 1 : start + 1 + count]),
            target_ids_cpu=asked[start + 1 : start + 1 + count],
            counts=[0, count] if len(steps) == 2 else [count],
            top=2,
        )
        result = engine.forward(replace(batch, prompt_targets=targets))
        assert result.prompt is not None
        expected = judged[start : start + count]
        chosen = expected[range(count), targets.target_ids]
        torch.testing.assert_close(result.prompt.chosen, chosen, atol=1e-3, rtol=0)
        top = expected.topk(2)
        assert torch.equal(result.prompt.top_ids, top.indices)
        torch.testing.assert_close(result.prompt.top, top.values, atol=1e-3, rtol=0)
        start += count
    # The token drawn is the one that is drawn without.
    assert int(result.next_token_ids[0]) == int(reference_logits("llama-gqa", asked)[-1].argmax())
