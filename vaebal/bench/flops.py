"""Model FLOPs, counted from the layers that are matrix products; a multiply-add is two.

All else (activations, loss, Adam, noise, metrics) counts as nothing.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from vaebal.models import GaussianVAE
from vaebal.models.nets import MLPEncoder

# Layers of a dense encoder that read the data, which get no gradient.
READ_DATA = ("encoder/layer1", "encoder/affine")


def forward_flops(model: GaussianVAE) -> dict[str, int]:
    """Of one image's pass through each Dense and Conv layer, by the layer's path.

    A kernel is applied once at every output position: of a Dense layer on vectors there is one.
    Windows that reach over the border count in full.
    """

    def outputs_and_params(key):
        return model.init_with_output(
            key,
            jnp.zeros((1, model.outputs)),
            jnp.zeros((1, model.latents)),
            capture_intermediates=lambda layer, _: isinstance(layer, nn.Dense | nn.Conv),
            mutable=["params", "intermediates"],
        )[1]

    shapes = jax.eval_shape(outputs_and_params, jax.random.key(0))
    params = flatten_dict(shapes["params"], sep="/")
    counted = {}
    for name, calls in flatten_dict(shapes["intermediates"], sep="/").items():
        layer = name.removesuffix("/__call__")
        positions = sum(math.prod(output.shape[:-1]) for output in calls)
        counted[layer] = 2 * positions * params[f"{layer}/kernel"].size
    return counted


def step_flops(model: GaussianVAE) -> int:
    """Of one training step per image.

    Three products a layer: x W forward, x^T g for the kernel's gradient, g W^T for its input's.
    What reads the data in a dense net spares the last; the other nets centre them first, by a
    parameter that gets a gradient.
    """
    counted = forward_flops(model)
    dense = isinstance(model.encoder, MLPEncoder)
    spared = sum(counted.get(layer, 0) for layer in READ_DATA) if dense else 0
    return 3 * sum(counted.values()) - spared


def decoder_flops(model: GaussianVAE) -> int:
    """Of decoding one z."""
    counted = forward_flops(model)
    return sum(flops for name, flops in counted.items() if not name.startswith("encoder/"))
