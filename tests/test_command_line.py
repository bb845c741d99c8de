"""The program as its user meets it: options, files of a run, interruption, several processes, prediction."""
import csv
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
import data
import ptrag

TINY = "--hidden 8 --layers 1 --heads 2 --head-dim 4 --feed-forward 16 --cells 8 --sets 4 --top-k 3".split()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Options that name a small simulated data set written as AnnData, and its embeddings."""
    folder = tmp_path_factory.mktemp("data")
    d = data.simulate(seed=1, cell_lines=2, perturbations=14, genes=30, cells=16, controls=40, embedding_dim=8, programs=3)
    labels = {"gene": [d.perturbations[i] for i in d.perturbation], "cell_line": [d.cell_lines[i] for i in d.cell_line],
              "gem_group": [d.batches[i] for i in d.batch]}
    data.write_anndata(folder / "small.h5ad", d.genes, [(d.expression[np.arange(len(d.batch))], labels, {})])
    np.savez(folder / "embeddings.npz", genes=np.array(d.embedding_genes), embeddings=d.embeddings)
    return ["--data", str(folder / "small.h5ad"), "--genept", str(folder / "embeddings.npz")]


def run(folder, *options):
    """The exit status of the command line started in `folder`, in this process."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        return ptrag.main([str(option) for option in options])
    finally:
        os.chdir(before)


def table(path):
    return list(csv.DictReader(open(path)))


def start(folder, *options):
    """The command line in a process of its own, forked from a server that has the modules loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ptrag", "data", "evaluate"])
    process = context.Process(target=_main, args=(str(folder), [str(option) for option in options]))
    process.start()
    return process


def _main(folder, options):
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")
    sys.exit(ptrag.main(options))


def same_weights(a, b):
    a, b = (torch.load(folder / "model.pt", weights_only=True)["models"] for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[m][name], b[m][name]) for m in a for name in a[m])


# ----------------------------------------------------------------------------------------------------------------- runs

def test_without_data_all_four_methods_are_trained_on_a_simulation_that_is_called_so(tmp_path, capsys):
    assert run(tmp_path, *TINY, "--steps", 2, "--max-cells", 12, "--name", "demo") == 0
    printed = capsys.readouterr().out
    assert "simulated" in printed.splitlines()[0]
    rows = [line.split()[0] for line in printed.splitlines() if line]
    for method in (*ptrag.METHODS, "no", "other"):                                                 # "no change", "other real half"
        assert method in rows
    for heading in ("W1", "W2", "SW1", "SW2", "energy", "r delta"):
        assert heading in printed


def test_a_run_writes_config_log_model_metrics_retrieval_and_predictions(tmp_path, files):
    assert run(tmp_path, *files, *TINY, "--steps", 6, "--validate-every", 3, "--name", "a", "--method", "ptrag,state") == 0
    folder = tmp_path / "runs" / "a"
    assert json.loads((folder / "config.json").read_text())["top_k"] == 3
    log = table(folder / "log.csv")
    assert [(row["method"], int(row["step"])) for row in log] == [(m, s) for m in ("ptrag", "state") for s in range(1, 7)]
    assert [row["validation"] != "nan" for row in log[:6]] == [False, False, True] * 2
    saved = torch.load(folder / "model.pt", weights_only=True)
    assert set(saved["models"]) == {"ptrag-0", "state-0"}

    d, split = ptrag.open_data(ptrag.read_config(folder))
    conditions = {(d.cell_lines[line], d.perturbations[p]) for line, p in split.test}
    metrics = table(folder / "metrics.csv")
    assert {(row["cell_line"], row["perturbation"]) for row in metrics if row["method"] == "ptrag"} == conditions
    assert all(float(row["energy"]) > 0 for row in metrics if row["method"] == "ptrag")
    retrieval = table(folder / "retrieval.csv")
    assert len(retrieval) == 3 * len(conditions) and all(row["candidate"] != row["perturbation"] for row in retrieval)
    assert all(0 <= float(row["probability"]) <= 1 for row in retrieval)
    with h5py.File(folder / "predictions.h5ad") as file:
        assert file.attrs["encoding-type"] == "anndata"
        assert file["X"].shape == (2 * sum(len(d.cells(*c)) for c in split.test), len(d.genes))


def test_two_processes_with_the_same_seed_write_identical_files(tmp_path, files):
    for name in ("a", "b"):
        process = start(tmp_path, *files, *TINY, "--steps", 5, "--name", name, "--seed", 7, "--method", "ptrag")
        process.join()
        assert process.exitcode == 0
    a, b = tmp_path / "runs" / "a", tmp_path / "runs" / "b"
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    for path in a.iterdir():
        if path.name in ("config.json", "model.pt", "report.html"):                                # these hold the name of the run
            assert path.read_bytes().replace(b'"a"', b'"b"') == (b / path.name).read_bytes() or path.name != "config.json"
        else:
            assert path.read_bytes() == (b / path.name).read_bytes(), path.name
    assert same_weights(a, b)


def test_several_seeds_train_several_models(tmp_path, files):
    assert run(tmp_path, *files, *TINY, "--steps", 3, "--name", "s", "--method", "ptrag", "--seeds", "0,5") == 0
    assert set(torch.load(tmp_path / "runs/s/model.pt", weights_only=True)["models"]) == {"ptrag-0", "ptrag-5"}
    assert {row["seed"] for row in table(tmp_path / "runs/s/retrieval.csv")} == {"0", "5"}


@pytest.mark.parametrize("options", ["--select threshold", "--select sample", "--freeze-generator --causal --rotary", "--keep-query",
                                     "--candidates random", "--selection all", "--hard-negatives 0.6", "--pool full",
                                     "--batch-covariate", "--bf16"])
def test_each_variant_of_the_method_runs_and_changes_the_predictions(tmp_path, files, options):
    options = options.split()
    method = ["--method", "ptrag", "--steps", 3]
    assert run(tmp_path, *files, *TINY, *method, "--name", "plain") == 0
    assert run(tmp_path, *files, *TINY, *method, "--name", "variant", *options) == 0
    cells = []
    for name in ("plain", "variant"):
        with h5py.File(tmp_path / "runs" / name / "predictions.h5ad") as file:
            cells.append(file["X"][:])
    assert cells[0].shape == cells[1].shape and not np.array_equal(*cells) and np.isfinite(cells[1]).all()


def test_several_draws_of_a_sampled_selection_are_shown_with_their_spread(tmp_path, files, capsys):
    assert run(tmp_path, *files, *TINY, "--steps", 3, "--name", "s", "--method", "ptrag", "--select", "sample", "--draws", 3) == 0
    printed = capsys.readouterr().out
    assert "seeds 0.0, 0.1, 0.2" in printed and "±" in printed
    energy = {row["seed"]: row["energy"] for row in table(tmp_path / "runs/s/metrics.csv") if row["method"] == "ptrag"}
    assert len(set(energy.values())) == 3


@pytest.mark.parametrize("name, options", [
    ("norman_mcfaline_4lines.h5ad", ["--split", "cell-line:a172", "--top-k", "4"]),
    ("papalexi_thp1.h5ad", ["--split", "perturbation:0", "--top-k", "4"])])
def test_real_cells_train_and_print_the_table(tmp_path, capsys, name, options):
    if not (SHARED / "data" / name).exists():
        pytest.skip("the real data files are not here")
    embeddings = SHARED / "data" / "go_embeddings.npz"
    assert run(tmp_path, *TINY, "--data", SHARED / "data" / name, "--genept", embeddings, *options, "--steps", 2, "--max-cells", 20) == 0
    printed = capsys.readouterr().out
    assert "ptrag" in printed and "simulated" not in printed
    assert list((tmp_path / "runs").iterdir())[0].name == f"{Path(name).stem}-1"


def test_top_k_beyond_the_pool_is_refused_before_anything_is_trained_or_written(tmp_path, files, capsys):
    assert run(tmp_path, *files, *TINY, "--top-k", 12, "--steps", 2, "--name", "k") == 2
    captured = capsys.readouterr()
    assert "--top-k 12" in captured.err and "step" not in captured.out and not (tmp_path / "runs/k").exists()


def test_predictions_that_are_not_finite_are_not_evaluated(tmp_path, files, capsys):
    assert run(tmp_path, *files, *TINY, "--steps", 1, "--lr", 1e38, "--name", "n", "--method", "state-genept") == 1
    assert "not finite" in capsys.readouterr().err and not (tmp_path / "runs/n/predictions.h5ad").exists()


# --------------------------------------------------------------------------------------------------------- interruption

def test_an_interrupted_and_resumed_run_ends_bit_identical_to_an_undisturbed_one(tmp_path, files):
    options = [*files, *TINY, "--steps", 400, "--checkpoint-every", 20, "--method", "ptrag,state"]
    for name in ("whole", "broken"):
        process = start(tmp_path, *options, "--name", name)
        if name == "broken":
            while not list(tmp_path.glob("runs/broken/checkpoint-ptrag-0.pt")):
                time.sleep(0.02)
            os.kill(process.pid, signal.SIGINT)
        process.join()
        assert process.exitcode == (130 if name == "broken" else 0)
    saved = torch.load(tmp_path / "runs/broken/checkpoint-ptrag-0.pt", weights_only=True)
    assert 0 < saved["step"] < 400 and not (tmp_path / "runs/broken/model.pt").exists()
    process = start(tmp_path, "--resume", "runs/broken")
    process.join()
    assert process.exitcode == 0
    assert same_weights(tmp_path / "runs/whole", tmp_path / "runs/broken")
    for name in ("log.csv", "metrics.csv", "retrieval.csv"):
        assert (tmp_path / "runs/whole" / name).read_bytes() == (tmp_path / "runs/broken" / name).read_bytes()


def test_kill_9_at_twenty_random_moments_loses_only_the_steps_since_the_last_checkpoint(tmp_path, files):
    options = [*files, *TINY, "--steps", 500, "--checkpoint-every", 10, "--method", "ptrag"]
    process = start(tmp_path, *options, "--name", "whole")
    process.join()
    assert process.exitcode == 0
    rng, reached = random.Random(0), 0
    process = start(tmp_path, *options, "--name", "killed")
    for kill in range(20):
        while process.is_alive() and not (tmp_path / "runs/killed/config.json").exists():
            time.sleep(0.02)
        process.join(rng.uniform(0.1, 0.9))
        process.kill()
        process.join()
        for path in (tmp_path / "runs/killed").iterdir():
            if path.suffix == ".pt":
                step = torch.load(path, weights_only=True).get("step", reached)
                assert step >= reached
                reached = step
            elif path.suffix == ".csv":
                assert not table(path) or None not in table(path)[-1].values()
        process = start(tmp_path, "--resume", "runs/killed")
    process.join()
    assert process.exitcode == 0
    assert same_weights(tmp_path / "runs/whole", tmp_path / "runs/killed")
    assert (tmp_path / "runs/whole/log.csv").read_bytes() == (tmp_path / "runs/killed/log.csv").read_bytes()
    assert (tmp_path / "runs/whole/metrics.csv").read_bytes() == (tmp_path / "runs/killed/metrics.csv").read_bytes()


def test_a_run_resumes_with_more_steps_but_not_with_other_options_or_data(tmp_path, files, capsys):
    assert run(tmp_path, *files, *TINY, "--steps", 4, "--method", "ptrag", "--name", "r") == 0
    assert run(tmp_path, "--resume", "runs/r", "--hidden", 16) == 2
    assert "--hidden 8 -> 16" in capsys.readouterr().err
    assert run(tmp_path, "--resume", "runs/r", "--steps", 2) == 2
    assert run(tmp_path, "--resume", "runs/r", "--steps", 6) == 0
    assert [int(row["step"]) for row in table(tmp_path / "runs/r/log.csv")] == [1, 2, 3, 4, 5, 6]
    with h5py.File(files[1], "r+") as file:                                                        # another expression, same names
        file["X"][:] = np.roll(file["X"][:], 1, axis=0)
    assert run(tmp_path, "--resume", "runs/r", "--steps", 8) == 2
    assert "other data" in capsys.readouterr().err
    with h5py.File(files[1], "r+") as file:
        file["X"][:] = np.roll(file["X"][:], -1, axis=0)


def test_a_full_disk_while_saving_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    ptrag.save_tensors(path, {"step": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device", str(path))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        ptrag.save_tensors(path, {"step": 2})
    assert ptrag.load_tensors(path) == {"step": 1} and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_ends_the_program_with_one_line(tmp_path, files, capsys, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))
    monkeypatch.setattr(ptrag, "write_file", full)
    assert run(tmp_path, *files, *TINY, "--steps", 2, "--name", "f") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left" in error and "config.json" in error


def test_numbers_that_are_not_finite_stop_the_run_with_step_condition_and_checkpoint(tmp_path, files, capsys):
    assert run(tmp_path, *files, *TINY, "--steps", 50, "--lr", 1e30, "--name", "d", "--method", "ptrag", "--checkpoint-every", 1) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "step" in error and "condition sim" in error and "checkpoint-ptrag-0.pt" in error
    assert all(torch.isfinite(t).all() for t in torch.load(tmp_path / "runs/d/checkpoint-ptrag-0.pt", weights_only=True)["model"].values())


# ---------------------------------------------------------------------------------------------------- several processes

def _half_gradient(rank, ranks, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    model, inputs, target = gradient_case()
    half = slice(rank * 2, rank * 2 + 2)
    network = torch.nn.parallel.DistributedDataParallel(model)
    gradient_step(network, [part[half] for part in inputs], target[half])
    torch.save({name: weight.grad for name, weight in model.named_parameters()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def gradient_case():
    torch.manual_seed(0)
    embeddings = torch.randn(9, 6)
    model = ptrag.PTRAG(ptrag.Config(method="ptrag", top_k=3, hidden=8, layers=1, dropout=0.0), 10, embeddings, torch.arange(9)).train()
    inputs = [torch.rand(4, 6, 10), torch.tensor([1, 2, 3, 4]), torch.zeros(4, 6, dtype=torch.long), ptrag.gumbel_noise((4, 6, 3, 2))]
    return model, inputs, torch.rand(4, 6, 10)


def gradient_step(network, inputs, target):
    prediction, selection = network(*inputs)
    (ptrag.energy_distance(prediction, target).mean() + 0.1 * selection.weights.abs().mean()).backward()


def test_two_processes_with_half_the_batch_give_the_gradients_of_one_with_the_whole(tmp_path):
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=_half_gradient, args=(rank, 2, str(tmp_path))) for rank in range(2)]
    [process.start() for process in processes]
    model, inputs, target = gradient_case()
    gradient_step(model, inputs, target)
    [process.join() for process in processes]
    for rank in range(2):
        shared = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, weight in model.named_parameters():
            assert torch.allclose(shared[name], weight.grad, rtol=1e-4, atol=1e-6 * weight.grad.abs().max().item()), name


def test_torchrun_with_two_processes_trains_what_one_process_trains_and_one_of_them_writes(tmp_path, files):
    options = [*files, *TINY, "--steps", "4", "--method", "state-genept", "--device", "cpu"]
    assert run(tmp_path, *options, "--name", "one") == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "ptrag.py"), *options,
               "--name", "two"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("conditions train") == 1
    one, two = (torch.load(tmp_path / "runs" / n / "model.pt", weights_only=True)["models"]["state-genept-0"] for n in ("one", "two"))
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-5), name


# ----------------------------------------------------------------------------------------------------------- prediction

@pytest.fixture(scope="module")
def trained(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("trained")
    assert run(folder, *files, *TINY, "--steps", 4, "--name", "m", "--method", "ptrag,state") == 0
    return folder


def test_predict_writes_anndata_for_genes_perturbed_in_the_data_or_not_and_names_what_changes(trained, files, capsys):
    new = next(gene for gene in np.load(files[3])["genes"] if gene not in ptrag.load(trained / "runs/m").perturbations)
    assert run(trained, "--predict", f"GENE003,{new}", "--cell-line", "simB", "--cells", 30, "--model", "runs/m", "-o", "out.h5ad") == 0
    printed = capsys.readouterr().out
    assert f"{new} in simB" in printed and printed.count("changes most") == 2 and printed.count("neighbours used") == 2
    with h5py.File(trained / "out.h5ad") as file:
        assert file["X"].shape == file["layers/control"].shape == (60, 30)
        assert {"perturbation", "cell_line", "control_cell"} <= set(file["obs"])
        assert len(file[f"uns/neighbours/{new}/candidates"][:]) == 3
    d, _ = ptrag.open_data(ptrag.read_config(trained / "runs/m"))
    obs = data.read_obs(trained / "out.h5ad", ["control_cell", "perturbation"])
    with h5py.File(trained / "out.h5ad") as file:
        assert np.array_equal(file["layers/control"][:], d.expression[np.asarray(obs["control_cell"])])
    assert list(obs["perturbation"]) == ["GENE003"] * 30 + [new] * 30


def test_predict_uses_the_selection_asked_for_and_refuses_options_of_training(trained, capsys):
    cells = {}
    for select in ("expected", "threshold", "sample"):
        options = ["--predict", "GENE003", "--cell-line", "simA", "--cells", 20, "--model", "runs/m", "-o", f"{select}.h5ad",
                   "--select", select]
        assert run(trained, *options) == 0
        with h5py.File(trained / f"{select}.h5ad") as file:
            cells[select] = file["X"][:].tobytes()
    assert len(set(cells.values())) == 3
    assert run(trained, *options, "--steps", 10) == 2
    assert "--steps" in capsys.readouterr().err


def test_a_model_predicts_from_a_new_file_when_the_file_it_was_trained_on_has_gone(trained, files, tmp_path):
    config = json.loads((trained / "runs/m/config.json").read_text())
    moved = tmp_path / "m"
    shutil.copytree(trained / "runs/m", moved)
    (moved / "config.json").write_text(json.dumps({**config, "data": "gone.h5", "genept": "gone.npz", "device": "cuda"}))
    options = ["--predict", "GENE003", "--cell-line", "simA", "--cells", 5, "--model", moved, "-o", "out.h5ad", "--data", files[1],
               "--device", "cpu"]
    assert run(tmp_path, *options) == 0


def test_all_predicts_every_perturbation_and_another_method_can_be_chosen(trained):
    options = ["--predict", "all", "--cell-line", "simA", "--cells", 5, "--model", "runs/m", "-o", "all.h5ad", "--method", "state"]
    assert run(trained, *options) == 0
    with h5py.File(trained / "all.h5ad") as file:
        assert file["X"].shape[0] == 14 * 5


def test_four_lines_of_python_load_predict_and_read_the_neighbours(trained):
    d, _ = ptrag.open_data(ptrag.read_config(trained / "runs/m"))
    model = ptrag.load(trained / "runs/m")
    prediction = ptrag.predict(model, d.expression[d.cells(0, 0)], "GENE002")
    neighbours = ptrag.used_candidates(model, "GENE002", prediction.probability)
    assert prediction.cells.shape == (40, 30) and (prediction.cells >= 0).all()
    assert len(neighbours["candidates"]) == 3 and "GENE002" not in neighbours["candidates"]


def test_control_cells_of_a_new_file_are_aligned_by_gene_name(trained, files, tmp_path, capsys):
    d, _ = ptrag.open_data(ptrag.read_config(trained / "runs/m"))
    rows = d.cells(0, 0)
    shuffled = np.random.default_rng(0).permutation(len(d.genes))

    def write(genes, columns):
        labels = {"gene": ["non-targeting"] * len(rows), "cell_line": ["new"] * len(rows)}
        data.write_anndata(tmp_path / "new.h5ad", genes, [(d.expression[rows][:, columns], labels, {})])
    command = ["--data", tmp_path / "new.h5ad", "--predict", "GENE003", "--cell-line", "new", "--cells", len(rows),
               "--model", trained / "runs/m", "-o", tmp_path / "out.h5ad"]
    write([d.genes[i] for i in shuffled], shuffled)
    assert run(tmp_path, *command) == 0
    with h5py.File(tmp_path / "out.h5ad") as file:
        assert np.allclose(file["layers/control"][:], d.expression[rows])
    write([d.genes[i] for i in shuffled[:-2]], shuffled[:-2])
    assert run(tmp_path, *command) == 0
    assert all(d.genes[i] in capsys.readouterr().out for i in shuffled[-1:])                        # the missing ones are named
    write([d.genes[i] for i in shuffled[:10]], shuffled[:10])
    assert run(tmp_path, *command) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------- wrong input

WRONG = {  # one value for every field that cannot be used
    "data": "missing.h5ad", "genept": "missing.npz", "split": "cell_line:simA", "perturbation_column": "nothing",
    "cell_line_column": "nothing", "batch_column": "nothing", "control": "nothing", "hvg": "1", "keep_targets": None,
    "in_memory": None, "method": "ptrga", "top_k": "0",
    "pool": "trian", "candidates": "best", "selection": "some", "select": "expect", "draws": "2",
    "temperature": "0", "sparsity": "-1", "keep_query": None,
    "batch_covariate": None, "hard_negatives": "1.5", "hidden": "0", "layers": "two", "heads": "0", "head_dim": "0", "feed_forward": "0",
    "dropout": "1", "causal": None, "rotary": None, "freeze_generator": None, "cells": "0",
    "sets": "0", "steps": "0", "lr": "nan", "clip": "0",
    "validate_every": "0", "seed": "-1", "seeds": "0,x", "device": "gpu", "bf16": None, "compile": None, "name": "a/b", "resume": "nowhere",
    "checkpoint_every": "0", "checkpoint_minutes": "0", "max_cells": "1", "predict": "GENE003", "cell_line": "simA", "model": "nowhere",
    "output": "nowhere/out.h5ad",
}


@pytest.mark.parametrize("name", [f.name for f in fields(ptrag.Config)])
def test_a_wrong_value_of_every_option_is_one_clear_line_and_exit_status_2(name, tmp_path, files, capsys):
    flag = f"--{name.replace('_', '-')}"
    wrong = [flag, WRONG[name]] if WRONG[name] is not None else [f"{flag}=maybe"]
    given = [] if name in ("resume", "predict", "model", "cell_line", "output") else [*files, *TINY]
    if name in ("data", "genept"):
        given = [*TINY, "--data", "missing.h5ad"] if name == "data" else [*TINY, *files[:2]]
    assert run(tmp_path, *given, *wrong) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert flag in captured.err or WRONG[name] in captured.err
    assert not (tmp_path / "runs").exists()                                                        # refused before anything is written


@pytest.mark.parametrize("options, said", [
    (["--topk", "3"], "--top-k"), (["--top-k", "200", "--steps", "2"], "--top-k"), (["--split", "cell-line:simZ"], "simA"),
    (["--split", "perturbation:7"], "perturbation:"), (["--split", "missing.toml"], "missing.toml"), (["--method", "ptrag,ptrag"], "twice"),
    (["--rotary", "--head-dim", "5"], "even"), (["extra"], "extra"), (["--device", "cuda:99"], "cuda:99"), (["--seeds", "1,1"], "twice")],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value)
def test_wrong_combinations_say_what_to_do(options, said, tmp_path, capsys):
    assert run(tmp_path, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error


def test_misspelt_genes_and_lines_of_predict_are_answered_with_near_names(trained, capsys):
    assert run(trained, "--predict", "gene0003", "--cell-line", "simA", "--model", "runs/m") == 2
    assert "GENE003" in capsys.readouterr().err
    assert run(trained, "--predict", "GENE003", "--cell-line", "simX", "--model", "runs/m") == 2
    assert "simA, simB" in capsys.readouterr().err


class Attack:
    def __reduce__(self):
        return os.system, ("touch attacked",)


def test_a_pickle_in_place_of_a_model_is_refused_and_runs_nothing(trained, capsys, tmp_path):
    model = (trained / "runs/m/model.pt").read_bytes()
    try:
        (trained / "runs/m/model.pt").write_bytes(pickle.dumps(Attack()))
        assert run(trained, "--predict", "GENE003", "--cell-line", "simA", "--model", "runs/m") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "model.pt" in error and not (trained / "attacked").exists()
    finally:
        (trained / "runs/m/model.pt").write_bytes(model)


def test_help_lists_every_option_with_a_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        ptrag.main(["--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    for f in fields(ptrag.Config):
        assert f"--{f.name.replace('_', '-')}" in printed and f.metadata["help"] in printed
