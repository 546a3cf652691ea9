"""Table 1 of the paper, on MNIST: what stands beside ours wherever an experiment is on its data."""

# kappa -> (Rec. Err., NLL in nats, active dimensions).
PAPER = {
    50: (4.98, -315, 10),
    100: (3.42, -580, 15),
    200: (2.74, -718, 20),
    400: (2.57, -743, 22),
    784: (2.78, -806, 22),
}
PAPER_DATA = "mnist"
