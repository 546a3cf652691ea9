"""Where a deep VAE without skip connections collapses, and where it does not."""
