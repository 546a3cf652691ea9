"""Table 2 and Figure 1: how gamma moves, and what it decides."""
