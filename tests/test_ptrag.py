"""Facts about the method: retrieval, selection, generator, distances, training."""
import itertools
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data
import ptrag

SMALL = dict(hidden=16, layers=2, heads=2, head_dim=8, feed_forward=32, top_k=4, cells=8, sets=4, steps=5)


def small_model(genes=20, perturbations=12, embedding_dim=10, seed=0, **options):
    """An untrained model with random embeddings; perturbation 0, the control, has none."""
    torch.manual_seed(seed)
    embeddings = torch.randn(perturbations, embedding_dim)
    embeddings[0] = 0
    config = ptrag.Config(**{**SMALL, "method": "ptrag", **options})
    return ptrag.PTRAG(config, genes, embeddings, torch.arange(1, perturbations), gem_groups=3).eval()


def random_sets(B=3, S=8, G=20, P=12, seed=1):
    torch.manual_seed(seed)
    return torch.rand(B, S, G) * 3, torch.randint(1, P, (B,)), torch.randint(0, 3, (B, S))


# ------------------------------------------------------------------------------------------------------------ stage 1

def test_retrieval_orders_the_pool_by_cosine_similarity():
    embeddings = torch.tensor([[0, 0], [1, 0], [10, 1], [1, 1], [0, 3], [-1, 0]], dtype=torch.float32)
    candidates, similarity = ptrag.retrieve(embeddings, torch.arange(1, 6), 3)
    assert candidates[1].tolist() == [2, 3, 4]
    assert similarity[1].tolist() == pytest.approx([10 / math.sqrt(101), 1 / math.sqrt(2), 0.0], abs=1e-6)


@pytest.mark.parametrize("how", ["nearest", "random", "least"])
def test_a_query_is_never_its_own_candidate_and_genes_without_embedding_are_never_retrieved(how):
    torch.manual_seed(0)
    embeddings = torch.randn(30, 6)
    embeddings[[0, 7, 8]] = 0
    candidates, _ = ptrag.retrieve(embeddings, torch.arange(30), 20, how)
    for query in set(range(30)) - {0, 7, 8}:
        assert query not in candidates[query]
        assert not {0, 7, 8} & set(candidates[query].tolist())
        assert len(set(candidates[query].tolist())) == 20
    assert (candidates[[0, 7, 8]] == -1).all()                                                     # nothing to look up


def test_ties_go_to_the_lower_index():
    embeddings = torch.randn(1, 32).repeat(9, 1) * torch.arange(1, 10)[:, None]                     # one direction, nine lengths
    candidates, _ = ptrag.retrieve(embeddings, torch.arange(9), 4)
    assert candidates[0].tolist() == [1, 2, 3, 4] and candidates[8].tolist() == [0, 1, 2, 3]


def test_only_the_pool_is_retrieved_and_a_pool_that_is_too_small_says_so():
    embeddings = torch.randn(10, 5)
    candidates, _ = ptrag.retrieve(embeddings, torch.tensor([2, 4, 6]), 2)
    assert set(candidates.flatten().tolist()) <= {2, 4, 6}
    with pytest.raises(ptrag.InputError, match="2 usable genes.*--top-k 3"):
        ptrag.retrieve(embeddings, torch.tensor([2, 4, 6]), 3)                                      # gene 2 itself cannot be its own


def test_random_candidates_depend_on_the_seed_alone_and_least_similar_is_the_reverse_order():
    torch.manual_seed(0)
    embeddings, pool = torch.randn(15, 6), torch.arange(15)
    assert torch.equal(ptrag.retrieve(embeddings, pool, 5, "random", 3)[0], ptrag.retrieve(embeddings, pool, 5, "random", 3)[0])
    assert not torch.equal(ptrag.retrieve(embeddings, pool, 5, "random", 3)[0], ptrag.retrieve(embeddings, pool, 5, "random", 4)[0])
    assert torch.equal(ptrag.retrieve(embeddings, pool, 14, "least")[0], ptrag.retrieve(embeddings, pool, 14)[0].flip(1))


# ------------------------------------------------------------------------------------------------------------ stage 2

def plain_selection(selector, cell, query, candidate, retrieved, noise):
    """Section 3.2 as it is written: every z_sk is built, normalised and mapped."""
    B, S, h = cell.shape
    K = candidate.shape[1]
    z = torch.cat([cell[:, :, None].expand(B, S, K, h), query[:, None, None].expand(B, S, K, h), candidate[:, None].expand(B, S, K, h)], -1)
    z = selector.norm(z)                                                                           # (B, S, K, 3h)
    logits = selector.score_out(F.gelu(selector.score_in(z)))                                      # (B, S, K, 2)
    logits = logits / torch.stack([one.std() for one in logits]).clamp(min=1e-6)[:, None, None, None]
    soft = torch.softmax((logits + noise) / selector.temperature, -1)
    hard = F.one_hot(soft.argmax(-1), 2).float()
    weights = (hard + soft - soft.detach())[..., 1] * retrieved[:, None, None]
    return (weights[..., None] * selector.value(z)).sum(2), weights, logits


@pytest.mark.parametrize("B, S, K, h", [(1, 1, 1, 4), (2, 5, 3, 8), (3, 16, 7, 32), (1, 64, 32, 128), (9, 64, 16, 64)])
def test_separated_selection_equals_the_plain_form_in_value_and_gradient(B, S, K, h):
    torch.manual_seed(B + S + K)
    selector = ptrag.Selector(h).eval()
    torch.nn.init.normal_(selector.norm.weight, 1.0, 0.3)
    torch.nn.init.normal_(selector.norm.bias, 0.0, 0.3)
    inputs = [torch.randn(B, S, h) + 0.5, torch.randn(B, h) - 0.3, torch.randn(B, K, h)]
    retrieved, noise = torch.rand(B) < 0.8, ptrag.gumbel_noise((B, S, K, 2))
    outcome = []
    for form in ("separated", "plain"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        selector.zero_grad()
        if form == "separated":
            context, (weights, logits, _) = selector(*leaves, retrieved, "sample", noise)
        else:
            context, weights, logits = plain_selection(selector, *leaves, retrieved, noise)
        ((context * torch.linspace(-1, 1, h)).sum() + weights.abs().mean()).backward()
        outcome.append([context, weights, logits, *(x.grad for x in leaves), *(w.grad for w in selector.parameters())])
    if S * K > 1:  # two logits alone have a gradient of rounding only
        for ours, oracle in zip(*outcome):
            assert (ours - oracle).abs().max() <= 2e-5 * oracle.abs().max().clamp(min=1e-3)
    assert torch.allclose(outcome[0][0], outcome[1][0], atol=1e-5)


def test_straight_through_weights_are_zero_or_one_with_the_gradient_of_the_soft_weights():
    torch.manual_seed(0)
    logits, noise = torch.randn(50, 2, requires_grad=True), ptrag.gumbel_noise((50, 2))
    hard = ptrag.straight_through(logits, 0.5, noise)
    assert set(hard.tolist()) == {0.0, 1.0}
    slope = torch.randn(50)
    through, = torch.autograd.grad((hard * slope).sum(), logits)
    soft = torch.softmax((logits + noise) / 0.5, -1)[:, 1]
    expected, = torch.autograd.grad((soft * slope).sum(), logits)
    assert torch.allclose(through, expected, atol=1e-6)
    assert torch.equal(hard.bool(), soft > 0.5)


def test_a_draw_selects_with_probability_sigmoid_of_the_difference_of_the_logits():
    torch.manual_seed(0)
    logits = torch.tensor([0.3, 1.1]).expand(200_000, 2)
    share = ptrag.straight_through(logits, 0.5, ptrag.gumbel_noise(logits.shape)).mean().item()
    p = 1 / (1 + math.exp(-0.8))
    assert share == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 200_000))


def test_expected_selection_is_the_mean_of_the_draws_and_threshold_the_likelier_outcome():
    torch.manual_seed(0)
    selector = ptrag.Selector(8).eval()
    cell, query, candidate = torch.randn(1, 3, 8), torch.randn(1, 8), torch.randn(1, 4, 8)
    draws = [selector(cell, query, candidate, select="sample") for _ in range(3000)]
    expected, chosen = selector(cell, query, candidate, select="expected")
    mean = torch.stack([context for context, _ in draws]).mean(0)
    assert torch.allclose(mean, expected, atol=0.1)
    assert torch.allclose(torch.stack([s.weights for _, s in draws]).mean(0), chosen.probability, atol=4 * 0.5 / math.sqrt(3000))
    _, threshold = selector(cell, query, candidate, select="threshold")
    assert torch.equal(threshold.weights.bool(), chosen.probability > 0.5)


def test_a_selector_draws_in_training_and_weighs_by_probability_otherwise():
    torch.manual_seed(0)
    selector = ptrag.Selector(8)
    inputs = torch.randn(2, 6, 8), torch.randn(2, 8), torch.randn(2, 4, 8)
    assert set(selector(*inputs)[1].weights.unique().tolist()) == {0, 1}
    context, selection = selector.eval()(*inputs)
    assert torch.equal(selection.weights, selection.probability) and torch.equal(context, selector(*inputs, select="expected")[0])
    with pytest.raises(ValueError, match="dropout 1.0"):
        ptrag.Selector(8, dropout=1.0)


def test_bfloat16_inputs_have_the_deviation_of_their_values():
    torch.manual_seed(0)
    parts = [(torch.randn(shape) + 3).bfloat16() for shape in ((2, 5, 32), (2, 32), (2, 4, 32))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scale = ptrag.Selector(32).inverse_deviation(*parts)
    cell, query, candidate = (part.double() for part in parts)
    joined = torch.cat([part.expand(2, 5, 4, 32) for part in (cell[:, :, None], query[:, None, None], candidate[:, None])], -1)
    assert torch.allclose(scale.double(), 1 / joined.std(-1, correction=0), rtol=1e-4)


def test_the_penalty_pushes_out_selected_candidates_only():
    weights = torch.tensor([0.0, 1.0, 1.0, 0.0], requires_grad=True)
    weights.abs().mean().backward()
    assert weights.grad.tolist() == [0, 0.25, 0.25, 0]


def test_the_control_as_a_query_uses_no_candidate_and_has_no_context():
    for method in ("ptrag", "vanilla-rag"):
        model, seen = small_model(method=method), []
        model.generator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        control, _, _ = random_sets()
        model(control, torch.tensor([0, 1, 0]))
        assert (seen[0][[0, 2]] == 0).all() and (seen[0][1] != 0).any()


def test_keep_query_adds_cell_and_query_to_the_context():
    control, perturbation, _ = random_sets()
    inputs = []
    for keep_query in (False, True):
        model = small_model(keep_query=keep_query)
        model.generator.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
        model(control, perturbation)
    query = model.perturbation_encoder(model.embeddings[perturbation])[:, None]
    assert torch.allclose(inputs[1] - inputs[0], model.cell_encoder(control) + query, atol=1e-5)


def test_dropout_keeps_the_share_it_says_and_the_mean():
    torch.manual_seed(0)
    for p in (0.1, 0.5, 0.9):
        kept = torch.stack([ptrag.dropout_mask((50, 49), p, None) for _ in range(400)])
        assert set(kept.unique().tolist()) == {0, 1}
        assert kept.float().mean().item() == pytest.approx(1 - p, abs=1e-3)                       # 26/256, the nearest to 0.1, is too far
    selector = ptrag.Selector(16, dropout=0.5)
    cell, query, candidate = torch.randn(1, 3, 16), torch.randn(1, 16), torch.randn(1, 4, 16)
    parts = torch.randn(1, 3, 16), torch.randn(1, 4, 16), torch.rand(1, 3, 4), torch.randn(16)
    noisy = torch.stack([selector.train().score(*parts) for _ in range(2000)])
    assert (noisy.std(0) > 0).all()
    assert torch.allclose(noisy.mean(0), selector.eval().score(*parts), atol=0.05)


# ----------------------------------------------------------------------------------------------------------- generator

@pytest.mark.parametrize("method", ptrag.METHODS)
def test_permuting_the_cells_of_a_set_permutes_the_output_and_nothing_else(method):
    model = small_model(method=method, batch_covariate=True)
    control, perturbation, gem_group = random_sets()
    order = torch.randperm(8)
    prediction, _ = model(control, perturbation, gem_group)
    permuted, _ = model(control[:, order], perturbation, gem_group[:, order])
    assert torch.allclose(prediction[:, order], permuted, atol=1e-5)


@pytest.mark.parametrize("option", ["causal", "rotary"])
def test_causal_and_rotary_do_depend_on_the_order(option):
    model = small_model(**{option: True})
    control, perturbation, _ = random_sets()
    torch.nn.init.normal_(model.generator.blocks[0].qkv.weight, std=1.0)
    torch.nn.init.normal_(model.generator.blocks[0].attention_out.weight, std=1.0)
    order = torch.arange(7, -1, -1)
    assert not torch.allclose(model(control, perturbation)[0][:, order], model(control[:, order], perturbation)[0], atol=1e-3)


@pytest.mark.parametrize("method", ptrag.METHODS)
def test_the_prediction_of_a_set_is_the_same_alone_and_in_any_batch(method):
    model = small_model(method=method)
    control, perturbation, _ = random_sets(B=5)
    together, _ = model(control, perturbation)
    for i in range(5):
        alone, _ = model(control[i:i + 1], perturbation[i:i + 1])
        assert torch.allclose(together[i], alone[0], atol=1e-5)


@pytest.mark.parametrize("method", ptrag.METHODS)
def test_bfloat16_changes_predictions_and_gradients_by_its_rounding_only(method):
    model, (control, perturbation, _) = small_model(method=method, hidden=64, dropout=0.0).train(), random_sets(B=4, S=16)
    noise, outcome = ptrag.gumbel_noise((4, 16, 4, 2)), []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            prediction, _ = model(control, perturbation, None, noise)
        ptrag.energy_distance(prediction.float(), control.flip(0)).mean().backward()
        outcome.append([prediction.float(), *(w.grad for w in (model.output.weight, model.cell_encoder.weight))])
    for exact, rounded in zip(*outcome):
        assert (exact - rounded).norm() <= 0.03 * exact.norm()
    assert not torch.equal(outcome[0][0], outcome[1][0])


def test_frozen_generator_and_output_layer_do_not_train_and_the_rest_does():
    model = small_model(freeze_generator=True).train()
    control, perturbation, _ = random_sets()
    model(control, perturbation)[0].sum().backward()
    trained = {name.split(".")[0] for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is not None}
    assert trained == {"cell_encoder", "perturbation_encoder", "selector"}
    assert all(weight.grad is None for module in (model.generator, model.output) for weight in module.parameters())


def test_state_knows_perturbations_by_number_only_and_state_genept_by_embedding():
    one_hot, genept = small_model(method="state"), small_model(method="state-genept")
    assert torch.equal(one_hot.embeddings[1:], torch.eye(12)[1:]) and (one_hot.embeddings[0] == 0).all()
    assert genept.embeddings.shape == (12, 10)


# ----------------------------------------------------------------------------------------------------------- distances

def test_energy_distance_is_the_double_sum_over_all_pairs():
    torch.manual_seed(0)
    x, y = torch.randn(2, 5, 7), torch.randn(2, 9, 7) + 1
    distance = lambda a, b: sum(math.dist(i, j) for i in a.tolist() for j in b.tolist()) / (len(a) * len(b))
    expected = [distance(a, b) - distance(a, a) / 2 - distance(b, b) / 2 for a, b in zip(x, y)]
    assert ptrag.energy_distance(x, y).tolist() == pytest.approx(expected, rel=1e-5)


def test_identical_clouds_have_zero_energy_distance_and_finite_gradients():
    torch.manual_seed(0)
    for scale in (1e-3, 1.0, 1e3):
        y = torch.rand(2, 16, 50) * scale
        x = y.clone().requires_grad_()
        energy = ptrag.energy_distance(x, y)
        energy.sum().backward()
        assert energy.abs().max() <= 1e-6 * scale and torch.isfinite(x.grad).all()


def test_distances_to_a_cloud_that_is_not_a_number_are_not_numbers():
    x, y = torch.full((1, 4, 3), math.nan), torch.randn(1, 5, 3)
    assert ptrag.energy_distance(x, y).isnan().all() and ptrag.wasserstein_1d(x[..., 0], y[..., 0]).isnan().all()
    with pytest.raises(RuntimeError):
        ptrag.wasserstein(x, y, max_rounds=2)


def test_gradient_of_the_energy_distance_is_that_of_the_plain_formula():
    torch.manual_seed(0)
    x, y = torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True), torch.randn(1, 8, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: ptrag.energy_distance(a, y), x)


def test_one_dimensional_wasserstein_of_shifted_and_scaled_samples():
    torch.manual_seed(0)
    x = torch.randn(4, 50, dtype=torch.float64)
    for p in (1, 2):
        assert torch.allclose(ptrag.wasserstein_1d(x, x + 3, p), torch.full((4,), 3.0, dtype=torch.float64))
        assert torch.allclose(ptrag.wasserstein_1d(x, 2 * x, p), (x.abs()**p).mean(1) ** (1 / p))
        assert torch.equal(ptrag.wasserstein_1d(x, x[:, torch.randperm(50)], p), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("n, m", [(1, 1), (1, 7), (3, 4), (6, 9), (10, 4), (100, 37)])
def test_one_dimensional_wasserstein_of_unequal_counts_equals_that_of_repeated_points(n, m):
    torch.manual_seed(n * m)
    x, y = torch.randn(n, dtype=torch.float64), torch.randn(m, dtype=torch.float64)
    both = math.lcm(n, m)
    for p in (1, 2):
        repeated = ((x.sort()[0].repeat_interleave(both // n) - y.sort()[0].repeat_interleave(both // m)).abs()**p).mean() ** (1 / p)
        assert ptrag.wasserstein_1d(x, y, p).item() == pytest.approx(repeated.item(), rel=1e-12)


def test_sliced_wasserstein_of_a_translation_is_within_its_stated_error_of_the_closed_form():
    torch.manual_seed(0)
    x, shift, d = torch.randn(1, 40, 10, dtype=torch.float64), torch.linspace(0, 1, 10, dtype=torch.float64), 10
    mean_cosine = math.gamma(d / 2) / (math.sqrt(math.pi) * math.gamma((d + 1) / 2))               # E|<unit vector, random direction>|
    for p, expected in ((1, shift.norm() * mean_cosine), (2, shift.norm() / math.sqrt(d))):
        value, error = ptrag.sliced_wasserstein(x, x + shift, p, directions=2000)
        assert 0 < error < 0.05 * value
        assert abs(value - expected) < 4 * error


def test_sliced_wasserstein_of_two_gaussians_is_within_its_stated_error_of_the_closed_form():
    torch.manual_seed(0)
    x, y = torch.randn(1, 20_000, 5), 2 * torch.randn(1, 20_000, 5)                                 # along each direction W2 = |2 - 1|
    value, error = ptrag.sliced_wasserstein(x, y, 2, directions=64)
    sampling = 2 * 2 / math.sqrt(20_000)
    assert abs(value - 1) < 4 * error + sampling


def best_assignment(cost):
    """Optimal transport of equal counts by trying every assignment."""
    return min(sum(row[j] for row, j in zip(cost, order)) for order in itertools.permutations(range(len(cost)))) / len(cost)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("n, m, d", [(1, 1, 3), (5, 5, 2), (7, 7, 50), (2, 6, 3), (3, 6, 1), (3, 2, 10)])
def test_wasserstein_is_within_two_permille_of_the_best_assignment(n, m, d, p):
    torch.manual_seed(10 * n + m)
    x, y = torch.randn(3, n, d, dtype=torch.float64), torch.randn(3, m, d, dtype=torch.float64) + 0.5
    both = math.lcm(n, m)
    found = ptrag.wasserstein(x, y, p)
    for i in range(3 if both < 7 else 1):
        cost = torch.cdist(x[i].repeat_interleave(both // n, 0), y[i].repeat_interleave(both // m, 0)) ** p
        assert found[i].item() == pytest.approx(best_assignment(cost.tolist()) ** (1 / p), rel=2e-3)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("size", [0.1, 2.0, 20.0])
def test_wasserstein_between_translated_clouds_is_the_length_of_the_translation(size, p):
    torch.manual_seed(0)
    x = torch.randn(1, 100, 50) * torch.linspace(3, 0.3, 50)
    shift = F.normalize(torch.randn(50), dim=0) * size
    assert ptrag.wasserstein(x, x + shift, p).item() == pytest.approx(size, rel=2e-3)


def test_wasserstein_in_one_dimension_agrees_with_the_exact_one_and_is_zero_between_identical_clouds():
    torch.manual_seed(0)
    x, y = torch.randn(1, 30, 1), torch.randn(1, 45, 1) * 1.5 + 0.3
    for p in (1, 2):
        assert ptrag.wasserstein(x, y, p).item() == pytest.approx(ptrag.wasserstein_1d(x[..., 0], y[..., 0], p).item(), rel=2e-3)
    assert ptrag.wasserstein(x, x.clone(), 1).item() < 1e-5


# ------------------------------------------------------------------------------------------------- training, prediction

def run_training(tmp_path, dataset, split, method="ptrag", **options):
    config = ptrag.Config(**{**SMALL, "method": method, "validate_every": 5, **options})
    return config, ptrag.train_all(config, tmp_path, dataset, split)[method, config.seed]


@pytest.fixture(scope="module")
def simulated():
    dataset = data.simulate(seed=3, cell_lines=2, perturbations=16, genes=40, cells=20, controls=60, embedding_dim=12, programs=4)
    return dataset, data.split(dataset, "perturbation:0", 0)


def test_the_same_seed_gives_the_same_weights_and_another_seed_gives_others(tmp_path, simulated):
    weights = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / folder).mkdir()
        weights.append(run_training(tmp_path / folder, *simulated, top_k=3, seed=seed)[1].state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_the_loss_falls_and_ptrag_beats_no_change_on_simulated_data(tmp_path):
    dataset = data.simulate(seed=0, cell_lines=3, perturbations=40, genes=100, cells=40, controls=150)
    split = data.split(dataset, "cell-line:simC", 0)
    config, model = run_training(tmp_path, dataset, split, hidden=64, layers=1, head_dim=16, feed_forward=64, top_k=8, cells=32, sets=16,
                                 steps=400, lr=2e-3, validate_every=50)
    loss = [float(line.split(",")[3]) for line in (tmp_path / "log.csv").read_text().splitlines()[1:]]
    assert np.mean(loss[-20:]) < 0.5 * np.mean(loss[:5])
    predicted, unchanged = [], []
    for (line, p), rows, prediction in ptrag.predict_conditions(model, dataset, split.test, config):
        real = torch.from_numpy(dataset.expression[dataset.cells(line, p)])[None]
        predicted.append(ptrag.energy_distance(torch.from_numpy(prediction.cells)[None], real).item())
        unchanged.append(ptrag.energy_distance(torch.from_numpy(dataset.expression[rows])[None], real).item())
    assert np.mean(predicted) < np.mean(unchanged)


def test_the_best_validated_weights_are_kept(tmp_path, simulated):
    config, model = run_training(tmp_path, *simulated, top_k=3, steps=12, validate_every=3, lr=0.05)
    measured = [float(line.split(",")[6]) for line in (tmp_path / "log.csv").read_text().splitlines()[1:]]
    held_out = data.SetSampler(simulated[0], simulated[1].validation, config.cells, config.seed, controls_too=False)
    batches = [held_out.draw(i, range(config.sets)) for i in range(1)]
    run = ptrag.Run(tmp_path, config, torch.device("cpu"), ([], []))
    assert ptrag.validate(model, batches, run) == pytest.approx(np.nanmin(measured), rel=1e-6)


def test_a_condition_is_predicted_alike_alone_and_among_others(tmp_path, simulated):
    dataset, split = simulated
    config, model = run_training(tmp_path, dataset, split, top_k=3)
    together = {condition: prediction.cells for condition, _, prediction in ptrag.predict_conditions(model, dataset, split.test, config)}
    assert list(together) == list(split.test)
    condition, rows, prediction = next(iter(ptrag.predict_conditions(model, dataset, split.test[3:4], config)))
    assert len(rows) == len(prediction.cells) == len(dataset.cells(*condition))
    assert np.allclose(together[condition], prediction.cells, atol=1e-5)


def test_the_last_set_of_a_prediction_is_filled_up_from_the_first_cells():
    model, control = small_model(), np.random.default_rng(0).random((5, 20), np.float32)
    whole = ptrag.predict(model, control[[0, 1, 2, 3, 4, 0, 1, 2]], 1, set_size=4).cells
    assert np.array_equal(ptrag.predict(model, control, 1, set_size=4).cells, whole[:5])
    assert not np.array_equal(whole[:3], whole[5:])                                                # cells of a set see each other


def test_a_gene_taught_after_training_is_predicted_like_the_known_gene_with_its_embedding(tmp_path, simulated):
    dataset, split = simulated
    _, model = run_training(tmp_path, dataset, split, method="state-genept")
    control = dataset.expression[dataset.cells(0, 0)[:10]]
    known = model.perturbations[5]
    ptrag.add_perturbations(model, ["NEW"], model.embeddings[5:6].numpy())
    assert np.array_equal(ptrag.predict(model, control, "NEW").cells, ptrag.predict(model, control, known).cells)
    with pytest.raises(ptrag.InputError, match="did you mean"):
        ptrag.predict(model, control, known[:-1])


def test_a_model_of_random_candidates_draws_them_for_new_genes_too_and_keeps_those_it_had():
    model = small_model(candidates="random")
    model.perturbations, before = [str(i) for i in range(12)], model.candidates.clone()
    ptrag.add_perturbations(model, ["NEW"], model.embeddings[5:6].numpy())
    assert torch.equal(model.candidates[:12], before)
    assert not torch.equal(model.candidates[12], ptrag.retrieve(model.embeddings, model.pool, 4)[0][12])
    with pytest.raises(ptrag.InputError, match="already"):
        ptrag.add_perturbations(model, ["NEW"], model.embeddings[5:6].numpy())


def test_misspelt_ways_to_retrieve_or_select_are_errors():
    model = small_model()
    with pytest.raises(ValueError, match="nearest, random or least"):
        ptrag.retrieve(model.embeddings, model.pool, 2, "nearst")
    with pytest.raises(ValueError, match="threshold"):
        model.selector(torch.randn(1, 2, 16), torch.randn(1, 16), torch.randn(1, 4, 16), select="expcted")


def test_the_mean_probability_to_be_selected_never_falls_below_twelve_percent_whatever_the_scorer():
    torch.manual_seed(0)
    selector = ptrag.Selector(8).eval()
    torch.nn.init.zeros_(selector.score_out.weight)
    selector.score_out.weight.data.normal_(std=1e-4)
    selector.score_out.bias.data = torch.tensor([50.0, -50.0])                                     # as sure as can be: use none
    _, selection = selector(torch.randn(1, 40, 8), torch.randn(1, 8), torch.randn(1, 6, 8), select="expected")
    assert selection.weights.mean().item() == pytest.approx(1 / (1 + math.exp(2)), rel=5e-3)


def test_hard_negatives_replace_the_last_candidates_by_the_least_similar_genes():
    model = small_model()
    nearest = model.candidates.clone()
    ptrag.use_hard_negatives(model, 0.5)
    assert torch.equal(model.candidates[:, :2], nearest[:, :2])
    least, _ = ptrag.retrieve(model.embeddings, model.pool, 4, "least")
    assert torch.equal(model.candidates[:, 2:], least[:, :2].flip(1))


def test_ptrag_imports_and_works_alone_in_an_empty_folder_with_torch_and_numpy_only(tmp_path):
    shutil.copy(ROOT / "ptrag.py", tmp_path)
    program = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('h5py', 'pytest', 'data', 'evaluate'):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch, ptrag
model = ptrag.PTRAG(ptrag.Config(method='ptrag', top_k=3, hidden=8, layers=1), 10, torch.randn(6, 4), torch.arange(6))
prediction, selection = model(torch.rand(2, 5, 10), torch.tensor([1, 2]))
print(tuple(prediction.shape), tuple(selection.weights.shape), ptrag.wasserstein(prediction.detach(), torch.rand(2, 4, 10)).shape)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env={"PATH": ""})
    assert done.stdout.strip() == "(2, 5, 10) (2, 5, 3) torch.Size([2])", done.stderr
