"""What an engine is made of, built from the worker's configuration: model, memory, transports."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.errors import ConfigError
from engine.execution.forward_batch import BatchRunner
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.llguidance_backend import LlguidanceBackend
from engine.memory.kv_pool import PageMajorKVPool
from engine.memory.pools import MemoryPools, make_memory_pools
from engine.model_config import ModelConfig
from engine.parallel.runners import LeadingRunner
from engine.scheduler.config import SchedulerConfig
from engine.scheduler.role import SchedulerRole
from engine.scheduler.scheduler import Scheduler
from kvtransfer.agent import TransferAgent
from kvtransfer.layout import PageLayout, compatibility_fingerprint
from kvtransfer.pool_sealer import Sealer
from protos.baton.v1 import channel_pb2, kv_pb2, worker_pb2
from worker.affinity import affinity
from worker.channel import EngineChannel
from worker.config import WorkerConfig
from worker.fingerprint import model_digest
from worker.handover_trace import HandoverTrace
from worker.host_memory import host_cache_copier, retract_copier
from worker.kv_traffic import KvTraffic
from worker.rank_kv import RankKv, RankLander, RankSealer
from worker.rank_memory import make_rank_transports, rank_place
from worker.rank_model import arithmetic_of, load_rank_model, rank_device, window_slots
from worker.ranks import Ranks
from worker.transports import OUTBOX_SLOTS, TransferMemory, Transports, make_transports


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProcess:
    """What the engine process inherits from its front."""

    instance_id: str
    channel: EngineChannel
    window_fd: int
    outbox_fd: int


@dataclass(frozen=True, slots=True)
class EngineParts:
    """Everything that a role composes."""

    config: WorkerConfig
    process: EngineProcess
    model_config: ModelConfig
    runner: BatchRunner
    kv_pool: PageMajorKVPool
    memory: MemoryPools
    layout: PageLayout
    """Of this rank's pages."""
    kv_heads: int
    """Of the whole model."""
    fingerprint: str
    transports: Transports
    agent: TransferAgent
    grammars: GrammarCompiler
    device: torch.device
    sealer: Sealer
    lander: RankLander
    ranks: Ranks
    """The other processes of a tensor-parallel engine."""

    @property
    def channel(self) -> EngineChannel:
        return self.process.channel

    def make_scheduler(self, role: SchedulerRole) -> Scheduler:
        """The common scheduler, with this worker's limits; attaches itself to `role`."""
        config = self.config
        return Scheduler(
            SchedulerConfig(
                page_size=config.page_size,
                context_length=self.model_config.context_length,
                vocab_size=self.model_config.vocab_size,
                chunked_prefill_size=config.chunked_prefill_size or None,
                max_prefill_tokens=config.max_prefill_tokens,
                max_running_requests=config.max_running_requests,
                max_queued_requests=config.max_queued_requests,
                enable_mixed_chunk=config.enable_mixed_chunk,
                enable_overlap=(
                    config.overlap == "on"
                    or (config.overlap == "auto" and self.device.type == "cuda")
                ),
                split_prefill_layers=config.split_prefill_layers,
                schedule_conservativeness=config.schedule_conservativeness,
                decode_reserve_tokens=config.decode_reserve_tokens,
                truncation_align_size=config.truncation_align_size or None,
                schedule_policy=config.schedule_policy,
                enable_priority_scheduling=config.enable_priority_scheduling,
                priority_preemption_threshold=config.priority_preemption_threshold,
            ),
            self.runner,
            self.memory,
            role,
            self.device,
            self.grammars,
        )

    def ready(self) -> channel_pb2.EngineReady:
        """What the front tells router and peers."""
        return channel_pb2.EngineReady(
            model=worker_pb2.ModelDescription(
                name=self.config.served_model_name or Path(self.config.model).name,
                path=str(Path(self.config.model).resolve()),
                context_length=self.model_config.context_length,
                vocab_size=self.model_config.vocab_size,
                eos_token_ids=self.model_config.eos_token_ids,
                max_total_tokens=self.memory.allocator.total_tokens,
                page_size=self.config.page_size,
            ),
            fingerprint=self.fingerprint,
            transports=[
                kv_pb2.TransportOffer(name=name, metadata=offer)
                for name, offer in self.agent.local_offers().items()
            ],
            engine_pid=os.getpid(),
            rank_pids=self.ranks.pids[1:],
            # Shared memory takes whole pages, all ranks' parts together.
            slot_bytes=replace(self.layout, kv_heads=self.kv_heads).page_bytes,
            slots=self.transports.shared_slots,
            outbox_slots=self.transports.outbox_slots,
        )

    def deliver_message(self, peer: str, message: bytes) -> None:
        """A KvMessage that came through the front."""
        if self.transports.grpc is not None:
            self.transports.grpc.on_message(peer, message)

    def deliver_write_done(self, write_id: int, error: str) -> None:
        """The front's answer to an order of the gRPC transport."""
        if self.transports.grpc is not None:
            self.transports.grpc.on_write_done(write_id, error)


def build_parts(config: WorkerConfig, process: EngineProcess, *, traffic: KvTraffic) -> EngineParts:
    """Loads the model, takes the memory, opens the transports.

    Raises EngineError or TransferError, worded for the operator.
    """
    receives, sends = traffic is KvTraffic.RECEIVES, traffic is KvTraffic.SENDS
    _check_parallel(config)
    device = rank_device(config, 0)
    directory = Path(config.model)
    ranks = Ranks()
    ranks.start(
        config,
        traffic=traffic,
        instance_id=process.instance_id,
        fds=(process.window_fd, process.outbox_fd),
    )
    _progress(process, f"loading {directory.name} on {_devices(config, device)}")
    group = ranks.join(device)
    model = load_rank_model(
        config,
        group=group,
        device=device,
        traffic=traffic,
        progress=lambda line: _progress(process, line),
    )
    runner, layout = model.runner, model.layout
    pool = runner.kv_pool
    memory = make_memory_pools(
        num_pages=pool.num_pages,
        page_size=config.page_size,
        num_rows=config.max_running_requests,
        max_context_len=runner.model_config.context_length,
        device=str(device),
        enable_radix_cache=config.enable_radix_cache,
        eviction_policy=config.radix_eviction_policy,
        host_copier=host_cache_copier(config, pool, layout),
        host_write_policy=config.host_write_policy,
        # Of one rank's pages alone, a retracted request could not go on.
        retract_copier=None if sends or group.size > 1 else retract_copier(config, pool, layout),
    )
    source = pool.as_bytes() if sends else None
    opening = "" if traffic is KvTraffic.NONE else "; opening transports"
    _progress(process, f"{pool.num_pages} KV pages of {config.page_size} tokens{opening}")
    transfer_memory = TransferMemory(
        layout=layout,
        kv_heads=model.checkpoint.num_kv_heads,
        device=device,
        source=source,
        window_slots=window_slots(config, pool.num_pages) if receives else 0,
        outbox_slots=OUTBOX_SLOTS if sends else 0,
        window_fd=process.window_fd,
        outbox_fd=process.outbox_fd,
    )
    if group.size == 1:
        transports = make_transports(
            config.transport,
            instance_id=process.instance_id,
            memory=transfer_memory,
            channel=process.channel,
        )
    else:
        transports = make_rank_transports(
            config,
            instance_id=process.instance_id,
            memory=transfer_memory,
            channel=process.channel,
            links=ranks.transfer_links,
        )
    # A CPU has ended a step when its launch returns.
    if sends and device.type == "cuda" and transports.by_name:
        runner.mark_layers()
    place = rank_place(config, layout, transfer_memory.kv_heads, rank=0)
    kv = RankKv(pool.as_bytes(), place)
    kv.compile_kernels(None if transports.window is None else transports.window.memory)
    return EngineParts(
        config=config,
        process=process,
        model_config=runner.model_config,
        runner=runner if group.size == 1 else LeadingRunner(runner, group, ranks.tell),
        kv_pool=pool,
        memory=memory,
        layout=layout,
        kv_heads=transfer_memory.kv_heads,
        fingerprint=compatibility_fingerprint(
            model_digest(directory, load_format=config.load_format),
            arithmetic_of(config, model.dtype, device),
            replace(layout, kv_heads=transfer_memory.kv_heads),
        ),
        transports=transports,
        agent=TransferAgent(
            instance_id=process.instance_id,
            layout=layout,
            transports=transports.by_name,
            pool=source,
            window=transports.window,
            more_windows=transports.more_windows,
            verify=config.verify_kv,
            lease_s=config.lease_s,
            wake=process.channel.wake,
            place=place,
            sealer=RankSealer(kv, ranks.transfer_links) if sends else None,
            trace=HandoverTrace(config.handover_trace).mark,
            facts=lambda: affinity(device),
        ),
        sealer=RankSealer(kv, ranks.links),
        lander=RankLander(kv, ranks.links),
        grammars=GrammarCompiler(
            LlguidanceBackend(
                directory / "tokenizer.json",
                vocab_size=runner.model_config.vocab_size,
                eos_token_ids=runner.model_config.eos_token_ids,
            ),
            timeout_s=config.grammar_timeout_s,
            on_done=process.channel.wake,
        ),
        device=device,
        ranks=ranks,
    )


def _check_parallel(config: WorkerConfig) -> None:
    """Raises ConfigError for what several ranks do not do."""
    if config.tensor_parallel_size == 1:
        return
    if config.host_cache_tokens:
        raise ConfigError(
            "host_cache_tokens keeps pages of one device in host memory; with "
            f"tensor_parallel_size {config.tensor_parallel_size} set it to 0"
        )
    if config.deterministic:
        raise ConfigError(
            "deterministic and tensor_parallel_size above 1 exclude one another: the library that "
            "adds up the ranks' parts chooses its order by the number of tokens"
        )


def _devices(config: WorkerConfig, first: torch.device) -> str:
    """Which rank takes which device, for the log."""
    size = config.tensor_parallel_size
    if size == 1:
        return str(first)
    return ", ".join(f"{rank_device(config, rank)} (rank {rank} of {size})" for rank in range(size))


def _progress(process: EngineProcess, line: str) -> None:
    process.channel.send(channel_pb2.EngineToFront(progress=line))
