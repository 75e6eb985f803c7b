"""W3C trace context: the header `traceparent`, and what it says.

A header that is not well formed is as good as none: whoever sends nonsense gets no error for it.
"""

import re

HEADER = "traceparent"
"""Name of the HTTP header and of the gRPC metadata key."""

_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


def checked(header: str) -> str:
    """The header, or nothing where it does not say what it should."""
    match = _FORM.fullmatch(header.strip())
    if match is None:
        return ""
    version, trace, span, _, more = match.groups()
    if version == "ff" or not trace.strip("0") or not span.strip("0"):
        return ""
    # What a later version appends is its own affair; version 00 has four parts and no more.
    return "" if more and version == "00" else match.group(0)


def trace_id(header: str) -> str:
    """Of a checked header; empty for none."""
    return header.split("-")[1] if header else ""
