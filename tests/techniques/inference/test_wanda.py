from __future__ import annotations

import numpy as np
import pytest
import torch

from fivefold.errors import Misfit, RecipeError
from fivefold.recipe import Recipe
from fivefold.techniques._shared.calibration import windows
from fivefold.techniques._shared.zeros import smallest, smallest_of_groups
from fivefold.techniques.inference.wanda import Wanda
from fivefold.training.module import load_module
from fivefold.weights import read_tensors


def inputs_of(module, name: str, tokens: np.ndarray) -> np.ndarray:
    kept = []
    part = module.get_submodule(name)
    handle = part.register_forward_pre_hook(lambda _, args: kept.append(args[0].numpy().reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        module(torch.tensor(tokens))
    handle.remove()
    return np.concatenate(kept).astype(np.float64)


def brute_force(weight: np.ndarray, inputs: np.ndarray, sparsity: float) -> np.ndarray:
    """Row by row, weight by weight."""
    out = weight.copy()
    norms = [float(np.sqrt((inputs[:, j] ** 2).sum())) for j in range(inputs.shape[1])]
    for i, row in enumerate(weight):
        order = sorted(range(len(row)), key=lambda j: abs(float(row[j])) * norms[j])
        for j in order[: int(len(row) * sparsity)]:
            out[i, j] = 0
    return out


MATRICES = {
    "llama": ["model.layers.{}.self_attn.k_proj", "model.layers.{}.mlp.down_proj"],
    "qwen2": ["model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.up_proj"],
    "gpt2": ["transformer.h.{}.attn.c_attn", "transformer.h.{}.mlp.c_proj"],
}


@pytest.mark.parametrize("family", MATRICES)
def test_it_prunes_what_brute_force_prunes_each_layer_seeing_its_pruned_predecessors(tiny, family):
    model = tiny(family, layers=2)
    done = Wanda(sparsity=0.4, windows=2).apply(model)
    tokens = windows(model, 2)
    parent, pruned = load_module(model), load_module(done)
    for depth, source in ((0, parent), (1, pruned)):
        if depth == 1:  # layer 0 as pruned, layer 1 as it was
            state = parent.state_dict()
            source.load_state_dict({k: state[k] if ".1." in k else v for k, v in pruned.state_dict().items()})
        for name in MATRICES[family]:
            place = name.format(depth)
            turned = family == "gpt2"
            before = parent.get_submodule(place).weight.numpy()
            after = dict(read_tensors(done.path))[f"{place}.weight"].numpy()
            want = brute_force(before.T if turned else before, inputs_of(source, place, tokens), 0.4)
            np.testing.assert_array_equal(after.T if turned else after, want)


def test_only_linear_layers_change_and_the_count_is_reported(tiny):
    model = tiny("qwen2")
    done = Recipe.parse("wanda(sparsity=0.25, windows=2)").apply(model)
    before, after = dict(read_tensors(model.path)), dict(read_tensors(done.path))
    assert before.keys() == after.keys()
    changed = {n for n in before if not np.array_equal(before[n].numpy(), after[n].numpy())}
    assert changed == {n for n in before if len(before[n].shape) == 2 and ".layers." in n}
    weights = sum(np.prod(before[n].shape) for n in changed)
    assert done.coverage[-1] == (
        f"wanda: 21 of 21 linear layers, {weights // 4} of {weights} weights are 0; embedding and head kept"
    )
    assert done.path != model.path


@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("4:8", 4, 8)])
def test_patterns_keep_the_best_of_each_group(pattern, n, m):
    scores = torch.rand(16, 48, generator=torch.Generator().manual_seed(1))
    mask = smallest_of_groups(scores, pattern).numpy()
    for row, gone in zip(scores.numpy(), mask, strict=True):
        for start in range(0, 48, m):
            group, cut = row[start : start + m], gone[start : start + m]
            assert cut.sum() == n
            assert group[cut].max() < group[~cut].min()


def test_what_cannot_be_is_refused(tiny):
    with pytest.raises(RecipeError, match="exactly half"):
        Wanda(pattern="2:4", sparsity=0.3)
    with pytest.raises(Misfit, match="multiple of 4, not 6"):
        smallest_of_groups(torch.rand(2, 6), "2:4")
    with pytest.raises(Misfit, match="multiple of 8, not 68"):
        Recipe.parse('wanda(pattern="4:8")').check(tiny(width=68))
    for sparsity in (1.0, -0.1):
        with pytest.raises(RecipeError, match="outside"):
            Wanda(sparsity=sparsity)


def test_nothing_is_pruned_at_zero(tiny):
    model = tiny()
    done = Wanda(sparsity=0.0, windows=1).apply(model)
    after = dict(read_tensors(done.path))
    assert all(np.array_equal(t.numpy(), after[n].numpy()) for n, t in read_tensors(model.path))


@pytest.mark.slow
def test_on_a_real_model_it_beats_magnitude_at_half_the_weights():
    from fivefold import bundled
    from fivefold.errors import DataError
    from fivefold.tasks.text import windows as text_windows
    from fivefold.techniques._shared.modules import linears
    from fivefold.tokenizer import Tokenizer

    try:
        model = bundled.load("smollm2-135m")
        held_out = text_windows(Tokenizer(model.tokenizer_file), "encyclopedia", "evaluation", tokens=256, window=256)
    except DataError as error:
        pytest.skip(str(error))
    tokens = torch.tensor(held_out)

    def log_probabilities(module) -> torch.Tensor:
        with torch.no_grad():
            return module(tokens).logits[0].log_softmax(-1)

    module = load_module(model)
    want = log_probabilities(module)
    Wanda(sparsity=0.5).prune(module, windows(model, 2))
    by_activation = log_probabilities(module)
    module = load_module(model)
    for _, part in linears(module):
        weight = part.weight.data
        weight.masked_fill_(smallest(weight.abs(), weight.numel() // 2), 0)
    by_magnitude = log_probabilities(module)
    wanda, magnitude = (float((want.exp() * (want - got)).sum(-1).mean()) for got in (by_activation, by_magnitude))
    assert wanda < 0.7 * magnitude
