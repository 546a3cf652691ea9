"""The affine VAE's landscape (eq. 3, Theorem 1): every stationary point, its index, its copies.

With the encoder at its best, W = W_x leaves

    F(W) = tr(cov C^-1) + sum_k log d_k + (d - kappa) log gamma + kappa,

C = W W^T + gamma I, d_k = |w_k|^2 + gamma. dF/dW = 0 reads cov W = W M D^-1 M, with
M = W^T W + gamma I and D = diag(d_1..d_kappa) the diagonal of M. As W^T cov W is
symmetric, M commutes with D: columns of unequal norm are orthogonal. So the columns
fall into groups of equal norm, mutually orthogonal, and a group of m columns with
d_k = delta shares p <= m eigenvectors u_i of the covariance:

    W_g W_g^T = sum_i (mu_i - gamma) u_i u_i^T,   mu_i = sqrt(lambda_i delta) > gamma,
    sum_i mu_i + (m - p) gamma = m delta   (the trace of M's block).

This is a quadratic for sqrt(delta), and by Schur and Horn any such spectrum can be
spread over m columns of equal norm. p = m = 1 gives delta = lambda_i: one column along
one axis. p = 1 < m is one direction shared by m columns; p >= 2 mixes directions. These
are all the stationary points. Unused columns are the group p = 0, delta = gamma.

The Hessian of F falls apart under the reflections u_i -> -u_i. J the directions used,
g over all groups, the unused columns' among them, its negative eigenvalues number

    #{i in J, j not in J: lambda_j > lambda_i}
    + sum_g (m_g - p_g) (#{j not in J: lambda_j delta_g > gamma^2}
                         + #{l in J outside g: delta_l < delta_g})
    + #{i, l in different groups: (lambda_i - lambda_l)(delta_i - delta_l) < 0}
    + sum_{g used} (m_g - 1).

On the axes only the first two lines are left: (kappa - |J|)(a - |J|) with
a = #{lambda_i > gamma}, and the pairs out of order. Any group with m_g > 1 has a
direction of descent (turn two of its columns towards each other: C stays, sum log d_k
falls), any axis-aligned point but the top min(a, kappa) directions has one too:
Theorem 1. The encoder's block of the full Hessian is positive definite, so that the
full Hessian in (W_x, b_x, W_z, b_z, log s^2) has as many negative eigenvalues as F's.
The paper states the theorem; this list of all stationary points and this count are
derived here, and held against dense Hessians and root finders by the tests.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax import Array

from vaebal.theory.affine import (
    AffineVAE,
    affine_optimal_encoder,
    check_gamma,
    check_kappa,
    check_moments,
)


class Group(NamedTuple):
    """Columns of equal norm that share directions of the covariance."""

    directions: tuple[int, ...]  # which eigenvectors, 0 for the largest eigenvalue
    columns: int  # m, at least the number of directions
    delta: float  # |w|^2 + gamma of each of its columns


@dataclasses.dataclass(frozen=True)
class _Landscape:
    """The problem whose stationary points are listed; NumPy float64."""

    mean: np.ndarray  # [D]
    eigenvalues: np.ndarray  # [D], largest first, none below 0
    eigenvectors: np.ndarray  # [D, D]
    kappa: int
    gamma: float

    @functools.cached_property
    def tie(self) -> float:
        """Eigenvalues (and gamma) closer than this cannot be told apart after rounding."""
        scale = max(self.eigenvalues[0], self.gamma)
        return 32 * len(self.mean) * float(np.finfo(np.float64).eps) * scale

    def group(self, directions: tuple[int, ...], columns: int) -> Group | None:
        """The group of `columns` columns that share `directions`; None if there is none."""
        eigenvalues = self.eigenvalues[list(directions)]
        share, unused = len(directions), columns - len(directions)
        if share > 1 and unused == 0 and np.ptp(eigenvalues) <= self.tie:
            return None  # equal eigenvalues, a column each: these are separate groups
        if columns == 1:
            delta = float(eigenvalues[0])
        else:
            root = np.sqrt(eigenvalues).sum()
            root += math.sqrt(root**2 + 4 * columns * unused * self.gamma)
            delta = float(root / (2 * columns)) ** 2
        if math.sqrt(eigenvalues[-1] * delta) <= self.gamma + self.tie:
            return None
        return Group(directions, columns, delta)


@dataclasses.dataclass(frozen=True)
class StationaryPoint:
    """A stationary point of eq. 3 at fixed gamma, one of `copies` equivalent ones.

    `params` is built when asked for (and again when asked again): a thousand points
    of a large model can be held at once.

    Attributes:
      groups: the nonzero columns, left to right: which share which directions.
      energy: L, eq. 3's units.
      index: Morse index, the number of strictly negative eigenvalues of the Hessian in
        all of (W_x, b_x, W_z, b_z, log_s2); by the counting rule of the module's
        docstring, not by a Hessian. 0 exactly at the global minima, ties included.
      nullity: the number of zero eigenvalues of that Hessian.
      copies: points that permutations of columns and changes of their signs make of
        this one, itself included.
      degenerate: why there are zero eigenvalues, in words; "" where there are none. Along
        a continuum of stationary points of one energy nothing hides in them; where gamma
        equals an eigenvalue the energy is flat to second order, and the index says
        nothing about the higher ones.
    """

    groups: tuple[Group, ...]
    energy: float
    index: int
    nullity: int
    copies: int
    degenerate: str
    _landscape: _Landscape = dataclasses.field(repr=False, compare=False)

    @property
    def directions(self) -> tuple[int, ...]:
        """Which eigenvectors the columns span, 0 for the largest eigenvalue.

        On the axes one for each nonzero column, left to right; else group by group.
        """
        return tuple(itertools.chain.from_iterable(group.directions for group in self.groups))

    @property
    def axis_aligned(self) -> bool:
        """Every nonzero column lies along an eigenvector of its own."""
        return all(group.columns == 1 for group in self.groups)

    @property
    def params(self) -> AffineVAE:
        """The parameters; the gradient there is 0 to rounding, which grows with lambda / gamma."""
        of = self._landscape
        W_x = np.zeros((len(of.mean), of.kappa))
        start = 0
        for group in self.groups:
            axes = list(group.directions)
            squares = np.sqrt(of.eigenvalues[axes] * group.delta) - of.gamma  # mu_i - gamma
            frame = _equal_norm_frame(squares, group.columns)
            W_x[:, start : start + group.columns] = of.eigenvectors[:, axes] @ frame
            start += group.columns
        return affine_optimal_encoder(W_x, of.mean, of.gamma)


def _equal_norm_frame(squares: np.ndarray, columns: int) -> np.ndarray:
    """A [p, m] with A A^T = diag(squares [p]) and columns of one norm (Schur and Horn).

    Starts from a turned diag(sqrt(squares)) and sets one column's norm at a time by a
    plane rotation (Bendel and Mickey, 1978).
    """
    share = len(squares)
    A = np.zeros((share, columns))
    A[:, :share] = np.diag(np.sqrt(squares))
    if share > 1 and columns > 2:
        # There is a continuum of such A. From a turned start the rotations end at a generic
        # one; from the axes they could end where the columns fall into smaller groups.
        turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((columns, columns)))
        A = A @ turn
    target = squares.sum() / columns
    open_columns = list(range(columns))
    while len(open_columns) > 1:
        norms = np.square(A[:, open_columns]).sum(0)
        low, high = open_columns[norms.argmin()], open_columns[norms.argmax()]
        x, y, xy = A[:, low] @ A[:, low], A[:, high] @ A[:, high], A[:, low] @ A[:, high]
        if y > target:
            t = (-xy + math.sqrt(xy**2 + max(target - x, 0.0) * (y - target))) / (y - target)
            cos, sin = 1 / math.hypot(1, t), t / math.hypot(1, t)
            A[:, [low, high]] = A[:, [low, high]] @ np.array([[cos, -sin], [sin, cos]])
        open_columns.remove(low)
    return A


def _close(a: np.ndarray, b: np.ndarray | float) -> np.ndarray:
    """Equal up to what rounding of the eigenvalues does to the norms of a group."""
    return np.abs(a - b) <= 1e-9 * np.maximum(a, b)


def _vanishing_columns(
    of: _Landscape,
    groups: tuple[Group, ...],
    owner: np.ndarray,
    delta: np.ndarray,
    unused: np.ndarray,
) -> tuple[int, int, int]:
    """Curvatures along combinations of a group's columns that vanish: negative, and zero ones.

    The unused columns are such a group.

    Args:
      owner, delta: [|J|], the group of every direction used, and its delta.
      unused: [D - |J|], eigenvalues of the others.

    Returns:
      How many are negative, zero because groups coincide, and zero because gamma equals an
      eigenvalue.
    """
    columns = sum(group.columns for group in groups)
    index = coincident = at_gamma = 0
    for g, group in enumerate((*groups, Group((), of.kappa - columns, of.gamma))):
        vanishing = group.columns - len(group.directions)
        if vanishing:
            others = delta[owner != g]
            gain = unused - of.gamma * (of.gamma / group.delta)
            tied = vanishing * int((np.abs(gain) <= of.tie).sum())
            same = _close(others, group.delta)
            index += vanishing * int((gain > of.tie).sum() + ((others < group.delta) & ~same).sum())
            coincident += vanishing * int(same.sum()) + (tied if g < len(groups) else 0)
            at_gamma += tied if g == len(groups) else 0
    return index, coincident, at_gamma


def _pairs_of_groups(
    of: _Landscape, owner: np.ndarray, used: np.ndarray, delta: np.ndarray
) -> tuple[int, int, int]:
    """Curvatures that turn directions of two groups into each other, all arguments [|J|].

    Returns:
      How many are negative (the pairs out of order; on the axes delta = lambda, and none is),
      zero by equal eigenvalues, and zero by equal deltas.
    """
    row, column = np.triu_indices(len(used), 1)
    apart = owner[row] != owner[column]
    row, column = row[apart], column[apart]
    step = used[row] - used[column]
    same_eigenvalue = np.abs(step) <= of.tie
    same_delta = ~same_eigenvalue & _close(delta[row], delta[column])
    out_of_order = step * (delta[row] - delta[column]) < 0
    negative = out_of_order & ~same_eigenvalue & ~same_delta
    return int(negative.sum()), int(same_eigenvalue.sum()), int(same_delta.sum())


def _copies_and_turns(groups: tuple[Group, ...], kappa: int) -> tuple[int, int]:
    """Equivalent points by order and sign of columns; directions in which frames turn freely."""
    columns, turning = sum(group.columns for group in groups), 0
    copies = 2**columns * math.perm(kappa, columns)
    for group in groups:
        share, wide = len(group.directions), group.columns
        if share == 1:
            copies //= math.factorial(wide)  # its columns are one vector, up to sign
        else:  # the frames of `_equal_norm_frame` with A A^T fixed
            turning += share * wide - share * (share + 1) // 2 - (wide - 1)
    return copies, turning


def _stationary_point(of: _Landscape, groups: tuple[Group, ...]) -> StationaryPoint:
    """Energy, index, nullity and copies from the eigenvalues alone; see the module's docstring."""
    dim, kappa, gamma = len(of.mean), of.kappa, of.gamma
    axes = [axis for group in groups for axis in group.directions]
    owner = np.array([g for g, group in enumerate(groups) for _ in group.directions], int)
    delta = np.array([group.delta for group in groups])[owner]  # [|J|]
    used = of.eigenvalues[axes]  # [|J|]
    unused = np.delete(of.eigenvalues, axes)  # [D - |J|]
    columns = sum(group.columns for group in groups)
    energy = (
        np.sqrt(used / delta).sum()  # lambda_i / mu_i
        + unused.sum() / gamma
        + sum(group.columns * math.log(group.delta) for group in groups)
        + (dim - columns) * math.log(gamma)
        + kappa
    )
    gap = unused[None, :] - used[:, None]  # moving u_i's column towards u_j
    vanishing, by_chance, at_gamma = _vanishing_columns(of, groups, owner, delta, unused)
    out_of_order, repeated, coincident = _pairs_of_groups(of, owner, used, delta)
    copies, turning = _copies_and_turns(groups, kappa)
    reasons = {
        "gamma equals an eigenvalue: flat to second order": at_gamma,
        "an eigenvalue is repeated: its eigenvectors turn freely": repeated
        + int((np.abs(gap) <= of.tie).sum()),
        "columns that share directions turn freely": turning,
        "two groups coincide by chance": coincident + by_chance,
        "the covariance is singular: W_z is free on its null space": kappa
        * int((of.eigenvalues <= of.tie).sum()),
    }
    return StationaryPoint(
        groups=groups,
        energy=float(energy),
        index=int((gap > of.tie).sum()) + vanishing + out_of_order + columns - len(groups),
        nullity=sum(reasons.values()),
        copies=copies,
        degenerate="; ".join(reason for reason, count in reasons.items() if count),
        _landscape=of,
    )


def _set_partitions(items: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """All ways to part `items` into non-empty blocks."""
    if not items:
        yield ()
        return
    first, rest = items[0], items[1:]
    for size in range(len(rest) + 1):
        for others in itertools.combinations(rest, size):
            remaining = tuple(item for item in rest if item not in others)
            for blocks in _set_partitions(remaining):
                yield ((first, *others), *blocks)


def _allotments(least: tuple[int, ...], total: int) -> Iterator[tuple[int, ...]]:
    """All integer tuples of sum `total`, no entry below its entry in `least`."""
    if len(least) == 1:
        yield (total,)
        return
    for first in range(least[0], total - sum(least[1:]) + 1):
        for rest in _allotments(least[1:], total - first):
            yield (first, *rest)


def _on_axes(of: _Landscape, columns: int) -> Iterator[tuple[Group, ...]]:
    """Axis-aligned points with that many nonzero columns."""
    above = int((of.eigenvalues > of.gamma + of.tie).sum())
    for axes in itertools.combinations(range(above), columns):
        yield tuple(Group((axis,), 1, float(of.eigenvalues[axis])) for axis in axes)


def _off_axes(of: _Landscape, columns: int) -> Iterator[tuple[Group, ...]]:
    """All other stationary points with that many nonzero columns."""
    # delta <= lambda_1 bounds mu_i, which must exceed gamma; lambda_i itself need not.
    reach = int((of.eigenvalues * of.eigenvalues[0] > of.gamma**2).sum())
    for share in range(min(columns, reach), 0, -1):
        for axes in itertools.combinations(range(reach), share):
            for blocks in _set_partitions(axes):
                for wide in _allotments(tuple(map(len, blocks)), columns):
                    if max(wide) == 1:
                        continue
                    groups = tuple(map(of.group, blocks, wide))
                    if None not in groups:
                        yield groups


def affine_stationary_points(
    mean: Array, cov: Array, kappa: int, gamma: float, *, off_axes: bool = True
) -> Iterator[StationaryPoint]:
    """Every stationary point of eq. 3 at fixed gamma, one of each set of equivalent ones.

    A lazy iterator, by the number of nonzero columns, from total collapse on; for each
    number first the axis-aligned points, then those where columns share directions.
    There are combinatorially many: take what you need (`itertools.islice`).

    Equivalent are permutations of columns and changes of sign. Repeated eigenvalues and
    groups of three or more columns with two or more directions come in continua, of
    which one point stands for all; `degenerate` says so. Eigenvalues are told apart, and
    from gamma, down to rounding: an eigenvalue equal to gamma bears no column.

    Args:
      mean: x_bar [D].
      cov: [D, D].
      kappa: number of latents K, at least 1; may exceed D.
      gamma: decoder variance, above 0.
      off_axes: False leaves out the points where columns share directions.

    Raises:
      ValueError: at the call, not at the first point.
    """
    check_moments(mean, cov)
    kappa = check_kappa(kappa)
    check_gamma(gamma)
    eigenvalues, eigenvectors = np.linalg.eigh(np.asarray(cov, np.float64))
    of = _Landscape(
        np.asarray(mean, np.float64),
        np.maximum(eigenvalues[::-1], 0.0),
        eigenvectors[:, ::-1],
        kappa,
        float(gamma),
    )

    def points():
        for columns in range(kappa + 1):
            for groups in _on_axes(of, columns):
                yield _stationary_point(of, groups)
            if off_axes and columns > 1:
                for groups in _off_axes(of, columns):
                    yield _stationary_point(of, groups)

    return points()
