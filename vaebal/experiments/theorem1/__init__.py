"""The affine landscape."""
