"""What can go wrong inside an engine.

Each class carries the `code` under which the services report it (protos/errors.py holds the one
mapping to gRPC and HTTP); the engine itself knows neither.
"""

from typing import ClassVar


class EngineError(Exception):
    """Base of all errors that an engine raises on purpose."""

    code: ClassVar[str] = "INTERNAL"


class InvalidRequestError(EngineError):
    """The request can never be served as it stands: the client must change it."""

    code = "INVALID_ARGUMENT"


class DuplicateRequestError(EngineError):
    """A live request has this id already."""

    code = "ALREADY_EXISTS"


class QueueFullError(EngineError):
    """The waiting queue is at its bound: try again later or elsewhere."""

    code = "RESOURCE_EXHAUSTED"


class DeadlineExceededError(EngineError):
    """The request's deadline has passed while it waited: nobody waits for the answer any more."""

    code = "DEADLINE_EXCEEDED"


class UnknownAdapterError(EngineError):
    """The request names a LoRA adapter that this engine does not have."""

    code = "NOT_FOUND"


class OutOfMemoryError(EngineError):
    """KV pages or request rows ran out. The message names what was asked, free and evictable."""

    code = "RESOURCE_EXHAUSTED"


class StepMemoryError(EngineError):
    """A step's activations did not fit into the device's memory, also cut small. The requests of
    that step end with this; the engine serves on."""

    code = "RESOURCE_EXHAUSTED"


class UnsupportedModelError(EngineError):
    """The checkpoint asks for something that is not computed here; refused by name."""

    code = "FAILED_PRECONDITION"


class InvalidModelError(EngineError):
    """The model directory is broken: a file is missing, or a tensor has the wrong shape."""

    code = "FAILED_PRECONDITION"


class GrammarsUnavailableError(EngineError):
    """This engine cannot constrain outputs: the model has no usable tokenizer beside it."""

    code = "FAILED_PRECONDITION"


class GrammarMismatchError(EngineError):
    """Tokens of the output so far do not belong to the request's grammar: whoever drew them had
    another tokenizer or another grammar library."""

    code = "INTERNAL"


class ConfigError(EngineError):
    """Settings that contradict each other or the machine."""

    code = "FAILED_PRECONDITION"
