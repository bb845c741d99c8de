"""The program as its user meets it: options, files of a run, interruption, several processes, prediction."""
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
from unittest.mock import patch

import h5py
import numpy as np
import pytest
import torch

from conftest import ROOT, SHARED, data, needs_shared, ptrag, run, table
import evaluate

SIZES = dict(hidden=8, layers=1, heads=2, feed_forward=16, cells=8, sets=4, top_k=3, name="m")
TINY = " ".join(f"{ptrag.flag(name)} {size}" for name, size in SIZES.items())
UNNAMED = TINY.removesuffix(" --name m")
RESUME = "--resume runs/m"
load = functools.partial(torch.load, weights_only=True)
SHORT = "--steps 4 --validate-every 2 --method ptrag,state"
PREDICT = "--predict GENE003 --cell-line simA --cells 5 --model runs/m -o out.h5ad"


@pytest.fixture(scope="module")
def made(tmp_path_factory, files):
    """A folder, not to be changed, in which runs/m was made with the options given, and what was printed."""
    @functools.cache
    def made(options):
        folder = tmp_path_factory.mktemp("made")
        with open(folder / "printed", "w") as printed, contextlib.redirect_stdout(printed):
            assert run(folder, *files, TINY, options) == 0
        return folder
    return made


@pytest.fixture
def copy(made, tmp_path):
    """A folder, to be changed, with runs/m of two methods."""
    return shutil.copytree(made(SHORT) / "runs", tmp_path / "runs").parent


@pytest.fixture
def refused(capfd):
    """Runs the program, which must end with one printable line that has the words, and with status 2 leave
    the files of the folder as they were, but for those named as changed."""
    def refused(folder, *options, words=(), status=2, changed=()):
        before, _ = contents(folder, changed), capfd.readouterr()
        assert run(folder, *options) == status
        line, rest = capfd.readouterr().err.split("\n")
        assert not rest and line.isprintable() and line.startswith("error: " if status < 100 else "stopped")
        assert all(word in line for word in words), line
        assert status != 2 or contents(folder, changed) == before
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


def contents(folder, without=()):
    return {path.relative_to(folder): path.is_file() and path.read_bytes()
            for path in folder.rglob("*") if path.name not in without}


def same_run(a, b):
    """The same files, the same bytes in tables, predictions and weights."""
    files, others = contents(a), contents(b)
    return files.keys() == others.keys() and all(
        files[path] == others[path] for path in files if re.search("csv|h5ad|model.pt", path.name))


def changed_config(folder, **changes):
    """The config of runs/m with changes, which are written."""
    path = folder / "runs/m/config.json"
    path.write_text(json.dumps(config := {**json.loads(path.read_text()), **changes}))
    return config


def matrix(path, key="X"):
    with h5py.File(path) as file:
        return file[key][:]


def test_without_data_all_methods_are_trained_on_a_simulation_that_is_called_so(tmp_path, capsys):
    torch.set_num_threads(2)
    assert run(tmp_path, TINY, "--steps 2 --max-cells 12") == 0
    printed = capsys.readouterr().out
    assert "simulated" in printed.splitlines()[0] and torch.get_num_threads() == 1  # the demo's --threads
    rows = {line.split()[0] for line in printed.splitlines() if line}
    assert {*ptrag.METHODS, "no", "other"} <= rows  # "no change", "other real half"
    assert all(heading in printed for heading in ("W1", "W2", "SW1", "SW2", "energy", "r delta"))
    assert re.search(r"step 1/2 .* 0:00:\d\d left\n(.*\n)*.* step 2/2 .* cells/s +0:00:00 left", printed)


def test_a_run_of_methods_and_seeds_writes_config_log_model_metrics_retrieval_and_predictions(made):
    torch.set_num_threads(2)
    folder, pairs = made(f"{SHORT} --seeds 0,5 --threads 1"), ["ptrag-0", "state-0", "ptrag-5", "state-5"]
    printed, folder = (folder / "printed").read_text(), folder / "runs/m"
    assert "seeds 0, 5" in printed and "±" in printed and torch.get_num_threads() == 1
    saved, log = load(folder / "model.pt"), table(folder / "log.csv")
    assert saved["format"] == "model" and [*saved["models"]] == pairs
    weights = [model["output.weight"] for model in saved["models"].values()]
    assert not any(map(torch.equal, weights[:2], weights[2:]))  # another seed, other weights
    steps = [f"{row['method']}-{row['seed']}, {row['step']}" for row in log]
    assert steps == [f"{pair}, {step}" for pair in pairs for step in "1234"]
    assert [row["validation"] != "" for row in log] == [False, True] * 8  # an empty cell is not a number
    d, split = ptrag.open_data(ptrag.read_config(folder))
    tested = {(s, d.cell_lines[line], d.perturbations[p]) for line, p in split.test for s in "05"}
    rows = [row for row in table(folder / "metrics.csv") if float(row["energy"]) > 0]
    keys = [(row["seed"], row["cell_line"], row["perturbation"]) for row in rows if row["method"] == "ptrag"]
    assert len(keys) == len(tested) and {*keys} == tested
    rows = [row for row in table(folder / "retrieval.csv") if row["candidate"] != row["perturbation"]]
    assert [0 <= float(row["probability"]) <= 1 for row in rows] == 3 * len(tested) * [True]
    assert {row["seed"] for row in rows} == {"0", "5"}
    cells = 4 * sum(len(d.cells(*condition)) for condition in split.test)
    assert matrix(folder / "predictions.h5ad").shape == (cells, len(d.genes))


@pytest.mark.parametrize("left, step, said", [
    (3000, 1e-3, ""), (7200, 1e-3, ".*2.0 hours; less: --steps.*\n"), (9, 1, "2 threads .*--threads 1.*\n")])
def test_a_long_run_and_one_that_busy_cores_slow_down_are_told_what_helps(left, step, said, capsys):
    torch.set_num_threads(2)
    ptrag.advise(step, left, lambda: time.sleep(0.01), torch.device("cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert threads == 2 and re.fullmatch(said, capsys.readouterr().out)


@pytest.mark.parametrize("options", [
    "--select threshold", "--select sample", "--select all", "--freeze-generator --causal --rotary", "--bf16",
    "--keep-query", "--candidates random", "--pool full", "--batch-covariate", "--method ptrag-expected"])
def test_each_variant_of_the_method_runs_and_changes_the_predictions(made, options):
    folders = made("--method ptrag --steps 3"), made(f"--method ptrag --steps 3 {options}")
    before, after = (matrix(folder / "runs/m/predictions.h5ad") for folder in folders)
    assert before.shape == after.shape and not np.array_equal(before, after) and np.isfinite(after).all()


def test_a_pool_for_test_time_is_used_and_kept_and_hard_negatives_are_its_least_similar_genes(made):
    folders = [made(f"--method ptrag --steps 3{option}") / "runs/m" for option in (
        "", " --test-pool full", " --test-pool full --hard-negatives 0.6")]
    logs, rows = ([table(folder / name) for folder in folders] for name in ("log.csv", "retrieval.csv"))
    assert logs[0] == logs[1]  # training has a pool of its own
    d, split = ptrag.open_data(ptrag.read_config(folders[0]))
    training, model = {d.perturbations[p] for _, p in split.train}, ptrag.load(folders[1])
    assert [{row["candidate"] for row in found} <= training for found in rows[:2]] == [True, False]
    assert model.pool.tolist() == [*range(1, len(d.perturbations))]
    order, _ = ptrag.retrieve(model.embeddings, model.pool, len(model.pool) - 1)
    for near, far in zip(*rows[1:], strict=True):  # round(0.6 * 3) = 2 of 3 give way
        best = [d.perturbations[i] for i in order[d.perturbations.index(near["perturbation"])]]
        rank = int(near["rank"]) - 1
        assert (near["candidate"], far["candidate"]) == (best[rank], best[(-1, -2, 2)[rank]])
    assert run(folders[1].parents[1], PREDICT) == 0
    used = matrix(folders[1].parents[1] / "out.h5ad", "uns/neighbours/GENE003/candidates")
    assert used.tolist() == [d.perturbations[i].encode() for i in order[3, :3]]  # GENE003 is number 3


PAPER = dict(freeze_generator=True, layers=8, heads=12, head_dim=58, feed_forward=2784, causal=True,
             rotary=True, batch_covariate=True, select="sample", hidden=128, sets=64, cells=64, lr=1e-3,
             steps=50_001, validate_every=2000, sparsity=1.0, pool="train", test_pool="full")


@pytest.mark.parametrize("preset, own", {
    "paper-cell-line": dict(top_k=32, sparsity=0.1, pool="full", test_pool=""),
    "paper-perturbation": dict(top_k=128), "paper-controls": dict(top_k=32),
    "paper-norman": dict(top_k=16, steps=10_001, validate_every=500)}.items())
def test_a_preset_is_a_published_experiment_and_options_win(tmp_path, files, preset, own):
    command = [*files, "--method", "ptrag", "--preset", preset]
    published = ptrag.Config("ptrag", data=files[1], genept=files[3], preset=preset, **{**PAPER, **own})
    assert ptrag.configure(command)[0] == published
    assert run(tmp_path, *command, TINY, "--steps 1") == 0
    config = json.loads((tmp_path / "runs/m/config.json").read_text())
    assert config == {**asdict(published), **SIZES, "steps": 1}


@needs_shared
@pytest.mark.parametrize("name, split", [
    ("norman_mcfaline_4lines", "cell-line:a172"), ("papalexi_thp1", "perturbation:0")])
def test_real_cells_train_and_print_the_table(tmp_path, capsys, name, split):
    files = ["--data", SHARED / f"data/{name}.h5ad", "--genept", SHARED / "data/go_embeddings.npz"]
    assert run(tmp_path, *files, UNNAMED, "--steps 2 --max-cells 20 --split", split) == 0
    printed = capsys.readouterr().out
    assert "ptrag" in printed and "simulated" not in printed
    assert os.listdir(tmp_path / "runs") == [f"{name}-1"]


@pytest.mark.parametrize("options, words", [
    ("--steps 1 --lr 1e38 --method state-genept", ["finite"]),
    ("--steps 50 --lr 1e30 --method ptrag --checkpoint-every 1", ["step", "condition sim", "checkpoint-"])])
def test_numbers_that_are_not_finite_end_a_run(tmp_path, files, refused, options, words):
    refused(tmp_path, *files, TINY, options, words=words, status=1)
    assert not (tmp_path / "runs/m/predictions.h5ad").exists()
    for checkpoint in tmp_path.glob("runs/m/checkpoint-ptrag-0.pt"):  # it is the last good one
        assert all(torch.isfinite(weights).all() for weights in load(checkpoint)["model"].values())


def test_runs_started_together_and_read_by_nobody_are_alike_and_share_no_folder(tmp_path, files, refused):
    options = [*files, UNNAMED, "--steps 5 --method ptrag --seed 7"]
    processes = [start(tmp_path, *options, *name) for name in (["--name one"], ["--name one"], [], [])]
    for process in processes:
        process.join()
    assert sorted(process.exitcode for process in processes) == [0, 0, 0, 2] and processes[2].exitcode == 0
    folders = sorted((tmp_path / "runs").iterdir())
    configs = [(folder / "config.json").read_text().replace(folder.name, "") for folder in folders]
    assert [folder.name for folder in folders] == ["one", "small-1", "small-2"] and configs[1] == configs[2]
    assert same_run(folders[0], folders[1]) and same_run(folders[1], folders[2])
    refused(tmp_path, *options, "--name one", words=["runs/one", "--resume"])
    with data.locked(folders[0]):
        refused(tmp_path, "--resume runs/one", words=["runs/one", "another process"])


def test_after_sigterm_and_twenty_kills_a_run_ends_bit_identical_to_an_undisturbed_one(tmp_path, made, files):
    whole, reached = made(options := "--steps 300 --checkpoint-every 10 --method state,ptrag"), {}
    process = start(tmp_path, *files, TINY, options)
    while not (tmp_path / "runs/m/checkpoint-state-0.pt").exists():
        time.sleep(0.01)
    process.terminate()
    process.join()
    assert process.exitcode == 130 and not (tmp_path / "runs/m/model.pt").exists()
    assert (tmp_path / "stderr").read_text() == "stopped; python ptrag.py --resume runs/m continues\n"
    for seconds in np.random.default_rng(0).uniform(0.02, 0.25, 20):
        process = start(tmp_path, RESUME)
        process.join(seconds)
        process.kill()
        process.join()
        steps = {path: load(path).get("step", 0) for path in tmp_path.glob("runs/m/*.pt")}
        assert all(steps[path] >= step for path, step in reached.items())
        reached = steps
        rows = [row for path in tmp_path.glob("runs/m/*.csv") for row in table(path)]
        assert all(None not in row.values() for row in rows)
    assert run(tmp_path, RESUME) == 0
    assert same_run(whole / "runs/m", tmp_path / "runs/m")  # all rows of the log, no temporary file


@pytest.mark.parametrize("owner, name, call, signals, step", [
    (ptrag, "validate", 1, [signal.SIGINT], 2), (ptrag, "validate", 1, [signal.SIGTERM], 2),
    (ptrag, "validate", 2, [signal.SIGINT], 4), (torch, "save", 1, [signal.SIGTERM], 4),  # the last step
    (ptrag, "validate", 1, [signal.SIGINT] * 2, 0), (ptrag, "validate", 2, [signal.SIGTERM] * 2, 0),
    (ptrag, "predict", 1, [signal.SIGINT], 4), (evaluate, "measure", 1, [signal.SIGTERM], 4)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume_and_a_second_stops_at_once(
        tmp_path, files, made, refused, owner, name, call, signals, step):
    calls, function = itertools.count(1), getattr(owner, name)

    def signalled(*arguments, **options):
        for number in signals if next(calls) == call else ():
            signal.raise_signal(number)
        return function(*arguments, **options)
    with patch.object(owner, name, signalled):
        said = [f"python ptrag.py {RESUME}"] * (step > 0)  # where a checkpoint is
        refused(tmp_path, *files, TINY, SHORT, words=said, status=130)
    saved = [*map(load, tmp_path.glob("runs/m/checkpoint-ptrag-0.pt"))]
    assert [(file["format"], file["step"]) for file in saved] == [("checkpoint", step)] * (step > 0)
    assert run(tmp_path, RESUME) == 0
    assert same_run(tmp_path / "runs/m", made(SHORT) / "runs/m")


def test_a_run_resumes_with_more_steps_but_not_with_other_data(copy, files, refused):
    assert run(copy, RESUME, "--steps 6") == 0
    log = [row["method"] + row["step"] for row in table(copy / "runs/m/log.csv")]
    assert log == [method + step for method in ("ptrag", "state") for step in "123456"]
    with h5py.File(shutil.copy(files[1], copy / "other.h5ad"), "r+") as file:  # other cells, same names
        file["X"][:] = np.roll(file["X"][:], 1, axis=0)
    for name, device, said in ((files[1], "cuda:99", "cuda:99"), ("other.h5ad", "cpu", "other data")):
        assert changed_config(copy, data=name)["steps"] == 6
        refused(copy, RESUME, "--steps 8 --device", device, words=[said])


@pytest.mark.parametrize("size, options, word, changed", [
    (500, f"{TINY} --name new --steps 2 --method state", "runs/new", ["new", ".lock"]),
    (5_000, PREDICT, "out.h5ad", []),
    (6_000, f"{RESUME} --steps 5", "checkpoint-ptrag-0.pt", ["config.json", "log.csv"]),
    (60_000, RESUME, "predictions.h5ad", [])])
def test_a_full_disk_is_one_line_and_keeps_what_was_saved(copy, refused, size, options, word, changed):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        refused(copy, options, words=[word], changed=changed)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run(copy, options) == 0  # with room it works, under the same name


def test_torchrun_with_two_processes_trains_what_one_process_trains_and_one_writes(tmp_path, made, files):
    options = "--steps 4 --method state-genept,ptrag --device cpu --group-cells 8"
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    command = [sys.executable, *torchrun, ROOT / "ptrag.py", *files, *TINY.split(), *options.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and not re.search("Traceback|terminate|abort", done.stderr), done.stderr
    assert done.stdout.count("conditions train") == 1
    folders = [folder / "runs/m" for folder in (made(options), tmp_path)]
    for name in ("checkpoint-state-genept-0.pt", "checkpoint-ptrag-0.pt"):  # with ptrag's dropout and noise
        one, two = (load(folder / name) for folder in folders)
        torch.testing.assert_close(two["model"], one["model"], rtol=1e-5, atol=1e-5)
        for key, state in one["optimizer"]["state"].items():  # the gradients, as Adam averages them
            x, y = state["exp_avg"], two["optimizer"]["state"][key]["exp_avg"]
            assert torch.allclose(x, y, rtol=1e-4, atol=1e-6 * x.abs().max().item())
    logs = ([float(x or 0) for row in table(f / "log.csv") for x in list(row.values())[1:]] for f in folders)
    assert next(logs) == pytest.approx(next(logs), rel=1e-4)


def test_predict_writes_genes_perturbed_in_the_data_or_not_and_names_what_changes(made, simulated, capsys):
    new = next(gene for gene in simulated.embedding_genes if gene not in simulated.perturbations)
    file = made(SHORT) / "out.h5ad"
    assert run(file.parent, PREDICT, f"--predict GENE003,{new} --cell-line SIMb --cells 30") == 0
    printed = capsys.readouterr().out
    assert f"{new} in simB" in printed
    assert re.search("in its test ptrag stood at .*--select expected", printed)
    assert printed.count("changes most") == printed.count("neighbours used") == 2
    obs = data.read_obs(file, ["control_cell", "perturbation", "cell_line"])
    assert list(obs["perturbation"]) == ["GENE003"] * 30 + [new] * 30 and set(obs["cell_line"]) == {"simB"}
    controls = simulated.expression[obs["control_cell"].astype(int)]
    assert matrix(file).shape == (60, 30) and np.array_equal(matrix(file, "layers/control"), controls)
    assert len(matrix(file, f"uns/neighbours/{new}/candidates")) == 3
    cells = set()
    for select in ("expected", "threshold", "sample"):
        assert run(file.parent, PREDICT, "--cells 20 --select", select) == 0
        cells.add(matrix(file).tobytes())
    assert len(cells) == 3
    assert run(file.parent, PREDICT, "--predict all --method state") == 0
    assert len(matrix(file)) == 14 * 5


def test_predict_selects_as_the_run_was_tested_unless_told(copy):
    cells = []
    for run_select, told in (("expected", "--select sample"), ("sample", "--seed 0"),
                             ("sample", "--select threshold"), ("sample", "--select expected")):
        changed_config(copy, select=run_select)
        assert run(copy, PREDICT, "--cells 20", told) == 0
        cells.append(matrix(copy / "out.h5ad").tobytes())
    assert cells[0] == cells[1] and len({*cells}) == 3


def test_controls_of_a_new_file_are_aligned_by_gene_when_the_old_has_gone(copy, simulated, refused, capfd):
    d, rows, shuffled = simulated, simulated.cells(0, 0), np.random.default_rng(0).permutation(30)
    changed_config(copy, data="gone.h5", genept="gone.npz", device="cuda")
    command = f"{PREDICT} --data new.h5ad --device cpu --cells 40 --cell-line "  # the only one
    obs = {"gene": ["ctrl"] * 40, "cell_line": ["new"] * 40}
    for kept in (30, 28, 10):
        columns, missing = shuffled[:kept], {d.genes[i] for i in shuffled[kept:]}
        cells, genes = d.expression[rows][:, columns], [d.genes[i] for i in columns]
        data.write_anndata(copy / "new.h5ad", genes, obs, [(slice(None), {"X": cells})], 40)
        if kept > 10:
            assert run(copy, command) == 0
            assert missing <= set(re.findall(r"\w+", capfd.readouterr().out))
            assert np.allclose(matrix(copy / "out.h5ad", "layers/control")[:, columns], cells)
    refused(copy, command)
    (copy / "runs/m/model.pt").unlink()
    refused(copy, PREDICT, words=["model.pt", f"{RESUME} finishes"])


def test_a_prediction_is_not_written_over_what_it_is_made_from(copy, files, refused):
    names = [str(shutil.copy(files[i], copy)) for i in (1, 3)]
    changed_config(copy, data=names[0], genept=names[1])
    os.link(names[0], copy / "link.h5ad")
    (copy / "device").symlink_to(os.devnull)
    for output in (*names, "link.h5ad", "runs/m/model.pt", "runs/m/config.json", "runs/m", "device"):
        for given in ("", f" --data {names[0]} --genept {names[1]}"):
            refused(copy, f"{PREDICT} -o {output}{given}", words=[output])


WRONG = dict(  # for fields where "0", "maybe" (a switch) or "nowhere" (a text) would not be a near miss
    method="ptrga", split="cell_line:simA", pool="trian", select="expect", preset="paper", seeds="0,x",
    data="missing.h5ad", genept="missing.npz", name="a/b", output="nowhere/out.h5ad", lr="nan", layers="two",
    dropout="1", hard_negatives="1.5", hvg="1", max_cells="1", sparsity="-1", group_cells="-1", seed="-1",
    threads="-1")


@pytest.mark.parametrize("field", fields(ptrag.Config), ids=lambda field: field.name)
def test_a_wrong_value_of_every_option_is_one_clear_line_and_exit_status_2(field, tmp_path, files, refused):
    name, flag, kind = field.name, ptrag.flag(field.name), type(field.default)
    value = WRONG.get(name, {str: "nowhere", bool: "maybe"}.get(kind, "0"))
    given = [] if name in ("resume", "predict", "model", "cell_line", "output") else [*files, TINY]
    given = {"data": [TINY], "genept": [TINY, *files[:2]]}.get(name, given)
    whole = kind is int and name != "group_cells"
    for wrong in [value, f"{value}\n\x1b[31mred", *["10000000000", "1e10", "²"][:3 * whole]]:
        line = refused(tmp_path, *given, f"{flag}={wrong}" if kind is bool else f"{flag} {wrong}")
        assert flag in line or value in line


@pytest.mark.parametrize("options, said", [
    ("--topk 3", "--top-k"), ("--top-k 200 --steps 2", "--top-k 200"), ("--split cell-line:simZ", "simA"),
    ("--split perturbation:7", "perturbation:"), ("--split missing.toml", "missing.toml"),
    ("extra", "extra"), ("--method ptrag,ptrag", "twice"), ("--seeds 1,1", "twice"), ("--seeds ²", "²"),
    ("--seeds 1e10", "--seeds"), ("--device cuda:99", "cuda:99"), ("--device cpu:", "cpu:"),
    ("--device cuda:", "cuda:"), ("--device cuda:²", "²"), ("--seeds 10000000000", "--seeds"),
    ("--top-k 80 --steps 2 --test-pool trainval", "--top-k 80"), ("--rotary --head-dim 5", "even"),
    ("--name ..", "--name"), ("--name " + 300 * "x", "xxx"), ("--name nul\0", "--name"),
    ("--data nul\0.h5", "nul"), ("--resume nul\0", "nul"), (f"{RESUME} --hidden 16", "--hidden 8 -> 16"),
    (f"{RESUME} --steps 2", "--steps 4"), (f"{PREDICT} --steps 10", "--steps"),
    (f"{PREDICT} --predict gene0003", "GENE003"), (f"{PREDICT} --cell-line simX", "simA, simB"),
    (f"{PREDICT} --cell-line ", "simA, simB"), *[
        (f"{PREDICT} {option} nul\0\r\x1b[31m.h5ad", "nul")
        for option in ("--predict", "--cell-line", "--model", "-o", "--method", "--data", "--genept")]])
def test_wrong_combinations_say_what_to_do_before_anything_is_written(options, said, copy, refused):
    refused(copy, options, words=[said])


@pytest.mark.parametrize("file, other, command", [
    ("model.pt", "checkpoint-state-0.pt", PREDICT),
    ("checkpoint-state-0.pt", "model.pt", f"{RESUME} --steps 9")])
def test_a_damaged_or_foreign_model_or_checkpoint_is_refused_and_not_run(copy, refused, file, other, command):
    path = copy / "runs/m" / file
    raw, saved, system = path.read_bytes(), load(path), b"cos\nsystem\n(S'touch attacked'\ntR."
    damaged = [b"", raw[:len(raw) // 2], raw[:-10], system, (path.parent / other).read_bytes()]
    weights = saved.get("model", saved.get("models", {}).get("state-0"))
    for some in (weights["output.weight"].numpy().tobytes()[:40], b"output.weight", b"PK\1\2"):  # a bit of it
        before, _, after = raw.rpartition(some)
        damaged.append(before + bytes([some[0] ^ 1]) + some[1:] + after)
    for content in damaged:
        path.write_bytes(content)
        refused(copy, command, words=[file])


def test_a_config_that_is_damaged_or_contradicts_the_model_is_refused(copy, refused):
    path, config = copy / "runs/m/config.json", changed_config(copy)
    texts = ["", "[]", "null", "{", "7", "\xff", "[" * 100_000]
    changes = [{"unknown": 1}, {"hidden": 16}, {"layers": 2}, {"batch_covariate": True}]  # not as trained
    for name, value in config.items():
        wrong = {"a": 1}, None, [value], float("nan"), not value, 1 if isinstance(value, str) else str(value)
        changes += [{name: other} for other in wrong if type(other) is not type(value)]
    for text in [*texts, *(json.dumps({**config, **change}) for change in changes)]:
        path.write_text(text, encoding="latin-1")
        for command in (f"{RESUME} --steps 9", PREDICT):
            refused(copy, command, words=["runs/m/config.json"])


def test_help_lists_every_option_with_a_line_in_groups(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="^0$"):
        ptrag.main(["--help"])
    printed = capsys.readouterr().out
    for f in fields(ptrag.Config):
        assert f"--{f.name.replace('_', '-')}" in printed and f.metadata["help"] in printed
    groups = re.findall(r"^(\w+):$", printed, re.M)[1:]
    assert groups == ["method", "sizes", "training", "data", "run", "prediction"]
