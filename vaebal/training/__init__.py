"""Training: one program, one loop, checkpoints.

`Objective` and `Member` say what is trained, `Program` (rows on the device) or `Streamed` (rows
fed from the host) compiles it, `fit` runs it and resumes it.
"""

from vaebal.training.fit import fit
from vaebal.training.optimiser import Optimisation
from vaebal.training.program import Program, Streamed, mesh_for, shared_given, state_shapes
from vaebal.training.step import (
    At,
    Member,
    Objective,
    State,
    Told,
    member_params,
    stack_members,
)
from vaebal.training.vae import gaussian_vae

__all__ = [
    "At",
    "Member",
    "Objective",
    "Optimisation",
    "Program",
    "State",
    "Streamed",
    "Told",
    "fit",
    "gaussian_vae",
    "member_params",
    "mesh_for",
    "shared_given",
    "stack_members",
    "state_shapes",
]
