"""Identifiers that must not be mixed up."""

from typing import NewType

RequestId = NewType("RequestId", str)
"""Unique among the live requests of one engine."""

PageIndex = NewType("PageIndex", int)
"""Index into the KV pool, 0 <= index < number of pages."""

TokenId = NewType("TokenId", int)
"""Index into the model's vocabulary."""
