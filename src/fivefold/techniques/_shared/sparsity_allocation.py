"""Dividing a layer's sparsity among the sites that read one tensor, where it changes the layer's output least.

Greedy, in steps of STEP: the next step goes to the site whose last measured rise of the output's squared error, per
weight skipped, is smallest; only the chosen site is measured again. For errors that add up over sites and grow ever
faster with their shares this is the optimum on the grid. The last step is cut so that the weighed mean of the shares is
exactly the target. The trials look at one window of the tokens.

Source: Liu et al., TEAL, arXiv 2408.14690 (its Algorithm 1, here with steps per site and lazy measuring).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fivefold.techniques._shared.activation_sparsity import thresholding

STEP = 0.1
MOST = 0.95

Shares = dict[str, float]


def greedy(error: Callable[[Shares], float], sizes: Mapping[str, int], target: float) -> Shares:
    """Site -> share with sum(size x share) = target x sum(size). `error(shares)` is what the shares cost."""
    shares = dict.fromkeys(sizes, 0.0)
    rise = {site: error({**shares, site: STEP}) / size for site, size in sizes.items()}
    missing = target * sum(sizes.values())
    while missing > 1e-9 * sum(sizes.values()):
        open_ = [site for site in sizes if shares[site] < MOST - 1e-9]
        if not open_:
            break
        site = min(open_, key=rise.__getitem__)
        step = min(STEP, MOST - shares[site], missing / sizes[site])
        shares[site] += step
        missing -= step * sizes[site]
        if missing > 0:
            more = min(STEP, MOST - shares[site])
            now, then = error(shares), error({**shares, site: shares[site] + more})
            rise[site] = (then - now) / (max(more, 1e-9) * sizes[site]) * STEP
    return shares


def allocated(forward: Any, args: Any, kwargs: Any, parts: Mapping[str, Any], target: float) -> Shares:
    """Linear layer of `parts` -> its share, for a decoder layer whose `forward` is about to be called so."""
    args, kwargs = _first(args, args, kwargs), _first(kwargs, args, kwargs)
    sites = _sites(forward, args, kwargs, parts)
    want = _run(forward, args, kwargs)
    sizes = {names[0]: sum(parts[name].weight.numel() for name in names) for names in sites}
    first = {name: names[0] for names in sites for name in names}

    def error(shares: Shares) -> float:
        with thresholding(parts, lambda name: shares[first[name]]):
            return float((_run(forward, args, kwargs) - want).float().square().sum())

    shares = greedy(error, sizes, target)
    return {name: shares[first[name]] for name in first}


def _sites(forward: Any, args: Any, kwargs: Any, parts: Mapping[str, Any]) -> list[list[str]]:
    """Names of the parts that read one tensor, in the order in which they compute."""
    found: list[tuple[Any, list[str]]] = []

    def before(name: str, x: Any) -> None:
        if not found or found[-1][0] is not x:
            found.append((x, []))
        found[-1][1].append(name)

    handles = [
        part.register_forward_pre_hook(lambda _, given, name=name: before(name, given[0]))
        for name, part in parts.items()
    ]
    try:
        _run(forward, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return [names for _, names in found]


def _run(forward: Any, args: Any, kwargs: Any) -> Any:
    out = forward(*args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def _first(value: Any, args: Any, kwargs: Any) -> Any:
    """`value` with every tensor that has one entry per window cut to the first window."""
    import torch

    rows = len(args[0] if args else kwargs["hidden_states"])
    if isinstance(value, torch.Tensor):
        return value[:1] if value.dim() > 1 and len(value) == rows else value
    if isinstance(value, dict):
        return {key: _first(one, args, kwargs) for key, one in value.items()}
    if isinstance(value, tuple):
        return tuple(_first(one, args, kwargs) for one in value)
    return value
