"""Which latents are functions of the others."""

import numpy as np
from sklearn.neighbors import NearestNeighbors

NEIGHBOURS = 10


def told_by_others(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The share of each latent's variance that the others tell, with standard errors.

    Each code is told by the mean of those that are nearest in the other latents, all in units of
    their standard deviations: 1 where a latent is a function of the others, about 0 (down to
    -1 / NEIGHBOURS) where it is independent of them. On closed curves and surfaces it is near 0
    too: of the two latents that a circle takes, one leaves the other's sign open.

    Args:
      codes: [N, K], of latents that vary; rows that repeat are taken once, as they would tell
        themselves.

    Returns:
      Two arrays [K]; zeros where there is one latent, or there are too few rows.
    """
    codes = np.unique(np.asarray(codes, np.float64), axis=0)
    size, latents = codes.shape
    if latents < 2 or size <= NEIGHBOURS:
        return np.zeros(latents), np.zeros(latents)
    codes = (codes - codes.mean(0)[None, :]) / codes.std(0)[None, :]
    told, errors = np.empty(latents), np.empty(latents)
    for latent in range(latents):
        search = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(np.delete(codes, latent, axis=1))
        near = search.kneighbors(return_distance=False)  # of a code itself, which is not its own
        missed = np.square(codes[near, latent].mean(1) - codes[:, latent])
        told[latent], errors[latent] = 1 - missed.mean(), missed.std(ddof=1) / np.sqrt(size)
    return told, errors
