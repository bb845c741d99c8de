"""Facts about the evaluation: every metric against a closed form or a double loop, and about anchors, baselines, tests and command line."""
import csv
import dataclasses
import html.parser
import json
import math
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data      # noqa: E402
import evaluate  # noqa: E402
import ptrag     # noqa: E402

COLUMN = {name: place for place, name in enumerate(evaluate.COLUMNS)}


def rng(seed=0):
    return np.random.default_rng(seed)


def made(conditions, genes=6, controls=30, seed=0, gene_names=None, embeddings=None, noise=0.3):
    """A Dataset from {(line, perturbation): (cells, shift (G,))}: controls around 2, perturbed cells shifted."""
    generator = rng(seed)
    lines, names = sorted({line for line, _ in conditions}), sorted({p for _, p in conditions})
    blocks, codes = [], []
    parts = [(line, "control", controls, np.zeros(genes)) for line in lines] + [(*key, *value) for key, value in conditions.items()]
    for line, name, count, shift in parts:
        blocks.append(np.maximum(generator.normal(2 + np.asarray(shift), noise, (count, genes)), 0))
        codes += [(lines.index(line), 0 if name == "control" else 1 + names.index(name))] * count
    codes = np.array(codes, dtype=np.int32)
    embeddings = generator.normal(size=(len(names), 4)) if embeddings is None else embeddings
    return data.Dataset("made", gene_names or [f"g{i}" for i in range(genes)], lines, ["control", *names], ["all"],
                        np.concatenate(blocks).astype(np.float32), codes[:, 0], codes[:, 1], np.zeros(len(codes), np.int32),
                        names, np.asarray(embeddings, dtype=np.float32), [])


def measured(dataset, predict, conditions=None, baselines=None, **options):
    """Results of one method, `predict` turning a condition into cells, and of its anchors."""
    controls = evaluate.control_moments(dataset, range(len(dataset.cell_lines)))
    contenders = [evaluate.Contender("method", "0", predict)]
    return evaluate.measure(dataset, conditions or dataset.conditions(), contenders, baselines or {}, controls, **options)


# ------------------------------------------------------------------------------------------------------- tests of the means

@pytest.mark.parametrize("t, freedom, tail", [  # regularised incomplete beta at 40 digits
    (2.0, 2.5, 0.157391495757966), (1e-6, 3, 0.999999264894806), (12.0, 7.3, 4.55578522957055e-6), (3.1, 29.4, 0.00423981118800043),
    (1.7, 153.2, 0.0911602340687707), (4.0, 12345.6, 6.37118169859196e-5), (1.2, 1e6, 0.230139624731725), (40.0, 3, 3.43806807891585e-5)])
def test_t_tail_agrees_with_high_precision_values(t, freedom, tail):
    found = evaluate.student_t_tail([t, -t], [freedom, freedom])
    assert np.abs(found - tail).max() < 1e-9
    assert np.abs(found / tail - 1).max() < 1e-8


def test_t_tail_has_its_closed_forms_at_one_and_two_degrees_of_freedom():
    t = np.concatenate([np.linspace(0, 5, 101), [50.0, 1e4, 1e200, np.inf]])
    assert np.abs(evaluate.student_t_tail(t, 1.0) - (1 - 2 / np.pi * np.arctan(t))).max() < 1e-10
    with np.errstate(over="ignore", invalid="ignore"):
        assert np.abs(evaluate.student_t_tail(t[:103], 2.0) - (1 - t[:103] / np.sqrt(2 + t[:103] ** 2))).max() < 1e-10


def test_welch_test_agrees_with_a_reference_value_and_knows_constant_genes_and_single_cells():
    a = np.array([[1.0, 3, 1, 1], [2, 3, 1, 2], [4, 3, 1, 3]])
    b = np.array([[2.5, 3, 2, 1], [6, 3, 2, 1], [7, 3, 2, 1], [9, 3, 2, 1], [3, 3, 2, 1]])
    p = evaluate.welch_test(evaluate.moments([a]), evaluate.moments([b]))
    assert p[0] == pytest.approx(0.08069212674046464, abs=1e-8)  # scipy.stats.ttest_ind(equal_var=False)
    assert p[1] == 1 and p[2] == 0                               # constant and equal; constant and different
    assert p[3] == pytest.approx(1 - math.sqrt(3) / math.sqrt(2 + 3), abs=1e-8)  # one side constant: two degrees of freedom, t = sqrt(3)
    assert np.isnan(evaluate.welch_test(evaluate.moments([a[:1]]), evaluate.moments([b]))).all()


def test_moments_do_not_depend_on_how_cells_arrive_and_survive_a_large_mean():
    cells = rng().normal(1e4, 1e-2, (57, 3))
    found = evaluate.moments([cells[:1], cells[1:30], cells[30:]])
    assert np.allclose(found.mean, cells.mean(0), rtol=1e-14)
    assert np.allclose(found.variance, cells.var(0, ddof=1), rtol=1e-8)
    assert found.count == 57 and np.isnan(evaluate.moments([cells[:1]]).variance).all()


def test_a_gene_counts_as_differentially_expressed_only_if_significant_and_changed_enough():
    control = evaluate.Moments(np.array([1.0, 1.0, 1.0, 1.0]), np.full(4, 0.01), 100)
    real = evaluate.Moments(np.array([1.5, 1.06, 1.08, 0.6]), np.array([0.01, 0.01, 0.01, 9.0]), 100)
    found = evaluate.differentially_expressed(real, control)
    assert found.tolist() == [True, False, True, False]  # log2(2.06 / 2) = 0.043, log2(2.08 / 2) = 0.057; the last is not significant


def test_mean_metrics_equal_their_definitions_written_out():
    generator = rng(1)
    real = evaluate.moments([generator.normal(2, 0.1, (40, 8)) + np.arange(8) / 4])
    control = evaluate.moments([generator.normal(2, 0.1, (50, 8))])
    means = generator.normal(2, 1, (3, 8))
    found = evaluate.mean_metrics(real, means, control)
    genes = [g for g in range(8) if evaluate.differentially_expressed(real, control)[g]]
    assert len(genes) >= 6 and (found["n_deg"] == len(genes)).all()
    for i, mean in enumerate(means):
        assert found["mae"][i] == pytest.approx(sum(abs(mean[g] - real.mean[g]) for g in range(8)) / 8)
        assert found["mse"][i] == pytest.approx(sum((mean[g] - real.mean[g]) ** 2 for g in range(8)) / 8)
        assert found["pearson_delta"][i] == pytest.approx(np.corrcoef(mean - control.mean, real.mean - control.mean)[0, 1])
        assert found["pearson_deg"][i] == pytest.approx(np.corrcoef(mean[genes], real.mean[genes])[0, 1])


@pytest.mark.parametrize("changed", [0, 1])
def test_fewer_than_two_differentially_expressed_genes_give_no_number_and_are_counted(changed):
    real, control = np.full(5, 2.0), np.full(5, 2.0)
    real[:changed] = 4.0
    real, control = (evaluate.Moments(mean, np.full(5, 0.1), 50) for mean in (real, control))
    found = evaluate.mean_metrics(real, np.ones((2, 5)) * np.arange(5), control)
    assert np.isnan(found["pearson_deg"]).all() and np.isnan(found["spearman_deg"]).all()
    assert (found["n_deg"] == changed).all() and np.isfinite(found["mae"]).all()


def test_pearson_is_no_number_where_a_side_is_constant():
    x = np.stack([np.full(5, 0.1), np.arange(5.0), [1.0, 2, 2, 0, 7]])
    found = evaluate.pearson(x, np.array([3.0, 1, 4, 1, 5]))
    assert np.isnan(found[0]) and np.allclose(found[1:], [np.corrcoef(row, [3.0, 1, 4, 1, 5])[0, 1] for row in x[1:]])
    assert np.isnan(evaluate.pearson(np.ones(1), np.ones(1)))


def test_ranks_share_ties_and_spearman_agrees_with_a_reference_value():
    values = np.array([3.0, 1, 3, 2, 3, 1])
    by_hand = [sum(v < w for v in values) + (sum(v == w for v in values) + 1) / 2 for w in values]
    assert evaluate.ranks(values).tolist() == by_hand
    reference = 0.7631578947368421  # scipy.stats.spearmanr
    assert evaluate.spearman(np.array([1, 2, 2, 3, 5]), np.array([2, 1, 4, 4, 6])) == pytest.approx(reference)


# ------------------------------------------------------------------------------------------------- metrics of point clouds

def squared_mmd_by_loops(x, y):
    points = [*x, *y]
    distances = [math.dist(a, b) for i, a in enumerate(points) for b in points[:i]]
    s = float(np.median([d for d in distances if d > 0]))
    kernel = lambda a, b: math.exp(-math.dist(a, b) ** 2 / (2 * s ** 2))
    within = lambda z: sum(kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) / (len(z) * (len(z) - 1))
    return within(x) + within(y) - 2 * sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))


@pytest.mark.parametrize("n, m", [(2, 2), (7, 4), (5, 12)])
def test_mmd_equals_its_double_loop_at_unequal_counts_and_with_coincident_points(n, m):
    x, y = torch.tensor(rng(n).normal(size=(2, n, 3))), torch.tensor(rng(m).normal(0.5, 1, size=(2, m, 3)))
    x[0, 1], y[1, 0] = x[0, 0], x[1, 0]
    expected = [squared_mmd_by_loops(a.tolist(), b.tolist()) for a, b in zip(x, y)]
    assert np.allclose(evaluate.mmd(x, y), expected, atol=1e-7)


def test_mmd_is_zero_for_coincident_clouds_and_no_number_for_a_single_point():
    assert evaluate.mmd(torch.ones(1, 4, 2), torch.ones(1, 3, 2)).tolist() == [0.0]
    assert torch.isnan(evaluate.mmd(torch.ones(2, 1, 2), torch.ones(2, 3, 2))).all()


def test_point_metrics_of_a_shifted_cloud_have_their_closed_forms():
    real = torch.tensor(rng().normal(size=(30, 5)), dtype=torch.float32)
    shift = torch.tensor([3.0, 0, -4, 0, 0])
    found = evaluate.point_metrics(real, torch.stack([real, real + shift]))
    assert found["w1"][1] == pytest.approx(5, rel=2e-3) and found["w2"][1] == pytest.approx(5, rel=2e-3)
    assert found["w2_half_squared"][1] == pytest.approx(12.5, rel=4e-3)
    assert found["w1_marginal"][1] == pytest.approx(7 / 5, rel=1e-5) and found["w2_marginal"][1] == pytest.approx(7 / 5, rel=1e-5)
    assert abs(found["sw2"][1] - 5 / math.sqrt(5)) < 4 * found["sw2_error"][1]  # mean over directions u of (shift.u)^2 is |shift|^2 / d
    assert all(abs(found[name][0]) < 2e-2 for name in ("w1", "w1_marginal", "w2_marginal", "sw1", "sw2", "energy"))


def test_marginal_distances_and_energy_equal_loops_over_components_at_unequal_counts():
    real = torch.tensor(rng().normal(size=(4, 3)), dtype=torch.float32)
    predicted = torch.tensor(rng(1).normal(1, 2, (1, 6, 3)), dtype=torch.float32)
    found = evaluate.point_metrics(real, predicted)
    ordered = lambda column, times: np.sort(np.repeat(column.numpy(), times))
    repeated = [(ordered(real[:, c], 3), ordered(predicted[0, :, c], 2)) for c in range(3)]  # 12 points a side
    assert found["w1_marginal"][0] == pytest.approx(np.mean([np.abs(a - b).mean() for a, b in repeated]), rel=1e-5)
    assert found["w2_marginal"][0] == pytest.approx(np.mean([np.sqrt(((a - b) ** 2).mean()) for a, b in repeated]), rel=1e-5)
    mean = lambda a, b: np.mean([math.dist(u, v) for u in a.tolist() for v in b.tolist()])
    x, y = predicted[0], real
    assert found["energy"][0] == pytest.approx(mean(x, y) - mean(x, x) / 2 - mean(y, y) / 2, rel=1e-4)


def test_discrimination_equals_its_definition_with_ties_and_without_the_target_gene():
    profiles = np.array([[0.0, 0, 9], [1, 0, 0], [1, 0, 5], [3, 3, 0]])
    means = np.array([[0.0, 0, 0], [1, 0, 0], [3, 3, 0]])
    excluded = np.array([False, False, True])  # without the last gene, profiles 1 and 2 are the same
    assert evaluate.discrimination(means, profiles, 0, excluded).tolist() == [1, 1 - 2 / 3, 0]
    assert evaluate.discrimination(means, profiles, 1, excluded).tolist() == pytest.approx([1 - 1.5 / 3, 1 - 0.5 / 3, 1 - 1.5 / 3])
    assert evaluate.discrimination(means, profiles, 0, ~excluded)[1] == 0  # seen by the target gene alone it would be last
    assert np.isnan(evaluate.discrimination(means, profiles[:1], 0, excluded)).all()


def test_every_column_of_a_target_gene_named_twice_is_left_out_of_discrimination():
    dataset = made({("A", "g0"): (6, [0, 0, 0]), ("A", "p"): (6, [0, 0, 1])}, genes=3, gene_names=["g0", "g0", "g2"])
    dataset.expression[dataset.cells(0, 1), :2] = 0
    far = np.tile(np.array([9, 9, 2], np.float32), (6, 1))
    found = measured(dataset, lambda condition: far, [(0, 1), (0, 2)])
    assert found.full["method", "0"][0, COLUMN["discrimination"]] == 1


# -------------------------------------------------------------------------------------------------------------------- PCA

def test_pca_equals_the_singular_value_decomposition_however_the_cells_arrive():
    cells = (rng().normal(size=(40, 12)) @ rng(1).normal(size=(12, 12)) + 5).astype(np.float32)
    centre, axes = evaluate.fit_pca([cells[:7], cells[7:]], components=4)
    expected = np.linalg.svd(cells - cells.mean(0), full_matrices=False)[2][:4]
    assert np.allclose(centre, cells.mean(0), atol=1e-5)
    assert np.allclose(np.abs(expected @ axes.numpy()), np.eye(4), atol=1e-4)


def test_pca_gives_every_axis_the_sign_that_makes_its_largest_entry_positive():
    axes = evaluate.fit_pca([rng().normal(size=(90, 41))])[1]
    assert axes.shape[1] == 40 and (axes.gather(0, axes.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("cells, genes, components", [(5, 30, 4), (30, 5, 4), (200, 80, 50), (2, 9, 1), (1, 9, 0)])
def test_pca_keeps_at_most_50_components_and_fewer_than_cells_and_genes(cells, genes, components):
    assert evaluate.fit_pca([rng().normal(size=(cells, genes))])[1].shape == (genes, components)


def test_pca_leaves_out_directions_without_variance():
    cells = rng().normal(size=(50, 6))
    cells = np.concatenate([cells, cells[:, :1], np.ones((50, 3))], axis=1)  # a doubled gene and three constant ones
    axes = evaluate.fit_pca([cells])[1]
    assert axes.shape == (10, 6) and np.abs(axes[7:].numpy()).max() < 1e-6


def test_the_signs_of_the_components_do_not_matter_to_any_metric():
    dataset = made({("A", "p"): (14, [1, 0, 0, 0, 0, 0]), ("A", "q"): (12, [0, 1, 0, 0, 0, 0])})
    controls = evaluate.control_moments(dataset, [0])[0]
    line = evaluate.describe_line(dataset, [(0, 1), (0, 2)], controls, lambda c: (dataset.cells(*c), None), 0)
    flipped = dataclasses.replace(line, axes=line.axes * torch.tensor([-1.0, 1, -1, 1, -1])[:line.axes.shape[1]])
    real, predicted = dataset.expression[dataset.cells(0, 1)], dataset.expression[dataset.cells(0, 0)]
    rows = [evaluate.condition_rows(real, [which.population(predicted)], which, which.profiles, 0, np.zeros(6, bool))[0]
            for which in (line, flipped)]
    exact = [i for name, i in COLUMN.items() if not name.startswith(("sw", "w1", "w2")) or "marginal" in name]
    assert np.allclose(rows[0][exact], rows[1][exact], rtol=1e-5, equal_nan=True)
    for p in (1, 2):
        sliced, error = COLUMN[f"sw{p}"], COLUMN[f"sw{p}_error"]
        # the random directions meet a mirrored cloud; `fit_pca` fixes the signs, so this never shows
        assert abs(rows[0][sliced] - rows[1][sliced]) < 4 * math.hypot(rows[0][error], rows[1][error])
        assert rows[0][COLUMN[f"w{p}"]] == pytest.approx(rows[1][COLUMN[f"w{p}"]], rel=2e-3)


# ---------------------------------------------------------------------------------------------------------------- anchors

def test_halves_share_no_cell_leave_none_out_and_depend_on_name_and_seed_alone():
    for count in (1, 2, 3, 9, 40):
        a, b = evaluate.halves("A:p", count, 3)
        assert sorted([*a, *b]) == list(range(count)) and len(a) - len(b) == count % 2
    assert (evaluate.halves("A:p", 40, 3)[1] == evaluate.halves("A:p", 40, 3)[1]).all()
    assert (evaluate.halves("A:p", 40, 3)[1] != evaluate.halves("A:q", 40, 3)[1]).any()


def test_a_prediction_of_unchanged_controls_stands_exactly_at_the_floor():
    dataset = made({("A", p): (24, rng(i).normal(0, 1, 6)) for i, p in enumerate("pqr")})
    controls = lambda condition: dataset.expression[data.evaluation_cells(dataset, condition, 0)[1]]
    summary = evaluate.summarise(measured(dataset, controls))
    for row in summary:
        if row["method"] == "method":
            assert row["mean_equal"] == pytest.approx(row["floor"], rel=1e-6)
            assert math.isnan(row["position"]) or abs(row["position"]) < 1e-5


def test_the_other_half_of_the_real_cells_stands_exactly_at_the_ceiling():
    dataset = made({("A", p): (24, rng(i).normal(0, 1, 6)) for i, p in enumerate("pqr")})
    summary = evaluate.summarise(measured(dataset, lambda condition: dataset.expression[dataset.cells(*condition)]))
    rows = [row for row in summary if row["method"] == "method"]
    assert [row["position"] for row in rows] == pytest.approx([1] * len(rows))


def test_discrimination_at_equal_counts_compares_with_the_same_half_of_every_perturbation():
    dataset = made({("A", f"p{i}"): (6, rng(i).normal(0, 0.2, 6)) for i in range(12)}, noise=0.8)
    cells = [dataset.expression[dataset.cells(0, p)] for p in range(1, 13)]
    cut = [evaluate.halves(f"A:p{i}", 6, 0) for i in sorted(range(12), key=str)]
    profiles, means = (np.stack([cell[half[side]].mean(0) for cell, half in zip(cells, cut)]) for side in (0, 1))
    expected = [evaluate.discrimination(means[[i]], profiles, i, np.zeros(6, bool))[0] for i in range(12)]
    found = measured(dataset, lambda condition: dataset.expression[:6]).equal[evaluate.CEILING, ""][:, COLUMN["discrimination"]]
    assert found == pytest.approx(expected) and 0 < np.mean(found) < 1


def test_joint_wasserstein_is_marked_where_many_dimensions_and_few_cells_reward_the_collapse():
    noisy = made({("A", p): (44, np.where(rng(i).random(120) < 0.1, 0.3, 0)) for i, p in enumerate("pq")}, 120, controls=60, noise=0.5)
    summary = evaluate.summarise(measured(noisy, lambda condition: noisy.expression[noisy.cells(0, 0)[:44]]))
    narrow = {row["metric"] for row in summary if row["narrow"]}
    assert {"w1", "w2"} <= narrow and not {"sw1", "sw2", "energy", "mse", "pearson_delta"} & narrow
    table = evaluate.table_blocks(summary)[0]
    assert table.headings[0].strip() == "W1!" and table.headings[2].strip() == "SW1"
    assert any("too narrow" in note for note in evaluate.footnotes(summary, "ptrag"))


def test_no_metric_is_marked_where_cells_are_many_and_dimensions_few():
    clear = made({("A", p): (80, np.eye(3)[i] * 3) for i, p in enumerate("pqr")}, genes=3, controls=90)
    summary = evaluate.summarise(measured(clear, lambda condition: clear.expression[clear.cells(0, 0)[:80]]))
    assert not any(row["narrow"] for row in summary) and not any("narrow" in note for note in evaluate.footnotes(summary, "ptrag"))


def test_standing_knows_metrics_of_which_more_is_better():
    assert evaluate.standing(0.1, 0.9, 0.9, +1) == (True, False) and evaluate.standing(0.1, 0.9, 0.95, +1) == (True, True)
    assert evaluate.standing(9.0, 3.0, 2.0, -1) == (True, True) and evaluate.standing(3.0, 9.0, 10.0, -1) == (False, False)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_two_and_three_cells_are_measured_as_far_as_they_can_be(count):
    dataset = made({("A", "p"): (count, np.ones(6)), ("A", "q"): (9, -np.ones(6))})
    found = measured(dataset, lambda condition: dataset.expression[dataset.cells(0, 0)[:count]], [(0, 1), (0, 2)])
    full, equal = found.full["method", "0"][0], found.equal["method", "0"][0]
    assert np.isfinite(full[[COLUMN[name] for name in ("w1", "w2", "sw1", "energy", "mae", "discrimination")]]).all()
    assert np.isnan(full[COLUMN["mmd"]]) == (count == 1)
    assert np.isnan(equal).all() == (count == 1)  # one cell has no halves
    assert evaluate.summarise(found)[0]["conditions"] == 0  # the ceiling is not measured over all cells


def test_predictions_of_another_number_of_cells_are_compared_at_equal_counts():
    dataset = made({("A", "p"): (20, np.ones(6)), ("A", "q"): (20, -np.ones(6))})
    found = measured(dataset, lambda condition: dataset.expression[dataset.cells(0, 0)[:7 if condition[1] == 1 else 30]])
    assert np.isfinite(found.equal["method", "0"]).all() and np.isfinite(found.full["method", "0"]).all()
    assert found.counts.tolist() == [[20, 7], [20, 30]]


def test_capped_conditions_are_said():
    dataset = made({("A", "p"): (30, np.ones(6)), ("A", "q"): (8, -np.ones(6))})
    found = measured(dataset, lambda condition: dataset.expression[:10], max_cells=10)
    assert found.counts[:, 0].tolist() == [10, 8] and "1 of 2 conditions have more than 10 cells" in found.notes[0]


# -------------------------------------------------------------------------------------------------------------- baselines

@pytest.fixture
def trained():
    """Two lines, genes a to e; in line A a, b, c are trained, d is tested; in line B a to d are trained, e is tested."""
    shifts = {name: rng(i).normal(0, 0.5, 6) for i, name in enumerate("abcde")}
    embeddings = np.array([[1, 0, 0], [0, 1, 0], [0.9, 0.1, 0], [0.8, 0.2, 0.1], [0, 0, 1]])
    dataset = made({(line, name): (12, shifts[name]) for line in "AB" for name in shifts}, embeddings=embeddings)
    split = data.Split(train=[(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3), (1, 4)], validation=[(0, 5)], test=[(0, 4), (1, 5)])
    controls = evaluate.control_moments(dataset, [0, 1])
    return dataset, split, controls


def responses_of(dataset, conditions, controls):
    return evaluate.mean_responses(dataset, conditions, controls, 0, 1000)


def test_baselines_are_the_means_their_names_say(trained):
    dataset, split, controls = trained
    training = responses_of(dataset, split.train, controls)
    found, notes = evaluate.baseline_responses(dataset, split.test, training, responses_of(dataset, split.validation, controls), top_k=2)
    own = {p: dataset.expression[dataset.cells(0, p)].mean(0) - dataset.expression[dataset.cells(0, 0)].mean(0) for p in (1, 2, 3)}
    other = dataset.expression[dataset.cells(1, 4)].mean(0) - dataset.expression[dataset.cells(1, 0)].mean(0)
    assert np.allclose(found["line's mean response"][0, 4], sum(own.values()) / 3, atol=1e-5)
    assert np.allclose(found["gene in the other lines"][0, 4], other, atol=1e-5)
    assert np.allclose(found["2 nearest genes"][0, 4], (own[1] + own[3]) / 2, atol=1e-5)
    assert np.allclose(found["gene in the other lines"][1, 5], found["line's mean response"][1, 5])  # e is trained nowhere
    assert any("1 of 2 conditions fall back" in note for note in notes)


def test_baselines_do_not_look_at_the_cells_of_test_conditions(trained):
    dataset, split, controls = trained
    before = evaluate.baseline_responses(dataset, split.test, responses_of(dataset, split.train, controls), {}, 2)[0]
    for condition in split.test:
        dataset.expression[dataset.cells(*condition)] = 7
    after = evaluate.baseline_responses(dataset, split.test, responses_of(dataset, split.train, controls), {}, 2)[0]
    assert all((before[name][condition] == after[name][condition]).all() for name in before for condition in split.test)


def test_a_line_without_training_conditions_borrows_the_others_and_a_gene_trained_nowhere_loses_its_row(trained):
    dataset, _, controls = trained
    training = responses_of(dataset, [(1, 1), (1, 2)], controls)
    found, notes = evaluate.baseline_responses(dataset, [(0, 4)], training, {}, top_k=5)
    assert np.allclose(found["line's mean response"][0, 4], (training[1, 1] + training[1, 2]) / 2)
    assert "gene in the other lines" not in found and any("no row" in note for note in notes)
    assert any("no training conditions in A" in note for note in notes) and any("fewer than top_k 5" in note for note in notes)


def test_ridge_goes_from_interpolation_to_the_mean_and_its_penalty_is_the_best_on_validation():
    generator = rng(2)
    x, weights = generator.normal(size=(12, 20)), generator.normal(size=(20, 5))
    y = x @ weights
    assert np.allclose(evaluate.ridge(x, y, 1e-12)(x), y, atol=1e-4)
    assert np.allclose(evaluate.ridge(x, y, 1e12)(x), y.mean(0), atol=1e-4)
    centred, target = x - x.mean(0), y - y.mean(0)
    primal = np.linalg.solve(centred.T @ centred + np.trace(centred @ centred.T) / 12 * np.eye(20), centred.T @ target)
    assert np.allclose(evaluate.ridge(x, y, 1.0)(x), centred @ primal + y.mean(0), atol=1e-5)
    training, noise = {(0, p): y[p] for p in range(9)}, generator.normal(0, 50, (12, 5))
    assert evaluate.choose_penalty(x, training, {(0, p): y[p] for p in range(9)}) == 1e-3
    assert evaluate.choose_penalty(x, {(0, p): noise[p] for p in range(9)}, {(0, p): noise[:9].mean(0) for p in (9, 10)}) == 1e3


def test_a_baseline_is_a_population_of_shifted_control_cells_without_negative_values():
    dataset = made({("A", "p"): (16, -1.5 * np.ones(6)), ("A", "q"): (16, np.ones(6))}, noise=0.8)
    found = measured(dataset, lambda c: np.maximum(dataset.expression[data.evaluation_cells(dataset, c, 0)[1]] - 1.5, 0),
                     baselines={"shift": {(0, 1): np.full(6, -1.5, np.float32), (0, 2): np.full(6, -1.5, np.float32)}})
    assert np.allclose(found.full["shift", ""], found.full["method", "0"], rtol=1e-6)


# ------------------------------------------------------------------------------------------------ significance and summary

def test_mann_whitney_agrees_with_reference_values_with_and_without_ties():
    a, b = np.array([1.1, 2.2, 2.2, 3.5, 4.0, 7.1, 2.2]), np.array([2.2, 5.0, 6.1, 6.1, 8.3])
    reference = 0.11563791915596121  # scipy.stats.mannwhitneyu, asymptotic, with continuity correction
    assert evaluate.mann_whitney(a, b) == pytest.approx(reference, abs=1e-12)
    assert evaluate.mann_whitney(b, a) == pytest.approx(reference, abs=1e-12)
    assert evaluate.mann_whitney(np.arange(4), np.arange(4) + 4) == pytest.approx(0.03038282197657749, abs=1e-12)
    assert evaluate.mann_whitney(np.ones(5), np.ones(6)) == 1 and math.isnan(evaluate.mann_whitney(a, a[:0]))


def test_benjamini_hochberg_agrees_with_reference_values_and_passes_over_missing_ones():
    found = evaluate.benjamini_hochberg([0.01, 0.04, np.nan, 0.03, 0.5, 0.005])
    assert np.allclose(found, [0.025, 0.05, np.nan, 0.05, 0.5, 0.025], equal_nan=True)  # scipy.stats.false_discovery_control
    assert np.allclose(evaluate.benjamini_hochberg([0.01, 0.011, 0.02, 0.5]), [0.022, 0.022, 0.02 * 4 / 3, 0.5])  # never falling with p


def summarised(table, reference="ptrag"):
    """Summary of made-up values, {(label, seed): value per condition}, the same in every metric; the anchors are 10, 0 and 5."""
    count = len(next(iter(table.values())))
    results = evaluate.Results(None, list(range(count)), np.ones((count, 2), int), reference)
    fill = lambda values: np.repeat(np.asarray(values, float)[:, None], len(evaluate.COLUMNS), axis=1)
    anchors = {(name, ""): fill([value] * count) for name, value in ((evaluate.CEILING, 0), (evaluate.COLLAPSE, 5), (evaluate.FLOOR, 10))}
    results.equal = anchors | {key: fill(values) for key, values in table.items()}
    results.full = {key: values for key, values in results.equal.items() if key[0] not in (evaluate.CEILING, evaluate.COLLAPSE)}
    return {(row["method"], row["metric"]): row for row in evaluate.summarise(results)}


def test_summary_averages_seeds_within_conditions_and_gives_their_spread():
    row = summarised({("ptrag", "0"): [1, 2, 3, np.nan], ("ptrag", "1"): [3, 4, 5, np.nan]})["ptrag", "w1"]
    assert row["mean"] == 3 and row["conditions"] == 3 and row["seeds"] == 2
    assert row["spread"] == pytest.approx(math.sqrt(2))           # of the seeds' means 2 and 4
    assert row["standard_error"] == pytest.approx(1 / math.sqrt(3))  # of 2, 3, 4 over conditions
    assert row["position"] == pytest.approx(0.7)


def test_summary_counts_in_how_many_conditions_the_reference_is_better():
    values = {("state", "0"): np.arange(30) + 5.0, ("ptrag", "0"): np.arange(30) / 10}
    rows = summarised(values)
    assert rows["state", "w1"]["reference_better"] == 30 and rows["state", "w1"]["compared"] == 30
    assert rows["state", "pearson_delta"]["reference_better"] == 0  # there more is better
    assert rows["state", "w1"]["p_adjusted"] < 0.001 and math.isnan(rows["ptrag", "w1"]["p"])
    assert math.isnan(rows["state", "pearson_delta"]["position"])   # floor 10 above ceiling 0: it separates nothing


# -------------------------------------------------------------------------------------------------------------- retrieval

def candidates(line, perturbation, selected, probability=None):
    return [evaluate.Candidate("ptrag", "0", line, perturbation, name, share if probability is None else probability[name], share)
            for name, share in selected.items()]


def test_overlap_between_lines_falls_below_shuffled_lines_only_where_selection_depends_on_the_line():
    cells = {("A", "p"): 40, ("B", "p"): 40}
    same = evaluate.grouped(candidates("A", "p", {"u": 1.0, "v": 0.0}) + candidates("B", "p", {"u": 1.0, "v": 0.0}))
    assert evaluate.line_overlap(same, cells, rng()) == (1.0, 1.0, 1)
    opposite = evaluate.grouped(candidates("A", "p", {"u": 0.9, "v": 0.3, "w": 1}) + candidates("B", "p", {"u": 0.3, "v": 0.9, "w": 1}))
    observed, shuffled, pairs = evaluate.line_overlap(opposite, cells, rng())
    assert observed == pytest.approx(1 / 3) and shuffled > observed and pairs == 1


def test_settled_selection_is_said_in_words():
    word = lambda *values: evaluate.settled(np.array(values))
    assert "settled at using nearly all" in word(0.88, 0.9) and "noise floor" in word(0.12, 0.13) and "settled at none" in word(0.0, 0.01)
    assert "indifferent" in word(0.5, 0.5) and "chooses" in word(0.9, 0.2, 0.4)


def test_response_similarity_compares_candidates_with_the_rest_of_the_pool():
    dataset = made({("A", name): (4, np.zeros(6)) for name in "abcdeq"})
    unit = np.eye(6)
    responses = {(0, 6): unit[0], (0, 5): unit[0], (0, 1): unit[0] * 2, (0, 2): unit[0] + unit[1], (0, 3): unit[1], (0, 4): -unit[0]}
    groups = evaluate.grouped(candidates("A", "q", {"a": 0.9, "b": 0.2, "c": 0.1, "missing": 1.0}))
    found = evaluate.response_similarity(dataset, groups, responses, pool={"a", "b", "c", "d"})
    assert {name: float(value[0]) for name, value in found.items()} == pytest.approx(
        {"candidates": (1 + math.sqrt(0.5)) / 3, "random": -1, "selected": 1, "unselected": math.sqrt(0.5) / 2, "rank_correlation": 1})


# ------------------------------------------------------------------------------------------------------- whole evaluations

def write(path, dataset, rows, cells=None, order=None, extra=()):
    """An AnnData file of some cells of a dataset, perhaps with other values, another order of genes, more cells."""
    order = np.arange(len(dataset.genes)) if order is None else order
    cells = dataset.expression[rows] if cells is None else cells
    names = [(dataset.cell_lines[dataset.cell_line[r]], dataset.perturbations[dataset.perturbation[r]]) for r in rows] + list(extra)
    cells = np.concatenate([cells, cells[:len(extra)]])
    data.write_anndata(path, [dataset.genes[i] for i in order], [(cells[:, order], {
        "cell_line": [line for line, _ in names], "gene": [p if p != "control" else "non-targeting" for _, p in names]}, {})])


@pytest.fixture
def files(tmp_path):
    """Real cells of two lines, and as predictions half as many cells: the real ones with noise, some values below zero, no controls."""
    dataset = made({(line, p): (16, rng(i).normal(0, 1, 8)) for line in "AB" for i, p in enumerate(["g0", "p", "q"])}, genes=8)
    write(tmp_path / "real.h5ad", dataset, np.arange(len(dataset.expression)))
    rows = np.flatnonzero(dataset.perturbation > 0)[::2]
    predicted = dataset.expression[rows] + rng().normal(0, 0.5, (len(rows), 8)).astype(np.float32)
    write(tmp_path / "pred.h5ad", dataset, rows, predicted, extra=[("A", "unknown")] * 3)
    write(tmp_path / "turned.h5ad", dataset, rows, predicted, order=np.array([3, 1, 0, 7, 2, 6, 5, 4]))
    return tmp_path, dataset


def run(*arguments):
    return evaluate.main([str(argument) for argument in arguments])


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_anyones_predictions_are_evaluated_from_two_files(files, capsys):
    folder, dataset = files
    assert run("--real", folder / "real.h5ad", "--pred", folder / "pred.h5ad", "-o", folder / "out") == 0
    rows, printed = read(folder / "out" / "metrics.csv"), capsys.readouterr().out
    assert ",".join(rows[0]) == ("cell_line,perturbation,n_real,n_pred,w1,w2,w2_half_squared,w1_marginal,w2_marginal,sw1,sw2,energy,mmd,"
                                 "pearson_deg,spearman_deg,n_deg,pearson_delta,mae,mse,mse_pca,discrimination")
    assert [(row["cell_line"], row["perturbation"]) for row in rows] == [(line, p) for line in "AB" for p in ("g0", "p", "q")]
    assert {(row["n_real"], row["n_pred"]) for row in rows} == {("16", "8")}
    real = dataset.expression[dataset.cells(0, 2)].mean(0)
    written = data.load(folder / "real.h5ad", need_embeddings=False)
    assert float(rows[1]["w2_half_squared"]) == pytest.approx(float(rows[1]["w2"]) ** 2 / 2, rel=1e-5)
    assert np.allclose(written.expression[written.cells(0, 2)].mean(0), real)
    summary = {(row["method"], row["metric"]): row for row in read(folder / "out" / "summary.csv")}
    values = [float(row["energy"]) for row in rows]
    assert float(summary["prediction", "energy"]["mean"]) == pytest.approx(np.mean(values), rel=1e-5)
    assert float(summary["prediction", "energy"]["standard_error"]) == pytest.approx(np.std(values, ddof=1) / math.sqrt(6), rel=1e-5)
    assert "1 conditions have no real cells and are left out: A / unknown" in printed and "6 conditions" in printed
    assert max(len(line) for line in printed.splitlines() if str(folder) not in line) <= 140


def make_sparse(source, path):
    """A copy of an AnnData file with X in compressed rows."""
    shutil.copy(source, path)
    with h5py.File(path, "r+") as file:
        dense = file["X"][()]
        del file["X"]
        group, (rows, columns) = file.create_group("X"), np.nonzero(dense)
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": dense.shape})
        group["data"], group["indices"], group["indptr"] = dense[rows, columns], columns, np.searchsorted(rows, np.arange(len(dense) + 1))


def test_neither_the_order_of_the_genes_nor_the_layout_of_a_file_matters_and_runs_repeat_exactly(files):
    folder, _ = files
    make_sparse(folder / "pred.h5ad", folder / "sparse.h5ad")
    for name, out in (("pred", "a"), ("pred", "b"), ("turned", "c"), ("sparse", "d")):
        assert run("--real", folder / "real.h5ad", "--pred", folder / f"{name}.h5ad", "-o", folder / out) == 0
    tables = [(folder / out / "metrics.csv").read_text() for out in "abcd"]
    assert tables[0] == tables[1] == tables[2] == tables[3]


def test_counts_in_both_files_are_normalised_alike_and_predicted_controls_passed_over(files, capsys):
    folder, dataset = files
    counts = rng(5).poisson(30 * np.exp(0.3 * dataset.expression)).astype(np.float32)
    deeper = np.where(np.arange(len(counts))[:, None] % 2, 1, 3) * counts  # sequenced deeper, the same cells
    write(folder / "counts.h5ad", dataset, np.arange(len(counts)), counts)
    write(folder / "deeper.h5ad", dataset, np.arange(len(counts)), deeper.astype(np.float32))
    assert run("--real", folder / "counts.h5ad", "--pred", folder / "deeper.h5ad", "-o", folder / "out") == 0
    assert all(float(row["mae"]) < 1e-5 and float(row["w1"]) < 1e-3 for row in read(folder / "out" / "metrics.csv"))
    assert "left out" not in capsys.readouterr().out
    assert run("--real", folder / "counts.h5ad", "--pred", folder / "deeper.h5ad", "-o", folder / "few", "--max-cells", 5) == 0
    assert {(row["n_real"], row["n_pred"]) for row in read(folder / "few" / "metrics.csv")} == {("5", "5")}
    assert "6 of 6 conditions have more than 5 cells" in capsys.readouterr().out


def test_wrong_files_end_with_one_line_and_status_2(files, capsys):
    folder, dataset = files
    fewer = dataclasses.replace(dataset, genes=["other", *dataset.genes[1:]])
    doubled = dataclasses.replace(dataset, genes=["g1", *dataset.genes[1:]])
    write(folder / "fewer.h5ad", fewer, np.arange(100))
    write(folder / "doubled.h5ad", doubled, np.arange(100))
    write(folder / "controls.h5ad", dataset, dataset.cells(0, 0))
    (folder / "text.h5ad").write_text("not a file of cells")
    for name, said in (("fewer", "g0"), ("doubled", "g1"), ("controls", "no condition"), ("text", "text.h5ad"), ("absent", "absent.h5ad")):
        assert run("--real", folder / "real.h5ad", "--pred", folder / f"{name}.h5ad", "-o", folder / "out") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1, error
    assert not (folder / "out").exists()
    assert run(folder / "no-such-run") == 2 and "no-such-run" in capsys.readouterr().err
    for arguments in ([], ["--real", "x"], ["runs/a", "--pred", "y"]):
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        assert stop.value.code == 2


def write_run(folder, dataset, split, strength, seeds=("0",), **options):
    """A run folder as training leaves it: `ptrag` predicts a part of the true response, `state` half of that part."""
    folder.mkdir(parents=True)
    config = ptrag.Config(**{"split": "perturbation:0", "cells": 8, "top_k": 4, **options})
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))

    def blocks():
        for method, part in (("state", strength / 2), ("ptrag", strength)):
            for seed in seeds:
                for line, p in split.test:
                    real, control = data.evaluation_cells(dataset, (line, p), 0)
                    response = dataset.expression[real].mean(0) - dataset.expression[dataset.cells(line, 0)].mean(0)
                    cells = np.maximum(dataset.expression[control] + (part + 0.05 * int(seed)) * response, 0)
                    names = {"method": method, "seed": seed,
                             "cell_line": dataset.cell_lines[line], "perturbation": dataset.perturbations[p]}
                    nothing = np.full(len(real), 0.25 if method == "ptrag" else np.nan)
                    yield cells, {column: [name] * len(real) for column, name in names.items()} | {
                        "control_cell": control, "nothing_selected": nothing}, {}

    data.write_anndata(folder / "predictions.h5ad", dataset.genes, blocks())
    names = [dataset.perturbations[p] for p in sorted({p for _, p in split.train})][:4]
    with open(folder / "retrieval.csv", "w") as file:
        file.write("method,seed,cell_line,perturbation,rank,candidate,similarity,probability,selected\n")
        for seed in seeds:
            for line, p in split.test:
                for rank, name in enumerate(names):
                    condition = f"{dataset.cell_lines[line]},{dataset.perturbations[p]}"
                    file.write(f"ptrag,{seed},{condition},{rank + 1},{name},0.5,{0.8 - 0.2 * rank},{rank < 2:d}\n")
    (folder / "log.csv").write_text("method,seed,step,loss,energy,sparsity,validation,cells_per_second\n"
                                    "ptrag,0,1,2,2,.1,,9\nptrag,0,2,1,1,.1,1.5,9\n")


@pytest.fixture(scope="module")
def simulated():
    dataset = data.simulate(cell_lines=2, perturbations=12, genes=40, cells=12, controls=40, embedding_dim=8, programs=4)
    return dataset, data.split(dataset, "perturbation:0", 0)


class Page(html.parser.HTMLParser):
    """Checks that every element is closed in order, and remembers what kinds there are."""

    def __init__(self):
        super().__init__()
        self.open, self.kinds, self.attributes = [], set(), set()

    def handle_starttag(self, tag, attributes):
        self.kinds.add(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag not in ("meta", "path", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.kinds.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_run_gets_its_table_with_baselines_seeds_significance_and_a_self_contained_report(simulated, tmp_path, capsys):
    dataset, split = simulated
    write_run(tmp_path / "run", dataset, split, 0.8, seeds=("0", "1"))
    summary = evaluate.evaluate_runs([tmp_path / "run"], dataset, split, full=True)
    printed = capsys.readouterr().out
    labels = list(dict.fromkeys(row["method"] for row in summary))
    assert labels == [evaluate.CEILING, evaluate.COLLAPSE, evaluate.FLOOR, "line's mean response", "4 nearest genes", "ridge on embeddings",
                      "state", "ptrag"]
    cell = {(row["method"], row["metric"]): row for row in summary}
    assert cell[evaluate.FLOOR, "energy"]["mean"] > cell["state", "energy"]["mean"] > cell["ptrag", "energy"]["mean"]
    assert cell["ptrag", "energy"]["seeds"] == 2 and cell["ptrag", "energy"]["spread"] > 0 and "±" in printed
    said = " ".join(printed.split())
    assert "simulated data | split perturbation:0" in said and "seeds 0, 1" in said and "no row for the gene's response" in said
    assert "25.0 % of cells use none at all" in said and "Jaccard overlap of the selected sets between cell lines 1.00" in said
    assert max(map(len, printed.splitlines()[:-1])) <= 140  # all but the line that names the files
    rows = read(tmp_path / "run" / "metrics.csv")
    assert list(rows[0])[:4] == ["method", "seed", "cell_line", "perturbation"] and len(rows) == len(split.test) * (4 + 2 * 2)
    text = (tmp_path / "run" / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert not page.open and len(text) < 300_000 and not {"script", "img", "link", "iframe"} & page.kinds
    assert not {"href", "src", "onload"} & page.attributes and "url(" not in text and "prefers-color-scheme: dark" in text


def test_runs_stand_side_by_side_only_if_made_from_the_same_cells(simulated, tmp_path):
    dataset, split = simulated
    write_run(tmp_path / "one", dataset, split, 0.8)
    write_run(tmp_path / "two", dataset, split, 0.4, cells=16)              # the size of a set changes nothing that is compared
    write_run(tmp_path / "three", dataset, split, 0.4, seed=1)
    summary = evaluate.evaluate_runs([tmp_path / "one", tmp_path / "two"], dataset, split, say=lambda line: None)
    assert [label for label in dict.fromkeys(row["method"] for row in summary)][-4:] == ["one/state", "one/ptrag", "two/state", "two/ptrag"]
    assert (tmp_path / "one+two" / "summary.csv").exists() and not (tmp_path / "one" / "summary.csv").exists()
    with pytest.raises(data.DataError, match="three: has seed 1"):
        evaluate.evaluate_runs([tmp_path / "one", tmp_path / "three"], dataset, split)


def test_an_unfinished_run_is_an_error_that_says_so(simulated, tmp_path):
    dataset, split = simulated
    write_run(tmp_path / "run", dataset, dataclasses.replace(split, test=split.test[1:]), 0.8)
    with pytest.raises(data.DataError, match="no predicted cells of"):
        evaluate.evaluate_runs([tmp_path / "run"], dataset, split)
    (tmp_path / "run" / "predictions.h5ad").unlink()
    with pytest.raises(data.DataError, match="not finished"):
        evaluate.evaluate_runs([tmp_path / "run"], dataset, split)
