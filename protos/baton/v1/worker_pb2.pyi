from protos.baton.v1 import inference_pb2 as _inference_pb2
from protos.baton.v1 import kv_pb2 as _kv_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ErrorCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_CODE_UNSPECIFIED: _ClassVar[ErrorCode]
    ERROR_CODE_INVALID_ARGUMENT: _ClassVar[ErrorCode]
    ERROR_CODE_NOT_FOUND: _ClassVar[ErrorCode]
    ERROR_CODE_ALREADY_EXISTS: _ClassVar[ErrorCode]
    ERROR_CODE_RESOURCE_EXHAUSTED: _ClassVar[ErrorCode]
    ERROR_CODE_FAILED_PRECONDITION: _ClassVar[ErrorCode]
    ERROR_CODE_ABORTED: _ClassVar[ErrorCode]
    ERROR_CODE_UNAVAILABLE: _ClassVar[ErrorCode]
    ERROR_CODE_DEADLINE_EXCEEDED: _ClassVar[ErrorCode]
    ERROR_CODE_DATA_LOSS: _ClassVar[ErrorCode]
    ERROR_CODE_INTERNAL: _ClassVar[ErrorCode]
ERROR_CODE_UNSPECIFIED: ErrorCode
ERROR_CODE_INVALID_ARGUMENT: ErrorCode
ERROR_CODE_NOT_FOUND: ErrorCode
ERROR_CODE_ALREADY_EXISTS: ErrorCode
ERROR_CODE_RESOURCE_EXHAUSTED: ErrorCode
ERROR_CODE_FAILED_PRECONDITION: ErrorCode
ERROR_CODE_ABORTED: ErrorCode
ERROR_CODE_UNAVAILABLE: ErrorCode
ERROR_CODE_DEADLINE_EXCEEDED: ErrorCode
ERROR_CODE_DATA_LOSS: ErrorCode
ERROR_CODE_INTERNAL: ErrorCode

class RegisterRequest(_message.Message):
    __slots__ = ("protocol_version", "instance_id", "role", "address", "model", "pid", "engine_pids", "transports", "fingerprint", "epoch", "metrics_address")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_PIDS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    instance_id: str
    role: _inference_pb2.WorkerRole
    address: str
    model: ModelDescription
    pid: int
    engine_pids: _containers.RepeatedScalarFieldContainer[int]
    transports: _containers.RepeatedScalarFieldContainer[str]
    fingerprint: str
    epoch: int
    metrics_address: str
    def __init__(self, protocol_version: _Optional[int] = ..., instance_id: _Optional[str] = ..., role: _Optional[_Union[_inference_pb2.WorkerRole, str]] = ..., address: _Optional[str] = ..., model: _Optional[_Union[ModelDescription, _Mapping]] = ..., pid: _Optional[int] = ..., engine_pids: _Optional[_Iterable[int]] = ..., transports: _Optional[_Iterable[str]] = ..., fingerprint: _Optional[str] = ..., epoch: _Optional[int] = ..., metrics_address: _Optional[str] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ModelDescription(_message.Message):
    __slots__ = ("name", "path", "context_length", "vocab_size", "eos_token_ids", "max_total_tokens", "page_size")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    context_length: int
    vocab_size: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    max_total_tokens: int
    page_size: int
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ..., context_length: _Optional[int] = ..., vocab_size: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., max_total_tokens: _Optional[int] = ..., page_size: _Optional[int] = ...) -> None: ...

class RegisterResponse(_message.Message):
    __slots__ = ("accepted", "reason", "heartbeat_interval_s")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    reason: str
    heartbeat_interval_s: float
    def __init__(self, accepted: _Optional[bool] = ..., reason: _Optional[str] = ..., heartbeat_interval_s: _Optional[float] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("instance_id", "status")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    status: WorkerStatus
    def __init__(self, instance_id: _Optional[str] = ..., status: _Optional[_Union[WorkerStatus, _Mapping]] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("known",)
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    known: bool
    def __init__(self, known: _Optional[bool] = ...) -> None: ...

class DeregisterRequest(_message.Message):
    __slots__ = ("instance_id",)
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    def __init__(self, instance_id: _Optional[str] = ...) -> None: ...

class DeregisterResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainWorkerRequest(_message.Message):
    __slots__ = ("worker", "drain")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    worker: str
    drain: DrainRequest
    def __init__(self, worker: _Optional[str] = ..., drain: _Optional[_Union[DrainRequest, _Mapping]] = ...) -> None: ...

class DrainWorkerResponse(_message.Message):
    __slots__ = ("instance_id",)
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    def __init__(self, instance_id: _Optional[str] = ...) -> None: ...

class ProbeLinkRequest(_message.Message):
    __slots__ = ("prefill", "decode", "probe")
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    prefill: str
    decode: str
    probe: ProbeRequest
    def __init__(self, prefill: _Optional[str] = ..., decode: _Optional[str] = ..., probe: _Optional[_Union[ProbeRequest, _Mapping]] = ...) -> None: ...

class ProbeRequest(_message.Message):
    __slots__ = ("decode_instance", "bytes", "rounds")
    DECODE_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    decode_instance: str
    bytes: int
    rounds: int
    def __init__(self, decode_instance: _Optional[str] = ..., bytes: _Optional[int] = ..., rounds: _Optional[int] = ...) -> None: ...

class ProbeReport(_message.Message):
    __slots__ = ("prefill_instance", "decode_instance", "transport", "bytes", "gigabytes_per_s", "copy_gigabytes_per_s", "network_gigabytes_per_s", "connect_ms", "round_trip_ms", "same_host", "prefill_device", "decode_device", "facts", "error", "decode_facts")
    PREFILL_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    DECODE_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    GIGABYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    COPY_GIGABYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    NETWORK_GIGABYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    CONNECT_MS_FIELD_NUMBER: _ClassVar[int]
    ROUND_TRIP_MS_FIELD_NUMBER: _ClassVar[int]
    SAME_HOST_FIELD_NUMBER: _ClassVar[int]
    PREFILL_DEVICE_FIELD_NUMBER: _ClassVar[int]
    DECODE_DEVICE_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DECODE_FACTS_FIELD_NUMBER: _ClassVar[int]
    prefill_instance: str
    decode_instance: str
    transport: str
    bytes: int
    gigabytes_per_s: float
    copy_gigabytes_per_s: float
    network_gigabytes_per_s: float
    connect_ms: float
    round_trip_ms: float
    same_host: bool
    prefill_device: str
    decode_device: str
    facts: _containers.RepeatedScalarFieldContainer[str]
    error: str
    decode_facts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, prefill_instance: _Optional[str] = ..., decode_instance: _Optional[str] = ..., transport: _Optional[str] = ..., bytes: _Optional[int] = ..., gigabytes_per_s: _Optional[float] = ..., copy_gigabytes_per_s: _Optional[float] = ..., network_gigabytes_per_s: _Optional[float] = ..., connect_ms: _Optional[float] = ..., round_trip_ms: _Optional[float] = ..., same_host: _Optional[bool] = ..., prefill_device: _Optional[str] = ..., decode_device: _Optional[str] = ..., facts: _Optional[_Iterable[str]] = ..., error: _Optional[str] = ..., decode_facts: _Optional[_Iterable[str]] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("instance_id", "state", "pages", "running", "waiting", "slots_free", "slots_granted", "slots_quarantined", "slots_total", "rows_free", "rows_total", "queued_tokens", "transferring", "host_cache", "retracted", "early_layers_sent", "window_replacements", "transfer_handles")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FREE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_GRANTED_FIELD_NUMBER: _ClassVar[int]
    SLOTS_QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    SLOTS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    ROWS_FREE_FIELD_NUMBER: _ClassVar[int]
    ROWS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRANSFERRING_FIELD_NUMBER: _ClassVar[int]
    HOST_CACHE_FIELD_NUMBER: _ClassVar[int]
    RETRACTED_FIELD_NUMBER: _ClassVar[int]
    EARLY_LAYERS_SENT_FIELD_NUMBER: _ClassVar[int]
    WINDOW_REPLACEMENTS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_HANDLES_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    state: _inference_pb2.WorkerState
    pages: _inference_pb2.PageCounts
    running: int
    waiting: int
    slots_free: int
    slots_granted: int
    slots_quarantined: int
    slots_total: int
    rows_free: int
    rows_total: int
    queued_tokens: int
    transferring: int
    host_cache: HostPages
    retracted: HostPages
    early_layers_sent: int
    window_replacements: int
    transfer_handles: int
    def __init__(self, instance_id: _Optional[str] = ..., state: _Optional[_Union[_inference_pb2.WorkerState, str]] = ..., pages: _Optional[_Union[_inference_pb2.PageCounts, _Mapping]] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., slots_free: _Optional[int] = ..., slots_granted: _Optional[int] = ..., slots_quarantined: _Optional[int] = ..., slots_total: _Optional[int] = ..., rows_free: _Optional[int] = ..., rows_total: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., transferring: _Optional[int] = ..., host_cache: _Optional[_Union[HostPages, _Mapping]] = ..., retracted: _Optional[_Union[HostPages, _Mapping]] = ..., early_layers_sent: _Optional[int] = ..., window_replacements: _Optional[int] = ..., transfer_handles: _Optional[int] = ...) -> None: ...

class HostPages(_message.Message):
    __slots__ = ("used", "total", "written", "loaded", "spoilt")
    USED_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    SPOILT_FIELD_NUMBER: _ClassVar[int]
    used: int
    total: int
    written: int
    loaded: int
    spoilt: int
    def __init__(self, used: _Optional[int] = ..., total: _Optional[int] = ..., written: _Optional[int] = ..., loaded: _Optional[int] = ..., spoilt: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout_s",)
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    timeout_s: float
    def __init__(self, timeout_s: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message", "retry_after_s")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    code: ErrorCode
    message: str
    retry_after_s: float
    def __init__(self, code: _Optional[_Union[ErrorCode, str]] = ..., message: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class ResolvedSampling(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "seed", "max_tokens", "stop_token_ids", "ignore_eos", "logprobs", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "top_logprobs", "min_tokens", "prompt_logprobs", "grammar")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    seed: int
    max_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    logprobs: bool
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    top_logprobs: int
    min_tokens: int
    prompt_logprobs: int
    grammar: _inference_pb2.Grammar
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ..., max_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., logprobs: _Optional[bool] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., top_logprobs: _Optional[int] = ..., min_tokens: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ..., grammar: _Optional[_Union[_inference_pb2.Grammar, _Mapping]] = ...) -> None: ...

class RouterMessage(_message.Message):
    __slots__ = ("hello", "reserve", "prefill", "ticket", "abort", "peers", "ping", "generate")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    GENERATE_FIELD_NUMBER: _ClassVar[int]
    hello: SessionHello
    reserve: ReserveRequest
    prefill: PrefillRequest
    ticket: TicketForPrefill
    abort: AbortWork
    peers: PeerUpdate
    ping: Ping
    generate: GenerateLocally
    def __init__(self, hello: _Optional[_Union[SessionHello, _Mapping]] = ..., reserve: _Optional[_Union[ReserveRequest, _Mapping]] = ..., prefill: _Optional[_Union[PrefillRequest, _Mapping]] = ..., ticket: _Optional[_Union[TicketForPrefill, _Mapping]] = ..., abort: _Optional[_Union[AbortWork, _Mapping]] = ..., peers: _Optional[_Union[PeerUpdate, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ..., generate: _Optional[_Union[GenerateLocally, _Mapping]] = ...) -> None: ...

class SessionHello(_message.Message):
    __slots__ = ("router_id", "protocol_version", "instance_id")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    protocol_version: int
    instance_id: str
    def __init__(self, router_id: _Optional[str] = ..., protocol_version: _Optional[int] = ..., instance_id: _Optional[str] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    def __init__(self, nonce: _Optional[int] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("request_id", "attempt", "prefill_instance", "prompt_ids", "output_so_far", "sampling", "priority", "max_wait_s", "cache_salt", "deadline_s", "lora_id", "traceparent")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PREFILL_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_SO_FAR_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    MAX_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    LORA_ID_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    prefill_instance: str
    prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    output_so_far: _containers.RepeatedScalarFieldContainer[int]
    sampling: ResolvedSampling
    priority: int
    max_wait_s: float
    cache_salt: str
    deadline_s: float
    lora_id: str
    traceparent: str
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., prefill_instance: _Optional[str] = ..., prompt_ids: _Optional[_Iterable[int]] = ..., output_so_far: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[ResolvedSampling, _Mapping]] = ..., priority: _Optional[int] = ..., max_wait_s: _Optional[float] = ..., cache_salt: _Optional[str] = ..., deadline_s: _Optional[float] = ..., lora_id: _Optional[str] = ..., traceparent: _Optional[str] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("request_id", "attempt", "decode_instance", "prompt_ids", "output_so_far", "sampling", "priority", "cache_salt", "deadline_s", "lora_id", "traceparent")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    DECODE_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_SO_FAR_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    LORA_ID_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    decode_instance: str
    prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    output_so_far: _containers.RepeatedScalarFieldContainer[int]
    sampling: ResolvedSampling
    priority: int
    cache_salt: str
    deadline_s: float
    lora_id: str
    traceparent: str
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., decode_instance: _Optional[str] = ..., prompt_ids: _Optional[_Iterable[int]] = ..., output_so_far: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[ResolvedSampling, _Mapping]] = ..., priority: _Optional[int] = ..., cache_salt: _Optional[str] = ..., deadline_s: _Optional[float] = ..., lora_id: _Optional[str] = ..., traceparent: _Optional[str] = ...) -> None: ...

class GenerateLocally(_message.Message):
    __slots__ = ("request_id", "attempt", "prompt_ids", "output_so_far", "sampling", "priority", "cache_salt", "deadline_s", "lora_id", "traceparent")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_SO_FAR_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    LORA_ID_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    output_so_far: _containers.RepeatedScalarFieldContainer[int]
    sampling: ResolvedSampling
    priority: int
    cache_salt: str
    deadline_s: float
    lora_id: str
    traceparent: str
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., prompt_ids: _Optional[_Iterable[int]] = ..., output_so_far: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[ResolvedSampling, _Mapping]] = ..., priority: _Optional[int] = ..., cache_salt: _Optional[str] = ..., deadline_s: _Optional[float] = ..., lora_id: _Optional[str] = ..., traceparent: _Optional[str] = ...) -> None: ...

class TicketForPrefill(_message.Message):
    __slots__ = ("request_id", "attempt", "ticket")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    ticket: _kv_pb2.Ticket
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., ticket: _Optional[_Union[_kv_pb2.Ticket, _Mapping]] = ...) -> None: ...

class AbortWork(_message.Message):
    __slots__ = ("request_id", "attempt", "reason")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    reason: str
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class PeerUpdate(_message.Message):
    __slots__ = ("peers",)
    PEERS_FIELD_NUMBER: _ClassVar[int]
    peers: _containers.RepeatedCompositeFieldContainer[Peer]
    def __init__(self, peers: _Optional[_Iterable[_Union[Peer, _Mapping]]] = ...) -> None: ...

class Peer(_message.Message):
    __slots__ = ("instance_id", "address")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    address: str
    def __init__(self, instance_id: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class WorkerMessage(_message.Message):
    __slots__ = ("hello", "reserved", "step", "failed", "pong", "peer", "goodbye")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    hello: WorkerHello
    reserved: Reserved
    step: StepOutput
    failed: WorkFailed
    pong: Pong
    peer: PeerState
    goodbye: Goodbye
    def __init__(self, hello: _Optional[_Union[WorkerHello, _Mapping]] = ..., reserved: _Optional[_Union[Reserved, _Mapping]] = ..., step: _Optional[_Union[StepOutput, _Mapping]] = ..., failed: _Optional[_Union[WorkFailed, _Mapping]] = ..., pong: _Optional[_Union[Pong, _Mapping]] = ..., peer: _Optional[_Union[PeerState, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerHello(_message.Message):
    __slots__ = ("instance_id", "fingerprint", "status")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    fingerprint: str
    status: WorkerStatus
    def __init__(self, instance_id: _Optional[str] = ..., fingerprint: _Optional[str] = ..., status: _Optional[_Union[WorkerStatus, _Mapping]] = ...) -> None: ...

class Pong(_message.Message):
    __slots__ = ("nonce", "status")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    status: WorkerStatus
    def __init__(self, nonce: _Optional[int] = ..., status: _Optional[_Union[WorkerStatus, _Mapping]] = ...) -> None: ...

class Reserved(_message.Message):
    __slots__ = ("request_id", "attempt", "ticket", "reserve_ms")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    RESERVE_MS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    ticket: _kv_pb2.Ticket
    reserve_ms: float
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., ticket: _Optional[_Union[_kv_pb2.Ticket, _Mapping]] = ..., reserve_ms: _Optional[float] = ...) -> None: ...

class WorkFailed(_message.Message):
    __slots__ = ("request_id", "attempt", "error", "retryable", "between_workers", "turned_away")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    BETWEEN_WORKERS_FIELD_NUMBER: _ClassVar[int]
    TURNED_AWAY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    error: Error
    retryable: bool
    between_workers: bool
    turned_away: bool
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., retryable: _Optional[bool] = ..., between_workers: _Optional[bool] = ..., turned_away: _Optional[bool] = ...) -> None: ...

class PeerState(_message.Message):
    __slots__ = ("instance_id", "connected", "transport", "reason")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    connected: bool
    transport: str
    reason: str
    def __init__(self, instance_id: _Optional[str] = ..., connected: _Optional[bool] = ..., transport: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class StepOutput(_message.Message):
    __slots__ = ("step", "outputs")
    STEP_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    step: int
    outputs: _containers.RepeatedCompositeFieldContainer[RequestOutput]
    def __init__(self, step: _Optional[int] = ..., outputs: _Optional[_Iterable[_Union[RequestOutput, _Mapping]]] = ...) -> None: ...

class RequestOutput(_message.Message):
    __slots__ = ("request_id", "attempt", "tokens", "finish_reason", "stop_token_id", "timing", "prompt_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    tokens: _containers.RepeatedCompositeFieldContainer[_inference_pb2.Token]
    finish_reason: _inference_pb2.FinishReason
    stop_token_id: int
    timing: WorkerTiming
    prompt_tokens: _containers.RepeatedCompositeFieldContainer[_inference_pb2.Token]
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[_inference_pb2.Token, _Mapping]]] = ..., finish_reason: _Optional[_Union[_inference_pb2.FinishReason, str]] = ..., stop_token_id: _Optional[int] = ..., timing: _Optional[_Union[WorkerTiming, _Mapping]] = ..., prompt_tokens: _Optional[_Iterable[_Union[_inference_pb2.Token, _Mapping]]] = ...) -> None: ...

class WorkerTiming(_message.Message):
    __slots__ = ("queue_ms", "prefill_ms", "transfer_tail_ms", "verify_ms", "join_ms", "first_decode_step_ms", "cached_tokens", "kv_bytes", "transport")
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_MS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_TAIL_MS_FIELD_NUMBER: _ClassVar[int]
    VERIFY_MS_FIELD_NUMBER: _ClassVar[int]
    JOIN_MS_FIELD_NUMBER: _ClassVar[int]
    FIRST_DECODE_STEP_MS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    queue_ms: float
    prefill_ms: float
    transfer_tail_ms: float
    verify_ms: float
    join_ms: float
    first_decode_step_ms: float
    cached_tokens: int
    kv_bytes: int
    transport: str
    def __init__(self, queue_ms: _Optional[float] = ..., prefill_ms: _Optional[float] = ..., transfer_tail_ms: _Optional[float] = ..., verify_ms: _Optional[float] = ..., join_ms: _Optional[float] = ..., first_decode_step_ms: _Optional[float] = ..., cached_tokens: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., transport: _Optional[str] = ...) -> None: ...
