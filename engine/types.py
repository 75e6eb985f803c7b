"""Identifiers that must not be mixed up, and names that several layers know."""

from typing import Literal, NewType

RequestId = NewType("RequestId", str)
"""Unique among the live requests of one engine."""

PageIndex = NewType("PageIndex", int)
"""Index into the KV pool, 0 <= index < number of pages."""

TokenId = NewType("TokenId", int)
"""Index into the model's vocabulary."""

RadixEvictionPolicy = Literal["lru", "lfu"]
"""What cached KV goes first when memory is short: the least recently, or the least often used."""

HostWritePolicy = Literal["write_through", "write_back"]
"""A cached prefix is copied to host memory when it enters the cache, or when it is evicted."""

KvCacheDtype = Literal["auto", "fp8_e4m3"]
"""What KV is stored as: as the model computes, or as 8-bit floating-point numbers."""
