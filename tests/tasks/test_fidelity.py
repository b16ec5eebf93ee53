"""Fidelity against the exact divergence over the whole vocabulary, on a fake session and a tiny model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fivefold.errors import DataError, NotFinite
from fivefold.tasks.fidelity import Reference, fidelity

VOCAB = 200
WINDOWS = [np.random.default_rng(w).integers(0, VOCAB, 30).tolist() for w in range(5)]


class Fake:
    """Log-probabilities that depend on the token before; `noise` disturbs them."""

    vocab = VOCAB

    def __init__(self, noise: float = 0.0, sharp: float = 2.0) -> None:
        random = np.random.default_rng(0)
        self.logits = sharp * random.normal(size=(VOCAB, VOCAB)) + noise * random.normal(size=(VOCAB, VOCAB))

    def score(self, tokens: Sequence[int]) -> np.ndarray:
        x = self.logits[list(tokens)]
        x = x - x.max(1, keepdims=True)
        return (x - np.log(np.exp(x).sum(1, keepdims=True))).astype(np.float32)


def exact(parent: Fake, candidate: Fake) -> np.ndarray:
    out = []
    for window in WINDOWS:
        p, q = (m.score(window)[:-1].astype(np.float64) for m in (parent, candidate))
        out.append((np.exp(p) * (p - q)).sum(1))
    return np.concatenate(out)


def test_a_copy_is_perfectly_faithful() -> None:
    found = fidelity(Fake(), Reference.record(Fake(), WINDOWS))
    assert found.measurement.value("agreement") == 1
    assert np.abs(found.kl).max() < 1e-6
    want = np.concatenate([-Fake().score(w)[np.arange(29), w[1:]] for w in WINDOWS])
    assert np.allclose(found.loss, want)
    assert found.measurement.value("perplexity") == pytest.approx(np.exp(want.mean()), rel=1e-5)


def test_kl_is_a_lower_bound_that_tightens_with_k_and_is_exact_over_the_whole_vocabulary() -> None:
    parent, candidate = Fake(), Fake(noise=0.5)
    want = exact(parent, candidate)
    share = []
    for k in (1, 8, 64, VOCAB):
        found = fidelity(candidate, Reference.record(parent, WINDOWS, k))
        assert (found.kl <= want + 1e-6).all()
        assert (found.kl >= -1e-6).all()
        share.append(found.kl.mean() / want.mean())
    assert share == sorted(share)
    assert share[0] < 0.6 < share[2] < 1
    assert share[3] == pytest.approx(1, abs=1e-5)


def test_agreement_counts_equal_top_choices() -> None:
    parent, candidate = Fake(), Fake(noise=1.0)
    found = fidelity(candidate, Reference.record(parent, WINDOWS, 3))
    same = [parent.score(w)[:-1].argmax(1) == candidate.score(w)[:-1].argmax(1) for w in WINDOWS]
    assert np.array_equal(found.agree, np.concatenate(same))
    quantity = found.measurement["agreement"]
    assert quantity.low < quantity.value < quantity.high
    assert quantity.n == 145


def test_quantiles_and_clusters() -> None:
    found = fidelity(Fake(noise=0.5), Reference.record(Fake(), WINDOWS))
    assert found.kl_quantiles["p90"].value == pytest.approx(np.quantile(found.kl, 0.9))
    assert found.measurement.value("kl_p99") == pytest.approx(np.quantile(found.kl, 0.99))
    assert found.window.tolist() == np.repeat(range(5), 29).tolist()
    assert {k: v.shape for k, v in found.per_token.items()} == dict.fromkeys(("agreement", "kl", "loss"), (145,))


def test_a_saved_reference_is_the_same_reference(tmp_path: Path) -> None:
    windows = [w[: 10 + i] for i, w in enumerate(WINDOWS)]
    reference = Reference.record(Fake(), windows, 16)
    loaded = Reference.load(reference.save(tmp_path / "reference.npz"))
    assert loaded.windows == reference.windows
    a, b = fidelity(Fake(noise=0.5), reference), fidelity(Fake(noise=0.5), loaded)
    assert np.array_equal(a.kl, b.kl)
    assert np.array_equal(a.window, b.window)
    assert [p.name for p in tmp_path.iterdir()] == ["reference.npz"]


def test_damaged_references_are_told_in_one_sentence(tmp_path: Path) -> None:
    file = Reference.record(Fake(), WINDOWS, 4).save(tmp_path / "reference.npz")
    whole = file.read_bytes()
    for bad in (whole[: len(whole) // 2], b"", b"PK\x03\x04"):
        file.write_bytes(bad)
        with pytest.raises(DataError, match="record it again"):
            Reference.load(file)
    with pytest.raises(DataError, match="record it again"):
        Reference.load(tmp_path / "nowhere.npz")
    np.savez(file, tokens=np.array([{}], dtype=object))
    with pytest.raises(DataError, match="record it again"):
        Reference.load(file)


def test_other_vocabularies_short_windows_and_nan_are_refused() -> None:
    reference = Reference.record(Fake(), WINDOWS, 4)
    with pytest.raises(DataError, match="one vocabulary"):
        fidelity(Fake(), replace(reference, vocab=VOCAB + 1))
    with pytest.raises(DataError, match="at least 2"):
        Reference.record(Fake(), [[1]])
    broken = Fake()
    broken.logits[:] = np.nan
    with pytest.raises(NotFinite):
        fidelity(broken, reference)


def test_a_reference_judges_its_own_model_without_scoring_it_again() -> None:
    reference = Reference.record(Fake(), WINDOWS)
    scored, recorded = fidelity(Fake(), reference), reference.itself()
    assert np.allclose(scored.loss, recorded.loss) and scored.agree.all() and recorded.agree.all()
    assert np.abs(scored.kl - recorded.kl).max() < 1e-6
    assert (scored.window == recorded.window).all()
