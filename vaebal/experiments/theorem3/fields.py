"""Theorem 3's experiment: its fields, their meaning and their defaults."""

import ml_collections


def defaults(name: str) -> ml_collections.ConfigDict:
    """Every field, as configs/theorem3.py has it."""
    config = ml_collections.ConfigDict()
    config.experiment = "theorem3"
    config.name = name

    # Formulas as vaebal.theory.penalties.named reads them.
    linear = config.linear = ml_collections.ConfigDict()
    linear.penalties = (
        *("u", "log(1+u)", "u/(u+1)"),  # bounded slopes, all 1 at zero
        *("u^0.75", "sqrt(u)", "u^0.25"),  # unbounded, on both sides of the threshold
        "log(u+1e-6)",  # bounded, but nearly infinite
        "I[u>1e-8]",  # evaluated on the others' solutions
    )
    linear.kappas = (3, 6, 12)
    linear.seeds = (0, 1, 2, 3, 4)  # of the data and the starts
    linear.starts = 6  # random decoders; the one that ends lowest counts
    linear.examples = 60
    linear.dim = 10
    linear.rank = 3
    linear.steps = 5000
    # Smoothing eps of h(u + eps), in units of the data's mean square norm: the homotopy
    # falls from start to end, the comparison is at its end from the first step.
    linear.smoothing_start = 1.0
    linear.smoothing_end = 1e-14
    linear.zero_error = 1e-9  # of the data's mean square
    linear.active_share = 1e-6  # of the data's mean square norm

    config.power = ml_collections.ConfigDict()  # u^p, on the linear part's data
    config.power.exponents = (0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9, 1.0)
    config.power.kappa = 6

    config.counterexamples = ml_collections.ConfigDict()  # dim and rank as above
    config.counterexamples.variance = 1.0  # of each of the data's r directions

    digits = config.digits = ml_collections.ConfigDict()
    digits.penalties = ("u", "log(1+u)", "sqrt(u)", "u^0.25", "log(u+1e-6)")
    digits.ranks = (5, 64)  # principal components kept; 64 is the digits as they are
    digits.kappa = 16
    digits.seeds = (0, 1, 2)
    digits.width = 64
    digits.encoder_layers = 3
    digits.decoder_layers = 2
    digits.activation = "silu"
    digits.steps = 1000
    digits.learning_rate = 5e-3
    digits.smoothing_start = 1.0
    digits.smoothing_end = 1e-6
    digits.smoothing_share = 0.7  # of the steps, over which it falls
    # Started where the homotopy ends, too: what it is good for.
    digits.without_homotopy = ("sqrt(u)", "log(u+1e-6)")
    digits.zero_error = 1e-3  # of the pixels' variance
    digits.active_share = 1e-4  # of the images' variance
    return config
