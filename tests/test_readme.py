"""What the README says can be typed can be typed."""
import math
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data
import ptrag

README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("part", ["Selector", "wasserstein", "write_anndata"])
def test_each_worked_example_runs_as_it_stands(part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block, = [block for block in PYTHON if part in block]
    names = {}
    exec(block, names)
    if part == "Selector":
        assert names["context"].shape == (8, 64, 128) and names["selection"].weights.shape == (8, 64, 32)
        assert all(weight.grad is not None for weight in names["selector"].parameters())
    if part == "wasserstein":
        assert 0 < names["marginal"] < names["sw2"] * 50**0.5 and names["w1"] <= names["w2"]
    if part == "write_anndata":
        assert names["expression"].shape == (30, 5)
        assert np.allclose(np.expm1(names["expression"]).sum(1), 1e4)


def test_stage_2_copied_alone_with_its_imports_is_a_layer():
    sections = re.split(r"# -{50,}\n# (.*)\n# -{50,}\n", (ROOT / "ptrag.py").read_text())
    section, = [body for title, body in zip(sections[1::2], sections[2::2]) if title.startswith("Stage 2")]
    names = {"math": math, "NamedTuple": NamedTuple, "torch": torch, "F": torch.nn.functional, "nn": torch.nn}
    exec(section, names)
    context, selection = names["Selector"](8)(torch.randn(2, 5, 8), torch.randn(2, 8), torch.randn(2, 3, 8))
    assert context.shape == (2, 5, 8) and set(selection.weights.unique().tolist()) <= {0, 1}


def test_the_example_that_predicts_runs_on_a_trained_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ptrag.main("--name NAME --method ptrag --steps 2 --hidden 8 --layers 1 --max-cells 10".split()) == 0
    block, = [block for block in PYTHON if "ptrag.predict" in block]
    names = {}
    exec(block.replace("JAK2", "GENE001"), names)
    assert names["prediction"].cells.shape == (300, 200) and len(names["neighbours"]["candidates"]) == 8


def test_the_table_of_the_first_command_has_the_anchors_and_baselines_of_this_version(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert ptrag.main(["--method", "state", "--steps", "1"]) == 0                          # anchors and baselines need no trained model
    rows = lambda text: re.split(r"mean over conditions|\nposition", text)[1].splitlines()[1:]
    numbers = lambda line: [float(number) for number in re.findall(r"-?\d+\.\d+", line)]
    printed = {line.split("  ")[0]: numbers(line) for line in rows(capsys.readouterr().out)}
    shown = {line.split("  ")[0]: numbers(line) for line in rows(README.split("<!-- demo -->")[1])}
    untrained = [label for label in shown if label and label not in ptrag.METHODS]
    assert len(untrained) == 7
    for label in untrained:
        assert shown[label] == pytest.approx(printed[label], rel=2e-3, abs=1e-3), label


def test_every_option_the_readme_names_exists():
    known = {f"--{f.name.replace('_', '-')}" for f in fields(ptrag.Config)} | {"--help"}
    elsewhere = {"--real", "--pred", "--nproc_per_node", "--quick", "--json", "--only"}              # evaluate.py, torchrun, benchmark.py
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) - known - elsewhere == set()


def test_defaults_in_the_table_of_options_are_the_defaults():
    for options, default in re.findall(r"^\| (`--[^|]*`) \| ([^|]*) \|", README, re.MULTILINE):
        names = re.findall(r"--([a-z-]+)", options)
        values = [value.strip(" `") for value in default.split(",")]
        if len(names) == len(values) and values[0] not in ("all four", "off", ""):
            for name, value in zip(names, values):
                held = getattr(ptrag.Config(), name.replace("-", "_"))
                assert str(held) == value or float(held) == float(value), name


def test_public_functions_give_the_shapes_their_docstrings_say():
    B, S, G, K, h, n, m, d = 2, 6, 10, 3, 8, 5, 7, 4
    embeddings = torch.randn(9, 4)
    candidates, similarity = ptrag.retrieve(embeddings, torch.arange(9), K)
    assert candidates.shape == similarity.shape == (9, K)
    assert ptrag.gumbel_noise((B, S, K, 2)).shape == (B, S, K, 2)
    assert ptrag.straight_through(torch.randn(B, S, K, 2), 0.5, torch.zeros(B, S, K, 2)).shape == (B, S, K)
    assert ptrag.rotate(torch.randn(B, 2, S, 4)).shape == (B, 2, S, 4)
    assert ptrag.Block(h, 2, 4, 16)(torch.randn(B, S, h)).shape == (B, S, h)
    assert ptrag.Generator(h, 2, 2, 4, 16)(torch.randn(B, S, h)).shape == (B, S, h)
    assert ptrag.CrossAttention(4, h)(torch.randn(B, S, h), torch.randn(B, K, h), torch.ones(B).bool()).shape == (B, S, h)
    x, y = torch.randn(B, n, d), torch.randn(B, m, d)
    assert ptrag.pairwise_distance(x, y).shape == (B, n, m)
    assert ptrag.energy_distance(x, y).shape == ptrag.wasserstein(x, y).shape == (B,)
    assert ptrag.wasserstein_1d(x.transpose(1, 2), y.transpose(1, 2)).shape == (B, d)
    assert [part.shape for part in ptrag.sliced_wasserstein(x, y)] == [(B,), (B,)]
    for method in ptrag.METHODS:
        model = ptrag.PTRAG(ptrag.Config(method=method, hidden=h, layers=1, top_k=K), G, embeddings, torch.arange(9))
        prediction, selection = model(torch.rand(B, S, G), torch.tensor([1, 2]))
        assert prediction.shape == (B, S, G) and (selection is not None) == (method == "ptrag")
        model.perturbations = [str(i) for i in range(9)]
        assert ptrag.predict(model, np.random.rand(n, G), "3").cells.shape == (n, G)
    dataset = data.simulate(cell_lines=2, perturbations=6, genes=G, cells=8, controls=10)
    batch = data.SetSampler(dataset, dataset.conditions(), S, 0).draw(0, range(B))
    assert batch.control.shape == batch.target.shape == (B, S, G)
    assert batch.perturbation.shape == batch.cell_line.shape == (B,) and batch.gem_group.shape == (B, S)
