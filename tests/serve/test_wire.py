"""Any body at all is either a checked request or a 400; never another exception."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fivefold.serve.wire import HARMLESS, OFF, USED, Refusal, parse

FIELDS = sorted(USED | set(OFF) | HARMLESS)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5)
values = st.recursive(leaves, lambda v: st.lists(v, max_size=4) | st.dictionaries(
    st.sampled_from(["role", "content", "type", "text", "include_usage"]) | st.text(max_size=3), v, max_size=4))
bodies = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=4), values, max_size=6)


def outcome(body: bytes, kind: Any) -> Any:
    try:
        return parse(body, kind, 100)
    except Refusal as refusal:
        assert refusal.status == 400
        assert refusal.message and refusal.to_json()["error"]["type"] == "invalid_request_error"
        return None


@given(bodies, st.sampled_from(["chat", "text"]))
def test_any_json_is_parsed_or_refused(body: dict[str, Any], kind: str) -> None:
    outcome(json.dumps(body).encode(), kind)


@given(st.binary(max_size=50), st.sampled_from(["chat", "text"]))
def test_any_bytes_are_parsed_or_refused(body: bytes, kind: str) -> None:
    outcome(body, kind)


@given(st.fixed_dictionaries({}, optional={
    "temperature": st.floats(0, 2), "top_p": st.floats(0, 1), "seed": st.integers(-(2**63), 2**63 - 1),
    "max_tokens": st.integers(1, 2**31 - 1), "stop": st.lists(st.text("ab", min_size=1), max_size=4),
    "stream": st.booleans(), "n": st.just(1), "presence_penalty": st.sampled_from([0, 0.0]), "user": st.text("ab"),
}))
def test_legal_fields_are_taken_as_given(fields: dict[str, Any]) -> None:
    ask = outcome(json.dumps({"prompt": "x", **fields}).encode(), "text")
    assert ask is not None
    assert ask.temperature == fields.get("temperature", 1.0)
    assert ask.max_tokens == fields.get("max_tokens", 16)
    assert ask.stop == tuple(fields.get("stop", ()))
    assert ask.stream == fields.get("stream", False)


def test_text_parts_are_joined_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    ask = parse(json.dumps({"messages": [{"role": "developer", "content": parts}]}).encode(), "chat", 100)
    assert ask.prompts == (({"role": "system", "content": "ab"},),)


@pytest.mark.parametrize("prompt", [[100], [-1], [True], [1, "a"], [[]], [], {}, 3, ["a"] * 17, [[1], "a", [2**70]]])
def test_prompts_that_are_none(prompt: Any) -> None:
    assert outcome(json.dumps({"prompt": prompt}).encode(), "text") is None
