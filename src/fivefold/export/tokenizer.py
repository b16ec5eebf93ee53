"""A Hugging Face `tokenizer.json` in GGUF's words, for engines and users that tokenize from the file itself.

Two kinds can be said: byte-level BPE (GGUF model "gpt2": tokens, merges, and the *name* of the rule that splits text
into words, because llama.cpp knows those rules by name only) and SentencePiece-style BPE with byte fallback (model
"llama": tokens and scores; llama.cpp joins the pair with the highest score first, so a token's score is minus the rank
of the first merge that makes it). Anything else is written without a vocabulary and the coverage says so; Fivefold's
own engines always tokenize with `tokenizer.json`, which is exported beside the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fivefold.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGUFWriter

MAX_TOKENIZER_BYTES = 256 << 20
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    _CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + r"\p{N}" + _REST: "qwen2",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}


def add_tokenizer(writer: GGUFWriter, folder: Path, vocab: int) -> list[str]:
    """Write the tokenizer of `folder` into the header; returns what could not be said, as coverage sentences."""
    data, config = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json") or {}
    if data is None:
        writer.add_tokenizer_model("no_vocab")
        return ["gguf: the folder has no tokenizer.json, so the file has no vocabulary; give it token ids"]
    tokens, types = token_table(data, vocab)
    notes = []
    model = data["model"]
    if model.get("type", "BPE") == "BPE" and _mentions(data, "ByteLevel"):
        pre = pre_tokenizer_name(data.get("pre_tokenizer"))
        if pre is None:
            notes.append("gguf: llama.cpp cannot name this tokenizer's word splitting; tokenize with tokenizer.json")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre or "default")
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges([" ".join(pair) for pair in merge_pairs(model)])
    elif model.get("type", "BPE") == "BPE" and model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores(tokens, merge_pairs(model)))
        writer.add_token_types(types)
        writer.add_add_space_prefix(_adds_space(data))
    else:
        writer.add_tokenizer_model("no_vocab")
        return [f"gguf: a {model.get('type')} tokenizer cannot be said in the file; tokenize with tokenizer.json"]
    _add_special(writer, folder, data, config)
    template = chat_template(folder, config)
    if template:
        writer.add_chat_template(template)
    return notes


def read_json(file: Path) -> Any:
    """The parsed file, or None when there is none. Raises ModelError when it is not readable JSON."""
    if not file.is_file():
        return None
    if file.stat().st_size > MAX_TOKENIZER_BYTES:
        raise ModelError(f"{file} is larger than {MAX_TOKENIZER_BYTES >> 20} MiB, so it is no tokenizer; replace it")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ModelError(f"{file} is not readable JSON; copy the model again") from None
    if not isinstance(data, dict):
        raise ModelError(f"{file} holds no JSON object; copy the model again")
    return data


def token_table(data: Mapping[str, Any], vocab: int) -> tuple[list[str], list[int]]:
    """Tokens by id, filled up to `vocab` rows with unused ones, and their GGUF types."""
    known = data.get("model", {}).get("vocab")
    if not isinstance(known, dict):
        known = {piece[0]: i for i, piece in enumerate(known or [])}
    unknown = data["model"].get("unk_token")
    bytewise = data["model"].get("byte_fallback")
    table: dict[int, tuple[str, int]] = {}
    for token, i in known.items():
        is_byte = bytewise and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        table[i] = (token, BYTE if is_byte else UNKNOWN if token == unknown and bytewise else NORMAL)
    for added in data.get("added_tokens") or []:
        if table.get(added["id"], ("", NORMAL))[1] != UNKNOWN:
            table[added["id"]] = (added["content"], CONTROL if added.get("special") else USER)
    if table and max(table) >= vocab:
        raise ModelError(
            f"the tokenizer has token {max(table)} but the embedding {vocab} rows; give this model's own tokenizer"
        )
    rows = [table.get(i, (f"[PAD{i}]", UNUSED)) for i in range(vocab)]
    return [token for token, _ in rows], [kind for _, kind in rows]


def merge_pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges, best first; tokenizer.json spells a pair as a list or as one text with a space."""
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in model.get("merges") or [])
    return [(left, right) for left, right in pairs]


def scores(tokens: list[str], merges: list[tuple[str, str]]) -> list[float]:
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(merges):
        rank.setdefault(left + right, i)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def pre_tokenizer_name(node: Any) -> str | None:
    """llama.cpp's name for a pre-tokenizer of tokenizer.json, by its structure; None when it has none."""
    steps = node.get("pretokenizers", [node]) if isinstance(node, dict) else []
    kinds = [step.get("type") for step in steps]
    if not steps or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    regex = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and regex:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and regex and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not regex:
        return SPLITS.get(steps[0].get("pattern", {}).get("Regex", ""))
    return None


def _mentions(data: Mapping[str, Any], kind: str) -> bool:
    return f'"{kind}"' in json.dumps([data.get("pre_tokenizer"), data.get("decoder")])


def _adds_space(data: Mapping[str, Any]) -> bool:
    said = json.dumps([data.get("normalizer"), data.get("pre_tokenizer")])
    return '"Prepend"' in said or '"prepend_scheme": "always"' in said or '"prepend_scheme": "first"' in said


def _add_special(writer: GGUFWriter, folder: Path, data: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(data))
    model = read_json(folder / "config.json") or {}
    ids = {}
    for role, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id),
                      ("pad", writer.add_pad_token_id), ("unk", writer.add_unk_token_id)):
        token = config.get(f"{role}_token")
        text = token.get("content") if isinstance(token, dict) else token
        chosen = tokenizer.token_to_id(text) if isinstance(text, str) else None
        if chosen is None:
            chosen = model.get(f"{role}_token_id")
            chosen = chosen[0] if isinstance(chosen, list) and chosen else chosen
        if isinstance(chosen, int):
            ids[role] = chosen
            add(chosen)
    encoded = tokenizer.encode("a").ids
    writer.add_add_bos_token(bool(encoded) and encoded[0] == ids.get("bos"))
    writer.add_add_eos_token(bool(encoded) and encoded[-1] == ids.get("eos"))


def chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The default chat template: `chat_template.jinja`, else the one in tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {t.get("name"): t.get("template") for t in template}.get("default")
    return template if isinstance(template, str) else None
