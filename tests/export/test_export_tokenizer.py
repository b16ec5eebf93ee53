"""llama.cpp's own tokenizer, reading the exported file, must agree with the `tokenizers` library."""

import json
from pathlib import Path

import pytest
from cffi import FFI
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from fivefold.engines._llama_abi import extension_file, library
from fivefold.errors import DataError, ModelError
from fivefold.export import export
from fivefold.export.tokenizer import SPLITS, pre_tokenizer_name, token_table
from fivefold.model import ExportPlan, load
from fivefold.weights import GGUFArray, gguf_header

TEXTS = ["Hello world", "1234 and 56,789.01 x² ١٢٣ Ⅷ", "  two  spaces\n\n\ttab\r\n", "naïve café 日本語 русский",
         "👩‍👩‍👧 🚀", "don't I'll WE'VE", "<|end|>and<|end|>", "def f(x):\n    return x ** 2  # ok", ""]
CORPUS = [*TEXTS, "the cat sat on the mat and the dog ran to the house " * 20, "0123456789 " * 5]
LLAMA3, QWEN2, TEKKEN = ({name: regex for regex, name in SPLITS.items()}[n] for n in ("llama-bpe", "qwen2", "tekken"))


def byte_level(*before, use_regex=True) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    step = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, step]) if before else step
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<|end|>", "<|start|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def split(regex: str):
    from tokenizers import Regex

    return pre_tokenizers.Split(Regex(regex), "isolated")


def sentencepiece() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<|end|>", "<|start|>", *[f"<0x{i:02X}>" for i in range(256)]]
    trainer = trainers.BpeTrainer(vocab_size=460, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([t for t in CORPUS if t.isascii()], trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [t for t in data["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", tokenizer.token_to_id("<|start|>"))]
    )
    return tokenizer


KINDS = {
    "gpt-2": lambda: byte_level(),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)),
    "llama-bpe": lambda: byte_level(split(LLAMA3), use_regex=False),
    "qwen2": lambda: byte_level(split(QWEN2), use_regex=False),
    "tekken": lambda: byte_level(split(TEKKEN), use_regex=False),
    "default": sentencepiece,
}


@pytest.fixture
def written(make, tmp_path):
    """written(tokenizer) -> the exported Model."""

    def write(tokenizer: Tokenizer):
        folder, _ = make("llama", vocab_size=512, bos_token_id=None, eos_token_id=None, pad_token_id=None)
        tokenizer.save(str(folder / "tokenizer.json"))
        said = {"eos_token": "<|end|>", "bos_token": {"content": "<|start|>"}, "chat_template": "{{ messages }}"}
        (folder / "tokenizer_config.json").write_text(json.dumps(said))
        return export(load(folder).but(export=ExportPlan(format="gguf")), tmp_path / "out")

    return write


class LlamaTokenizer:
    """llama_tokenize, through a second view of the engine's library."""

    def __init__(self, path: Path) -> None:
        self.ffi, self.lib = library()
        params = self.lib.llama_model_default_params()
        params.vocab_only = True
        handle = self.lib.llama_model_load_from_file(str(path).encode(), params)
        self.model = self.ffi.gc(handle, self.lib.llama_model_free)
        assert self.model != self.ffi.NULL
        self.own = FFI()
        self.own.cdef("int32_t llama_tokenize(const void *vocab, const char *text, int32_t len, int32_t *tokens,"
                      " int32_t max, bool add_special, bool parse_special);")
        self.view = self.own.dlopen(str(extension_file()))

    def __call__(self, text: str, special: bool = False) -> list[int]:
        vocab = self.own.cast("void *", int(self.ffi.cast("intptr_t", self.lib.llama_model_get_vocab(self.model))))
        out = self.own.new("int32_t[]", 4096)
        data = text.encode()
        count = self.view.llama_tokenize(vocab, data, len(data), out, 4096, special, True)
        assert count >= 0
        return list(out[0:count])


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_tokenizes_alike(written, kind):
    tokenizer = KINDS[kind]()
    model = written(tokenizer)
    assert gguf_header(model.path).metadata["tokenizer.ggml.pre"] == kind
    theirs = LlamaTokenizer(model.path)
    for text in TEXTS:
        if kind == "default" and ("<|" in text or not text):
            continue
        assert theirs(text) == tokenizer.encode(text, add_special_tokens=False).ids, text


def test_bos_is_added_exactly_when_the_tokenizer_adds_it(written):
    model = written(sentencepiece())
    meta = gguf_header(model.path).metadata
    assert meta["tokenizer.ggml.add_bos_token"] is True and meta["tokenizer.ggml.add_eos_token"] is False
    assert meta["tokenizer.ggml.bos_token_id"] == 2 and meta["tokenizer.ggml.eos_token_id"] == 1
    assert LlamaTokenizer(model.path)("cat", special=True)[0] == 2


def test_no_bos_template_and_padding_tokens(written):
    model = written(byte_level())
    meta = gguf_header(model.path).metadata
    assert meta["tokenizer.ggml.add_bos_token"] is False
    assert meta["tokenizer.chat_template"] == "{{ messages }}"
    tokens, types = (meta[f"tokenizer.ggml.{k}"].read() for k in ("tokens", "token_type"))
    assert len(tokens) == len(types) == 512 and tokens[511] == "[PAD511]" and types[511] == 5 and types[0] == 3
    assert model.tokenizer_file.is_file() and (model.path.parent / "tokenizer_config.json").is_file()


def test_an_unnamed_splitting_rule_and_a_unigram_are_reported(written):
    model = written(byte_level(pre_tokenizers.Punctuation()))
    assert any("word splitting" in note for note in model.coverage)
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("<|end|>", -2.0)], 0, False))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    model = written(unigram)
    meta = gguf_header(model.path).metadata
    assert meta["tokenizer.ggml.model"] == "no_vocab" and not any(isinstance(v, GGUFArray) for v in meta.values())
    assert any("Unigram" in note for note in model.coverage)


def test_no_tokenizer_is_reported(make, tmp_path):
    folder, _ = make("llama")
    model = export(load(folder).but(export=ExportPlan(format="gguf")), tmp_path / "out")
    assert any("no tokenizer.json" in note for note in model.coverage)


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    with pytest.raises(ModelError, match="embedding 2 rows"):
        token_table({"model": {"vocab": {"a": 0, "b": 1, "c": 2}}}, 2)


def test_added_tokens_are_control_or_user_defined():
    added = [{"id": 1, "content": "<s>", "special": True}, {"id": 2, "content": "more", "special": False}]
    assert token_table({"model": {"vocab": {"a": 0}}, "added_tokens": added}, 4) == (
        ["a", "<s>", "more", "[PAD3]"], [1, 3, 4, 5]
    )


def test_unknown_structures_have_no_name():
    assert pre_tokenizer_name(None) is None
    assert pre_tokenizer_name({"type": "Metaspace"}) is None
    assert pre_tokenizer_name({"type": "ByteLevel", "add_prefix_space": True}) is None


@pytest.mark.slow
def test_the_bundled_tokenizer_is_the_published_one():
    """tokenizer.json, built from the header, against llama.cpp's own reading of the published file."""
    try:
        parent, published = load("smollm2-135m"), load("smollm2-135m-published")
    except DataError as error:
        pytest.skip(str(error))
    ours, theirs = Tokenizer.from_file(str(parent.tokenizer_file)), LlamaTokenizer(published.path)
    for text in [*TEXTS, "<|im_start|>user\nhi<|im_end|>\n"]:
        assert ours.encode(text).ids == theirs(text), text
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text
