"""Frames that go around protobuf are the frames that protobuf makes and reads."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.kv_frames import ChunkFrame, _data_of, _varint, from_wire, to_wire, without_data
from protos.baton.v1 import kv_pb2

numbers = st.sampled_from([0, 1, 127, 128, 2**32, 2**64 - 1])


@st.composite
def chunks(draw: st.DrawFn) -> kv_pb2.PageChunk:
    size = draw(st.sampled_from([0, 1, 127, 128, 300, 70_000]))
    return kv_pb2.PageChunk(
        write_id=draw(numbers),
        slot=draw(numbers),
        offset=draw(numbers),
        data=(bytes(range(256)) * 300)[:size],
        last=draw(st.booleans()),
        message=draw(st.binary(max_size=200)),
    )


def frame_of(chunk: kv_pb2.PageChunk) -> ChunkFrame:
    head = kv_pb2.PageChunk.FromString(chunk.SerializeToString())
    head.ClearField("data")
    return ChunkFrame(head, memoryview(chunk.data))


@given(chunks())
def test_protobuf_reads_what_is_written(chunk: kv_pb2.PageChunk) -> None:
    assert kv_pb2.KvFrame.FromString(to_wire(frame_of(chunk))).chunk == chunk


@given(chunks())
def test_what_is_written_is_read(chunk: kv_pb2.PageChunk) -> None:
    found = from_wire(to_wire(frame_of(chunk)))
    assert isinstance(found, ChunkFrame)
    assert found == frame_of(chunk)


@given(chunks())
def test_what_protobuf_writes_is_read(chunk: kv_pb2.PageChunk) -> None:
    found = from_wire(kv_pb2.KvFrame(chunk=chunk).SerializeToString())
    assert isinstance(found, ChunkFrame)
    assert (bytes(found.data), found.chunk.message) == (chunk.data, chunk.message)
    assert (found.chunk.write_id, found.chunk.slot) == (chunk.write_id, chunk.slot)


@given(chunks(), st.data())
def test_what_was_cut_off_is_no_frame(chunk: kv_pb2.PageChunk, drawn: st.DataObject) -> None:
    wire = to_wire(frame_of(chunk))
    cut = wire[: drawn.draw(st.integers(1, len(wire) - 1))]
    with pytest.raises(DecodeError):
        from_wire(cut)


@given(st.binary(max_size=60))
def test_garbage_is_read_as_protobuf_reads_it(wire: bytes) -> None:
    try:
        wanted = kv_pb2.KvFrame.FromString(wire)
    except DecodeError:
        with pytest.raises(DecodeError):
            from_wire(wire)
        return
    found = from_wire(wire)
    if isinstance(found, ChunkFrame):
        assert bytes(found.data) == wanted.chunk.data
        assert found.chunk.slot == wanted.chunk.slot
    else:
        assert found == wanted


def test_a_head_of_very_many_fields_is_left_to_protobuf() -> None:
    """Walked here it would hold up everybody else's messages for seconds."""
    field = kv_pb2.PageChunk(write_id=7).SerializeToString()
    chunk = field * 100_000 + kv_pb2.PageChunk(data=b"page").SerializeToString()
    head = kv_pb2.KvFrame(chunk=kv_pb2.PageChunk()).SerializeToString()[:1]
    wire = head + _varint(len(chunk)) + chunk
    assert _data_of(wire) is None
    found = from_wire(wire)
    assert isinstance(found, ChunkFrame)
    assert (found.chunk.write_id, bytes(found.data)) == (7, b"page")


def test_other_frames_are_as_they_were() -> None:
    frame = kv_pb2.KvFrame(message=b"hello")
    assert from_wire(to_wire(frame)) == frame
    assert without_data(frame) is frame
