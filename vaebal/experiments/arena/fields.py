"""The arena: its fields, their meaning and their defaults."""

import ml_collections

# Fields that change no number: how often runs are told of and saved, and what is left for another
# start. Not train.members: checkpoints are of what trains together.
FREE = frozenset(
    {
        *("train.epochs_per_chunk", "train.epochs_per_checkpoint"),
        *("eval.report_only", "eval.estimate"),
    }
)


def defaults(name: str) -> ml_collections.ConfigDict:
    """Every field of the arena."""
    config = ml_collections.ConfigDict()
    config.experiment = "arena"
    config.name = name
    # Methods by name, each with a number where it is not to be tuned: see `methods.METHODS`.
    config.methods = (
        *("adaptive", "learned 5e-4", "learned 2e-3", "learned 1e-1", "fixed at adaptive"),
        *("gradient", "beta-VAE", "sigma-VAE", "moving average", "GECO", "ARD-VAE"),
        *("IRMAE", "Least Volume", "log autoencoder"),
        *("TwoNN", "maximum likelihood", "local PCA", "calibrated neighbours"),
    )
    config.data, config.grids = _data(), _grids()

    model = config.model = ml_collections.ConfigDict()
    model.latents = 20  # kappa
    model.width = 128
    model.blocks = 2

    config.train = _train()
    config.eval = ml_collections.ConfigDict()
    config.eval.block = 500  # examples evaluated at a time
    config.eval.mmd_samples = 1_000
    # False: the estimators by neighbours, a CPU's work, are left for another start.
    config.eval.estimate = True
    # True: nothing is trained, and the page tells of what is finished.
    config.eval.report_only = False
    return config


def _data() -> ml_collections.ConfigDict:
    data = ml_collections.ConfigDict()
    data.dim = 192  # D
    data.size = 10_000  # N
    data.tests = 2_000
    data.kinds = ("network", "linear", "rendered")
    data.ranks = (2, 4, 8, 12)  # r
    data.seeds = tuple(range(1, 10))  # every one another data set
    data.rivals = 1  # of these seeds the first so many are the rivals' too
    # Beside these: with noise, with few examples, and where one number is no whole answer.
    data.other_kinds = ("network", "linear")
    data.other_ranks = (2, 4, 8)
    data.noise = ()  # standard deviations
    data.few = ()  # numbers of examples
    data.spheres = ()  # r of a sphere, which lies in r + 1 dimensions
    data.unions = False  # of three linear manifolds of dimension 4
    # The one set on which rivals are tuned, a network manifold, and nothing is shown.
    data.tuning_rank = 4
    data.tuning_seed = 1000
    return data


def _grids() -> ml_collections.ConfigDict:
    """What is tried of every tuned method, four values each."""
    grids = ml_collections.ConfigDict()
    grids["gradient"] = (5e-4, 1e-3, 3e-3, 1e-2)  # Adam's rate on log gamma
    # Of gamma, and of GECO's tolerance, as a share of the data's variance.
    grids["beta-VAE"] = (1e-4, 1e-3, 1e-2, 1e-1)
    grids["GECO"] = (1e-4, 1e-3, 1e-2, 1e-1)
    grids["ARD-VAE"] = (1e-4, 1e-3, 1e-2, 1e-1)
    grids["IRMAE"] = (1, 2, 4, 8)  # linear layers
    grids["Least Volume"] = (1e-2, 3e-2, 1e-1, 3e-1)  # weight of the volume
    grids["log autoencoder"] = (1e-1, 1e-2, 1e-3, 1e-5)  # final eps
    return grids


def _train() -> ml_collections.ConfigDict:
    train = ml_collections.ConfigDict()
    train.seed = 0
    train.steps = 20_000
    train.batch_size = 100
    train.learning_rate = 3e-3
    train.final_learning_rate = 2e-6
    train.warmup_steps = 200
    train.beta2 = 0.99
    train.clip_norm = 20.0
    train.weight_decay = 0.1  # of VAEs; the autoencoders' papers have none
    train.patience = 750  # of the adaptive homotopy
    train.members = 600  # at most so many runs in one program
    train.epochs_per_chunk = 20
    train.epochs_per_checkpoint = 100
    return train
