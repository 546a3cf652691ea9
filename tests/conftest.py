"""Shared by all tests: small problems, and JAX set to refuse what is usually a mistake."""

import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from vaebal.models import mlp_vae

os.environ.setdefault("MPLBACKEND", "Agg")
# Shells start jobs in the background with Ctrl-C ignored, and what they start inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# What one worker, test or program that a test starts has compiled, no other compiles again.
COMPILED = {
    "jax_compilation_cache_dir": str(Path(__file__).parent.parent / ".pytest_cache" / "jax"),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
for option, value in COMPILED.items():
    os.environ[option.upper()] = str(value)  # for programs that tests start
    jax.config.update(option, value)
# A [B, 1] against a [B] is a bug here, never a convenience.
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests compile far more than they compute.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def small_vae():
    """Builds the network of Table 1, small: D = 16, K = 5 unless told otherwise."""

    def build(**changes):
        options = {
            "outputs": 16,
            "latents": 5,
            "width": 12,
            "encoder_layers": 3,
            "decoder_blocks": 2,
            "activation": jax.nn.silu,
            "residual": True,
            "affine_skip": True,
        }
        return mlp_vae(**(options | changes))

    return build


@pytest.fixture(scope="session")
def pixels():
    """[96, 16] in [0, 1], of rank about 4; not to be written to."""
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(96, 4)) @ rng.normal(size=(4, 16))
    found = (1 / (1 + np.exp(-raw))).astype(np.float32)
    found.flags.writeable = False
    return found
