"""Answers of LLM services with their token counts, as their documentation shows them."""

from __future__ import annotations

import json


def compact(value) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def event(value, kind: str | None = None, newline: bytes = b"\n") -> bytes:
    data = value if isinstance(value, bytes) else compact(value)
    head = b"" if kind is None else b"event: " + kind.encode() + newline
    return head + b"data: " + data + newline * 2


DONE = event(b"[DONE]")


def chat_chunk(text=None, *, finish=None, **more):
    """Return the data of one event of an OpenAI chat completion."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "model": "gpt-4o-2024-08-06",
        "choices": [{"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": finish}],
        **more,
    }


OPENAI_USAGE = {
    "prompt_tokens": 19,
    "completion_tokens": 10,
    "total_tokens": 29,
    "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": 0},
}
USAGE_CHUNK = {**chat_chunk(), "choices": [], "usage": OPENAI_USAGE}
CHAT_STREAM = [
    event(chat_chunk("Hel", usage=None)),
    event(chat_chunk("lo", usage=None)),
    event(chat_chunk(finish="stop", usage=None)),
    event(USAGE_CHUNK),
    DONE,
]
CHAT_BODY = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "model": "gpt-4o-2024-08-06",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
    "usage": OPENAI_USAGE,
}

ANTHROPIC_STREAM = [
    event(
        {
            "type": "message_start",
            "message": {
                "id": "msg_1",
                "type": "message",
                "model": "large-4-20250514",
                "usage": {
                    "input_tokens": 25,
                    "cache_creation_input_tokens": 7,
                    "cache_read_input_tokens": 30,
                    "output_tokens": 1,
                },
            },
        },
        "message_start",
    ),
    event({"type": "ping"}, "ping"),
    event(
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello"}},
        "content_block_delta",
    ),
    event(
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {"cache_read_input_tokens": None, "output_tokens": 15},
        },
        "message_delta",
    ),
    event({"type": "message_stop"}, "message_stop"),
]
ANTHROPIC_BODY = {
    "id": "msg_1",
    "type": "message",
    "model": "large-4-20250514",
    "content": [{"type": "text", "text": "Hello"}],
    "stop_reason": "end_turn",
    "usage": {
        "input_tokens": 25,
        "cache_creation_input_tokens": 7,
        "cache_read_input_tokens": 30,
        "output_tokens": 15,
        "service_tier": "standard",
    },
}

RESPONSES_USAGE = {
    "input_tokens": 36,
    "input_tokens_details": {"cached_tokens": 16},
    "output_tokens": 87,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 123,
}
RESPONSES_BODY = {"object": "response", "status": "completed", "model": "gpt-4o-2024-08-06", "usage": RESPONSES_USAGE}


def responses_stream(last="response.completed", usage=RESPONSES_USAGE):
    begun = {"object": "response", "status": "in_progress", "error": None, "usage": None}
    return [
        event({"type": "response.created", "response": begun}, "response.created"),
        event({"type": "response.output_text.delta", "delta": "Hello"}, "response.output_text.delta"),
        event({"type": last, "response": {**RESPONSES_BODY, "usage": usage}}, last),
    ]


GEMINI_STREAM = [
    event({"candidates": [{"content": {"parts": [{"text": "Hel"}]}}], "usageMetadata": {"promptTokenCount": 8}}),
    event(
        {
            "candidates": [{"content": {"parts": [{"text": "lo"}]}, "finishReason": "STOP"}],
            "usageMetadata": {
                "promptTokenCount": 8,
                "candidatesTokenCount": 3,
                "thoughtsTokenCount": 20,
                "toolUsePromptTokenCount": 2,
                "cachedContentTokenCount": 5,
                "totalTokenCount": 33,
            },
            "modelVersion": "gemini-2.5-flash",
        }
    ),
]
GEMINI_PARTS = [json.loads(part.removeprefix(b"data: ")) for part in GEMINI_STREAM]
