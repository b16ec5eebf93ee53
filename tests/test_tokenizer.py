"""The tokenizer against transformers' own rendering, and against templates and files that mean harm."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fivefold.errors import DataError, ModelError
from fivefold.testing.tiny import write_tokenizer
from fivefold.tokenizer import Tokenizer

CHATML = (
    "{{ bos_token or '' }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}\n{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}"
)
TALK = [{"role": "user", "content": " Hëllo 🙂 "}, {"role": "assistant", "content": "世界"}]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 320)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def configure(folder: Path, **changes: object) -> Tokenizer:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return Tokenizer(folder)


def test_text_survives_and_file_folder_and_gguf_neighbour_agree(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    text = "Energy is measured in joules — 世界 🙂"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode())
    assert Tokenizer(folder / "tokenizer.json").encode(text) == ids
    assert Tokenizer(folder / "model.gguf").encode(text) == ids


def test_bos_is_added_only_when_the_model_says_so(folder: Path) -> None:
    plain = Tokenizer(folder).encode("a")
    assert Tokenizer(folder).bos is None
    with_bos = configure(folder, bos_token="<|im_end|>", add_bos_token=True)
    assert with_bos.encode("a") == [0, *plain]
    assert configure(folder, bos_token={"content": "<|im_end|>"}, add_bos_token=False).encode("a") == plain


def test_the_post_processor_decides_where_the_config_is_silent(folder: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers.processors import TemplateProcessing

    library = Library.from_file(str(folder / "tokenizer.json"))
    library.post_processor = TemplateProcessing(single="<|im_end|> $A", special_tokens=[("<|im_end|>", 0)])
    library.save(str(folder / "tokenizer.json"))
    assert configure(folder, bos_token="<|im_end|>", add_bos_token=None).encode("a")[0] == 0


def test_stop_ids_come_from_tokenizer_and_generation_config(folder: Path) -> None:
    assert Tokenizer(folder).stop == {0}
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert Tokenizer(folder).stop == {0, 7, 9}


@pytest.mark.parametrize("ask", [True, False])
def test_chat_equals_transformers(folder: Path, ask: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = configure(folder, chat_template=CHATML)
    peer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert tokenizer.chat_format == "template"
    want = peer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=ask)
    assert tokenizer.chat_text(TALK, ask) == want
    assert tokenizer.chat(TALK, ask) == peer.apply_chat_template(TALK, add_generation_prompt=ask)["input_ids"]


def test_without_a_template_chat_is_plain_and_says_so(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    assert tokenizer.chat_format == "plain"
    assert tokenizer.chat_text([{"role": "user", "content": "Hi"}]) == "user: Hi\nassistant:"


def test_a_template_file_wins_over_the_config(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("from the file")
    assert configure(folder, chat_template="from the config").chat_text(TALK) == "from the file"


HOSTILE = {
    "python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['json'] }}",
    "mutation": "{{ messages.append(1) }}",
    "long loop": "{% for i in range(10 ** 9) %}{% endfor %}",
    "repetition": "{{ 'a' * 10 ** 9 }}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "flood": "{% for i in range(9999) %}{% for j in range(9999) %}aaaaaaaaaaaaaaaa{% endfor %}{% endfor %}",
    "file": "{% include '/etc/passwd' %}",
    "refusal": "{{ raise_exception('roles must alternate') }}",
    "syntax": "{% for %}",
    "wrong type": "{{ messages + 1 }}",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_templates_end_in_one_sentence(folder: Path, kind: str) -> None:
    with pytest.raises(ModelError, match="chat template") as caught:
        configure(folder, chat_template=HOSTILE[kind]).chat_text(TALK)
    assert "\n" not in str(caught.value)


def test_an_overlong_template_and_bad_messages_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="Ki characters"):
        configure(folder, chat_template="a" * 300_000)
    tokenizer = configure(folder, chat_template=CHATML)
    for bad in ([], [{"role": "user"}], [{"role": "user", "content": 3}], ["hello"]):
        with pytest.raises(DataError):
            tokenizer.chat(bad)  # type: ignore[arg-type]


def test_unreadable_files_are_told_in_one_sentence(folder: Path) -> None:
    with pytest.raises(ModelError, match="has no"):
        Tokenizer(folder / "nowhere" / "tokenizer.json")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="not a readable tokenizer"):
        Tokenizer(folder)
    with pytest.raises(ModelError, match="JSON"):
        (folder / "tokenizer_config.json").write_text("{")
        write_tokenizer_only(folder)
        Tokenizer(folder)


def write_tokenizer_only(folder: Path) -> None:
    broken = (folder / "tokenizer_config.json").read_text()
    write_tokenizer(folder, 320)
    (folder / "tokenizer_config.json").write_text(broken)


def test_lone_surrogates_and_impossible_ids_are_refused(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    with pytest.raises(DataError):
        tokenizer.encode("\ud800")
    with pytest.raises(DataError):
        tokenizer.decode([-1])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 319), max_size=40))
def test_a_stream_adds_up_to_the_whole_text(original: Path, ids: list[int]) -> None:
    tokenizer = Tokenizer(original)
    stream = tokenizer.stream()
    pieces = [stream.feed(i) for i in ids]
    assert "".join([*pieces, stream.flush()]) == tokenizer.decode(ids)


def test_a_stream_never_shows_half_a_character(original: Path) -> None:
    tokenizer = Tokenizer(original)
    stream = tokenizer.stream()
    text = "Hé🙂世界"
    ids = tokenizer.encode(text)
    pieces = [stream.feed(i) for i in ids]
    assert len(ids) > len(text)
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text
