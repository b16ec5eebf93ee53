"""The runtime that serves the artifact.

The same weights run at different speeds in different runtimes, and none wins both phases: on two CPU cores and a
model of 135 million parameters OpenVINO filled the prompt 2 to 5 times faster and llama.cpp decoded 1.4 to 1.7 times
faster, from the same file. What pays depends on prompt and output lengths, so the engine is searched like a
technique. "openvino+llama.cpp" reads the prompt with the one and decodes with the other, at the memory of both.

It changes no weight; answers differ only by rounding inside the runtime. Not every engine reads every file (llama.cpp
reads GGUF, OpenVINO only some of its storage types), which is checked before any work.

Source: the runtimes' own documentation; measurements of this project (see the report of a study).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from fivefold import engines
from fivefold.errors import RecipeError
from fivefold.model import Model, Trait
from fivefold.recipe import Technique
from fivefold.space import Search, nearest
from fivefold.techniques._shared.serving import check_engine


@dataclass(frozen=True, kw_only=True)
class Engine(Technique):
    needs = frozenset({Trait.OPEN_ENGINE})
    breaks = frozenset({Trait.OPEN_ENGINE})
    lowers = {"compute": "direct", "memory": "direct", "energy": "direct", "money": "indirect"}
    may_raise = ("compute", "memory", "energy")
    runtime = True
    perturbation = 0.0

    type: Annotated[str, Search(*engines.names())]
    """The runtime."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = engines.names()
        if self.type not in known:
            hint = nearest(self.type, known)
            near = f"did you mean {hint!r}?" if hint else f"engines: {', '.join(known)}"
            raise RecipeError(f"there is no engine {self.type[:40]!r}; {near}")

    def check(self, model: Model) -> None:
        check_engine(model, str(self))

    def apply(self, model: Model) -> Model:
        return model.but(run=replace(model.run, engine=self.type))
