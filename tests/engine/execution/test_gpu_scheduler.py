"""On a CUDA device: overlap and split prefill with the real runner, and that nothing waits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.execution.attention import AttentionName
from engine.execution.flashinfer_attention import FlashInferAttention
from engine.execution.forward_batch import ForwardBatch, ForwardMode, ForwardResult
from engine.execution.model_runner import ModelRunner, load_model_runner
from engine.memory.pools import MemoryPools
from engine.model_config import ModelConfig
from engine.models.fused_ops import flashinfer_installed
from tests.checkpoints import random_prompt, write_config
from tests.engine.execution.harness import Harness
from tests.engine.execution.scheduled import Ask, ScheduledModel, random_asks
from tests.gpu_waits import no_waiting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROWS = 8
MakeRunner = Callable[..., ModelRunner]


@pytest.fixture(scope="module")
def make_runner(tmp_path_factory: pytest.TempPathFactory) -> MakeRunner:
    from transformers import LlamaConfig

    directory: Path = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=1024,
        initializer_range=0.2,
        eos_token_id=0,
    )
    write_config(directory, config)

    def make(attention: AttentionName, *, graphs: bool = False) -> ModelRunner:
        if attention == "flashinfer" and not flashinfer_installed():
            pytest.skip("flashinfer-python is not installed")
        return load_model_runner(
            ModelConfig.from_directory(directory),
            model_path=str(directory),
            device=torch.device("cuda"),
            # The plain backend in float32, where tokens do not hang on a batch's composition.
            dtype=torch.bfloat16 if attention == "flashinfer" else torch.float32,
            page_size=16,
            max_total_tokens=256 * 16,
            attention=attention,
            graphs_up_to=ROWS if graphs else 0,
        )

    return make


class Recording:
    """`BatchRunner` that notes what runs together."""

    def __init__(self, model: ModelRunner) -> None:
        self._model = model
        self.steps: list[tuple[str, list[int]]] = []

    def behind(self, model: ModelRunner, memory: MemoryPools) -> "Recording":
        return self

    def forward(self, batch: ForwardBatch) -> ForwardResult:
        self.steps.append((batch.forward_mode.name, list(batch.seq_lens_cpu)))
        return self._model.forward(batch)


@pytest.mark.parametrize(
    ("attention", "graphs"), [("flashinfer", True), ("flashinfer", False), ("torch", False)]
)
def test_overlap_draws_the_same_tokens(
    attention: AttentionName, graphs: bool, make_runner: MakeRunner
) -> None:
    model = make_runner(attention, graphs=graphs)
    assert isinstance(model.attention, FlashInferAttention) == (attention == "flashinfer")
    # They end by length alone and come at once, so that the same steps run either way: bfloat16
    # promises the same tokens for the same batches only.
    sampled: dict[str, Any] = {"temperature": 0.9, "top_k": 20, "seed": 5}
    asks = [
        Ask(
            random_prompt(20 + 13 * n, seed=n),
            {"max_new_tokens": 5 + 9 * n, "ignore_eos": True, **(sampled if n % 2 else {})},
        )
        for n in range(6)
    ]
    tokens, steps = [], []
    for overlap in (False, True):
        recording = Recording(model)
        engine = ScheduledModel(model, behind=recording.behind, rows=ROWS, enable_overlap=overlap)
        for number, ask in enumerate(asks):
            engine.scheduler.add_request(ask.req(number))
        while engine.scheduler.has_work():
            engine.step()
        tokens.append({rid: [o.token for o in outputs] for rid, outputs in engine.outputs.items()})
        steps.append(recording.steps)
    assert [len(tokens[0][f"r{n}"]) for n in range(6)] == [5 + 9 * n for n in range(6)]
    assert steps[0] == steps[1]
    assert tokens[0] == tokens[1]


def test_random_arrivals_and_endings_draw_the_same_tokens_in_float32(
    make_runner: MakeRunner,
) -> None:
    model = make_runner("torch")
    asks = random_asks(3, 10)
    settings: list[dict[str, Any]] = [
        {},
        {"enable_overlap": True},
        {"enable_overlap": True, "enable_mixed_chunk": True},
        {"enable_overlap": True, "split_prefill_layers": 1},
    ]
    drawn = [
        ScheduledModel(model, rows=4, chunked_prefill_size=32, **setting).run(asks, seed=3)
        for setting in settings
    ]
    for setting, tokens in zip(settings, drawn, strict=True):
        assert tokens == drawn[0], setting


@pytest.mark.parametrize(
    ("attention", "graphs"), [("flashinfer", True), ("flashinfer", False), ("torch", False)]
)
def test_no_pass_waits_for_the_device_but_for_the_result_it_handles(
    attention: AttentionName, graphs: bool, make_runner: MakeRunner
) -> None:
    """Prompts, chunks, joins, endings, page after page, every kind of sampling: handling a result
    waits for that result's event, which is not an operation that this mode counts."""
    model = make_runner(attention, graphs=graphs)
    asks = random_asks(11, 8)
    everything: dict[str, Any] = {"logprobs": True, "prompt_logprobs": 2, "top_logprobs": 3}
    asks.append(Ask(random_prompt(50, seed=2), {**everything, "logit_bias": {4: 2.0}}))
    ScheduledModel(model, rows=4, enable_overlap=True, chunked_prefill_size=32).run(asks)  # warm
    engine = ScheduledModel(model, rows=4, enable_overlap=True, chunked_prefill_size=32)
    for number, ask in enumerate(asks):
        engine.scheduler.add_request(ask.req(number))
    with no_waiting():
        while engine.scheduler.has_work():
            engine.step()
    assert len(engine.outputs) == len(asks)


def test_the_launch_of_a_decode_step_waits_for_nothing(make_runner: MakeRunner) -> None:
    model = make_runner("flashinfer" if flashinfer_installed() else "torch")
    engine = ScheduledModel(model, rows=ROWS, enable_overlap=True)
    for n in range(ROWS):
        engine.scheduler.add_request(
            Ask(random_prompt(9 + n, seed=n), {"max_new_tokens": 60}).req(n)
        )
    for _ in range(6):
        engine.step()
    scheduler = engine.scheduler
    with no_waiting():
        for _ in range(20):  # past the end of every row's page
            batch = scheduler.get_next_batch_to_run()
            assert batch is not None
            batch.output_ids = model.forward(batch.to_forward_batch()).next_token_ids


def test_a_pass_returns_while_the_device_still_works(make_runner: MakeRunner) -> None:
    """It handles the step before, and neither launching nor handling waits for the new one."""

    class Sleepy:
        def __init__(self, model: ModelRunner) -> None:
            self.model = model
            self.sleeps = False

        def forward(self, batch: ForwardBatch) -> ForwardResult:
            if self.sleeps:
                torch.cuda._sleep(2_000_000_000)  # type: ignore[no-untyped-call]  # cycles: about 1 s
            return self.model.forward(batch)

    model = make_runner("flashinfer" if flashinfer_installed() else "torch")
    sleepy = Sleepy(model)
    engine = ScheduledModel(model, behind=lambda *_: sleepy, rows=ROWS, enable_overlap=True)
    ask = Ask(random_prompt(9, seed=1), {"max_new_tokens": 30, "ignore_eos": True})
    engine.scheduler.add_request(ask.req(0))
    for _ in range(6):
        engine.step()
    before = len(engine.outputs["r0"])
    sleepy.sleeps = True
    engine.step()
    assert not torch.cuda.current_stream().query(), "the pass waited for the step it launched"
    assert len(engine.outputs["r0"]) == before + 1
    sleepy.sleeps = False
    while engine.scheduler.has_work():
        engine.step()
    assert len(engine.outputs["r0"]) == 30


@pytest.mark.parametrize("graphs", [False, True])
def test_a_split_step_plans_again_after_the_decode_step_between_its_parts(
    graphs: bool, make_runner: MakeRunner
) -> None:
    model = make_runner("flashinfer", graphs=graphs)
    written, drawn = [], []
    for split in (False, True):
        model.kv_pool.data.zero_()
        harness = Harness(model.kv_pool)
        others = [harness.row(random_prompt(80, seed=n)) for n in range(3)]
        model.forward(harness.extend(*((row, 70) for row in others)))
        batch = harness.extend((harness.row(random_prompt(150, seed=9)), 150))
        between = [harness.decode(*others) for _ in range(2)]
        if split:
            model.forward_split(batch, 0, 1)
            model.forward(between[0])
            model.forward_split(batch, 1, 2)
            model.forward(between[1])
            result = model.forward_split(batch, 2, 3)
        else:
            result = model.forward(batch)
            model.forward(between[0])
            model.forward(between[1])
        drawn.append(result.next_token_ids.tolist())
        written.append(model.kv_pool.data.clone())
    assert drawn[0] == drawn[1]
    assert torch.equal(written[0], written[1])


def test_a_mixed_step_draws_and_writes_what_an_extend_of_the_same_tokens_does(
    make_runner: MakeRunner,
) -> None:
    """Those who decode in it go through decode's kernels, and planning both waits for nothing."""
    model = make_runner("flashinfer")
    logits = []
    for mode in (ForwardMode.EXTEND, ForwardMode.MIXED):
        model.kv_pool.data.zero_()
        harness = Harness(model.kv_pool)
        prompts = [harness.row(random_prompt(150, seed=n)) for n in range(2)]
        others = [harness.row(random_prompt(80 + n, seed=9 + n)) for n in range(4)]
        model.forward(harness.extend(*((row, 70 + n) for n, row in enumerate(others))))
        rows = [(prompts[0], 100), (prompts[1], 33), *((row, 1) for row in others)]
        batch = harness.extend(*rows, mode=mode)
        model.forward_logits(batch)  # again below: what was written is written as it was
        with no_waiting():
            found = model.forward_logits(batch)
        logits.append(found.clone())
    apart = (logits[0] - logits[1]).norm() / logits[0].norm()
    assert float(apart) < 3e-2
