"""The wire: an OpenAI request body -> `Ask`, or a `Refusal` in one sentence. Pure; no web framework.

Every field is checked, none is quietly ignored: a field that asks for something this server does not do (n > 1,
logprobs, tools, penalties, ...) is refused, except at the value that means "do not". Names and error shapes follow
the OpenAI API reference (chat completions, completions).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["chat", "text"]
Prompt = str | tuple[int, ...] | tuple[dict[str, str], ...]
"""Text, token ids, or chat messages."""

MAX_PROMPTS = 16
MAX_STOPS = 4
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
OFF: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "logprobs": (False,), "top_logprobs": (0,), "echo": (False,), "suffix": ("",),
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "parallel_tool_calls": (False, True),
    "response_format": ({"type": "text"},), "modalities": (["text"],),
}
"""Fields understood only at the values that switch them off."""
USED = {"model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop",
        "stream", "stream_options"}


class Refusal(Exception):
    """An answer other than 200: an HTTP status and the fields of OpenAI's error object."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None,
                 headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        names = {401: "authentication_error", 429: "rate_limit_error"}
        return names.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def to_json(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A checked request. `max_tokens` None: as many as the server's limit and the context allow."""

    kind: Kind
    prompts: tuple[Prompt, ...]
    model: str | None = None
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False


def parse(body: bytes, kind: Kind, vocab: int) -> Ask:
    """Raises Refusal (400) for anything that is not a request this server can answer in full."""
    data = _object(body)
    _nothing_ignored(data)
    stream = _flag(data, "stream")
    return Ask(
        kind=kind, prompts=_messages(data) if kind == "chat" else _prompts(data, vocab), model=_model(data),
        max_tokens=_max_tokens(data, kind), temperature=_number(data, "temperature", 1.0, 0.0, 2.0),
        top_p=_number(data, "top_p", 1.0, 0.0, 1.0), seed=_whole(data, "seed", -(2**63), 2**63 - 1),
        stop=_stops(data), stream=stream, include_usage=_include_usage(data, stream),
    )


def dumps(data: Any) -> bytes:
    """Compact ASCII JSON: a lone surrogate or U+2028 in a client's text cannot break it."""
    return json.dumps(data, separators=(",", ":")).encode("ascii")


def _object(body: bytes) -> dict[str, Any]:
    def reject(name: str) -> float:
        raise ValueError(f"{name} is not JSON")

    try:
        data = json.loads(body, parse_constant=reject)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:120]
        raise Refusal(400, f"the body is not valid JSON ({why}); send one JSON object") from None
    if not isinstance(data, dict):
        raise Refusal(400, f"the body is a JSON {type(data).__name__}; send one JSON object")
    return data


def _nothing_ignored(data: Mapping[str, Any]) -> None:
    for name, value in data.items():
        if name in USED or name in HARMLESS or value is None:
            continue
        if name not in OFF:
            raise Refusal(400, f"this server does not know the field {name[:60]!r}; leave it out",
                          param=_clean(name[:60]), code="unknown_parameter")
        if not any(type(value) is type(off) and value == off for off in OFF[name]) and not _zero(value, OFF[name]):
            raise Refusal(400, f"this server does not support {name} = {json.dumps(value)[:60]}; leave {name} out",
                          param=name, code="unsupported_parameter")


def _zero(value: Any, off: Sequence[Any]) -> bool:
    return isinstance(value, float) and any(type(o) is int and value == o for o in off)


def _clean(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode("ascii")


def _text(value: str, param: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Refusal(400, f"{param} holds half of a surrogate pair, so it is no text", param=param) from None
    return value


def _model(data: Mapping[str, Any]) -> str | None:
    name = data.get("model")
    if name is not None and not isinstance(name, str):
        raise Refusal(400, "model must be a string", param="model")
    return name


def _flag(data: Mapping[str, Any], name: str) -> bool:
    value = data.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refusal(400, f"{name} must be true or false", param=name)
    return bool(value)


def _include_usage(data: Mapping[str, Any], stream: bool) -> bool:
    options = data.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise Refusal(400, "stream_options must be an object with include_usage only", param="stream_options")
    if not stream:
        raise Refusal(400, "stream_options needs stream = true; set it or leave stream_options out",
                      param="stream_options")
    return _flag(options, "include_usage")


def _number(data: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = data.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise Refusal(400, f"{name} must be a number from {low:g} to {high:g}", param=name)
    return float(value) if math.isfinite(value) else default


def _whole(data: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = data.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise Refusal(400, f"{name} must be a whole number from {low} to {high}", param=name)
    return value


def _max_tokens(data: Mapping[str, Any], kind: Kind) -> int | None:
    """The completions API has always defaulted to 16; chat defaults to what fits."""
    names = ["max_tokens"] if kind == "text" else ["max_completion_tokens", "max_tokens"]
    for name in names:
        if (value := _whole(data, name, 1, 2**31 - 1)) is not None:
            return value
    return 16 if kind == "text" else None


def _stops(data: Mapping[str, Any]) -> tuple[str, ...]:
    value = data.get("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) for s in stops):
        raise Refusal(400, f"stop must be a string or a list of at most {MAX_STOPS} strings", param="stop")
    if any(not 0 < len(s) <= 1000 for s in stops):
        raise Refusal(400, "each stop string must have 1 to 1000 characters", param="stop")
    return tuple(_text(s, "stop") for s in stops)


def _messages(data: Mapping[str, Any]) -> tuple[Prompt, ...]:
    messages = data.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, "messages must be a list of at least one message", param="messages")
    return (tuple(_message(m) for m in messages),)


def _message(message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise Refusal(400, "each message must be an object with role and content", param="messages")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise Refusal(400, f"each message's role must be one of {', '.join(ROLES)}", param="messages")
    extra = {k for k, v in message.items() if v is not None} - {"role", "content", "name", "refusal"}
    if extra:
        raise Refusal(400, f"this server does not support {_clean(min(extra))[:60]!r} in a message; leave it out",
                      param="messages", code="unsupported_parameter")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(
        isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts
    ):
        raise Refusal(400, "each message's content must be text (a string, or a list of text parts)", param="messages")
    return {"role": ROLES[role], "content": _text("".join(p["text"] for p in parts), "messages")}


def _prompts(data: Mapping[str, Any], vocab: int) -> tuple[Prompt, ...]:
    """A string, a list of strings, one list of token ids, or a list of such lists."""
    value = data.get("prompt")
    items: list[Any] = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    if items and all(isinstance(i, int) for i in items):
        items = [items]
    if not 1 <= len(items) <= MAX_PROMPTS:
        raise Refusal(400, f"prompt must be a string, token ids, or a list of 1 to {MAX_PROMPTS} of them",
                      param="prompt")
    return tuple(_prompt(item, vocab) for item in items)


def _prompt(item: Any, vocab: int) -> Prompt:
    if isinstance(item, str):
        return _text(item, "prompt")
    if not isinstance(item, list) or not item:
        raise Refusal(400, "each prompt must be a string or a list of at least one token id", param="prompt")
    for token in item:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab:
            raise Refusal(400, f"token ids must be whole numbers from 0 to {vocab - 1}", param="prompt")
    return tuple(item)
