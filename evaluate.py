"""Evaluation of predicted cells: metrics, the anchors that give them meaning, baselines, significance, retrieval analysis, report.

    python evaluate.py runs/NAME [runs/OTHER ...]                      the whole table of one run, or of several side by side
    python evaluate.py --real REAL.h5ad --pred PRED.h5ad -o OUT/       anyone's predictions against real cells

Reading order: metrics, PCA, one condition, anchors and contenders, baselines, significance and summary, retrieval, tables, report,
command line. Letters: n real cells and m predicted cells of a condition (one perturbation in one cell line), G genes, d principal
components, P populations compared with the same real cells at once (methods, baselines, anchors), C conditions.
"""
import argparse
import contextlib
import csv
import functools
import html
import math
import sys
import textwrap
import zlib
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch

import data
import ptrag

METRICS = {  # name in the files: (heading, +1 where larger is better, -1 where smaller is)
    "w1": ("W1", -1), "w2": ("W2", -1), "w2_half_squared": ("W2²/2", -1), "w1_marginal": ("W1 marg", -1), "w2_marginal": ("W2 marg", -1),
    "sw1": ("SW1", -1), "sw2": ("SW2", -1), "energy": ("energy", -1), "mmd": ("MMD²", -1), "pearson_deg": ("r DEG", 1),
    "spearman_deg": ("rho DEG", 1), "pearson_delta": ("r delta", 1), "mae": ("MAE", -1), "mse": ("MSE", -1), "mse_pca": ("MSE PCA", -1),
    "discrimination": ("discrim", 1),
}
FIRST_METRICS = ["w1", "w2", "sw1", "sw2", "energy", "pearson_delta"]
CONDITION_COLUMNS = [*list(METRICS)[:11], "n_deg", *list(METRICS)[11:]]  # metrics.csv, after the counts
COLUMNS = CONDITION_COLUMNS + ["sw1_error", "sw2_error"]                 # all that is measured per condition and population
CEILING, COLLAPSE, FLOOR = "other real half (ceiling)", "its mean, repeated (collapse)", "no change (floor)"


# ---------------------------------------------------------------------------------------------------------------- metrics

class Moments(NamedTuple):
    """Mean and unbiased variance of every gene over `count` cells: mean (G,), variance (G,) float64 (nan for one cell)."""
    mean: np.ndarray
    variance: np.ndarray
    count: int


def moments(blocks):
    """Moments of cells that arrive in blocks (n, G), added up in float64 around the first block's mean."""
    count, shift, total, squares = 0, None, 0.0, 0.0
    for block in blocks:
        block = np.asarray(block, dtype=np.float64)
        shift = block.mean(0) if shift is None else shift
        block = block - shift
        count, total, squares = count + len(block), total + block.sum(0), squares + (block ** 2).sum(0)
    spread = np.maximum(squares - total ** 2 / count, 0.0)
    return Moments(shift + total / count, spread / (count - 1) if count > 1 else np.full_like(spread, np.nan), count)


def incomplete_beta(a, b, x, y):
    """Regularised incomplete beta function I_x(a, b), elementwise, float64; `y` = 1 - x comes from the caller, who has more digits.

    Continued fraction 8.17.22 of the NIST Digital Library of Mathematical Functions, evaluated front to back (modified Lentz);
    where it converges slowly, x > (a+1)/(a+b+2), through I_x(a, b) = 1 - I_y(b, a).
    """
    a, b, x, y = (np.array(v, dtype=np.float64) for v in np.broadcast_arrays(a, b, x, y))
    swap = x > (a + 1) / (a + b + 2)
    a, b, x, y = np.where(swap, b, a), np.where(swap, a, b), np.where(swap, y, x), np.where(swap, x, y)
    gamma = lambda v: torch.lgamma(torch.from_numpy(np.ascontiguousarray(v))).numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        front = np.exp(a * np.log(x) + b * np.log(y) + gamma(a + b) - gamma(a) - gamma(b)) / a
    tiny = 1e-300
    c, d = np.ones_like(x), np.zeros_like(x)
    fraction = np.ones_like(x)
    for step in range(1, 20000):
        m = step // 2
        if step % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1.0 / np.where(np.abs(1 + term * d) < tiny, tiny, 1 + term * d)
        c = np.where(np.abs(1 + term / c) < tiny, tiny, 1 + term / c)
        fraction = fraction * c * d
        if not np.any(np.abs(c * d - 1) > 1e-15):
            break
    value = np.where(x > 0, front / fraction, 0.0)
    return np.where(swap, 1 - value, value)


def student_t_tail(t, freedom):
    """Two-sided tail P(|T| >= |t|) of Student's t with `freedom` degrees of freedom, elementwise; error below 1e-8 (in fact below 1e-10).

    P = I_x(freedom/2, 1/2) with x = freedom / (freedom + t^2).
    """
    t, freedom = np.broadcast_arrays(np.asarray(t, dtype=np.float64), np.asarray(freedom, dtype=np.float64))
    with np.errstate(over="ignore"):
        squared = np.minimum(t ** 2, 1e300)
    return incomplete_beta(freedom / 2, 0.5, freedom / (freedom + squared), squared / (freedom + squared))


def welch_test(a, b):
    """Two-sided p value (G,) of Welch's t test per gene between two `Moments`; degrees of freedom by Welch-Satterthwaite.

    Genes constant on both sides: 1 where the means agree, 0 where they differ. nan where a side has one cell.
    """
    share_a, share_b = a.variance / a.count, b.variance / b.count
    difference, error = a.mean - b.mean, share_a + share_b
    constant = error <= 0
    with np.errstate(divide="ignore", invalid="ignore"):
        t = difference / np.sqrt(error)
        freedom = error ** 2 / (share_a ** 2 / (a.count - 1) + share_b ** 2 / (b.count - 1))
    usable = ~constant & np.isfinite(t) & np.isfinite(freedom)
    p = np.full(t.shape, np.nan)
    p[usable] = student_t_tail(t[usable], freedom[usable])
    p[constant] = np.where(np.abs(difference[constant]) <= 1e-9, 1.0, 0.0)
    return p


def differentially_expressed(real, control):
    """(G,) bool: Welch p <= 0.1 and |log2((mean + 1) / (control mean + 1))| >= 0.05, from two `Moments` of log1p expression."""
    with np.errstate(invalid="ignore"):
        fold = np.log2((real.mean + 1) / (control.mean + 1))
        return (welch_test(real, control) <= 0.1) & (np.abs(fold) >= 0.05)


def pearson(x, y):
    """Pearson correlation along the last axis: (..., G) and (..., G) -> (...); nan where a side is constant or shorter than two."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.shape[-1] < 2:
        return np.full(np.broadcast_shapes(x.shape, y.shape)[:-1], np.nan)
    size_x, size_y = np.linalg.norm(x, axis=-1), np.linalg.norm(y, axis=-1)
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    norm_x, norm_y = np.linalg.norm(x, axis=-1), np.linalg.norm(y, axis=-1)
    constant = (norm_x <= 1e-12 * size_x) | (norm_y <= 1e-12 * size_y)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(constant, np.nan, np.clip((x * y).sum(-1) / (norm_x * norm_y), -1, 1))


def ranks(values):
    """Ranks (n,) from 1, ties sharing the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def spearman(x, y):
    """Spearman correlation of two (n,) arrays: Pearson of their ranks."""
    return float(pearson(ranks(x), ranks(y)))


def mmd(x, y):
    """Squared maximum mean discrepancy, unbiased, between point clouds x (B, n, d) and y (B, m, d) -> (B,); nan below two points a side.

    mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j), k(a, b) = exp(-|a - b|^2 / (2 s^2)),
    s the median non-zero distance among the n + m pooled points (Gretton et al. 2012). Near 0, also below it, for equal distributions.
    """
    n, m = x.shape[1], y.shape[1]
    if n < 2 or m < 2:
        return torch.full((len(x),), math.nan)
    above = torch.triu_indices(n + m, n + m, offset=1)
    values = []
    for points in torch.cat([x, y], dim=1):  # one population at a time: (n + m)^2 distances each
        distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")  # exact zeros for equal points
        pairs = distance[above[0], above[1]].numpy()
        pairs = pairs[pairs > 0]
        if not len(pairs):
            values.append(0.0)
            continue
        kernel = torch.exp(-distance.double() ** 2 / (2 * float(np.median(pairs)) ** 2))
        within_x = (kernel[:n, :n].sum() - n) / (n * (n - 1))
        within_y = (kernel[n:, n:].sum() - m) / (m * (m - 1))
        values.append(float(within_x + within_y - 2 * kernel[:n, n:].mean()))
    return torch.tensor(values)


def discrimination(means, profiles, truth, excluded):
    """How well mean profiles (P, G) single out their own perturbation among the real ones (N, G) of the cell line -> (P,), 1 is best.

    1 - r / (N - 1), r = number of real profiles nearer (L1 distance) than the true one, number `truth`, ties counted half;
    genes marked in `excluded` (G,), the targets of the perturbation, are left out. Chance is 0.5; nan where N is 1.
    """
    if len(profiles) < 2:
        return np.full(len(means), np.nan)
    distance = torch.cdist(torch.as_tensor(means)[:, ~excluded], torch.as_tensor(profiles)[:, ~excluded], p=1).numpy()  # (P, N)
    own = distance[:, [truth]]
    nearer = (distance < own).sum(1) + ((distance == own).sum(1) - 1) / 2
    return 1 - nearer / (len(profiles) - 1)


# -------------------------------------------------------------------------------------------------------------------- PCA

def fit_pca(blocks, components=50):
    """Principal axes of cells that arrive in blocks (n, G): centre (G,) and axes (G, d), both float32.

    Centred, not scaled; covariance summed in float64 and decomposed exactly, no seed; each axis has its largest entry positive.
    d = min(components, cells - 1, genes - 1), less the directions without any variance, which would be arbitrary.
    """
    count, shift, total, products = 0, None, 0.0, 0.0
    for block in blocks:
        block = torch.as_tensor(np.asarray(block)).double()
        shift = block.mean(0) if shift is None else shift
        block = block - shift
        count, total, products = count + len(block), total + block.sum(0), products + block.T @ block
    covariance = products / count - torch.outer(total, total) / count ** 2
    values, vectors = torch.linalg.eigh(covariance)
    kept = int((values > 1e-10 * values[-1].clamp(min=1e-30)).sum())
    d = max(0, min(components, count - 1, len(shift) - 1, kept))
    axes = vectors.flip(1)[:, :d]
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))  # made positive: the sign is arbitrary, the directions of sw1, sw2 are not
    return (shift + total / count).float(), (axes * largest.sign()).float()


# ---------------------------------------------------------------------------------------------------------- one condition

class Population(NamedTuple):
    """What the metrics need of a population of m cells: its points in PCA space (m, d) float32 and its mean profile (G,) float32."""
    points: torch.Tensor
    mean: np.ndarray


@dataclass
class Line:
    """What the conditions of one cell line are measured against."""
    control: Moments            # of all its real control cells
    centre: torch.Tensor        # (G,) PCA
    axes: torch.Tensor          # (G, d)
    profiles: np.ndarray        # (N, G) float32 mean of the real cells of each evaluated condition
    half_profiles: np.ndarray   # (N, G) the same of half A of the real cells

    def population(self, cells):
        """Cells (m, G) as a `Population`."""
        return Population((torch.as_tensor(cells) - self.centre) @ self.axes, cells.mean(0, dtype=np.float64).astype(np.float32))


def transport(predicted, real, p):
    """Joint Wasserstein-p distance of predicted (P, m, d) and real (P, n, d) points: (P,), nan where it does not converge."""
    try:
        return ptrag.wasserstein(predicted, real, p)
    except RuntimeError:
        if len(predicted) == 1:
            return torch.full((1,), math.nan, dtype=torch.float64)
        return torch.cat([transport(*pair, p) for pair in zip(predicted.split(1), real.split(1))])


def point_metrics(real, predicted):
    """Metrics between point clouds in PCA space: real (n, d) against each of predicted (P, m, d); a dict of name -> (P,) float arrays.

    w1, w2: joint Wasserstein distances; w2_half_squared: the paper's print of W2; *_marginal: one-dimensional distances averaged over
    components; sw1, sw2: sliced, with their Monte-Carlo standard errors; energy: as the training loss; mmd: see `mmd`.
    Everything is nan where there is no component to measure in.
    """
    names = ["w1", "w2", "w2_half_squared", "w1_marginal", "w2_marginal", "sw1", "sw2", "energy", "mmd", "sw1_error", "sw2_error"]
    if real.shape[1] == 0:
        return {name: np.full(len(predicted), np.nan) for name in names}
    real = real[None]  # (1, n, d): projected and sorted once for all P
    value = {f"w{p}": transport(predicted, real.expand(len(predicted), -1, -1), p) for p in (1, 2)}
    value["w2_half_squared"] = value["w2"] ** 2 / 2
    for p in (1, 2):
        value[f"w{p}_marginal"] = ptrag.wasserstein_1d(predicted.transpose(1, 2), real.transpose(1, 2), p).mean(-1)
        value[f"sw{p}"], value[f"sw{p}_error"] = ptrag.sliced_wasserstein(predicted, real, p)
    value["energy"] = ptrag.energy_distance(predicted, real)
    value["mmd"] = mmd(predicted, real.expand(len(predicted), -1, -1))
    return {name: value[name].double().numpy() for name in names}


def mean_metrics(real, means, control):
    """Metrics between mean profiles: `Moments` of the real cells against predicted means (P, G); a dict of name -> (P,) arrays.

    pearson_deg, spearman_deg: over differentially expressed genes, nan with fewer than two; pearson_delta: of mean minus the control's
    mean, on both sides; mae, mse: averaged over genes.
    """
    means = means.astype(np.float64)
    genes = np.flatnonzero(differentially_expressed(real, control))
    enough = len(genes) >= 2
    return {
        "n_deg": np.full(len(means), float(len(genes))),
        "pearson_deg": pearson(means[:, genes], real.mean[genes]),
        "spearman_deg": np.array([spearman(row[genes], real.mean[genes]) if enough else np.nan for row in means]),
        "pearson_delta": pearson(means - control.mean, real.mean - control.mean),
        "mae": np.abs(means - real.mean).mean(1),
        "mse": ((means - real.mean) ** 2).mean(1),
    }


def condition_rows(real_cells, populations, line, profiles, truth, excluded):
    """Every metric of every population of one condition: (P, len(COLUMNS)) float64.

    real_cells: (n, G); populations: list of P `Population`, those of equal size are compared together; profiles, truth, excluded: see
    `discrimination`.
    """
    result = np.full((len(populations), len(COLUMNS)), np.nan)
    if not len(real_cells):
        return result
    real, real_moments = line.population(real_cells), moments([real_cells])
    sizes = np.array([len(population.points) for population in populations])
    for size in set(sizes[sizes > 0].tolist()):
        chosen = np.flatnonzero(sizes == size)
        points = torch.stack([populations[i].points for i in chosen])  # (P', m, d)
        means = np.stack([populations[i].mean for i in chosen])        # (P', G)
        value = point_metrics(real.points, points) | mean_metrics(real_moments, means, line.control)
        gap = points.mean(1) - real.points.mean(0)                     # (P', d)
        value["mse_pca"] = (gap ** 2).mean(1).double().numpy()
        value["discrimination"] = discrimination(means, profiles, truth, excluded)
        result[chosen] = np.stack([value[name] for name in COLUMNS], axis=1)
    return result


# -------------------------------------------------------------------------------------------- anchors and contenders

class Contender(NamedTuple):
    """One row source of the table: a method of one seed. `cells(condition)` returns its predicted cells (m, G) float32."""
    label: str
    seed: str
    cells: Callable


@dataclass
class Results:
    """All measurements. The keys of `full` and `equal` are (label, seed), the values (C, len(COLUMNS)) arrays."""
    dataset: object
    conditions: list
    counts: np.ndarray                             # (C, 2) real cells; predicted cells
    reference: str = None                          # label of the row the others are tested against, PT-RAG's
    full: dict = field(default_factory=dict)       # all real against all predicted cells
    equal: dict = field(default_factory=dict)      # half A of the real cells against as many cells as half B has; the anchors too
    responses: dict = field(default_factory=dict)  # condition -> (G,) real mean minus the line's control mean
    points: dict = field(default_factory=dict)     # condition -> {"real" | "control" | "predicted": (k, 2)} first two components
    notes: list = field(default_factory=list)

    def labels(self):
        """Row names in the order of the table: anchors, baselines, methods."""
        return list(dict.fromkeys(label for label, _ in self.equal))

    @property
    def shown(self):
        """Key of the row that figures show: the reference's first seed, else the last row."""
        return next((key for key in self.full if key[0] == self.reference), list(self.full)[-1])

    def values(self, kind, label, metric):
        """(seeds, C) values of one row and metric; kind: "full" or "equal"."""
        table = getattr(self, kind)
        rows = [values[:, COLUMNS.index(metric)] for (name, _), values in table.items() if name == label]
        return np.stack(rows) if rows else np.full((1, len(self.conditions)), np.nan)


def condition_name(dataset, condition):
    """Cell line and perturbation of a condition in one text."""
    return f"{dataset.cell_lines[condition[0]]}:{dataset.perturbations[condition[1]]}"


def seeded_subset(name, count, size, seed):
    """`size` of `count` places, drawn from (seed, name) alone; with size = count // 2 the places left over are the other half."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return np.sort(generator.permutation(count)[count - size:])


def halves(name, count, seed):
    """Places of half A (the larger by one where the count is odd) and half B of a condition's real cells."""
    b = seeded_subset(name, count, count // 2, seed)
    return np.setdiff1d(np.arange(count), b), b


def row_blocks(expression, rows, size=1000):
    """Expression of many rows in blocks of at most `size` cells."""
    for start in range(0, len(rows), size):
        yield expression[rows[start:start + size]]


def describe_line(dataset, conditions, control, pick, seed):
    """`Line` of one cell line: PCA over all its evaluated real perturbed cells, mean profile of each condition; pick: condition -> rows."""
    profiles, half_profiles = [], []

    def real_cells():
        for condition in conditions:
            cells = dataset.expression[pick(condition)[0]]
            half = cells[halves(condition_name(dataset, condition), len(cells), seed)[0]]
            profiles.append(cells.mean(0, dtype=np.float64))
            half_profiles.append(half.mean(0, dtype=np.float64))
            yield cells

    centre, axes = fit_pca(real_cells())
    return Line(control, centre, axes, np.stack(profiles).astype(np.float32), np.stack(half_profiles).astype(np.float32))


def measure(dataset, conditions, contenders, baselines, controls, seed=0, max_cells=1000):
    """Measures every contender, baseline and anchor on every condition, one cell line after the other: `Results`.

    contenders: list of `Contender`; baselines: label -> condition -> response (G,); controls: line -> `Moments` of its control cells.
    """
    labels = [(FLOOR, "")] + [(label, "") for label in baselines] + [(c.label, c.seed) for c in contenders]
    reference = next((c.label for c in contenders if c.label.split("/")[-1] == "ptrag"), None)
    results = Results(dataset, conditions, np.zeros((len(conditions), 2), dtype=int), reference)
    results.equal = {key: np.full((len(conditions), len(COLUMNS)), np.nan) for key in [(CEILING, ""), (COLLAPSE, "")] + labels}
    results.full = {key: np.full((len(conditions), len(COLUMNS)), np.nan) for key in labels}
    capped = sum(len(dataset.cells(*condition)) > max_cells for condition in conditions)
    if capped:
        results.notes.append(f"{capped} of {len(conditions)} conditions have more than {max_cells} cells: {max_cells} of each "
                             "are compared, drawn by seed (--max-cells)")
    pick = lambda condition: data.evaluation_cells(dataset, condition, seed, max_cells)
    for code in sorted({line for line, _ in conditions}):
        own = [condition for condition in conditions if condition[0] == code]
        line = describe_line(dataset, own, controls[code], pick, seed)
        for truth, condition in enumerate(own):
            measure_condition(results, line, truth, condition, pick, contenders, baselines, seed)
            show_progress(sum(count > 0 for count in results.counts[:, 0]), len(conditions))
    return results


def show_progress(done, total):
    """A line that counts conditions, overwritten in place; nothing where nobody watches."""
    if sys.stdout.isatty():
        print(f"\revaluating condition {done} of {total}", end="" if done < total else "\r\x1b[K", flush=True)


def measure_condition(results, line, truth, condition, pick, contenders, baselines, seed):
    """One condition into `results`: all cells in `full`, equal counts in `equal`."""
    dataset, place, name = results.dataset, results.conditions.index(condition), condition_name(results.dataset, condition)
    rows, control_rows = pick(condition)
    real, control = dataset.expression[rows], dataset.expression[control_rows]
    targets = set(dataset.perturbations[condition[1]].split("+"))
    excluded = np.array([gene in targets for gene in dataset.genes])
    predicted = [contender.cells(condition) for contender in contenders]
    half_a, half_b = halves(name, len(real), seed)
    half_b = half_b[:min([len(half_b)] + [len(cells) for cells in predicted])]

    def populations():
        """(m, G) cells in the order of `results.full`; baselines are built one at a time."""
        yield control
        for response in baselines.values():
            yield np.maximum(control + response[condition], 0)  # log1p expression has no negative values
        yield from predicted

    full, equal = [], []
    for cells in populations():
        full.append(line.population(cells))
        if len(half_b):
            equal.append(line.population(cells[seeded_subset(name, len(cells), len(half_b), seed)]))
    if len(half_b):
        collapse = np.repeat(real[half_b].mean(0, keepdims=True, dtype=np.float64).astype(np.float32), len(half_b), axis=0)
        anchors = [line.population(real[half_b]), line.population(collapse)]
        equal = condition_rows(real[half_a], anchors + equal, line, line.half_profiles, truth, excluded)
        for key, row in zip(results.equal, equal):
            results.equal[key][place] = row
    for key, row in zip(results.full, condition_rows(real, full, line, line.profiles, truth, excluded)):
        results.full[key][place] = row
    results.counts[place] = len(real), len(predicted[0]) if predicted else len(real)
    results.responses[condition] = line.profiles[truth] - line.control.mean.astype(np.float32)
    shown = {"real": line.population(real), "control": full[0], "predicted": full[list(results.full).index(results.shown)]}
    results.points[condition] = {kind: population.points[:60, :2].numpy() for kind, population in shown.items()}


# -------------------------------------------------------------------------------------------------------------- baselines

def mean_responses(dataset, conditions, controls, seed, max_cells):
    """Measured response of each condition, mean of its real cells minus its line's control mean: condition -> (G,) float32."""
    response = {}
    for condition in conditions:
        rows = data.evaluation_cells(dataset, condition, seed, max_cells)[0]
        response[condition] = (dataset.expression[rows].mean(0, dtype=np.float64) - controls[condition[0]].mean).astype(np.float32)
    return response


def training_set(responses, line):
    """Perturbations (n,) and responses (n, G) trained in a line; where it has none, those of all lines, averaged per perturbation."""
    own = {p: response for (code, p), response in responses.items() if code == line}
    if not own:
        for p in sorted({p for _, p in responses}):
            own[p] = np.mean([response for (_, q), response in responses.items() if q == p], axis=0)
    return np.array(list(own)), np.stack(list(own.values()))


def nearest(query, pool, k):
    """Places in the pool (n, E) of the k embeddings with the highest cosine similarity to `query` (E,); ties by the lower place."""
    norm = lambda v: v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-12)
    return np.argsort(-(norm(pool) @ norm(query)), kind="stable")[:k]


def ridge(embeddings, responses, penalty):
    """Ridge regression with intercept from embeddings (n, E) to responses (n, G); returns the function (q, E) -> (q, G).

    Dual form, as n is often smaller than E: with the centred embeddings X, K = X X' and the responses R, it predicts
    mean(R) + (q - mean) X' (K + a I)^-1 (R - mean(R)), a = penalty * trace(K) / n: a penalty means the same at any scale of X.
    """
    centre, mean = embeddings.mean(0), responses.mean(0)
    x = (embeddings - centre).astype(np.float64)
    kernel = x @ x.T
    scale = max(penalty * np.trace(kernel) / len(x), 1e-12)
    weights = np.linalg.solve(kernel + scale * np.eye(len(x)), responses - mean)
    return lambda query: ((query - centre) @ x.T @ weights + mean).astype(np.float32)


def choose_penalty(embeddings, training, validation):
    """The penalty from 0.001 to 1000 with the least squared error on the validation conditions; 1 where there are none."""
    grid, lines = [10.0 ** power for power in range(-3, 4)], sorted({line for line, _ in validation})
    if not validation:
        return 1.0
    errors = np.zeros(len(grid))
    for line in lines:
        genes, responses = training_set(training, line)
        queries = [p for code, p in validation if code == line]
        truth = np.stack([validation[line, p] for p in queries])
        for place, penalty in enumerate(grid):
            errors[place] += ((ridge(embeddings[genes], responses, penalty)(embeddings[queries]) - truth) ** 2).sum()
    return grid[int(errors.argmin())]


def baseline_responses(dataset, conditions, training, validation, top_k):
    """Responses the baselines predict: label -> condition -> (G,) float32, and notes. Training conditions only; no learning but ridge's.

    training, validation: condition -> measured response (G,). The baselines: mean over the line's training conditions; mean over the same
    gene's training conditions in the other lines (the line's mean where it has none); mean over the `top_k` training genes of the line with
    the most similar embeddings; ridge regression on the line's training conditions, penalty chosen on validation conditions.
    """
    embeddings = dataset.perturbation_embeddings()
    lines = sorted({line for line, _ in conditions})
    sets = {line: training_set(training, line) for line in lines}
    penalty = choose_penalty(embeddings, training, {c: r for c, r in validation.items() if c[0] in lines})
    learned = {line: ridge(embeddings[genes], responses, penalty) for line, (genes, responses) in sets.items()}
    fewest = min(len(genes) for genes, _ in sets.values())
    names = ["line's mean response", "gene in the other lines", f"{min(top_k, fewest)} nearest genes", "ridge on embeddings"]
    found = {name: {} for name in names}
    elsewhere = 0
    for line, p in conditions:
        genes, responses = sets[line]
        others = [response for (code, q), response in training.items() if q == p and code != line]
        elsewhere += bool(others)
        neighbours = nearest(embeddings[p], embeddings[genes], top_k)
        values = [responses.mean(0), np.mean(others, axis=0) if others else responses.mean(0), responses[neighbours].mean(0),
                  learned[line](embeddings[[p]])[0]]
        for name, value in zip(names, values):
            found[name][line, p] = value.astype(np.float32)
    notes = [f"ridge penalty {penalty:g} (times the mean eigenvalue), chosen on {len(validation)} validation conditions"]
    if elsewhere == 0:
        del found[names[1]]
        notes.append("no row for the gene's response in the other lines: no test gene has training cells in another line")
    elif elsewhere < len(conditions):
        notes.append(f"gene in the other lines: {len(conditions) - elsewhere} of {len(conditions)} conditions fall back on the line's mean")
    if fewest < top_k:
        notes.append(f"nearest genes: a line has only {fewest} training genes, fewer than top_k {top_k}")
    untrained = [dataset.cell_lines[line] for line in lines if not any(code == line for code, _ in training)]
    if untrained:
        notes.append(f"no training conditions in {', '.join(untrained)}: its baselines use the responses of the other lines")
    return found, notes


# ------------------------------------------------------------------------------------------------ significance and summary

def mann_whitney(x, y):
    """Two-sided p value of the Mann-Whitney U test; normal approximation with tie and continuity correction; nan if a side is empty.

    z = (|U - n m / 2| - 1/2) / sd, sd^2 = n m / 12 (n + m + 1 - sum(t^3 - t) / ((n + m) (n + m - 1))), t the sizes of the groups of ties.
    """
    n, m = len(x), len(y)
    if not n or not m:
        return math.nan
    pooled = np.concatenate([x, y])
    u = ranks(pooled)[:n].sum() - n * (n + 1) / 2
    ties = np.unique(pooled, return_counts=True)[1].astype(float)
    variance = n * m / 12 * (n + m + 1 - (ties ** 3 - ties).sum() / ((n + m) * (n + m - 1)))
    if variance <= 0:
        return 1.0
    return min(1.0, math.erfc(max(0.0, abs(u - n * m / 2) - 0.5) / math.sqrt(2 * variance)))


def benjamini_hochberg(p):
    """Adjusted p values (false discovery rate) of an array of any length; nan entries stay nan and do not count."""
    p = np.asarray(p, dtype=float)
    adjusted, known = np.full(p.shape, np.nan), np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    scaled = p[order] * len(order) / np.arange(1, len(order) + 1)
    adjusted[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return adjusted


def average(values, axis=None):
    """Mean without the nan entries; nan, and no warning, where there is nothing else."""
    count = (~np.isnan(values)).sum(axis)
    return np.where(count > 0, np.nansum(values, axis) / np.maximum(count, 1), np.nan)


def better_than(value, other, sign):
    """True where `value` is the better one by more than rounding; sign: +1 larger is better, -1 smaller is."""
    return (value - other) * sign > 1e-6 * np.maximum(np.abs(value), np.abs(other))


def standing(floor, ceiling, collapse, sign):
    """(separates, narrow): is the ceiling better than the floor; is the collapse better than the ceiling, by over 0.1 % of their gap."""
    narrow = better_than(collapse, ceiling, sign) and abs(collapse - ceiling) > 1e-3 * abs(ceiling - floor)
    return bool(better_than(ceiling, floor, sign)), bool(narrow)


def summarise(results):
    """One dict per row of the table and metric, as written to summary.csv.

    mean, standard_error, conditions, spread: over all cells; seeds are averaged within a condition before the standard error over the
    conditions that count, spread is the standard deviation over seeds of their means (nan for one seed). mean_equal and the anchors:
    at equal counts, over the conditions where all four are numbers; position = (mean_equal - floor) / (ceiling - floor), nan where the
    ceiling is not better than the floor. narrow: the collapse is better than the ceiling. p, p_adjusted: Mann-Whitney U against the
    reference row over conditions at equal counts, Benjamini-Hochberg over the table; reference_better of compared conditions.
    """
    rows = []
    monte_carlo = lambda label, metric: float(average(results.values("full", label, metric + "_error"))) if metric[:2] == "sw" else math.nan
    for label in results.labels():
        for metric, (_, sign) in METRICS.items():
            full = results.values("full", label, metric)       # (seeds, C)
            equal = results.values("equal", label, metric)
            per_condition, seed_means = average(full, 0), average(full, 1)
            count = int((~np.isnan(per_condition)).sum())
            anchors = [results.values("equal", name, metric)[0] for name in (FLOOR, CEILING, COLLAPSE)]
            usable = ~np.isnan(np.stack([average(equal, 0), *anchors])).any(0)
            floor, ceiling, collapse = (float(average(anchor[usable])) for anchor in anchors)
            equal_means = average(equal[:, usable], 1)
            separates, narrow = standing(floor, ceiling, collapse, sign)
            mean_equal = float(average(equal_means))
            row = {"method": label, "metric": metric, "mean": float(average(seed_means)),
                   "standard_error": float(np.nanstd(per_condition, ddof=1)) / math.sqrt(count) if count > 1 else math.nan,
                   "conditions": count, "seeds": len(full), "spread": deviation(seed_means),
                   "monte_carlo_error": monte_carlo(label, metric),
                   "mean_equal": mean_equal, "spread_equal": deviation(equal_means),
                   "floor": floor, "ceiling": ceiling, "collapse": collapse,
                   "position": (mean_equal - floor) / (ceiling - floor) if separates else math.nan, "narrow": int(narrow)}
            rows.append(row | against_reference(results, label, metric, sign))
    for row, p in zip(rows, benjamini_hochberg([row["p"] for row in rows])):
        row["p_adjusted"] = float(p)
    return rows


def deviation(values):
    """Standard deviation over seeds; nan below two."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def against_reference(results, label, metric, sign):
    """Test of one row and metric against the reference row, over conditions at equal counts, each the mean over its seeds."""
    empty = {"p": math.nan, "p_adjusted": math.nan, "reference_better": math.nan, "compared": 0}
    if results.reference in (None, label) or label in (CEILING, COLLAPSE):
        return empty
    theirs = average(results.values("equal", label, metric), 0)
    ours = average(results.values("equal", results.reference, metric), 0)
    both = ~np.isnan(theirs) & ~np.isnan(ours)
    p = mann_whitney(theirs[both], ours[both])
    return empty | {"p": p, "reference_better": int(better_than(ours[both], theirs[both], sign).sum()), "compared": int(both.sum())}


# -------------------------------------------------------------------------------------------------------------- retrieval

class Candidate(NamedTuple):
    """One row of retrieval.csv: a candidate of a test condition and how often its cells use it."""
    label: str
    seed: str
    cell_line: str
    perturbation: str
    candidate: str
    probability: float
    selected: float


def read_retrieval(path, label=str):
    """`Candidate` rows of a run's retrieval.csv; label: from the file's method name to the table's row name."""
    if not path.exists():
        return []
    number = lambda text: float(text) if text else math.nan
    with open(path, newline="") as file:
        return [Candidate(label(row["method"]), row["seed"], row["cell_line"], row["perturbation"], row["candidate"],
                          number(row["probability"]), number(row["selected"])) for row in csv.DictReader(file)]


def grouped(rows):
    """Candidates of each condition: (seed, cell line, perturbation) -> list of `Candidate`."""
    groups = {}
    for row in rows:
        groups.setdefault((row.seed, row.cell_line, row.perturbation), []).append(row)
    return groups


def jaccard(a, b):
    """Size of the intersection over size of the union; nan for two empty sets."""
    return len(a & b) / len(a | b) if a | b else math.nan


def line_overlap(groups, cells, generator):
    """Mean Jaccard overlap of the sets selected for one perturbation in two cell lines, the same under shuffled lines, number of pairs.

    A condition's set: the candidates that more than half of its cells select. Shuffled: the cells of the two lines are pooled and cut anew
    at random, which keeps how often a candidate is selected and forgets in which line. cells: (cell line, perturbation) -> count.
    """
    observed, shuffled = [], []
    for (seed_a, line_a, p), a in groups.items():
        for line_b in sorted({line for seed, line, q in groups if seed == seed_a and q == p and line > line_a}):
            b = groups[seed_a, line_b, p]
            n_a, n_b = cells[line_a, p], cells[line_b, p]
            share_a, share_b = ({row.candidate: row.selected for row in rows} for rows in (a, b))
            observed.append(jaccard({c for c, s in share_a.items() if s > 0.5}, {c for c, s in share_b.items() if s > 0.5}))
            set_a, set_b = set(), set()
            for candidate in sorted(share_a | share_b):
                users = round(share_a.get(candidate, 0) * n_a) + round(share_b.get(candidate, 0) * n_b)
                drawn = generator.hypergeometric(users, n_a + n_b - users, n_a)
                set_a |= {candidate} if drawn > n_a / 2 else set()
                set_b |= {candidate} if users - drawn > n_b / 2 else set()
            shuffled.append(jaccard(set_a, set_b))
    return float(average(np.array(observed))), float(average(np.array(shuffled))), len(observed)


def cosines(dataset, responses, line):
    """Cosines between the measured responses of every two genes of a cell line: their names (N,), and (N, N) float32."""
    own = {dataset.perturbations[p]: response for (code, p), response in responses.items() if code == line}
    unit = np.stack(list(own.values()))                                                              # (N, G)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    return list(own), unit @ unit.T


def response_similarity(dataset, groups, responses, pool):
    """Is retrieval any good? Name -> (conditions,) array, nan where unknown, of the mean cosine between the query's measured response
    and those of its candidates, of the pool's other genes ("random"), of the selected and the unselected candidates, and of the rank
    correlation over the candidates between selection probability and that cosine."""
    table = []
    of_line = functools.cache(lambda line: cosines(dataset, responses, dataset.cell_lines.index(line)))
    for (_, line, p), rows in groups.items():
        genes, cosine_of = of_line(line)
        cosine = {gene: value for gene, value in zip(genes, cosine_of[genes.index(p)].tolist()) if gene != p}
        names = {row.candidate for row in rows}
        measured = [row for row in rows if row.candidate in cosine]
        mean = lambda chosen: float(average(np.array([cosine[name] for name in chosen])))
        pairs = np.array([(row.probability, cosine[row.candidate]) for row in measured if not math.isnan(row.probability)])
        table.append([mean([row.candidate for row in measured]), mean([name for name in cosine if name in pool and name not in names]),
                      mean([row.candidate for row in measured if row.selected > 0.5]),
                      mean([row.candidate for row in measured if row.selected <= 0.5]),
                      spearman(*pairs.T) if len(pairs) > 2 else math.nan])
    return dict(zip(["candidates", "random", "selected", "unselected", "rank_correlation"], np.array(table).T))


def settled(probability):
    """In words, where selection has settled, from the probability of every candidate of every condition.

    The division of the logits by their spread keeps the mean margin within -2 and 2, so the mean probability cannot fall below
    sigmoid(-2) = 0.12 nor rise above 0.88: a selection near the one uses candidates by chance, one near the other uses all it can.
    """
    mean = float(np.mean(probability))
    if mean < 0.05:
        return f"selection has settled at none (mean probability {mean:.2f}): the context is empty in nearly every cell"
    if mean <= 0.18:
        return f"selection has settled at its noise floor (mean probability {mean:.2f}, 0.12 is the least possible): what is used is chance"
    if mean >= 0.82:
        return f"selection has settled at using nearly all candidates (mean probability {mean:.2f}), so it does not choose among them"
    if np.std(probability) < 0.02:
        return f"selection is indifferent (every probability near {mean:.2f}): cells and candidates are not told apart"
    return f"selection chooses (mean probability {mean:.2f}, standard deviation over conditions and candidates {np.std(probability):.2f})"


def describe_retrieval(results, candidates, pool, responses, empty):
    """The retrieval report: lines of text for each row of the table that retrieves.

    candidates: list of `Candidate`; pool: names that could be retrieved; responses: measured, condition -> (G,); empty: label -> share
    of cells that select nothing (nan for methods without selection).
    """
    lines, dataset = [], results.dataset
    named = [(dataset.cell_lines[line], dataset.perturbations[p]) for line, p in results.conditions]
    cells = dict(zip(named, results.counts[:, 1].tolist()))
    for label in dict.fromkeys(row.label for row in candidates):
        groups = grouped(row for row in candidates if row.label == label)
        found = response_similarity(dataset, groups, responses, pool)
        number = lambda key: f"{short(float(average(found[key])))} ({int((~np.isnan(found[key])).sum())})"
        lines.append(f"{label}: measured responses of candidates resemble the query's with cosine {number('candidates')}, "
                     f"those of the pool's other genes with {number('random')} (in brackets: conditions)")
        probability = np.array([row.probability for rows in groups.values() for row in rows])
        if np.isnan(probability).any():
            continue
        lines.append(f"{label}: {settled(probability)}; {100 * empty.get(label, math.nan):.1f} % of cells use none at all")
        lines.append(f"{label}: selected candidates {number('selected')}, unselected {number('unselected')}; rank correlation of selection "
                     f"probability with the cosine of responses {number('rank_correlation')}")
        overlap, shuffled, pairs = line_overlap(groups, cells, np.random.default_rng(0))
        lines.append(f"{label}: " + (
            f"Jaccard overlap of the selected sets between cell lines {overlap:.2f}, with lines shuffled {shuffled:.2f} ({pairs} pairs)"
            if pairs else "no perturbation is tested in two cell lines, so there is no overlap of selected sets to measure"))
    return lines


# ----------------------------------------------------------------------------------------------------------------- tables

class Block(NamedTuple):
    """A part of the table: title, column headings, rows of (label, list of cell texts)."""
    title: str
    headings: list
    rows: list


def short(value):
    """A number with four significant digits, as short as that goes; a dash for nan."""
    if value is None or math.isnan(value):
        return "–"
    size = abs(value)
    if size and not 1e-3 <= size < 1e5:
        return f"{value:.1e}"
    return f"{value:.{0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3 if size >= 1 else 4}f}"


def stars(p):
    """Marks of significance: *** 0.001, ** 0.01, * 0.05."""
    return "".join("*" for limit in (0.05, 0.01, 0.001) if p <= limit)


def table_blocks(summary, full=True):
    """The table as `Block`s: values of the first metrics at equal counts, those of the others, positions, paired comparisons."""
    cell = {(row["method"], row["metric"]): row for row in summary}
    labels = list(dict.fromkeys(row["method"] for row in summary))
    judged = [label for label in labels if label not in (CEILING, COLLAPSE, FLOOR)]
    narrow = {metric for metric in METRICS if cell[CEILING, metric]["narrow"]}
    heading = lambda metric: METRICS[metric][0] + "!" * (metric in narrow)

    def value(row, spread=False):
        text = short(row["mean_equal"]) + (f"±{row['spread_equal']:.1g}" if spread and not math.isnan(row["spread_equal"]) else "")
        return text + f"{stars(row['p_adjusted']):<3}"

    def block(title, rows, metrics, text, tail=""):
        lines = [(label, [text(cell[label, metric]) for metric in metrics]) for label in rows]
        return Block(title, [heading(metric) + tail for metric in metrics], lines)

    every = list(METRICS)
    blocks = [block("mean over conditions, equal counts", labels, FIRST_METRICS, lambda row: value(row, spread=True), "   ")]
    if full:
        blocks.append(block("other metrics, equal counts", labels, [m for m in every if m not in FIRST_METRICS], value, "   "))
    blocks.append(block("position: 0 floor, 1 ceiling", judged, every if full else FIRST_METRICS,
                        lambda row: "–" if math.isnan(row["position"]) else f"{row['position']:.2f}"))
    compared = [label for label in [FLOOR] + judged if any(cell[label, m]["compared"] for m in every)]
    if full and compared:
        count = max(row["compared"] for row in summary)
        share = lambda row: f"{row['reference_better']}" + f"/{row['compared']}" * (row["compared"] < count) if row["compared"] else "–"
        blocks.append(block(f"of {count} conditions PT-RAG is better in", compared, every, share))
    return blocks


def footnotes(summary, reference):
    """What the marks of the table mean, those that occur; `reference`: the row that others are tested against."""
    notes = []
    if any(row["p_adjusted"] <= 0.05 for row in summary):
        notes.append(f"* ** *** differs from {reference}, p <= .05 .01 .001: Mann-Whitney U over conditions (unpaired, as in the paper), "
                     "Benjamini-Hochberg over the table")
    if any(row["narrow"] for row in summary):
        notes.append("! the collapse stands above the ceiling: the metric rewards populations that are too narrow; not to be trusted alone")
    if any(math.isnan(row["position"]) and not math.isnan(row["mean_equal"]) for row in summary):
        notes.append("– as a position: the ceiling is not better than the floor, so this metric cannot tell them apart here")
    if any(row["seeds"] > 1 for row in summary):
        notes.append("± standard deviation over seeds (and draws, SEED.DRAW); the value before it is their mean")
    few = sorted({(METRICS[row["metric"]][0], row["conditions"]) for row in summary if row["metric"] in ("pearson_deg", "spearman_deg")
                  and row["method"] == FLOOR and row["conditions"] < max(r["conditions"] for r in summary)})
    notes += [f"{heading}: {count} conditions count, the others have fewer than two expressed differentially" for heading, count in few]
    return notes


def print_block(block, say):
    """A `Block` as aligned text."""
    widths = [max(map(len, column)) for column in zip(block.headings, *(cells for _, cells in block.rows))]
    first = max(len(block.title), *(len(label) for label, _ in block.rows))
    line = lambda label, cells: (f"{label:<{first}}  " + " ".join(f"{text:>{width}}" for text, width in zip(cells, widths))).rstrip()
    say("")
    say(line(block.title, block.headings))
    for label, cells in block.rows:
        say(line(label, cells))


def header(results, name, split=""):
    """One line: data set, split, what is compared, seeds."""
    seeds = list(dict.fromkeys(seed for _, seed in results.equal if seed))
    half = int(np.median(results.counts[:, 0] // 2))
    parts = [name if name != "simulated" else "simulated data", *([f"split {split}"] if split else []),
             f"{len(results.conditions)} conditions", "{:,} real and {:,} predicted cells".format(*results.counts.sum(0)),
             f"equal counts: {half} against {half} cells (median)", *([f"seeds {', '.join(seeds)}"] if seeds else [])]
    return " | ".join(parts)


def write_csv(path, columns, rows):
    """Rows of values as CSV, nan as an empty cell; under a temporary name until complete."""
    text = lambda value: "" if isinstance(value, float) and math.isnan(value) else f"{value:.7g}" if isinstance(value, float) else value
    with data.atomic_output(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([text(value) for value in row] for row in rows)


def write_metrics(path, results, labels=None):
    """metrics.csv, one row per condition over all its cells: of every row of the table, or of one, then without `method,seed`."""
    keys = [key for key in results.full if labels is None or key[0] in labels]
    places = [COLUMNS.index(name) for name in CONDITION_COLUMNS]
    rows = []
    for key in keys:
        for i, (line, p) in enumerate(results.conditions):
            names = [results.dataset.cell_lines[line], results.dataset.perturbations[p], *results.counts[i].tolist()]
            values = [float(results.full[key][i, place]) for place in places]
            rows.append([*(key if labels is None else ()), *names, *values])
    first = ["method", "seed"] if labels is None else []
    write_csv(path, [*first, "cell_line", "perturbation", "n_real", "n_pred", *CONDITION_COLUMNS], rows)


# ----------------------------------------------------------------------------------------------------------------- report

STYLE = """
:root { color-scheme: light dark; --bg: #fff; --ink: #1c1e21; --soft: #6a6f76; --line: #d9dce0; --mark: #0b62c4; --base: #8a9099;
  --c0: #0b62c4; --c1: #c2570c; --c2: #2a7d3a; --c3: #8b3fb0; --c4: #b0223f; --c5: #4d6b75 }
@media (prefers-color-scheme: dark) { :root { --bg: #16181b; --ink: #e7e9ec; --soft: #9aa1aa; --line: #363a40; --mark: #69a9f5;
  --base: #8d949d; --c0: #69a9f5; --c1: #f0995a; --c2: #6fc381; --c3: #cb92ea; --c4: #f0788f; --c5: #9fbcc6 } }
body { background: var(--bg); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1300px; padding: 1.5rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .4rem } p { margin: .3rem 0; max-width: 90ch }
.soft { color: var(--soft) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: .6rem 0 }
th, td { padding: .15rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left; padding-left: 0 } th { font-weight: 600 }
.stars { display: inline-block; text-align: left; width: 1.7em }
.panels { display: flex; flex-wrap: wrap; gap: 1rem 1.6rem } figure { margin: 0 } figcaption { font-size: 13px; font-weight: 600 }
svg { display: block; max-width: 100%; height: auto } svg text { fill: var(--soft); font: 11px system-ui, sans-serif }
svg .name { fill: var(--ink) }
.axis { stroke: var(--line); fill: none } .dots { stroke-linecap: round; stroke-width: 4; stroke-opacity: .45; fill: none }
.cells { stroke-width: 5; stroke-opacity: .7 }
.curve { fill: none; stroke-width: 1.6 } .end { text-anchor: end } .middle { text-anchor: middle }
.mean { fill: var(--ink) }
"""


def svg(width, height, title, parts):
    """A figure with its title around SVG elements."""
    return (f'<figure><figcaption>{html.escape(title)}</figcaption><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg></figure>')


def svg_text(x, y, text, kind=""):
    """A piece of text at a point of an SVG."""
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{kind}">{html.escape(str(text))}</text>'


def dots(points, colour, kind="dots"):
    """Many small discs as one path: each a line of no length with round ends. points: (k, 2)."""
    return f'<path class="{kind}" stroke="{colour}" d="{"".join(f"M{x:.0f} {y:.0f}h0" for x, y in points)}"/>'


def html_block(block):
    """A `Block` as an HTML table; the marks of significance get a column of their own width, so that numbers line up."""
    def cell(text):
        number = text.rstrip("* ")
        mark = f'<span class="stars">{text[len(number):].strip()}</span>' if text.endswith((" ", "*")) else ""
        return f"<td>{html.escape(number)}{mark}</td>"
    heads = "".join(f"<th>{html.escape(text.strip())}" + ('<span class="stars"></span>' if text.endswith(" ") else "") + "</th>"
                    for text in [block.title, *block.headings])
    rows = "".join(f"<tr><td>{html.escape(label)}</td>{''.join(map(cell, cells))}</tr>" for label, cells in block.rows)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def strips(results, summary):
    """Per metric one strip per row of the table: where each condition stands, 0 its own floor, 1 one mean distance from floor to ceiling.

    A condition's place is (value - its floor) / mean(ceiling - floor), so the mean over a strip is the row's position in the table.
    """
    cell = {(row["method"], row["metric"]): row for row in summary}
    labels = [label for label in results.labels() if label not in (CEILING, COLLAPSE, FLOOR)]
    shown = max(10, min(len(results.conditions), 9000 // (len(METRICS) * max(1, len(labels)))))
    places = np.unique(np.linspace(0, len(results.conditions) - 1, shown).astype(int))
    left, right, step = 156, 480, 15
    x = lambda position: left + (np.clip(position, -1, 2) + 1) / 3 * (right - left)
    figures = []
    for metric, (heading, _) in METRICS.items():
        anchor = cell[labels[0], metric]
        if math.isnan(anchor["position"]):
            continue
        gap, bottom = anchor["ceiling"] - anchor["floor"], 14 + step * len(labels)
        parts = [f'<path class="axis" d="M{x(v):.0f} 4V{bottom}"/>' + svg_text(x(v), bottom + 12, text, "middle")
                 for v, text in ((0, "floor"), (1, "ceiling"))]
        floor = results.values("equal", FLOOR, metric)[0]
        for row, label in enumerate(labels):
            value = (average(results.values("equal", label, metric), 0) - floor) / gap
            y = 14 + step * row
            points = [(x(v), y) for v in value[places] if not math.isnan(v)]
            mean = cell[label, metric]["position"]
            colour = "var(--mark)" if label == results.shown[0] else "var(--base)"
            parts += [svg_text(left - 12, y + 4, label, "name end"), dots(points, colour)]
            if not math.isnan(mean):
                parts.append(f'<rect class="mean" x="{x(mean) - 1.5:.0f}" y="{y - 6}" width="3" height="12"/>')
        figures.append(svg(right + 10, bottom + 18, heading + ("  (! rewards narrow populations)" if anchor["narrow"] else ""), parts))
    skipped = [METRICS[m][0] for m in METRICS if math.isnan(cell[labels[0], m]["position"])]
    note = (f"Each dot is a condition ({len(places)} of {len(results.conditions)} drawn), the bar the mean; beyond -1 or 2 at the edge."
            + (f" Without a strip, the ceiling not being better than the floor: {', '.join(skipped)}." if skipped else ""))
    return f'<p class="soft">{html.escape(note)}</p><div class="panels">{"".join(figures)}</div>'


def read_log(path, label):
    """Training curves of a run's log.csv: (label, seed) -> column -> list of (step, value)."""
    curves = {}
    if path.exists():
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                columns = curves.setdefault((label(row["method"]), row["seed"]), {"energy": [], "validation": []})
                for name, points in columns.items():
                    if row.get(name) not in (None, "", "nan"):
                        points.append((float(row["step"]), float(row[name])))
    return curves


def curve_figures(curves):
    """Training and validation energy over the steps, one colour per method, one line per seed, at most 150 points each."""
    labels, figures = list(dict.fromkeys(label for label, _ in curves)), []
    for column, title in (("energy", "energy distance of training sets"), ("validation", "validation")):
        lines = {key: np.array(found[column])[np.unique(np.linspace(0, len(found[column]) - 1, 150).astype(int))]
                 for key, found in curves.items() if found[column]}
        if not lines:
            continue
        points = np.concatenate(list(lines.values()))
        low, high, last = np.quantile(points[:, 1], 0), np.quantile(points[:, 1], 0.98), max(points[:, 0].max(), 1)
        x, y = lambda v: 50 + 330 * v / last, lambda v: 190 - 175 * np.clip((v - low) / max(high - low, 1e-12), 0, 1)
        parts = [f'<path class="axis" d="M50 {y(v):.0f}H380"/>' + svg_text(44, y(v) + 4, short(float(v)), "end")
                 for v in np.linspace(low, high, 4)]
        parts += [svg_text(50, 206, 0), svg_text(380, 206, f"step {int(last)}", "end")]
        for (label, _), line in lines.items():
            path = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in line)
            parts.append(f'<path class="curve" stroke="var(--c{labels.index(label) % 6})" d="M{path}"/>')
        for place, label in enumerate(labels):
            parts += [f'<rect x="392" y="{18 + 18 * place}" width="10" height="10" fill="var(--c{place % 6})"/>',
                      svg_text(408, 27 + 18 * place, label, "name")]
        figures.append(svg(540, 212, title, parts))
    return f'<div class="panels">{"".join(figures)}</div>' if figures else '<p class="soft">No training log.</p>'


def selection_maps(candidates, most=3):
    """For the perturbations whose selection differs most between cell lines: candidates by lines, shaded by selection probability."""
    by_perturbation = {}
    for row in candidates:
        if not math.isnan(row.probability):
            found = by_perturbation.setdefault((row.label, row.perturbation), {})
            found.setdefault((row.candidate, row.cell_line), []).append(row.probability)
    scored = []
    for (label, perturbation), found in by_perturbation.items():
        lines = sorted({line for _, line in found})
        genes = sorted({gene for gene, _ in found}, key=lambda gene: -max(np.mean(v) for (g, _), v in found.items() if g == gene))
        table = np.array([[np.mean(found.get((gene, line), [np.nan])) for line in lines] for gene in genes])
        differs = float(average(np.ptp(table, axis=1))) if len(lines) > 1 else float(np.ptp(table))
        scored.append((-differs, label, perturbation, lines, genes[:12], table[:12]))
    figures = []
    for differs, label, perturbation, lines, genes, table in sorted(scored, key=lambda entry: entry[:3])[:most]:
        width, height = 96 + 62 * len(lines), 34 + 18 * len(genes)
        parts = [svg_text(127 + 62 * i, 14, line[:10], "middle") for i, line in enumerate(lines)]
        for r, gene in enumerate(genes):
            parts.append(svg_text(88, 36 + 18 * r, gene[:12], "name end"))
            for c, value in enumerate(table[r]):
                if not math.isnan(value):
                    parts += [f'<rect x="{96 + 62 * c}" y="{22 + 18 * r}" width="60" height="16" fill="var(--mark)" '
                              f'fill-opacity="{0.75 * value:.2f}"/>', svg_text(126 + 62 * c, 34 + 18 * r, f"{value:.2f}", "name middle")]
        figures.append(svg(width, height, f"{perturbation} ({label})", parts))
    return f'<div class="panels">{"".join(figures)}</div>' if figures else '<p class="soft">No method with a selection in these runs.</p>'


def scatters(results):
    """Real, predicted and control cells in the first two components, for a strong, a middling and a weak perturbation."""
    effect = np.nan_to_num(results.values("full", FLOOR, "energy")[0])
    order = np.argsort(-effect, kind="stable")
    chosen = list(dict.fromkeys(order[[len(order) // 10, len(order) // 2, len(order) * 9 // 10]].tolist()))
    colours = {"control": "var(--base)", "real": "var(--c1)", "predicted": "var(--mark)"}
    figures = []
    for place in chosen:
        points = {kind: found for kind, found in results.points[results.conditions[place]].items() if found.shape[1] == 2}
        if not points:
            continue
        pooled = np.concatenate(list(points.values()))
        low, size = pooled.min(0), np.maximum(np.ptp(pooled, axis=0), 1e-9)
        parts = ['<rect class="axis" x="1" y="1" width="318" height="238"/>']
        for i, (kind, colour) in enumerate(colours.items()):
            parts += [dots(10 + (points[kind] - low) / size * [300, 205], colour, "dots cells"),
                      f'<rect x="{8 + 85 * i}" y="226" width="9" height="9" fill="{colour}"/>', svg_text(21 + 85 * i, 234, kind, "name")]
        name = condition_name(results.dataset, results.conditions[place]).replace(":", ": ")
        figures.append(svg(320, 240, f"{name} (floor energy {short(float(effect[place]))})", parts))
    return f'<div class="panels">{"".join(figures)}</div>'


def write_report(path, title, results, summary, notes, retrieval=(), candidates=(), curves=None):
    """report.html: one self-contained page, inline SVG, no script, nothing fetched."""
    listed = lambda lines: "".join(f"<p>{html.escape(line)}</p>" for line in lines)
    shown = results.shown[0]
    parts = [f"<h1>Predicted cell populations</h1><p class='soft'>{html.escape(title)}</p><h2>Table</h2>",
             *map(html_block, table_blocks(summary)), listed(footnotes(summary, results.reference) + notes),
             "<h2>Conditions between floor and ceiling</h2>", strips(results, summary)]
    if curves:
        parts += ["<h2>Training</h2>", curve_figures(curves)]
    if retrieval:
        parts += ["<h2>Retrieval and selection</h2>", listed(retrieval),
                  "<p class='soft'>Probability of selection, where cell lines differ most.</p>", selection_maps(candidates)]
    parts += [f"<h2>Cells</h2><p class='soft'>First two principal components, at most 60 cells each; predicted by {html.escape(shown)}. "
              "A strong, a middling and a weak perturbation.</p>", scatters(results)]
    page = (f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style><body>{''.join(parts)}</body></html>")
    with data.atomic_output(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(page)


# ----------------------------------------------------------------------------------------------------------- command line

def control_moments(dataset, lines):
    """`Moments` of each line's real control cells: line -> Moments. A line without control cells is a `DataError`."""
    found = {}
    for line in lines:
        rows = dataset.cells(line, 0)
        if not len(rows):
            raise data.DataError(f"{dataset.name}: cell line {dataset.cell_lines[line]} has no control cells ({dataset.perturbations[0]}); "
                                 "evaluation needs them as its floor")
        found[line] = moments(row_blocks(dataset.expression, rows))
    return found


def read_predictions(path, dataset, label, files):
    """Predictions of a run, left on disk: list of `Contender`, and label -> share of cells that select nothing.

    Cells of one (method, seed, condition) stand together; each condition is read when asked for. files: ExitStack that closes the file.
    """
    if not path.exists():
        raise data.DataError(f"{path}: no such file; the run was not finished (continue it with --resume)")
    columns = data.read_obs(path, ["method", "seed", "cell_line", "perturbation", "nothing_selected"])
    keys = [np.asarray(columns[name]).astype(str) for name in ("method", "seed", "cell_line", "perturbation")]
    change = np.flatnonzero(np.any([key[1:] != key[:-1] for key in keys], axis=0)) + 1
    starts, ends = [0, *change.tolist()], [*change.tolist(), len(keys[0])]
    place = {tuple(str(key[start]) for key in keys): (start, end) for start, end in zip(starts, ends)}
    matrix = data.open_matrix(files.enter_context(data.open_file(path)), "X").values
    if matrix.shape[1] != len(dataset.genes):
        raise data.DataError(f"{path}: has {matrix.shape[1]} genes, the data {len(dataset.genes)}: the run was made from other data")

    def reader(method, seed):
        def cells(condition):
            key = (method, seed, dataset.cell_lines[condition[0]], dataset.perturbations[condition[1]])
            if key not in place:
                raise data.DataError(f"{path}: no predicted cells of {key[2]}, {key[3]} by {method}, seed {seed}; train the run again")
            return matrix[slice(*place[key])]
        return cells

    pairs = list(dict.fromkeys(key[:2] for key in place))
    empty = np.asarray(columns["nothing_selected"], dtype=float)
    shares = {label(method): float(average(empty[keys[0] == method])) for method, _ in pairs}
    return [Contender(label(method), seed, reader(method, seed)) for method, seed in pairs], shares


def check_same_task(folders, configs):
    """Runs stand in one table only when they were tested on the same cells."""
    for folder, config in zip(folders, configs):
        for name in ("data", "genept", "split", "seed", "max_cells", "hvg"):
            if getattr(config, name) != getattr(configs[0], name):
                raise data.DataError(f"{folder}: has {name} {getattr(config, name)!r}, {folders[0]} {getattr(configs[0], name)!r}; "
                                     "runs on different cells cannot stand in one table")


def evaluate_runs(folders, dataset=None, split=None, out=None, say=print, full=False):
    """Evaluates the saved predictions of one run, or of several side by side, and returns the rows of summary.csv.

    Writes metrics.csv, summary.csv and report.html to `out` (the run's folder; for several runs a folder A+B beside the first) and prints
    the table, all of it with `full`. dataset, split: what the runs were trained on, loaded anew if not given.
    """
    folders = [Path(folder) for folder in folders]
    configs = [ptrag.read_config(folder) for folder in folders]
    check_same_task(folders, configs)
    config = configs[0]
    if dataset is None:
        dataset, split = ptrag.open_data(config)
    out = Path(out) if out else folders[0] if len(folders) == 1 else folders[0].parent / "+".join(folder.name for folder in folders)
    out.mkdir(parents=True, exist_ok=True)
    contenders, empty, candidates, curves = [], {}, [], {}
    with contextlib.ExitStack() as files:
        for folder in folders:
            label = (lambda method, folder=folder: method if len(folders) == 1 else f"{folder.name}/{method}")
            found, shares = read_predictions(folder / "predictions.h5ad", dataset, label, files)
            contenders, empty = contenders + found, empty | shares
            candidates += read_retrieval(folder / "retrieval.csv", label)
            curves |= read_log(folder / "log.csv", label)
        controls = control_moments(dataset, sorted({line for line, _ in split.train + split.validation + split.test}))
        training = mean_responses(dataset, split.train, controls, config.seed, config.max_cells)
        validation = mean_responses(dataset, split.validation, controls, config.seed, config.max_cells)
        baselines, notes = baseline_responses(dataset, split.test, training, validation, config.top_k)
        results = measure(dataset, split.test, contenders, baselines, controls, config.seed, config.max_cells)
    pooled = {"train": split.train, "trainval": split.train + split.validation}.get(config.pool, dataset.conditions())
    pool = {dataset.perturbations[p] for _, p in pooled}
    retrieval = describe_retrieval(results, candidates, pool, training | validation | results.responses, empty)
    return present(results, out, header(results, dataset.name, config.split), notes, say, full, retrieval, candidates, curves)


def present(results, out, title, notes, say, full, retrieval=(), candidates=(), curves=None, labels=None):
    """Writes the three files and prints the table; returns the rows of summary.csv."""
    summary, notes = summarise(results), results.notes + notes
    write_metrics(out / "metrics.csv", results, labels)
    write_csv(out / "summary.csv", list(summary[0]), [row.values() for row in summary])
    write_report(out / "report.html", title, results, summary, notes, retrieval, candidates, curves)
    wrap = functools.partial(textwrap.fill, width=140, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    say(wrap(title))
    for block in table_blocks(summary, full):
        print_block(block, say)
    say("")
    for line in footnotes(summary, results.reference) + notes + list(retrieval):
        say(wrap(line))
    say(f"{'everything' if full else 'the other metrics, significance and figures'}: {out}/metrics.csv, summary.csv, report.html")
    return summary


def read_predicted(path, genes, options, files):
    """Predicted cells of an AnnData file: {(cell line, perturbation): row numbers}, a function rows -> (n, len(genes)) float32, and notes.

    Genes are matched by name. Negative values are let through, as linear models make them; whole numbers are taken for counts and
    log-normalised as the real ones are. Dense matrices stay on disk. files: ExitStack that closes the file.
    """
    file = files.enter_context(data.open_file(path))
    labels, _ = data.read_labels(file, path, options.perturbation_column, options.cell_line_column, options.batch_column)
    for name in {"method", "seed"} & set(data.members(data.child(file, "obs"))):
        if len(several := sorted(set(map(str, data.read_obs(path, [name])[name])))) > 1:
            raise data.DataError(f"{path}: holds the predictions of several values of obs {name} ({data.some(several)}); "
                                 "python evaluate.py runs/NAME tells them apart, or keep the cells of one")
    key = "X" if data.child(file, "obsm/X_hvg") is None else "obsm/X_hvg"
    matrix = data.open_matrix(file, key)
    names, notes = data.gene_names(file, path, key, matrix.shape[1])
    missing, extra = sorted(set(genes) - set(names)), sorted(set(names) - set(genes))
    if missing:
        raise data.DataError(f"{path}: {len(missing)} genes of the real data are missing: {data.some(missing)}; both need the same genes")
    if extra:
        notes.append(f"{path}: {len(extra)} genes that the real data do not hold are left out: {data.some(extra)}")
    place = {name: i for i, name in enumerate(names)}
    columns = np.array([place[gene] for gene in genes])
    everything = np.arange(matrix.shape[1])
    dense_blocks = ((first, data.dense_columns(block, everything)) for first, block in data.row_blocks(matrix))
    stored = matrix.values if matrix.layout == "dense" else data.gather_sparse(dense_blocks, matrix.shape[1])
    counts = whole_numbers(matrix.values)
    if counts:
        notes.append(f"{path}: counts, normalised to 10,000 per cell and log1p'd")

    def cells(rows):
        block = np.asarray(stored[rows], dtype=np.float32)
        if not np.isfinite(block).all():
            raise data.DataError(f"{path}: {key} holds values that are not finite (NaN or infinite)")
        if counts:
            block = np.log1p(block * (data.TARGET_SUM / np.maximum(block.sum(1, keepdims=True), 1)))
        return block[:, columns]

    codes = [np.array([*values, "nan"])[numbers] for numbers, values in labels[:2]]
    found = {}
    for row, name in enumerate(zip(*(code.tolist() for code in codes))):
        found.setdefault(name, []).append(row)
    return {name: np.array(rows) for name, rows in found.items()}, cells, notes


def whole_numbers(stored):
    """Whether the first stored values are whole numbers with some above 20, so counts."""
    sample = np.asarray(stored[:200])
    return bool(sample.size and (sample == np.rint(sample)).all() and sample.max() > data.LOG_NORMALISED_MAX)


def evaluate_files(options, say=print):
    """Evaluates anyone's predicted cells against real ones, both in AnnData files; returns the rows of summary.csv."""
    real = data.load(options.real, None, options.perturbation_column, options.cell_line_column, options.batch_column, options.control,
                     options.hvg, need_embeddings=False)
    ours = {(real.cell_lines[line], real.perturbations[p]): (line, p) for line, p in real.conditions()}
    out = Path(options.out)
    with contextlib.ExitStack() as files:
        theirs, expression, notes = read_predicted(options.pred, real.genes, options, files)
        theirs = {name: rows for name, rows in theirs.items() if name[1] != real.perturbations[0]}
        conditions = sorted(ours[name] for name in ours if name in theirs)
        text = lambda names: data.some(map(" / ".join, names)) or "none"
        if not conditions:
            raise data.DataError(f"{options.pred}: has no condition of {options.real}: {text(theirs)} against {text(ours)}; "
                                 "perturbations and cell lines must have the same names")
        for path, what, lonely in ((options.pred, "have no real cells", [name for name in theirs if name not in ours]),
                                   (options.real, "are not predicted", [name for name in ours if name not in theirs])):
            if lonely:
                notes.append(f"{path}: {len(lonely)} conditions {what} and are left out: {text(lonely)}")

        def cells(condition):
            rows = theirs[real.cell_lines[condition[0]], real.perturbations[condition[1]]]
            name = condition_name(real, condition)
            return expression(rows[seeded_subset(name, len(rows), min(len(rows), options.max_cells), options.seed)])

        controls = control_moments(real, sorted({line for line, _ in conditions}))
        results = measure(real, conditions, [Contender("prediction", "", cells)], {}, controls, options.seed, options.max_cells)
    out.mkdir(parents=True, exist_ok=True)
    title = header(results, f"{options.pred} against {options.real}")
    return present(results, out, title, real.notes + notes, say, True, labels=["prediction"])


def main(arguments=None):
    """The command line: 0 on success; one line on stderr and 2 where the input is wrong."""
    parser = argparse.ArgumentParser(description="Evaluate predicted cells: metrics with anchors, baselines and significance.")
    parser.add_argument("runs", nargs="*", help="run folders, runs/NAME, side by side in one table")
    parser.add_argument("--real", help="AnnData file of real cells, controls among them")
    parser.add_argument("--pred", help="AnnData file of predicted cells")
    parser.add_argument("--control", help="label of the control cells (default: recognised)")
    parser.add_argument("--perturbation-column", help="obs column of the perturbation (default: recognised)")
    parser.add_argument("--cell-line-column", help="obs column of the cell line (default: recognised)")
    parser.add_argument("--batch-column", help="obs column of the gem group or batch (default: recognised)")
    parser.add_argument("--hvg", type=int, default=2000, help="highly variable genes to choose where a file has no X_hvg (default 2000)")
    parser.add_argument("--max-cells", type=int, default=1000, help="most cells compared per condition (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the halves and subsets (default 0)")
    parser.add_argument("-o", "--out", help="folder to write metrics.csv, summary.csv and report.html to")
    options = parser.parse_args(arguments)
    files = options.real is not None and options.pred is not None and options.out is not None
    if bool(options.runs) == bool(options.real or options.pred) or (not options.runs and not files):
        parser.error("give run folders, or --real REAL.h5ad --pred PRED.h5ad -o OUT/")
    if options.max_cells < 2:
        parser.error("--max-cells must be at least 2")
    try:
        if options.runs:
            evaluate_runs(options.runs, out=options.out, full=True)
        else:
            evaluate_files(options)
    except (data.DataError, ptrag.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
