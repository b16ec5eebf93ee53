"""Tokenizer: text to token ids and back, once, outside every engine, so that all engines see the same tokens.

A thin layer over the `tokenizers` library reading `tokenizer.json`; transformers is not imported. Three things need
care. *BOS*: versions of transformers disagree whether it is added; here `add_bos_token` of `tokenizer_config.json`
decides, and where that key is absent, the post-processor of `tokenizer.json`. *Chat templates* are programs that come
with a model: they are rendered in jinja2's immutable sandbox (no attribute of Python is reachable), with limits on
their size, their loops and their output. *Streaming*: a token may end in the middle of a UTF-8 character, so text is
held back until its last character is whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fivefold.errors import DataError, ModelError

MAX_TOKENIZER_BYTES = 256 << 20
MAX_CONFIG_BYTES = 4 << 20
MAX_TEMPLATE_CHARS = 256 << 10
MAX_CHAT_CHARS = 4 << 20
MAX_LOOP = 10_000
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")

Message = Mapping[str, str]


class Tokenizer:
    """`path` is a model folder, its `tokenizer.json`, or a GGUF file that lies beside one. Raises ModelError.

    `vocab` counts all tokens, `bos` is the id put in front of a text (None: nothing is), `stop` are the ids that end
    an answer, `chat_format` says whether the model's own template or the plain "role: content" form is used.
    """

    def __init__(self, path: str | Path) -> None:
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        file = Path(path) if Path(path).suffix == ".json" else folder / "tokenizer.json"
        self._tokenizer = _open(file)
        config = _read_json(folder / "tokenizer_config.json")
        self._specials = {k: _spelling(v) for k, v in config.items() if k.endswith("_token") and _spelling(v)}
        self.vocab: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.bos = self._bos(config.get("add_bos_token"))
        self.stop = self._stop(folder)
        self._template = _template_text(folder, config)
        self.chat_format: Literal["template", "plain"] = "template" if self._template else "plain"
        self._compiled: Any = None

    def _bos(self, wanted: Any) -> int | None:
        token = self._specials.get("bos_token")
        bos: int | None = self._tokenizer.token_to_id(token) if token else None
        if wanted is None and bos is not None:
            wanted = self._tokenizer.encode("a", add_special_tokens=True).ids[:1] == [bos]
        return bos if wanted else None

    def _stop(self, folder: Path) -> frozenset[int]:
        spelled = [*TURN_ENDS, self._specials.get("eos_token", "")]
        found = {self._tokenizer.token_to_id(token) for token in spelled if token}
        for name in ("generation_config.json", "config.json"):
            ids = _read_json(folder / name).get("eos_token_id")
            if ids is not None:
                found.update(i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int))
                break
        return frozenset(found - {None})

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with BOS in front only if the model asks for it. Raises DataError on lone surrogates."""
        ids = self._encode(text)
        return ids if self.bos is None else [self.bos, *ids]

    def _encode(self, text: str) -> list[int]:
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except (UnicodeEncodeError, TypeError):
            raise DataError("the text holds characters that are not valid Unicode; save it as UTF-8") from None

    def decode(self, ids: Sequence[int], *, specials: bool = False) -> str:
        """Text of `ids`; special tokens are left out unless `specials`. Raises DataError on an impossible id."""
        try:
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=not specials))
        except (OverflowError, TypeError):
            raise DataError("a token id is negative, too large or not a whole number; check the ids") from None

    def stream(self) -> StreamDecoder:
        """A decoder for one answer, token by token."""
        return StreamDecoder(self)

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation in the model's own template (BOS only where the template writes it).

        `messages` are {"role": ..., "content": ...}. Raises DataError when they are not, ModelError when the template
        fails.
        """
        return self._encode(self.chat_text(messages, add_generation_prompt))

    def chat_text(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as the text that `chat` encodes."""
        if not messages:
            raise DataError("the conversation is empty; give at least one message")
        for message in messages:
            fields = [message.get(k) for k in ("role", "content")] if isinstance(message, Mapping) else [None]
            if not all(isinstance(text, str) for text in fields):
                raise DataError('a message is not {"role": text, "content": text}; correct it')
        if self._template is None:
            lines = [f"{m['role']}: {m['content']}" for m in messages]
            return "\n".join([*lines, "assistant:"] if add_generation_prompt else lines)
        if self._compiled is None:
            self._compiled = _compile(self._template)
        return _render(self._compiled, messages=[dict(m) for m in messages],
                       add_generation_prompt=add_generation_prompt, **self._specials)


class StreamDecoder:
    """Feed token ids one by one; the pieces of text returned add up to `decode` of all of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._pending: list[int] = []

    def feed(self, token: int) -> str:
        """The text that is certain after this token: "" while a character is incomplete."""
        self._pending.append(token)
        new = self._new()
        if not new or new.endswith("\ufffd"):
            return ""
        self._before, self._pending = self._pending, []
        return new

    def flush(self) -> str:
        """What was held back at the end of the answer; an incomplete character shows as U+FFFD."""
        new = self._new()
        self._before, self._pending = [], []
        return new

    def _new(self) -> str:
        known = self._tokenizer.decode(self._before)
        return self._tokenizer.decode([*self._before, *self._pending])[len(known):]


def _open(file: Path) -> Any:
    from tokenizers import Tokenizer as Library

    if not file.is_file():
        raise ModelError(f"{file.parent} has no {file.name}; put the model's tokenizer.json there")
    if file.stat().st_size > MAX_TOKENIZER_BYTES:
        raise ModelError(f"{file} is larger than {MAX_TOKENIZER_BYTES >> 20} MiB, so it is no tokenizer; replace it")
    try:
        return Library.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{file} is not a readable tokenizer ({str(error)[:100]}); copy the model again") from None


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise ModelError(f"{file} is larger than {MAX_CONFIG_BYTES >> 20} MiB, so it is no config; replace it")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ModelError(f"{file} is not readable JSON ({type(error).__name__}); copy the model again") from None
    if not isinstance(data, dict):
        raise ModelError(f"{file} holds {type(data).__name__}, not an object; copy the model again")
    return data


def _spelling(token: Any) -> str:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _template_text(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if file.is_file():
        try:
            template = file.read_bytes()[: 4 * MAX_TEMPLATE_CHARS + 1].decode("utf-8")
        except UnicodeDecodeError:
            raise ModelError(f"{file} is not UTF-8; copy the model again") from None
    if template is None:
        return None
    if not isinstance(template, str) or len(template) > MAX_TEMPLATE_CHARS:
        raise ModelError(
            f"the chat template in {folder} is not a text under {MAX_TEMPLATE_CHARS >> 10} Ki characters; replace it"
        )
    return template


def _compile(source: str) -> Any:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if not all(isinstance(v, int | float) and abs(v) < 1e9 for v in (left, right)):
                raise jinja2.exceptions.SecurityError(f"{operator} of something other than small numbers")
            return left * right if operator == "*" else float(left) ** float(right)

    def refuse(text: str) -> None:
        raise jinja2.TemplateError(text)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    for name in ("lipsum", "cycler", "joiner"):
        environment.globals.pop(name)
    environment.globals.update(range=_limited_range, raise_exception=refuse, strftime_now=_now)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError) as error:
        raise ModelError(f"the model's chat template does not compile ({_brief(error)}); repair or remove it") from None


def _limited_range(*bounds: int) -> range:
    values = range(*bounds)
    if len(values) > MAX_LOOP:
        raise ValueError(f"a loop of {len(values)} steps")
    return values


def _now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)


def _render(template: Any, **values: Any) -> str:
    import jinja2

    parts: list[str] = []
    length = 0
    try:
        for part in template.generate(**values):
            parts.append(part)
            length += len(part)
            if length > MAX_CHAT_CHARS:
                raise ValueError(f"more than {MAX_CHAT_CHARS >> 20} Mi characters")
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError,
            ValueError) as error:
        raise ModelError(
            f"the model's chat template failed ({_brief(error)}); check the messages or the template"
        ) from None
    return "".join(parts)


def _brief(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]
