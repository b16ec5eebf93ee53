"""What is shared by the adapters: rounding to a type of llama.cpp, and configs as plain JSON."""

import json

import pytest
import torch

from fivefold.engines._peft import peft
from fivefold.techniques._shared.adapters import _plain, rounded


@pytest.mark.parametrize(("type", "levels", "off"), [("q8_0", 256, 0.51), ("q4_0", 16, 1.01)])
def test_rounding_keeps_a_block_on_its_levels(type: str, levels: int, off: float) -> None:
    """Half a step off at most; a whole one in q4_0, whose levels reach further on one side."""
    torch.manual_seed(0)
    matrix = torch.randn(4, 64)
    blocks = rounded(matrix, type).view(-1, 32)
    assert all(8 < len(block.unique()) <= levels for block in blocks)
    step = blocks.abs().amax(1, keepdim=True) / (127 if levels == 256 else 8)
    assert ((blocks - matrix.view(-1, 32)).abs() <= off * step).all()
    assert torch.equal(rounded(matrix.T.contiguous().T, type), rounded(matrix, type)), "memory order does not matter"


def test_a_config_becomes_plain_json_that_peft_reads_back() -> None:
    config = peft().LoraConfig(r=4, target_modules={"b", "a"}, task_type="CAUSAL_LM")
    told = json.loads(json.dumps(_plain(config.to_dict())))
    assert told["target_modules"] == ["a", "b"] and told["peft_type"] == "LORA"
    again = peft().LoraConfig(**{k: v for k, v in told.items() if k not in ("peft_type", "auto_mapping")})
    assert again.r == 4 and again.target_modules == {"a", "b"}
