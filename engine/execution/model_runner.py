"""Computes one step of a batch: decoder, logits, sampling."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from engine.errors import StepMemoryError
from engine.execution.attention import (
    AttentionBackend,
    AttentionName,
    GraphableAttention,
    create_attention,
    flashinfer_obstacle,
)
from engine.execution.decode_graphs import DecodeGraphs
from engine.execution.device import (
    kv_pool_pages,
    kv_storage_dtype,
    memory_report,
    to_device,
)
from engine.execution.forward_batch import (
    ForwardBatch,
    ForwardMode,
    ForwardResult,
    LayersDone,
    PromptTargets,
    TokenLogprobs,
)
from engine.execution.kernel_cache import build_kernels
from engine.execution.sampler import Sampler, token_logprobs
from engine.execution.smaller_steps import in_parts
from engine.execution.step_memory import (
    CudaMeter,
    LargestStep,
    StepMemory,
    graphs_bytes,
    peak_activations,
)
from engine.execution.token_by_token import (
    hidden_states_by_token,
    logits_by_token,
    run_layers_by_token,
)
from engine.memory.kv_pool import PageMajorKVPool
from engine.model_config import ModelConfig
from engine.models.decoder import BetweenLayers, Decoder, load_decoder
from engine.parallel.group import ALONE, TensorGroup
from engine.types import KvCacheDtype

LAST_LAYERS = 2
"""Of a prompt's step, told of by themselves: so few that their KV has left when the step has ended,
and enough to be computed while that of all others leaves. (Computing an 8B's KV takes an H200 sixty
times as long as handing it to another.)"""

_USUAL_CHUNK = 8192
"""Tokens of a prompt's step, where nobody says how many they are at most."""

PROMPT_LOGITS_TOKENS = 256
"""Prompt tokens whose logits exist at a time: 128 MiB in float32 for a vocabulary of 131,072, and
ten times that while the most likely are sorted out. (1,024 made it the largest part of 6.2 GiB that
the largest steps were measured to need.)"""


class ModelRunner:
    """`BatchRunner` on one device. Used by the scheduler's thread only.

    No step waits for the device: what `forward` returns are tensors that may still be computed.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        kv_pool: PageMajorKVPool,
        attention: AttentionBackend,
        decode_graphs: DecodeGraphs | None = None,
        deterministic: bool = False,
    ) -> None:
        """`deterministic`: a request's tokens, log probabilities and KV are the same, bit for bit,
        whatever is computed beside it and however its prompt is cut. `decoder` and `attention` are
        made for it, where the device is a GPU."""
        self.model_config = decoder.config
        self.decoder = decoder
        self.kv_pool = kv_pool
        self.attention = attention
        self._decode_graphs = decode_graphs
        self._sampler = Sampler(deterministic=deterministic)
        self._deterministic = deterministic
        self._by_token = deterministic and kv_pool.device.type != "cuda"
        self._split: tuple[int, BetweenLayers] | None = None
        """The next layer of a step that runs in parts, and what the one before left."""
        self._marked_layers: tuple[int, ...] = ()
        self._layers_done: list[LayersDone] = []

    def mark_layers(self) -> None:
        """Prompts' steps tell from now on when their layers are done (`ForwardResult.layers_done`):
        all but the last few, and all."""
        early = self.num_layers - LAST_LAYERS
        self._marked_layers = (early, self.num_layers) if early > 0 else (self.num_layers,)

    @property
    def num_layers(self) -> int:
        return self.model_config.num_layers

    @torch.no_grad()
    def capture(
        self, up_to: int, group: TensorGroup, progress: Callable[[str], None] = lambda line: None
    ) -> None:
        """Decode steps up to so many requests are CUDA graphs from now on. Raises ValueError where
        the attention backend has none."""
        if not isinstance(self.attention, GraphableAttention):
            raise ValueError(f"attention {self.attention.name} cannot be captured")
        self._decode_graphs = DecodeGraphs(
            self.decoder, self.kv_pool, self.attention, max_batch=up_to, progress=progress
        )
        group.replays(self._decode_graphs)

    def forward(self, batch: ForwardBatch) -> ForwardResult:
        """Writes the KV of all input tokens, and draws one token a request.

        Raises StepMemoryError where memory does not suffice even for parts of the step. (Several
        ranks cannot go on after one of them left a step in the middle: torch's error passes.)
        """
        self._layers_done.clear()
        if self.decoder.num_ranks > 1:
            return self._with_marks(self._forward_whole(batch))
        try:
            return self._with_marks(self._forward_whole(batch))
        except torch.OutOfMemoryError:
            pass  # what the error refers to must be gone before the next attempt
        hidden = in_parts(batch, lambda part: self._hidden(part, None))
        try:
            return self._result(batch, hidden)
        except torch.OutOfMemoryError as error:
            raise StepMemoryError(
                f"the logits of {len(batch.seq_lens_cpu)} requests do not fit into the memory of "
                f"{hidden.device}: lower --max-running-requests or --mem-fraction"
            ) from error

    def _with_marks(self, result: ForwardResult) -> ForwardResult:
        if not self._layers_done:
            return result
        return replace(result, layers_done=tuple(self._layers_done))

    def _forward_whole(self, batch: ForwardBatch) -> ForwardResult:
        if batch.prompt_targets is None:
            return self._sampler.sample(self.forward_logits(batch), batch.sampling)
        return self._result(batch, self._hidden(batch, None))

    def forward_split(
        self, batch: ForwardBatch, first_layer: int, last_layer: int
    ) -> ForwardResult:
        """As `_part`. Raises StepMemoryError where memory runs out."""
        if self.decoder.num_ranks > 1:
            return self._part(batch, first_layer, last_layer)
        try:
            return self._part(batch, first_layer, last_layer)
        except torch.OutOfMemoryError as error:
            raise StepMemoryError(
                f"layers {first_layer} to {last_layer - 1} of a step of {sum(batch.extend_lens)} "
                f"tokens do not fit into the memory of {batch.input_ids.device}: lower "
                "--chunked-prefill-size or --mem-fraction"
            ) from error

    @torch.no_grad()
    def _part(self, batch: ForwardBatch, first_layer: int, last_layer: int) -> ForwardResult:
        """Layers `first_layer .. last_layer - 1` of `forward`, of one batch at a time; other
        batches may run between the parts. Raises `ValueError` for a part out of order.
        """
        if first_layer == 0:
            state = self.decoder.embed(batch.input_ids)
        elif self._split is not None and self._split[0] == first_layer:
            state = self._split[1]
        else:
            raise ValueError(f"layer {first_layer} does not follow what has run of this step")
        self._split = None
        judged = batch.prompt_targets is not None
        last_tokens = None if judged else self._last_tokens(batch)
        state = self._run_layers(range(first_layer, last_layer), state, batch, last_tokens)
        if last_layer < self.num_layers:
            self._split = (last_layer, state)
            return ForwardResult(next_token_ids=batch.input_ids[:0], logprobs=None)
        hidden = self._hidden_states(state, last_tokens)
        if judged:
            return self._result(batch, hidden)
        return self._sampler.sample(self._logits(hidden), batch.sampling)

    def drop_split(self) -> None:
        """The step that runs in parts is not continued."""
        self._split = None

    # no_grad and not inference_mode: the scheduler may go on computing with the result's tensors,
    # and inference tensors refuse in-place changes outside that mode.
    @torch.no_grad()
    def forward_logits(self, batch: ForwardBatch) -> torch.Tensor:
        """Writes the KV of all input tokens; logits [b, vocab] float32 after the last of each
        request."""
        if batch.forward_mode in (ForwardMode.PREBUILT, ForwardMode.IDLE):
            raise ValueError(f"a {batch.forward_mode.name} batch has no forward")
        if self._decode_graphs is not None and self._decode_graphs.can_run(batch):
            return self._decode_graphs.forward_logits(batch)
        return self._logits(self._hidden(batch, self._last_tokens(batch)))

    @torch.no_grad()
    def _result(self, batch: ForwardBatch, hidden: torch.Tensor) -> ForwardResult:
        """The step's, for the hidden states of all its tokens."""
        if batch.prompt_targets is not None:
            return self._judge_prompt(batch, batch.prompt_targets, hidden)
        last_tokens = self._last_tokens(batch)
        last = hidden if last_tokens is None else hidden[last_tokens]
        return self._sampler.sample(self._logits(last), batch.sampling)

    def _judge_prompt(
        self, batch: ForwardBatch, targets: PromptTargets, hidden: torch.Tensor
    ) -> ForwardResult:
        """The step's result for hidden states of all its tokens, in slices to bound memory."""
        slices = [
            token_logprobs(
                self._logits(hidden[inputs]),
                target_ids,
                targets.top,
                deterministic=self._deterministic,
            )
            for inputs, target_ids in zip(
                torch.split(targets.inputs, PROMPT_LOGITS_TOKENS),
                torch.split(targets.target_ids, PROMPT_LOGITS_TOKENS),
                strict=True,
            )
        ]
        prompt = TokenLogprobs(
            chosen=torch.cat([part.chosen for part in slices]),
            top_ids=torch.cat([part.top_ids for part in slices]),
            top=torch.cat([part.top for part in slices]),
        )
        last_tokens = self._last_tokens(batch)
        last = hidden if last_tokens is None else hidden[last_tokens]
        result = self._sampler.sample(self._logits(last), batch.sampling)
        return replace(result, prompt=prompt)

    @torch.no_grad()
    def _hidden(self, batch: ForwardBatch, tokens: torch.Tensor | None) -> torch.Tensor:
        """Hidden states of the input tokens `tokens` (None: of all), and the KV of all written."""
        layers = range(self.num_layers)
        state = self._run_layers(layers, self.decoder.embed(batch.input_ids), batch, tokens)
        return self._hidden_states(state, tokens)

    def _run_layers(
        self,
        layers: range,
        state: BetweenLayers,
        batch: ForwardBatch,
        last_tokens: torch.Tensor | None,
    ) -> BetweenLayers:
        """Planned anew for each part of a step: the steps between them have plans of their own."""
        decoder, pool, attention = self.decoder, self.kv_pool, self.attention
        if self._by_token:
            return run_layers_by_token(decoder, layers, state, batch, pool, attention)
        attention.plan(batch)
        rows = pool.rows(batch.out_cache_loc)
        positions = batch.positions
        whole = len(layers) == self.num_layers and batch.forward_mode.is_extend()
        for layer in self._marked_layers if whole else ():
            layers, part = range(layer, layers.stop), range(layers.start, layer)
            state = decoder.run_layers(part, state, positions, rows, pool, attention, last_tokens)
            self._layers_done.append(LayersDone(layer, self._event()))
        return decoder.run_layers(layers, state, positions, rows, pool, attention, last_tokens)

    def _event(self) -> torch.cuda.Event | None:
        if self.kv_pool.device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _hidden_states(self, state: BetweenLayers, tokens: torch.Tensor | None) -> torch.Tensor:
        if self._by_token:
            return hidden_states_by_token(self.decoder, state, tokens)
        return self.decoder.hidden_states(state)  # of `tokens` alone, as the layers left it

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._by_token:
            return logits_by_token(self.decoder, hidden)
        return self.decoder.logits(hidden)

    def _last_tokens(self, batch: ForwardBatch) -> torch.Tensor | None:
        """Index of each request's last input token; None where all tokens are."""
        if len(batch.extend_lens) == batch.input_ids.shape[0]:
            return None
        last, end = [], -1
        for length in batch.extend_lens:
            end += length
            last.append(end)
        return to_device(last, batch.input_ids.device)


def load_model_runner(
    model_config: ModelConfig,
    *,
    model_path: str,
    device: torch.device,
    dtype: torch.dtype,
    page_size: int,
    max_total_tokens: int = 0,
    mem_fraction: float = 0.85,
    reserved_bytes: int = 0,
    load_format: Literal["auto", "dummy"] = "auto",
    attention: AttentionName = "auto",
    max_context_length: int = 0,
    graphs_up_to: int = 0,
    group: TensorGroup = ALONE,
    kv_cache_dtype: KvCacheDtype = "auto",
    deterministic: bool = False,
    largest_step: LargestStep | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> ModelRunner:
    """Loads the weights, then gives the KV pool what memory is left (see kv_pool_pages), then
    builds the runner; the pool is its `kv_pool`.

    `max_context_length` shortens the model's context (0: as it is). `graphs_up_to` captures decode
    steps up to that many requests as CUDA graphs, on a GPU with kernels for it (0: none).
    On a GPU `largest_step` is run once before the pool is taken, so that the pool leaves room for
    what it needs, and `progress` is told where every GiB is (None: SPARE_BYTES are left).
    `progress` is told, line by line, what takes its time.
    With several ranks in `group` all of them call this together, each for its part of the model and
    of the KV heads; they agree on the pages of the one with the least memory.
    Raises InvalidModelError, ConfigError.
    """
    if max_context_length:
        shorter = min(max_context_length, model_config.context_length)
        model_config = replace(model_config, context_length=shorter)
    decoder = load_decoder(
        model_config,
        model_path=model_path,
        device=device,
        dtype=dtype,
        load_format=load_format,
        group=group,
        deterministic=deterministic,
    )
    model_config = decoder.config
    kv_dtype = kv_storage_dtype(kv_cache_dtype, dtype)
    weights_bytes = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    make = _Maker(decoder, attention, page_size, kv_dtype, deterministic, progress)
    needs: StepMemory | None = None
    if largest_step is not None and device.type == "cuda":
        needs = make.measured_needs(largest_step, graphs_up_to)
    num_pages = kv_pool_pages(
        model_config,
        page_size=page_size,
        dtype=kv_dtype,
        device=device,
        max_total_tokens=max_total_tokens,
        mem_fraction=mem_fraction,
        reserved_bytes=reserved_bytes,
        steps_bytes=None if needs is None else needs.total,
    )
    runner = make.runner(group.least(num_pages, device))
    make.choose_products(_USUAL_CHUNK if largest_step is None else largest_step.tokens)
    free_before = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    if graphs_up_to and isinstance(runner.attention, GraphableAttention):
        runner.capture(graphs_up_to, group, progress)
    if needs is not None:
        torch.cuda.empty_cache()
        parts = {
            "weights": weights_bytes,
            "activations": needs.activations,
            "attention's workspace": needs.workspace,
            "decode graphs": free_before - torch.cuda.mem_get_info(device)[0],
        }
        pool_bytes = runner.kv_pool.data.nbytes
        progress(
            memory_report(device, parts=parts, window_bytes=reserved_bytes, pool_bytes=pool_bytes)
        )
    return runner


@dataclass(frozen=True, slots=True)
class _Maker:
    """Runners of one decoder over pools of any size: a small one to measure, then the real one."""

    decoder: Decoder
    attention: AttentionName
    page_size: int
    kv_dtype: torch.dtype
    deterministic: bool
    progress: Callable[[str], None]

    def runner(self, num_pages: int) -> ModelRunner:
        decoder, config = self.decoder, self.decoder.config
        kv_pool = PageMajorKVPool(
            num_pages=num_pages,
            page_size=self.page_size,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=self.kv_dtype,
            device=decoder.device,
            compute_dtype=decoder.dtype,
        )
        on_gpu = kv_pool.device.type == "cuda"
        if on_gpu and self.attention != "torch" and not flashinfer_obstacle(config, kv_pool):
            build_kernels(config, kv_pool, deterministic=self.deterministic, progress=self.progress)
        backend = create_attention(
            config, kv_pool, self.attention, deterministic=self.deterministic
        )
        return ModelRunner(
            decoder, kv_pool=kv_pool, attention=backend, deterministic=self.deterministic
        )

    def choose_products(self, most_tokens: int) -> None:
        """Of prompts; those of decode steps are chosen where these are captured."""
        try:
            lines = self.decoder.choose_prompt_products(most_tokens)
        except torch.OutOfMemoryError:
            lines = ["not measured, as memory is short"]
        for line in lines:
            self.progress(f"products of prompts by tokens, {line}")
        if self.decoder.device.type == "cuda":
            torch.cuda.empty_cache()

    def measured_needs(self, largest: LargestStep, graphs_up_to: int) -> StepMemory:
        """Of a CUDA device."""
        runner = self.runner(1)
        activations = peak_activations(runner, largest, CudaMeter(self.decoder.device))
        workspace = getattr(runner.attention, "workspace", None)
        captures = graphs_up_to if isinstance(runner.attention, GraphableAttention) else 0
        config, page_size = self.decoder.config, self.page_size
        needs = StepMemory(
            activations=activations,
            workspace=0 if workspace is None else workspace.nbytes,
            graphs=graphs_bytes(config, max_batch=captures, page_size=page_size),
        )
        del runner, workspace
        gc.collect()
        torch.cuda.empty_cache()
        return needs
