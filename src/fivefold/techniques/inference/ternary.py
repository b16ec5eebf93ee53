"""Weights of -1, 0 and 1 times a scale, found by training through the rounding with the parent as the teacher.

    W = s t,   t = clip(round(w / s), -1, 1),   one s per row or group of a row

Rounding a trained model to three values destroys it, so this is a way of training: the forward pass uses W, the
gradient passes the rounding as if it were not there (straight-through), and the loss is KL(parent || student) on
calibration text. What is trained: the float weights behind t, the scales s, norm gains and biases. The state that does
best on held-out windows is kept, so training cannot leave the model worse on them than rounding alone did.

A weight takes 2 bits and its share of a 16-bit scale: a quarter of int8, a sixteenth of float32. Lowers memory, file
and time per token, which is the time to read the weights; embedding and head stay (or go to 8 bits), and in a small
model with a large vocabulary they are then most of the file. A long prompt takes longer than with float weights, since
the matrices are turned back for it. Published models of this kind were trained on up to trillions of tokens; a few
hundred thousand leave a model of under a billion parameters far from its parent, and the coverage line says how far.
`steps=0` is the rounding alone.

For llama.cpp (`store="tq2_0"` or "tq1_0") rows must be a multiple of 256; `rest` names the type of those that are not.

Sources: Ma et al., BitNet b1.58, arXiv 2402.17764; the nearest scale: Li et al., arXiv 1605.04711.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from fivefold.errors import Misfit
from fivefold.model import ExportPlan, Model, TrainPlan, Trait
from fivefold.recipe import Technique
from fivefold.space import Fixed, Range, Search
from fivefold.techniques._shared.gguf_types import HEAD, exported_names, fits, matrices
from fivefold.techniques._shared.packing import linear_shapes

SEQUENCE = 256


@dataclass(frozen=True, kw_only=True)
class Ternary(Technique):
    needs = frozenset({Trait.FLOAT_WEIGHTS, Trait.DENSE_WEIGHTS, Trait.TORCH_GRAPH, Trait.TRAINABLE, Trait.UNFITTED,
                       Trait.PLAIN_GRAPH})
    breaks = frozenset({Trait.FLOAT_WEIGHTS, Trait.TRAINABLE, Trait.UNFITTED})
    lowers = {"memory": "direct", "network": "direct", "compute": "indirect", "energy": "indirect", "money": "indirect"}
    may_raise = ("quality",)
    headline = "matches fp16 from 3B; bitnet.cpp on x86: 2.37-6.17x, energy -71.9..82.2%"
    perturbation = 7.0

    steps: Annotated[int, Range(0, 1_000_000), Search(40)] = 40
    """Training steps; 0 rounds without training."""
    group: Annotated[Literal[0, 64, 128, 256], Fixed()] = 0
    """Neighbouring weights of a row that share a scale; 0 is the whole row."""
    scale: Annotated[Literal["least_squares", "absmean"], Fixed()] = "least_squares"
    """Where a scale begins: nearest to the weights, or at their mean magnitude as in BitNet."""
    store: Annotated[Literal["packed", "tq2_0", "tq1_0"], Fixed()] = "packed"
    """How they are stored: for the torch engine, or as a type of llama.cpp."""
    rest: Annotated[Literal["refuse", "f16", "q8_0"], Fixed()] = "refuse"
    """Type of the matrices whose rows llama.cpp's ternary types do not fit; "refuse" stops before any work."""
    activations: Annotated[Literal["float", "int8"], Fixed()] = "float"
    """What the ternary layers take in, in training and in the torch engine (llama.cpp rounds to 8 bits itself)."""
    head: Annotated[Literal["keep", "int8"], Fixed()] = "keep"
    """The token embedding and the output head in the torch engine: as they are, or in 8 bits."""
    tokens: Annotated[int, Range(64, 65_536, log=True), Fixed()] = 1024
    """Tokens per step, in sequences of 256."""
    rate: Annotated[float, Range(1e-6, 1e-1, log=True), Fixed()] = 1e-3
    """Peak learning rate of scales and gains, relative; the weights move 4 times as fast, in units of s."""

    def check(self, model: Model) -> None:
        self._chosen(model)
        if self.store == "packed":
            from fivefold.engines._native import available

            if (reason := available("ternary")) is not None:
                raise Misfit(f"{self} is computed by a kernel that cannot be made here: {reason}")

    def effort(self, model: Model) -> float:
        return 8.0 * model.blueprint.parameters * self.tokens * self.steps

    def effort_once(self, model: Model) -> float:
        return 0.0

    def plan(self, model: Model) -> Model:
        planned = model.but(train=self._train(model))
        if self.store == "packed":
            scales = 16 / (self.group or model.blueprint.width)
            return planned.but(export=planned.export.storing(2 + scales, self.head))
        types: dict[str, str] = dict.fromkeys(self._chosen(model), self.store)
        outside = "q8_0" if self.head == "int8" else "f16"
        if HEAD in matrices(model):
            types[HEAD] = outside
        rest = "f16" if self.rest == "refuse" else self.rest
        return planned.but(export=ExportPlan(format="gguf", default=rest, embedding=outside, types=types))

    def _train(self, model: Model) -> TrainPlan:
        return replace(model.train, steps=self.steps, learning_rate=self.rate, tokens_per_step=self.tokens,
                       sequence=min(SEQUENCE, model.blueprint.context))

    def apply(self, model: Model) -> Model:
        from fivefold.techniques._shared.lesson import AT_ONCE, Lesson, text
        from fivefold.training.loop import fit, windows

        plan, student = self._train(model), self._student(model)
        train, held_out = text(model, plan)
        lesson = Lesson(model, student, held_out)
        stream = windows(train, max(1, plan.tokens_per_step // plan.sequence), plan.seed, AT_ONCE)
        done = fit(plan, student.groups(), lesson.loss, stream, lesson.score)
        return self._written(model, student).covered(
            f"ternary: {self._reached(model)}; held-out KL {done.before:.4f} as rounded ->"
            f" {done.after:.4f} at step {done.best_step} of {plan.steps}, {plan.steps * plan.tokens_per_step} tokens"
        )

    def _student(self, model: Model) -> Any:
        import torch

        from fivefold.techniques._shared.ternary import TernaryStudent
        from fivefold.training.module import load_module

        module = load_module(model, torch.float32)
        names = self._chosen(model).values()
        return TernaryStudent(model, module, names, group=self.group, activations=self._bits, scale=self.scale)

    @property
    def _bits(self) -> int:
        """Of activations; 0: as they are."""
        return 8 if self.activations == "int8" else 0

    def _chosen(self, model: Model) -> dict[str, str]:
        """What becomes ternary: name in the file to write -> linear layer. Raises Misfit."""
        shapes, _ = linear_shapes(model, str(self))
        if self.store == "packed":
            odd = sorted({columns for _, columns in shapes.values() if self.group and columns % self.group})
            if odd:
                raise Misfit(f"{self} does not fit: rows of {odd[0]} are no multiple of {self.group}; choose group=0")
            return {name: name for name in shapes}
        if self.group not in (0, 256):
            raise Misfit(f"{self} does not fit: {self.store} has a scale for 256 weights; choose group=0 or group=256")
        names = exported_names(model)
        found = {names[f"{name}.weight"]: name for name, (_, columns) in shapes.items() if fits(self.store, columns)}
        self._check_rest(shapes, len(found), model)
        return found

    def _check_rest(self, shapes: Mapping[str, tuple[int, int]], reached: int, model: Model) -> None:
        odd = sorted({columns for _, columns in shapes.values() if not fits(self.store, columns)})
        if odd and (self.rest == "refuse" or not reached):
            repair = 'give rest="q8_0" or ' if reached else ""
            raise Misfit(
                f"{self} does not fit {len(shapes) - reached} of {len(shapes)} linear layers: rows of {odd[0]} are not"
                f' a multiple of {self.store}\'s 256; {repair}choose store="packed", which the torch engine serves'
            )
        wanted = [(columns, self.rest) for columns in odd]
        if self.head == "int8":
            wanted.append((model.blueprint.width, "q8_0"))
        for columns, kind in wanted:
            if not fits(kind, columns):
                raise Misfit(f"{self} does not fit: rows of {columns} are not a multiple of {kind}'s 32; choose f16")

    def _reached(self, model: Model) -> str:
        shapes, _ = linear_shapes(model, str(self))
        chosen = self._chosen(model)
        said = f"{len(chosen)} of {len(shapes)} linear layers, one scale per {self.group or 'row'}"
        if len(chosen) < len(shapes):
            said += f", {len(shapes) - len(chosen)} written as {self.rest} because their rows are not a multiple of 256"
        return said + ("; embedding and head " + ("in 8 bits" if self.head == "int8" else "kept"))

    def _written(self, model: Model, student: Any) -> Model:
        from fivefold.techniques._shared.modules import rewritten
        from fivefold.techniques._shared.ternary import times

        tensors = student.vectors_on_disk()
        if self.store == "packed":
            return self._packed(rewritten(self.plan(model), self.name, tensors), student)
        for name in student.start:
            codes, scale = student.ternary(name)
            tensors[f"{name}.weight"] = times(codes, scale)
        return rewritten(self.plan(model), self.name, tensors)

    def _packed(self, model: Model, student: Any) -> Model:
        import shutil

        from fivefold.engines._layers import packed, ternary, write_layers
        from fivefold.techniques._shared.modules import workspace

        def make(name: str, weight: Any, settings: Mapping[str, Any]) -> Mapping[str, Any]:
            if settings["kind"] == "packed":
                return packed.pack(weight.torch(), 8)
            return ternary.pack(*student.ternary(name))

        layers: dict[str, dict[str, Any]] = {
            name: {"kind": "ternary", "group": self.group, "activations": self._bits} for name in student.start
        }
        if self.head == "int8":
            _, outside = linear_shapes(model, str(self))
            layers |= {name: {"kind": "packed", "bits": 8, "group": 0} for name in outside}
        folder = write_layers(model.path, workspace(model, self.name), layers, make)
        shutil.rmtree(model.path)  # the same with float matrices, written a moment ago
        return model.but(path=folder)
