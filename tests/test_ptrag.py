"""Facts about the method: retrieval, selection, generator, distances, training."""
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from benchmark import selected
from conftest import SMALL, small_model, table

import data
import ptrag

every_method = pytest.mark.parametrize("method", ptrag.METHODS)


@pytest.fixture(autouse=True)
def the_same_random_numbers_in_any_order_of_tests():
    torch.manual_seed(0)


def random_sets(B=3, S=8):
    """Control cells (B, S, G), perturbations (B,) and gem groups (B, S) for a small model."""
    return torch.rand(B, S, 20) * 3, torch.randint(1, 12, (B,)), torch.randint(0, 3, (B, S))


def pairs(S, K, h):
    """Cells (1, S, h), a query (1, h) and candidates (1, K, h) for a selector."""
    return torch.randn(1, S, h) + 0.5, torch.randn(1, h) - 0.3, torch.randn(1, K, h)


# ---- Stage 1 ------------------------------------------------------------------------------------

def test_retrieval_orders_the_pool_by_cosine_similarity_and_ties_go_to_the_lower_index():
    embeddings = torch.tensor([[0, 0], [1, 0], [10, 1], [1, 1], [0, 3], [-1, 0]], dtype=torch.float32)
    candidates, similarity = ptrag.retrieve(embeddings, torch.arange(1, 6), 3)
    assert candidates[1].tolist() == [2, 3, 4]
    assert similarity[1].tolist() == pytest.approx([10 / math.sqrt(101), 1 / math.sqrt(2), 0.0], abs=1e-6)
    embeddings = torch.randn(1, 32) * torch.arange(1, 1101)[:, None]  # one direction, more than fit one block
    candidates, _ = ptrag.retrieve(embeddings, torch.arange(1100), 4)
    assert candidates[[0, 2, 1099]].tolist() == [[1, 2, 3, 4], [0, 1, 3, 4], [0, 1, 2, 3]]


@pytest.mark.parametrize("how", ["nearest", "random", "least"])
def test_only_genes_of_the_pool_with_an_embedding_are_retrieved_never_the_query_itself(how):
    embeddings, pool = torch.randn(30, 6), torch.arange(25)
    embeddings[[0, 7, 8]] = 0  # 22 usable genes are left, 21 where one is the query
    first, again, other = (ptrag.retrieve(embeddings, pool, 21, how, seed)[0] for seed in (3, 3, 4))
    for query in set(range(30)) - {0, 7, 8}:
        assert len(set(first[query].tolist()) & set(range(25)) - {query, 0, 7, 8}) == 21
    assert (first[[0, 7, 8]] == -1).all()  # nothing to look up
    assert torch.equal(first, again) and torch.equal(first, other) == (how != "random")
    if how == "least":  # the reverse order
        assert torch.equal(first[:25], ptrag.retrieve(embeddings, pool, 21)[0][:25].flip(1))
    with pytest.raises(ptrag.InputError, match="--top-k 22.*21 usable genes"):
        ptrag.retrieve(embeddings, pool, 22, how)
    with pytest.raises(ValueError, match="nearest, random or least"):
        ptrag.retrieve(embeddings, pool, 2, how[1:])


@pytest.mark.parametrize("share, count", [(0.01, 1), (0.5, 2), (0.6, 2), (0.9, 4), (1.0, 4)])
def test_hard_negatives_replace_the_most_similar_candidates_by_the_least_similar_genes(share, count):
    model, nearest = small_model(), small_model().candidates[1:]
    model.retrieve_from(pool := model.pool, share)
    candidates, least = model.candidates[1:], ptrag.retrieve(model.embeddings, pool, 4, "least")[0][1:]
    assert torch.equal(candidates[:, count:], nearest[:, count:])
    assert torch.equal(candidates[:, :count], least[:, :count])  # the most dissimilar first
    cosine = F.cosine_similarity(model.embeddings[1:, None], model.embeddings[candidates], dim=-1)
    assert torch.allclose(model.similarity[1:], cosine, atol=1e-6)
    model.retrieve_from(pool[:5 + count], share)  # as small as it can be: 4 + count, and the query itself
    assert all(len(set(row)) == 4 for row in [*candidates.tolist(), *model.candidates[1:].tolist()])
    with pytest.raises(ptrag.InputError, match="--hard-negatives"):
        model.retrieve_from(pool[:4 + count], share)


# ---- Stage 2 ------------------------------------------------------------------------------------

@pytest.mark.parametrize("B, S, K, h", [
    (1, 1, 1, 4), (2, 5, 3, 8), (3, 16, 7, 32), (1, 64, 32, 128), (9, 64, 16, 64)])
def test_separated_selection_equals_the_plain_form_in_value_and_gradient(B, S, K, h):
    model, perturbation = small_model(perturbations=40, hidden=h, top_k=K), torch.randint(1, 40, (B,))
    torch.nn.init.normal_(model.selector.norm.weight, 1.0, 0.3)
    torch.nn.init.normal_(model.selector.norm.bias, 0.0, 0.3)
    given = model, perturbation, torch.randn(B, S, h) + 0.5, ptrag.gumbel_noise((B, S, K, 2))
    (weights, ours), (exact, oracle) = selected(*given), selected(*given, plain=True)
    assert torch.equal(weights, exact) and torch.allclose(ours[0], oracle[0], atol=1e-5)
    for a, b in zip(ours, oracle, strict=True):  # two logits alone have a gradient of rounding only
        assert S * K == 1 or (a - b).abs().max() <= 2e-5 * b.abs().max().clamp(min=1e-3)


def test_a_draw_selects_with_probability_sigmoid_of_the_difference_of_the_logits():
    noise, p = ptrag.gumbel_noise((200_000, 2)), 1 / (1 + math.exp(-0.8))
    assert noise.mean().item() == pytest.approx(0.57722, abs=4 * math.pi / math.sqrt(6 * 400_000))
    weights = ptrag.straight_through(torch.tensor([0.3, 1.1]).expand(200_000, 2), 0.5, noise)
    assert weights.mean().item() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 200_000))
    assert weights.unique().tolist() == [0, 1]


def test_a_selector_draws_in_training_else_weighs_by_the_mean_of_draws_and_never_under_12_percent():
    inputs, selector = pairs(3, 4, 8), ptrag.Selector(8)
    assert (selector.temperature, selector.dropout) == (0.5, 0.1)
    assert selector(*inputs)[1].weights.unique().tolist() == [0, 1]
    state = torch.get_rng_state()
    expected, chosen = selector.eval()(*inputs)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(chosen.weights, chosen.probability)
    assert torch.equal(expected, selector(*inputs, select="expected")[0])
    contexts, drawn = selector(*(part.repeat_interleave(3000, 0) for part in inputs), select="sample")
    assert torch.allclose(contexts.mean(0), expected, atol=0.1)
    assert torch.allclose(drawn.weights.mean(0), chosen.probability, atol=4 * 0.5 / math.sqrt(3000))
    assert torch.equal(selector(*inputs, select="threshold")[1].weights, (chosen.probability > 0.5).float())
    with pytest.raises(ValueError, match="threshold"):
        selector(*inputs, select="expcted")
    torch.nn.init.normal_(selector.score_out.weight, std=1e-4)
    selector.score_out.bias.data = torch.tensor([50.0, -50.0])  # as sure as can be: use none
    least = selector(*pairs(40, 6, 8))[1].probability.mean().item()
    assert least == pytest.approx(1 / (1 + math.exp(2)), rel=5e-3)  # never below 12 %


@pytest.mark.parametrize("options", [dict(method="vanilla-rag"), {}, dict(select="all")], ids=str)
def test_the_control_has_no_candidate_and_no_context_and_keep_query_adds_cell_and_query(options):
    seen, control, queries = [], random_sets()[0], torch.tensor([0, 1, 0])
    for model in (small_model(**options), small_model(keep_query=True, **options)):
        model.generator.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        _, selection = model(control, queries)
        for used in (selection.weights, selection.probability) if selection else ():
            assert (used[[0, 2]] == 0).all() and (used[1] > 0).all()
    assert (seen[0][[0, 2]] == 0).all() and (seen[0][1] != 0).any()
    query = model.perturbation_encoder(model.embeddings[queries])[:, None]
    assert torch.allclose(seen[1] - seen[0], model.cell_encoder(control) + query, atol=1e-5)


@pytest.mark.parametrize("method, select", [("ptrag", "all"), ("ptrag-expected", "sample")])
def test_all_candidates_or_their_probabilities_are_used_and_nothing_drawn_at_both_times(method, select):
    model, inputs = small_model(dropout=0.0, method=method, select=select), random_sets()
    predictions, selections = zip(model(*inputs), model.train()(*inputs), model(*inputs))
    assert all(torch.equal(prediction, predictions[0]) for prediction in predictions)
    assert all(torch.equal(selection.weights, selections[0].probability) for selection in selections)
    used = selections[0].weights.unique()
    assert used.tolist() == [1] if select == "all" else len(used) > 2 and used.max() < 1
    trained = {weight.requires_grad for name, weight in model.selector.named_parameters() if "score" in name}
    assert trained == {select != "all"}  # nothing scores, so nothing to train


def test_dropout_keeps_the_share_it_says_and_the_mean():
    for p in (0.1, 0.5, 0.9):
        kept = torch.stack([ptrag.dropout_mask((50, 49), p) for _ in range(400)])
        assert kept.unique().tolist() == [0, 1]
        assert kept.float().mean().item() == pytest.approx(1 - p, abs=1e-3)  # 26/256 is too far from 0.1
    with pytest.raises(ValueError, match="0.91: must be from 0 to 0.9"):
        ptrag.Selector(16, dropout=0.91)
    selector, inputs = ptrag.Selector(16, dropout=0.5), (*pairs(3, 4, 16), torch.rand(1, 3, 4))
    noisy, plain = (selector.train(mode).score(*(part.repeat_interleave(2000, 0) for part in inputs))
                    for mode in (True, False))
    assert (noisy.std(0) > 0).all() and torch.allclose(noisy.mean(0), plain[0], atol=0.05)


# ---- Generator ----------------------------------------------------------------------------------

@pytest.mark.parametrize("option", ["batch_covariate", "causal", "rotary"])
@every_method
def test_order_of_cells_permutes_output_unless_causal_or_rotary_and_other_sets_never_matter(method, option):
    model, inputs = small_model(method=method, **{option: True}), random_sets(B=5)
    for weight in model.generator.blocks[0].qkv.weight, model.generator.blocks[0].attention_out.weight:
        torch.nn.init.normal_(weight)
    one_hot = torch.eye(12) * (torch.arange(12) > 0)  # state knows genes by number only; the control is zero
    assert torch.equal(model.embeddings, one_hot) if method == "state" else model.embeddings.shape == (12, 10)
    prediction, selection = model(*inputs)
    assert prediction.shape == inputs[0].shape and (selection is None) != method.startswith("ptrag")
    difference = (model(inputs[0].flip(1), inputs[1], inputs[2].flip(1))[0] - prediction.flip(1)).abs().max()
    assert difference <= 1e-5 if option == "batch_covariate" else difference > 1e-3
    for i in range(5):
        assert torch.allclose(model(*(x[i:i + 1] for x in inputs))[0], prediction[i:i + 1], atol=1e-5)


@every_method
def test_bfloat16_changes_values_and_gradients_by_its_rounding_only_and_selects_as_float32_would(method):
    model, (control, perturbation, _) = small_model(method=method, hidden=64, dropout=0.0), random_sets(4, 16)
    noise, outcome, seen = ptrag.gumbel_noise((4, 16, 4, 2)), [], []
    if method.startswith("ptrag"):
        model.selector.register_forward_hook(lambda module, given, result: seen.append((given, result)))
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            prediction = model.train()(control, perturbation, None, noise)[0].float()
        energy = ptrag.energy_distance(prediction, control.flip(0)).mean()
        gradients = torch.autograd.grad(energy, [model.output.weight, model.cell_encoder.weight])
        outcome.append([prediction, *gradients])
    for exact, rounded in zip(*outcome):
        assert 0 < (exact - rounded).norm() <= 0.03 * exact.norm()
    for given, (context, selection) in seen[1:2]:
        again, again_selection = model.selector(*given)
        assert all(map(torch.equal, (context, *selection), (again, *again_selection)))


# ---- Distances ----------------------------------------------------------------------------------

def test_energy_distance_is_the_double_sum_over_all_pairs_its_gradient_that_of_the_predicted_cells():
    x, y = (torch.randn(2, n, 7, dtype=torch.float64, requires_grad=True) for n in (5, 9))
    distance = lambda a, b: np.mean([math.dist(i, j) for i in a.tolist() for j in b.tolist()])  # noqa: E731
    expected = [distance(a, b) - distance(a, a) / 2 - distance(b, b) / 2 for a, b in zip(x, y)]
    assert ptrag.energy_distance(x, y).tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.autograd.gradcheck(lambda a: ptrag.energy_distance(a, y.detach()), x)
    assert not ptrag.energy_distance(x.detach(), y).requires_grad
    for scale in (1e-3, 1.0, 1e3):  # identical clouds
        y = torch.rand(2, 16, 50) * scale
        energy = ptrag.energy_distance(x := y.clone().requires_grad_(), y)
        energy.sum().backward()
        assert energy.abs().max() <= 1e-6 * scale and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("n, m", [(1, 1), (1, 7), (3, 4), (6, 9), (10, 4), (50, 50), (100, 37)])
def test_one_dimensional_wasserstein_of_shifted_and_scaled_samples_and_of_unequal_counts(n, m):
    x, y = (torch.randn(count, dtype=torch.float64) for count in (n, m))
    repeated = [cloud.sort()[0].repeat_interleave(math.lcm(n, m) // len(cloud)) for cloud in (x, y)]
    for p in (1, 2):
        cases = {(x, y): torch.dist(*repeated, p) / math.lcm(n, m) ** (1 / p), (x, x + 3): 3,
                 (x, 2 * x): x.norm(p) / n ** (1 / p), (x, x[torch.randperm(n)]): 0}
        for clouds, expected in cases.items():
            assert ptrag.wasserstein_1d(*clouds, p).item() == pytest.approx(float(expected), rel=1e-12, abs=0)


def test_sliced_wasserstein_is_within_its_stated_error_of_the_closed_form():
    x, shift = torch.randn(1, 40, 10, dtype=torch.float64), torch.linspace(0, 1, 10, dtype=torch.float64)
    cosine = math.gamma(5) / (math.sqrt(math.pi) * math.gamma(5.5))  # mean |cosine| with a direction in ten
    for p, expected in ((1, shift.norm() * cosine), (2, shift.norm() / math.sqrt(10))):  # of a translation
        value, error = ptrag.sliced_wasserstein(x, x + shift, p, directions=2000)
        assert 0 < error < 0.05 * value and abs(value - expected) < 4 * error
    x, y = torch.randn(1, 20_000, 5), 2 * torch.randn(1, 20_000, 5)  # along each direction W2 = |2 - 1|
    value, error = ptrag.sliced_wasserstein(x, y, 2, directions=64)
    assert abs(value - 1) < 4 * error + 2 * 2 / math.sqrt(20_000)  # of the samples


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("n, m, d", [(1, 1, 3), (5, 5, 2), (7, 7, 50), (2, 6, 3), (3, 6, 1), (3, 2, 10)])
def test_wasserstein_is_within_two_permille_of_the_best_assignment(n, m, d, p):
    x, y = torch.randn(3, n, d, dtype=torch.float64), torch.randn(3, m, d, dtype=torch.float64) + 0.5
    found, both = ptrag.wasserstein(x, y, p), math.lcm(n, m)
    for i in range(3 if both < 7 else 1):
        cost = torch.cdist(x[i].repeat_interleave(both // n, 0), y[i].repeat_interleave(both // m, 0)) ** p
        orders = torch.tensor([*itertools.permutations(range(both))])
        best = cost[torch.arange(both), orders].mean(1).min() ** (1 / p)
        assert found[i].item() == pytest.approx(best.item(), rel=2e-3)


@pytest.mark.parametrize("p", [1, 2])
def test_wasserstein_of_translated_identical_and_onedimensional_clouds_and_nan_where_it_does_not_close(p):
    x, direction = torch.randn(1, 100, 50) * torch.linspace(3, 0.3, 50), F.normalize(torch.randn(50), dim=0)
    for size in (0.1, 2.0, 20.0):
        assert ptrag.wasserstein(x, x + size * direction, p).item() == pytest.approx(size, rel=2e-3)
    assert ptrag.wasserstein(x, x.clone(), 1).item() < 1e-5
    x, y = torch.randn(3, 30, 1), torch.randn(3, 45, 1) * 1.5 + 0.3
    x[0], y[0], x[1] = 0, 1, math.nan  # one step closes the first
    exact, found = ptrag.wasserstein_1d(x[..., 0], y[..., 0], p), ptrag.wasserstein(x, y, p)
    assert found.tolist() == pytest.approx(exact.tolist(), rel=2e-3, nan_ok=True)
    assert found.isnan().tolist() == ptrag.energy_distance(x, y).isnan().tolist() == [False, True, False]
    many = ptrag.wasserstein(x[2:].repeat(120, 1, 1), y[2:], p)  # against one
    assert torch.allclose(many, found[2].expand(120), rtol=2e-3)
    found = ptrag.wasserstein(x, y, p, max_rounds=1)
    assert found.tolist() == pytest.approx([1, math.nan, math.nan], nan_ok=True)


# ---- Training -----------------------------------------------------------------------------------

def trained(folder, dataset, rule, **options):
    """Split, configuration and trained model of PT-RAG."""
    split, config = data.split(dataset, rule, 0), ptrag.Config(**{**SMALL, "method": "ptrag", **options})
    return split, config, ptrag.train_all(config, folder, dataset, split)[f"ptrag-{config.seed}"]


def drawn(dataset, conditions, sets, **options):
    """A batch, what of it a model is given, and the real cells."""
    batch = data.SetSampler(dataset, conditions, 8, 1, **options).draw(0, range(sets))
    inputs = map(torch.from_numpy, (batch.control, batch.perturbation, batch.gem_group))
    return batch, [*inputs], torch.from_numpy(batch.target)


@pytest.mark.parametrize("group_cells", [1, 16, 24, 0])
@pytest.mark.parametrize("options", [*({"method": m} for m in ptrag.METHODS), dict(freeze_generator=True)])
def test_gradients_added_up_over_groups_are_those_of_the_batch(options, group_cells, simulated, monkeypatch):
    monkeypatch.setattr(ptrag, "gumbel_noise", lambda shape, device: torch.zeros(shape))
    model = small_model(30, 15, dropout=0.0, batch_covariate=True, **options).train()
    batch, inputs, target = drawn(simulated, simulated.conditions(), 5)
    prediction, selection = model(*inputs)
    energy = ptrag.energy_distance(prediction, target)
    weights = selection.weights if selection else torch.zeros(1)
    (energy.mean() + 2.0 * weights[weights > 0].sum() / weights.numel()).backward()  # pushes out the selected
    expected = {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}
    frozen = {name.split(".")[0] for name, _ in model.named_parameters() if name not in expected}
    assert frozen == ({"generator", "output"} if model.config.freeze_generator else set())
    norm = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    before = model.cell_encoder.weight.clone()
    config = replace(model.config, group_cells=group_cells, sparsity=2.0, clip=1e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    step, = ptrag.train(model, optimizer, [batch], [], config, ptrag.Progress())
    assert torch.allclose(step.energy, energy, atol=1e-6) and torch.allclose(step.sparsity, weights.mean())
    assert step.norm.item() == pytest.approx(norm.item(), rel=1e-5) and norm > 1e-3  # before it is clipped
    for name, gradient in expected.items():
        assert (model.get_parameter(name).grad - gradient * 1e-3 / norm).abs().max() <= 1e-7, name
    assert torch.allclose(model.cell_encoder.weight, before - 10 * model.cell_encoder.weight.grad)


def test_a_group_fits_the_cache_or_is_as_asked_for_and_draws_by_seed_step_and_its_first_set(simulated):
    for options, device, count in [
            (dict(feed_forward=2784, cells=128), "cpu", 8), (dict(cells=512), "cpu", 4),
            (dict(group_cells=1), "cpu", 1), (dict(group_cells=576), "cuda", 9), ({}, "cuda", 12)]:
        groups = ptrag.groups_of_sets(ptrag.Config(**options), 12, torch.device(device))
        assert groups == [slice(first, min(first + count, 12)) for first in range(0, 12, count)]
    model, seen = small_model(30, 15), []
    model.selector.register_forward_hook(lambda module, given, result: seen.append(result[1].weights))
    batch, inputs, _ = drawn(simulated, simulated.conditions(), 5)
    config, still = replace(model.config, seed=7, group_cells=16), torch.optim.SGD(model.parameters(), lr=0.0)
    next(ptrag.train(model, still, [batch], [], config, ptrag.Progress(step=2)))
    for first, weights in zip((0, 2, 4), tuple(seen), strict=True):
        ptrag.seed_torch(7, 3, first)
        model(*(x[first:first + 2] for x in inputs))
        assert torch.equal(seen[-1], weights)


def test_the_weights_kept_are_those_with_the_best_validation_and_retrieve_training_genes(tmp_path, simulated):
    split, _, model = trained(tmp_path, simulated, "perturbation:0", seed=1, top_k=3, steps=12,
                              validate_every=3, lr=0.2, group_cells=24)
    assert set(model.pool.tolist()) == {p for _, p in split.train}
    _, inputs, target = drawn(simulated, split.validation, 4, controls_too=False)
    energy = ptrag.energy_distance(model.eval()(*inputs)[0], target).mean().item()
    validated = [row for row in table(tmp_path / "log.csv") if row["validation"]]
    assert [row["step"] for row in validated] == ["3", "6", "9", "12"]
    assert min(float(row["validation"]) for row in validated) == pytest.approx(energy, rel=1e-6)


def test_the_loss_falls_and_ptrag_beats_no_change_on_simulated_data(tmp_path):
    dataset = data.simulate(0, 3, perturbations=40, genes=100, cells=40, controls=150)
    split, config, model = trained(
        tmp_path, dataset, "cell-line:simC", hidden=64, layers=1, head_dim=16, feed_forward=64, top_k=8,
        cells=32, sets=16, steps=300, lr=2e-3, validate_every=50)
    loss, energies = [float(row["loss"]) for row in table(tmp_path / "log.csv")], []
    assert np.mean(loss[-20:]) < 0.5 * np.mean(loss[:5])
    for condition, rows, prediction in ptrag.predict_conditions(model, dataset, split.test, config):
        clouds = prediction.cells, dataset.expression[rows], dataset.expression[dataset.cells(*condition)]
        predicted, unchanged, real = (torch.from_numpy(cloud)[None] for cloud in clouds)
        energies.append([ptrag.energy_distance(cloud, real).item() for cloud in (predicted, unchanged)])
    assert np.less(*np.mean(energies, 0))
    (condition, rows, alone), = ptrag.predict_conditions(model, dataset, [condition], config)
    assert condition == split.test[-1] and len(rows) == len(alone.cells) == len(dataset.cells(*condition))
    assert np.allclose(alone.cells, prediction.cells, atol=1e-5)  # predicted alike alone and among others


def test_the_last_set_of_a_prediction_is_filled_up_from_the_first_cells_and_groups_change_nothing():
    model, control = small_model(), np.random.default_rng(0).random((5, 20), np.float32)
    whole = ptrag.predict(model, control[[0, 1, 2, 3, 4, 0, 1, 2]], 1, set_size=4).cells
    for model.config.group_cells in (0, 4):
        cells, probability = ptrag.predict(model, control, 1, set_size=4)
        assert np.allclose(cells, whole[:5], atol=1e-6) and probability.shape == (5, 4)
    assert not np.array_equal(whole[:3], whole[5:])  # cells of a set see each other


def test_a_gene_taught_later_is_predicted_like_the_one_with_its_embedding_or_draws_random_candidates():
    known, drawing = small_model(method="state-genept"), small_model(candidates="random")
    before, embedding = drawing.candidates.clone(), known.embeddings[5:6].numpy()
    for model in (known, drawing):
        ptrag.add_perturbations(model, ["NEW"], embedding)
        for name, wrong, said in (("NEW", embedding, "already"), ("OTHER", embedding[:, 1:], "have 10 ")):
            with pytest.raises(ptrag.InputError, match=said):
                ptrag.add_perturbations(model, [name], wrong)
    control = np.random.default_rng(0).random((10, 20), np.float32)
    assert np.array_equal(*(ptrag.predict(known, control, gene).cells for gene in ("NEW", "p5")))
    with pytest.raises(ptrag.InputError, match="did you mean"):
        ptrag.predict(known, control, "NEWW")
    for wrong in (control[:, 1:], control[0], control[:0]):
        with pytest.raises(ptrag.InputError, match="control cells .*must be .cells, 20 genes"):
            ptrag.predict(known, wrong, "NEW")
    assert torch.equal(drawing.candidates[:12], before)  # those it had are kept
    assert not torch.equal(drawing.candidates[12], ptrag.retrieve(drawing.embeddings, drawing.pool, 4)[0][12])
