"""How much each decoder layer can lose: the less, the more of its weights stand out.

With A_ij = |W_ij| ||x_j|| as the score of a weight, a layer's outlier share D is how many of its scores exceed OUTLIER
times their mean. Layers with many hold features that little else makes up for, so they keep more:

    sparsity_l = sparsity - (d_l - mean d),    d = 2 SPREAD (D - min D) / (max D - min D)

The mean over all weights stays what was asked (where no layer would fall below 0 or rise above MOST), and no layer
departs from it by more than 2 SPREAD. One pass over the calibration text, on the model as it is.

Source: Yin et al., Outlier Weighed Layerwise Sparsity (OWL), arXiv 2310.05175, with its 5 and 0.08.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fivefold.techniques._shared.modules import layers, matrix
from fivefold.techniques._shared.passing import column_norms, treat_in_passing

OUTLIER = 5.0
SPREAD = 0.08
MOST = 0.99

Shares = dict[str, float]


def outlier_weighed(module: Any, tokens: NDArray[np.int64], sparsity: float) -> Shares:
    """Name of a linear layer -> its share of zeros, the same within one decoder layer. Changes no weight."""
    home = {id(part): number for number, layer in enumerate(layers(module)) for part in layer.modules()}
    scores: dict[int, list[torch.Tensor]] = {}
    outliers: dict[int, float] = {}
    weights: dict[int, float] = {}

    def close() -> None:
        for number in list(scores):
            every = torch.cat(scores.pop(number))
            weights[number] = len(every)
            outliers[number] = float((every > OUTLIER * every.mean()).sum()) / len(every)

    def look(_: str, part: Any, inputs: torch.Tensor) -> None:
        number = home[id(part)]
        if number not in scores:
            close()
        scores.setdefault(number, []).append((matrix(part).abs().float() * column_norms(inputs)).reshape(-1))

    reached = treat_in_passing(module, tokens, look)
    close()
    shares = spread(outliers, weights, sparsity)
    return {name: shares[home[id(part)]] for name, part in reached.items()}


def spread(outliers: dict[int, float], weights: dict[int, float], sparsity: float) -> dict[int, float]:
    """Layer -> sparsity, from the outlier shares; the mean weighed by `weights` is `sparsity`."""
    low, high = min(outliers.values()), max(outliers.values())
    d = {n: 2 * SPREAD * (share - low) / (high - low or 1.0) for n, share in outliers.items()}
    mean = sum(d[n] * weights[n] for n in d) / sum(weights.values())
    return {n: min(MOST, max(0.0, sparsity - (d[n] - mean))) for n in d}
