"""Facts about the evaluation: metrics against closed forms and loops, anchors, baselines, whole programs."""
import dataclasses
import html.parser
import json
import math
import shutil

import h5py
import numpy as np
import pytest
import torch

from conftest import table
import data
import evaluate
import ptrag

COLUMN = {name: place for place, name in enumerate(evaluate.COLUMNS)}
NAN, rng = math.nan, np.random.default_rng
PREDICTIONS, RETRIEVAL, LOG, CONFIG = "predictions.h5ad", "retrieval.csv", "log.csv", "config.json"


def made(conditions, genes=6, controls=30, gene_names=None, embeddings=None, noise=0.3):
    """A Dataset from {(line, perturbation): (cells, shift (G,))}: controls around 2, the others shifted."""
    generator, (lines, names) = rng(0), (sorted(set(values)) for values in zip(*conditions))
    populations = [((line, "control"), (controls, 0)) for line in lines] + list(conditions.items())
    cells = [np.maximum(generator.normal(2 + np.zeros(genes) + shift, noise, (count, genes)), 0)
             for _, (count, shift) in populations]
    codes = np.array([(lines.index(line), ["control", *names].index(name), 0)
                      for (line, name), (count, _) in populations for _ in range(count)], np.int32)
    embeddings = generator.normal(size=(len(names), 4)) if embeddings is None else embeddings
    gene_names = gene_names or [f"g{i}" for i in range(genes)]
    expression, perturbations = np.float32(np.concatenate(cells)), ["control", *names]
    return data.Dataset("made", gene_names, lines, perturbations, ["all"], expression, *codes.T, names,
                        np.float32(embeddings), [])


def measured(dataset, predict, baselines=None, **options):
    """Results of one method, `predict` turning a condition into cells, and of its anchors."""
    controls = evaluate.control_moments(dataset, range(len(dataset.cell_lines)))
    contenders = [evaluate.Contender("method", "0", predict)]
    return evaluate.measure(dataset, dataset.conditions(), contenders, baselines or {}, controls, **options)


def row_of(results, label, comparison=evaluate.EQUAL_COUNTS):
    """(C, M) values of a row."""
    return results.measured[comparison, results.labels.index(label)]


def of_metric(summary, method):
    return {row["metric"]: row for row in summary if row["method"] == method}


def moments(mean, variance, count=50):
    return evaluate.Moments(np.array(mean, float), np.array(variance) + np.zeros(len(mean)), count)


def line_of(control, profiles):
    """A Line whose perturbed cells have the mean of the profiles (N, G)."""
    profiles, means = np.float32(profiles), np.stack([[control.mean] * 2] * 2)
    return evaluate.Line(control, torch.tensor(profiles.mean(0)), None, np.stack([profiles] * 2), means)


# --------------------------------------------------------------------------------------- tests of the means

@pytest.mark.parametrize("t, freedom, tail", [  # regularised incomplete beta at 40 digits
    (2.0, 2.5, 0.157391495757966), (1e-6, 3, 0.999999264894806), (12.0, 7.3, 4.55578522957055e-6),
    (3.1, 29.4, 0.00423981118800043), (1.7, 153.2, 0.0911602340687707), (4.0, 12345.6, 6.37118169859196e-5),
    (1.2, 1e6, 0.230139624731725), (40.0, 3, 3.43806807891585e-5)])
def test_t_tail_agrees_with_high_precision_values(t, freedom, tail):
    found = evaluate.student_t_tail([t, -t], [freedom, freedom])
    assert np.abs(found - tail).max() < 1e-9 and np.abs(found / tail - 1).max() < 1e-8


def test_t_tail_has_its_closed_forms_at_one_and_two_degrees_of_freedom():
    t = np.concatenate([np.linspace(0, 5, 101), [50.0, 1e4, 1e200, np.inf]])
    assert np.abs(evaluate.student_t_tail(t, 1.0) - (1 - 2 / np.pi * np.arctan(t))).max() < 1e-10
    t = t[:103]
    assert np.abs(evaluate.student_t_tail(t, 2.0) - (1 - t / np.sqrt(2 + t ** 2))).max() < 1e-10


def test_welch_test_agrees_with_a_reference_value_and_knows_constant_genes_and_single_cells():
    a = np.array([[1.0, 3, 1, 1], [2, 3, 1, 2], [4, 3, 1, 3]])
    b = np.array([[2.5, 3, 2, 1], [6, 3, 2, 1], [7, 3, 2, 1], [9, 3, 2, 1], [3, 3, 2, 1]])
    p = evaluate.welch_test(evaluate.moments([a]), evaluate.moments([b]))
    # scipy.stats.ttest_ind(equal_var=False); both constant, equal and not; one constant: 2, t = sqrt(3)
    assert p == pytest.approx([0.08069212674046464, 1, 0, 1 - math.sqrt(3) / math.sqrt(2 + 3)], abs=1e-8)
    assert np.isnan(evaluate.welch_test(evaluate.moments([a[:1]]), evaluate.moments([b]))).all()


def test_moments_do_not_depend_on_how_cells_arrive_and_survive_a_large_mean():
    cells = rng(0).normal(1e4, 1e-2, (57, 3))
    found = evaluate.moments([cells[:1], cells[1:30], cells[30:]])
    assert np.allclose(found.mean, cells.mean(0), rtol=1e-14) and found.count == 57
    assert np.allclose(found.variance, cells.var(0, ddof=1), rtol=1e-8)
    assert np.isnan(evaluate.moments([cells[:1]]).variance).all()


def test_a_gene_counts_as_differentially_expressed_only_if_significant_and_changed_enough():
    control, real = moments([1] * 4, 0.01, 100), moments([1.5, 1.06, 1.08, 0.6], [0.01, 0.01, 0.01, 9.0], 100)
    found = evaluate.differentially_expressed(real, control)
    assert found.tolist() == [True, False, True, False]  # log2(2.06 / 2) = .043, (2.08 / 2) .057; noise


def test_mean_metrics_equal_their_definitions_written_out():
    real = evaluate.moments([rng(1).normal(2, 0.1, (40, 8)) + np.arange(8) / 4])
    control, means = evaluate.moments([rng(2).normal(2, 0.1, (50, 8))]), rng(3).normal(2, 1, (3, 8))
    of_line = np.float32(rng(4).normal(2, 0.1, (5, 8)))
    found = evaluate.mean_metrics(real, means, line_of(control, of_line))
    genes = np.flatnonzero(evaluate.differentially_expressed(real, control))
    rank = lambda values: [sum(v < w for v in values) for w in values]
    r = lambda *pair: np.corrcoef(*pair)[0, 1]
    assert len(genes) >= 6
    for i, mean in enumerate(means):
        gap, degs, perturbed = mean - real.mean, (mean[genes], real.mean[genes]), of_line.mean(0)
        assert {name: value[i] for name, value in found.items()} == pytest.approx({
            "n_deg": len(genes), "mae": sum(map(abs, gap)) / 8, "mse": sum(gap ** 2) / 8,
            "pearson_delta": r(mean - control.mean, real.mean - control.mean), "pearson_deg": r(*degs),
            "pearson_delta_perturbed_mean": r(mean - perturbed, real.mean - perturbed),
            "spearman_deg": r(*map(rank, degs))})


@pytest.mark.parametrize("changed", [0, 1])
def test_fewer_than_two_differentially_expressed_genes_give_no_number_and_are_counted(changed):
    real, control = moments([4.0] * changed + [2.0] * (5 - changed), 0.1), moments([2.0] * 5, 0.1)
    found = evaluate.mean_metrics(real, np.ones((2, 5)) * np.arange(5), line_of(control, [control.mean]))
    assert np.isnan(found["pearson_deg"]).all() and np.isnan(found["spearman_deg"]).all()
    assert (found["n_deg"] == changed).all() and np.isfinite(found["mae"]).all()


def test_pearson_is_no_number_where_a_side_is_constant_and_ranks_share_ties():
    x, y = np.stack([np.full(5, 0.1), np.arange(5.0), [1.0, 2, 2, 0, 7]]), np.array([3.0, 1, 4, 1, 5])
    found = evaluate.pearson(x, y)
    assert np.isnan(found[0]) and np.allclose(found[1:], [np.corrcoef(row, y)[0, 1] for row in x[1:]])
    assert np.isnan(evaluate.pearson(np.ones(1), np.ones(1)))
    values = np.array([3.0, 1, 3, 2, 3, 1])
    by_hand = [sum(v < w for v in values) + (sum(v == w for v in values) + 1) / 2 for w in values]
    assert evaluate.ranks(values).tolist() == by_hand
    found = evaluate.pearson(*map(evaluate.ranks, ([1, 2, 2, 3, 5], [2, 1, 4, 4, 6])))
    assert found == pytest.approx(0.7631578947368421)  # scipy.stats.spearmanr


# ---------------------------------------------------------------------------------- metrics of point clouds

def squared_mmd_by_loops(x, y):
    points = [*x, *y]
    distances = [math.dist(a, b) for i, a in enumerate(points) for b in points[:i]]
    s = float(np.median([d for d in distances if d > 0]))
    kernel = lambda a, b: math.exp(-math.dist(a, b) ** 2 / (2 * s ** 2))
    within = lambda z: np.mean([kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j])
    return within(x) + within(y) - 2 * np.mean([kernel(a, b) for a in x for b in y])


@pytest.mark.parametrize("n, m", [(2, 2), (7, 4), (5, 12)])
def test_mmd_equals_its_double_loop_at_unequal_counts_and_with_coincident_points(n, m):
    x, y = torch.tensor(rng(n).normal(size=(2, n, 3))), torch.tensor(rng(m).normal(0.5, 1, size=(2, m, 3)))
    x[0, 1], y[1, 0] = x[0, 0], x[1, 0]
    expected = [squared_mmd_by_loops(a.tolist(), b.tolist()) for a, b in zip(x, y)]
    assert np.allclose(evaluate.mmd(x, y), expected, atol=1e-7)
    assert evaluate.mmd(torch.ones(1, n, 2), torch.ones(1, m, 2)).tolist() == [0.0]
    assert torch.isnan(evaluate.mmd(x[:, :1], y)).all() and torch.isnan(evaluate.mmd(x, y[:, :1])).all()


def test_point_metrics_of_a_shifted_cloud_have_their_closed_forms():
    real, shift = torch.tensor(np.float32(rng(0).normal(size=(30, 5)))), torch.tensor([3.0, 0, -4, 0, 0])
    found = evaluate.point_metrics(real, torch.stack([real, real + shift]))
    for name, value, tolerance in (
            ("w1", 5, 2e-3), ("w2", 5, 2e-3), ("w2_half_squared", 12.5, 4e-3), ("mse_pca", 5, 1e-5),
            ("w1_marginal", 7 / 5, 1e-5), ("w2_marginal", 7 / 5, 1e-5)):
        assert found[name][1] == pytest.approx(value, rel=tolerance), name
        assert abs(found[name][0]) < 2e-2
    assert abs(found["sw2"][1] - 5 / math.sqrt(5)) < 4 * found["sw2_error"][1]  # |shift|^2 / d
    assert all(abs(found[name][0]) < 2e-2 for name in ("sw1", "sw2", "energy"))


def test_marginal_distances_and_energy_equal_loops_over_components_at_unequal_counts():
    x, y = torch.tensor(rng(1).normal(1, 2, (6, 3))).float(), torch.tensor(rng(0).normal(size=(4, 3))).float()
    found = {name: value[0] for name, value in evaluate.point_metrics(y, x[None]).items()}
    sort = lambda column, times: np.sort(np.repeat(column.numpy(), times))
    gaps = np.array([sort(y[:, c], 3) - sort(x[:, c], 2) for c in range(3)])  # 12 points a side
    mean = lambda a, b: np.mean([math.dist(u, v) for u in a.tolist() for v in b.tolist()])
    energy = lambda a, b: mean(a, b) - mean(a, a) / 2 - mean(b, b) / 2
    for name, value in (("w1_marginal", np.abs(gaps).mean()),
                        ("w2_marginal", np.sqrt((gaps ** 2).mean(1)).mean()),
                        ("w2_half_squared_marginal", (gaps ** 2).mean() / 2),
                        ("energy_marginal", np.mean([energy(x[:, [c]], y[:, [c]]) for c in range(3)]))):
        assert found[name] == pytest.approx(value, rel=1e-5), name
    assert found["energy"] == pytest.approx(energy(x, y), rel=1e-4)


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
    dataset = made({("A", "g0"): (6, 0), ("A", "p"): (6, [0, 0, 1])}, genes=3, gene_names=["g0", "g0", "g2"])
    dataset.expression[dataset.cells(0, 1), :2] = 0
    found = measured(dataset, lambda condition: np.tile(np.array([9, 9, 2], np.float32), (6, 1)))
    assert row_of(found, "method", evaluate.ALL_CELLS)[0, COLUMN["discrimination"]] == 1


def test_pca_equals_the_singular_value_decomposition_however_the_cells_arrive():
    cells = (rng(0).normal(size=(40, 12)) @ rng(1).normal(size=(12, 12)) + 5).astype(np.float32)
    centre, axes = evaluate.fit_pca([cells[:7], cells[7:]], components=4)
    expected = np.linalg.svd(cells - cells.mean(0), full_matrices=False)[2][:4]
    assert np.allclose(centre, cells.mean(0), atol=1e-5)
    assert np.allclose(np.abs(expected @ axes.numpy()), np.eye(4), atol=1e-4)


@pytest.mark.parametrize("cells, genes, d", [
    (5, 30, 4), (30, 5, 4), (200, 80, 50), (2, 9, 1), (1, 9, 0), (90, 41, 40)])
def test_pca_keeps_at_most_50_components_fewer_than_cells_and_genes_largest_entry_positive(cells, genes, d):
    axes = evaluate.fit_pca([rng(0).normal(size=(cells, genes))])[1]
    assert axes.shape == (genes, d) and (axes.gather(0, axes.abs().argmax(0, keepdim=True)) > 0).all()


def test_pca_leaves_out_directions_without_variance():
    cells = rng(0).normal(size=(50, 6))
    cells = np.concatenate([cells, cells[:, :1], np.ones((50, 3))], axis=1)  # one doubled, three constant
    axes = evaluate.fit_pca([cells])[1]
    assert axes.shape == (10, 6) and np.abs(axes[7:].numpy()).max() < 1e-6


def test_the_signs_of_the_components_do_not_matter_to_any_metric():
    dataset = made({("A", "p"): (14, np.eye(6)[0]), ("A", "q"): (12, np.eye(6)[1])})
    control, pick = evaluate.control_moments(dataset, [0])[0], lambda c: (dataset.cells(*c), None)
    line = evaluate.describe_line(dataset, [(0, 1), (0, 2)], control, pick, 0)
    signs = torch.tensor([-1.0, 1, -1, 1, -1])[:line.axes.shape[1]]
    flipped = dataclasses.replace(line, axes=line.axes * signs)
    real, predicted = (dataset.expression[dataset.cells(0, p)] for p in (1, 0))
    rows = [evaluate.condition_rows(real, [which.population(predicted)], which, 0, 0, np.zeros(6, bool))[0]
            for which in (line, flipped)]
    a, b = (dict(zip(COLUMN, row)) for row in rows)
    for name in evaluate.METRICS:
        if name in ("sw1", "sw2"):  # the random directions meet a mirrored cloud; `fit_pca` fixes the signs
            assert abs(a[name] - b[name]) < 4 * math.hypot(a[name + "_error"], b[name + "_error"])
        else:
            tolerance = 4e-3 if name in ("w1", "w2", "w2_half_squared") else 1e-5
            assert a[name] == pytest.approx(b[name], rel=tolerance, nan_ok=True), name


# -------------------------------------------------------------------------------------------------- anchors

def test_halves_share_no_cell_leave_none_out_and_depend_on_name_and_seed_alone():
    for count in (1, 2, 3, 9, 40):
        a, b = evaluate.halves(("A", "p"), count, 3)
        assert sorted([*a, *b]) == list(range(count)) and len(a) - len(b) == count % 2
    half = lambda names, seed: evaluate.halves(names, 40, seed)[1].tolist()
    assert half("Ap", 3) == half("Ap", 3) and half("Ap", 3) not in (half("Aq", 3), half("Ap", 4))


def test_at_equal_counts_deltas_subtract_two_halves_of_the_controls_so_that_no_effect_correlates_with_none():
    dataset = made({("A", p): (40, 0) for p in "pqrs"}, genes=400, controls=20)
    ceiling = row_of(measured(dataset, lambda c: dataset.expression[:40]), evaluate.CEILING)
    found = ceiling[:, [COLUMN["pearson_delta"], COLUMN["discrimination_cosine"]]].mean(0)
    assert abs(found[0]) < 0.1 and 0.1 < found[1] < 0.9  # with one mean for both sides the correlation is 0.5


@pytest.mark.parametrize("anchor, rows", [("floor", lambda d, c: data.evaluation_cells(d, c, 0)[1]),
                                          ("ceiling", lambda d, c: d.cells(*c))])
def test_unchanged_controls_stand_exactly_at_the_floor_the_other_half_of_cells_at_the_ceiling(anchor, rows):
    dataset = made({("A", p): (24, rng(i).normal(0, 1, 6)) for i, p in enumerate("pqr")})
    summary = evaluate.summarise(measured(dataset, lambda c: dataset.expression[rows(dataset, c)]))
    for metric in evaluate.METRICS:
        row = of_metric(summary, "method")[metric]
        assert row["position"] == pytest.approx(float(anchor == "ceiling"), abs=1e-5)
        assert row["mean_equal"] == pytest.approx(row[anchor], rel=1e-6)


def test_discrimination_at_equal_counts_compares_with_the_same_half_of_every_perturbation():
    dataset = made({("A", f"p{i}"): (6, rng(i).normal(0, 0.2, 6)) for i in range(12)}, noise=0.8)
    cells = [dataset.expression[dataset.cells(0, p)] for p in range(1, 13)]
    cut = [evaluate.halves(("A", f"p{i}"), 6, 0) for i in sorted(range(12), key=str)]
    profiles, means = (np.stack([cell[half[side]].mean(0) for cell, half in zip(cells, cut)])
                       for side in (0, 1))
    expected = [evaluate.discrimination(means[[i]], profiles, i, np.zeros(6, bool))[0] for i in range(12)]
    ceiling = row_of(measured(dataset, lambda c: dataset.expression[:6]), evaluate.CEILING)
    found = ceiling[:, COLUMN["discrimination"]]
    assert found == pytest.approx(expected) and 0 < np.mean(found) < 1


def test_joint_wasserstein_is_marked_where_many_dimensions_and_few_cells_reward_the_collapse():
    shift = lambda i: np.where(rng(i).random(120) < 0.1, 0.3, 0)
    noisy = made({("A", p): (44, shift(i)) for i, p in enumerate("pq")}, genes=120, controls=60, noise=0.5)
    clear = made({("A", p): (80, np.eye(3)[i] * 3) for i, p in enumerate("pqr")}, genes=3, controls=90)
    for dataset, count, marked in ((noisy, 44, {"w1", "w2"}), (clear, 80, set())):
        controls = dataset.expression[dataset.cells(0, 0)[:count]]
        summary = evaluate.summarise(measured(dataset, lambda condition: controls))
        narrow = {row["metric"] for row in summary if row["narrow"]}
        assert marked <= narrow and not {"sw1", "sw2", "energy", "mse", "pearson_delta"} & narrow
        _, headings = evaluate.make_tables(summary)[0][0]
        assert [headings[i].strip() for i in (0, 2)] == ["W1!" if marked else "W1", "SW1"]
        said = any("narrow" in note for note in evaluate.footnotes(summary, "ptrag"))
        assert bool(narrow) == bool(marked) == said


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_two_and_three_cells_are_measured_as_far_as_they_can_be(count):
    dataset = made({("A", "p"): (count, np.ones(6)), ("A", "q"): (9, -np.ones(6))})
    found = measured(dataset, lambda condition: dataset.expression[dataset.cells(0, 0)[:count]])
    whole, equal = row_of(found, "method", evaluate.ALL_CELLS)[0], row_of(found, "method")[0]
    names = "w1", "w2", "sw1", "energy", "mae", "discrimination"
    assert all(np.isfinite(whole[COLUMN[name]]) for name in names)
    assert np.isnan(whole[COLUMN["mmd"]]) == np.isnan(equal).all() == (count == 1)  # one cell has no halves
    assert evaluate.summarise(found)[0]["conditions"] == 0  # the ceiling is not measured over all cells


def test_predictions_of_another_number_of_cells_are_compared_at_equal_counts_and_capped_conditions_are_said():
    dataset = made({("A", "p"): (20, np.ones(6)), ("A", "q"): (8, -np.ones(6))})
    predict = lambda condition: dataset.expression[:7 if condition[1] == 1 else 30]
    found = measured(dataset, predict)
    assert np.isfinite(found.measured[:, -1]).all() and found.counts.tolist() == [[20, 7], [8, 30]]
    found = measured(dataset, predict, max_cells=10)
    assert found.counts[:, 0].tolist() == [10, 8] and "1 of 2 conditions have over 10 cells" in found.notes[0]


# ------------------------------------------------------------------------------------------------ baselines

@pytest.fixture
def trained():
    """Two lines, genes a to e; in line A a to c are trained, d is tested; in B a to d, tested is e."""
    embeddings = np.array([[1, 0, 0], [0, 1, 0], [0.9, 0.1, 0], [0.8, 0.2, 0.1], [0, 0, 1]])
    shift = {name: rng(i).normal(0, 0.5, 6) for i, name in enumerate("abcde")}
    conditions = {(line, name): (12, shift[name]) for line in "AB" for name in shift}
    dataset = made(conditions, embeddings=embeddings)
    return dataset, [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3), (1, 4)], [(0, 4), (1, 5)]


def baselines(dataset, train, test, validation=(), top_k=2):
    controls = evaluate.control_moments(dataset, [0, 1])
    known = [evaluate.mean_responses(dataset, part, controls, 0, 1000) for part in (train, validation)]
    return evaluate.baseline_responses(dataset, test, *known, top_k)


def test_baselines_are_the_means_their_names_say_and_do_not_look_at_the_cells_of_test_conditions(trained):
    dataset, train, test = trained
    found, notes = baselines(dataset, train, test, [(0, 5)])
    mean = lambda line, p: dataset.expression[dataset.cells(line, p)].mean(0)
    own = {p: mean(0, p) - mean(0, 0) for p in (1, 2, 3)}
    expected = {"line's mean response": sum(own.values()) / 3,
                "gene in the other lines": mean(1, 4) - mean(1, 0), "2 nearest genes": (own[1] + own[3]) / 2}
    for name, response in expected.items():
        assert np.allclose(found[name][0, 4], response, atol=1e-5), name
    assert np.allclose(found["gene in the other lines"][1, 5], found["line's mean response"][1, 5])  # e
    assert any("1 of 2 conditions fall back" in note for note in notes)
    for condition in test:
        dataset.expression[dataset.cells(*condition)] = 7
    after, _ = baselines(dataset, train, test, [(0, 5)])
    assert all((found[name][c] == after[name][c]).all() for name in found for c in test)


def test_a_line_without_training_conditions_borrows_the_others_and_rows_without_ground_are_left_out(trained):
    dataset, _, _ = trained
    found, notes = baselines(dataset, [(1, 1), (1, 2)], [(0, 4)], top_k=5)
    control, *means = (dataset.expression[dataset.cells(1, p)].mean(0) for p in (0, 1, 2))
    assert np.allclose(found["line's mean response"][0, 4], sum(means) / 2 - control, atol=1e-5)
    assert list(found) == ["line's mean response", "1 nearest genes", "ridge on embeddings"]
    for said in ("no row for the gene's response", "no training conditions in A", "fewer than top_k 5"):
        assert any(said in note for note in notes)
    assert list(baselines(dataset, [(0, 1)], [(0, 4)])[0]) == ["line's mean response", "ridge on embeddings"]


def test_ridge_goes_from_interpolation_to_the_mean_and_its_penalty_is_the_best_on_validation():
    x, noise = rng(2).normal(size=(12, 20)), rng(3).normal(0, 50, (12, 5))
    y = x @ rng(4).normal(size=(20, 5))
    centred, target = x - x.mean(0), y - y.mean(0)
    square = centred.T @ centred
    primal = np.linalg.solve(square + np.trace(square) / 12 * np.eye(20), centred.T @ target)
    for penalty, expected, tolerance in ((1e-12, y, 1e-4), (1e12, y.mean(0), 1e-4),
                                         (1.0, centred @ primal + y.mean(0), 1e-5)):
        assert np.allclose(evaluate.ridge(x, y, penalty)(x), expected, atol=tolerance)
    known, mean = {(0, p): y[p] for p in range(9)}, {(0, p): noise[:9].mean(0) for p in (9, 10)}
    assert evaluate.choose_penalty(x, known, known) == 1e-3 and evaluate.choose_penalty(x, known, {}) == 1
    assert evaluate.choose_penalty(x, {(0, p): noise[p] for p in range(9)}, mean) == 1e3


def test_a_baseline_is_a_population_of_shifted_control_cells_without_negative_values():
    dataset = made({("A", "p"): (16, -1.5 * np.ones(6)), ("A", "q"): (16, np.ones(6))}, noise=0.8)
    shifted = lambda c: np.maximum(dataset.expression[data.evaluation_cells(dataset, c, 0)[1]] - 1.5, 0)
    response = dict.fromkeys(dataset.conditions(), np.full(6, -1.5, np.float32))
    found = measured(dataset, shifted, baselines={"shift": response})
    assert np.allclose(found.measured[:, -2], found.measured[:, -1], rtol=1e-6)


# --------------------------------------------------------------------------------- significance and summary

A, B = np.array([1.1, 2.2, 2.2, 3.5, 4.0, 7.1, 2.2]), np.array([2.2, 5.0, 6.1, 6.1, 8.3])


@pytest.mark.parametrize("x, y, p", [  # scipy.stats.mannwhitneyu, asymptotic, with continuity correction
    (A, B, 0.11563791915596121), (B, A, 0.11563791915596121), (np.ones(5), np.ones(6), 1), (A, A[:0], NAN),
    (np.arange(4), np.arange(4) + 4, 0.03038282197657749), (A[:0], A, NAN)])
def test_mann_whitney_agrees_with_reference_values_with_and_without_ties(x, y, p):
    assert evaluate.mann_whitney(x, y) == pytest.approx(p, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("p, adjusted", [  # scipy.stats.false_discovery_control; never falling with p
    ([0.01, 0.04, NAN, 0.03, 0.5, 0.005], [0.025, 0.05, NAN, 0.05, 0.5, 0.025]),
    ([0.01, 0.011, 0.02, 0.5], [0.022, 0.022, 0.02 * 4 / 3, 0.5])])
def test_benjamini_hochberg_agrees_with_reference_values_and_passes_over_missing_ones(p, adjusted):
    assert evaluate.benjamini_hochberg(p) == pytest.approx(adjusted, nan_ok=True)


def summarised(rows, anchors=(0, 5, 10), untrained=0):
    """Summary of made-up values, {(label, seed): value per condition}, the same in every metric."""
    C = len(list(rows.values())[0])
    rows = {(name, ""): [value] * C for name, value in zip(evaluate.ANCHORS, anchors)} | rows
    values = np.array(list(rows.values()), float)  # (R, C)
    values = np.stack([values, values])[..., None].repeat(len(COLUMN), 3)
    values[evaluate.ALL_CELLS, :2] = NAN
    one_hot = np.arange(C) < untrained
    results = evaluate.Results(None, [None] * C, list(rows), values, None, [], [""] * C, one_hot)
    return evaluate.summarise(results)


def test_summary_averages_seeds_within_conditions_and_gives_their_spread():
    summary = summarised({("ptrag", "0"): [1, 2, 3, NAN], ("ptrag", "1"): [3, 4, 5, NAN]})
    row = of_metric(summary, "ptrag")["w1"]
    expected = {"mean": 3, "conditions": 3, "seeds": 2, "position": 0.7, "spread": math.sqrt(2),  # of 2 and 4
                "standard_error": 1 / math.sqrt(3)}                                              # of 2, 3, 4
    assert {name: row[name] for name in expected} == pytest.approx(expected)


def test_summary_counts_in_how_many_conditions_the_reference_is_better():
    summary = summarised({("state", "0"): np.arange(30) + 5.0, ("ptrag", "0"): np.arange(30) / 10})
    state, ptrag_row = of_metric(summary, "state"), of_metric(summary, "ptrag")["w1"]
    assert [state["w1"][name] for name in ("reference_better", "compared")] == [30, 30]
    assert state["pearson_delta"]["reference_better"] == 0          # there more is better
    assert state["w1"]["p_adjusted"] < 0.001 and math.isnan(ptrag_row["p"])
    assert math.isnan(state["pearson_delta"]["position"])  # floor 10 above ceiling 0: nothing is separated


def test_a_one_hot_row_is_marked_where_no_training_condition_perturbs_the_gene():
    rows = {(label, "0"): np.arange(4.0) for label in ("state", "state-genept", "ptrag")}
    for untrained in (0, 3):
        summary = summarised(rows, untrained=untrained)
        marked = {row["method"] for row in summary if row["untrained"] == 3}
        labels = [label for label, _ in evaluate.make_tables(summary)[0]]
        said = any("in 3 conditions" in note for note in evaluate.footnotes(summary, "ptrag"))
        assert (marked == {"state"}) == ("state †" in labels) == said == (untrained > 0)


@pytest.mark.parametrize("metric, ceiling, collapse, floor, separates, narrow", [
    ("mae", 3, 2, 9, True, 1), ("mae", 9, 10, 3, False, 0), ("mae", 3, 2.995, 9, True, 0),
    ("pearson_delta", 0.9, 0.9, 0.1, True, 0), ("pearson_delta", 0.9, 0.95, 0.1, True, 1)])
def test_anchors_are_judged_in_the_sense_of_the_metric(metric, ceiling, collapse, floor, separates, narrow):
    row = of_metric(summarised({("method", "0"): [0.5, 0.6]}, (ceiling, collapse, floor)), "method")[metric]
    assert math.isfinite(row["position"]) == separates and row["narrow"] == narrow


# ------------------------------------------------------------------------------------------------ retrieval

def candidates(line, perturbation, selected, split="one"):
    """Rows of retrieval.csv, {candidate: share of cells that select it}, as a group of one condition."""
    return {(split, "0", line, perturbation): [dict(candidate=name, selected=share, probability=share)
                                               for name, share in selected.items()]}


def test_overlap_between_lines_falls_below_shuffled_lines_only_where_selection_depends_on_the_line():
    cells = {(split, line, "p"): 40 for split in ("one", "two") for line in "AB"}
    same = candidates("A", "p", {"u": 1.0, "v": 0.0}) | candidates("B", "p", {"u": 1.0, "v": 0.0}, "two")
    assert evaluate.line_overlap(same, cells, rng(0)).tolist() == [[1, 1, 0]]  # of two models
    a, b = {"u": 0.9, "v": 0.3, "w": 1}, {"u": 0.3, "v": 0.9, "w": 1}
    groups = candidates("A", "p", a) | candidates("B", "p", b) | candidates("B", "q", b)
    (observed, shuffled, one_model), = evaluate.line_overlap(groups, cells, rng(0))
    assert observed == pytest.approx(1 / 3) and shuffled > observed and one_model
    same_line = candidates("A", "p", a) | candidates("A", "p", a, "two")
    assert len(evaluate.line_overlap(same_line, cells, rng(0))) == 0


@pytest.mark.parametrize("values, said", [
    ((0.88, 0.9), "settled at using nearly all"), ((0.12, 0.13), "noise floor"), ((0.9, 0.2, 0.4), "chooses"),
    ((0.0, 0.01), "settled at none"), ((0.5, 0.5), "indifferent")])
def test_where_selection_settles_is_said_in_words(values, said):
    assert said in evaluate.describe_selection(np.array(values))


def test_response_similarity_compares_candidates_with_the_rest_of_the_pool():
    dataset, unit = made({("A", name): (4, 0) for name in "abcdeq"}), np.eye(6)
    measured_there = [unit[0] * 2, unit[0] + unit[1], unit[1], -unit[0], unit[0], unit[0]]
    responses = {(0, p): response for p, response in enumerate(measured_there, start=1)}
    groups = candidates("A", "q", {"a": 0.9, "b": 0.2, "c": 0.1, "missing": 1.0})
    found = evaluate.response_similarity(dataset, groups, responses, pool={"a", "b", "c", "d"})
    # candidates, the pool's other genes, selected, unselected, rank correlation
    assert found[0] == pytest.approx([(1 + math.sqrt(0.5)) / 3, -1, 1, math.sqrt(0.5) / 2, 1])


# -------------------------------------------------------------------------------- anyone's cells, two files

def write(path, dataset, rows, cells=None, order=None, extra=(), genes=None):
    """An AnnData file of some cells of a dataset, perhaps with other values or order of genes, more cells."""
    order = np.arange(len(dataset.genes)) if order is None else order
    cells = dataset.expression[rows] if cells is None else cells
    codes = zip(dataset.cell_line[rows], dataset.perturbation[rows])
    lines, perturbations = map(list, zip(*(evaluate.names_of(dataset, code) for code in codes), *extra))
    cells = np.concatenate([cells, cells[:len(extra)]])[:, order]
    obs = {"cell_line": lines, "gene": ["non-targeting" if p == "control" else p for p in perturbations]}
    genes = [(genes or dataset.genes)[i] for i in order]
    data.write_anndata(path, genes, obs, [(slice(None), {"X": cells})], len(cells))


@pytest.fixture
def files(tmp_path):
    """Real cells of two lines; predicted, half as many: real ones with noise, some below zero."""
    shift = {name: rng(i).normal(0, 1, 8) for i, name in enumerate(["g0", "p", "q"])}
    dataset = made({(line, name): (16, shift[name]) for line in "AB" for name in shift}, genes=8)
    write(tmp_path / "real.h5ad", dataset, np.arange(len(dataset.expression)))
    rows = np.flatnonzero(dataset.perturbation > 0)[::2]
    predicted = dataset.expression[rows] + rng(0).normal(0, 0.5, (len(rows), 8)).astype(np.float32)
    for name, genes in (("pred", None), ("numbered", list("01234567"))):  # as STATE names them
        write(tmp_path / f"{name}.h5ad", dataset, rows, predicted, extra=[("A", "unknown")] * 3, genes=genes)
    write(tmp_path / "turned.h5ad", dataset, rows, predicted, order=np.array([3, 1, 0, 7, 2, 6, 5, 4]))
    return tmp_path, dataset


def main(*words):
    return evaluate.main([str(word) for word in words])


def compare(folder, real, pred, out="out", *options):
    """Metrics of two files, as written."""
    assert main("--real", folder / real, "--pred", folder / pred, "-o", folder / out, *options) == 0
    return table(folder / out / "metrics.csv")


def test_anyones_predictions_are_evaluated_from_two_files(files, capsys):
    folder, dataset = files
    rows, printed = compare(folder, "real.h5ad", "pred.h5ad"), capsys.readouterr().out
    assert ",".join(rows[0]) == (
        "cell_line,perturbation,n_real,n_pred,w1,w2,w2_half_squared,w1_marginal,w2_marginal,"
        "w2_half_squared_marginal,sw1,sw2,energy,energy_marginal,mmd,pearson_deg,spearman_deg,n_deg,"
        "pearson_delta,pearson_delta_perturbed_mean,mae,mse,mse_pca,discrimination,discrimination_cosine")
    expected = [(line, p, "16", "8") for line in "AB" for p in ("g0", "p", "q")]
    assert [tuple(row.values())[:4] for row in rows] == expected
    assert float(rows[1]["w2_half_squared"]) == pytest.approx(float(rows[1]["w2"]) ** 2 / 2, rel=1e-5)
    summary = of_metric(table(folder / "out" / "summary.csv"), "prediction")["energy"]
    values = [float(row["energy"]) for row in rows]
    assert float(summary["mean"]) == pytest.approx(np.mean(values), rel=1e-5)
    assert float(summary["standard_error"]) == pytest.approx(np.std(values, ddof=1) / math.sqrt(6), rel=1e-5)
    assert "1 conditions have no real cells and are left out: A / unknown" in printed
    assert "6 conditions" in printed
    assert max(len(line) for line in printed.splitlines() if str(folder) not in line) <= 140


def make_sparse(source, path):
    """A copy of an AnnData file with X in compressed rows."""
    shutil.copy(source, path)
    with h5py.File(path, "r+") as file:
        dense = file["X"][()]
        del file["X"]
        group, (rows, columns) = file.create_group("X"), np.nonzero(dense)
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": dense.shape})
        indptr = np.searchsorted(rows, np.arange(len(dense) + 1))
        group["data"], group["indices"], group["indptr"] = dense[rows, columns], columns, indptr


def test_neither_the_order_of_the_genes_nor_the_layout_of_a_file_matters_and_runs_repeat_exactly(files):
    folder, _ = files
    make_sparse(folder / "pred.h5ad", folder / "sparse.h5ad")
    names = [f"{name}.h5ad" for name in ("pred", "pred", "turned", "sparse", "numbered")]
    first, *others = (compare(folder, "real.h5ad", name) for name in names)
    assert others == [first] * 4


def test_counts_in_both_files_are_normalised_alike_and_predicted_controls_passed_over(files, capsys):
    folder, dataset = files
    counts, rows = rng(5).poisson(30 * np.exp(0.3 * dataset.expression)), np.arange(len(dataset.expression))
    write(folder / "counts.h5ad", dataset, rows, np.float32(counts))
    write(folder / "deeper.h5ad", dataset, rows, np.float32(counts * (3 - 2 * (rows[:, None] % 2))))
    found = compare(folder, "counts.h5ad", "deeper.h5ad")
    assert all(float(row["mae"]) < 1e-5 and float(row["w1"]) < 1e-3 for row in found)
    assert "left out" not in capsys.readouterr().out
    found = compare(folder, "counts.h5ad", "deeper.h5ad", "out", "--max-cells", 5)
    assert {(row["n_real"], row["n_pred"]) for row in found} == {("5", "5")}
    assert "6 of 6 conditions have over 5 cells" in capsys.readouterr().out


def test_wrong_files_and_options_end_with_one_line_and_status_2_ctrl_c_with_130(files, capsys, monkeypatch):
    folder, dataset = files
    for name, genes in (("fewer", ["other"]), ("doubled", ["g1"])):
        write(folder / f"{name}.h5ad", dataset, np.arange(100), genes=[*genes, *dataset.genes[1:]])
    write(folder / "controls.h5ad", dataset, dataset.cells(0, 0))
    (folder / "text.h5ad").write_text("not a file of cells")
    real, out = folder / "real.h5ad", folder / "out"
    words = lambda name: ["--real", real, "--pred", folder / f"{name}.h5ad", "-o", out]
    cases = {"g0": words("fewer"), "g1": words("doubled"), "no condition": words("controls"),
             "no-such-run": [folder / "no-such-run"], "text.h5ad": words("text"), "absent": words("absent")}
    for said, arguments in cases.items():
        assert main(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1, error
    for arguments in ([], ["--real", "x"], ["runs/a", "--pred", "y"], ["runs/a", "runs/b", "--export", "x"],
                      *([*words("pred"), *option] for option in
                        (("--max-cells", 1), ("--hvg", 0), ("--seed", -1), ("--seed", 2**31)))):
        with pytest.raises(SystemExit) as stop:
            main(*arguments)
        assert stop.value.code == 2
    capsys.readouterr()
    monkeypatch.setattr(evaluate, "summarise", lambda results: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(*words("pred")) == 130 and capsys.readouterr().err == "stopped\n"
    assert not out.exists()


# ----------------------------------------------------------------------------------------------- whole runs

def write_run(folder, dataset, split, strength, seeds=("0",), rule="perturbation:0", **options):
    """A run folder as training leaves it: `ptrag` predicts a part of the true response, `state` half."""
    folder.mkdir(parents=True)
    config = ptrag.Config(**{"split": rule, "cells": 8, "top_k": 3, **options})
    (folder / CONFIG).write_text(json.dumps(dataclasses.asdict(config)))
    blocks, obs = [], {name: [] for name in (*evaluate.RETRIEVAL_COLUMNS[:4], "nothing_selected")}
    names = [dataset.perturbations[p] for p in sorted({p for _, p in split.train})][:4]
    retrieval = [evaluate.RETRIEVAL_COLUMNS]
    for method, seed, (line, p) in ((m, s, c) for m in ("state", "ptrag") for s in seeds for c in split.test):
        real, control = data.evaluation_cells(dataset, (line, p), 0)
        response = dataset.expression[real].mean(0) - dataset.expression[dataset.cells(line, 0)].mean(0)
        part = (strength if method == "ptrag" else strength / 2) + 0.05 * int(seed)
        row = method, seed, *evaluate.names_of(dataset, (line, p)), 0.25 if method == "ptrag" else NAN
        start = len(obs["seed"])
        cells = np.maximum(dataset.expression[control] + part * response, 0)
        blocks.append((slice(start, start + len(real)), {"X": cells}))
        for column, value in zip(obs.values(), row):
            column += [value] * len(real)
        retrieval += [(*row[:4], rank + 1, name, 0.5, 0.8 - 0.2 * rank, int(rank < 2))
                      for rank, name in enumerate(names) if method == "ptrag"]
    obs["nothing_selected"] = np.array(obs["nothing_selected"])
    data.write_anndata(folder / PREDICTIONS, dataset.genes, obs, blocks, len(obs["seed"]))
    (folder / RETRIEVAL).write_text("\n".join(",".join(map(str, row)) for row in retrieval))
    (folder / LOG).write_text("method,seed,step,loss,energy,sparsity,validation\n"
                              "ptrag,0,1,2,2,.1,\nptrag,0,2,1,1,.1,1.5\n")
    return folder


@pytest.fixture(scope="module")
def simulated():
    """Data and their split by genes."""
    sizes = dict(cell_lines=2, perturbations=12, genes=40, cells=12, controls=40, embedding_dim=8, programs=4)
    dataset = data.simulate(**sizes)
    return dataset, data.split(dataset, "perturbation:0", 0)


class Page(html.parser.HTMLParser):
    """Checks that every element is closed in order, and remembers what kinds there are."""

    def __init__(self, text):
        super().__init__()
        self.open, self.kinds, self.attributes = [], set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.kinds.add(tag)
        self.attributes |= {name for name, _ in attributes}
        self.open += [tag] * (tag != "meta")

    def handle_startendtag(self, tag, attributes):
        self.kinds.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_run_gets_its_table_with_baselines_seeds_significance_and_a_self_contained_report(
        simulated, tmp_path, capsys):
    dataset, split = simulated
    folder = write_run(tmp_path / "run", dataset, split, 0.8, seeds=("0", "1"))
    summary = evaluate.evaluate_runs([folder], dataset, split, full=True)
    printed = capsys.readouterr().out
    assert list(dict.fromkeys(row["method"] for row in summary)) == [
        *evaluate.ANCHORS, "line's mean response", "3 nearest genes", "ridge on embeddings", "state", "ptrag"]
    floor, state, row = (of_metric(summary, name)["energy"] for name in (evaluate.FLOOR, "state", "ptrag"))
    assert floor["mean"] > state["mean"] > row["mean"] and row["seeds"] == 2 and row["spread"] > 0
    for said in ("±", "simulated data | split perturbation:0", "seeds 0, 1", "no row for the gene's response",
                 "25.0 % of cells use none", "in two lines by one model 1.00", "(pool train)",
                 "† one-hot, and in 14 conditions", "of all cells, as other tools print"):
        assert said in " ".join(printed.split())
    assert max(map(len, printed.splitlines()[:-1])) <= 140  # all but the line that names the files
    rows = table(folder / "metrics.csv")
    assert list(rows[0])[:4] == ["method", "seed", "cell_line", "perturbation"]
    assert len(rows) == len(split.test) * (4 + 2 * 2)
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert not page.open and len(text) < 300_000 and not {"script", "img", "link", "iframe"} & page.kinds
    assert not {"href", "src", "onload"} & page.attributes and "url(" not in text and "light-dark(" in text
    for said in ("Training", "share of candidates selected", "Retrieval and", "color-mix(", "floor energy"):
        assert said in text


def test_runs_stand_side_by_side_only_if_made_from_the_same_cells(simulated, tmp_path):
    one = write_run(tmp_path / "one", *simulated, 0.8)
    two = write_run(tmp_path / "two", *simulated, 0.4, cells=16)  # the size of a set changes nothing compared
    three = write_run(tmp_path / "three", *simulated, 0.4, seed=1)
    summary = evaluate.evaluate_runs([one, two], *simulated, say=lambda line: None)
    labels = list(dict.fromkeys(row["method"] for row in summary))
    assert labels[-4:] == ["one/state", "one/ptrag", "two/state", "two/ptrag"]
    assert (tmp_path / "one+two" / "summary.csv").exists() and not (one / "summary.csv").exists()
    with pytest.raises(data.DataError, match="three: has seed 1"):
        evaluate.evaluate_runs([one, three], *simulated)


def test_runs_that_differ_in_the_split_alone_are_pooled_into_one_table_with_one_of_each_line(
        simulated, tmp_path, capsys):
    dataset, _ = simulated
    splits = {line: data.split(dataset, f"cell-line:{line}", 0) for line in ("simA", "simB")}
    a, b, other, again = (
        write_run(tmp_path / name, dataset, splits[line], 0.8, rule=f"cell-line:{line}", lr=rate)
        for name, line, rate in (("a", "simA", 0.2), ("b", "simB", 0.2), ("other", "simB", 0.1),
                                 ("again", "simA", 0.1)))
    run = lambda *folders: evaluate.evaluate_runs(folders, dataset, splits["simA"], full=True)
    pooled = of_metric(run(a, b), "ptrag")["energy"]
    printed, alone = " ".join(capsys.readouterr().out.split()), of_metric(run(a), "ptrag")["energy"]
    count = [len(split.test) for split in splits.values()]
    assert pooled["conditions"] == sum(count) and f"{sum(count)} conditions" in printed
    rows = table(tmp_path / "a+b" / "lines.csv")
    means = [float(row["mean"]) for row in rows if (row["method"], row["metric"]) == ("ptrag", "energy")]
    assert means[0] == pytest.approx(alone["mean"], rel=1e-5)
    assert pooled["mean"] == pytest.approx(np.average(means, weights=count), rel=1e-5)
    found = {(row["split"], row["cell_line"]) for row in table(tmp_path / "a+b" / "metrics.csv")}
    assert found == {("cell-line:simA", "simA"), ("cell-line:simB", "simB")}
    assert "by models of different splits 1.00" in printed and "simB mean over conditions" in printed
    four = {row["method"] for row in run(a, b, other, again)}
    assert {"a/ptrag", "other/ptrag"} <= four and "again/ptrag" not in four  # two models, each on two splits
    with pytest.raises(data.DataError, match="other: differs from .* in lr, split"):
        run(a, other)


def replaced(old, new):
    return lambda path: path.write_text(path.read_text().replace(old, new))


def set_first(path, value):
    with h5py.File(path, "r+") as file:
        file["X"][0, 0] = value


@pytest.mark.parametrize("name, harm, said", [
    (RETRIEVAL, lambda path: path.write_text("method,seed\nptrag,0\n"), "damaged"),
    (RETRIEVAL, lambda path: path.write_bytes(b"\xff\x00" * 9), "damaged"),
    (RETRIEVAL, replaced("0.8", "eight"), "damaged"), (RETRIEVAL, replaced("0.8", "1.8"), "does not belong"),
    (RETRIEVAL, replaced("simB", "simX"), "does not belong"), (LOG, replaced("1.5", "best"), "damaged"),
    (RETRIEVAL, replaced("ptrag", "vanilla-rag"), "does not belong"), (CONFIG, replaced("{", "{{"), CONFIG),
    (PREDICTIONS, lambda path: path.write_bytes(path.read_bytes()[:5000]), PREDICTIONS),
    (PREDICTIONS, lambda path: set_first(path, NAN), "finite"),
    (PREDICTIONS, lambda path: path.unlink(), "not finished")])
def test_damaged_files_of_a_run_end_with_one_line_and_leave_nothing(
        name, harm, said, simulated, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ptrag, "open_data", lambda config: simulated)
    folder = write_run(tmp_path / "run", *simulated, 0.8)
    harm(folder / name)
    before = sorted(folder.iterdir())
    assert main(folder) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and name in error and said in error and error.count("\n") == 1, error
    assert sorted(set(folder.iterdir()) - {folder / ".lock"}) == before


def test_an_unfinished_run_is_an_error_that_says_so(simulated, tmp_path):
    dataset, split = simulated
    folder = write_run(tmp_path / "run", dataset, dataclasses.replace(split, test=split.test[1:]), 0.8)
    with pytest.raises(data.DataError, match="no cells of"):
        evaluate.evaluate_runs([folder], dataset, split)


def test_an_export_is_what_cell_eval_and_cell_load_read(simulated, tmp_path, monkeypatch, capsys):
    dataset, split = simulated[0], data.split(simulated[0], "cell-line:simB", 0)
    monkeypatch.setattr(ptrag, "open_data", lambda config: (dataset, split))
    folder, out = write_run(tmp_path / "run", dataset, split, 0.8), tmp_path / "out"
    set_first(folder / PREDICTIONS, 11)
    assert main(folder, "--export", out) == 0
    printed = capsys.readouterr().out
    assert "1 values above log1p(10,000)" in printed and printed.count("cell-eval run -ap") == 2
    real, state, _ = files = [data.load(out / f"{name}.h5ad", need_embeddings=False)
                              for name in ("real", "state-0", "ptrag-0")]
    tested = [evaluate.names_of(dataset, condition) for condition in split.test]
    for file in files:
        assert file.perturbations[0] == "non-targeting"
        assert [evaluate.names_of(file, condition) for condition in file.conditions()] == sorted(tested)
        assert np.array_equal(file.expression[file.cells(0, 0)], dataset.expression[dataset.cells(1, 0)])
    for line, p in split.test:
        rows = real.cells(0, real.perturbations.index(dataset.perturbations[p]))
        assert np.array_equal(real.expression[rows], dataset.expression[dataset.cells(line, p)])
    assert state.expression[np.arange(len(state.cell_line))].max() == np.float32(math.log1p(10_000))
    again = data.split(dataset, str(out / "split.toml"), 0)
    assert (again.train, again.validation, again.test) == (split.train, split.validation, split.test)
    with h5py.File(out / "state-0.h5ad") as file:
        about = [file["uns"][name].asstr()[()] for name in ("model", "split", "units")]
        assert about == ["state", "perturbation:0", data.UNITS]
        assert {"target_gene", "cell_type"} <= set(file["obs"])
