"""Token counts, as the answers of LLM services state them: from parsed JSON to input, output and cached tokens.

Only the top level of a message is read, and the one place in it that belongs to the service. The caller shapes what is
deeper, such as the arguments of a tool call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from ...checks import MAX_INTEGER

# A tuple and not a set, because a service may send a list for a type, and a list cannot be hashed.
_RESPONSE_ENDS: Final = ("response.completed", "response.incomplete", "response.failed")


class TokenCounts(NamedTuple):
    """The tokens that one answer used. ``cached`` tokens are part of ``input``."""

    input: int
    output: int
    cached: int


class Figures:
    """The figures that the messages of one answer have stated so far.

    A *message* is the body of an answer, or the data of one event of a stream, as ``json.loads`` returns it.
    """

    __slots__ = ("_started", "complete", "counts", "extra_events", "failed", "final", "model")

    def __init__(self) -> None:
        #: The counts that were stated last, or ``None``: nothing was stated, or the stated values are not counts.
        self.counts: TokenCounts | None = None
        #: The model that the service states it used.
        self.model: str | None = None
        #: Whether the counts are those of the whole answer, even before its end has been seen.
        self.final = False
        #: Whether the stream has announced its end.
        self.complete = False
        #: Whether the service has reported that it failed.
        self.failed = False
        #: How many events held the usage and no choices, as OpenAI sends them to a client that asked for the usage.
        self.extra_events = 0
        self._started: dict[str, Any] = {}  # the usage of Anthropic's message_start and what message_delta changed

    def take_event(self, message: object) -> None:
        """Read the data of one event."""
        if not isinstance(message, dict):
            return
        kind = message.get("type")
        if kind == "message_start":
            self._take_usage(message.get("message"))
        elif kind == "message_delta":
            # Cumulative figures, field by field. A field that is absent or null keeps its value from message_start.
            usage = _object(message.get("usage"))
            self._started.update({name: value for name, value in usage.items() if value is not None})
            self._count(self._started)
            self.final = bool(_object(message.get("delta")).get("stop_reason"))
        elif kind == "message_stop":
            self.complete = True
        elif kind in _RESPONSE_ENDS:
            self._take_usage(message.get("response"))
            self.failed = kind == "response.failed"
            self.complete = True
        elif kind == "error" or message.get("error"):
            self.failed = self.complete = True
        elif self._take_usage(message):
            self.final = _has_finished(message)
            if message.get("choices") == []:
                self.extra_events += 1

    def take_body(self, message: object) -> None:
        """Read a whole body."""
        # Without alt=sse, Gemini streams one JSON array.
        for part in message if isinstance(message, list) else (message,):
            self._take_usage(part)
            if self.counts is None and isinstance(part, dict) and part.get("error"):
                self.failed = True

    def _take_usage(self, message: object) -> bool:
        """Read the usage at the top of ``message``, and return whether there is one."""
        message = _object(message)
        model = message.get("model") or message.get("modelVersion")
        if isinstance(model, str):
            self.model = model
        usage = message.get("usage") or message.get("usageMetadata")
        if not isinstance(usage, dict):
            return False
        self._started = dict(usage)
        return self._count(usage)

    def _count(self, usage: Mapping[str, Any]) -> bool:
        try:
            counts = _counted(usage)
        except ValueError:
            self.counts = None
            return True
        if counts is not None:
            self.counts = counts
        return counts is not None


def _counted(usage: Mapping[str, Any]) -> TokenCounts | None:
    """Return the counts that ``usage`` states, or ``None`` if it states none.

    :raises ValueError: a figure is not a count.
    """
    if "prompt_tokens" in usage or "completion_tokens" in usage:
        # OpenAI: chat, completions, embeddings. The cached tokens are among the prompt's.
        counts = TokenCounts(
            _count(usage, "prompt_tokens"),
            _count(usage, "completion_tokens"),
            _count(_object(usage.get("prompt_tokens_details")), "cached_tokens"),
        )
    elif "input_tokens" in usage or "output_tokens" in usage:
        # OpenAI's responses count cached tokens among the input's. Anthropic counts them, and those that it wrote to
        # its cache, beside input_tokens.
        read = _count(usage, "cache_read_input_tokens")
        counts = TokenCounts(
            _count(usage, "input_tokens") + _count(usage, "cache_creation_input_tokens") + read,
            _count(usage, "output_tokens"),
            read + _count(_object(usage.get("input_tokens_details")), "cached_tokens"),
        )
    elif "promptTokenCount" in usage or "candidatesTokenCount" in usage:
        # Gemini. The cached tokens are among the prompt's; thinking is billed as output.
        counts = TokenCounts(
            _count(usage, "promptTokenCount") + _count(usage, "toolUsePromptTokenCount"),
            _count(usage, "candidatesTokenCount") + _count(usage, "thoughtsTokenCount"),
            _count(usage, "cachedContentTokenCount"),
        )
    else:
        return None
    if counts.cached > counts.input:
        raise ValueError("more tokens are cached than there are")
    return counts


def _count(figures: Mapping[str, Any], name: str) -> int:
    value = figures.get(name)
    if value is None:
        return 0
    # A bool is an int too, but not a count. Nor is a float, which may be NaN.
    if type(value) is not int or not 0 <= value <= MAX_INTEGER:
        raise ValueError(f"{name} is not a count")
    return value


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _has_finished(message: Mapping[str, Any]) -> bool:
    """Return whether every choice in an event of OpenAI or Gemini has a finish reason.

    OpenAI's event with the usage has no choices.
    """
    choices = message.get("choices", message.get("candidates"))
    return isinstance(choices, list) and all(
        isinstance(choice, dict) and (choice.get("finish_reason") or choice.get("finishReason")) for choice in choices
    )
