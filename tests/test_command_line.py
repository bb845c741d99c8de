"""The program as its user meets it: options, files of a run, interruption, several processes, prediction."""
import functools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields

import h5py
import numpy as np
import pytest
import torch

from conftest import ROOT, SHARED, data, needs_shared, ptrag, run, table
import evaluate

TINY = "--hidden 8 --layers 1 --heads 2 --feed-forward 16 --cells 8 --sets 4 --top-k 3 --name m".split()
SHORT = "--steps 4 --validate-every 2 --method ptrag,state"
PREDICT = "--predict GENE003 --cell-line simA --cells 5 --model runs/m -o out.h5ad".split()


@pytest.fixture(scope="module")
def made(tmp_path_factory, files):
    """A folder, not to be changed, in which runs/m was made with the options given."""
    @functools.cache
    def made(options):
        folder = tmp_path_factory.mktemp("made")
        assert run(folder, *files, *TINY, *options.split()) == 0
        return folder
    return made


@pytest.fixture
def copy(made, tmp_path):
    """A folder, to be changed, with runs/m of two methods."""
    shutil.copytree(made(SHORT) / "runs/m", tmp_path / "runs/m")
    return tmp_path


@pytest.fixture
def refused(capfd):
    """Runs the program, which must end with one printable line that has the words."""
    def refused(folder, *options, words=(), status=2):
        capfd.readouterr()
        assert run(folder, *options) == status
        line, rest = capfd.readouterr().err.split("\n")
        assert not rest and line.isprintable() and line.startswith("error: " if status < 100 else "stopped")
        assert all(word in line for word in words), line
        return line
    return refused


def start(folder, *options):
    """The program, its output read by nobody, in a process of its own, forked where modules are loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "evaluate"])
    process = context.Process(target=main, args=(folder, options))
    process.start()
    return process


def main(folder, options):
    read, write = os.pipe()
    os.close(read)  # as after `| head`
    sys.stdout, sys.stderr = open(write, "w"), open(folder / "stderr", "w")
    sys.exit(run(folder, *options))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_run(a, b):
    files, others = contents(a), contents(b)
    same = [path for path in files if path.suffix in (".csv", ".h5ad") and files[path] == others.get(path)]
    models, more = (torch.load(folder / "model.pt", weights_only=True)["models"] for folder in (a, b))
    return (files.keys() == others.keys() and len(same) == 5 and models.keys() == more.keys()
            and all(torch.equal(x, more[m][name]) for m in models for name, x in models[m].items()))


def matrix(path, key="X"):
    with h5py.File(path) as file:
        return file[key][:]


def test_without_data_all_methods_are_trained_on_a_simulation_that_is_called_so(tmp_path, capsys):
    torch.set_num_threads(2)
    assert run(tmp_path, *TINY, "--steps", 2, "--max-cells", 12) == 0
    printed = capsys.readouterr().out
    assert "simulated" in printed.splitlines()[0] and torch.get_num_threads() == 1  # the demo's --threads
    rows = {line.split()[0] for line in printed.splitlines() if line}
    assert {*ptrag.METHODS, "no", "other"} <= rows  # "no change", "other real half"
    assert all(heading in printed for heading in ("W1", "W2", "SW1", "SW2", "energy", "r delta"))
    assert re.search(r"step 2/2 .* cells/s +0:00:00 left", printed)


def test_a_run_writes_config_log_model_metrics_retrieval_and_predictions(made):
    folder = made(SHORT) / "runs/m"
    assert json.loads((folder / "config.json").read_text())["top_k"] == 3
    log = table(folder / "log.csv")
    assert [row["method"] + row["step"] for row in log] == [m + s for m in ("ptrag", "state") for s in "1234"]
    assert [row["validation"] != "" for row in log] == [False, True] * 4  # an empty cell is not a number
    saved = torch.load(folder / "model.pt", weights_only=True)
    assert saved["format"] == "model" and set(saved["models"]) == {"ptrag-0", "state-0"}
    d, split = ptrag.open_data(ptrag.read_config(folder))
    conditions = {(d.cell_lines[line], d.perturbations[p]) for line, p in split.test}
    rows = [row for row in table(folder / "metrics.csv") if row["method"] == "ptrag"]
    assert {(row["cell_line"], row["perturbation"]) for row in rows if float(row["energy"]) > 0} == conditions
    rows = [row for row in table(folder / "retrieval.csv") if row["candidate"] != row["perturbation"]]
    assert [0 <= float(row["probability"]) <= 1 for row in rows] == 3 * len(conditions) * [True]
    with h5py.File(folder / "predictions.h5ad") as file:
        assert file.attrs["encoding-type"] == "anndata"
        assert file["X"].shape == (2 * sum(len(d.cells(*c)) for c in split.test), len(d.genes))


def test_several_seeds_train_several_models_and_are_shown_with_their_spread(tmp_path, files, capsys):
    torch.set_num_threads(2)
    assert run(tmp_path, *files, *TINY, *"--steps 3 --method ptrag --seeds 0,5 --threads 1".split()) == 0
    printed, folder = capsys.readouterr().out, tmp_path / "runs/m"
    assert "seeds 0, 5" in printed and "±" in printed and torch.get_num_threads() == 1
    assert set(torch.load(folder / "model.pt", weights_only=True)["models"]) == {"ptrag-0", "ptrag-5"}
    assert {row["seed"] for row in table(folder / "retrieval.csv")} == {"0", "5"}


@pytest.mark.parametrize("options", [
    "--select threshold", "--select sample", "--select all", "--freeze-generator --causal --rotary", "--bf16",
    "--keep-query", "--candidates random", "--pool full", "--batch-covariate", "--method ptrag-expected"])
def test_each_variant_of_the_method_runs_and_changes_the_predictions(made, options):
    folders = made("--method ptrag --steps 3"), made(f"--method ptrag --steps 3 {options}")
    before, after = (matrix(folder / "runs/m/predictions.h5ad") for folder in folders)
    assert before.shape == after.shape and not np.array_equal(before, after) and np.isfinite(after).all()


def test_a_pool_for_test_time_is_used_and_kept_and_hard_negatives_are_its_least_similar_genes(made):
    options = ("", " --test-pool full", " --test-pool full --hard-negatives 0.6")
    plain, full, hard = (made(f"--method ptrag --steps 3{option}") for option in options)
    d, split = ptrag.open_data(ptrag.read_config(plain / "runs/m"))
    model, training = ptrag.load(full / "runs/m"), {d.perturbations[p] for _, p in split.train}
    order, _ = ptrag.retrieve(model.embeddings, model.pool, len(model.pool) - 1)
    assert table(plain / "runs/m/log.csv") == table(full / "runs/m/log.csv")  # training has a pool of its own
    rows = [table(folder / "runs/m/retrieval.csv") for folder in (plain, full, hard)]
    assert {row["candidate"] for row in rows[0]} <= training
    assert not {row["candidate"] for row in rows[1]} <= training
    for near, far in zip(rows[1], rows[2]):  # round(0.6 * 3) = 2 of 3 give way
        best = [model.perturbations[i] for i in order[model.perturbations.index(near["perturbation"])]]
        assert near["candidate"] == best[int(near["rank"]) - 1]
        assert far["candidate"] == (best[-1], best[-2], best[2])[int(far["rank"]) - 1]
    assert run(full, *PREDICT) == 0
    used = matrix(full / "out.h5ad", "uns/neighbours/GENE003/candidates")
    assert used.tolist() == [model.perturbations[i].encode() for i in order[3, :3]]  # GENE003 is number 3


PAPER = dict(freeze_generator=True, layers=8, heads=12, head_dim=58, feed_forward=2784, causal=True,
             rotary=True, batch_covariate=True, select="sample", hidden=128, sets=64, cells=64, lr=1e-3,
             steps=50_001, validate_every=2000, sparsity=1.0, pool="train", test_pool="full")


@pytest.mark.parametrize("preset, own", [
    ("cell-line", dict(top_k=32, sparsity=0.1, pool="full", test_pool="")), ("perturbation", dict(top_k=128)),
    ("norman", dict(top_k=16, steps=10_001, validate_every=500)), ("controls", dict(top_k=32))])
def test_a_preset_is_a_published_experiment_and_options_win(tmp_path, files, monkeypatch, preset, own):
    configs, command = [], [*files, "--method", "ptrag", "--preset", f"paper-{preset}"]
    with monkeypatch.context() as patched:
        patched.setattr(ptrag, "run_training", lambda config, folder=None: configs.append(asdict(config)))
        assert run(tmp_path, *command) == 0
    assert {**configs[0], **PAPER, **own} == configs[0]
    assert run(tmp_path, *command, *TINY, "--steps", 1) == 0
    won = {name.replace("-", "_"): value for name, value in re.findall(r"--(\S+) (\S+)", " ".join(TINY))}
    config = json.loads((tmp_path / "runs/m/config.json").read_text())
    assert {name for name, value in config.items() if value != configs[0][name]} == {*won, "steps"}
    assert config["steps"] == 1 and all(str(config[name]) == value for name, value in won.items())


@needs_shared
@pytest.mark.parametrize("name, split", [
    ("norman_mcfaline_4lines", "cell-line:a172"), ("papalexi_thp1", "perturbation:0")])
def test_real_cells_train_and_print_the_table(tmp_path, capsys, name, split):
    files = ["--data", SHARED / f"data/{name}.h5ad", "--genept", SHARED / "data/go_embeddings.npz"]
    options = "--top-k 4 --steps 2 --max-cells 20 --split".split()
    assert run(tmp_path, *TINY[:-2], *files, *options, split) == 0
    printed = capsys.readouterr().out
    assert "ptrag" in printed and "simulated" not in printed
    assert os.listdir(tmp_path / "runs") == [f"{name}-1"]


@pytest.mark.parametrize("options, words", [
    ("--steps 1 --lr 1e38 --method state-genept", ["finite"]),
    ("--steps 50 --lr 1e30 --method ptrag --checkpoint-every 1", ["step", "condition sim", "checkpoint-"])])
def test_numbers_that_are_not_finite_end_a_run(tmp_path, files, refused, options, words):
    refused(tmp_path, *files, *TINY, *options.split(), words=words, status=1)
    assert not (tmp_path / "runs/m/predictions.h5ad").exists()
    for checkpoint in tmp_path.glob("runs/m/checkpoint-ptrag-0.pt"):  # it is the last good one
        saved = torch.load(checkpoint, weights_only=True)
        assert all(torch.isfinite(weights).all() for weights in saved["model"].values())


def test_runs_started_together_and_read_by_nobody_are_alike_and_share_no_folder(tmp_path, files, refused):
    options = [*files, *TINY[:-2], *"--steps 5 --method ptrag --seed 7".split()]
    processes = [start(tmp_path, *options, *name) for name in (["--name", "one"], ["--name", "one"], [], [])]
    for process in processes:
        process.join()
    assert sorted(process.exitcode for process in processes) == [0, 0, 0, 2] and processes[2].exitcode == 0
    folders = sorted((tmp_path / "runs").iterdir())
    configs = [(folder / "config.json").read_text().replace(folder.name, "") for folder in folders]
    assert [folder.name for folder in folders] == ["one", "small-1", "small-2"] and configs[1] == configs[2]
    assert same_run(folders[0], folders[1]) and same_run(folders[1], folders[2])
    refused(tmp_path, *options, "--name", "one", words=["runs/one", "--resume"])
    with data.locked(folders[0]):
        refused(tmp_path, "--resume", "runs/one", words=["runs/one", "another process"])


def test_after_sigterm_and_twenty_kills_a_run_ends_bit_identical_to_an_undisturbed_one(tmp_path, files):
    options = [*files, *TINY, *"--steps 300 --checkpoint-every 10 --method state,ptrag".split()]
    whole, killed, rng, reached = tmp_path / "whole", tmp_path / "killed", random.Random(0), {}
    whole.mkdir(), killed.mkdir()
    assert run(whole, *options) == 0
    process = start(killed, *options)
    while not (killed / "runs/m/checkpoint-state-0.pt").exists():
        time.sleep(0.01)
    process.terminate()
    process.join()
    assert process.exitcode == 130 and not (killed / "runs/m/model.pt").exists()
    assert (killed / "stderr").read_text() == "stopped; python ptrag.py --resume runs/m continues\n"
    for _ in range(20):
        process = start(killed, "--resume", "runs/m")
        process.join(rng.uniform(0.02, 0.25))
        process.kill()
        process.join()
        for path in killed.glob("runs/m/*.pt"):
            step = torch.load(path, weights_only=True).get("step", 0)
            assert step >= reached.get(path, 0)
            reached[path] = step
        for path in killed.glob("runs/m/*.csv"):
            assert not table(path) or None not in table(path)[-1].values()
    (killed / "runs/m/.model.pt.999999999.tmp").touch()
    assert run(killed, "--resume", "runs/m") == 0
    assert same_run(whole / "runs/m", killed / "runs/m")  # all rows of the log, no temporary file


@pytest.mark.parametrize("owner, name, call, signals, step", [
    (ptrag, "validate", 1, [signal.SIGINT], 2), (ptrag, "validate", 1, [signal.SIGTERM], 2),
    (ptrag, "validate", 2, [signal.SIGINT], 4), (torch, "save", 1, [signal.SIGTERM], 4),  # the last step
    (ptrag, "validate", 1, [signal.SIGINT] * 2, 0), (ptrag, "validate", 2, [signal.SIGTERM] * 2, 0),
    (ptrag, "predict", 1, [signal.SIGINT], 4), (evaluate, "measure", 1, [signal.SIGTERM], 4)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume_and_a_second_stops_at_once(
        tmp_path, files, made, refused, monkeypatch, owner, name, call, signals, step):
    calls, function = [], getattr(owner, name)

    def signalled(*arguments, **options):
        calls.append(name)
        for number in signals if len(calls) == call else ():
            signal.raise_signal(number)
        return function(*arguments, **options)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, signalled)
        said = ["python ptrag.py --resume runs/m"] * (step > 0)  # where a checkpoint is
        refused(tmp_path, *files, *TINY, *SHORT.split(), words=said, status=130)
    saved = [torch.load(path, weights_only=True) for path in tmp_path.glob("runs/m/checkpoint-ptrag-0.pt")]
    assert [(file["format"], file["step"]) for file in saved] == [("checkpoint", step)] * (step > 0)
    assert run(tmp_path, "--resume", "runs/m") == 0
    assert same_run(tmp_path / "runs/m", made(SHORT) / "runs/m")


def test_a_run_resumes_with_more_steps_but_not_with_other_options_or_data(copy, files, refused):
    refused(copy, "--resume", "runs/m", "--hidden", 16, words=["--hidden 8 -> 16"])
    refused(copy, "--resume", "runs/m", "--steps", 2, words=["--steps 4"])
    assert run(copy, "--resume", "runs/m", "--steps", 6) == 0
    log = [row["method"] + row["step"] for row in table(copy / "runs/m/log.csv")]
    assert log == [method + step for method in ("ptrag", "state") for step in "123456"]
    path = copy / "runs/m/config.json"
    config = json.loads(path.read_text())
    assert config["steps"] == 6
    with h5py.File(shutil.copy(files[1], copy / "other.h5ad"), "r+") as file:  # other cells, same names
        file["X"][:] = np.roll(file["X"][:], 1, axis=0)
    for name, device, said in ((files[1], "cuda:99", "cuda:99"), ("other.h5ad", "cpu", "other data")):
        path.write_text(json.dumps({**config, "data": name}))
        refused(copy, "--resume", "runs/m", "--steps", 8, "--device", device, words=[said])
        assert json.loads(path.read_text()) == {**config, "data": name}  # written once it is known to work


@pytest.mark.parametrize("size, options, word", [
    (500, None, "runs/m"), (6_000, ["--resume", "runs/m", "--steps", 5], "checkpoint-ptrag-0.pt"),
    (60_000, ["--resume", "runs/m"], "predictions.h5ad"), (5_000, PREDICT, "out.h5ad")])
def test_a_full_disk_is_one_line_and_keeps_what_was_saved(copy, files, refused, size, options, word):
    resource = pytest.importorskip("resource")
    if not options:
        shutil.rmtree(copy / "runs/m")
    before, limits = contents(copy), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        refused(copy, *(options or [*files, *TINY]), words=[word])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    after = contents(copy)
    assert after.keys() == before.keys() and all(after[p] == before[p] for p in after if p.name == word)


def test_torchrun_with_two_processes_trains_what_one_process_trains_and_one_of_them_writes(tmp_path, files):
    options = "--steps 4 --method state-genept,ptrag --device cpu --group-cells 8 --name".split()
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    assert run(tmp_path, *files, *TINY, *options, "one") == 0
    command = [sys.executable, *torchrun, ROOT / "ptrag.py", *files, *TINY, *options, "two"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and not re.search("Traceback|terminate|abort", done.stderr), done.stderr
    assert done.stdout.count("conditions train") == 1
    folders = [tmp_path / "runs/one", tmp_path / "runs/two"]
    for name in ("checkpoint-state-genept-0.pt", "checkpoint-ptrag-0.pt"):  # with ptrag's dropout and noise
        one, two = (torch.load(folder / name, weights_only=True) for folder in folders)
        assert all(torch.allclose(x, two["model"][key], atol=1e-5) for key, x in one["model"].items())
        for key, state in one["optimizer"]["state"].items():  # the gradients, as Adam averages them
            x, y = state["exp_avg"], two["optimizer"]["state"][key]["exp_avg"]
            assert torch.allclose(x, y, rtol=1e-4, atol=1e-6 * x.abs().max().item())
    logs = ([float(x or 0) for row in table(f / "log.csv") for x in list(row.values())[1:]] for f in folders)
    assert next(logs) == pytest.approx(next(logs), rel=1e-4)


def test_predict_writes_genes_perturbed_in_the_data_or_not_and_names_what_changes(made, simulated, capsys):
    new = next(gene for gene in simulated.embedding_genes if gene not in simulated.perturbations)
    folder, options = made(SHORT), ["--predict", f"GENE003,{new}", "--cell-line", "SIMb", "--cells", 30]
    assert run(folder, *PREDICT, *options) == 0
    printed, file = capsys.readouterr().out, folder / "out.h5ad"
    assert f"{new} in simB" in printed
    assert printed.count("changes most") == printed.count("neighbours used") == 2
    obs = data.read_obs(file, ["control_cell", "perturbation", "cell_line"])
    assert list(obs["perturbation"]) == ["GENE003"] * 30 + [new] * 30 and set(obs["cell_line"]) == {"simB"}
    controls = simulated.expression[np.asarray(obs["control_cell"])]
    assert matrix(file).shape == (60, 30) and np.array_equal(matrix(file, "layers/control"), controls)
    assert len(matrix(file, f"uns/neighbours/{new}/candidates")) == 3

    model = ptrag.load(folder / "runs/m")  # the same in four lines of Python
    prediction = ptrag.predict(model, simulated.expression[simulated.cells(0, 0)], "GENE002")
    neighbours = ptrag.used_candidates(model, "GENE002", prediction.probability)
    assert prediction.cells.shape == (40, 30) and (prediction.cells >= 0).all()
    assert len(neighbours["candidates"]) == 3 and "GENE002" not in neighbours["candidates"]


def test_predict_takes_a_selection_all_genes_another_method_but_no_options_of_training(made, refused):
    folder, cells = made(SHORT), set()
    for select in ("expected", "threshold", "sample"):
        assert run(folder, *PREDICT, "--cells", 20, "--select", select) == 0
        cells.add(matrix(folder / "out.h5ad").tobytes())
    assert len(cells) == 3
    assert run(folder, *PREDICT, "--predict", "all", "--method", "state") == 0
    assert len(matrix(folder / "out.h5ad")) == 14 * 5
    refused(folder, *PREDICT, "--steps", 10, words=["--steps"])
    refused(folder, *PREDICT, "--predict", "gene0003", words=["GENE003"])  # near names answer
    for line in ("simX", ""):
        refused(folder, *PREDICT, "--cell-line", line, words=["simA, simB"])
    for option in ("--predict", "--cell-line", "--model", "-o", "--method", "--data", "--genept"):
        refused(folder, *PREDICT, option, "nul\0\r\x1b[31m.h5ad")


def test_controls_of_a_new_file_are_aligned_by_gene_when_the_old_has_gone(copy, simulated, refused, capfd):
    d, rows, path = simulated, simulated.cells(0, 0), copy / "runs/m/config.json"
    gone = {"data": "gone.h5", "genept": "gone.npz", "device": "cuda"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **gone}))
    command = [*PREDICT, *"--data new.h5ad --device cpu --cells 40 --cell-line".split(), ""]  # the only one
    shuffled = np.random.default_rng(0).permutation(len(d.genes))
    obs = {"gene": ["ctrl"] * 40, "cell_line": ["new"] * 40}
    for kept in (30, 28, 10):
        columns, missing = shuffled[:kept], [d.genes[i] for i in shuffled[kept:]]
        cells, genes = d.expression[rows][:, columns], [d.genes[i] for i in columns]
        data.write_anndata(copy / "new.h5ad", genes, obs, [(slice(None), {"X": cells})], 40)
        if kept > 10:
            assert run(copy, *command) == 0
            assert set(missing) <= set(re.findall(r"\w+", capfd.readouterr().out))
            assert np.allclose(matrix(copy / "out.h5ad", "layers/control")[:, columns], cells)
    refused(copy, *command)
    (copy / "runs/m/model.pt").unlink()
    refused(copy, *PREDICT, words=["model.pt", "--resume runs/m finishes"])


def test_a_prediction_is_not_written_over_what_it_is_made_from(copy, files, refused):
    names, path = [str(shutil.copy(files[i], copy)) for i in (1, 3)], copy / "runs/m/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "data": names[0], "genept": names[1]}))
    os.link(names[0], copy / "link.h5ad")
    (copy / "device").symlink_to(os.devnull)
    before = contents(copy)
    for output in (*names, "link.h5ad", "runs/m/model.pt", "runs/m/config.json", "runs/m", "device"):
        refused(copy, *PREDICT, "-o", output, words=[output])
        refused(copy, *PREDICT, "-o", output, "--data", names[0], "--genept", names[1], words=[output])
    assert contents(copy) == before


WRONG = {  # one value for every field that cannot be used
    "data": "missing.h5ad", "genept": "missing.npz", "split": "cell_line:simA",
    "perturbation_column": "nothing", "cell_line_column": "nothing", "batch_column": "nothing",
    "control": "nothing", "hvg": "1", "seeds": "0,x", "method": "ptrga", "top_k": "0", "pool": "trian",
    "test_pool": "all", "candidates": "best", "lr": "nan", "select": "expect", "preset": "paper",
    "temperature": "0", "sparsity": "-1", "hard_negatives": "1.5", "hidden": "0", "layers": "two",
    "heads": "0", "head_dim": "0", "feed_forward": "0", "dropout": "1", "cells": "0", "sets": "0",
    "steps": "0", "clip": "0", "validate_every": "0", "group_cells": "-1", "seed": "-1", "device": "gpu",
    "threads": "-1", "name": "a/b", "resume": "nowhere", "checkpoint_every": "0", "max_cells": "1",
    "predict": "GENE003", "cell_line": "simA", "model": "nowhere", "output": "nowhere/out.h5ad"}


@pytest.mark.parametrize("name", [f.name for f in fields(ptrag.Config)])
def test_a_wrong_value_of_every_option_is_one_clear_line_and_exit_status_2(name, tmp_path, files, refused):
    flag, value = f"--{name.replace('_', '-')}", WRONG.get(name, "maybe")
    given = [] if name in ("resume", "predict", "model", "cell_line", "output") else [*files, *TINY]
    given = {"data": TINY, "genept": [*TINY, *files[:2]]}.get(name, given)
    whole = type(getattr(ptrag.Config, name)) is int and name != "group_cells"
    for wrong in [value, f"{value}\n\x1b[31mred", *["10000000000", "1e10", "²"][:3 * whole]]:
        line = refused(tmp_path, *given, *([flag, wrong] if name in WRONG else [f"{flag}={wrong}"]))
        assert flag in line or value in line
    assert not (tmp_path / "runs").exists()  # refused before anything is written


@pytest.mark.parametrize("options, said", [
    ("--topk 3", "--top-k"), ("--top-k 200 --steps 2", "--top-k 200"), ("--split cell-line:simZ", "simA"),
    ("--split perturbation:7", "perturbation:"), ("--split missing.toml", "missing.toml"),
    ("extra", "extra"), ("--method ptrag,ptrag", "twice"), ("--seeds 1,1", "twice"), ("--seeds ²", "²"),
    ("--seeds 1e10", "--seeds"), ("--device cuda:99", "cuda:99"), ("--device cpu:", "cpu:"),
    ("--device cuda:", "cuda:"), ("--device cuda:²", "²"), ("--seeds 10000000000", "--seeds"),
    ("--top-k 80 --steps 2 --test-pool trainval", "--top-k 80"), ("--rotary --head-dim 5", "even"),
    ("--name ..", "--name"), ("--name " + 300 * "x", "xxx"), ("--name nul\0", "--name"),
    ("--data nul\0.h5", "nul"), ("--resume nul\0", "nul")])
def test_wrong_combinations_say_what_to_do_before_anything_is_written(options, said, tmp_path, refused):
    refused(tmp_path, *options.split(" "), words=[said])
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("damage", "weight name directory half short empty pickle format".split())
@pytest.mark.parametrize("file, other, command", [
    ("model.pt", "checkpoint-state-0.pt", PREDICT),
    ("checkpoint-state-0.pt", "model.pt", ["--resume", "runs/m", "--steps", "9"])])
def test_a_damaged_or_foreign_model_or_checkpoint_is_refused_and_runs_nothing(
        copy, refused, file, other, command, damage):
    path = copy / "runs/m" / file
    raw, saved = path.read_bytes(), torch.load(path, weights_only=True)
    weight = saved.get("model", saved.get("models", {}).get("state-0"))["output.weight"].numpy().tobytes()
    place = raw.rindex({"name": b"output.weight", "directory": b"PK\1\2"}.get(damage, weight[:40]))
    flipped = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1:]
    whole = {"empty": b"", "half": raw[:len(raw) // 2], "short": raw[:-10],
             "pickle": b"cos\nsystem\n(S'touch attacked'\ntR.", "format": (path.parent / other).read_bytes()}
    path.write_bytes(whole.get(damage, flipped))
    before = contents(copy)
    refused(copy, *command, words=[file])
    assert contents(copy) == before


def test_a_config_that_is_damaged_or_contradicts_the_model_is_refused(copy, refused):
    path = copy / "runs/m/config.json"
    config = json.loads(path.read_text())
    texts = ["", "[]", "null", "{", "7", "\xff", "[" * 100_000, json.dumps({**config, "unknown": 1})]
    for name, value in config.items():
        wrong = {"a": 1}, None, [value], float("nan"), not value, 1 if isinstance(value, str) else str(value)
        texts += [json.dumps({**config, name: other}) for other in wrong if type(other) is not type(value)]
    changes = ({"hidden": 16}, {"layers": 2}, {"batch_covariate": True})  # not what it was trained with
    for text in [*texts, *(json.dumps({**config, **change}) for change in changes)]:
        path.write_text(text, encoding="latin-1")
        for command in (["--resume", "runs/m", "--steps", 9], PREDICT):
            refused(copy, *command, words=["runs/m/config.json"])


def test_help_lists_every_option_with_a_line_in_groups(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        ptrag.main(["--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    for f in fields(ptrag.Config):
        assert f"--{f.name.replace('_', '-')}" in printed and f.metadata["help"] in printed
    groups = re.findall(r"^(\w+):$", printed, re.M)[1:]
    assert groups == ["method", "sizes", "training", "data", "run", "prediction"]
