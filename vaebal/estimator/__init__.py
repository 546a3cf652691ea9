"""A VAE in balance on anybody's data: `fit`, and the estimator behind it, `BalancedVAE`."""

from vaebal.estimator.balanced import BalancedVAE, fit, load

__all__ = ["BalancedVAE", "fit", "load"]
