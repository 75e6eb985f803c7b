"""Frames of a KV session on the wire: `KvFrame`s, whose page bytes go around protobuf.

Its messages would copy them three times on either side, which was half of what gRPC cost both ends
(6.8 CPU seconds a GB, without 3.3; in one run beside other work).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from protos.baton.v1 import kv_pb2

_CHUNK = kv_pb2.KvFrame.DESCRIPTOR.fields_by_name["chunk"].number << 3 | 2
_DATA = kv_pb2.PageChunk.DESCRIPTOR.fields_by_name["data"].number << 3 | 2
"""Tags of the two fields, which fit a byte each; 2: their length follows."""

_MOST_FIELDS = 16
"""More than a chunk has. A head of more is left to protobuf, which reads it in C: here it would
hold up everybody else's messages."""

_SERVICE = kv_pb2.DESCRIPTOR.services_by_name["Kv"]
_METHOD = _SERVICE.methods_by_name["Session"].name


@dataclass(frozen=True, slots=True)
class ChunkFrame:
    """A `KvFrame` that holds a chunk."""

    chunk: kv_pb2.PageChunk
    """Without its data."""

    data: memoryview
    """Read when the frame is sent."""


Frame = kv_pb2.KvFrame | ChunkFrame


def to_wire(frame: Frame) -> bytes:
    """One copy of the data."""
    if isinstance(frame, kv_pb2.KvFrame):
        return frame.SerializeToString()
    head = frame.chunk.SerializeToString()
    size = _varint(len(frame.data))
    whole = len(head) + 1 + len(size) + len(frame.data)
    return b"".join(
        (bytes((_CHUNK,)), _varint(whole), head, bytes((_DATA,)), size, frame.data),
    )


def from_wire(wire: bytes) -> Frame:
    """No copy of the data. Raises protobuf's DecodeError for what is no frame."""
    found = _data_of(wire)
    if found is not None:
        head, data = found
        return ChunkFrame(kv_pb2.PageChunk.FromString(head), data)
    frame = kv_pb2.KvFrame.FromString(wire)
    if frame.WhichOneof("kind") != "chunk":
        return frame
    data = memoryview(frame.chunk.data)
    return ChunkFrame(frame.chunk, data)


def without_data(frame: Frame) -> kv_pb2.KvFrame:
    """For who has no use for chunks."""
    return kv_pb2.KvFrame(chunk=frame.chunk) if isinstance(frame, ChunkFrame) else frame


def _data_of(wire: bytes) -> tuple[bytes, memoryview] | None:
    """(the chunk without its data, the data) of a frame as `to_wire` lays it out: the chunk is all
    of it, and the data its end. None for any other."""
    if not wire or wire[0] != _CHUNK:
        return None
    size, start = _read_varint(wire, 1)
    if start + size != len(wire):
        return None
    place = start
    for _ in range(_MOST_FIELDS):
        if place >= len(wire):
            break
        tag = wire[place]
        if tag == _DATA:
            length, begin = _read_varint(wire, place + 1)
            if begin + length != len(wire):
                return None
            return wire[start:place], memoryview(wire)[begin:]
        length, end = _read_varint(wire, place + 1)
        if tag & 7 == 2:
            end += length
        elif tag & 7 or tag > 0x7F:  # no number, or a field that this version does not know
            return None
        place = end
    return None


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _read_varint(wire: bytes, place: int) -> tuple[int, int]:
    """(the number there, where it ends); a number that never ends, or is cut off, leads beyond the
    end of any frame."""
    number = shift = 0
    for index in range(place, min(place + 10, len(wire))):
        number |= (wire[index] & 0x7F) << shift
        if wire[index] < 0x80:
            return number, index + 1
        shift += 7
    return 0, len(wire) + 1


def session_call(channel: grpc.aio.Channel) -> Any:
    """`KvStub.Session` with these frames."""
    call: Any = channel.stream_stream(
        f"/{_SERVICE.full_name}/{_METHOD}",
        request_serializer=to_wire,
        response_deserializer=from_wire,
    )
    return call()


def add_session_to_server(session: Callable[..., Any], server: grpc.aio.Server) -> None:
    """`add_KvServicer_to_server` with these frames."""
    handler = grpc.stream_stream_rpc_method_handler(
        session, request_deserializer=from_wire, response_serializer=to_wire
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(_SERVICE.full_name, {_METHOD: handler}),)
    )
