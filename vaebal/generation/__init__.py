"""From balance to samples: the stages after a VAE, and the features that judge them."""
