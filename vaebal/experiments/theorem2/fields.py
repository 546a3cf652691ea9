"""Theorem 2's experiment: its fields, their meaning and their defaults."""

import ml_collections


def defaults(name: str) -> ml_collections.ConfigDict:
    """Every field, as configs/theorem2.py has it."""
    config = ml_collections.ConfigDict()
    config.experiment = "theorem2"
    config.name = name

    config.data = ml_collections.ConfigDict()  # drawn anew for every seed
    config.data.dim = 16
    config.data.examples = 64
    config.data.variances = (4.0, 2.0, 1.0, 0.5)  # along orthogonal directions, exactly

    config.model = ml_collections.ConfigDict()
    config.model.skips = ("residual+affine", "residual", "none")
    config.model.blocks = (1, 3)  # of two decoder layers each
    config.model.kappas = (4, 16)
    config.model.width = 16
    config.model.encoder_layers = 3
    config.model.activation = "silu"

    # Nets that differ from the first of each list in one thing.
    config.certificate = ml_collections.ConfigDict()
    config.certificate.activations = ("silu", "relu", "gelu", "tanh", "softplus")
    config.certificate.depths = (2, 1, 6)  # encoder layers, and decoder blocks
    config.certificate.widths = (16, 4, 64)
    config.certificate.kappa = 4
    config.certificate.gamma = 0.1

    config.curvature = ml_collections.ConfigDict()
    config.curvature.kappa = 2
    config.curvature.gammas = (0.3, 3.0, 5.0)  # the last above every variance

    # From total collapse plus delta times a normal draw; both phases last so many steps.
    config.train = ml_collections.ConfigDict()
    config.train.seeds = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
    config.train.delta = 1e-3
    config.train.steps = 500
    config.train.learning_rate = 5e-3  # of Adam, constant
    config.train.clip_norm = 20.0  # of gamma times the gradient
    # Half an octave apart, so that two lie between any two neighbouring variances.
    config.train.gammas = (4.757, 3.364, 2.378, 1.682, 1.189, 0.841, 0.595, 0.42)
    config.train.gamma_rate = 0.02  # nats of log gamma a step at most, once released

    # Plain gradient descent: its way out is the linear theory's.
    config.descent = ml_collections.ConfigDict()
    config.descent.kappa = 4
    config.descent.gammas = (1.189, 0.1)
    config.descent.learning_rate = 0.05  # times gamma times the gradient
    config.descent.steps = 2500
    return config
