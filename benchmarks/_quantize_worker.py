"""Weight quantization by llm-compressor or auto-round, for `quantize_peers.py`; runs in the peers' own interpreter.

    python _quantize_worker.py METHOD MODEL_FOLDER TOKENS.npy OUT.safetensors SETTINGS_JSON

Writes the parameters as they compute after quantization (rounded matrices turned back to float; of auto-round, which
casts the model to 16 bits, its linear layers alone) and prints one line of JSON: seconds from the model's folder to the
finished model, imports left out, and peak memory.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


def peak() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def compressor(method: str, folder: str, tokens: Any, wish: dict[str, Any]) -> tuple[Any, float]:
    """RTN, GPTQ or AWQ of llm-compressor. Its AWQ pins memory, which needs an accelerator: left out here."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM, AutoTokenizer

    IntermediatesCache.pin_memory = lambda *_: None
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = QuantizationArgs(num_bits=wish["bits"], type="int", symmetric=wish["symmetric"], strategy="group",
                               group_size=wish["group"])
    groups = {"config_groups": {"all": QuantizationScheme(targets=["Linear"], weights=weights)}, "ignore": ["lm_head"]}
    recipe: list[Any] = {
        "rtn": lambda: [QuantizationModifier(**groups)],
        "gptq": lambda: [GPTQModifier(**groups)],
        "awq": lambda: [AWQModifier(), QuantizationModifier(**groups)],
    }[method]()
    data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()})
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=tokens.shape[1],
            num_calibration_samples=len(tokens), processor=AutoTokenizer.from_pretrained(folder))
    seconds = time.perf_counter() - start
    for part in model.modules():
        scheme = getattr(part, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            part.weight.data = fake_quantize(part.weight.data, part.weight_scale.data,
                                             getattr(part, "weight_zero_point", None), scheme.weights)
    return model, seconds


def autoround(folder: str, tokens: Any, wish: dict[str, Any]) -> tuple[Any, float]:
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    maker = AutoRound(
        model, AutoTokenizer.from_pretrained(folder), bits=wish["bits"], group_size=wish["group"],
        sym=wish["symmetric"], dataset=[torch.tensor(row)[None] for row in tokens], nsamples=len(tokens),
        seqlen=tokens.shape[1], iters=wish["iterations"], batch_size=wish["batch"], device_map="cpu",
    )
    model, _ = maker.quantize()
    seconds = time.perf_counter() - start
    for part in model.modules():
        if isinstance(part, torch.nn.Linear) and getattr(part, "scale", None) is not None:
            part.weight.data = on_grid(part.weight.data.float(), part.scale, part.zp)
    return model, seconds


def on_grid(weight: torch.Tensor, scale: torch.Tensor, zero: Any) -> torch.Tensor:
    """auto-round leaves bfloat16 weights: the codes they stand for times the scales it stores, in float32."""
    rows = len(weight)
    cells, step = weight.view(rows, -1, weight.numel() // scale.numel()), scale.float().view(rows, -1, 1)
    zero = zero.float().view(rows, -1, 1) if isinstance(zero, torch.Tensor) else zero
    return (((cells / step + zero).round() - zero) * step).view(rows, -1)


def main() -> None:
    method, folder, given, out, settings = sys.argv[1:]
    torch.manual_seed(0)
    wish = json.loads(settings)
    torch.set_num_threads(wish["threads"])
    tokens = np.load(given)
    told, sys.stdout = sys.stdout, sys.stderr
    if method == "autoround":
        model, seconds = autoround(folder, tokens, wish)
    else:
        model, seconds = compressor(method, folder, tokens, wish)
    most = peak()
    from safetensors.torch import save_file

    found = {k.replace(".orig_layer", ""): v for k, v in model.state_dict().items()}
    plain = {k: v.float().contiguous().clone() for k, v in found.items()
             if k.endswith((".weight", ".bias")) and not k.startswith("lm_head")
             and (method != "autoround" or "_proj." in k)}
    save_file(plain, out)
    print(json.dumps({"seconds": seconds, "peak": most}), file=told, flush=True)


if __name__ == "__main__":
    main()
