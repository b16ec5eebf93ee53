"""Subgroups against loops and pandas-free counting, and the excess against a bootstrap of windows."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fivefold.errors import DataError
from fivefold.tasks.choice import Answers, ChoiceSet, Item
from fivefold.tasks.fidelity import Fidelity, Reference
from fivefold.tasks.subgroups import KINDS, excess, kinds, of_items, of_tokens, thirds
from fivefold.testing.tiny import write_tokenizer
from fivefold.tokenizer import Tokenizer

TEXT = "She sells sea shells, 42 of them.\nNobody counted (quickly)"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 320)
    return Tokenizer(folder)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=50))
def test_thirds_are_ordered_and_keep_equals_together(values: list[int]) -> None:
    x = np.array(values)
    where = thirds(x)
    for a, b in itertools.product(range(len(values)), repeat=2):
        assert where[a] <= where[b] or values[a] > values[b]
        assert where[a] == where[b] or values[a] != values[b]


def test_thirds_of_distinct_values_are_thirds() -> None:
    assert Counter(thirds(np.random.default_rng(0).permutation(30)).tolist()) == {0: 10, 1: 10, 2: 10}
    assert thirds(np.arange(6)).tolist() == [0, 0, 1, 1, 2, 2]


def test_kinds_of_tokens_by_their_characters(tokenizer: Tokenizer) -> None:
    window = tokenizer.encode("x" + TEXT)
    found = [KINDS[k] for k in kinds([window], tokenizer)]
    for token, kind in zip(window[1:], found, strict=True):
        text = tokenizer.decode([token])
        want = ("digit" if text.strip().isdigit() else "punctuation" if not any(c.isalnum() for c in text)
                else "word start" if text.startswith(" ") else kind)
        assert kind == want, text
    texts = [tokenizer.decode([t]) for t in window[1:]]
    after_newline = next(i for i, t in enumerate(texts) if t.endswith("\n")) + 1
    assert found[after_newline] == "word start", "a line begins with a word"
    assert {"word start", "continuation", "digit", "punctuation"} == set(found)


def made_up(groups: int = 6, size: int = 41, seed: int = 0) -> tuple[Reference, Fidelity]:
    random = np.random.default_rng(seed)
    windows = tuple(tuple(int(t) for t in np.minimum(random.geometric(0.1, size), 300)) for _ in range(groups))
    n = groups * (size - 1)
    empty = np.zeros((n, 1), np.float32)
    reference = Reference(windows, 320, empty.astype(np.int32), empty, np.zeros(n), np.zeros(n, np.float32))
    kl = random.exponential(0.1, n) + 0.05 * np.repeat(random.normal(size=groups), size - 1)
    found = Fidelity(random.random(n) < 0.8, kl, kl, reference.window, np.full(n, 0.5), np.ones(n, bool))
    return reference, found


def test_groups_of_tokens_by_loops(tokenizer: Tokenizer) -> None:
    reference, found = made_up()
    groups = of_tokens(reference, found, tokenizer)
    counts = Counter(t for w in reference.windows for t in w[1:])
    flat = [(t, p, len(w) - 1) for w in reference.windows for p, t in enumerate(w[1:])]
    each = sorted(counts[t] for t, _, _ in flat)
    low, high = each[-(-len(each) // 3) - 1], each[-(-2 * len(each) // 3) - 1]
    bands = {"rare": lambda c: c <= low, "mid": lambda c: low < c <= high, "frequent": lambda c: c > high}
    by_name = {(g.by, g.name): g for g in groups.rows}
    for name, inside in bands.items():
        at = [i for i, (t, _, _) in enumerate(flat) if inside(counts[t])]
        group = by_name["frequency", name]
        assert group.n == len(at)
        assert group.values["kl"].value == pytest.approx(np.mean([found.kl[i] for i in at]))
        assert group.values["agreement"].value == pytest.approx(np.mean([found.agree[i] for i in at]))
        assert group.excess.value == pytest.approx(np.mean([found.kl[i] for i in at]) - found.kl.mean())
    for place, name in enumerate(("begin", "middle", "end")):
        assert by_name["position", name].n == sum(p * 3 // size == place for _, p, size in flat)
    for by in ("frequency", "position", "kind"):
        assert sum(g.n for g in groups.rows if g.by == by) == len(flat), "every token is in one group of each"


def test_the_group_that_is_hurt_is_named(tokenizer: Tokenizer) -> None:
    reference, found = made_up()
    found.kl[np.arange(len(found.kl)) % 40 >= 27] += 1.0
    groups = of_tokens(reference, found, tokenizer)
    assert groups.worst is not None and str(groups.worst) == "position: end"
    assert str(groups).startswith("hurt most: position: end, KL 0.6") and "; clear among" in str(groups)
    even = of_tokens(reference, Fidelity(found.agree, np.zeros(len(found.kl)), found.loss, found.window,
                                         found.confidence, found.right), tokenizer)
    assert "not clear among" in str(even)


def test_the_error_of_an_excess_is_that_of_resampled_windows() -> None:
    random = np.random.default_rng(5)
    clusters = np.repeat(np.arange(60), 20)
    inside = random.random(1200) < 0.3
    x = random.normal(size=60).repeat(20) + inside * random.normal(0.4, 1, 1200)
    found = excess(x, inside, clusters, 1, "nat/token")
    means = []
    for _ in range(2000):
        drawn = (random.integers(60, size=60)[:, None] * 20 + np.arange(20)).ravel()
        means.append(x[drawn][inside[drawn]].mean() - x[drawn].mean())
    half = 2.0 * np.std(means)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    assert found.value == pytest.approx(x[inside].mean() - x.mean())
    wider = excess(x, inside, clusters, 10, "nat/token")
    assert wider.high - wider.low > 1.3 * (found.high - found.low)
    assert excess(x, inside, np.zeros(1200), 1, "1").low is None


def test_no_group_is_called_worst_by_chance() -> None:
    """Eight groups that differ by nothing: the worst one's Bonferroni interval lies above 0 in few of the samples."""
    random = np.random.default_rng(6)
    wrong = 0
    for _ in range(300):
        x, where = random.normal(size=400), random.integers(8, size=400)
        each = [excess(x, where == g, np.arange(400), 8, "1") for g in range(8)]
        wrong += max(each, key=lambda q: q.value or 0).low > 0
    assert wrong <= 0.05 * 300


def test_groups_of_items_by_loops() -> None:
    random = np.random.default_rng(7)
    items = tuple(Item.of("q" * int(random.integers(1, 90)), ["no", "yes"], int(random.integers(2))) for _ in range(90))
    asked = ChoiceSet("toy", items)
    right = np.array([i.answer for i in items])

    def of(share: float, digest: str = asked.digest) -> Answers:
        rows = [np.eye(2)[r if random.random() < share else 1 - r] for r in right]
        return Answers("toy", digest, tuple(rows), right)

    parent, candidate = of(0.9), of(0.6)
    groups = of_items(asked, parent, candidate)
    by_name = {(g.by, g.name): g for g in groups.rows}
    assert set(by_name) == {("length", "short"), ("length", "medium"), ("length", "long"), ("answer", "no"),
                            ("answer", "yes")}
    for place, name in enumerate(("no", "yes")):
        at = [i for i, r in enumerate(right) if r == place]
        a, b = (np.mean([bool(x.correct[i]) for i in at]) for x in (parent, candidate))
        values = by_name["answer", name].values
        assert (values["A"].value, values["B"].value) == (pytest.approx(a), pytest.approx(b))
        assert values["change"].value == pytest.approx(b - a) and values["change"].low <= b - a <= values["change"].high
    assert max(len(i.contexts[0]) for i, w in zip(items, thirds([len(i.contexts[0]) for i in items]), strict=True)
               if w == 0) < min(len(i.contexts[0]) for i, w in zip(
                   items, thirds([len(i.contexts[0]) for i in items]), strict=True) if w == 2)
    worst = max(groups.rows, key=lambda g: -g.values["change"].value)
    assert groups.worst is worst
    with pytest.raises(DataError, match="different items"):
        of_items(asked, parent, of(0.5, "other"))
    with pytest.raises(DataError, match="not to the items"):
        of_items(ChoiceSet("toy", items[:5]), parent, candidate)


def test_few_items_call_nothing_the_worst() -> None:
    items = tuple(Item.of("q" * (i + 1), [f"a{i}", "b", "c"], i % 3) for i in range(6))
    asked = ChoiceSet("toy", items)
    answers = Answers("toy", asked.digest, tuple(np.eye(3)[0] for _ in items), np.array([i.answer for i in items]))
    groups = of_items(asked, answers, answers)
    assert groups.worst is None and "ask for more" in str(groups)
    assert [g.name for g in groups.rows if g.by == "answer"] == ["number 1", "number 2", "number 3"]
