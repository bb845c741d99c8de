"""What the README says can be typed can be typed, and what it says comes out comes out."""
import itertools
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run

import ptrag

README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


# Standard deviations over five seeds of the columns of the table; rounding elsewhere is like another seed.
SPREAD = {"state": (0.158, 0.163, 0.039, 0.046, 0.157, 0.052),
          "state-genept": (0.082, 0.085, 0.017, 0.019, 0.064, 0.021),
          "vanilla-rag": (0.094, 0.095, 0.016, 0.019, 0.073, 0.025),
          "ptrag": (0.123, 0.128, 0.032, 0.039, 0.158, 0.041),
          "ptrag-expected": (0.096, 0.098, 0.010, 0.011, 0.031, 0.012)}


def example(part):
    """The names that the README's example of a part leaves behind."""
    code, = (code for code in PYTHON if part in code)
    exec(code.replace("JAK2", "GENE001"), names := {})
    return names


def test_each_worked_example_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layer = example("Selector")
    assert layer["context"].shape == (8, 64, 128) and layer["selection"].weights.shape == (8, 64, 32)
    assert all(weight.grad is not None for weight in layer["selector"].parameters())
    found = example("wasserstein")
    assert 0 < found["marginal"] < found["sw2"] * 50**0.5 and found["w1"] <= found["w2"]
    expression = example("write_anndata")["expression"]
    assert expression.shape == (30, 5) and np.allclose(np.expm1(expression).sum(1), 1e4)
    assert run(tmp_path, "--name NAME --method ptrag --steps 2 --hidden 8 --max-cells 10") == 0
    names = example("ptrag.predict")
    assert names["prediction"].cells.shape == (300, 200) and len(names["neighbours"]["candidates"]) == 8
    assert len(PYTHON) == 4  # all of them


def test_stage_2_copied_alone_with_its_imports_is_a_layer():
    section = re.split("# ---- ", (ROOT / "ptrag.py").read_text())[2]
    names = {name: getattr(ptrag, name) for name in "math NamedTuple torch F nn checkpoint".split()}
    exec(f"from __future__ import annotations\n# {section}", names)
    context, selection = names["Selector"](8)(torch.randn(2, 5, 8), torch.randn(2, 8), torch.randn(2, 3, 8))
    assert context.shape == (2, 5, 8) and set(selection.weights.unique().tolist()) <= {0, 1}


def test_ptrag_works_alone_in_an_empty_folder_with_torch_and_numpy_only(tmp_path):
    shutil.copy(ROOT / "ptrag.py", tmp_path)
    program = """if True:
        import sys, torch
        sys.modules.update(dict.fromkeys(("h5py", "pytest", "data", "evaluate")))  # importing them fails
        import ptrag
        config = ptrag.Config("ptrag", top_k=3, hidden=8, layers=1)
        model = ptrag.PTRAG(config, range(10), range(6), torch.randn(6, 4), torch.arange(6))
        prediction, selection = model(torch.rand(2, 5, 10), torch.tensor([1, 2]))
        distance = ptrag.wasserstein(prediction.detach(), torch.rand(2, 4, 10))
        print(*prediction.shape, *selection.weights.shape, *distance.shape)"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "2 5 10 2 5 3 2\n", done.stderr


def test_the_first_command_prints_the_table_shown(first_command):
    printed, shown = ({line.split("  ")[0]: [float(number) for number in re.findall(r"-?\d+\.\d+", line)]
                       for line in text.split("mean over conditions")[1].split("\n\n")[0].splitlines()[1:]}
                      for text in (first_command, README.split("<!-- demo -->")[1].split("```")[1]))
    assert shown.keys() == printed.keys() > SPREAD.keys() == set(ptrag.METHODS)
    for label, values in shown.items():
        trained, error = label in SPREAD, abs(np.subtract(values, printed[label]))
        most = 5 * np.array(SPREAD[label]) if trained else 1e-3 + 2e-3 * abs(np.array(values))
        assert (error <= most).all(), (label, values, printed[label])


def test_options_the_readme_names_exist_and_have_the_defaults_it_says():
    known = {ptrag.flag(name) for name in vars(ptrag.Config())} | {"--help", "--nproc_per_node"}  # torchrun's
    for name in ("data.py", "evaluate.py", "tests/benchmark.py", "tests/fidelity.py"):
        known.update(re.findall(r"[\"'](--[a-z][\w-]*)[\"']", (ROOT / name).read_text()))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) <= known
    rows = re.findall(r"^\| (`--[^|]*`) \|([^|]*)\|", README, re.MULTILINE)
    said = {"all four": ptrag.Config.method, "off": "False"}
    assert len(rows) >= 9
    for options, defaults in rows:  # an empty cell, or a value less: no, or none
        names, values = re.findall(r"--([a-z0-9-]+)", options), re.split(r"[ `]*,[ `]*", defaults.strip(" `"))
        for name, value in itertools.zip_longest(names, values, fillvalue=""):
            held = getattr(ptrag.Config, name.replace("-", "_"))
            assert str(held) == said.get(value, value) or float(held or 0) == float(value or 0), name


def test_public_functions_give_the_shapes_their_docstrings_say():
    B, S, K, h, E, n, m, d = 2, 6, 4, 16, 10, 5, 7, 3
    sets, x, y = torch.randn(B, S, h), torch.randn(B, n, d), torch.randn(B, m, d)
    for shape, *results in [
            ((9, K), *ptrag.retrieve(torch.randn(9, E), torch.arange(9), K)),
            ((B, S, K, 2), noise := ptrag.gumbel_noise((B, S, K, 2))),
            ((B, S, K), ptrag.straight_through(noise, 0.5, noise)),
            ((B, S, h), ptrag.rotate(sets), ptrag.Block(h, 2, 4, 16)(sets),
             ptrag.Generator(h, 2, 2, 4, 16)(sets), ptrag.CrossAttention(E, h)(sets, torch.randn(B, K, E))),
            ((B, n, m), ptrag.pairwise_distance(x, y)), ((B, n), ptrag.wasserstein_1d(x, y[:, :n])),
            ((B,), ptrag.energy_distance(x, y), ptrag.wasserstein(x, y), *ptrag.sliced_wasserstein(x, y))]:
        assert {result.shape for result in results} == {shape}
