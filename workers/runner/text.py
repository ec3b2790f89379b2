"""Text in, text out: the tokenizer of the start node's shard, its chat template, and text as tokens arrive."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from planner.errors import InvalidInput

#: What a byte that is no whole character yet is decoded to.
_PART = "\ufffd"


class Text:
    """What turns text into token ids, and back."""

    def __init__(self, folder: Path) -> None:
        """Load the tokenizer in `folder`; nothing is downloaded and no code of it is run."""
        from transformers import AutoTokenizer

        #: Tokens that the model's positions reach; None: it does not say.
        self.context = _context(folder)
        self._why = ""
        self.tokenizer: Any = None
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)  # nosec B615
        except Exception as error:  # noqa: BLE001  (its libraries raise whatever; a model without one is run by ids)
            self._why = f"{type(error).__name__}: {error}"[:300]

    def _there(self) -> Any:
        if self.tokenizer is None:
            raise InvalidInput(
                f"this model's tokenizer cannot be loaded, so it takes token_ids only ({self._why})",
                details={"reason": self._why},
            )
        return self.tokenizer

    def of_prompt(self, prompts: Sequence[str]) -> list[list[int]]:
        """The ids of each prompt.

        Raises:
            InvalidInput: If there is no tokenizer.
        """
        try:
            return [list(self._there()(prompt)["input_ids"]) for prompt in prompts]
        except (UnicodeError, TypeError) as error:
            raise InvalidInput(f"the prompt is no text: {error!s:.200}") from None

    def of_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The ids of a conversation, by the tokenizer's own chat template.

        Raises:
            InvalidInput: If it has none, or the template refuses the conversation.
        """
        tokenizer = self._there()
        if not getattr(tokenizer, "chat_template", None):
            raise InvalidInput("this model's tokenizer has no chat template; send a prompt instead of messages")
        try:
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:
            raise InvalidInput(f"the model's chat template refuses these messages: {error!s:.300}") from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def of_ids(self, ids: Sequence[int]) -> str:
        """The text of whole token ids; "" where there is no tokenizer."""
        return "" if self.tokenizer is None else str(self.tokenizer.decode(ids, skip_special_tokens=True))


def _context(folder: Path) -> int | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    parts = (config, config.get("text_config") or {})
    found = [part.get(name) for part in parts for name in ("max_position_embeddings", "n_positions")]
    if "relative_attention_num_buckets" in config:  # T5's positions reach any distance, whatever it says beside
        return None
    return next((int(size) for size in found if type(size) is int and size > 0), None)


class Stream:
    """The text of one sequence, piece by piece, up to the first of `stops`."""

    def __init__(self, text: Text, stops: Sequence[str]) -> None:
        self._text, self._stops = text, [stop for stop in stops if stop]
        self._ids: list[int] = []
        #: Ids before this one are said and no longer looked at; those from here on give the text around the new.
        self._from, self._read = 0, 0
        #: What may be the beginning of a stop is held back.
        self._held = ""
        self.stopped = False
        self.whole = ""

    def add(self, token_id: int) -> str:
        """The text that one more token adds; "" while a character is not whole."""
        if self.stopped:
            return ""
        self._ids.append(token_id)
        # A token's text depends on those before it (spaces): the difference of two decodings is what it adds.
        before = self._text.of_ids(self._ids[self._from : self._read])
        now = self._text.of_ids(self._ids[self._from :])
        if now.endswith(_PART) or len(now) <= len(before):
            return ""
        self._from, self._read = self._read, len(self._ids)
        return self._let_out(now[len(before) :])

    def end(self) -> str:
        """What was held back until the end."""
        rest = "" if self.stopped else self._text.of_ids(self._ids[self._from :])
        before = self._text.of_ids(self._ids[self._from : self._read])
        out = "" if self.stopped else self._held + rest[len(before) :]
        self._held = ""
        self.whole += out
        return out

    def _let_out(self, new: str) -> str:
        held = self._held + new
        cut = min((at for stop in self._stops if (at := held.find(stop)) >= 0), default=None)
        if cut is not None:
            self.stopped, self._held = True, ""
            self.whole += held[:cut]
            return held[:cut]
        keep = max((n for stop in self._stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        out, self._held = held[: len(held) - keep], held[len(held) - keep :]
        self.whole += out
        return out
