"""From balance to samples (Tables 3 and 4): the fields, their meaning and their defaults."""

import ml_collections

from vaebal.experiments.schema import data_section

# Fields that change no number: where things lie, how often they are saved or shown.
FREE = frozenset(
    {
        *("data.dir", "data.folder", "data.bad", "train.epochs_per_checkpoint"),
        *("eval.inception_weights", "eval.pictures", "eval.samples_only"),
    }
)


def defaults(name: str) -> ml_collections.ConfigDict:
    """Every field; configs/*_generation.py change a few."""
    config = ml_collections.ConfigDict()
    config.experiment = "generation"
    config.name = name

    config.data = data_section("digits")

    train = config.train = ml_collections.ConfigDict()  # shared by all stages
    train.seeds = (0, 1, 2)  # each a whole pipeline, the autoencoder included
    train.batch_size = 256
    train.final_learning_rate = 2e-5  # after cosine decay
    train.warmup_steps = 200
    train.activation = "silu"
    train.epochs_per_checkpoint = 25

    ae = config.ae = ml_collections.ConfigDict()  # the deterministic autoencoder
    ae.network = "mlp"  # or "conv", from 32 pixels on
    ae.codes = 16  # d tilde; kappa of both VAEs is the same
    ae.width = 512  # conv: channels of the finest scale
    ae.layers = 4  # mlp: of the encoder
    ae.blocks = 2  # residual blocks of the decoder (conv: of each scale, on both sides)
    ae.patch = 4  # conv: side of the patches that the first layer reads
    ae.epochs = 100
    ae.learning_rate = 1e-3
    ae.clip_norm = 200.0

    config.vae, config.vae_plus = _vaes()

    # A first VAE under the adaptive homotopy: latents are opened one by one, then it goes on at
    # their number with gamma in closed form.
    balanced = config.balanced = ml_collections.ConfigDict()
    balanced.batch_size = 100
    balanced.epochs = 100  # while latents are opened
    balanced.settled_epochs = 50
    balanced.learning_rate = 3e-3
    balanced.settled_learning_rate = 1e-3
    balanced.final_learning_rate = 2e-6  # of both
    balanced.clip_norm = 20.0  # of gamma times the gradient
    balanced.beta2 = 0.99  # Adam's
    balanced.weight_decay = 0.1  # AdamW's, of all matrices but the affine skips
    balanced.fastest = 2e-3  # nats of log gamma a step, at most
    balanced.patience = 750  # steps without progress before the next latent opens

    # Flow matching on the same latents, another second stage; its rate decays as the others' do.
    flow = config.flow = ml_collections.ConfigDict()
    flow.epochs = 0  # 0: none
    flow.batch_size = 256
    flow.width = 256
    flow.blocks = 3
    flow.learning_rate = 1e-3
    flow.clip_norm = 1.0

    wae = config.wae = ml_collections.ConfigDict()  # the same network as the first VAE
    wae.width = 256
    wae.layers = 3
    wae.blocks = 2
    wae.epochs = 100
    wae.learning_rate = 1e-3
    wae.clip_norm = 200.0
    wae.weight = 100.0  # lambda, against the error summed over pixels

    # The network whose penultimate features "FD (classifier)" is measured in, where the data has
    # labels or factors.
    classifier = config.classifier = ml_collections.ConfigDict()
    classifier.features = 64
    classifier.width = 256
    classifier.epochs = 20
    classifier.learning_rate = 1e-3
    classifier.clip_norm = 20.0

    config.eval = _evaluation()
    return config


def _vaes() -> tuple[ml_collections.ConfigDict, ml_collections.ConfigDict]:
    # The first VAE, on standardised codes. Its error is measured in "pixels" through the frozen
    # decoder (prescription 3), or in "codes"; "images": a VAE straight on images, the autoencoder's
    # network with skips. "balanced codes", "balanced images": under the adaptive homotopy, see
    # `balanced`. Every space listed gives a VAE and a VAE+.
    vae = ml_collections.ConfigDict()
    vae.spaces = ("pixels", "codes", "balanced codes", "balanced images")
    vae.width = 256
    vae.layers = 3
    vae.blocks = 2
    vae.epochs = 100
    vae.learning_rate = 1e-3
    vae.clip_norm = 20.0  # of gamma times the gradient
    vae.log_var_init = 0.0
    vae.gamma = 1.0  # where gamma starts, as a share of the target's variance per dimension
    vae.gamma_rate = 5e-3  # at most so many nats of log gamma a step: the homotopy's speed

    # The second VAE, on z ~ q(z|x), drawn anew in every step.
    plus = ml_collections.ConfigDict(vae.to_dict())
    del plus.spaces
    # z has about the prior's variance, where gamma starts, and so total collapse is a minimum:
    # latents that start informative find the way down. (On the digits, gamma from a tenth of that
    # on left the distance at 7.5 instead of 5 to 6.)
    plus.log_var_init = -2.0
    return vae, plus


def _evaluation() -> ml_collections.ConfigDict:
    evaluation = ml_collections.ConfigDict()
    evaluation.reference_images = 0  # training images that all are compared with; 0: every one
    evaluation.samples = 0  # test images used, and images generated; 0: as many as test images
    evaluation.parts = 5  # subsets, for the spread of Fréchet distances
    evaluation.bins = (100, 200, 300)  # K of NDB/K
    evaluation.whiten = False  # of NDB's distances; only where no pixel is nearly constant
    evaluation.fid = False  # real Inception features; needs their weights
    evaluation.inception_weights = ""  # "": $VAEBAL_INCEPTION_WEIGHTS or ~/.cache/vaebal
    evaluation.block = 500  # images computed at a time
    evaluation.pictures = 12
    # True: figures show samples alone, no image of the data and nothing made from one.
    evaluation.samples_only = False
    return evaluation
