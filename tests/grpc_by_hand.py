"""What a gRPC client puts on the wire, for clients that no library would be."""


def grpc_call(path: bytes, *, message_bytes: int) -> bytes:
    """How a gRPC client begins a call, up to the first byte of its message."""

    def frame(kind: int, stream: int, payload: bytes, *, flags: int = 0, length: int = 0) -> bytes:
        size = (length or len(payload)).to_bytes(3, "big")
        return size + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload

    named = [(b":path", path), (b":authority", b"x"), (b"te", b"trailers")]
    named += [(b"content-type", b"application/grpc")]
    fields = b"".join(b"\0%c%b%c%b" % (len(n), n, len(v), v) for n, v in named)
    prefix = b"\0" + message_bytes.to_bytes(4, "big")
    return (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + frame(4, 0, b"")
        + frame(1, 1, b"\x83\x86" + fields, flags=4)  # POST, http
        + frame(0, 1, prefix, length=len(prefix) + message_bytes)
    )
