"""The regularization balance of autoencoder-based generative models, in JAX and Flax."""
