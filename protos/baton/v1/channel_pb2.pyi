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
    __slots__ = ("write_id", "peer", "copies", "message")
    WRITE_ID_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    write_id: int
    peer: str
    copies: _containers.RepeatedCompositeFieldContainer[SlotCopy]
    message: bytes
    def __init__(self, write_id: _Optional[int] = ..., peer: _Optional[str] = ..., copies: _Optional[_Iterable[_Union[SlotCopy, _Mapping]]] = ..., message: _Optional[bytes] = ...) -> None: ...

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
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    def __init__(self, nonce: _Optional[int] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("nonce", "status")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    status: _worker_pb2.WorkerStatus
    def __init__(self, nonce: _Optional[int] = ..., status: _Optional[_Union[_worker_pb2.WorkerStatus, _Mapping]] = ...) -> None: ...

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
