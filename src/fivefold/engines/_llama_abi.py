"""The C interface of llama.cpp, opened without a compiler.

The wheel `xllamacpp` links all of llama.cpp into its Python extension module, and that file exports the C functions
of `llama.h` and `ggml.h`. cffi in ABI mode opens it and calls them at full speed, releasing the GIL.

The declarations are compiled into `_llama_ffi.py` (`python -m fivefold.engines._llama_abi` writes it anew, a test
compares), because parsing them takes a C parser: 5 MB of a process whose weights are 80.

The price of ABI mode: nobody checks the declarations. A struct that gained a field upstream would be passed with
every later field shifted, silently. Hence the version is pinned in `pyproject.toml`, only what is used is declared,
and `library` reads back the default-parameter structs, whose values are known (a shifted layout cannot give
n_batch = 2048, type_k = 1 and swa_full = true at once), before anything else is called. The `spare` bytes at the end of
these structs keep that check itself safe: a longer struct of another version is written into them.

Source: `include/llama.h`, `ggml/include/ggml.h` and `ggml-cpu.h` of llama.cpp (MIT), release b11549.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections import deque
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from fivefold.errors import ModelError

PACKAGE = "xllamacpp"
PINNED = "2026.10.11549"
INSTALL = f"pip install '{PACKAGE}=={PINNED}'"
FLASH_AUTO, FLASH_OFF, FLASH_ON = -1, 0, 1
LOAD_COPY, LOAD_MAP = 0, 1
INTEGER, TEXT = 0, 3
DONT_NEED = 4
ERROR_LEVEL, CONTINUED = 4, 5

DECLARATIONS = """
typedef struct llama_model llama_model;
typedef struct llama_context llama_context;
typedef struct llama_vocab llama_vocab;
typedef struct llama_memory llama_memory;
typedef struct llama_sampler llama_sampler;

typedef struct {
    int32_t tag;
    char key[128];
    union { int64_t val_i64; double val_f64; bool val_bool; char val_str[128]; };
} llama_model_kv_override;

typedef struct {
    void *devices, *tensor_buft_overrides;
    int32_t n_gpu_layers, split_mode, load_mode, lazy_mode, main_gpu;
    const float *tensor_split;
    void *progress_callback, *progress_callback_user_data;
    const llama_model_kv_override *kv_overrides;
    bool vocab_only, check_tensors, use_extra_bufts, no_host, no_alloc, load_mtp;
    char spare[256];
} llama_model_params;

typedef struct {
    uint32_t n_ctx, n_batch, n_ubatch, n_seq_max, n_rs_seq, n_outputs_max, n_outputs_max_per_seq;
    int32_t n_threads, n_threads_batch;
    int32_t ctx_type, rope_scaling_type, pooling_type, attention_type, flash_attn_type;
    float rope_freq_base, rope_freq_scale;
    float yarn_ext_factor, yarn_attn_factor, yarn_beta_fast, yarn_beta_slow;
    uint32_t yarn_orig_ctx;
    float defrag_thold;
    void *cb_eval, *cb_eval_user_data;
    int32_t type_k, type_v;
    size_t moe_cache_size;
    void *abort_callback, *abort_callback_data;
    bool embeddings, offload_kqv, no_perf, op_offload, swa_full, kv_unified;
    void *samplers;
    size_t n_samplers;
    llama_context *ctx_other;
    char spare[256];
} llama_context_params;

typedef struct {
    int32_t n_tokens;
    int32_t *token;
    float *embd;
    int32_t *pos;
    int32_t *n_seq_id;
    int32_t **seq_id;
    int8_t *logits;
} llama_batch;

typedef void (*log_callback)(int level, const char *text, void *user_data);
void llama_log_set(log_callback callback, void *user_data);
void llama_backend_init(void);
const char *llama_print_system_info(void);

llama_model_params llama_model_default_params(void);
llama_context_params llama_context_default_params(void);
llama_model *llama_model_load_from_file(const char *path, llama_model_params params);
void llama_model_free(llama_model *model);
const llama_vocab *llama_model_get_vocab(const llama_model *model);
int32_t llama_vocab_n_tokens(const llama_vocab *vocab);
int32_t llama_model_n_embd_out(const llama_model *model);
int32_t llama_model_n_ctx_train(const llama_model *model);
uint64_t llama_model_size(const llama_model *model);
bool llama_model_has_encoder(const llama_model *model);

llama_context *llama_init_from_model(llama_model *model, llama_context_params params);
void llama_free(llama_context *context);
uint32_t llama_n_ctx(const llama_context *context);
llama_memory *llama_get_memory(const llama_context *context);
void llama_memory_clear(llama_memory *memory, bool data);
bool llama_memory_seq_rm(llama_memory *memory, int32_t sequence, int32_t first, int32_t end);
size_t llama_state_seq_get_size(llama_context *context, int32_t sequence);
size_t llama_state_seq_get_data(llama_context *context, uint8_t *to, size_t size, int32_t sequence);
size_t llama_state_seq_set_data(llama_context *context, const uint8_t *from, size_t size, int32_t sequence);
int32_t llama_decode(llama_context *context, llama_batch batch);
float *llama_get_logits_ith(llama_context *context, int32_t i);

llama_sampler *llama_sampler_init_greedy(void);
int32_t llama_sampler_sample(llama_sampler *sampler, llama_context *context, int32_t i);
void llama_sampler_free(llama_sampler *sampler);

typedef void (*to_float)(const void *x, float *y, int64_t k);
typedef struct {
    const char *type_name;
    int64_t blck_size, blck_size_interleave;
    size_t type_size;
    bool is_quantized;
    to_float to_float;
    void *from_float_ref;
} ggml_type_traits;
typedef void (*vec_dot)(int n, float *sum, size_t, const void *x, size_t, const void *y, size_t, int count);
typedef struct {
    void *from_float;
    vec_dot vec_dot;
    int32_t vec_dot_type;
    int64_t nrows;
} ggml_type_traits_cpu;
const ggml_type_traits *ggml_get_type_traits(int type);
const ggml_type_traits_cpu *ggml_get_type_traits_cpu(int type);
size_t ggml_row_size(int type, int64_t elements);
bool ggml_quantize_requires_imatrix(int type);
void ggml_quantize_init(int type);
size_t ggml_quantize_chunk(int type, const float *src, void *dst, int64_t start, int64_t rows, int64_t columns,
                           const float *imatrix);
int malloc_trim(size_t pad);
int madvise(void *start, size_t length, int advice);
"""

_log: deque[str] = deque(maxlen=8)
_callbacks: list[Any] = []


def forget_errors() -> None:
    _log.clear()


def last_error() -> str:
    """The last error llama.cpp logged since `forget_errors`, on one line, without the C function's name."""
    lines = [" ".join(line.split(": ", 1)[-1].split()) for line in _log if line.strip()]
    return lines[0] if lines else "llama.cpp gave no reason"


def extension_file() -> Path:
    """The extension module of xllamacpp, found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = (spec.submodule_search_locations if spec else None) or ()
    files = [file for folder in folders for end in ("so", "pyd") for file in Path(folder).glob(f"{PACKAGE}*.{end}")]
    if not files:
        raise ModelError(f"the llama.cpp engine needs {PACKAGE}; run: {INSTALL}")
    return files[0]


@cache
def library() -> tuple[Any, Any]:
    """(ffi, lib): opened once per process, silenced and checked. Raises ModelError if the layout is not ours."""
    from fivefold.engines._llama_ffi import ffi

    file = extension_file()
    try:
        lib = ffi.dlopen(str(file))
        check_layout(ffi, lib)
    except (OSError, ffi.error) as error:
        raise ModelError(f"{file.name} does not export llama.cpp's C interface ({error}); run: {INSTALL}") from None

    def listen(level: int, text: Any, _: Any) -> None:
        message = ffi.string(text).decode("utf-8", "replace")
        if level == ERROR_LEVEL:
            _log.append(message)
        elif level == CONTINUED and _log:
            _log[-1] += message

    _callbacks.append(ffi.callback("log_callback", listen))
    lib.llama_log_set(_callbacks[0], ffi.NULL)
    lib.llama_backend_init()
    return ffi, lib


def give_back() -> None:
    """Return to the system what only loading needed; nothing changes but memory.

    Reading a file leaves 8 MB of its vocabulary and of buffers, freed, in the heap. Of the library's own pages 4 MB
    (symbols, relocations, initialisers) are not used again: those equal to the file are let go, and read from it again
    when they are needed after all.
    """
    ffi, lib = library()
    with contextlib.suppress(ffi.error):  # only glibc keeps what is freed, and only glibc has this function
        lib.malloc_trim(0)
    for first, last in _clean(str(extension_file())):
        lib.madvise(ffi.cast("void *", first), last - first, DONT_NEED)


def _clean(file: str) -> Iterator[tuple[int, int]]:
    """Mapped address ranges of `file` in which this process has changed no page, where the system tells (Linux)."""
    smaps = Path("/proc/self/smaps")
    place: tuple[int, int] | None = None
    with smaps.open(encoding="utf-8", errors="replace") if smaps.is_file() else contextlib.nullcontext(()) as lines:
        for line in lines:
            name, *rest = line.strip().split(maxsplit=5)
            if not name.endswith(":"):
                first, last = (int(end, 16) for end in name.split("-"))
                place = (first, last) if len(rest) == 5 and rest[4] == file else None
            elif place and name == "Anonymous:" and rest[0] == "0":
                yield place


def installed() -> str:
    """The version of the wheel. (`importlib.metadata` takes 6 MB, mostly for reading e-mail headers.)"""
    found = [folder.name for folder in extension_file().parents[1].glob(f"{PACKAGE}-*.dist-info")]
    return found[0].removeprefix(f"{PACKAGE}-").removesuffix(".dist-info") if found else "unknown"


def compiled() -> str:
    """The text of `_llama_ffi.py`."""
    import tempfile

    from cffi import FFI

    ffi = FFI()
    ffi.set_source("fivefold.engines._llama_ffi", None)
    ffi.cdef(DECLARATIONS)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ffi.py"
        ffi.emit_python_code(str(file))
        code = file.read_text(encoding="utf-8").split("\n", 1)[1]
    about = "Written by `python -m fivefold.engines._llama_abi` from its DECLARATIONS."
    return f'"""{about}"""\n# ruff: noqa\n# mypy: ignore-errors\n{code}'


def check_layout(ffi: Any, lib: Any) -> None:
    """Compare default parameters and type traits with those of release b11549. Raises ModelError on a difference."""
    model, context = lib.llama_model_default_params(), lib.llama_context_default_params()
    readings = {
        "model": (model, {"split_mode": 1, "main_gpu": 0, "kv_overrides": ffi.NULL, "vocab_only": False,
                          "check_tensors": False, "use_extra_bufts": True, "no_alloc": False}),
        "context": (context, {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_outputs_max": 0,
                              "rope_scaling_type": -1, "flash_attn_type": -1, "yarn_beta_fast": -1.0,
                              "yarn_orig_ctx": 0, "defrag_thold": -1.0, "type_k": 1, "type_v": 1,
                              "embeddings": False, "offload_kqv": True, "op_offload": True, "swa_full": True,
                              "kv_unified": False, "n_samplers": 0}),
        "q4_0": (lib.ggml_get_type_traits(2), {"blck_size": 32, "type_size": 18, "is_quantized": True}),
        "q6_k": (lib.ggml_get_type_traits(14), {"blck_size": 256, "type_size": 210, "is_quantized": True}),
        "q4_0 on this CPU": (lib.ggml_get_type_traits_cpu(2), {"vec_dot_type": 8}),
    }
    for name, (struct, expected) in readings.items():
        for field, value in expected.items():
            if getattr(struct, field) != value:
                raise ModelError(
                    f"{PACKAGE} {installed()} holds another llama.cpp than this engine was written for ({name}"
                    f" {field} reads {getattr(struct, field)}, not {value}); run: {INSTALL}"
                )


if __name__ == "__main__":
    Path(__file__).with_name("_llama_ffi.py").write_text(compiled(), encoding="utf-8")
