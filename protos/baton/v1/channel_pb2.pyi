from protos.baton.v1 import inference_pb2 as _inference_pb2
from protos.baton.v1 import kv_pb2 as _kv_pb2
from protos.baton.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FrontToEngine(_message.Message):
    __slots__ = ("start", "reserve", "prefill", "ticket", "generate", "abort", "peer_connected", "peer_gone", "kv", "kv_write_done", "status", "drain", "stop", "ping", "probe")
    START_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    GENERATE_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    PEER_CONNECTED_FIELD_NUMBER: _ClassVar[int]
    PEER_GONE_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    KV_WRITE_DONE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    start: bytes
    reserve: _worker_pb2.ReserveRequest
    prefill: _worker_pb2.PrefillRequest
    ticket: _worker_pb2.TicketForPrefill
    generate: _worker_pb2.GenerateLocally
    abort: _worker_pb2.AbortWork
    peer_connected: PeerConnected
    peer_gone: PeerGone
    kv: KvIn
    kv_write_done: KvWriteDone
    status: StatusQuery
    drain: bool
    stop: bool
    ping: int
    probe: ProbeOrder
    def __init__(self, start: _Optional[bytes] = ..., reserve: _Optional[_Union[_worker_pb2.ReserveRequest, _Mapping]] = ..., prefill: _Optional[_Union[_worker_pb2.PrefillRequest, _Mapping]] = ..., ticket: _Optional[_Union[_worker_pb2.TicketForPrefill, _Mapping]] = ..., generate: _Optional[_Union[_worker_pb2.GenerateLocally, _Mapping]] = ..., abort: _Optional[_Union[_worker_pb2.AbortWork, _Mapping]] = ..., peer_connected: _Optional[_Union[PeerConnected, _Mapping]] = ..., peer_gone: _Optional[_Union[PeerGone, _Mapping]] = ..., kv: _Optional[_Union[KvIn, _Mapping]] = ..., kv_write_done: _Optional[_Union[KvWriteDone, _Mapping]] = ..., status: _Optional[_Union[StatusQuery, _Mapping]] = ..., drain: _Optional[bool] = ..., stop: _Optional[bool] = ..., ping: _Optional[int] = ..., probe: _Optional[_Union[ProbeOrder, _Mapping]] = ...) -> None: ...

class EngineToFront(_message.Message):
    __slots__ = ("ready", "failed", "reserved", "step", "work_failed", "kv", "kv_write", "status", "progress", "drained", "peer_attached", "request_done", "pong", "probed")
    READY_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WORK_FAILED_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    KV_WRITE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    PEER_ATTACHED_FIELD_NUMBER: _ClassVar[int]
    REQUEST_DONE_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    PROBED_FIELD_NUMBER: _ClassVar[int]
    ready: EngineReady
    failed: EngineFailed
    reserved: _worker_pb2.Reserved
    step: _worker_pb2.StepOutput
    work_failed: _worker_pb2.WorkFailed
    kv: KvOut
    kv_write: KvWrite
    status: StatusReply
    progress: str
    drained: bool
    peer_attached: PeerAttached
    request_done: RequestDone
    pong: int
    probed: ProbeAnswer
    def __init__(self, ready: _Optional[_Union[EngineReady, _Mapping]] = ..., failed: _Optional[_Union[EngineFailed, _Mapping]] = ..., reserved: _Optional[_Union[_worker_pb2.Reserved, _Mapping]] = ..., step: _Optional[_Union[_worker_pb2.StepOutput, _Mapping]] = ..., work_failed: _Optional[_Union[_worker_pb2.WorkFailed, _Mapping]] = ..., kv: _Optional[_Union[KvOut, _Mapping]] = ..., kv_write: _Optional[_Union[KvWrite, _Mapping]] = ..., status: _Optional[_Union[StatusReply, _Mapping]] = ..., progress: _Optional[str] = ..., drained: _Optional[bool] = ..., peer_attached: _Optional[_Union[PeerAttached, _Mapping]] = ..., request_done: _Optional[_Union[RequestDone, _Mapping]] = ..., pong: _Optional[int] = ..., probed: _Optional[_Union[ProbeAnswer, _Mapping]] = ...) -> None: ...

class EngineReady(_message.Message):
    __slots__ = ("model", "fingerprint", "transports", "engine_pid", "slot_bytes", "slots", "rank_pids", "outbox_slots")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_PID_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    RANK_PIDS_FIELD_NUMBER: _ClassVar[int]
    OUTBOX_SLOTS_FIELD_NUMBER: _ClassVar[int]
    model: _worker_pb2.ModelDescription
    fingerprint: str
    transports: _containers.RepeatedCompositeFieldContainer[_kv_pb2.TransportOffer]
    engine_pid: int
    slot_bytes: int
    slots: int
    rank_pids: _containers.RepeatedScalarFieldContainer[int]
    outbox_slots: int
    def __init__(self, model: _Optional[_Union[_worker_pb2.ModelDescription, _Mapping]] = ..., fingerprint: _Optional[str] = ..., transports: _Optional[_Iterable[_Union[_kv_pb2.TransportOffer, _Mapping]]] = ..., engine_pid: _Optional[int] = ..., slot_bytes: _Optional[int] = ..., slots: _Optional[int] = ..., rank_pids: _Optional[_Iterable[int]] = ..., outbox_slots: _Optional[int] = ...) -> None: ...

class EngineFailed(_message.Message):
    __slots__ = ("error",)
    ERROR_FIELD_NUMBER: _ClassVar[int]
    error: _worker_pb2.Error
    def __init__(self, error: _Optional[_Union[_worker_pb2.Error, _Mapping]] = ...) -> None: ...

class PeerConnected(_message.Message):
    __slots__ = ("info", "transport", "offer")
    INFO_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    info: _kv_pb2.ConnectInfo
    transport: str
    offer: bytes
    def __init__(self, info: _Optional[_Union[_kv_pb2.ConnectInfo, _Mapping]] = ..., transport: _Optional[str] = ..., offer: _Optional[bytes] = ...) -> None: ...

class PeerAttached(_message.Message):
    __slots__ = ("instance_id", "ok", "reason")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    OK_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    ok: bool
    reason: str
    def __init__(self, instance_id: _Optional[str] = ..., ok: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...

class PeerGone(_message.Message):
    __slots__ = ("instance_id", "reason", "proven_dead")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PROVEN_DEAD_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    reason: str
    proven_dead: bool
    def __init__(self, instance_id: _Optional[str] = ..., reason: _Optional[str] = ..., proven_dead: _Optional[bool] = ...) -> None: ...

class KvIn(_message.Message):
    __slots__ = ("peer", "message")
    PEER_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    peer: str
    message: bytes
    def __init__(self, peer: _Optional[str] = ..., message: _Optional[bytes] = ...) -> None: ...

class KvOut(_message.Message):
    __slots__ = ("peer", "message")
    PEER_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    peer: str
    message: bytes
    def __init__(self, peer: _Optional[str] = ..., message: _Optional[bytes] = ...) -> None: ...

class KvWrite(_message.Message):
    __slots__ = ("write_id", "peer", "copies", "message", "ranges")
    WRITE_ID_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    write_id: int
    peer: str
    copies: _containers.RepeatedCompositeFieldContainer[SlotCopy]
    message: bytes
    ranges: _containers.RepeatedCompositeFieldContainer[ByteRange]
    def __init__(self, write_id: _Optional[int] = ..., peer: _Optional[str] = ..., copies: _Optional[_Iterable[_Union[SlotCopy, _Mapping]]] = ..., message: _Optional[bytes] = ..., ranges: _Optional[_Iterable[_Union[ByteRange, _Mapping]]] = ...) -> None: ...

class ByteRange(_message.Message):
    __slots__ = ("first", "end")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    first: int
    end: int
    def __init__(self, first: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class SlotCopy(_message.Message):
    __slots__ = ("outbox_slot", "landing_slot")
    OUTBOX_SLOT_FIELD_NUMBER: _ClassVar[int]
    LANDING_SLOT_FIELD_NUMBER: _ClassVar[int]
    outbox_slot: int
    landing_slot: int
    def __init__(self, outbox_slot: _Optional[int] = ..., landing_slot: _Optional[int] = ...) -> None: ...

class KvWriteDone(_message.Message):
    __slots__ = ("write_id", "peer", "error")
    WRITE_ID_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    write_id: int
    peer: str
    error: str
    def __init__(self, write_id: _Optional[int] = ..., peer: _Optional[str] = ..., error: _Optional[str] = ...) -> None: ...

class StatusQuery(_message.Message):
    __slots__ = ("nonce", "figures")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    FIGURES_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    figures: bool
    def __init__(self, nonce: _Optional[int] = ..., figures: _Optional[bool] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("nonce", "status", "figures")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    FIGURES_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    status: _worker_pb2.WorkerStatus
    figures: EngineFigures
    def __init__(self, nonce: _Optional[int] = ..., status: _Optional[_Union[_worker_pb2.WorkerStatus, _Mapping]] = ..., figures: _Optional[_Union[EngineFigures, _Mapping]] = ...) -> None: ...

class EngineFigures(_message.Message):
    __slots__ = ("queues", "pages", "new_token_ratio", "retractions", "preemptions", "prefix_query_tokens", "prefix_hit_tokens", "computed_tokens", "pass_seconds", "transfers", "dropped_messages", "peers")
    class QueuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class DroppedMessagesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    QUEUES_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    NEW_TOKEN_RATIO_FIELD_NUMBER: _ClassVar[int]
    RETRACTIONS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_QUERY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PASS_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_MESSAGES_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    queues: _containers.ScalarMap[str, int]
    pages: _inference_pb2.PageCounts
    new_token_ratio: float
    retractions: int
    preemptions: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    computed_tokens: int
    pass_seconds: HistogramCounts
    transfers: _containers.RepeatedCompositeFieldContainer[TransferFigures]
    dropped_messages: _containers.ScalarMap[str, int]
    peers: int
    def __init__(self, queues: _Optional[_Mapping[str, int]] = ..., pages: _Optional[_Union[_inference_pb2.PageCounts, _Mapping]] = ..., new_token_ratio: _Optional[float] = ..., retractions: _Optional[int] = ..., preemptions: _Optional[int] = ..., prefix_query_tokens: _Optional[int] = ..., prefix_hit_tokens: _Optional[int] = ..., computed_tokens: _Optional[int] = ..., pass_seconds: _Optional[_Union[HistogramCounts, _Mapping]] = ..., transfers: _Optional[_Iterable[_Union[TransferFigures, _Mapping]]] = ..., dropped_messages: _Optional[_Mapping[str, int]] = ..., peers: _Optional[int] = ...) -> None: ...

class HistogramCounts(_message.Message):
    __slots__ = ("bounds", "counts", "sum")
    BOUNDS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    SUM_FIELD_NUMBER: _ClassVar[int]
    bounds: _containers.RepeatedScalarFieldContainer[float]
    counts: _containers.RepeatedScalarFieldContainer[int]
    sum: float
    def __init__(self, bounds: _Optional[_Iterable[float]] = ..., counts: _Optional[_Iterable[int]] = ..., sum: _Optional[float] = ...) -> None: ...

class TransferFigures(_message.Message):
    __slots__ = ("transport", "bytes", "seconds", "failures")
    class FailuresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    transport: str
    bytes: int
    seconds: HistogramCounts
    failures: _containers.ScalarMap[str, int]
    def __init__(self, transport: _Optional[str] = ..., bytes: _Optional[int] = ..., seconds: _Optional[_Union[HistogramCounts, _Mapping]] = ..., failures: _Optional[_Mapping[str, int]] = ...) -> None: ...

class ProbeOrder(_message.Message):
    __slots__ = ("nonce", "request")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    request: _worker_pb2.ProbeRequest
    def __init__(self, nonce: _Optional[int] = ..., request: _Optional[_Union[_worker_pb2.ProbeRequest, _Mapping]] = ...) -> None: ...

class ProbeAnswer(_message.Message):
    __slots__ = ("nonce", "report")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    report: _worker_pb2.ProbeReport
    def __init__(self, nonce: _Optional[int] = ..., report: _Optional[_Union[_worker_pb2.ProbeReport, _Mapping]] = ...) -> None: ...

class RequestDone(_message.Message):
    __slots__ = ("request_id", "attempt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...
