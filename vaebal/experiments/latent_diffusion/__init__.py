"""Latent diffusion in miniature: what a balanced latent space is worth to the prior over it."""
