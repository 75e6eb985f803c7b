from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TransferFailure(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRANSFER_FAILURE_UNSPECIFIED: _ClassVar[TransferFailure]
    TRANSFER_FAILURE_TRANSPORT: _ClassVar[TransferFailure]
    TRANSFER_FAILURE_EXPIRED: _ClassVar[TransferFailure]
    TRANSFER_FAILURE_ABORTED: _ClassVar[TransferFailure]
    TRANSFER_FAILURE_MISMATCH: _ClassVar[TransferFailure]
    TRANSFER_FAILURE_REFUSED: _ClassVar[TransferFailure]
    TRANSFER_FAILURE_NOT_NEEDED: _ClassVar[TransferFailure]
TRANSFER_FAILURE_UNSPECIFIED: TransferFailure
TRANSFER_FAILURE_TRANSPORT: TransferFailure
TRANSFER_FAILURE_EXPIRED: TransferFailure
TRANSFER_FAILURE_ABORTED: TransferFailure
TRANSFER_FAILURE_MISMATCH: TransferFailure
TRANSFER_FAILURE_REFUSED: TransferFailure
TRANSFER_FAILURE_NOT_NEEDED: TransferFailure

class Ticket(_message.Message):
    __slots__ = ("ticket_id", "instance_id", "epoch", "request_id", "writer_instance", "slots", "lease_s", "decode_prefix_len", "total_tokens", "token_hash", "transport")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    WRITER_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_PREFIX_LEN_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_HASH_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    ticket_id: int
    instance_id: str
    epoch: int
    request_id: str
    writer_instance: str
    slots: _containers.RepeatedScalarFieldContainer[int]
    lease_s: float
    decode_prefix_len: int
    total_tokens: int
    token_hash: bytes
    transport: str
    def __init__(self, ticket_id: _Optional[int] = ..., instance_id: _Optional[str] = ..., epoch: _Optional[int] = ..., request_id: _Optional[str] = ..., writer_instance: _Optional[str] = ..., slots: _Optional[_Iterable[int]] = ..., lease_s: _Optional[float] = ..., decode_prefix_len: _Optional[int] = ..., total_tokens: _Optional[int] = ..., token_hash: _Optional[bytes] = ..., transport: _Optional[str] = ...) -> None: ...

class ConnectInfo(_message.Message):
    __slots__ = ("protocol_version", "instance_id", "fingerprint", "transports", "pid", "pid_namespace", "page_size", "tp_size", "more_pids")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    PID_NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    TP_SIZE_FIELD_NUMBER: _ClassVar[int]
    MORE_PIDS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    instance_id: str
    fingerprint: str
    transports: _containers.RepeatedCompositeFieldContainer[TransportOffer]
    pid: int
    pid_namespace: str
    page_size: int
    tp_size: int
    more_pids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, protocol_version: _Optional[int] = ..., instance_id: _Optional[str] = ..., fingerprint: _Optional[str] = ..., transports: _Optional[_Iterable[_Union[TransportOffer, _Mapping]]] = ..., pid: _Optional[int] = ..., pid_namespace: _Optional[str] = ..., page_size: _Optional[int] = ..., tp_size: _Optional[int] = ..., more_pids: _Optional[_Iterable[int]] = ...) -> None: ...

class TransportOffer(_message.Message):
    __slots__ = ("name", "metadata")
    NAME_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    metadata: bytes
    def __init__(self, name: _Optional[str] = ..., metadata: _Optional[bytes] = ...) -> None: ...

class KvFrame(_message.Message):
    __slots__ = ("hello", "message", "chunk", "heartbeat", "write_ack", "refused", "chosen")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    WRITE_ACK_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    hello: ConnectInfo
    message: bytes
    chunk: PageChunk
    heartbeat: Heartbeat
    write_ack: WriteAck
    refused: SessionRefused
    chosen: TransportChosen
    def __init__(self, hello: _Optional[_Union[ConnectInfo, _Mapping]] = ..., message: _Optional[bytes] = ..., chunk: _Optional[_Union[PageChunk, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., write_ack: _Optional[_Union[WriteAck, _Mapping]] = ..., refused: _Optional[_Union[SessionRefused, _Mapping]] = ..., chosen: _Optional[_Union[TransportChosen, _Mapping]] = ...) -> None: ...

class TransportChosen(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class SessionRefused(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    def __init__(self, nonce: _Optional[int] = ...) -> None: ...

class PageChunk(_message.Message):
    __slots__ = ("write_id", "slot", "offset", "data", "last", "message")
    WRITE_ID_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    write_id: int
    slot: int
    offset: int
    data: bytes
    last: bool
    message: bytes
    def __init__(self, write_id: _Optional[int] = ..., slot: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ..., last: _Optional[bool] = ..., message: _Optional[bytes] = ...) -> None: ...

class WriteAck(_message.Message):
    __slots__ = ("write_id", "error")
    WRITE_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    write_id: int
    error: str
    def __init__(self, write_id: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...

class KvMessage(_message.Message):
    __slots__ = ("ticket_id", "epoch", "request_id", "written", "complete", "failed", "credit", "ack", "window", "window_ready", "probe", "probe_granted")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    WINDOW_READY_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    PROBE_GRANTED_FIELD_NUMBER: _ClassVar[int]
    ticket_id: int
    epoch: int
    request_id: str
    written: PagesWritten
    complete: TransferComplete
    failed: TransferFailed
    credit: Credit
    ack: TransferAck
    window: WindowOpened
    window_ready: WindowReady
    probe: ProbeAsked
    probe_granted: ProbeGranted
    def __init__(self, ticket_id: _Optional[int] = ..., epoch: _Optional[int] = ..., request_id: _Optional[str] = ..., written: _Optional[_Union[PagesWritten, _Mapping]] = ..., complete: _Optional[_Union[TransferComplete, _Mapping]] = ..., failed: _Optional[_Union[TransferFailed, _Mapping]] = ..., credit: _Optional[_Union[Credit, _Mapping]] = ..., ack: _Optional[_Union[TransferAck, _Mapping]] = ..., window: _Optional[_Union[WindowOpened, _Mapping]] = ..., window_ready: _Optional[_Union[WindowReady, _Mapping]] = ..., probe: _Optional[_Union[ProbeAsked, _Mapping]] = ..., probe_granted: _Optional[_Union[ProbeGranted, _Mapping]] = ...) -> None: ...

class ProbeAsked(_message.Message):
    __slots__ = ("pages",)
    PAGES_FIELD_NUMBER: _ClassVar[int]
    pages: int
    def __init__(self, pages: _Optional[int] = ...) -> None: ...

class ProbeGranted(_message.Message):
    __slots__ = ("ticket", "refused", "device", "host", "facts")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    ticket: Ticket
    refused: str
    device: str
    host: str
    facts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ticket: _Optional[_Union[Ticket, _Mapping]] = ..., refused: _Optional[str] = ..., device: _Optional[str] = ..., host: _Optional[str] = ..., facts: _Optional[_Iterable[str]] = ...) -> None: ...

class PagesWritten(_message.Message):
    __slots__ = ("slots", "positions", "valid_tokens", "seals", "chain_hashes", "pages_written", "complete", "coming")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    VALID_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEALS_FIELD_NUMBER: _ClassVar[int]
    CHAIN_HASHES_FIELD_NUMBER: _ClassVar[int]
    PAGES_WRITTEN_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    COMING_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedScalarFieldContainer[int]
    positions: _containers.RepeatedScalarFieldContainer[int]
    valid_tokens: _containers.RepeatedScalarFieldContainer[int]
    seals: bytes
    chain_hashes: bytes
    pages_written: int
    complete: TransferComplete
    coming: bool
    def __init__(self, slots: _Optional[_Iterable[int]] = ..., positions: _Optional[_Iterable[int]] = ..., valid_tokens: _Optional[_Iterable[int]] = ..., seals: _Optional[bytes] = ..., chain_hashes: _Optional[bytes] = ..., pages_written: _Optional[int] = ..., complete: _Optional[_Union[TransferComplete, _Mapping]] = ..., coming: _Optional[bool] = ...) -> None: ...

class TransferComplete(_message.Message):
    __slots__ = ("total_pages", "first_token", "total_bytes")
    TOTAL_PAGES_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    total_pages: int
    first_token: int
    total_bytes: int
    def __init__(self, total_pages: _Optional[int] = ..., first_token: _Optional[int] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class TransferFailed(_message.Message):
    __slots__ = ("failure", "detail", "quiesced", "from_writer")
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    QUIESCED_FIELD_NUMBER: _ClassVar[int]
    FROM_WRITER_FIELD_NUMBER: _ClassVar[int]
    failure: TransferFailure
    detail: str
    quiesced: bool
    from_writer: bool
    def __init__(self, failure: _Optional[_Union[TransferFailure, str]] = ..., detail: _Optional[str] = ..., quiesced: _Optional[bool] = ..., from_writer: _Optional[bool] = ...) -> None: ...

class Credit(_message.Message):
    __slots__ = ("slots", "total")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedScalarFieldContainer[int]
    total: int
    def __init__(self, slots: _Optional[_Iterable[int]] = ..., total: _Optional[int] = ...) -> None: ...

class WindowOpened(_message.Message):
    __slots__ = ("first_slot", "offer")
    FIRST_SLOT_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    first_slot: int
    offer: bytes
    def __init__(self, first_slot: _Optional[int] = ..., offer: _Optional[bytes] = ...) -> None: ...

class WindowReady(_message.Message):
    __slots__ = ("first_slot",)
    FIRST_SLOT_FIELD_NUMBER: _ClassVar[int]
    first_slot: int
    def __init__(self, first_slot: _Optional[int] = ...) -> None: ...

class TransferAck(_message.Message):
    __slots__ = ("pages",)
    PAGES_FIELD_NUMBER: _ClassVar[int]
    pages: int
    def __init__(self, pages: _Optional[int] = ...) -> None: ...
