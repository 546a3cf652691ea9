"""Everything that claims to find the number of latents, on the same data."""
