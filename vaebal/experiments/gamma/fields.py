"""The experiment on gamma's descent: its fields, their meaning and their defaults."""

import ml_collections

from vaebal.experiments.schema import data_section

# Fields that change no number: where things lie, how often they are saved or shown. (The last
# places arrays on devices, as the number of devices does: rounding at most.) Not
# train.device_bytes: what trains together follows from it, and checkpoints are of what does.
FREE = frozenset(
    {
        *("data.dir", "data.folder", "data.bad", "eval.pictures", "eval.samples_only"),
        *("train.epochs_per_chunk", "train.epochs_per_checkpoint", "train.shard_parameters"),
    }
)


def defaults(name: str) -> ml_collections.ConfigDict:
    """Every field of the experiment on gamma's descent; configs/*_gamma.py change a few."""
    config = ml_collections.ConfigDict()
    config.experiment = "gamma"
    config.name = name

    data = config.data = data_section("rendered")
    del data.rank
    data.ranks = (2, 4, 6, 8, 10, 12)  # r, where we draw the images ourselves
    data.test_size = 2_000

    config.model, config.train = _model(), _train()
    config.eval = ml_collections.ConfigDict()
    config.eval.block = 500  # images evaluated at a time
    config.eval.train_images = 5_000  # on which gamma's residual is measured
    config.eval.mmd_samples = 2_000
    config.eval.nll_samples = 0  # S of the importance-weighted NLL; 0: it is not measured
    # Test images on which a tighter bound, by the Laplace approximation, is set beside; 0: none.
    config.eval.laplace_images = 0
    config.eval.pictures = 12
    # True: figures show samples alone, no image of the data and nothing made from one.
    config.eval.samples_only = False
    return config


def _model() -> ml_collections.ConfigDict:
    model = ml_collections.ConfigDict()
    model.network = "conv"  # "infogan", "mlp"
    model.latents = 20  # kappa
    model.patch = 4  # conv: side of the patches that the first layer reads and the last writes
    model.pool = 1  # mlp: side of the squares whose means the encoder reads
    model.width = 64  # channels of the finest scale (mlp: of every layer)
    model.blocks = 1  # residual blocks at each scale
    model.activation = "silu"
    model.residual = True  # skips between decoder layers
    model.affine_skip = True  # eq. 5's skip from z to x
    model.encoder_skip = False  # mlp: and one from x to the posterior mean, its mirror
    # "tensorfloat32": products as an Nvidia GPU takes float32, for gamma above 1e-5; "bfloat16":
    # of products' factors, for gamma above 1e-4.
    model.products = "float32"
    # Blocks of "conv" keep their inputs alone and are computed anew for the gradient: less
    # memory, about a third more work.
    model.remat = False
    model.log_var_init = 0.0
    # Above the prior's variance sigma^2 grows linearly, not exponentially.
    model.linear_variance = False
    # Where gamma starts; 0: the data's largest variance along any direction, above which
    # total collapse is a minimum (Theorem 1).
    model.gamma = 0.0
    return model


def _train() -> ml_collections.ConfigDict:
    train = ml_collections.ConfigDict()
    # "adaptive" (guarded by the residual's largest variance, released at the end), "adaptive
    # PATIENCE" (with a patience of its own), "guarded" (never released), "learned RATE" (closed
    # form, at most RATE nats of log gamma a step), "adam RATE", "annealed RATE to ARM", "fixed at
    # ARM", "held GAMMA" (from the start), "settled after ARM" (as many epochs more, from where that
    # arm ended, with its open latents), "plain RATE after ARM" (from new weights with as many
    # latents, twice the epochs), "plain RATE of K" (with K).
    train.arms = ("adaptive", "fixed at adaptive", "learned 1e-3", "learned 1e-1")
    train.guard = 0.8  # the adaptive gamma stays above so much of the residual's largest variance
    # Steps over which that variance is averaged. gamma never rises again, so of a noisy average the
    # least value counts: fewer examples a batch, or rarer large residuals, need more steps.
    train.guard_memory = 10
    train.release = (0.75, 0.9)  # shares of the steps, between which that guard goes
    # Nats of log gamma a step, at most, of the adaptive arm; .02 or this once the guard goes.
    train.fastest = 0.02
    train.slowest = 2e-4  # and at least, while the guard holds it
    # 0: the adaptive arm has all latents from the start. Else it begins with one, and opens the
    # next where that variance has not fallen for so many steps; one that is still idle when the
    # guard goes is closed again.
    train.patience = 0
    train.seeds = (0, 1, 2, 3, 4)
    train.epochs = 200
    train.batch_size = 100
    train.learning_rate = 3e-3
    train.settled_learning_rate = 1e-3  # of "settled after ARM"
    train.final_learning_rate = 2e-5
    train.warmup_steps = 200
    train.beta2 = 0.999  # Adam's; nearer to 0 where a spike of the loss ends in overflow
    # The adaptive arm's learning rate is at most sqrt(jitter gamma / D); 0: it is not bound. What
    # Adam's noise makes of a decoder column, |w|^2 ~ D rate^2, then stays so far below gamma.
    train.jitter = 0.0
    train.weight_decay = 0.0  # AdamW's, of all matrices but the affine skips
    train.clip_norm = 20.0
    train.epochs_per_chunk = 1
    train.epochs_per_checkpoint = 25
    train.device_bytes = 2**33  # more training images than this are streamed from the host
    train.shard_parameters = False  # True: split over the devices that share a batch
    return train


def one_by_one(config: ml_collections.ConfigDict) -> None:
    """Sets the fields of `gamma` by which the adaptive arm opens latents one by one, in an MLP."""
    config.model.network = "mlp"
    # One latent alone swings widely at first, some to overflow.
    config.model.linear_variance = True
    # The KL term shrinks hidden features that no open latent uses; x does not shrink.
    config.model.encoder_skip = True
    # Where a curve's principal directions are too near each other one latent has to bend around it
    # before the next wakes up. The guard is low enough for an open latent to carry the signal for
    # that (sigma^2 ~ guard); as no idle latent is open it need not leak.
    config.train.patience = 750
    config.train.guard = 0.4
    config.train.guard_memory = 50
    config.train.slowest = 0.0
    config.train.fastest = 2e-3  # no faster than the guard follows where a latent wakes up
    config.train.final_learning_rate = 2e-6
    config.train.beta2 = 0.99  # a spike of the loss is forgotten within a hundred steps


def celeba(name: str, resolution: int, latents: int, quick: bool) -> ml_collections.ConfigDict:
    """The two-run protocol twice: gamma learned at a constant rate, and adaptively."""
    config = defaults(name)
    config.data.name = "celeb_a"  # data.ranks and the sizes are not read: the splits are official
    config.data.resolution = resolution
    config.model.latents = latents
    config.train.arms = (
        *("learned 1e-2", "fixed at learned 1e-2"),
        *("adaptive", "fixed at adaptive"),
    )
    config.train.seeds = (0, 1, 2)
    config.train.epochs = 50
    config.train.epochs_per_checkpoint = 5
    config.eval.mmd_samples = 10_000
    if quick:
        config.name = f"{name}_quick"
        config.model.patch = 8
        config.model.width = 16
        config.train.arms = ("learned 1e-2", "fixed at learned 1e-2")
        config.train.seeds = (0,)
        config.train.epochs = 2
        config.train.epochs_per_checkpoint = 1
        config.eval.mmd_samples = 2_000
    config.eval.nll_samples = 0  # S of the importance-weighted NLL; 0: it is not measured
    return config
