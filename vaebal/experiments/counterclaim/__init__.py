"""Published claims against learned variances, by their protocols, and the homotopy on the same."""
