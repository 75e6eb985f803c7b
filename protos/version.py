"""What two processes must agree on before they talk."""

PROTOCOL_VERSION = 5
"""Raised by every change of protos/baton/v1 that an older peer would misread."""
