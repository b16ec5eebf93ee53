"""Pruning by llm-compressor, for `prune_peers.py`; runs in the peer's own interpreter.

    python _prune_worker.py METHOD MODEL_FOLDER TOKENS.npy OUT.safetensors SETTINGS_JSON

METHOD is "sparsegpt" or "wanda". Writes every parameter after pruning and prints one line of JSON: seconds from the
model's folder to the finished model, imports left out, and peak memory.
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


def pruned(method: str, folder: str, tokens: Any, wish: dict[str, Any]) -> tuple[Any, float]:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM, AutoTokenizer

    IntermediatesCache.pin_memory = lambda *_: None
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kind = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[method]
    recipe = kind(sparsity=wish["sparsity"], mask_structure=wish["structure"], ignore=["re:.*lm_head"])
    data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()})
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=tokens.shape[1],
            num_calibration_samples=len(tokens), processor=AutoTokenizer.from_pretrained(folder))
    return model, time.perf_counter() - start


def main() -> None:
    method, folder, given, out, settings = sys.argv[1:]
    torch.manual_seed(0)
    wish = json.loads(settings)
    torch.set_num_threads(wish["threads"])
    told, sys.stdout = sys.stdout, sys.stderr
    model, seconds = pruned(method, folder, np.load(given), wish)
    most = peak()
    from safetensors.torch import save_file

    save_file({k: v.float().contiguous().clone() for k, v in model.state_dict().items()
               if k.endswith((".weight", ".bias")) and not k.startswith("lm_head")}, out)
    print(json.dumps({"seconds": seconds, "peak": most}), file=told, flush=True)


if __name__ == "__main__":
    main()
