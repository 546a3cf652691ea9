"""Measures of a trained model: errors, NLL, active units, and distances between distributions."""
