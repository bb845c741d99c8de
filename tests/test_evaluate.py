"""Facts about the evaluation: metrics against closed forms and loops, anchors, baselines, whole programs."""
import dataclasses
import itertools
import json
import math
import re
from xml.etree import ElementTree

import h5py
import numpy as np
import pytest
import torch

from conftest import table
import data
import evaluate
import ptrag

NAN, rng, ALL_CELLS = math.nan, np.random.default_rng, evaluate.ALL_CELLS
PREDICTIONS, RETRIEVAL, LOG, CONFIG = "predictions.h5ad", "retrieval.csv", "log.csv", "config.json"


def made(conditions, genes=6, controls=30, noise=0.3):
    """A Dataset from {(line, perturbation): (cells, shift (G,))}: controls around 2, the others shifted."""
    generator, (lines, names) = rng(0), (sorted(set(values)) for values in zip(*conditions))
    cells, codes, perturbations = [], [], ["control", *names]
    for (line, name), (count, shift) in ({(line, "control"): (controls, 0) for line in lines}
                                         | conditions).items():
        cells += np.maximum(generator.normal(2 + np.zeros(genes) + shift, noise, (count, genes)), 0).tolist()
        codes += [(lines.index(line), perturbations.index(name), 0)] * count
    return data.Dataset("made", [f"g{i}" for i in range(genes)], lines, perturbations, ["all"],
                        np.float32(cells), *np.int32(codes).T, names, np.zeros((len(names), 3)))


def measured(dataset, predict, baselines=None, **options):
    """Results of one method, `predict` turning a condition into cells, and of its anchors."""
    controls = evaluate.control_moments(dataset, range(len(dataset.cell_lines)))
    contenders = [evaluate.Contender("method", "0", predict)]
    return evaluate.measure(dataset, dataset.conditions(), contenders, baselines or {}, controls, **options)


of_metric = lambda summary, method: {row["metric"]: row for row in summary if row["method"] == method}
methods_of = lambda summary: list(dict.fromkeys(row["method"] for row in summary))


# -------------------------------------------------------------------------------------- metrics, one by one

A, B, Y = [1.1, 2.2, 2.2, 3.5, 4.0, 7.1, 2.2], [2.2, 5.0, 6.1, 6.1, 8.3], [3.0, 1, 4, 1, 5]
CELLS = [[1.0, 3, 1, 1], [2, 3, 1, 2], [4, 3, 1, 3]], [[first, 3, 2, 1] for first in (2.5, 6, 7, 9, 3)]
T = np.concatenate([np.linspace(0, 5, 101), [50.0, 1e4, 1e200, np.inf]])
ROOT = np.sqrt(2 + T[:103] ** 2)
welch = lambda *sides: evaluate.welch_test(*(evaluate.moments([np.array(cells)]) for cells in sides))
REFERENCES = {  # name: (function, arguments, values), of scipy unless said otherwise
    "t tail, incomplete beta at 40 digits": (
        evaluate.student_t_tail, ([2, -1e-6, 12, -3.1, 1.7, -4, 1.2, 40],
                                  [2.5, 3, 7.3, 29.4, 153.2, 12345.6, 1e6, 3]),
        [0.157391495757966, 0.999999264894806, 4.55578522957055e-6, 0.00423981118800043, 0.0911602340687707,
         6.37118169859196e-5, 0.230139624731725, 3.43806807891585e-5]),
    "t tail, closed form of one degree": (evaluate.student_t_tail, (T, 1), 2 / np.pi * np.arctan2(1, T)),
    "t tail, closed form of two": (evaluate.student_t_tail, (T[:103], 2), 2 / (ROOT * (ROOT + T[:103]))),
    "welch: differ, constant and equal, constant and not, one constant (t = sqrt(3), 2 degrees)": (
        welch, CELLS, [0.08069212674046464, 1, 0, 1 - math.sqrt(3 / 5)]),
    "welch, one cell": (welch, (CELLS[0][:1], CELLS[1]), [NAN] * 4),
    "mann-whitney, ties": (evaluate.mann_whitney, (A, B), 0.11563791915596121),
    "mann-whitney, sides swapped": (evaluate.mann_whitney, (B, A), 0.11563791915596121),
    "mann-whitney, separated": (evaluate.mann_whitney, (range(4), range(4, 8)), 0.03038282197657749),
    "mann-whitney, all equal": (evaluate.mann_whitney, ([1] * 5, [1] * 6), 1),
    "mann-whitney, second empty": (evaluate.mann_whitney, (A, []), NAN),
    "mann-whitney, first empty": (evaluate.mann_whitney, ([], A), NAN),
    "benjamini-hochberg, missing": (evaluate.benjamini_hochberg, ([0.01, 0.04, NAN, 0.03, 0.5, 0.005],),
                                    [0.025, 0.05, NAN, 0.05, 0.5, 0.025]),
    "benjamini-hochberg, never falling with p": (evaluate.benjamini_hochberg, ([0.01, 0.011, 0.02, 0.5],),
                                                 [0.022, 0.022, 0.02 * 4 / 3, 0.5]),
    "pearson, constant row": (evaluate.pearson, ([[0.1] * 5, range(5), [1, 2, 2, 0, 7]], Y),
                              [NAN, *(np.corrcoef(x, Y)[0, 1] for x in (range(5), [1, 2, 2, 0, 7]))]),
    "pearson, one gene": (evaluate.pearson, ([1], [1]), NAN),
    "ranks, ties by hand": (evaluate.ranks, ([3, 1, 3, 2, 3, 1],), [5, 1.5, 5, 3, 5, 1.5]),
    "spearman, ties": (lambda *pair: evaluate.pearson(*map(evaluate.ranks, pair)),
                       ([1, 2, 2, 3, 5], [2, 1, 4, 4, 6]), 0.7631578947368421),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_statistics_agree_with_reference_values(name):
    function, arguments, values = REFERENCES[name]
    assert np.asarray(function(*arguments)) == pytest.approx(np.array(values), rel=1e-9, abs=0, nan_ok=True)


def test_moments_do_not_depend_on_how_cells_arrive_and_survive_a_large_mean():
    cells = rng(0).normal(1e4, 1e-2, (57, 3))
    mean, variance, count = evaluate.moments([cells[:1], cells[1:30], cells[30:]])
    assert count == 57 and np.allclose(mean, cells.mean(0), rtol=1e-14)
    assert np.allclose(variance, cells.var(0, ddof=1), rtol=1e-8)
    assert np.isnan(evaluate.moments([cells[:1]]).variance).all()


@pytest.mark.parametrize("mean, expected", [
    ([1.5, 1.06, 1.08, 0.6], [0, 2]), ([1.5, 1, 1, 1], [0]), ([1] * 4, [])])
def test_degs_are_significant_and_changed_enough_and_fewer_than_two_give_no_number(mean, expected):
    spread = np.array([0.01, 0.01, 0.01, 9.0])
    control, real = evaluate.Moments(np.ones(4), spread, 100), evaluate.Moments(np.array(mean), spread, 100)
    assert np.flatnonzero(evaluate.differentially_expressed(real, control)).tolist() == expected
    line = evaluate.Line(control, torch.ones(4), None, None, control.mean, control.mean)
    found = evaluate.mean_metrics(real, rng(0).normal(size=(1, 4)), line)
    assert found["n_deg"] == len(expected) and np.isfinite(found["mae"])
    assert np.isnan(found["pearson_deg"]) == np.isnan(found["spearman_deg"]) == (len(expected) < 2)


def test_mean_metrics_equal_their_definitions_written_out():
    real = evaluate.moments([rng(1).normal(2, 0.1, (40, 8)) + np.arange(8) / 4])
    control, perturbed = evaluate.moments([rng(2).normal(2, 0.1, (50, 8))]), rng(4).normal(2, 0.1, 8)
    line = evaluate.Line(control, torch.tensor(perturbed), None, None, control.mean, control.mean)
    genes, means = evaluate.differentially_expressed(real, control), rng(3).normal(2, 1, (3, 8))
    rank = lambda values: [sum(v < w for v in values) for w in values]
    r = lambda x, y, less=0: np.corrcoef(np.subtract(x, less), np.subtract(y, less))[0, 1]
    found = evaluate.mean_metrics(real, means, line)
    for i, mean in enumerate(means):
        gap, degs = mean - real.mean, (mean[genes], real.mean[genes])
        assert {name: value[i] for name, value in found.items()} == pytest.approx({
            "n_deg": genes.sum(), "mae": sum(map(abs, gap)) / 8, "mse": sum(gap ** 2) / 8,
            "pearson_delta": r(mean, real.mean, control.mean), "pearson_deg": r(*degs),
            "pearson_delta_perturbed_mean": r(mean, real.mean, perturbed),
            "spearman_deg": r(*map(rank, degs))}) and genes.sum() >= 6


@pytest.mark.parametrize("n, m", [(2, 2), (7, 4), (5, 12)])
def test_metrics_of_point_clouds_equal_their_loops_at_unequal_counts_and_with_coincident_points(n, m):
    x, y = rng(n).normal(size=(n, 3)), rng(m).normal(0.5, 2, (m, 3))
    x[1] = y[0] = x[0]
    mean = lambda a, b, of=float: np.mean([of(math.dist(u, v)) for u in a for v in b])
    energy = lambda a, b: mean(a, b) - mean(a, a) / 2 - mean(b, b) / 2
    scale = np.median([d for d in itertools.starmap(math.dist, itertools.combinations([*x, *y], 2)) if d > 0])
    kernel = lambda a, b: mean(a, b, lambda d: math.exp(-d ** 2 / (2 * scale ** 2)))
    within = lambda a: (len(a) * kernel(a, a) - 1) / (len(a) - 1)  # without a point and itself
    gap = np.sort(np.repeat(x, m, 0), 0) - np.sort(np.repeat(y, n, 0), 0)  # n m points a side
    expected = {
        "w1_marginal": np.abs(gap).mean(), "w2_marginal": np.sqrt((gap ** 2).mean(0)).mean(),
        "w2_half_squared_marginal": (gap ** 2).mean() / 2, "energy": energy(x, y),
        "energy_marginal": np.mean([energy(x[:, [c]], y[:, [c]]) for c in range(3)]),
        "mmd": within(x) + within(y) - 2 * kernel(x, y), "mse_pca": ((x.mean(0) - y.mean(0)) ** 2).mean()}
    x, y = torch.tensor(x), torch.tensor(y)
    found = evaluate.point_metrics(y, torch.stack([x + 1, x]))
    assert {name: found[name][1] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert evaluate.mmd(torch.ones(1, n, 2), torch.ones(1, m, 2)).tolist() == [0.0]


def test_point_metrics_of_a_shifted_cloud_have_their_closed_forms():
    real, shift = torch.tensor(np.float32(rng(0).normal(size=(30, 5)))), torch.tensor([3.0, 0, -4, 0, 0])
    found = evaluate.point_metrics(real, torch.stack([real, real + shift]))
    closed = {"w1": (5, 2e-3), "w2": (5, 2e-3), "w2_half_squared": (12.5, 4e-3), "mse_pca": (5, 1e-5),
              "w1_marginal": (7 / 5, 1e-5), "w2_marginal": (7 / 5, 1e-5)}
    for name, (value, tolerance) in closed.items():
        assert found[name][1] == pytest.approx(value, rel=tolerance), name
    assert abs(found["sw2"][1] - 5 / math.sqrt(5)) < 4 * found["sw2_error"][1]  # |shift|^2 / d
    assert all(abs(found[name][0]) < 2e-2 for name in (*closed, "sw1", "sw2", "energy"))


def test_discrimination_equals_its_definition_with_ties_and_without_the_target_gene():
    profiles = np.array([[0.0, 0, 9], [1, 0, 0], [1, 0, 5], [3, 3, 0]])
    means = np.array([[0.0, 0, 0], [1, 0, 0], [3, 3, 0]])
    excluded = np.array([False, False, True])  # without the last gene, profiles 1 and 2 are the same
    found = lambda truth, without=excluded: evaluate.discrimination(means, profiles, truth, without).tolist()
    assert found(0) == [1, 1 - 2 / 3, 0] and found(1) == pytest.approx([1 - n / 3 for n in (1.5, 0.5, 1.5)])
    assert found(0, ~excluded)[1] == 0  # seen by the target gene alone it would be last
    assert np.isnan(evaluate.discrimination(means, profiles[:1], 0, excluded)).all()
    profiles = np.array([[3.0, 0, 0], [3, 3, 0], [-1, 0, 0], [9, 1, 0]])  # the last is nearer by angle alone
    cosine = evaluate.discrimination(np.array([[9.0, 0.9, 0]]), profiles, 0, excluded, cosine=True)
    assert cosine == pytest.approx(1 - 1 / 3)


def test_every_column_of_a_target_gene_named_twice_is_left_out_of_discrimination():
    dataset = made({("A", "g0"): (6, 0), ("A", "p"): (6, [0, 0, 1])}, genes=3)
    dataset.genes[1], dataset.expression[dataset.cells(0, 1), :2] = "g0", 0
    found = measured(dataset, lambda condition: np.tile(np.array([9, 9, 2], np.float32), (6, 1)))
    assert found.values("method", "discrimination", ALL_CELLS)[0, 0] == 1


@pytest.mark.parametrize("cells, genes, without, d", [
    (5, 9, 0, 4), (30, 5, 0, 4), (200, 80, 0, 50), (2, 9, 0, 1), (1, 9, 0, 0), (90, 41, 0, 40), (9, 6, 3, 6)])
def test_pca_has_up_to_50_axes_with_variance_fewer_than_cells_and_genes_signs_fixed(cells, genes, without, d):
    values = rng(0).normal(5, 1, (cells, genes)) * np.linspace(1, 3, genes)
    values = np.c_[values, values[:, :without], np.ones((cells, without))]  # some doubled, some constant
    centre, axes = evaluate.fit_pca([values[:1], values[1:]])
    expected = np.linalg.svd(values - values.mean(0), full_matrices=False)[2][:d].T
    expected = expected * np.sign(np.take_along_axis(expected, np.abs(expected).argmax(0)[None], 0))
    assert axes.shape == expected.shape and np.allclose(axes, expected, atol=1e-6)
    assert np.allclose(centre, values.mean(0), atol=1e-5)


def test_the_signs_of_the_components_do_not_matter_to_any_metric():
    real, cells = torch.randn(2, 14, 5, generator=torch.manual_seed(0))
    signs = torch.tensor([-1, 1, -1, 1, -1])
    found = (evaluate.point_metrics(real * sign, cells[None] * sign) for sign in (1, signs))
    a, b = ({name: value for name, (value,) in values.items()} for values in found)
    for name in a.keys() - {"sw1_error", "sw2_error"}:
        error = 4 * math.hypot(*(found.get(f"{name}_error", 0) for found in (a, b)))  # other directions
        tolerance = 0 if error else 4e-3 if name in ("w1", "w2", "w2_half_squared") else 1e-5
        assert a[name] == pytest.approx(b[name], rel=tolerance, abs=error), name


# ------------------------------------------------------------------- anchors, baselines, summary, retrieval

def test_halves_share_no_cell_leave_none_out_and_depend_on_name_and_seed_alone():
    for count in (1, 2, 3, 9, 40):
        a, b = evaluate.divide(("A", "p"), np.arange(count), count // 2, 3)
        assert sorted([*a, *b]) == list(range(count)) and len(a) - len(b) == count % 2
    half = lambda names, seed: evaluate.divide(names, np.arange(40), 20, seed)[1].tolist()
    assert half("Ap", 3) == half("Ap", 3) and half("Ap", 3) not in (half("Aq", 3), half("Ap", 4))


def test_the_ceiling_compares_the_same_half_of_every_condition_less_two_halves_of_the_controls():
    names = ["control", *sorted(f"p{i}" for i in range(12))]
    shifts = {("A", name): (6, rng(i).normal(0, 0.2, 6)) for i, name in enumerate(names[1:])}
    dataset = made(shifts, noise=0.8)
    cells = [dataset.expression[dataset.cells(0, p)] for p in range(13)]
    a, b = np.swapaxes([[half.mean(0) for half in evaluate.divide(("A", name), of, len(of) // 2, 0)]
                        for name, of in zip(names, cells)], 0, 1)
    found = measured(dataset, lambda c: dataset.expression[:6])
    ceiling = lambda name: found.values(evaluate.CEILING, name)[0]
    for name, cosine in (("discrimination", False), ("discrimination_cosine", True)):
        x, y = b[1:] - b[0] * cosine, a[1:] - a[0] * cosine
        expected = [evaluate.discrimination(x[[i]], y, i, np.zeros(6, bool), cosine)[0] for i in range(12)]
        assert ceiling(name) == pytest.approx(expected) and 0 < np.mean(expected) < 1
    assert ceiling("pearson_delta") == pytest.approx(evaluate.pearson(x, y), rel=1e-5)


def test_a_method_with_the_cells_of_an_anchor_or_baseline_stands_exactly_where_that_stands():
    dataset = made({("A", p): (24, rng(i).normal(0, 1, 6)) for i, p in enumerate("pqr")}, noise=0.8)
    cells = lambda c: [dataset.expression[rows] for rows in data.evaluation_cells(dataset, c, 0)]
    response = dict.fromkeys(dataset.conditions(), np.full(6, -1.5, np.float32))
    for label, position, predict in ((evaluate.FLOOR, 0, lambda c: cells(c)[1]),
                                     (evaluate.CEILING, 1, lambda c: cells(c)[0]),
                                     ("shift", None, lambda c: np.maximum(cells(c)[1] - 1.5, 0))):
        found = measured(dataset, predict, {"shift": response})
        same, own = (found.measured[evaluate.EQUAL_COUNTS, i] for i in (found.labels.index(label), -1))
        assert np.allclose(own, same, rtol=1e-6, equal_nan=True)
        rows = of_metric(evaluate.summarise(found), "method").values()
        assert position is None or all(abs(row["position"] - position) < 1e-5 for row in rows)


def test_joint_wasserstein_is_marked_where_many_dimensions_and_few_cells_reward_the_collapse():
    shift = lambda i: np.where(rng(i).random(120) < 0.1, 0.3, 0)
    noisy = made({("A", p): (44, shift(i)) for i, p in enumerate("pq")}, genes=120, controls=60, noise=0.5)
    clear = made({("A", p): (80, np.eye(3)[i] * 3) for i, p in enumerate("pqr")}, genes=3, controls=90)
    for dataset, count, marked in ((noisy, 44, {"w1", "w2"}), (clear, 80, set())):
        controls = dataset.expression[dataset.cells(0, 0)[:count]]
        summary = evaluate.summarise(measured(dataset, lambda condition: controls))
        narrow = {row["metric"] for row in summary if row["narrow"]}
        assert marked <= narrow and not {"sw1", "sw2", "energy", "mse", "pearson_delta"} & narrow
        assert bool(narrow) == bool(marked)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.filterwarnings("error")
def test_one_two_and_three_cells_are_measured_as_far_as_they_can_be(count):
    dataset = made({("A", "p"): (count, np.ones(6)), ("A", "q"): (9, -np.ones(6))})
    found = measured(dataset, lambda condition: dataset.expression[dataset.cells(0, 0)[:count]])
    value = lambda name, comparison=ALL_CELLS: found.values("method", name, comparison)[0, 0]
    assert np.isfinite([value(name) for name in ("w1", "w2", "sw1", "energy", "mae", "discrimination")]).all()
    assert np.isnan(value("mmd")) == np.isnan(value("mae", evaluate.EQUAL_COUNTS)) == (count == 1)
    summary = evaluate.summarise(found)
    assert summary[0]["conditions"] == 0 and [*evaluate.strips(found, summary)]  # no ceiling over all cells


def test_predictions_of_another_number_of_cells_are_compared_at_equal_counts_and_capped_conditions_are_said():
    dataset = made({("A", "p"): (20, np.ones(6)), ("A", "q"): (8, -np.ones(6))})
    predict = lambda condition: dataset.expression[:7 if condition[1] == 1 else 30]
    for most, counts in ((20, [(20, 7), (8, 30)]), (10, [(10, 7), (8, 30)])):
        found = measured(dataset, predict, max_cells=most)
        assert np.isfinite(found.measured[:, -1]).all() and [c.counts for c in found.conditions] == counts
    assert "1 of 2 conditions have over 10 cells" in found.notes[0]


@pytest.mark.parametrize("train, test, top_k, expected, notes", [
    ([(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3), (1, 4)], [(0, 4), (1, 5)], 2,
     {"line's mean response": [(0, 1), (0, 2), (0, 3)], "gene in the other lines": [(1, 4)],
      "2 nearest genes": [(0, 1), (0, 3)], "ridge on embeddings": None},
     ["1 of 2 conditions fall back", "chosen on 2 conditions"]),
    ([(1, 1), (1, 2)], [(0, 4)], 5,
     {"line's mean response": [(1, 1), (1, 2)], "1 nearest genes": [(1, 1)], "ridge on embeddings": None},
     ["no row for the gene's response", "no training conditions in A", "fewer than top_k 5"]),
    ([(0, 1)], [(0, 4)], 2, {"line's mean response": [(0, 1)], "ridge on embeddings": None},
     ["chosen on 1 conditions"])],  # the line of the other one is not tested
    ids=["all", "line without training conditions", "one training condition"])
def test_baselines_are_the_means_their_names_say_without_the_cells_of_test_conditions_or_rows_without_ground(
        train, test, top_k, expected, notes):
    shift = {name: rng(i).normal(0, 0.5, 6) for i, name in enumerate("abcdef")}
    dataset = made({(line, name): (12, shift[name]) for line in "AB" for name in shift})
    dataset.embeddings = np.float32([[1, 0, 0], [0, 1, 0], [9, 1, 0], [8, 2, 1], [0, 0, 1], [0, 1, 1]])
    controls, found = evaluate.control_moments(dataset, [0, 1]), []
    for _ in range(2):
        parts = train, [(0, 5), (1, 6)]  # the second to validate
        known = [evaluate.mean_responses(dataset, part, controls, 0, 1000) for part in parts]
        found.append(evaluate.baseline_responses(dataset, test, *known, top_k))
        dataset.expression[np.concatenate([dataset.cells(*condition) for condition in test])] = 7
    (responses, said), (after, _) = found
    assert list(responses) == list(expected) and all(note in " ".join(said) for note in notes)
    for name, means in expected.items():
        assert all((responses[name][condition] == after[name][condition]).all() for condition in test), name
        value = [dataset.expression[dataset.cells(*c)].mean(0) - controls[c[0]][0].mean for c in means or []]
        assert not means or np.allclose(responses[name][0, 4], np.mean(value, 0), atol=1e-5), name
    if len(test) == 2:  # nowhere else is the last gene trained
        of_line, elsewhere, *_ = responses.values()
        assert np.allclose(elsewhere[1, 5], of_line[1, 5])


def test_ridge_goes_from_interpolation_to_the_mean_and_its_penalty_is_the_best_on_validation():
    x, noise = rng(2).normal(size=(12, 20)), rng(3).normal(0, 50, (12, 5))
    y = x @ rng(4).normal(size=(20, 5))
    centred, target = x - x.mean(0), y - y.mean(0)
    square = centred.T @ centred
    primal = np.linalg.solve(square + np.trace(square) / 12 * np.eye(20), centred.T @ target)
    for penalty, expected, tolerance in ((1e-12, y, 1e-4), (1e12, y.mean(0), 1e-4),
                                         (1.0, centred @ primal + y.mean(0), 1e-5)):
        assert np.allclose(evaluate.ridge(x, y, penalty)(x), expected, atol=tolerance)
    choose = lambda known, validation: evaluate.choose_penalty(x, {0: (np.arange(9), known[:9])}, validation)
    assert choose(y, {(0, p): y[p] for p in range(9)}) == 1e-3 and choose(y, {}) == 1
    assert choose(noise, {(0, p): noise[:9].mean(0) for p in (9, 10)}) == 1e3


def summarised(rows, anchors=(0, 5, 10), untrained=0):
    """Summary of made-up values, {label: values of a seed per condition}, the same in every metric."""
    C = len(list(rows.values())[0][0])
    rows = {name: [[value] * C] for name, value in zip(evaluate.ANCHORS, anchors)} | rows
    conditions = [evaluate.Measured(None, None, {
        (label, i): np.full((2, len(evaluate.COLUMNS)), seed[c], float)
        for label, seeds in rows.items() for i, seed in enumerate(seeds)}, None, untrained=c < untrained)
        for c in range(C)]
    return evaluate.summarise(evaluate.Results(conditions))


ONE, TWO = {"method": [[0.5, 0.6]]}, {"state": [np.arange(30) + 5.0], "ptrag": [np.arange(30) / 10]}


@pytest.mark.parametrize("rows, anchors, label, metric, expected", [  # anchors: ceiling, collapse, floor
    ({"ptrag": [[1, 2, 3, NAN], [3, 4, 5, NAN]]}, (0, 5, 10), "ptrag", "w1", {
        "mean": 3, "conditions": 3, "seeds": 2, "position": 0.7, "spread": math.sqrt(2),  # of 2 and 4
        "standard_error": 1 / math.sqrt(3)}),                                             # of 2, 3, 4
    (TWO, (0, 5, 10), "state", "w1", {"reference_better": 30, "compared": 30, "p_adjusted": 3e-11}),
    (TWO, (0, 5, 10), "state", "pearson_delta", {"reference_better": 0, "position": NAN}),  # more is better
    (TWO, (0, 5, 10), "ptrag", "w1", {"p": NAN}),
    (ONE, (3, 2.98, 9), "method", "mae", {"position": 8.45 / 6, "narrow": 1}),
    (ONE, (9, 10, 3), "method", "mae", {"position": NAN, "narrow": 0}),
    (ONE, (3, 2.995, 9), "method", "mae", {"position": 8.45 / 6, "narrow": 0}),
    (ONE, (0.9, 0.9, 0.1), "method", "pearson_delta", {"position": 0.45 / 0.8, "narrow": 0}),
    (ONE, (0.9, 0.95, 0.1), "method", "pearson_delta", {"position": 0.45 / 0.8, "narrow": 1})],
    ids="seeds smaller-wins larger-loses reference narrow floor-wins rounding tie narrow-upwards".split())
def test_summary_averages_seeds_within_conditions_counts_wins_and_judges_anchors_in_the_sense_of_the_metric(
        rows, anchors, label, metric, expected):
    row = of_metric(summarised(rows, anchors), label)[metric]
    assert {name: row[name] for name in expected} == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("collapse, untrained, marked", [(0, 0, False), (-5, 3, True)])
def test_narrow_metrics_and_untrained_one_hot_rows_are_marked_and_no_others(collapse, untrained, marked):
    rows = dict.fromkeys(("state", "state-genept", "ptrag"), [range(4)])
    summary = summarised(rows, (0, collapse, 10), untrained)
    (_, headings), *rows = next(evaluate.make_tables(summary))
    assert [headings[i].strip() for i in (0, 5)] == ["W1" + "!" * marked, "r delta"]
    assert [label for label, _ in rows if "†" in label] == ["state †"] * marked
    notes = " ".join(evaluate.footnotes(summary, "ptrag"))
    assert ("too narrow" in notes) == ("in 3 conditions" in notes) == marked


def candidates(line, perturbation, selected, split="one"):
    """Rows of retrieval.csv, {candidate: share of cells that select it}, as a group of one condition."""
    key = dict(split=split, seed="0", cell_line=line, perturbation=perturbation)
    return [key | dict(candidate=name, selected=share, probability=share) for name, share in selected.items()]


def test_overlap_between_lines_falls_below_shuffled_lines_only_where_selection_depends_on_the_line():
    cells = {(split, line, "p"): 40 for split in ("one", "two") for line in "AB"}
    same = candidates("A", "p", {"u": 1.0, "v": 0.0}) + candidates("B", "p", {"u": 1.0, "v": 0.0}, "two")
    assert evaluate.line_overlap(same, cells, rng(0)).tolist() == [[1, 1, 0]]  # of two models
    a, b = {"u": 0.9, "v": 0.3, "w": 1}, {"u": 0.3, "v": 0.9, "w": 1}
    groups = candidates("A", "p", a) + candidates("B", "p", b) + candidates("B", "q", b)
    (observed, shuffled, one_model), = evaluate.line_overlap(groups, cells, rng(0))
    assert observed == pytest.approx(1 / 3) and shuffled > observed and one_model
    same_line = candidates("A", "p", a) + candidates("A", "p", a, "two")
    assert len(evaluate.line_overlap(same_line, cells, rng(0))) == 0


def test_where_selection_settles_is_said_in_words():
    for values, said in {(0.88, 0.9): "settled at using nearly all", (0.12, 0.13): "noise floor",
                         (0, 0.01): "settled at none", (0.5, 0.5): "indifferent",
                         (0.9, 0.2, 0.4): "chooses"}.items():
        assert said in evaluate.describe_selection(values)


def test_response_similarity_compares_candidates_with_the_rest_of_the_pool():
    dataset, unit = made({("A", name): (4, 0) for name in "abcdeq"}), np.eye(6)
    measured_there = [unit[0] * 2, unit[0] + unit[1], unit[1], -unit[0], unit[0], unit[0]]
    responses = {(0, p): response for p, response in enumerate(measured_there, start=1)}
    rows = candidates("A", "q", {"a": 0.9, "b": 0.2, "c": 0.1, "missing": 1.0})
    found = evaluate.response_similarity(dataset, rows, {"one": (responses, {"a", "b", "c", "d"}, "train")})
    # candidates, the pool's other genes, selected, unselected, rank correlation
    assert found[0] == pytest.approx([(1 + math.sqrt(0.5)) / 3, -1, 1, math.sqrt(0.5) / 2, 1])


# ------------------------------------------------------------------------------- anyone's cells, whole runs

main = lambda *words: evaluate.main([str(word) for word in words])


def error_of(capsys, *words):
    """The one line with which the program refuses."""
    assert main(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def write(path, dataset, **changed):
    """An AnnData file of the cells of a dataset, perhaps with other values or names."""
    dataset = dataclasses.replace(dataset, **changed)
    codes = zip(dataset.cell_line, dataset.perturbation)
    obs = zip(("cell_line", "gene"), map(list, zip(*(evaluate.names_of(dataset, code) for code in codes))))
    cells = [(slice(None), {"X": dataset.expression})]
    data.write_anndata(path, dataset.genes, dict(obs), cells, len(dataset.expression))


@pytest.fixture
def real(tmp_path, monkeypatch):
    """Cells of two lines; real.h5ad, in the folder in which the test runs, holds them."""
    monkeypatch.chdir(tmp_path)
    shifts = [(name, rng(i).normal(0, 1, 8)) for i, name in enumerate(["g0", "p", "q"])]
    dataset = made({(line, name): (16, shift) for line in "AB" for name, shift in shifts}, genes=8)
    write("real.h5ad", dataset)
    return dataset


def test_two_files_are_compared_whatever_the_order_and_names_of_genes_and_the_scale_of_counts(real, capsys):
    def compare(real, pred, *options):
        assert main("--real", f"{real}.h5ad", "--pred", f"{pred}.h5ad", "-o", "out", *options) == 0
        return table("out/metrics.csv")
    names, order = list(itertools.product("AB", ["g0", "p", "q"])), [3, 1, 0, 7, 2, 6, 5, 4]
    predicted = made(dict.fromkeys([*names, ("A", "unknown")], (8, 0)), 8, noise=1)
    predicted.expression -= 0.5  # predictions may be negative
    write("pred.h5ad", predicted)
    write("numbered.h5ad", predicted, genes=list("01234567"))  # as STATE names them
    write("turned.h5ad", predicted, genes=[f"g{i}" for i in order], expression=predicted.expression[:, order])
    rows, printed = compare("real", "pred"), capsys.readouterr().out
    assert ",".join(rows[0]) == (
        "cell_line,perturbation,n_real,n_pred,w1,w2,w2_half_squared,w1_marginal,w2_marginal,"
        "w2_half_squared_marginal,sw1,sw2,energy,energy_marginal,mmd,pearson_deg,spearman_deg,n_deg,"
        "pearson_delta,pearson_delta_perturbed_mean,mae,mse,mse_pca,discrimination,discrimination_cosine")
    assert [tuple(row.values())[:4] for row in rows] == [(*pair, "16", "8") for pair in names]
    mean = float(of_metric(table("out/summary.csv"), "prediction")["energy"]["mean"])
    assert mean == pytest.approx(np.mean([float(row["energy"]) for row in rows]), rel=1e-5)
    assert "1 conditions have no real cells and are left out: A / unknown" in printed
    assert "6 conditions" in printed and max(map(len, printed.splitlines())) <= 140
    assert [compare("real", name) for name in ("pred", "turned", "numbered")] == [rows] * 3
    counts = rng(5).poisson(30 * np.exp(0.3 * real.expression))
    write("counts.h5ad", real, expression=counts)
    write("deeper.h5ad", real, expression=counts * np.resize([[3], [1]], (len(counts), 1)))
    assert all(float(row["mae"]) < 1e-5 and float(row["w1"]) < 1e-3 for row in compare("counts", "deeper"))
    rows = compare("counts", "deeper", "--max-cells", 5)
    assert {(row["n_real"], row["n_pred"]) for row in rows} == {("5", "5")}
    assert "6 of 6 conditions have over 5 cells" in capsys.readouterr().out


def test_wrong_files_and_options_end_with_one_line_and_status_2_and_leave_nothing(real, tmp_path, capsys):
    write("fewer.h5ad", real, genes=["other", *real.genes[1:]])
    write("doubled.h5ad", real, genes=["g1", *real.genes[1:]])
    write("controls.h5ad", real, perturbation=0 * real.perturbation)
    (tmp_path / "text.h5ad").write_text("not a file of cells")
    words = lambda name, *more: ["--real", "real.h5ad", "--pred", f"{name}.h5ad", "-o", "out", *more]
    for arguments, said in [
            (words("fewer"), "g0"), (words("doubled"), "g1"), (words("controls"), "no condition"),
            (words("text"), "text.h5ad"), (words("absent"), "absent"), (["no-such-run"], "no-such-run"),
            ([], "give run folders"), (["--real", "x"], "-o OUT/"), (["runs/a", "--pred", "y"], "give run"),
            (["runs/a", "runs/b", "--export", "x"], "one run"),
            (["runs/a", "runs/./a"], "twice"), (["runs/a", "--max-cells", 5], "--max-cells: goes"),
            (words("a", "--max-cells", 1), "--max-cells"),
            (words("a", "--hvg", 0), "--hvg"), (words("a", "--seed", -1), "--seed"),
            (words("a", "--seed", 2**31), "--seed")]:
        assert said in error_of(capsys, *arguments)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def make_run(simulated, tmp_path, monkeypatch):
    """Writes a run folder as training leaves it: `ptrag` predicts part of the true response, `state` half."""
    monkeypatch.setattr(ptrag, "open_data", lambda config: (simulated, data.split(simulated, config.split)))

    def make(name="run", strength=0.8, seeds="0", **options):
        config = ptrag.Config(**{"split": "perturbation:0", "cells": 8, "top_k": 3, **options})
        (_, split), folder = ptrag.open_data(config), tmp_path / name
        used = [simulated.perturbations[p] for p in sorted({p for _, p in split.train})][:4]

        def predict(model, dataset, conditions, config):
            part = (strength if model[0] == "ptrag" else strength / 2) + 0.05 * int(model[1])
            for line, p in conditions:
                real, control = data.evaluation_cells(dataset, (line, p), 0)
                before, after = (dataset.expression[dataset.cells(line, code)].mean(0) for code in (0, p))
                cells = np.maximum(dataset.expression[control] + part * (after - before), 0)
                chance = np.tile([0.8, 0.6, 0.4, 0.2], (len(real), 1)) if model[0] == "ptrag" else None
                yield (line, p), control, (cells, chance)
        monkeypatch.setattr(ptrag, "predict_conditions", predict)
        monkeypatch.setattr(ptrag, "used_candidates", lambda model, gene, chance: {
            "candidate": used, "similarity": [0.5] * 4, "probability": chance.mean(0)})
        folder.mkdir()
        models = {f"{method}-{seed}": (method, seed) for method in ("state", "ptrag") for seed in seeds}
        evaluate.write_predictions(folder, models, simulated, split, config)
        (folder / CONFIG).write_text(json.dumps(dataclasses.asdict(config)))
        (folder / LOG).write_text("method,seed,step,loss,energy,sparsity,validation\n"
                                  "ptrag,0,1,2,2,.1,\nptrag,0,2,1,1,.1,1.5\n")
        return folder
    return make


def test_a_run_gets_its_table_with_baselines_seeds_significance_and_a_self_contained_report(make_run, capsys):
    folder = make_run(seeds="01")
    summary = evaluate.evaluate_runs([folder], full=True)
    printed, rows = capsys.readouterr().out, table(folder / "metrics.csv")
    assert methods_of(summary) == [*evaluate.ANCHORS, "line's mean response", "3 nearest genes",
                                   "ridge on embeddings", "state", "ptrag"]
    floor, state, row = (of_metric(summary, name)["energy"] for name in (evaluate.FLOOR, "state", "ptrag"))
    assert floor["mean"] > state["mean"] > row["mean"] and row["seeds"] == 2 and row["spread"] > 0
    assert list(rows[0])[:4] == ["method", "seed", "cell_line", "perturbation"]
    assert len(rows) == row["conditions"] * (4 + 2 * 2)
    for said in ("±", "simulated data | split perturbation:0", "seeds 0, 1", "no row for the gene's response",
                 "3.8 % of cells use none", "in two lines by one model 1.00", "(pool train)",
                 f"† one-hot, and in {row['conditions']} conditions", "of all cells, as other tools print"):
        assert said in " ".join(printed.split())
    assert max(map(len, printed.splitlines()[:-1])) <= 140  # all but the line that names the files
    text = (folder / "report.html").read_text()
    for said in ("Training", "share of candidates selected", "Retrieval and", "<pre>", "floor energy"):
        assert said in text
    page = list(ElementTree.fromstring(re.sub("<(meta|!)[^>]*>", "", text)).iter())  # every element is closed
    assert not {"script", "img", "link", "iframe"} & {element.tag for element in page}
    assert not {"href", "src", "onload"} & {name for element in page for name in element.attrib}
    assert len(text) < 300_000 and "url(" not in text and "light-dark(" in text


def test_runs_stand_side_by_side_only_if_made_from_the_same_cells(make_run, tmp_path):
    one, two = make_run("one"), make_run("two", 0.4, cells=16)  # the size of a set changes nothing compared
    labels = methods_of(evaluate.evaluate_runs([one, two]))
    assert labels[-4:] == ["one/state", "one/ptrag", "two/state", "two/ptrag"]
    assert (tmp_path / "one+two" / "summary.csv").exists() and not (one / "summary.csv").exists()
    with pytest.raises(ptrag.InputError, match="three: has seed 1"):
        evaluate.evaluate_runs([one, make_run("three", seed=1)])


def test_runs_that_differ_in_the_split_alone_are_pooled_into_one_table_with_one_of_each_line(
        make_run, tmp_path, capsys):
    a, b, other, again = (make_run(name, split=f"cell-line:{line}", lr=rate) for name, line, rate in (
        ("a", "simA", 0.2), ("b", "simB", 0.2), ("other", "simB", 0.1), ("again", "simA", 0.1)))
    run = lambda *folders: of_metric(evaluate.evaluate_runs(folders, full=True), "ptrag").get("energy")
    pooled, printed = run(a, b), " ".join(capsys.readouterr().out.split())
    alone = run(a), run(b)
    count, expected = ([row[name] for row in alone] for name in ("conditions", "mean"))
    assert pooled["conditions"] == sum(count) and f"{sum(count)} conditions" in printed
    means = [float(row["mean"]) for row in table(tmp_path / "a+b" / "lines.csv")
             if (row["method"], row["metric"]) == ("ptrag", "energy")]
    assert means == pytest.approx(expected, rel=1e-5)
    assert pooled["mean"] == pytest.approx(np.average(means, weights=count), rel=1e-5)
    found = {(row["split"], row["cell_line"]) for row in table(tmp_path / "a+b" / "metrics.csv")}
    assert found == {("cell-line:simA", "simA"), ("cell-line:simB", "simB")}
    assert "by models of different splits 1.00" in printed and "simB mean over conditions" in printed
    four = methods_of(evaluate.evaluate_runs([a, b, other, again]))  # two models, each on two splits
    assert "a/ptrag" in four and "other/ptrag" in four and "again/ptrag" not in four
    with pytest.raises(ptrag.InputError, match="other: differs from .* in lr, split"):
        run(a, other)


replaced = lambda old, new: lambda path: path.write_text(path.read_text().replace(old, new))


def set_first(path, value, key="X"):
    with h5py.File(path, "r+") as file:
        file[key][0] = value


@pytest.mark.parametrize("name, harm, said", [
    (RETRIEVAL, lambda path: path.write_text("method,seed\nptrag,0\n"), "damaged"),
    (RETRIEVAL, lambda path: path.write_bytes(b"\xff\x00" * 9), "damaged"),
    (RETRIEVAL, replaced("0.8", "eight"), "damaged"), (RETRIEVAL, replaced("0.8", "1.8"), "damaged"),
    (RETRIEVAL, replaced("simB", "simX"), "simX"), (LOG, replaced("1.5", "best"), "damaged"),
    (RETRIEVAL, replaced("ptrag", "vanilla-rag"), "vanilla-rag"), (CONFIG, replaced("{", "{{"), CONFIG),
    (PREDICTIONS, lambda path: path.write_bytes(path.read_bytes()[:5000]), PREDICTIONS),
    (PREDICTIONS, lambda path: set_first(path, NAN), "finite"),
    (PREDICTIONS, lambda path: set_first(path, "other", "obs/perturbation/categories"), "no cells of"),
    (PREDICTIONS, lambda path: path.unlink(), "not finished")])
def test_damaged_files_of_a_run_end_with_one_line_and_leave_nothing(name, harm, said, make_run, capsys):
    folder = make_run()
    harm(folder / name)
    before = sorted(folder.iterdir())
    error = error_of(capsys, folder)
    assert name in error and said in error
    assert sorted(set(folder.iterdir()) - {folder / ".lock"}) == before


def test_an_export_is_what_cell_eval_and_cell_load_read(make_run, simulated, tmp_path, capsys):
    rule, out = "cell-line:simB", tmp_path / "out"
    folder, split = make_run(split=rule), data.split(simulated, rule)
    set_first(folder / PREDICTIONS, 11)
    assert main(folder, "--export", out) == 0
    printed = capsys.readouterr().out
    assert "30 values above log1p(10,000)" in printed and printed.count("cell-eval run -ap") == 2
    real, state, _ = files = [data.load(out / f"{name}.h5ad", need_embeddings=False)
                              for name in ("real", "state-0", "ptrag-0")]
    tested = {evaluate.names_of(simulated, condition): condition for condition in split.test}
    for file in files:
        assert file.perturbations[0] == "non-targeting"
        assert [evaluate.names_of(file, condition) for condition in file.conditions()] == sorted(tested)
        assert np.array_equal(file.expression[file.cells(0, 0)], simulated.expression[simulated.cells(1, 0)])
    for (_, gene), condition in tested.items():
        rows = real.cells(0, real.perturbations.index(gene))
        assert np.array_equal(real.expression[rows], simulated.expression[simulated.cells(*condition)])
    assert state.expression[np.arange(len(state.cell_line))].max() == np.float32(math.log1p(10_000))
    assert [*vars(data.split(simulated, str(out / "split.toml"))).values()][:3] == [*vars(split).values()][:3]
    with h5py.File(out / "state-0.h5ad") as file:
        about = [file["uns"][name].asstr()[()] for name in ("model", "split", "units")]
        assert about == ["state", rule, data.UNITS] and {"target_gene", "cell_type"} <= set(file["obs"])


def test_predicted_values_that_no_normalised_cell_can_have_are_counted_with_any_number_of_threads(simulated):
    results, cells = [], np.full((5, len(simulated.genes)), 25, np.float32)
    for threads in (2, 1):
        torch.set_num_threads(threads)
        results.append(measured(simulated, lambda condition: cells))
        assert torch.get_num_threads() == threads
    count = 5 * len(simulated.genes) * len(simulated.conditions())
    assert f"{count:,} predicted values are above log1p(10,000), which no cell has" in results[0].notes
    assert np.array_equal(results[0].measured, results[1].measured, equal_nan=True)
