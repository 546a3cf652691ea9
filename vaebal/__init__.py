"""The regularization balance of autoencoder-based generative models, in JAX and Flax.

What is named here is the contract; everything else may move.

  fit, BalancedVAE, load   a VAE in balance on your data
  diagnose, Certificate    is a VAE, of any framework, balanced?
  implied_gamma, implied_beta   the decoder variance that a loss implies, and back
  homotopy                 how gamma moves, for your own training loop
"""

import importlib
from typing import Any

_HOMES = {
    "BalancedVAE": "vaebal.estimator",
    "Certificate": "vaebal.diagnosis",
    "diagnose": "vaebal.diagnosis",
    "fit": "vaebal.estimator",
    "homotopy": "",
    "implied_beta": "vaebal.diagnosis",
    "implied_gamma": "vaebal.diagnosis",
    "load": "vaebal.estimator",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    # On demand: importing vaebal imports neither JAX nor scikit-learn.
    if name not in _HOMES:
        raise AttributeError(f"module 'vaebal' has no attribute {name!r}")
    if not _HOMES[name]:
        return importlib.import_module(f"vaebal.{name}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
