"""The model with the published implementation's weights gives the published implementation's numbers.

Reads every .npz in tests/golden/, in the folder PTRAG_GOLDEN names, and in the shared golden folder if there.
"""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED

import ptrag

OWN, TOLD = ROOT / "tests" / "golden", os.environ.get("PTRAG_GOLDEN")
FILES = {path: set(np.load(path)) for folder in (OWN, SHARED / "golden", TOLD) if folder
         for path in sorted(Path(folder).glob("*.npz"))}  # path -> names of its arrays

# our module -> the published ones, of which several may be stacked in ours; in blocks the last part decides
PUBLISHED = {
    "cell_encoder": "basal_encoder.0", "perturbation_encoder": "pert_encoder.0", "gem_group": "batch_encoder",
    "selector.norm": "context_input_norm", "selector.value": "final_project_genept_emb.0",
    "selector.score_in": "cell_pert_scorer.0", "selector.score_out": "cell_pert_scorer.3",
    "attention.project": "project_genept_emb.0", "attention.query": "query_enc.0",
    "attention.key": "key_enc.0", "attention.value": "value_enc.0", "attention_norm": "input_layernorm",
    "qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "attention_out": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm", "gate_up": "mlp.gate_proj mlp.up_proj",
    "down": "mlp.down_proj", "generator.norm": "transformer_backbone.norm", "output": "project_out.0"}


def published_names(name):
    """The published names whose tensors, stacked along the first axis, are our parameter's value."""
    module, kind = name.rsplit(".", 1)
    *block, part = module.removeprefix("generator.blocks.").split(".") if "blocks" in module else [module]
    place = f"transformer_backbone.layers.{block[0]}." if block else ""
    return [f"{place}{p}.{kind}" for p in PUBLISHED[part].split()]


def load(path):
    """Arrays of a golden file, its set of cells as the model takes it, and our model with its weights."""
    arrays = {name: torch.as_tensor(array) for name, array in np.load(path).items() if name != "config"}
    told = json.loads(str(np.load(path)["config"]))
    same = ("top_k", "hidden", "layers", "heads", "head_dim", "causal", "rotary")
    config = ptrag.Config(told["variant"].replace("state", "state-genept"), feed_forward=told["ffn"],
                          temperature=told["tau"], sparsity=told["sparsity_weight"], dropout=0.0,
                          batch_covariate=True, **{name: told[name] for name in same})
    genes, names, gem_groups = (range(told[count]) for count in ("genes", "pool", "batches"))
    model = ptrag.PTRAG(config, genes, names, arrays["pool"], torch.arange(len(names)), gem_groups)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.cat([arrays[f"state/{p}"] for p in published_names(name)]))
    inputs = arrays["control_cells"][None], arrays["query"].reshape(1), arrays["batch_ids"][None]
    return arrays, inputs, model.eval()


def close(ours, theirs, tolerance):
    """Whether the largest difference is within the tolerance of the largest value."""
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    largest = theirs.abs().max().clamp(min=1e-12)
    return ours.shape == theirs.shape and (ours - theirs).abs().max() <= tolerance * largest


def test_there_are_golden_files_of_three_methods_over_a_set_and_causal():
    expected = {OWN / f"{m}_{o}_1.npz" for m in ("ptrag", "vanilla-rag", "state") for o in ("set", "causal")}
    assert {path for path in FILES if path.parent == OWN} == expected
    assert not TOLD or any(path.parent == Path(TOLD) for path in FILES), "PTRAG_GOLDEN: no golden files there"


@pytest.mark.parametrize("path, mode", [
    pytest.param(path, mode, id=f"{path.parent.name}-{path.stem}-{mode}") for path, names in FILES.items()
    for mode in ("sampled", "deterministic") if f"{mode}/prediction" in names])
def test_candidates_values_and_gradients_agree_with_the_published_implementation(path, mode):
    arrays, inputs, model = load(path)
    seen, noise = [], arrays["gumbel_noise"][None] if mode == "sampled" else torch.zeros(1)
    model.generator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    prediction, selection = model.train()(*inputs, noise)  # draws as in training
    energy = ptrag.energy_distance(prediction, arrays["target_cells"][None]).mean()
    assert close(seen[0][0], arrays[f"{mode}/backbone_input"], 1e-5)
    assert close(prediction[0], arrays[f"{mode}/prediction"], 1e-5)
    assert close(energy, arrays[f"{mode}/energy_loss"], 1e-4)
    assert not model.retrieves or torch.equal(model.candidates[arrays["query"]], arrays["neighbours"])
    if selection:
        sparsity = selection.weights.abs().mean()
        assert close(selection.logits[0], arrays[f"{mode}/logits"], 1e-5)
        assert torch.equal(selection.weights[0], arrays[f"{mode}/weights"].float())
        assert close(sparsity, arrays[f"{mode}/sparsity"], 1e-5)
    (energy + (model.config.sparsity * sparsity if selection else 0)).backward()
    unseen = {name for name in arrays if name.startswith(f"{mode}/grad/")}
    for name, parameter in model.named_parameters():
        stored = [f"{mode}/grad/{p}" for p in published_names(name)]
        if unseen.issuperset(stored) and name != "attention.key.bias":  # which shifts every score alike
            theirs = torch.cat([arrays[s] for s in stored]).double()
            assert (parameter.grad.double() - theirs).norm() <= 1e-4 * theirs.norm(), name
        unseen.difference_update(stored)
    assert not unseen
    if selection and mode == "deterministic":  # threshold at test time is the run without noise
        model.eval().config.select = "threshold"
        prediction, selection = model(*inputs)
        assert torch.equal(selection.weights[0], arrays[f"{mode}/weights"].float())
        assert close(prediction[0], arrays[f"{mode}/prediction"], 1e-5)
