"""What POST /v1/chat/completions takes."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, WithJsonSchema

from router.chat_template import RESERVED_VARIABLES
from router.http.completion_request import MAX_LOGPROBS
from router.http.fields import (
    AsSent,
    GenerationFields,
    Only,
    Strict,
    flag,
    invalid,
    number,
    read_fields,
    refuse,
)
from router.http.messages import MESSAGE_TAGS, ChatMessage
from router.request import RequestSpec

TOOL_CHOICES = ("none", "auto")


class FunctionDefinition(Strict):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="A JSON schema.")
    strict: Annotated[Any, Only(False)] = Field(
        default=None, description="Not supported: calls are not held to the schema."
    )


class Tool(AsSent):
    """A tool, as the template shows it to the model."""

    type: Literal["function"]
    function: FunctionDefinition


def _tool_choice(value: Any) -> Any:
    if value is not None and value not in TOOL_CHOICES:
        refuse("other than none and auto is not supported")
    return value


def _variables(value: dict[str, Any] | None) -> dict[str, Any] | None:
    for name in value or {}:
        if name in RESERVED_VARIABLES:
            refuse(f"must not set {name}, which the request says itself")
    return value


Tools = Annotated[list[Tool], Field(max_length=1024)]
TemplateVariables = Annotated[dict[str, Any] | None, AfterValidator(_variables)]


class TemplateFields(Strict):
    """What makes a prompt out of messages."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: Tools | None = Field(default=None, description="Shown by the model's own template.")
    add_generation_prompt: bool | None = flag(
        "End the prompt with the header of the assistant's message. Absent: true, unless "
        "continue_final_message is."
    )
    continue_final_message: bool | None = flag("The model continues the last message.")
    chat_template_kwargs: TemplateVariables = Field(
        default=None, description="Variables that the model's template knows."
    )

    def generation_prompt(self) -> bool:
        """Whether the prompt ends with the assistant's header.

        Raises:
            BatonError: INVALID_ARGUMENT; it also ends inside the last message.
        """
        if not self.continue_final_message:
            return self.add_generation_prompt is not False
        if self.add_generation_prompt:
            raise invalid(
                "add_generation_prompt and continue_final_message exclude each other",
                "add_generation_prompt",
            )
        return False


class ChatRequest(TemplateFields, GenerationFields):
    """A request for the assistant's next message."""

    max_completion_tokens: int | None = number(low=1, description="Absent: what fits.")
    max_tokens: int | None = number(
        low=1, description="The older name of max_completion_tokens; both must agree."
    )
    logprobs: bool | None = flag("Tell the log probability of each token.")
    top_logprobs: int | None = number(
        low=0, high=MAX_LOGPROBS, description="Most likely tokens told beside each; needs logprobs."
    )
    tool_choice: Annotated[
        Any, AfterValidator(_tool_choice), WithJsonSchema({"enum": [*TOOL_CHOICES, None]})
    ] = Field(default=None, description="With none, the template is not shown the tools.")
    parallel_tool_calls: bool | None = flag("No effect: the model's text is not parsed.")
    modalities: Annotated[Any, Only(["text"])] = None
    audio: Annotated[Any, Only()] = None
    prediction: Annotated[Any, Only()] = None
    reasoning_effort: Annotated[Any, Only()] = Field(
        default=None, description="Not supported: see chat_template_kwargs."
    )
    verbosity: Annotated[Any, Only()] = None
    web_search_options: Annotated[Any, Only()] = None
    functions: Annotated[Any, Only()] = Field(default=None, description="Not supported: see tools.")
    function_call: Annotated[Any, Only()] = None
    store: Annotated[Any, Only(False)] = Field(default=None, description="Nothing is stored.")
    metadata: Annotated[Any, Only({})] = None
    service_tier: Annotated[Any, Only("auto", "default")] = None
    prompt_cache_key: str | None = Field(
        default=None, description="No effect: prefixes are found by their tokens."
    )
    safety_identifier: str | None = Field(
        default=None, description="Logged at level debug, in the place of user."
    )

    @property
    def shown_tools(self) -> list[Tool] | None:
        return None if self.tool_choice == "none" else self.tools

    def spec_for(self, prompt_ids: list[int]) -> RequestSpec:
        """The request for one choice.

        Raises:
            BatonError: INVALID_ARGUMENT; fields that contradict one another.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs is only allowed with logprobs: true", "top_logprobs")
        limits = {self.max_completion_tokens, self.max_tokens} - {None}
        if len(limits) > 1:
            raise invalid(
                f"max_tokens {self.max_tokens} and max_completion_tokens "
                f"{self.max_completion_tokens} differ: send one of them",
                "max_tokens",
            )
        if self.tool_choice == "auto" and not self.tools:
            raise invalid("tool_choice is only allowed when tools are specified", "tool_choice")
        return self.spec(
            prompt=prompt_ids,
            max_tokens=limits.pop() if limits else None,
            logprobs=self.logprobs,
            top_logprobs=self.top_logprobs,
        )


def parse(body: dict[str, Any]) -> ChatRequest:
    """Raises BatonError (INVALID_ARGUMENT) naming the field at fault."""
    return read_fields(ChatRequest, body, tags=MESSAGE_TAGS)
