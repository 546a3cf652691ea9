"""Which latents are functions of the others."""

import numpy as np
from sklearn.metrics.pairwise import euclidean_distances

NEIGHBOURS = 10
MOST_LATENTS = 64  # looked at: a crowd is seen by any of its members


def told_by_others(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The share of each latent's variance that the others tell, with standard errors.

    Each code is told by the mean of those that are nearest in the other latents, all in units of
    their standard deviations: 1 where a latent is a function of the others, about 0 (down to
    -1 / NEIGHBOURS) where it is independent of them. On closed curves and surfaces it is near 0
    too: of the two latents that a circle takes, one leaves the other's sign open.

    Args:
      codes: [N, K]; rows that repeat are taken once, as they would tell themselves.

    Returns:
      Two arrays [K]; zeros where there is one latent, or there are too few rows; NaN for latents
      that do not vary, and for those beyond the MOST_LATENTS of largest variance.
    """
    codes = np.unique(np.asarray(codes, np.float64), axis=0)
    size, latents = codes.shape
    if latents < 2 or size <= NEIGHBOURS:
        return np.zeros(latents), np.zeros(latents)
    spread = codes.std(0)
    looked_at = np.argsort(-spread)[:MOST_LATENTS]
    looked_at = looked_at[spread[looked_at] > 0]
    codes = (codes - codes.mean(0)[None, :]) / np.where(spread > 0, spread, 1.0)[None, :]
    distances = euclidean_distances(codes, squared=True)
    np.fill_diagonal(distances, np.inf)  # no code tells itself
    told, errors = np.full((2, latents), np.nan)
    for latent in looked_at:
        own = codes[:, latent]
        without = distances - np.square(own[:, None] - own[None, :])
        near = np.argpartition(without, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
        missed = np.square(own[near].mean(1) - own)
        told[latent], errors[latent] = 1 - missed.mean(), missed.std(ddof=1) / np.sqrt(size)
    return told, errors
