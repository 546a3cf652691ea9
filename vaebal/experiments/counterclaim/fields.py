"""The counter-claims: their fields, their meaning and their defaults."""

import ml_collections

# Fields that change no number: how often runs are told of and saved.
FREE = frozenset({"train.epochs_per_chunk", "train.epochs_per_checkpoint"})


def defaults(name: str) -> ml_collections.ConfigDict:
    """Every field; the defaults are Koehler et al.'s sigmoid sets."""
    config = ml_collections.ConfigDict()
    config.experiment = "counterclaim"
    config.name = name
    # "theirs": their nets as they train them. "theirs, adaptive": the same nets under the adaptive
    # homotopy. "ours, adaptive", "ours, learned RATE": the network of `vaebal.fit`.
    config.arms = ("theirs", "theirs, adaptive", "ours, adaptive", "ours, learned 1e-1")

    data = config.data = ml_collections.ConfigDict()
    # "sigmoid": (z, sigmoid(a'z), 0 ...), z normal in r dimensions; "sphere": of r coordinates,
    # padded by zeros; "mixture": a sigmoid of a linear image of a Gaussian mixture in r dimensions.
    data.kind = "sigmoid"
    data.ranks = (3, 3, 5, 5, 7, 7)  # r, of every setting
    data.zeros = (3, 13, 16, 5, 7, 20)  # features of it that are 0
    data.kappas = (6, 8, 16, 10, 13, 24)
    data.seeds = (69, 24, 48)
    data.tests = 5_000
    # log gamma at the start, of their nets; more than one: all arms start there.
    data.starts = (-3.0,)

    model = config.model = ml_collections.ConfigDict()
    model.hidden = ()  # widths of their hidden layers, of encoder and decoder
    model.width = 64  # of our network
    model.blocks = 2

    train = config.train = ml_collections.ConfigDict()
    train.seed = 0
    train.batch_size = 100
    train.their_steps = 150_000
    train.their_rate = 1e-4  # Adam's, constant
    train.their_gamma_speed = 3.0  # how many times as fast log gamma moves as a weight
    train.steps = 20_000  # ours
    train.learning_rate = 3e-3
    train.patience = 750
    train.epochs_per_chunk = 20
    train.epochs_per_checkpoint = 500
    return config
