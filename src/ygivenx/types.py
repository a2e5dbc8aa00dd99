"""What is asked of a tokenizer: a protocol, so that an editor knows it without transformers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol


class Tokenizer(Protocol):
    """A fast tokenizer of transformers; `backend_tokenizer` is the one of the tokenizers library inside."""

    @property
    def backend_tokenizer(self) -> Any: ...
    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def pad_token_id(self) -> int | None: ...
    def decode(self, token_ids: Iterable[int]) -> str: ...
