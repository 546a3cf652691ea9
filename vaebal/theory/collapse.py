"""Theorem 2: the stationary points of a deep Gaussian VAE where latents are switched off.

Latent j is collapsed where column j of the decoder's first layer and row j of the
encoder's last layers for mu and log sigma^2 are zero (with eq. 5, column j of W_x too).
Two conditions the theorem leaves unsaid: the two heads' biases for j are zero or absent,
and the decoder's part holds in expectation over eps_j: one draw does not vanish, the pair
+-eps_j cancels exactly.

The curvature there. With all latents collapsed the decoder's mean is a constant b, and
the second-order change of -ELBO by latent j's weights is, for b = x_bar,

    |G w|^2 / (2 gamma) - w^T G^T M v / gamma + v^T S v / 2,

with M = E[(x - b) phi^T] and S = E[phi phi^T]: v is the mean head's row for j (and its
bias), acting on the encoder's last features phi; w the decoder weights that read z_j, and
G = [J, I] their effect on x, J the Jacobian of f with respect to its first pre-activation
and I the affine skip's. It is negative for some (w, v) exactly if some direction u that G
reaches has u^T M S^-1 M^T u > gamma |u|^2: if the variance along u that the features
explain linearly exceeds gamma. Skips change G, so how steep the way out is, and that it
is always there: J is small for small weights, and zero behind dead rectifiers. A skip on the other
side, from x to the posterior mean, adds x - x_bar to phi: features that training has shrunk
explain as much as before, but M shrinks with them, and the way out flattens; x does not shrink.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from vaebal.models import GaussianVAE
from vaebal.models.objectives import gaussian_vae_terms
from vaebal.theory.gradients import LATENT_BIASES, LATENT_WEIGHTS, path_name


def _at(axis: int, j: int | slice | None) -> tuple:
    """The index of latent j, or of those of a slice, along `axis`; of all latents for None."""
    return (slice(None),) * axis + (slice(None) if j is None else j,)


def collapse(params: Any, j: int | slice | None = None, *, biases: bool = True) -> Any:
    """`params` moved onto Theorem 2's stationary set for latent j, for several, or for all.

    Args:
      params: of a model built by `mlp_vae`, `conv_vae` or `infogan_vae`, JAX's arrays or NumPy's.
      j: the latent; slice(k, None) for those after the first k, as what was never opened is to be;
        None for total collapse.
      biases: False leaves the heads' biases live, against the theorem's unsaid condition.
    """
    where = LATENT_WEIGHTS | (LATENT_BIASES if biases else {})
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            jnp.asarray(leaf).at[_at(where[path_name(path)], j)].set(0.0)
            if path_name(path) in where
            else leaf
        ),
        params,
    )


def antithetic_loss(
    model: GaussianVAE, params: Any, x: Array, eps: Array, j: int | None = None
) -> Array:
    """Mean -ELBO in nats over the pair eps and eps with eps_j (or all of it) negated.

    Args:
      x: [B, D].
      eps: [B, K].
    """
    mirrored = eps.at[_at(1, j)].multiply(-1.0)

    def loss(eps):
        outputs = model.apply({"params": params}, x, eps)
        return gaussian_vae_terms(x, outputs).negative_elbo.mean()

    return 0.5 * (loss(eps) + loss(mirrored))


def latent_gradients(
    model: GaussianVAE, params: Any, x: Array, eps: Array, j: int, *, antithetic: bool = True
) -> dict[str, Array]:
    """Largest gradient entry of each of Theorem 2's three weights of latent j (and W_x's column).

    Args:
      antithetic: False takes the single draw `eps`, for which the decoder's gradient
        does not vanish.

    Returns:
      {"decoder/first/kernel": max |gradient|, ...} for the weights that the model has.
    """

    def loss(params):
        if antithetic:
            return antithetic_loss(model, params, x, eps, j)
        outputs = model.apply({"params": params}, x, eps)
        return gaussian_vae_terms(x, outputs).negative_elbo.mean()

    gradients = {
        path_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.grad(loss)(params))
    }
    return {
        name: jnp.abs(gradients[name][_at(axis, j)]).max()
        for name, axis in LATENT_WEIGHTS.items()
        if name in gradients
    }


def escape_curvature(
    model: GaussianVAE, params: Any, x: Array, features: Array
) -> tuple[Array, Array]:
    """The most negative curvature at total collapse, predicted from the data and the Jacobian.

    Args:
      model: with gamma; its decoder's mean must be x_bar at z = 0 (see the module's text).
      params: at total collapse.
      x: [B, D].
      features: [B, F], what the encoder's heads read, with a column of ones for a bias.

    Returns:
      The least eigenvalue of the Hessian in latent j's (w, v), the same for every j, and
      the largest variance that the features explain along a reachable direction, in units
      of gamma: above 1 the point is a strict saddle.
    """
    gamma = jnp.exp(model.apply({"params": params}, method="log_gamma"))
    b = model.apply({"params": params}, jnp.zeros((1, model.latents)), method="decode")[0]
    M = (x - b[None, :]).T @ features / len(x)  # [D, F]
    S = features.T @ features / len(x)  # [F, F]

    def read_out(first: Array) -> Array:
        """The decoder's mean at z = e_1 with latent 1's weights `first`: f(first + bias)."""
        moved = params | {
            "decoder": params["decoder"]
            | {
                "first": params["decoder"]["first"]
                | {"kernel": params["decoder"]["first"]["kernel"].at[0].set(first)}
            }
        }
        z = jnp.zeros((1, model.latents)).at[0, 0].set(1.0)
        return model.apply({"params": moved}, z, method="decode")[0]

    width = params["decoder"]["first"]["kernel"].shape[1]
    G = jax.jacobian(read_out)(jnp.zeros(width))  # [D, W]
    if "affine" in params:
        gate = params.get("affine_gate", 1.0)  # of a model that leaves its skip open
        G = jnp.concatenate([G, gate * jnp.eye(len(b))], axis=1)
    cross = -G.T @ M / gamma
    hessian = jnp.block([[G.T @ G / gamma, cross], [cross.T, S]])
    # Variance explained linearly along u in range(G): eigenvalues of P M S^+ M^T P.
    basis, sizes, _ = jnp.linalg.svd(G, full_matrices=False)
    rounding = max(G.shape) * jnp.finfo(G.dtype).eps * sizes.max()
    reached = basis * (sizes > rounding)[None, :]
    explained = reached.T @ M @ jnp.linalg.pinv(S) @ M.T @ reached
    return jnp.linalg.eigvalsh(hessian)[0], jnp.linalg.eigvalsh(explained)[-1] / gamma
