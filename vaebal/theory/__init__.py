"""The paper's theorems: the affine VAE in closed form, collapse, L_h, and Hessians to look at."""
