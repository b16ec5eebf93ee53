"""Speculative decoding: a smaller model guesses, the model itself checks all guesses in one pass.

Decoding waits for weights to be read, and a pass over k + 1 tokens reads them once. With a the chance that a guess is
kept, c the time of the small model's step against the large one's and v that of a pass over k + 1 tokens against one
token, a token takes

    (v + k c) / ((1 - a^(k+1)) / (1 - a))        of what it took

Lossless: under greedy decoding the text is the same (up to ties in the last bits of the logits), with a temperature its
distribution is. The draft is the model itself in a storage type of few bits, which needs no training: it agrees on most
tokens and reads a fraction of the bytes; or any GGUF file with the same tokenizer (`file`). It pays where the model is
large against its draft, an F16 file say. Beside a model that is itself stored in 4 bits the draft costs as much as it
saves, and where arithmetic is the bottleneck (few cores, large batches) checking is not free.

Source: Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from fivefold.errors import Misfit, RecipeError
from fivefold.model import ExportPlan, Model, Trait
from fivefold.recipe import Technique
from fivefold.space import Fixed, Range, Search
from fivefold.techniques._shared.gguf_types import gguf_bytes, matrices
from fivefold.techniques._shared.serving import engine_name, limit


@dataclass(frozen=True, kw_only=True)
class Speculative(Technique):
    needs = frozenset({Trait.ONE_TOKEN_STEPS, Trait.TORCH_GRAPH, Trait.FLOAT_WEIGHTS, Trait.PLAIN_GRAPH})
    breaks = frozenset({Trait.ONE_TOKEN_STEPS})
    lowers = {"compute": "direct", "energy": "direct", "money": "indirect"}
    may_raise = ("compute", "energy", "memory", "network")
    perturbation = 0.0
    headline = "T5-XXL 2-3x, Chinchilla 70B 2-2.5x faster, lossless"

    draft: Annotated[Literal["q4_0", "iq4_nl", "q5_0", "q8_0"], Search("iq4_nl", "q4_0")] = "iq4_nl"
    """The storage type in which the model itself guesses."""
    tokens: Annotated[int, Range(1, 16), Search(2, 4, 6)] = 4
    """Tokens guessed at once."""
    file: Annotated[str, Fixed()] = ""
    """A GGUF file with the same tokenizer that guesses instead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.file and not self.file.endswith(".gguf"):
            raise RecipeError(f"speculative(file={self.file[:80]!r}) names no GGUF file; give one that ends in .gguf")

    def check(self, model: Model) -> None:
        if not limit(model, "DRAFTS"):
            raise Misfit(f"{engine_name(model)} takes no draft model; remove speculative or choose another engine")
        if self.file:
            self._check_file(model)
        else:
            matrices(model)

    def _check_file(self, model: Model) -> None:
        from fivefold.export.tokenizer import read_json, token_table
        from fivefold.weights import GGUFArray, gguf_header

        path = Path(self.file).expanduser()
        if not path.is_file():
            raise Misfit(f"{self.name}: there is no file {self.file[:200]!r}; give a GGUF file")
        theirs = gguf_header(path).metadata.get("tokenizer.ggml.tokens")
        data = read_json(model.tokenizer_file)
        ours = token_table(data, model.blueprint.vocab)[0] if data else None
        if not isinstance(theirs, GGUFArray) or theirs.count != model.blueprint.vocab or theirs.read() != ours:
            raise Misfit(
                f"{self.name}: the draft {path.name} has another tokenizer than {model.name}, so its guesses would mean"
                " other words; give a draft with the same tokens"
            )

    def plan(self, model: Model) -> Model:
        size = float(Path(self.file).expanduser().stat().st_size) if self.file else gguf_bytes(
            model.blueprint, self.draft, self.draft)
        return model.but(decode=replace(model.decode, draft_tokens=self.tokens, draft_bytes=size))

    def inputs(self, model: Model) -> str:
        from fivefold.files import sha256

        return sha256(Path(self.file).expanduser()) if self.file else ""

    def effort_once(self, model: Model) -> float:
        return 0.0

    def apply(self, model: Model) -> Model:
        from fivefold.export import export
        from fivefold.techniques._shared.modules import workspace

        self.check(model)
        planned = self.plan(model)
        if self.file:
            path = Path(self.file).expanduser()
        else:
            plan = ExportPlan(format="gguf", default=self.draft, embedding=self.draft)
            path = export(model.but(export=plan), workspace(model, "speculative")).path
        done = planned.but(decode=replace(planned.decode, draft=path))
        return done.covered(
            f"speculative: {self.tokens} tokens drafted by {path.name if self.file else 'itself in ' + self.draft},"
            f" {path.stat().st_size / 1e6:.1f} MB"
        )
