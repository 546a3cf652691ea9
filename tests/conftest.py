"""Shared by all tests: small problems, and JAX set to refuse what is usually a mistake."""

import gc
import os
import shutil
import signal
import tempfile

import jax
import numpy as np
import pytest

from vaebal.errors import InputError
from vaebal.models import mlp_vae

os.environ.setdefault("MPLBACKEND", "Agg")
# Each worker has a core; threads that wait for each other on it take two thirds of its time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Shells start jobs in the background with Ctrl-C ignored, and what they start inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# What one worker, test or program that a test starts has compiled, no other compiles again; the
# next session does, unless JAX_COMPILATION_CACHE_DIR names a folder that stays.
# What is asserted of memory and of cores is a CPU's; on an accelerator workers would also share it.
jax.config.update("jax_platforms", os.environ.setdefault("JAX_PLATFORMS", "cpu"))
OWN_CACHE = "JAX_COMPILATION_CACHE_DIR" not in os.environ
COMPILED = {
    "jax_compilation_cache_dir": tempfile.mkdtemp(prefix="vaebal_tests_")
    if OWN_CACHE
    else os.environ["JAX_COMPILATION_CACHE_DIR"],
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
for option, value in COMPILED.items():
    os.environ[option.upper()] = str(value)  # for workers and programs that tests start
    jax.config.update(option, value)
# Tests compile far more than they compute. Half of the time to compile is for kernels that would
# be faster; XLA ends a program whose flags it does not know, so only where these were tried.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # likewise
jax.config.update("jax_disable_most_optimizations", True)
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
GIVEN = os.environ.get("XLA_FLAGS", "")
if jax.__version_info__[:2] == (0, 10) and QUICK not in GIVEN:
    os.environ["XLA_FLAGS"] = f"{GIVEN} {QUICK}"
# A [B, 1] against a [B] is a bug here, never a convenience.
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_unconfigure():
    if OWN_CACHE:
        shutil.rmtree(COMPILED["jax_compilation_cache_dir"], ignore_errors=True)


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


@pytest.fixture(scope="module")
def frozen():
    """What earlier tests keep is looked through no more: a second each time, at the end of many."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def nothing_left_behind(frozen):
    """What a test's garbage has to say it says here, not in the middle of another file's tests."""
    yield
    gc.collect()


@pytest.fixture
def refused(tmp_path):
    """Sees that `run` refuses a config in one sentence that says `said`, and leaves nothing."""

    def check(run, config, said):
        with pytest.raises(InputError) as error:
            run(config, str(tmp_path / "run"))
        assert said in str(error.value)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "run").exists()  # so that the mended config may use it

    return check
