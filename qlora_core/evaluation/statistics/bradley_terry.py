"""Bradley-Terry abilities with ties (Davidson 1970) and an order effect (Davidson and Beaver 1977).

Knows counts of outcomes per ordered pair of players, not prompts, judges or models' names. With worth p = exp(ability),
g the first-shown player's advantage and v the tie parameter, a comparison of i (shown first) with j has the odds

    i wins : j wins : tie  =  g p_i : p_j : v sqrt(g p_i p_j)

which is the multiplicative order effect on the first-shown worth; any common g only rescales v against other writings.
Maximum likelihood by Newton's method, in a batch: hundreds of bootstrap resamples cost about as much as one.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

MAX_ITERATIONS = 60
GRADIENT_TOLERANCE = 1e-12
# Without a finite maximum the fit runs off until rounding hides the gradient, at a margin of about 27 logits between
# two outcomes. No such margin is possible while every parameter is under 8, and no data give a finite maximum beyond.
LARGEST_PARAMETER = 8.0
RIDGE = 0.1


class Design(NamedTuple):
    """Which ordered pairs were compared and which parameters are estimated.

    first, second: player indices [cells]. features: [cells, 3 outcomes, parameters]; the outcomes are first wins,
    second wins, tie; the parameters are the abilities, then log g if `order`, then log v if `ties`.
    """

    players: int
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    features: NDArray[np.float64]
    order: bool
    ties: bool


class Fit(NamedTuple):
    """Abilities [batch, players] (log of the worth, centred), log g and log v [batch], and which fits took a ridge.

    log g is NaN where the design has no order effect, log v where it has no ties.
    """

    abilities: NDArray[np.float64]
    log_order: NDArray[np.float64]
    log_tie: NDArray[np.float64]
    ridged: NDArray[np.bool_]
    log_likelihood: NDArray[np.float64]


def make_design(
    first: NDArray[np.int64], second: NDArray[np.int64], players: int, *, order: bool, ties: bool
) -> Design:
    """The design of the given cells. Without `order` both places are alike; without `ties` ties are ignored."""
    cells = len(first)
    features = np.zeros((cells, 3, players + order + ties))
    rows = np.arange(cells)
    features[rows, 0, first] = 1.0
    features[rows, 1, second] = 1.0
    features[rows, 2, first] += 0.5
    features[rows, 2, second] += 0.5
    if order:
        features[:, 0, players] = 0.5
        features[:, 1, players] = -0.5
    if ties:
        features[:, 2, -1] = 1.0
    return Design(players, first, second, features, order, ties)


def order_effect_is_identified(first: NDArray[np.int64], second: NDArray[np.int64], players: int) -> bool:
    """Whether abilities and order effect can be told apart: False where, say, each pair has one fixed order."""
    contrasts = np.zeros((len(first), players + 1))
    rows = np.arange(len(first))
    contrasts[rows, first] += 1.0
    contrasts[rows, second] -= 1.0
    alone = int(np.linalg.matrix_rank(contrasts))
    contrasts[:, players] = 1.0
    return int(np.linalg.matrix_rank(contrasts)) > alone


def strongly_connected(design: Design, counts: NDArray[np.float64]) -> bool:
    """Whether each player beat or tied with each other one directly or through others; `counts` is [cells, 3].

    Where it does not hold some abilities are infinite or unrelated, and only a penalised fit exists.
    """
    to_second = counts[:, 0] + counts[:, 2]
    to_first = counts[:, 1] + counts[:, 2]
    sources = np.concatenate([design.first, design.second])
    targets = np.concatenate([design.second, design.first])
    kept = np.concatenate([to_second, to_first]) > 0
    graph = csr_array((np.ones(kept.sum()), (sources[kept], targets[kept])), shape=(design.players, design.players))
    return int(connected_components(graph, connection="strong", return_labels=False)) == 1


def fit(design: Design, counts: NDArray[np.float64]) -> Fit:
    """Maximum likelihood for each of a batch of counts [batch, cells, 3].

    Where the likelihood has no finite maximum (win graph not strongly connected, or an order effect without limit) the
    fit has a penalty of 0.05 times the sum of the squared parameters, a prior with a standard deviation of about three
    logits, and says so in `ridged`.
    """
    counts = counts if design.ties else counts * np.array([1.0, 1.0, 0.0])
    parameters, converged = _newton(design, counts, ridge=0.0)
    ridged = ~converged | np.array([not strongly_connected(design, each) for each in counts])
    if ridged.any():
        parameters[ridged], _ = _newton(design, counts[ridged], ridge=RIDGE)
    abilities = parameters[:, : design.players]
    missing = np.full(len(counts), np.nan)
    return Fit(
        abilities=abilities - abilities.mean(axis=1, keepdims=True),
        log_order=parameters[:, design.players] if design.order else missing,
        log_tie=parameters[:, -1] if design.ties else missing,
        ridged=ridged,
        log_likelihood=_log_likelihood(design, counts, parameters),
    )


class Covariance(NamedTuple):
    """Of the parameters [parameters, parameters], abilities centred: from the curvature, and clustered by prompt."""

    curvature: NDArray[np.float64]
    sandwich: NDArray[np.float64]


def covariance(design: Design, clustered: NDArray[np.float64], fitted: Fit) -> Covariance:
    """Covariance of a fit of one batch; `clustered` [prompts, cells, 3] are the fitted counts, prompt by prompt.

    curvature: the inverse of the observed information, right where all matches are independent. sandwich: H^-1 (sum
    over prompts of s s') H^-1 P / (P - 1), s a prompt's score (Liang and Zeger 1986): right where matches of one prompt
    hang together. NaN for fewer than two prompts. A ridge, where the fit took one, is part of H.
    """
    counts = clustered if design.ties else clustered * np.array([1.0, 1.0, 0.0])
    parts = [fitted.abilities[:1]]
    parts += [fitted.log_order[:1, None]] if design.order else []
    parts += [fitted.log_tie[:1, None]] if design.ties else []
    parameters = np.concatenate(parts, axis=1)
    ridge = RIDGE if fitted.ridged[0] else 0.0
    shares = _probabilities(design, parameters)
    information = _curvature(design, counts.sum(axis=(0, 2))[None], shares, ridge)[0]
    scores = np.einsum("pco,cok->pk", counts - counts.sum(axis=2)[:, :, None] * shares, design.features)
    inverse = np.linalg.inv(information)
    centred = np.eye(len(inverse))
    centred[: design.players, : design.players] -= 1 / design.players
    inverse = centred @ inverse
    prompts = len(counts)
    factor = prompts / (prompts - 1) if prompts > 1 else np.nan
    return Covariance(inverse @ centred.T, factor * inverse @ (scores.T @ scores) @ inverse.T)


def _curvature(
    design: Design, totals: NDArray[np.float64], shares: NDArray[np.float64], ridge: float
) -> NDArray[np.float64]:
    """Negative second derivatives [batch, size, size], with what keeps them regular."""
    size = design.features.shape[2]
    # The likelihood does not change when all abilities move together; this fixes their mean without touching the rest
    gauge = np.zeros((size, size))
    gauge[: design.players, : design.players] = 1.0
    means = np.einsum("bco,cop->bcp", shares, design.features)
    curvature = np.einsum("bc,bco,cop,coq->bpq", totals, shares, design.features, design.features, optimize=True)
    curvature -= np.einsum("bc,bcp,bcq->bpq", totals, means, means, optimize=True)
    return curvature + gauge + (ridge + 1e-10) * np.eye(size)


def _newton(
    design: Design, counts: NDArray[np.float64], *, ridge: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Newton's method with step halving on the concave log-likelihood: parameters [batch, size], convergence."""
    size = design.features.shape[2]
    parameters = np.zeros((len(counts), size))
    totals = counts.sum(axis=2)
    moving = np.ones(len(counts), dtype=np.bool_)
    for _ in range(MAX_ITERATIONS):
        shares = _probabilities(design, parameters)
        gradient = np.einsum("bco,cop->bp", counts - totals[:, :, None] * shares, design.features) - ridge * parameters
        moving = np.abs(gradient).max(axis=1) > GRADIENT_TOLERANCE * np.maximum(1.0, totals.sum(axis=1))
        if not moving.any():
            break
        curvature = _curvature(design, totals, shares, ridge)
        step = np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
        step *= np.minimum(1.0, 3.0 / np.maximum(np.abs(step).max(axis=1), 1e-300))[:, None]
        parameters = np.where(moving[:, None], _uphill(design, counts, parameters, step, ridge), parameters)
        if ridge == 0.0 and (np.abs(parameters[moving]).max(axis=1) > LARGEST_PARAMETER).all():
            break
    return parameters, ~moving & (np.abs(parameters).max(axis=1) <= LARGEST_PARAMETER)


def _uphill(
    design: Design,
    counts: NDArray[np.float64],
    parameters: NDArray[np.float64],
    step: NDArray[np.float64],
    ridge: float,
) -> NDArray[np.float64]:
    start = _objective(design, counts, parameters, ridge)
    scale = np.ones((len(counts), 1))
    for _ in range(20):
        worse = _objective(design, counts, parameters + scale * step, ridge) < start - 1e-9 * (1.0 + np.abs(start))
        if not worse.any():
            break
        scale[worse] *= 0.5
    return parameters + scale * step


def _objective(
    design: Design, counts: NDArray[np.float64], parameters: NDArray[np.float64], ridge: float
) -> NDArray[np.float64]:
    return _log_likelihood(design, counts, parameters) - 0.5 * ridge * (parameters**2).sum(axis=1)


def _log_likelihood(
    design: Design, counts: NDArray[np.float64], parameters: NDArray[np.float64]
) -> NDArray[np.float64]:
    return (counts * _log_probabilities(design, parameters)).sum(axis=(1, 2))


def _probabilities(design: Design, parameters: NDArray[np.float64]) -> NDArray[np.float64]:
    shares = np.exp(_log_probabilities(design, parameters))
    return shares if design.ties else shares * np.array([1.0, 1.0, 0.0])


def _log_probabilities(design: Design, parameters: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log of each outcome's probability [batch, cells, 3]; the tie's is 0 where the design has none."""
    scores = np.einsum("bp,cop->bco", parameters, design.features)
    offered = scores if design.ties else scores[:, :, :2]
    log_total = np.logaddexp.reduce(offered, axis=2)[:, :, None]
    logs = scores - log_total
    if not design.ties:
        logs[:, :, 2] = 0.0
    return logs
