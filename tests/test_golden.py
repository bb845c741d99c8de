"""The model with the published implementation's weights gives the published implementation's numbers.

Reads every .npz in tests/golden/, in the folder that PTRAG_GOLDEN names, and in the shared golden folder where there is one.
"""
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ptrag

HERE = Path(__file__).resolve().parent
FOLDERS = [HERE / "golden", HERE.parents[1] / "shared" / "golden"] + [Path(p) for p in [os.environ.get("PTRAG_GOLDEN")] if p]
FILES = sorted(path for folder in FOLDERS for path in folder.glob("*.npz"))

# published name -> ours; q, k, v and gate, up are stacked in ours, so several published tensors may fill one of ours
NAMES = {
    "cell_encoder": ["basal_encoder.0"], "perturbation_encoder": ["pert_encoder.0"], "gem_group": ["batch_encoder"],
    "output": ["project_out.0"],
    "selector.norm": ["context_input_norm"], "selector.score_in": ["cell_pert_scorer.0"], "selector.score_out": ["cell_pert_scorer.3"],
    "selector.value": ["final_project_genept_emb.0"],
    "attention.project": ["project_genept_emb.0"], "attention.query": ["query_enc.0"],
    "attention.key": ["key_enc.0"], "attention.value": ["value_enc.0"],
    "generator.norm": ["transformer_backbone.norm"],
}
BLOCK = {
    "attention_norm": ["input_layernorm"], "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention_out": ["self_attn.o_proj"],
    "feed_forward_norm": ["post_attention_layernorm"], "gate_up": ["mlp.gate_proj", "mlp.up_proj"], "down": ["mlp.down_proj"],
}


def published_names(name):
    """Our parameter's name -> the published names whose tensors, stacked along the first axis, are its value."""
    module, kind = name.rsplit(".", 1)
    if module.startswith("generator.blocks."):
        _, _, i, part = module.split(".")
        return [f"transformer_backbone.layers.{i}.{p}.{kind}" for p in BLOCK[part]]
    return [f"{p}.{kind}" for p in NAMES[module]]


def load(path):
    """Arrays of a golden file, its configuration, and our model with its weights, in evaluation mode but drawing as in training."""
    arrays = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(path).items() if k != "config"}
    told = json.loads(str(np.load(path)["config"]))
    method = "state-genept" if told["variant"] == "state" else told["variant"]
    config = ptrag.Config(method=method, top_k=told["top_k"], hidden=told["hidden"], layers=told["layers"], heads=told["heads"],
                          head_dim=told["head_dim"], feed_forward=told["ffn"], temperature=told["tau"], sparsity=told["sparsity_weight"],
                          causal=told["causal"], rotary=told["rotary"], batch_covariate=True, dropout=0.0)
    model = ptrag.PTRAG(config, told["genes"], arrays["pool"], torch.arange(told["pool"]), told["batches"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.cat([arrays[f"state/{p}"] for p in published_names(name)]))
    return arrays, config, model


def close(ours, theirs, tolerance):
    """Largest difference relative to the largest value."""
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1e-12)


def runs():
    return [pytest.param(path, mode, id=f"{path.parent.name}-{path.stem}-{mode}") for path in FILES for mode in ("sampled", "deterministic")
            if f"{mode}/prediction" in np.load(path)]


def run(arrays, model, mode):
    """Prediction, Selection, input of the generator, energy distance, with the stored noise or with none."""
    seen = []
    hook = model.generator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    noise = arrays["gumbel_noise"] if mode == "sampled" else torch.zeros_like(arrays.get("gumbel_noise", torch.zeros(0)))
    prediction, selection = model.train()(arrays["control_cells"][None], arrays["query"].reshape(1), arrays["batch_ids"][None], noise[None])
    hook.remove()
    return prediction, selection, seen[0], ptrag.energy_distance(prediction, arrays["target_cells"][None]).mean()


def test_there_are_golden_files_of_three_methods_over_a_set_and_causal():
    own = {path.stem for path in (HERE / "golden").glob("*.npz")}
    assert own == {f"{method}_{order}_1" for method in ("ptrag", "vanilla-rag", "state") for order in ("set", "causal")}
    if "PTRAG_GOLDEN" in os.environ:
        assert list(Path(os.environ["PTRAG_GOLDEN"]).glob("*.npz")), "PTRAG_GOLDEN names a folder without golden files"


@pytest.mark.parametrize("path", [p for p in FILES if "neighbours" in np.load(p)], ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_the_same_genes_are_retrieved_in_the_same_order(path):
    arrays, config, model = load(path)
    assert model.candidates[arrays["query"]].tolist() == arrays["neighbours"].tolist()


@pytest.mark.parametrize("path, mode", runs())
def test_values_agree_with_the_published_implementation(path, mode):
    arrays, config, model = load(path)
    prediction, selection, generator_input, energy = run(arrays, model, mode)
    assert close(generator_input[0], arrays[f"{mode}/backbone_input"], 1e-5)
    assert close(prediction[0], arrays[f"{mode}/prediction"], 1e-5)
    assert close(energy, arrays[f"{mode}/energy_loss"], 1e-4)
    if config.method == "ptrag":
        assert close(selection.logits[0], arrays[f"{mode}/logits"], 1e-5)
        assert torch.equal(selection.weights[0].detach(), arrays[f"{mode}/weights"].float())
        assert close(selection.weights.abs().mean(), arrays[f"{mode}/sparsity"], 1e-5)


@pytest.mark.parametrize("path, mode", runs())
def test_gradients_of_every_parameter_agree(path, mode):
    arrays, config, model = load(path)
    prediction, selection, _, energy = run(arrays, model, mode)
    loss = energy + (config.sparsity * selection.weights.abs().mean() if selection else 0)
    loss.backward()
    checked = 0
    for name, parameter in model.named_parameters():
        stored = [f"{mode}/grad/{p}" for p in published_names(name)]
        if name == "attention.key.bias" or not all(s in arrays for s in stored):  # a bias of the keys shifts every score alike
            continue
        theirs = torch.cat([arrays[s] for s in stored]).double()
        assert (parameter.grad.double() - theirs).norm() <= 1e-4 * theirs.norm(), name
        checked += len(stored)
    expected = sum(key.startswith(f"{mode}/grad/") and "key_enc.0.bias" not in key for key in arrays)
    assert checked == expected


@pytest.mark.parametrize("path", [p for p in FILES if "deterministic/weights" in np.load(p)], ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_threshold_at_test_time_is_the_run_without_noise(path):
    arrays, config, model = load(path)
    model.select = "threshold"
    prediction, selection = model.eval()(arrays["control_cells"][None], arrays["query"].reshape(1), arrays["batch_ids"][None])
    assert torch.equal(selection.weights[0].detach(), arrays["deterministic/weights"].float())
    assert close(prediction[0], arrays["deterministic/prediction"], 1e-5)
