"""The kappa sweep on scikit-learn's handwritten digits (8x8, real, no download).

Command: python main.py
Cost: about a minute on two CPU cores, for 5 kappas x 3 skip variants x 3 seeds.
Expected: with both skips about 10 informative dimensions at any kappa >= 16, error
below 1; without skips 4 or 5, error 1.3. See results/digits_kappa/.
"""

import ml_collections

from vaebal.experiments.kappa_sweep import fields


def get_config() -> ml_collections.ConfigDict:
    config = fields.defaults("digits_kappa")
    config.train.seeds = (0, 1, 2)
    config.model.width = 64
    config.train.epochs = 110
    config.train.batch_size = 128
    config.train.learning_rate = 3e-3
    # gamma starts at 1, above the largest variance of any direction of the digits (.7):
    # the whole descent happens in training, and the net without skips loses most latents.
    config.train.gamma_rate = 1e-2
    config.train.epochs_per_chunk = 22
    config.train.epochs_per_checkpoint = 44
    return config
