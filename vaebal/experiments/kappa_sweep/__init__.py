"""Table 1: error, NLL and active units against kappa."""
