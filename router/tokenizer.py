"""The model's tokenizer, from its own tokenizer.json; the one door to the `tokenizers` package."""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from protos.errors import BatonError, ErrorCode
from router.chat_template import ChatTemplates
from router.detokenizer import IncrementalDetokenizer
from router.token_bytes import TokenBytes

logger = logging.getLogger(__name__)

LONG_TEXT_CHARACTERS = 2048
"""Longer texts are encoded in a thread: some 1 ms each, for which no stream should wait."""


class TextCodec:
    """Text to token ids and back. Safe to share among requests."""

    def __init__(self, tokenizer: Tokenizer, *, chat: ChatTemplates | None = None) -> None:
        # Both are settings of a training run; here they would cut or grow a prompt quietly.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.chat = chat or ChatTemplates()
        """The model's own chat templates; there may be none."""
        self._tokenizer = tokenizer
        self._bytes = TokenBytes(tokenizer)
        self._special_ids = frozenset(
            token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        )

    @classmethod
    def load(cls, path: Path) -> "TextCodec":
        """From a directory with tokenizer.json, or that file; chat templates from beside it.

        Raises:
            BatonError: FAILED_PRECONDITION; it is missing or broken.
        """
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise BatonError(ErrorCode.FAILED_PRECONDITION, f"there is no tokenizer at {file}")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises bare Exception
            raise BatonError(
                ErrorCode.FAILED_PRECONDITION, f"{file} is no usable tokenizer: {error}"
            ) from error
        return cls(tokenizer, chat=ChatTemplates.load(file.parent))

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids, with the special tokens that the model's post-processor adds.

        Raises:
            BatonError: INVALID_ARGUMENT; the text is not valid Unicode (a lone surrogate).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BatonError(
                ErrorCode.INVALID_ARGUMENT,
                f"prompt is not valid Unicode: {error.reason} at character {error.start}",
                param="prompt",
            ) from error
        if len(text) > LONG_TEXT_CHARACTERS:
            return await asyncio.to_thread(self._encode, text, add_special_tokens)
        return self._encode(text, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    async def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of these tokens; ids that the tokenizer does not know have none."""
        if len(ids) > LONG_TEXT_CHARACTERS:
            return await asyncio.to_thread(self._decode, ids, skip_special_tokens)
        return self._decode(ids, skip_special_tokens)

    def _decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    async def pieces(self, ids: Sequence[int], *, skip_special_tokens: bool) -> list[str]:
        """The text of these tokens, as each adds to it; never half a character."""
        if len(ids) > LONG_TEXT_CHARACTERS:
            return await asyncio.to_thread(self._pieces, ids, skip_special_tokens)
        return self._pieces(ids, skip_special_tokens)

    def _pieces(self, ids: Sequence[int], skip_special_tokens: bool) -> list[str]:
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        pieces = [detokenizer.push(token_id) for token_id in ids]
        if pieces:
            pieces[-1] += detokenizer.flush()
        return pieces

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds inside a text; perhaps a part of a character."""
        return self._bytes.of(token_id)

    def detokenizer(
        self, *, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> IncrementalDetokenizer:
        """A fresh one for one output.

        Args:
            prompt_ids: tokens that the output follows.
            skip_special_tokens: whether special tokens have no text.
        """
        return IncrementalDetokenizer(
            self._tokenizer,
            special_ids=self._special_ids if skip_special_tokens else frozenset(),
            prompt_ids=prompt_ids,
        )


class TokenizerSource:
    """Finds the tokenizer once: where the operator said, else beside the workers' model."""

    def __init__(self, configured: str) -> None:
        self._configured = configured
        self._loading: dict[str, asyncio.Task[TextCodec]] = {}

    async def get(self, model_path: str) -> TextCodec:
        """The codec for the model; loaded at the first call, in a thread.

        Raises:
            BatonError: FAILED_PRECONDITION; this router has no such tokenizer.
        """
        path = self._configured or model_path
        if not path:
            raise BatonError(ErrorCode.FAILED_PRECONDITION, "no tokenizer was named")
        task = self._loading.get(path)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.create_task(asyncio.to_thread(TextCodec.load, Path(path)))
            self._loading[path] = task
        # Shielded, so that a client that leaves does not end it for the others.
        return await asyncio.shield(task)

    async def find(self, model_path: str) -> TextCodec | None:
        """The codec, or None where there is none: then only token ids can be served."""
        try:
            return await self.get(model_path)
        except BatonError as error:
            logger.debug("serving token ids only: %s", error.message)
            return None

    async def close(self) -> None:
        await asyncio.gather(*self._loading.values(), return_exceptions=True)
