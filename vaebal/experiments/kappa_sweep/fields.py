"""The kappa sweep: its fields, their meaning and their defaults."""

import ml_collections

from vaebal.experiments.schema import data_section

# Fields that change no number: where things lie, how often they are saved or shown. (The last
# one places arrays on devices, as the number of devices does: rounding at most.)
FREE = frozenset(
    {
        *("data.dir", "data.folder", "data.bad", "eval.pictures"),
        *("train.epochs_per_chunk", "train.epochs_per_checkpoint", "train.shard_parameters"),
    }
)


def defaults(name: str) -> ml_collections.ConfigDict:
    """Every field of the sweep; configs/*.py change a few."""
    config = ml_collections.ConfigDict()
    config.experiment = "kappa_sweep"
    config.name = name

    config.data = data_section("digits")

    model = config.model = ml_collections.ConfigDict()
    model.kappas = (4, 8, 16, 32, 64)
    model.skips = ("residual+affine", "residual", "none")  # also "affine"
    model.width = 512
    model.encoder_layers = 6  # the two heads are the sixth
    model.decoder_blocks = 3  # of two layers each
    # Smooth: with relu and the affine skip the MNIST net stays at PCA's error for 12 epochs.
    model.activation = "silu"
    model.branch_scale = 0.0  # residual blocks start as the identity
    model.weights = 1.0  # kernels start at so many times He's and LeCun's
    model.log_var_init = 0.0  # the posterior starts at the prior's variance
    # Above the prior's variance sigma^2 grows linearly, not exponentially: with hundreds of idle
    # latents one of them overflows sooner or later.
    model.linear_variance = False
    model.gamma = 1.0  # decoder variance: where it starts, or its fixed value
    # "tensorfloat32": products as an Nvidia GPU takes float32, for gamma above 1e-5; "bfloat16":
    # of products' factors, for gamma above 1e-4.
    model.products = "float32"

    train = config.train = ml_collections.ConfigDict()
    train.seeds = (0,)
    train.epochs = 100
    train.batch_size = 256
    train.learning_rate = 1e-3
    train.final_learning_rate = 2e-5
    train.warmup_steps = 200
    train.clip_norm = 20.0  # of gamma times the gradient; stops the rare spike
    train.beta2 = 0.999  # Adam's; nearer to 0 a spike is sooner forgotten
    # "closed_form" (towards the batch's E|x - x_hat|^2 / d), "adam" or "fixed".
    train.gamma_rule = "closed_form"
    train.gamma_rate = 5e-3  # at most so many nats of log gamma a step: the homotopy's speed
    # "all" members train in one program, "none" with another; "auto": "all" on an accelerator and
    # where the nets are small, "none" where one member's products fill a CPU.
    train.stack = "auto"
    train.shard_parameters = False  # True: split over the devices that share a batch
    train.epochs_per_chunk = 1  # in one compiled call; the progress bar's beat
    train.epochs_per_checkpoint = 25

    config.eval = ml_collections.ConfigDict()
    config.eval.nll_samples = 100  # S
    # Test images on which a tighter bound, by the Laplace approximation, is set beside; 0: none.
    config.eval.laplace_images = 0
    config.eval.block = 1000  # images evaluated at a time
    config.eval.pictures = 12
    return config
