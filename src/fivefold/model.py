"""Model: what is being made cheaper. A blueprint, a folder of weights, a tokenizer and three small plans.

A model lives in one folder (or one GGUF file) on disk; `Model` is a frozen description of it, so it is cheap to
copy, compare and hand to another process. Techniques return a changed copy: they edit a plan (`train`, `decode`,
`run`, `export`), or write new weights into a folder of their own and point `path` there.

Nothing is executed on load: safetensors and GGUF only, no pickle, no remote code. This module imports no torch
and knows no technique and no engine.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

from fivefold.errors import ModelError

Format = Literal["safetensors", "gguf"]
ADAPTER = "adapter"
"""Folder beside the weights with an adapter that is not merged into them."""
MAX_CONFIG_BYTES = 4 << 20


class Trait(enum.StrEnum):
    """What a fresh model has and a technique can take away. A closed set; techniques only remove from it."""

    FLOAT_WEIGHTS = "float weights"
    DENSE_WEIGHTS = "dense weights"
    TRAINABLE = "trainable"
    UNFITTED = "weights not yet fitted to earlier damage"
    TORCH_GRAPH = "torch graph"
    FULL_DEPTH = "full depth"
    FULL_WIDTH = "full width"
    UNIFORM_LAYERS = "uniform layer shape"
    EXACT_ATTENTION = "exact softmax attention"
    FULL_CACHE = "full-precision key-value cache"
    ONE_TOKEN_STEPS = "one token per pass"
    OPEN_PARAMETERS = "trained parameters not chosen"
    OPEN_OPTIMIZER = "optimiser not chosen"
    OPEN_ACTIVATIONS = "activation memory not traded"
    PLAIN_GRAPH = "no adapter beside the weights"
    OPEN_ENGINE = "serving engine not chosen"
    OPEN_THREADS = "threads not chosen"
    OPEN_BATCH = "batch not chosen"
    SINGLE_PROCESS = "single process"


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """The architecture in the field's words. Widths are elements, `context` is tokens."""

    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    tied: bool
    gated: bool = True

    def __post_init__(self) -> None:
        limits = {"layers": 4096, "width": 1 << 20, "heads": 1 << 14, "kv_heads": 1 << 14, "head_dim": 1 << 14,
                  "ffn": 1 << 22, "vocab": 1 << 24, "context": 1 << 28}
        for name, top in limits.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= top:
                raise ModelError(
                    f"the model's config says {name} = {value!r}, which is not a whole number from 1 to {top};"
                    " check config.json or the GGUF header"
                )
        if self.heads % self.kv_heads:
            raise ModelError(
                f"the model's config says {self.heads} heads over {self.kv_heads} key-value heads, which does not"
                " divide; check config.json or the GGUF header"
            )

    @property
    def matrix_parameters(self) -> int:
        """Parameters in the matrices every token passes through, the output head included, embeddings not."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        mlp = self.width * self.ffn * (3 if self.gated else 2)
        return self.layers * (attention + mlp) + self.vocab * self.width

    @property
    def parameters(self) -> int:
        """Matrices and embeddings; norms and biases (under 0.1 %) are left out."""
        return self.matrix_parameters + (0 if self.tied else self.vocab * self.width)

    def flops_per_token(self, position: int) -> int:
        """Operations to generate one token at 0-based `position`: 2 per matrix parameter, and 4 per attended key."""
        attended = position + 1
        return 2 * self.matrix_parameters + 4 * self.layers * self.heads * self.head_dim * attended

    def cache_bytes_per_token(self, element_bytes: float) -> float:
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """How weights are fitted when a technique trains. Edited by techniques, executed once by `training`.

    `methods` are fine-tuning techniques in a recipe's spelling; they learn from the examples in `data`. `held` is how a
    trained weight is held beside the bfloat16 it is computed in (`training.precision`), None: float32 weights.
    `at_once` positions pass the model together; `seconds` > 0 fits the number of steps to that time.
    """

    steps: int = 0
    tokens_per_step: int = 1024
    sequence: int = 256
    learning_rate: float = 1e-4
    warmup: float = 0.1
    seed: int = 0
    methods: tuple[str, ...] = ()
    data: Path | None = None
    template: str = "{text}\nLabel:"
    epochs: float = 1.0
    seconds: float = 0.0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    held: Literal["split", "kahan", "stochastic", "nearest"] = "split"
    at_once: int = 1024
    layout: Literal["pack", "bucket"] = "pack"
    held_out: float = 0.05
    patience: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", tuple(self.methods))


@dataclass(frozen=True, kw_only=True)
class DecodePlan:
    """How tokens are drawn. `lookup_tokens` > 0 drafts that many tokens from the prompt (prompt lookup), `draft_tokens`
    > 0 by the smaller model in the GGUF file `draft`, in a plan of `draft_bytes`."""

    lookup_ngram: int = 2
    lookup_tokens: int = 0
    draft: Path | None = None
    draft_tokens: int = 0
    draft_bytes: float = 0.0

    @property
    def drafted(self) -> int:
        """Most tokens that are guessed at once."""
        return max(self.lookup_tokens, self.draft_tokens)


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Where and how the artifact runs. None means: the engine's own default, which `describe` reports."""

    engine: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int | None = None
    batch: int = 1
    cache_type: str = "f16"
    context: int = 2048


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """The file the serving engine will read, chosen by techniques, written once when the recipe is finished.

    `types` maps a tensor's name *in the exported file* to its storage type; `default` covers the other matrices and
    `embedding` the token embedding. `importance` is a safetensors file of per-column weights by the same names.
    `solved` holds already rounded tensors (a folder), which take precedence. Of a folder for the torch engine,
    `layer_bits` is what a weight of the linear layers takes (None: as in the model), `density` the share of these
    weights that is not zero, `kept` the share of them that a factorization leaves.
    """

    format: Literal["safetensors", "gguf"] = "safetensors"
    default: str = "f32"
    embedding: str | None = None
    types: Mapping[str, str] = field(default_factory=dict)
    importance: Path | None = None
    solved: Path | None = None
    group: int = 0
    layer_bits: float | None = None
    density: float = 1.0
    kept: float = 1.0

    def storing(self, layer_bits: float, head: str = "keep") -> Self:
        """The plan with linear layers of that many bits per weight; `head` "int8" packs embedding and head too."""
        return replace(self, layer_bits=layer_bits, embedding="q8_0" if head == "int8" else self.embedding)


@dataclass(frozen=True, kw_only=True)
class Model:
    """See the module. `path` is a folder (safetensors) or a file (GGUF); `origin` is the parent it is judged by."""

    name: str
    path: Path
    format: Format
    blueprint: Blueprint
    traits: frozenset[Trait] = frozenset(Trait)
    train: TrainPlan = TrainPlan()
    decode: DecodePlan = DecodePlan()
    run: RunPlan = RunPlan()
    export: ExportPlan = ExportPlan()
    origin: Model | None = None
    calibration: Path | None = None
    work: Path | None = None
    coverage: tuple[str, ...] = ()

    def but(self, **changes: Any) -> Self:
        """A changed copy. `model.but(run=replace(model.run, threads=2))`."""
        return replace(self, **changes)

    def without(self, *traits: Trait) -> Self:
        return replace(self, traits=self.traits - set(traits))

    def covered(self, sentence: str) -> Self:
        """A copy that also reports what a technique reached, e.g. "int4: 196 of 224 linear layers"."""
        return replace(self, coverage=(*self.coverage, sentence))

    @property
    def parent(self) -> Model:
        return self.origin or self

    @property
    def tokenizer_file(self) -> Path:
        """`tokenizer.json`: in the model's folder, or beside the GGUF file."""
        return (self.path if self.path.is_dir() else self.path.parent) / "tokenizer.json"


def plan_to_json(plan: Any) -> dict[str, Any]:
    """A plan as plain JSON; paths become strings."""
    out = {}
    for f in fields(plan):
        value = getattr(plan, f.name)
        out[f.name] = str(value) if isinstance(value, Path) else dict(value) if isinstance(value, Mapping) else value
    return out


_PLANS = {"train": TrainPlan, "decode": DecodePlan, "run": RunPlan, "export": ExportPlan}
_PATHS = {"path", "calibration", "work", "importance", "solved", "data", "draft"}


def model_to_json(model: Model) -> dict[str, Any]:
    """A model's description as plain JSON, to hand it to another process. Its inverse is `model_from_json`."""
    return {
        "name": model.name, "path": str(model.path), "format": model.format,
        "blueprint": {f.name: getattr(model.blueprint, f.name) for f in fields(Blueprint)},
        "traits": sorted(trait.name for trait in model.traits),
        **{name: plan_to_json(getattr(model, name)) for name in _PLANS},
        "origin": model_to_json(model.origin) if model.origin else None,
        "calibration": str(model.calibration) if model.calibration else None,
        "work": str(model.work) if model.work else None, "coverage": list(model.coverage),
    }


def model_from_json(data: Mapping[str, Any]) -> Model:
    """The model that `model_to_json` described. Raises ModelError when a field is missing or unknown."""

    def paths(record: Mapping[str, Any]) -> dict[str, Any]:
        return {k: Path(v) if k in _PATHS and v is not None else v for k, v in record.items()}

    try:
        plans = {name: plan(**paths(data[name])) for name, plan in _PLANS.items()}
        changes = {
            "blueprint": Blueprint(**data["blueprint"]), "traits": frozenset(Trait[t] for t in data["traits"]),
            "origin": model_from_json(data["origin"]) if data["origin"] else None,
            "coverage": tuple(data["coverage"]), **plans,
        }
        return Model(**{**paths(data), **changes})
    except (KeyError, TypeError) as error:
        raise ModelError(f"a model description does not fit this version ({error}); make it again") from None


def load(name: str | Path) -> Model:
    """A Hugging Face folder, a GGUF file, or a bundled name (`bundled.NAMES`) -> Model.

    Raises ModelError with one sentence when it is none of these, is truncated, or holds something unsafe, StoreError
    when it is an artifact of which a byte was changed (all of it is read: about 1 s per GB).
    """
    from fivefold import bundled

    if str(name) in bundled.NAMES:
        return bundled.load(str(name))
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "manifest.json").is_file() and (path / "recipe.txt").is_file():
            from fivefold.artifact import Artifact

            artifact = Artifact.open(path)
            artifact.verify()
            return artifact.model()
        return _load_folder(path)
    if path.is_file():
        return _load_gguf(path)
    raise ModelError(
        f"there is no model at {str(name)!r}: give a Hugging Face folder, a GGUF file or a bundled name"
        f" ({', '.join(sorted(bundled.NAMES))})"
    )


def read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder} has no config.json, so it is not a Hugging Face model folder; give one that has")
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise ModelError(f"{file} is larger than {MAX_CONFIG_BYTES >> 20} MiB, so it is not a model config; replace it")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ModelError(f"{file} is not readable JSON ({type(error).__name__}); copy the model again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds {type(config).__name__}, not an object; copy the model again")
    return config


def blueprint_of(config: Mapping[str, Any]) -> Blueprint:
    """The Blueprint of a Hugging Face `config.json`; GPT-2's older names are understood."""

    def pick(*names: str, default: Any = None) -> Any:
        for key in names:
            if config.get(key) is not None:
                return config[key]
        if default is None:
            raise ModelError(f"the model's config has no {names[0]!r}; check that config.json is complete")
        return default

    family = str(pick("model_type"))
    width, heads = pick("hidden_size", "n_embd"), pick("num_attention_heads", "n_head")
    if not isinstance(width, int) or not isinstance(heads, int) or heads < 1:
        raise ModelError(f"the model's config says width {width!r} and heads {heads!r}; both must be whole numbers")
    gpt2 = family == "gpt2"
    return Blueprint(
        family=family, layers=pick("num_hidden_layers", "n_layer"), width=width, heads=heads,
        kv_heads=pick("num_key_value_heads", default=heads), head_dim=pick("head_dim", default=width // heads),
        ffn=pick("intermediate_size", "n_inner", default=4 * width), vocab=pick("vocab_size"),
        context=pick("max_position_embeddings", "n_positions", "n_ctx", default=2048),
        tied=bool(config.get("tie_word_embeddings", gpt2 or family.startswith("gemma"))), gated=not gpt2,
    )


def _load_folder(path: Path) -> Model:
    from fivefold.weights import check_safetensors

    config = read_config(path)
    if config.get("auto_map"):
        raise ModelError(
            f"{path} asks for remote code (auto_map), which is never run; convert it to a family transformers has"
        )
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = [p.name for p in (*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth"))]
        what = f"only pickled weights ({pickles[0]})" if pickles else "no weights"
        raise ModelError(f"{path} has {what}; only safetensors are read: save it with safe_serialization=True")
    for file in files:
        check_safetensors(file)
    model = Model(name=path.resolve().name, path=path.resolve(), format="safetensors", blueprint=blueprint_of(config))
    return model.without(Trait.PLAIN_GRAPH) if (path / ADAPTER).is_dir() else model


def _load_gguf(path: Path) -> Model:
    from fivefold.weights import gguf_header

    header = gguf_header(path)
    quantized = any(t.type not in ("F32", "F16", "BF16") for t in header.tensors)
    lost = {Trait.TRAINABLE, Trait.TORCH_GRAPH, Trait.FLOAT_WEIGHTS, Trait.UNFITTED}
    note = "quantized GGUF: served as it is" if quantized else "GGUF: served as it is"
    return Model(
        name=path.stem, path=path.resolve(), format="gguf", blueprint=header.blueprint(),
        traits=frozenset(Trait) - lost, export=ExportPlan(format="gguf"), coverage=(note,),
    )
