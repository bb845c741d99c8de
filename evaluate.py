"""Evaluation of predicted cells: metrics, anchors that give them meaning, baselines, significance, report.

    python evaluate.py runs/NAME [runs/OTHER ...]                  one table; runs stand side by side, and are
                                                                   pooled if they differ in the split alone
    python evaluate.py --real REAL.h5ad --pred PRED.h5ad -o OUT/   anyone's predictions against real cells
    python evaluate.py runs/NAME --export DIR                      what cell-eval and cell-load read

Letters: n real and m predicted cells of a condition (a perturbation in a cell line), G genes, d principal
components, P populations compared with the same real cells (methods, baselines, anchors), C conditions,
R rows of the table, M measured columns.
"""
import argparse
import contextlib
import csv
import functools
import html
import itertools
import json
import math
import sys
import textwrap
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch

import data
import ptrag

METRICS = {  # name in the files: (heading, +1 where larger is better, -1 where smaller is)
    "w1": ("W1", -1), "w2": ("W2", -1), "w2_half_squared": ("W2²/2", -1), "w1_marginal": ("W1 marg", -1),
    "w2_marginal": ("W2 marg", -1), "w2_half_squared_marginal": ("W2²/2 marg", -1), "sw1": ("SW1", -1),
    "sw2": ("SW2", -1), "energy": ("energy", -1), "energy_marginal": ("energy marg", -1), "mmd": ("MMD²", -1),
    "pearson_deg": ("r DEG", 1), "spearman_deg": ("rho DEG", 1), "pearson_delta": ("r delta", 1),
    "pearson_delta_perturbed_mean": ("r delta pert", 1), "mae": ("MAE", -1), "mse": ("MSE", -1),
    "mse_pca": ("MSE PCA", -1), "discrimination": ("discrim", 1), "discrimination_cosine": ("discrim cos", 1),
}
FIRST_METRICS = ["w1", "w2", "sw1", "sw2", "energy", "pearson_delta"]
CONDITION_COLUMNS = [*METRICS][:13] + ["n_deg"] + [*METRICS][13:]   # metrics.csv, after the counts
COLUMNS = [*CONDITION_COLUMNS, "sw1_error", "sw2_error"]            # all that is measured
ANCHORS = "other real half (ceiling)", "its mean, repeated (collapse)", "no change (floor)"
CEILING, COLLAPSE, FLOOR = ANCHORS
HIGHEST = math.log1p(10_000)                               # of a gene that has all counts of its cell
QUADRATURE = np.polynomial.legendre.leggauss(64)
ALL_CELLS, EQUAL_COUNTS = 0, 1                             # compared: all cells, or as many as anchors have


# ------------------------------------------------------------------------------------------------- metrics

class Moments(NamedTuple):
    """Of every gene over `count` cells: mean (G,) and unbiased variance (G,), float64 (nan for one cell)."""
    mean: np.ndarray
    variance: np.ndarray
    count: int


def moments(blocks, square=lambda cells: (cells ** 2).sum(0)):
    """`Moments` of cells that arrive in blocks (n, G); covariance (G, G) if `square` is X -> X' X."""
    count, shift, total, squares = 0, None, 0.0, 0.0
    for block in blocks:
        block = np.asarray(block, dtype=np.float64)
        shift = block.mean(0) if shift is None else shift  # near the mean: no digits are lost in the squares
        block = block - shift
        count, total, squares = count + len(block), total + block.sum(0), squares + square(block)
    offset, freedom = total / count, count - 1 if count > 1 else math.nan
    return Moments(shift + offset, (squares / count - square(offset[None])) * count / freedom, count)


def fit_pca(blocks, components=50):
    """Principal axes of cells that arrive in blocks (n, G): centre (G,) and axes (G, d), both float32.
    Centred, not scaled; covariance in float64, decomposed exactly, no seed; each axis has its largest entry
    positive. d = min(components, cells - 1, genes - 1), less the directions without any variance."""
    centre, covariance, count = moments(blocks, lambda cells: cells.T @ cells)
    values, vectors = torch.linalg.eigh(torch.from_numpy(np.nan_to_num(covariance)))
    varied = int((values > 1e-10 * values[-1].clamp(min=1e-30)).sum())
    axes = vectors.flip(1)[:, :max(0, min(components, count - 1, len(centre) - 1, varied))]
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))  # sliced distances would see the sign
    return torch.from_numpy(centre).float(), (axes * largest.sign()).float()


def student_t_tail(t, freedom):
    """Two-sided tail P(|T| >= |t|) of Student's t, elementwise; relative error under 1e-6, also of tiny ones.
    With v degrees of freedom, P = 2 / B(v/2, 1/2) integral of sin(a)^(v-1), a from 0 to atan(sqrt(v) / |t|).
    Gauss-Legendre quadrature where the integrand is above exp(-40) of its largest value, in the fourth root
    of the distance from the lower end of that part, where it need not be smooth."""
    t, v = np.broadcast_arrays(np.abs(np.asarray(t, np.float64)), np.asarray(freedom, np.float64))
    node, weight = (QUADRATURE[0] + 1) / 2, QUADRATURE[1] / 2
    with np.errstate(all="ignore"):
        end, slope, reach = np.arctan2(np.sqrt(v), t), t / np.sqrt(v), 80 / (v - 1)
        width = np.fmin(end, reach / (np.sqrt(slope ** 2 + reach) + slope))
        angle = (end - width)[..., None] + width[..., None] * node ** 4
        integral = width * (np.sin(angle) ** (v[..., None] - 1) * 4 * node ** 3 * weight).sum(-1)
    log_gamma = lambda x: torch.lgamma(torch.tensor(x)).numpy()
    return 2 / math.sqrt(math.pi) * np.exp(log_gamma((v + 1) / 2) - log_gamma(v / 2)) * integral


def welch_test(a, b):
    """Two-sided p value (G,) of Welch's t test per gene of two `Moments`, nan where a side has one cell;
    freedom by Welch-Satterthwaite. Genes constant on both sides: 1 where the means agree, else 0."""
    share_a, share_b = a.variance / a.count, b.variance / b.count
    difference, error = a.mean - b.mean, share_a + share_b
    with np.errstate(all="ignore"):
        freedom = error ** 2 / (share_a ** 2 / (a.count - 1) + share_b ** 2 / (b.count - 1))
        p = student_t_tail(difference / np.sqrt(error), freedom)
    return np.where(error <= 0, np.abs(difference) <= 1e-9, p)


def differentially_expressed(real, control):
    """(G,) bool of two `Moments`: Welch p <= 0.1 and |log2((mean + 1) / (control mean + 1))| >= 0.05."""
    with np.errstate(invalid="ignore"):
        fold = np.log2((real.mean + 1) / (control.mean + 1))
        return (welch_test(real, control) <= 0.1) & (np.abs(fold) >= 0.05)


def pearson(x, y):
    """Pearson correlation along the last axis, (..., G) twice -> (...); nan where a side is constant."""
    def unit(values):
        centred = values - values.sum(-1, keepdims=True) / max(values.shape[-1], 1)
        norm, size = (np.linalg.norm(v, axis=-1, keepdims=True) for v in (centred, values))
        return centred / np.where(norm > 1e-12 * size, norm, np.nan)
    x, y = unit(np.asarray(x, np.float64)), unit(np.asarray(y, np.float64))
    return np.clip((x * y).sum(-1), -1, 1) + (0 if x.shape[-1] else math.nan)


def ranks(values):
    """Ranks (n,) from 1, ties sharing the mean of theirs; their `pearson` is Spearman's correlation."""
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[group]


def energy_1d(x, y):
    """Energy distance on the line, half the classical one, as the integral of (F_x - F_y)^2: x (..., n),
    y (..., m) -> (...)."""
    n, m = x.shape[-1], y.shape[-1]
    points, order = torch.cat([x, y.expand(*x.shape[:-1], m)], -1).sort(-1)
    gap = torch.where(order < n, 1 / n, -1 / m).cumsum(-1)[..., :-1]  # F_x - F_y between neighbours
    return (gap ** 2 * points.diff()).sum(-1)


def mmd(x, y):
    """Squared maximum mean discrepancy, unbiased, of x (B, n, d) and y (B, m, d) -> (B,); nan for one point.
    mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j) with
    k(a, b) = exp(-|a - b|^2 / (2 s^2)), s the median non-zero distance among the n + m pooled points
    (Gretton et al. 2012). Near 0, also below it, for equal distributions."""
    n, values = x.shape[1], []
    within = lambda kernel: (kernel.sum() - len(kernel)) / (len(kernel) * (len(kernel) - 1))
    for points in torch.cat([x, y], dim=1):  # one population at a time: (n + m)^2 distances each
        distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")  # exact zeros
        pairs = distance[distance > 0].numpy()
        kernel = torch.exp(distance.double() ** 2 / (-2 * (np.median(pairs) if len(pairs) else 1.0) ** 2))
        values.append(within(kernel[:n, :n]) + within(kernel[n:, n:]) - 2 * kernel[:n, n:].mean())
    return torch.stack(values)


def discrimination(means, profiles, truth, excluded, cosine=False):
    """How well mean profiles (P, G) single out their perturbation among the line's real ones (N, G) -> (P,).
    1 - r / (N - 1), r = number of real profiles nearer (L1 distance, or cosine) than number `truth`, ties
    counted half, without the genes `excluded` (G,), the targets. Chance is 0.5; nan where N is 1."""
    means, profiles = (torch.from_numpy(values * ~excluded) for values in (means, profiles))
    if cosine:
        means, profiles = (torch.nn.functional.normalize(values, dim=1) for values in (means, profiles))
    distance = (-means @ profiles.T if cosine else torch.cdist(means, profiles, p=1)).numpy()  # (P, N)
    own = distance[:, [truth]]
    nearer = (distance < own).sum(1) + ((distance == own).sum(1) - 1) / 2
    return 1 - nearer / (len(profiles) - 1 if len(profiles) > 1 else math.nan)


# ----------------------------------------------------------------------- one condition, against its anchors

@dataclass
class Line:
    """What the conditions of a cell line are measured against, over all cells or at equal counts. There the
    mean of one half of the control cells is subtracted from the real cells, that of the other half from what
    is set against them: a mean both share would correlate them by its noise."""
    control: Moments               # of all its real control cells
    centre: torch.Tensor           # (G,) PCA: the mean of the evaluated perturbed cells
    axes: torch.Tensor             # (G, d)
    profiles: np.ndarray           # (N, G) float32 mean of each condition's real cells, or of their half A
    real_control: np.ndarray       # (G,) float64 mean subtracted from real profiles
    predicted_control: np.ndarray  # (G,) and from predicted ones

    def project(self, cells):
        """Cells (m, G) as points in PCA space (m, d)."""
        return (torch.as_tensor(cells) - self.centre) @ self.axes


def point_metrics(real, predicted):
    """Metrics of point clouds in PCA space, real (n, d) against each of predicted (P, m, d): name -> (P,).
    w1, w2: joint Wasserstein distances; w2_half_squared: the paper's print of W2; *_marginal: mean over the
    components; sw1, sw2: sliced, with Monte-Carlo standard errors; energy: as the training loss; mse_pca: of
    mean points. All nan where there is no component."""
    gap = predicted.mean(1) - real.mean(0)  # (P, d)
    repeated, real = real.expand(len(predicted), -1, -1), real[None]  # projected and sorted once for all P
    value = {"mse_pca": (gap ** 2).mean(1), "mmd": mmd(predicted, repeated)}
    for p in (1, 2):
        marginal = ptrag.wasserstein_1d(predicted.mT, real.mT, p)  # (P, d)
        value[f"w{p}"], value[f"w{p}_marginal"] = ptrag.wasserstein(predicted, repeated, p), marginal.mean(1)
        value[f"sw{p}"], value[f"sw{p}_error"] = ptrag.sliced_wasserstein(predicted, real, p)
    value["w2_half_squared"] = value["w2"] ** 2 / 2
    value["w2_half_squared_marginal"] = (marginal ** 2).mean(1) / 2  # p is 2 after the loop
    value["energy"] = ptrag.energy_distance(predicted, real)
    value["energy_marginal"] = energy_1d(predicted.mT, real.mT).mean(1)
    nothing = 0 if real.shape[2] else math.nan
    return {name: found.double().numpy() + nothing for name, found in value.items()}


def mean_metrics(real, means, line):
    """Metrics of mean profiles, `Moments` of the real cells against predicted means (P, G): name -> (P,).
    *_deg: over differentially expressed genes, nan with fewer than two; pearson_delta: of means less the
    control's, or that of the line's perturbed cells, which leaves what tells perturbations apart (Systema,
    Vinas Torne et al. 2025); mae, mse: averaged over genes."""
    means, perturbed = means.astype(np.float64), line.centre.numpy()
    genes = np.flatnonzero(differentially_expressed(real, line.control))
    return {
        "n_deg": np.full(len(means), float(len(genes))),
        "pearson_deg": pearson(means[:, genes], real.mean[genes]),
        "spearman_deg": pearson(np.stack([ranks(row[genes]) for row in means]), ranks(real.mean[genes])),
        "pearson_delta": pearson(means - line.predicted_control, real.mean - line.real_control),
        "pearson_delta_perturbed_mean": pearson(means - perturbed, real.mean - perturbed),
        "mae": np.abs(means - real.mean).mean(1),
        "mse": ((means - real.mean) ** 2).mean(1),
    }


def condition_rows(real, populations, line, truth, excluded):
    """Every metric of every population of one condition, P of cells (m, G) against real cells (n, G): (P, M)
    float64. Populations of equal size are compared at once. truth, excluded: see `discrimination`."""
    result = np.full((len(populations), len(COLUMNS)), np.nan)
    real_points, of_real, sizes = line.project(real), moments([real]), [*map(len, populations)]
    for size in set(sizes):
        chosen = np.flatnonzero(np.equal(sizes, size))
        points = torch.stack([line.project(populations[i]) for i in chosen])  # (P', m, d)
        means = np.float32([populations[i].mean(0, dtype=np.float64) for i in chosen])  # (P', G)
        value = point_metrics(real_points, points) | mean_metrics(of_real, means, line)
        value["discrimination"] = discrimination(means, line.profiles, truth, excluded)
        deltas = means - np.float32(line.predicted_control), line.profiles - np.float32(line.real_control)
        value["discrimination_cosine"] = discrimination(*deltas, truth, excluded, cosine=True)
        result[chosen] = np.stack([value[name] for name in COLUMNS], axis=1)
    return result


class Contender(NamedTuple):
    """A method of one seed: its predicted cells of a condition, a function to (m, G) float32."""
    label: str
    seed: str
    cells: Callable
    empty: float = math.nan  # share of its cells that select nothing


class Measured(NamedTuple):
    """All measurements of a condition."""
    names: tuple             # cell line, perturbation
    counts: tuple            # real cells, predicted cells
    rows: dict               # (label, seed) -> (2, M): ALL_CELLS; EQUAL_COUNTS, half A against |half B| cells
    points: list             # of control, real, predicted cells: (60, 2) in PCA space, or fewer
    impossible: int = 0      # predicted values that no cell has
    split: str = ""
    untrained: bool = False  # no training condition perturbs the gene


class Results:
    """A table: its conditions; R rows (label, seed) of anchors, baselines, contenders; (2, R, C, M) measured
    values, nan where a condition has no such row; notes."""

    def __init__(self, conditions, notes=()):
        self.conditions, self.notes = conditions, [*notes]
        self.rows = list(dict.fromkeys(row for condition in conditions for row in condition.rows))
        missing = np.full((2, len(COLUMNS)), np.nan)
        values = [[condition.rows.get(row, missing) for condition in conditions] for row in self.rows]
        self.measured = np.moveaxis(np.array(values), 2, 0)
        self.labels = list(dict.fromkeys(label for label, _ in self.rows))
        self.reference = reference_of(self.labels)

    def values(self, label, metric, comparison=EQUAL_COUNTS):
        """(seeds, C) values of the rows of a label."""
        return self.measured[comparison, [row[0] == label for row in self.rows], :, COLUMNS.index(metric)]


def reference_of(labels):
    """The label of the row that the others are tested against, PT-RAG's; None without one."""
    return next((label for label in labels if label.split("/")[-1] == "ptrag"), None)


def names_of(dataset, condition):
    """The cell line and the perturbation of a condition."""
    return dataset.cell_lines[condition[0]], dataset.perturbations[condition[1]]


def divide(names, cells, size, seed):
    """Cells of a condition, or row numbers, in two: all but `size`, and those, drawn from seed and names."""
    order = np.random.default_rng([seed, zlib.crc32(":".join(names).encode())]).permutation(len(cells))
    return [cells[np.sort(part)] for part in np.split(order, [len(cells) - size])]


def control_moments(dataset, lines, seed=0):
    """Of each line's control cells: line -> `Moments`, and means (2, G) of two halves."""
    of = lambda rows: moments(dataset.expression[rows[i:i + 1000]] for i in range(0, len(rows), 1000))
    found = {}
    for line in set(lines):
        rows = dataset.cells(line, 0)
        halves = divide(names_of(dataset, (line, 0)), rows, len(rows) // 2, seed)
        found[line] = of(rows), [of(half if len(half) else rows).mean for half in halves]  # one cell is both
    return found


def describe_line(dataset, conditions, control, pick, seed):
    """`Line` of a cell line's conditions over all cells, and at equal counts, where real cells are half A of
    each condition; pick: condition -> rows of real and of control cells."""
    profiles, (of_all, of_halves) = [], control

    def real_cells():
        for condition in conditions:
            cells = dataset.expression[pick(condition)[0]]
            half_a, _ = divide(names_of(dataset, condition), cells, len(cells) // 2, seed)
            profiles.append([part.mean(0, dtype=np.float64) for part in (cells, half_a)])
            yield cells

    centre, axes = fit_pca(real_cells())
    profiles = np.float32(profiles).swapaxes(0, 1)  # (2, N, G)
    subtracted = [of_all.mean] * 2, of_halves
    return [Line(of_all, centre, axes, means, *less) for means, less in zip(profiles, subtracted)]


def measure(dataset, conditions, contenders, baselines, controls, seed=0, max_cells=1000):
    """Measures anchors, baselines and contenders on every condition, a cell line after the other: `Results`.
    baselines: label -> condition -> response (G,); controls: see `control_moments`."""
    found, C = [], len(conditions)
    pick = lambda condition: data.evaluation_cells(dataset, condition, seed, max_cells)
    threads = ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))
    for code, of_line in itertools.groupby(sorted(conditions), lambda condition: condition[0]):
        of_line = list(of_line)
        lines = describe_line(dataset, of_line, controls[code], pick, seed)
        one = functools.partial(measure_condition, dataset, lines, contenders, baselines, pick, seed)
        for measured in threads.map(one, range(len(of_line)), of_line):  # a thread each: operations are small
            found.append(measured)
            if sys.stdout.isatty():
                end = "" if len(found) < C else "\r\x1b[K"
                print(f"\revaluating condition {len(found)} of {C}", end=end, flush=True)
    notes = []
    if capped := sum(len(dataset.cells(*condition)) > max_cells for condition in conditions):
        notes.append(f"{capped} of {C} conditions have over {max_cells} cells, so many are drawn")
    if impossible := sum(measured.impossible for measured in found):
        notes.append(f"{impossible:,} predicted values are above log1p(10,000), which no cell has")
    return Results(found, notes)


def measure_condition(dataset, lines, contenders, baselines, pick, seed, truth, condition):
    """`Measured` of a condition, number `truth` of its line; the others: see `measure`, `describe_line`."""
    names, (over_all, at_equal) = names_of(dataset, condition), lines
    real, control = (dataset.expression[rows] for rows in pick(condition))
    excluded = np.isin(dataset.genes, names[1].split("+"))
    predicted = [contender.cells(condition) for contender in contenders]
    shifted = [np.maximum(control + response[condition], 0) for response in baselines.values()]  # log1p >= 0
    populations = [control, *shifted, *predicted]
    values = np.full((2, 2 + len(populations), len(COLUMNS)), np.nan)
    values[ALL_CELLS, 2:] = condition_rows(real, populations, over_all, truth, excluded)
    half_a, half_b = divide(names, real, len(real) // 2, seed)
    if n := min([len(half_b), *map(len, predicted)]):
        ceiling = half_b[:n]
        collapse = np.repeat(np.float32(ceiling.mean(0, keepdims=True, dtype=np.float64)), n, axis=0)
        equal = [ceiling, collapse, *(divide(names, cells, n, seed)[1] for cells in populations)]
        values[EQUAL_COUNTS] = condition_rows(half_a, equal, at_equal, truth, excluded)
    rows = [(label, "") for label in (*ANCHORS, *baselines)] + [contender[:2] for contender in contenders]
    labels = [contender.label for contender in contenders]
    pictured = control, real, predicted[labels.index(reference_of(labels) or labels[-1])]
    points = [over_all.project(cells[:60])[:, :2].numpy().copy() for cells in pictured]
    return Measured(names, (len(real), len(predicted[0])), dict(zip(rows, values.swapaxes(0, 1))), points,
                    sum(int((cells > HIGHEST).sum()) for cells in predicted))


# ----------------------------------------------------------------------------------------------- baselines

def mean_responses(dataset, conditions, controls, seed, max_cells):
    """Mean of each condition's real cells minus its line's control mean: condition -> (G,) float32."""
    pick = lambda condition: data.evaluation_cells(dataset, condition, seed, max_cells)[0]
    mean = lambda condition: dataset.expression[pick(condition)].mean(0, dtype=np.float64)
    return {(line, p): np.float32(mean((line, p)) - controls[line][0].mean) for line, p in conditions}


def training_set(responses, line):
    """Perturbations (n,) and responses (n, G) trained in a line; without any, in all lines, by gene."""
    own = {p: response for (code, p), response in responses.items() if code == line}
    if not own:
        for gene in sorted({p for _, p in responses}):
            own[gene] = np.mean([response for (_, p), response in responses.items() if p == gene], axis=0)
    return np.array(list(own)), np.stack(list(own.values()))


def ridge(embeddings, responses, penalty):
    """Ridge regression with intercept from embeddings (n, E) to responses (n, G): function (q, E) -> (q, G).
    Dual form, as n is often smaller than E: with centred embeddings X, K = X X' and responses R, it predicts
    mean(R) + (q - mean) X' (K + a I)^-1 (R - mean(R)), a = penalty * trace(K) / n."""
    centre, mean = embeddings.mean(0), responses.mean(0)
    x = (embeddings - centre).astype(np.float64)
    kernel = x @ x.T
    scale = max(penalty * np.trace(kernel) / len(x), 1e-12)
    weights = np.linalg.solve(kernel + scale * np.eye(len(x)), responses - mean)
    return lambda query: ((query - centre) @ x.T @ weights + mean).astype(np.float32)


def choose_penalty(embeddings, sets, validation):
    """The penalty from 0.001 to 1000 with the least squared error on validation conditions; 1 without any."""
    errors = {10.0 ** power: 0.0 for power in range(-3, 4)} if validation else {1.0: 0.0}
    for line in sorted({line for line, _ in validation}):
        genes, responses = sets[line]
        queries, truth = zip(*((p, response) for (code, p), response in validation.items() if code == line))
        for penalty in errors:
            found = ridge(embeddings[genes], responses, penalty)(embeddings[list(queries)])
            errors[penalty] += ((found - np.stack(truth)) ** 2).sum()
    return min(errors, key=errors.get)


def baseline_responses(dataset, conditions, training, validation, top_k):
    """Responses that the baselines predict: label -> condition -> (G,) float32, and notes.
    training, validation: condition -> measured response (G,). Means: of the line's training conditions; of
    the gene's in the other lines (the line's where it has none); of the line's `top_k` training genes with
    the most similar embeddings. Ridge regression, its penalty chosen on validation conditions."""
    embeddings, means, elsewhere, nearest, learned = dataset.perturbation_embeddings(), {}, {}, {}, {}
    sets = {line: training_set(training, line) for line in sorted({line for line, _ in conditions})}
    validation = {condition: r for condition, r in validation.items() if condition[0] in sets}
    penalty = choose_penalty(embeddings, sets, validation)
    fewest = min(len(genes) for genes, _ in sets.values())
    k = min(top_k, fewest - 1)  # a gene is not its own neighbour
    for line, (genes, responses) in sets.items():
        mean, predict = responses.mean(0), ridge(embeddings[genes], responses, penalty)
        neighbours, _ = ptrag.retrieve(torch.tensor(embeddings), torch.tensor(genes), k)
        for p in [p for code, p in conditions if code == line]:
            means[line, p], learned[line, p] = mean, predict(embeddings[[p]])[0]
            if others := [r for (code, q), r in training.items() if q == p and code != line]:
                elsewhere[line, p] = np.mean(others, axis=0)
            if k:
                nearest[line, p] = responses[np.isin(genes, neighbours[p])].mean(0)
    notes = [f"ridge penalty {penalty:g} (times the mean eigenvalue), chosen on {len(validation)} conditions"]
    if not elsewhere:
        notes.append("no row for the gene's response in the other lines: it is not trained there")
    elif missing := len(conditions) - len(elsewhere):
        notes.append(f"gene in the other lines: {missing} of {len(conditions)} conditions fall back on the "
                     "line's mean")
    if k < top_k:
        notes.append(f"nearest genes: {k}, fewer than top_k {top_k}, a line has only {fewest} training genes")
    if borrowing := [dataset.cell_lines[line] for line in sets if line not in {code for code, _ in training}]:
        notes.append(f"no training conditions in {data.listed(borrowing)}: its baselines use the other lines")
    found = {"line's mean response": means, "gene in the other lines": elsewhere and means | elsewhere,
             f"{k} nearest genes": nearest, "ridge on embeddings": learned}
    return {label: response for label, response in found.items() if response}, notes


# -------------------------------------------------------------------------------- significance and summary

def mann_whitney(x, y):
    """Two-sided p value of the Mann-Whitney U test, normal approximation; nan if a side is empty.
    z = (|U - n m / 2| - 1/2) / sd with sd^2 = n m / 12 (n + m + 1 - sum(t^3 - t) / ((n + m) (n + m - 1))),
    t the sizes of the groups of ties."""
    n, m = len(x), len(y)
    if not n or not m:
        return math.nan
    pooled = np.concatenate([x, y])
    u = ranks(pooled)[:n].sum() - n * (n + 1) / 2
    ties = np.unique(pooled, return_counts=True)[1].astype(float)
    variance = n * m / 12 * (n + m + 1 - (ties ** 3 - ties).sum() / ((n + m) * (n + m - 1)))
    return math.erfc(max(0.0, abs(u - n * m / 2) - 0.5) / math.sqrt(2 * max(variance, 1e-300)))


def benjamini_hochberg(p):
    """Adjusted p values (false discovery rate), of any length; nan entries stay nan and do not count."""
    adjusted, known = np.full(len(p), np.nan), (~np.isnan(p)).sum()
    order = np.argsort(p, kind="stable")[:known]  # nan last
    scaled = np.asarray(p)[order] * known / np.arange(1, known + 1)
    adjusted[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return adjusted


def average(values, axis=None):
    """Mean without the nan entries; nan, and no warning, where there is nothing else."""
    count = np.sum(~np.isnan(values), axis)
    return np.where(count > 0, np.nansum(values, axis) / np.maximum(count, 1), np.nan)


def deviation(values):
    """Unbiased standard deviation, over seeds or conditions; nan below two."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def summarise(results):
    """One dict per row of the table and metric, as written to summary.csv. Over all cells: mean;
    standard_error over the `conditions` that count, seeds averaged in each; spread of the seeds' means. At
    equal counts, over conditions where all four are numbers: mean_equal and anchors; position = (mean_equal -
    floor) / (ceiling - floor), nan where the ceiling is not better; narrow: the collapse beats it by over 0.1
    % of that gap; p, p_adjusted: Mann-Whitney U against the reference row, Benjamini-Hochberg over the table.
    untrained: conditions in which a one-hot row uses a column that nothing has trained."""
    summary, untrained = [], sum(condition.untrained for condition in results.conditions)
    for label, (metric, (_, sign)) in itertools.product(results.labels, METRICS.items()):
        better = lambda a, b: (a - b) * sign > 1e-6 * np.maximum(np.abs(a), np.abs(b))  # more than rounding
        values, equal = results.values(label, metric, ALL_CELLS), results.values(label, metric)
        per_condition = average(values, 0)[~np.isnan(values).all(0)]
        anchors = np.stack([results.values(name, metric)[0] for name in ANCHORS])
        usable = ~np.isnan([average(equal, 0), *anchors]).any(0)
        ceiling, collapse, floor = average(anchors[:, usable], 1).tolist()
        equal_means, gap = average(equal[:, usable], 1), ceiling - floor
        mean_equal = float(average(equal_means))
        error = results.values(label, f"{metric}_error", ALL_CELLS) if metric in ("sw1", "sw2") else math.nan
        summary.append({
            "method": label, "metric": metric, "mean": float(average(average(values, 1))),
            "standard_error": deviation(per_condition) / math.sqrt(max(len(per_condition), 1)),
            "conditions": len(per_condition), "seeds": len(values), "spread": deviation(average(values, 1)),
            "monte_carlo_error": float(average(error)), "mean_equal": mean_equal,
            "spread_equal": deviation(equal_means), "floor": floor, "ceiling": ceiling, "collapse": collapse,
            "position": (mean_equal - floor) / gap if better(ceiling, floor) else math.nan,
            "narrow": int(better(collapse, ceiling) and abs(collapse - ceiling) > 1e-3 * abs(gap)),
            "p": math.nan, "p_adjusted": math.nan, "reference_better": math.nan, "compared": 0,
            "untrained": untrained * (label.split("/")[-1] == "state")})
        if results.reference not in (None, label) and label not in (CEILING, COLLAPSE):
            pair = np.stack([average(equal, 0), average(results.values(results.reference, metric), 0)])
            theirs, ours = pair[:, ~np.isnan(pair).any(0)]
            summary[-1] |= {"p": mann_whitney(theirs, ours), "compared": len(ours),
                            "reference_better": int(better(ours, theirs).sum())}
    for row, p in zip(summary, benjamini_hochberg([row["p"] for row in summary]).tolist()):
        row["p_adjusted"] = p
    return summary


# ----------------------------------------------------------------------------------------------- retrieval

def response_similarity(dataset, rows, tasks):
    """For each query in rows of retrieval.csv, (queries, 5), nan where unknown: mean cosine of its measured
    response with those of its candidates, of the pool's other genes, of its selected and its unselected
    candidates; rank correlation over the candidates of selection probability and that cosine."""
    found = []
    for (split, line), of_line in group(rows, "split", "cell_line").items():
        responses, pool, _ = tasks[split]
        code = dataset.cell_lines.index(line)
        genes, table = zip(*((dataset.perturbations[p], r) for (at, p), r in responses.items() if at == code))
        unit = torch.nn.functional.normalize(torch.from_numpy(np.stack(table)), dim=1).numpy()  # (N, G)
        for (_, query), its in group(of_line, "seed", "perturbation").items():
            cosine = dict(zip(genes, (unit @ unit[genes.index(query)]).tolist()))
            others = (pool & cosine.keys()) - {query, *(row["candidate"] for row in its)}
            known = [(row["selected"], row["probability"], cosine[row["candidate"]]) for row in its
                     if row["candidate"] in cosine]
            selected, probability, similar = np.array(known).reshape(-1, 3).T
            correlation = pearson(ranks(probability), ranks(similar)) if len(known) > 2 else math.nan
            found.append([average(similar), average([cosine[name] for name in others]),
                          average(similar[selected > 0.5]), average(similar[selected <= 0.5]), correlation])
    return np.array(found, float)


def line_overlap(rows, cells, generator):
    """Overlap of the sets selected for a gene in two cell lines: (pairs, 3) of the Jaccard overlap, the same
    under shuffled lines, and whether both are of one model. rows: of retrieval.csv; cells: (split, line,
    gene) -> count. A set: what more than half of the cells select. Shuffled: the cells of both lines are
    pooled and cut anew, which keeps how often a candidate is selected and forgets in which line."""
    overlaps = []
    for (_, gene), of_gene in sorted(group(rows, "seed", "perturbation").items()):
        sides = group(of_gene, "split", "cell_line")
        for a, b in itertools.combinations(sides, 2):
            if a[1] == b[1]:
                continue
            shares = [{row["candidate"]: row["selected"] for row in sides[side]} for side in (a, b)]
            n, m = (cells[(*side, gene)] for side in (a, b))
            used = [[share.get(name, 0) for name in sorted(shares[0] | shares[1])] for share in shares]
            used = np.rint(np.array(used) * [[n], [m]]).astype(int)  # (2, candidates) cells
            drawn = generator.hypergeometric(used.sum(0), n + m - used.sum(0), n)
            sets = [(in_a > n / 2, in_b > m / 2) for in_a, in_b in (used, (drawn, used.sum(0) - drawn))]
            jaccard = [(x & y).sum() / (x | y).sum() if (x | y).any() else math.nan for x, y in sets]
            overlaps.append([*jaccard, a[0] == b[0]])
    return np.array(overlaps).reshape(-1, 3)


def describe_selection(probability):
    """In words, where selection has settled. Dividing the logits by their spread keeps the mean probability
    within 0.12 and 0.88: candidates are used by chance near the one, all near the other."""
    mean, spread = np.mean(probability), np.std(probability)
    state = ("has settled at none: nearly every cell's context is empty" if mean < 0.05 else
             "has settled at its noise floor, 0.12: what is used is chance" if mean <= 0.18 else
             "has settled at using nearly all candidates: it does not choose among them" if mean >= 0.82 else
             "is indifferent: it does not tell candidates apart" if spread < 0.02 else "chooses")
    return f"selection {state} (probability {mean:.2f} ± {spread:.2f} over conditions and candidates)"


def describe_retrieval(dataset, results, candidates, tasks):
    """The retrieval report, lines of text for each row of the table that selects. candidates: rows of
    retrieval.csv; tasks: split -> (measured responses, condition -> (G,); names in the pool; its name)."""
    lines, pools = [], data.listed(dict.fromkeys(name for *_, name in tasks.values()))
    cells = {(condition.split, *condition.names): condition.counts[1] for condition in results.conditions}
    for (label,), rows in group(candidates, "label").items():
        near, random, used, unused, correlation = (
            f"{short(average(column))} ({(~np.isnan(column)).sum()})"
            for column in response_similarity(dataset, rows, tasks).T)
        probability, empty = np.array([(row["probability"], row["empty"]) for row in rows]).T
        texts = [f"measured responses of candidates (pool {pools}) resemble the query's with cosine {near}, "
                 f"those of the pool's other genes with {random} (in brackets: conditions)",
                 f"{describe_selection(probability)}; {100 * empty.mean():.1f} % of cells use none",
                 f"selected candidates {used}, unselected {unused}; rank correlation of selection "
                 f"probability with the cosine of responses {correlation}"]
        overlaps = line_overlap(rows, cells, np.random.default_rng(0))
        known = overlaps[~np.isnan(overlaps).any(1)]  # without those where nothing is selected
        for one_model, models in ((1, "one model"), (0, "models of different splits")):
            if len(pairs := known[known[:, 2] == one_model]):
                observed, shuffled, _ = pairs.mean(0)
                texts.append(f"Jaccard overlap of the sets selected for a gene in two lines by {models} "
                             f"{observed:.2f}, with lines shuffled {shuffled:.2f} ({len(pairs)} pairs)")
        if not len(overlaps):
            texts.append("no gene is tested in two cell lines, so selected sets have no overlap")
        lines += [f"{label}: {text}" for text in texts]
    return lines


def group(rows, *names):
    """Rows, dicts, by their values of some columns: tuple of the values -> list of rows."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


# -------------------------------------------------------------------------------------------------- tables

def short(value):
    """A number with four significant digits, as short as that goes; a dash for nan."""
    if math.isnan(value):
        return "–"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:.{sum(abs(value) < limit for limit in (1, 10, 100, 1000))}f}"


def make_tables(summary, full=True):
    """Values at equal counts, positions and comparisons, of the first metrics or all; each table a list of
    (label, cell texts), the first of them title and headings."""
    cell = {(row["method"], row["metric"]): row for row in summary}
    labels, every = list(dict.fromkeys(row["method"] for row in summary)), [*METRICS]
    others = [metric for metric in METRICS if metric not in FIRST_METRICS]
    methods = [label for label in labels if label not in ANCHORS]
    compared = [label for label in labels if cell[label, "mae"]["compared"]]
    count = max(row["compared"] for row in summary)

    def value(row):
        spread = f"±{row['spread_equal']:.1g}" * (row["spread_equal"] >= 0 and row["metric"] in FIRST_METRICS)
        stars = "".join("*" for limit in (0.05, 0.01, 0.001) if row["p_adjusted"] <= limit)
        return f"{short(row['mean_equal'])}{spread}{stars:<3}"

    position = lambda row: "–" if math.isnan(row["position"]) else f"{row['position']:.2f}"
    comparison = lambda row: "–" if not row["compared"] else (
        f"{row['reference_better']}" + f"/{row['compared']}" * (row["compared"] < count))
    marked = lambda label: label + " †" * (cell[label, "mae"]["untrained"] > 0)
    halves = [every[:10], every[10:]] * full
    for title, rows, parts, text in (
            ("mean over conditions, equal counts", labels, [FIRST_METRICS], value),
            ("other metrics, equal counts", labels, [others[:7], others[7:]] * full, value),
            ("position: 0 floor, 1 ceiling", methods, halves or [FIRST_METRICS], position),
            (f"of {count} conditions PT-RAG is better in", compared, halves * bool(compared), comparison)):
        for part in parts:
            tail = "   " * (text is value)  # room for three stars
            headings = [METRICS[m][0] + "!" * cell[CEILING, m]["narrow"] + tail for m in part]
            yield [(title, headings), *((marked(row), [text(cell[row, m]) for m in part]) for row in rows)]


def text_table(table):
    """A table of `make_tables` as text, ready to be printed in a font of one width."""
    first, *widths = (max(map(len, column)) for column in zip(*([label, *cells] for label, cells in table)))
    texts = [" ".join(f"{text:>{width}}" for text, width in zip(cells, widths)) for _, cells in table]
    return "\n".join(f"{label:<{first}}  {text}".rstrip() for (label, _), text in zip(table, texts))


def footnotes(summary, reference):
    """What the marks of the table mean, those that occur; `reference`: the row others are tested against."""
    column = {name: np.array([row[name] for row in summary]) for name in summary[0]}
    most, untrained = column["conditions"].max(), column["untrained"].max()
    marks = [
        (column["p_adjusted"] <= 0.05,
         f"* ** *** differs from {reference}, p <= .05 .01 .001: Mann-Whitney U over conditions (unpaired, "
         "as in the paper), Benjamini-Hochberg over the table"),
        (column["narrow"], "! the collapse stands above the ceiling: the metric rewards populations that are "
         "too narrow; not to be trusted alone"),
        (column["untrained"], f"† one-hot, and in {untrained} conditions of a gene that no training "
         "condition perturbs: its column is as it was before training"),
        (np.isnan(column["position"]) & ~np.isnan(column["mean_equal"]),
         "– as a position: the ceiling is not better than the floor, the metric cannot tell them apart here"),
        (column["seeds"] > 1, "± standard deviation over seeds; the value before it is their mean")]
    fewer = [f"{METRICS[row['metric']][0]}: {row['conditions']} conditions count, the others have fewer than "
             "two expressed differentially" for row in summary
             if row["method"] == FLOOR and "_deg" in row["metric"] and row["conditions"] < most]
    return [text for occurs, text in marks if occurs.any()] + fewer + [
        "tables: at equal counts; metrics.csv, and mean in summary.csv: of all cells, as other tools print"]


# -------------------------------------------------------------------------------------------------- report

STYLE = """
:root { color-scheme: light dark; --base: #8a9099; --c0: light-dark(#0b62c4, #69a9f5); --c1: #d96a1e;
  --c2: #3d9a50; --c3: #a460c8; --c4: #d24a68; --c5: #6d8f9b }
body { background: light-dark(#fff, #16181b); font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem }
h2 { margin: 2rem 0 .4rem } p { margin: .3rem 0 } figure, pre { margin: 0; font-size: 13px }
div { overflow-x: auto; display: flex; flex-wrap: wrap; gap: 1rem 1.6rem }
text { fill: var(--base); font: 11px system-ui, sans-serif } path, rect { fill: none; stroke: #8a909966 }
.dots { stroke-linecap: round; stroke-width: 4.5; stroke-opacity: .55 } .curve { stroke-width: 1.8 }
"""


def figure(title, series, x_ticks, y_ticks, width=330, height=180):
    """A plot as inline SVG: scale, legend, and dots or a line for each series.
    series: (name, colour, "dots" | "curve", x (k,), y (k,)), a name once in the legend. ticks: (value, text),
    ascending: first and last span the axis, what lies beyond is drawn at its edge; drawn if it has a text."""
    left = 12 + 6 * max(len(text) for _, text in y_ticks)
    x = lambda v: np.interp(v, [x_ticks[0][0], x_ticks[-1][0]], [left, left + width])
    y = lambda v: np.interp(v, [y_ticks[0][0], y_ticks[-1][0]], [8 + height, 8])
    marks = [(f"{x(v):.0f} 8v{height}", x(v), height + 22, "middle", text) for v, text in x_ticks if text]
    marks += [(f"{left} {y(v):.0f}h{width}", left - 6, y(v) + 4, "end", text) for v, text in y_ticks if text]
    parts = [f'<rect x="{left}" y="8" width="{width}" height="{height}"/>']
    for path, a, b, anchor, text in marks:
        parts.append(f'<path d="M{path}"/><text x="{a:.0f}" y="{b:.0f}" text-anchor="{anchor}">'
                     f"{html.escape(text)}</text>")
    for _, colour, kind, *points in series:
        pairs = [f"{a:.1f} {b:.1f}" for a, b in zip(x(points[0]), y(points[1])) if a == a]
        path = "".join(f"M{pair}h0" for pair in pairs) if kind == "dots" else "M" + "L".join(pairs)
        parts.append(f'<path class="{kind}" style="stroke: {colour}" d="{path}"/>' * bool(pairs))
    legend = {name: f'<span style="color: {colour}"> ● {html.escape(name)}</span>'
              for name, colour, *_ in series if name}
    size, title = f'width="{left + width + 30}" height="{height + 28}"', html.escape(title)
    return (f'<figure><figcaption>{title}{"".join(legend.values())}</figcaption><svg {size} role="img" '
            f'aria-label="{title}">{"".join(parts)}</svg></figure>')


def strips(results, summary):
    """Per metric and row, where each condition stands: (value - its floor) / mean(ceiling - floor), so that
    the mean, a bar, is the row's position in the table."""
    cell = {(row["method"], row["metric"]): row for row in summary}
    labels = [label for label in results.labels if label not in ANCHORS]
    every = -(-len(results.conditions) * len(METRICS) * len(labels) // 9000)
    names = [(-row, label) for row, label in enumerate(labels)]
    x_ticks = [(-1, ""), (0, "floor"), (1, "ceiling"), (2, "")]
    y_ticks = [(0.5 - len(labels), ""), *names[::-1], (0.5, "")]
    for metric, (heading, _) in METRICS.items():
        anchor, floor, series = cell[labels[0], metric], results.values(FLOOR, metric)[0], []
        if math.isnan(anchor["position"]):  # the ceiling is not better than the floor
            continue
        for y, label in names:
            gain = average(results.values(label, metric), 0) - floor
            x = (gain / (anchor["ceiling"] - anchor["floor"]))[::every]
            colour = "var(--c0)" if label == (results.reference or labels[-1]) else "var(--base)"
            bar = [cell[label, metric]["position"]] * 2, [y - 0.4, y + 0.4]
            series += [("", colour, "dots", x, [y] * len(x)), ("", "currentColor", "curve", *bar)]
        title = heading + "  (! rewards narrow populations)" * anchor["narrow"]
        yield figure(title, series, x_ticks, y_ticks, height=15 * len(labels))


def training_figures(log):
    """Energy, validation and selection over the steps; one colour per row, one line per seed."""
    labels = list(dict.fromkeys(row["label"] for row in log))
    for column, title in (("energy", "energy distance of training sets"), ("validation", "validation"),
                          ("sparsity", "selection probability: share of candidates selected")):
        series, known = [], [row for row in log if 0 < row[column] < math.inf]
        for (label, *_), rows in group(known, "label", "split", "seed").items():
            points = zip(*((row["step"], row[column]) for row in rows[::-(-len(rows) // 150)]))
            series.append((label, f"var(--c{labels.index(label) % 6})", "curve", *points))
        if known:
            last, values = max(row["step"] for row in known), [row[column] for row in known]
            ends = (0, 1) if column == "sparsity" else (min(values), np.quantile(values, 0.98))
            y_ticks = [(v, short(v)) for v in np.linspace(*ends, 5).tolist()]
            yield figure(title, series, [(0, "0"), (last, f"step {last:.0f}")], y_ticks)


def selection_tables(candidates):
    """Candidates by cell lines, for the three perturbations whose selection differs most between lines."""
    tables = []
    for (label, perturbation), rows in group(candidates, "label", "perturbation").items():
        pairs = {key: np.mean([row["probability"] for row in found])
                 for key, found in group(rows, "candidate", "cell_line").items()}
        genes, lines = (sorted(set(names)) for names in zip(*pairs))
        values = np.array([[pairs.get((gene, line), np.nan) for line in lines] for gene in genes])
        differs = average(np.ptp(values, axis=1)) if len(lines) > 1 else np.ptp(values)
        body = [(genes[i], list(map(short, values[i]))) for i in np.argsort(-np.nanmax(values, axis=1))[:12]]
        tables.append((-differs, [(f"{perturbation} ({label})", lines), *body]))
    return [table for _, table in sorted(tables, key=lambda pair: pair[0])[:3]]


def scatters(results):
    """Real, predicted and control cells in two components: a strong, a middling and a weak perturbation."""
    effect = np.nan_to_num(results.values(FLOOR, "energy", ALL_CELLS)[0])
    order, kinds = np.argsort(-effect, kind="stable"), ("control", "real", "predicted")
    for i in dict.fromkeys(order[[len(order) // 10, len(order) // 2, len(order) * 9 // 10]].tolist()):
        condition = results.conditions[i]
        every = np.concatenate(condition.points)
        if every.shape[1] == 2:
            series = [(kind, f"var(--{colour})", "dots", *points.T)
                      for kind, colour, points in zip(kinds, ("base", "c1", "c0"), condition.points)]
            ticks = [[(low, ""), (high, "")] for low, high in zip(every.min(0), every.max(0))]
            title = f"{': '.join(condition.names)} (floor energy {short(effect[i])})"
            yield figure(title, series, *ticks, 300, 210)


def write_report(path, title, results, summaries, retrieval, candidates, log):
    """report.html: one self-contained page, inline SVG, no script, nothing fetched."""
    (_, summary), *of_lines = summaries
    shown = lambda tables: [f"<pre>{html.escape(text_table(table))}</pre>" for table in tables]
    sections = [
        ("Table", [title], shown(make_tables(summary)),
         footnotes(summary, results.reference) + results.notes),
        *((line, [], shown(make_tables(of_line, full=False)), []) for line, of_line in of_lines),
        ("Conditions between floor and ceiling", ["Each dot is a condition, the bar the mean; a metric whose "
         "ceiling is not better than its floor has none."], strips(results, summary), []),
        ("Training", [], training_figures(log), []),
        *[("Retrieval and selection", retrieval, shown(selection_tables(candidates)),
           ["Tables: probability of selection, where cell lines differ most."])] * bool(retrieval),
        ("Cells", ["First two principal components, at most 60 cells each; a strong, a middling and a weak "
         f"perturbation; predicted by {results.reference or results.labels[-1]}."], scatters(results), [])]
    texts = lambda lines: "".join(f"<p>{html.escape(line)}</p>" for line in lines)
    page = ('<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>Predicted cell populations</h1>")
    for name, before, figures, after in sections:
        page += f"<h2>{html.escape(name)}</h2>{texts(before)}<div>{''.join(figures)}</div>{texts(after)}"
    with data.atomic_output(path) as temporary:
        Path(temporary).write_text(page + "</html>", encoding="utf-8")


# ------------------------------------------------------------------------------------------- files of runs

RETRIEVAL_COLUMNS = ("method", "seed", "cell_line", "perturbation", "rank", "candidate", "similarity",
                     "probability", "selected")
OF_THE_RUN = ("split", "name", "resume", "device", "threads", "group", "compile", "checkpoint_every", "model",
              "output", "preset", "predict", "cell_line")   # settings that make no other model


def write_predictions(folder, models, dataset, split, config):
    """Predicts the test conditions with all models, {METHOD-SEED: model}: predictions.h5ad; retrieval.csv, of
    every candidate the mean probability and the share of cells that rather use it than not."""
    obs = {name: [] for name in (*RETRIEVAL_COLUMNS[:4], "control_cell", "nothing_selected")}
    report, cells = [], sum(min(len(dataset.cells(*condition)), config.max_cells) for condition in split.test)

    def blocks():
        for name, model in models.items():
            if config.hard_negatives:
                model.retrieve_from(model.pool, config.hard_negatives)
            predictions = ptrag.predict_conditions(model, dataset, split.test, config)
            for condition, rows, (predicted, chance) in predictions:
                if not np.isfinite(predicted).all():
                    raise ptrag.Diverged(f"{name}: predicts no finite numbers; train with a smaller --lr")
                names, nothing = (*name.rsplit("-", 1), *names_of(dataset, condition)), math.nan
                if chance is not None:
                    hard = config.select == "threshold" and model.config.method != "ptrag-expected"
                    chances = np.round(chance) if hard else chance
                    nothing = (1 - chances).prod(1)
                    used = *ptrag.used_candidates(model, names[3], chance).values(), (chance > 0.5).mean(0)
                    report.extend((*names, rank, *row) for rank, row in enumerate(zip(*used), start=1))
                done = len(obs["method"])
                for column, value in zip(obs, (*names, rows, nothing)):
                    obs[column].extend(np.broadcast_to(value, len(rows)).tolist())
                yield slice(done, done + len(rows)), {"X": predicted}

    about = {"units": data.UNITS, "data": dataset.name, "split": config.split, "models": list(models)}
    data.write_anndata(folder / "predictions.h5ad", dataset.genes, obs, blocks(), len(models) * cells, about)
    data.write_csv(folder / "retrieval.csv", RETRIEVAL_COLUMNS, report)


def read_predictions(path, dataset, max_cells, seed, **columns):
    """Predictions of an AnnData file, left on disk: a `Contender` for each obs method and seed, one where
    there are no such columns; the names of their conditions; notes. columns: see `data.load`."""
    predicted = data.load(path, predicted=True, need_embeddings=False, **columns)
    expression, notes = data.align_genes(predicted, dataset.genes)
    codes, contenders = {names_of(predicted, pair): pair for pair in predicted.conditions()}, []
    obs = dict(method="prediction", seed="", nothing_selected="")
    obs = {name: np.full(len(predicted.cell_line), value, object) for name, value in obs.items()}
    with contextlib.suppress(data.DataError):
        obs = data.read_obs(path, list(obs))
    _, first, model = np.unique(obs["method"] + "\n" + obs["seed"], return_index=True, return_inverse=True)
    for code in np.argsort(first):  # in the order of the file
        name, number, _ = (str(column[first[code]]) for column in obs.values())

        def cells(condition, code=code, who=f"{name}, seed {number}"):
            names = names_of(dataset, condition)
            rows = predicted.cells(*codes[names]) if names in codes else np.array([], int)
            rows = rows[model[rows] == code]
            ptrag.require(len(rows), f"{path}: no cells of {data.listed(names)} by {who}; train it again")
            return expression(divide(names, rows, min(len(rows), max_cells), seed)[1])

        nothing = [float(share or "nan") for share in obs["nothing_selected"][model == code]]
        contenders.append(Contender(name, number, cells, float(average(nothing))))
    return contenders, set(codes), notes


def read_run(folder, config, prefix, dataset, split):
    """Contenders and notes of a run as in `read_predictions`; rows of retrieval.csv and of log.csv: dicts
    with label, split and share of cells that select nothing, numbers as float, nan where empty."""
    path, tables = folder / "predictions.h5ad", []
    ptrag.require(path.exists(), f"{path}: no such file; the run was not finished (go on with --resume)")
    contenders, _, notes = read_predictions(path, dataset, config.max_cells, config.seed)
    empty = {(contender.label, contender.seed): contender.empty for contender in contenders}
    tested = {names_of(dataset, condition) for condition in split.test}
    for name, numbers in (("retrieval.csv", ["probability", "selected"]),
                          ("log.csv", ["step", "energy", "validation", "sparsity"])):
        tables.append([])
        try:
            with contextlib.suppress(FileNotFoundError), open(folder / name, encoding="utf-8") as file:
                for row in csv.DictReader(file, strict=True):
                    row |= {number: float(row[number] or "nan") for number in numbers}
                    row |= {"label": prefix + row["method"], "split": config.split,
                            "empty": empty[row["method"], row["seed"]]}
                    if name == "retrieval.csv" and (
                            (row["cell_line"], row["perturbation"]) not in tested
                            or not all(0 <= row[share] <= 1 for share in numbers)):
                        raise ValueError(data.listed(row.values(), 9))
                    tables[-1].append(row)
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise data.DataError(f"{folder / name}: damaged, or not of the predictions beside it "
                                 f"({type(error).__name__}: {error}); train it again") from None
    return [c._replace(label=prefix + c.label) for c in contenders], notes, *tables


def runs_by_split(folders):
    """Split -> its runs: (folder, config, what stands before the labels: nothing if all are one model)."""
    configs = [ptrag.read_config(folder) for folder in folders]
    models, runs, ours = {}, {}, asdict(configs[0])  # models: settings -> split -> (folder, config)
    for folder, config in zip(folders, configs):
        theirs = asdict(config)
        for name in ("data", "genept", "seed", "max_cells", "hvg"):
            ptrag.require(theirs[name] == ours[name], f"{folder}: has {name} {theirs[name]!r}, {folders[0]} "
                          f"{ours[name]!r}; runs on different cells cannot stand in one table")
        model = tuple(value for name, value in theirs.items() if name not in OF_THE_RUN)
        while config.split in models.setdefault(model, {}):
            model += "again",  # the same model on the same split: side by side
        models[model][config.split] = folder, config
    unique, pooled = len({folder.name for folder in folders}) == len(folders), [*models.values()][0].keys()
    for of_split in models.values():
        folder, config = [*of_split.values()][0]
        differs = data.listed(name for name, value in asdict(config).items() if value != ours[name])
        ptrag.require(of_split.keys() == pooled,
                      f"{folder}: differs from {folders[0]} in {differs}; runs are pooled if they differ in "
                      "the split alone, and side by side if they have the same")
        prefix = f"{folder.name if unique else folder}/" * (len(models) > 1)
        for split, run in of_split.items():
            runs.setdefault(split, []).append((*run, prefix))
    return runs


# -------------------------------------------------------------------------------------------- command line

def evaluate_runs(folders, dataset=None, split=None, out=None, full=False):
    """Evaluates the predictions of one run, or of several, pooled or side by side: the rows of summary.csv.
    Writes metrics.csv, summary.csv, report.html (pooled: lines.csv too, the summary of each cell line) to
    `out` (the run's folder; for several a folder A+B beside the first) and prints the table, all of it with
    `full`. dataset, split: those of the first run, loaded anew if not given."""
    folders = [Path(folder) for folder in folders]
    splits = runs_by_split(folders)
    conditions, notes, tasks, candidates, log = [], [], {}, [], []
    for rule, runs in splits.items():
        config, contenders, said = runs[0][1], [], []
        if dataset is None:
            dataset, split = ptrag.open_data(config)
        elif tasks:
            split = data.split(dataset, rule, config.seed)
        for run in runs:
            for kept, new in zip((contenders, said, candidates, log), read_run(*run, dataset, split)):
                kept += new
        parts, cut = (split.train, split.validation, split.test), (config.seed, config.max_cells)
        controls = control_moments(dataset, [line for line, _ in sum(parts, [])], config.seed)
        trained, validated, tested = (mean_responses(dataset, part, controls, *cut) for part in parts)
        baselines, more = baseline_responses(dataset, split.test, trained, validated, config.top_k)
        results = measure(dataset, split.test, contenders, baselines, controls, *cut)
        genes = {dataset.perturbations[p] for _, p in split.train}
        conditions += [measured._replace(split=rule, untrained=measured.names[1] not in genes)
                       for measured in results.conditions]
        notes += [f"{rule}: " * (len(splits) > 1) + note for note in (*results.notes, *said, *more)]
        name = config.test_pool or config.pool
        pool = {dataset.perturbations[p] for p in ptrag.pool_of(name, dataset, split)}
        tasks[rule] = trained | validated | tested, pool, name
    results = Results(conditions, notes)
    retrieval = describe_retrieval(dataset, results, candidates, tasks)
    out = Path(out or folders[0].parent / "+".join(folder.name for folder in folders))
    return write_outputs(results, out, dataset.name, full, retrieval, candidates, log)


def evaluate_files(options):
    """Evaluates anyone's predicted cells against real ones, both AnnData files: the rows of summary.csv."""
    columns = {name: getattr(options, name) for name in ("control", *ptrag.COLUMNS)}
    real = data.load(options.real, hvg=options.hvg, need_embeddings=False, **columns)
    pred, seed, most = options.pred, options.seed, options.max_cells
    contenders, theirs, notes = read_predictions(pred, real, most, seed, **columns)
    ours = {names_of(real, condition): condition for condition in real.conditions()}
    theirs = {names for names in theirs if names[1] != real.perturbations[0]}
    conditions = sorted(ours[names] for names in theirs & set(ours))
    text = lambda names: data.listed(" / ".join(name) for name in sorted(names)) or "none"
    ptrag.require(conditions, f"{pred}: has no condition of {options.real}: {text(theirs)} against "
                  f"{text(ours)}; perturbations and cell lines must have the same names")
    for path, what, lonely in ((pred, "have no real cells", theirs - set(ours)),
                               (options.real, "are not predicted", set(ours) - theirs)):
        if lonely:
            notes.append(f"{path}: {len(lonely)} conditions {what} and are left out: {text(lonely)}")
    controls = control_moments(real, [line for line, _ in conditions], seed)
    results = measure(real, conditions, contenders, {}, controls, seed, most)
    results.notes += real.notes + notes
    return write_outputs(results, Path(options.out), f"{pred} against {options.real}")


def write_outputs(results, out, name, full=True, retrieval=(), candidates=(), log=()):
    """Writes the files and prints the tables: the rows of summary.csv. name: what the cells are from."""
    conditions, splits = results.conditions, dict.fromkeys(c.split for c in results.conditions if c.split)
    seeds = dict.fromkeys(seed for _, seed in results.rows if seed)
    counts = np.array([c.counts for c in conditions])
    half, (real, predicted) = int(np.median(counts[:, 0] // 2)), counts.sum(0)
    title = " | ".join(filter(None, [
        "simulated data" if name == "simulated" else name, splits and f"split {data.listed(splits, 20)}",
        f"{len(conditions)} conditions", f"{real:,} real and {predicted:,} predicted cells",
        f"equal counts: {half} against {half} cells (median)", seeds and f"seeds {data.listed(seeds, 20)}"]))
    summaries, pooled = [("", summarise(results))], len(splits) > 1
    for line in sorted({c.names[0] for c in conditions}) if pooled else []:
        summaries.append((line, summarise(Results([c for c in conditions if c.names[0] == line]))))
    summary, anyones = summaries[0][1], results.labels[3:] == ["prediction"]  # no floor, no names then
    names = ["method", "seed", "cell_line", "perturbation", "n_real", "n_pred", *CONDITION_COLUMNS, "split"]
    rows = [[*row, *c.names, *c.counts, *c.rows[row][ALL_CELLS, :len(CONDITION_COLUMNS)], c.split]
            for row in results.rows[2 + anyones:] for c in conditions if row in c.rows]
    kept = slice(2 * anyones, len(names) - (not pooled))
    out.mkdir(parents=True, exist_ok=True)
    data.write_csv(out / "metrics.csv", names[kept], [row[kept] for row in rows])
    data.write_csv(out / "summary.csv", list(summary[0]), [list(row.values()) for row in summary])
    if pooled:
        data.write_csv(out / "lines.csv", ["cell_line", *summary[0]],
                       [[line, *row.values()] for line, found in summaries[1:] for row in found])
    write_report(out / "report.html", title, results, summaries, retrieval, candidates, log)
    wrap = textwrap.TextWrapper(140, "", "  ", break_long_words=False, break_on_hyphens=False).fill
    data.say(wrap(title))
    for line, rows in summaries:
        for table in make_tables(rows, full and not line):
            data.say(f"\n{line}\n{text_table(table)}" if line else f"\n{text_table(table)}")
    notes = footnotes(summary, results.reference) + results.notes + [*retrieval]
    data.say("\n".join(["", *map(wrap, notes)]))
    said = "everything" if full else "the other metrics, significance and figures"
    data.say(f"{said}: {out}/metrics.csv, summary.csv, report.html" + ", lines.csv" * pooled)
    return summary


def export(folder, out):
    """Writes a run's cells as cell-eval reads them, its split as cell-load and --split do."""
    config, paths = ptrag.read_config(folder), []
    dataset, split = ptrag.open_data(config)
    conditions = [(line, 0) for line in sorted({line for line, _ in split.test})] + split.test
    names = [(dataset.perturbations[p] if p else "non-targeting", dataset.cell_lines[line])
             for line, p in conditions]
    pick = lambda c: data.evaluation_cells(dataset, c, config.seed, config.max_cells)[0]
    real = lambda c: dataset.expression[pick(c) if c[1] else dataset.cells(*c)]  # all of the control cells
    contenders, *_ = read_run(folder, config, "", dataset, split)
    out.mkdir(parents=True, exist_ok=True)
    for method, seed, predicted, _ in [Contender("real", "", real), *contenders]:
        cells = lambda c: (predicted if c[1] else real)(c)
        sizes, above = zip(*((len(values), (values > HIGHEST).sum()) for values in map(cells, conditions)))
        rows = map(slice, np.cumsum((0, *sizes)), np.cumsum(sizes))
        blocks = ((place, {"X": np.minimum(cells(c), HIGHEST)}) for place, c in zip(rows, conditions))
        obs = dict(zip(("target_gene", "cell_type"), np.repeat(names, sizes, axis=0).T.tolist()))
        about = {"units": data.UNITS, "data": dataset.name, "split": config.split, "model": method}
        paths.append(out / f"{method}{seed and '-'}{seed}.h5ad")
        data.write_anndata(paths[-1], dataset.genes, obs, blocks, sum(sizes), about)
        if sum(above):
            data.say(f"{paths[-1]}: {sum(above)} values above log1p(10,000), which no cell has, are clipped")
    text = f'[datasets]\ndata = {json.dumps(str(Path(config.data).parent))}\n\n[training]\ndata = "train"\n'
    for line in sorted({line for line, _ in split.validation + split.test}):
        text += f"\n[fewshot.{json.dumps('data.' + dataset.cell_lines[line])}]\n"
        for part, tested in (("val", split.validation), ("test", split.test)):
            genes = [dataset.perturbations[p] for code, p in tested if code == line]
            text += f"{part} = {json.dumps(genes)}\n"
    with data.atomic_output(out / "split.toml") as temporary:
        Path(temporary).write_text(text, encoding="utf-8")
    data.say(f"wrote {data.listed(paths, 100)} and {out}/split.toml; to compare (cell-eval 0.8 and newer):")
    for path in paths[1:]:
        stem = path.with_suffix("")
        data.say(f"cell-eval run -ap {path} -ar {paths[0]} --celltype-col cell_type -o {stem}")


def run(arguments):
    """The command line, from its words."""
    parser = argparse.ArgumentParser(description="Metrics of predicted cells, with anchors and baselines.")
    parser.print_usage = lambda file: None  # an error is one line
    add = parser.add_argument
    add("runs", nargs="*", type=Path, help="run folders, runs/NAME, side by side or pooled in one table")
    add("--real", help="AnnData file of real cells, controls among them")
    add("--pred", help="AnnData file of predicted cells")
    add("-o", "--out", help="folder to write metrics.csv, summary.csv and report.html to")
    add("--export", type=Path, help="folder to write a run's cells to, as cell-eval reads them")
    shared = [f for f in fields(ptrag.Config)
              if f.name in ("control", *ptrag.COLUMNS, "hvg", "seed", "max_cells")]
    for f in shared:
        default = f" (default {f.default})" if f.default != "" else ""
        add(ptrag.flag(f.name), type=type(f.default), default=f.default, help=f.metadata["help"] + default)
    options = parser.parse_args(arguments)
    files = [options.real, options.pred]
    ptrag.require(options.runs and not any(files) or not options.runs and all([*files, options.out]),
                  "give run folders, or --real REAL.h5ad --pred PRED.h5ad -o OUT/")
    ptrag.require(not options.export or len(options.runs) == 1 and not options.out, "--export takes one run")
    ptrag.require(len({*map(Path.resolve, options.runs)}) == len(options.runs), "a run is given twice")
    for f in shared:  # a run has its own
        ptrag.require(not options.runs or getattr(options, f.name) == f.default,
                      f"{ptrag.flag(f.name)}: goes with --real and --pred")
    ptrag.check(ptrag.Config(**{f.name: getattr(options, f.name) for f in shared}))
    if not options.runs:
        return evaluate_files(options)
    with contextlib.ExitStack() as locks:
        for folder in options.runs:
            ptrag.read_config(folder)
            locks.enter_context(data.locked(folder))
        if options.export:
            export(options.runs[0], options.export)
        else:
            evaluate_runs(options.runs, out=options.out, full=True)


def main(arguments=None):
    """The exit status of the command line, 2 with one line on stderr where the input is wrong."""
    return data.status_of(run, arguments)


if __name__ == "__main__":
    sys.exit(main())
