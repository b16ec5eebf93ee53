from __future__ import annotations

from fivefold.engines import open_session
from fivefold.export import export
from fivefold.recipe import Recipe


def test_greedy_text_is_the_same_with_and_without_drafts(tiny, tmp_path):
    parent = Recipe.parse('gguf(type="f32")').apply(tiny())
    prompt = [5, 9, 200, 31, 5, 9, 200, 31, 5, 9]
    texts = []
    for recipe in ("parent", "prompt_lookup(ngram=1, tokens=4)", "prompt_lookup"):
        model = Recipe.parse(recipe).apply(parent)
        session = open_session(export(model, tmp_path / str(len(texts))))
        texts.append(list(session.generate(prompt, 60)))
        session.close()
    assert len(texts[0]) == 60
    assert texts[0] == texts[1] == texts[2]


def test_the_plan_holds_the_fields():
    from fivefold.model import DecodePlan

    class Planned:
        decode = DecodePlan()

        def but(self, decode):
            return decode

    (technique,) = Recipe.parse("prompt_lookup(ngram=3, tokens=16)")
    assert technique.apply(Planned()) == DecodePlan(lookup_ngram=3, lookup_tokens=16)
