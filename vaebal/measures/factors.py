"""Whether latents hold the factors that data were drawn from. N examples, K latents, r factors."""

import numpy as np


def factor_r2(
    train_z: np.ndarray, train_factors: np.ndarray, test_z: np.ndarray, test_factors: np.ndarray
) -> list[float]:
    """R^2 of every true factor, predicted from latents [N, K] by their 10 nearest neighbours.

    1: the active latents determine the factor, smoothly; -0.1, the noise of ten neighbours' mean,
    where they know nothing of it, and down to -0.3 of one latent, where the nearest, by the inverse
    of their distances, have most of the weight. 0 without latents, or of a constant factor.
    """
    from sklearn.neighbors import KNeighborsRegressor

    if train_z.shape[1] == 0:
        return [0.0] * test_factors.shape[1]
    found = KNeighborsRegressor(10, weights="distance").fit(train_z, train_factors)
    errors = np.square(found.predict(test_z) - test_factors).mean(0)
    varies = np.ptp(test_factors, axis=0) > 0
    return np.where(varies, 1 - errors / np.where(varies, test_factors.var(0), 1.0), 0.0).tolist()


def factor_shares(z: np.ndarray, factors: np.ndarray, *, bins: int = 10) -> np.ndarray:
    """The share of a latent's variance that one factor alone explains: [N, K], [N, r] -> [K, r].

    The first-order Sobol index, Var(E[z_k | factor]) / Var(z_k), by the variance between `bins`
    bins of as many examples each, less what chance alone puts there (Kelley's epsilon squared), so
    about 0, and now and then below, where they are independent. 0 for a constant latent. Of few
    examples there are fewer bins, of two examples at least.

    Raises:
      ValueError: fewer than 4 examples.
    """
    if len(z) < 4:
        raise ValueError(f"z has {len(z)} examples; give at least 4, for two bins of two.")
    bins = min(bins, len(z) // 2)
    size = len(z) // bins * bins
    shares = np.zeros((z.shape[1], factors.shape[1]))
    for index, factor in enumerate(factors.T):
        held = z[np.argsort(factor)[:size]].reshape(bins, -1, z.shape[1]).astype(np.float64)
        within = held.var(1, ddof=1).mean(0)
        whole = held.reshape(size, -1).var(0, ddof=1)
        constant = np.ptp(held, axis=(0, 1)) == 0  # whose variance rounding may leave above 0
        shares[:, index] = np.where(constant, 0.0, 1 - within / np.where(constant, 1.0, whole))
    return shares
