"""Bad input ends with one line that names the file and exit status 2, and leaves nothing half written."""
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

CELLS, GENES = 48, 10
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="reading in a child needs fork")

# In a process of its own: mutation after mutation of a file, each read; prints what does not end cleanly.
MUTATE = """
import contextlib, io, os, random, sys, traceback
root, source, cells, folder, first, last = sys.argv[1:]
sys.path.insert(0, root)
import data
data.SECONDS_TO_OPEN = 1
raw, packed = open(source, "rb").read(), os.path.join(folder, "packed.h5")
target = os.path.join(folder, "mutated.toml")
for seed in range(int(first), int(last)):
    draw, mutated = random.Random(seed), bytearray(raw)
    if seed % 4 == 0:
        mutated = mutated[:draw.randrange(len(raw))]
    for _ in range((0, 1, 4, 16)[seed % 4]):
        mutated[draw.randrange(len(raw))] ^= draw.randrange(1, 256)
    open(target, "wb").write(mutated)
    inputs = [target] if cells == "-" else [cells, "--genept", target]
    if source.endswith(".toml"):
        try:
            data.split(data.simulate(0, 2, 4, 6, 2, 3), target)
        except data.DataError as error:
            if target not in str(error) and "simulated" not in str(error) or str(error).count("\\n"):
                print("seed", seed, error)
        except BaseException:
            print("seed", seed, traceback.format_exc())
        continue
    for command in (["info", *inputs], ["pack", *inputs, "-o", packed, "--hvg", "5"]):
        said, errors = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
                status = data.main(command)
        except BaseException:
            print("seed", seed, command[0], traceback.format_exc())
            continue
        lines = [line for line in errors.getvalue().splitlines() if not line.startswith("packing: ")]
        one_line = len(lines) == 1 and lines[0][:7] == "error: " and (target in lines[0] or cells in lines[0])
        clean = set(os.listdir(folder)) <= {"mutated.toml", "packed.h5"}
        if not clean or not (status == 2 and one_line or status == 0 and not lines):
            print("seed", seed, command[0], status, lines, os.listdir(folder))
print("all done")
"""


def make(path, matrix=None):
    """A small valid file of counts."""
    matrix = np.random.default_rng(0).poisson(3.0, (CELLS, GENES)) if matrix is None else matrix
    labels = {"gene": [["control", "AAA", "BBB"][i % 3] for i in range(CELLS)],
              "cell_line": ["x" if i % 2 else "y" for i in range(CELLS)],
              "batch": [str(i % 4) for i in range(CELLS)]}
    data.write_anndata(path, [f"G{i}" for i in range(GENES)], labels, [(slice(None), {"X": matrix})], CELLS)
    return path


def make_sparse(path):
    """The same as compressed CSR."""
    make(path)
    with h5py.File(path, "a") as file:
        matrix = file["X"][:]
        del file["X"]
        group = file.create_group("X")
        data.encode(group, "csr_matrix", "0.1.0").attrs["shape"] = matrix.shape
        group.create_dataset("data", data=matrix[matrix > 0], compression="gzip")
        indices = np.nonzero(matrix)[1].astype(np.int32)
        group.create_dataset("indices", data=indices, compression="gzip", maxshape=(None,))
        group["indptr"] = np.append(0, np.cumsum((matrix > 0).sum(1)))
    return path


def make_packed(path):
    cells, embeddings = make(path.with_name("cells.h5ad")), make_npz(path.with_name("e"))
    data.pack(cells, path, say=lambda line: None, genept=embeddings)
    return path


def make_npz(path):
    with open(path, "wb") as file:
        np.savez_compressed(file, genes=["AAA", "BBB"], embeddings=np.ones((2, 5), np.float32))
    return path


def make_pickle(path):
    table = {"AAA": [0.5, 1.0], "BBB": np.array([1.0, 2.0]), "CCC": (np.float64(3), 4)}
    path.write_bytes(pickle.dumps(table))
    return path


def make_toml(path):
    path.write_text('[training]\na = "train"\n[zeroshot]\n"a.simA" = "val"\n[fewshot."a.simB"]\n'
                    'val = ["GENE001"]\ntest = ["GENE002", "GENE003"]\n')
    return path


def run(*arguments, **options):
    """Runs data.py: (status, output, error lines but for progress)."""
    result = subprocess.run([sys.executable, ROOT / "data.py", *map(str, arguments)], capture_output=True,
                            text=True, timeout=60, **options)
    lines = [line for line in result.stderr.splitlines() if "packing: " not in line]
    return result.returncode, result.stdout, lines


def refused(capsys, path, *needed, arguments=(), commands=("info", "pack")):
    """Asserts that info and pack refuse a file in one line with the `needed` words and leave nothing."""
    before = set(os.listdir(path.parent))
    for command in commands:
        output = [] if command == "info" else ["-o", str(path.parent / "out.h5")]
        assert data.main([command, str(path), *output, *map(str, arguments)]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "packing: " not in line]
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        assert all(word in lines[0] for word in needed or [str(path)]), lines
    assert set(os.listdir(path.parent)) == before


def test_the_command_line_ends_with_one_line_and_status_2(tmp_path):
    status, _, lines = run("info", tmp_path / "none.h5ad")
    assert status == 2 and len(lines) == 1
    assert lines[0].startswith(f"error: {tmp_path / 'none.h5ad'}: no such file")
    pack = ["pack", "x", "-o", "y"]
    for bad in (["info"], [*pack, "--hvg", "0"], [*pack, "--hvg", "many"], ["unpack", "x"], ["pack", "x"]):
        status, _, lines = run(*bad)
        assert status == 2 and "Traceback" not in "\n".join(lines)


def test_what_is_not_an_anndata_file_is_refused(tmp_path, capsys, monkeypatch):
    for raw in (b"", b"cell,gene\n" * 99, b"\x89HDF\r\n\x1a\n", bytes(5000)):
        (tmp_path / "x.h5ad").write_bytes(raw)
        refused(capsys, tmp_path / "x.h5ad")
    (tmp_path / "folder.h5ad").mkdir()
    refused(capsys, tmp_path / "folder.h5ad", "directory")
    with h5py.File(tmp_path / "x.h5ad", "w") as file:
        file["matrix"] = np.zeros((3, 3))
    refused(capsys, tmp_path / "x.h5ad", "no obs", "matrix")

    def no_permission(*_):                                      # for the superuser, too, who is never refused
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(data, "open", no_permission, raising=False)
    refused(capsys, tmp_path / "x.h5ad", "permission denied")


def replace(key, values):
    def fault(file):
        attributes = dict(file[key].attrs)
        del file[key]
        file[key] = values(file) if callable(values) else values
        file[key].attrs.update(attributes)
    return fault


def change(key, index, value):
    return lambda file: file[key].__setitem__(index, value)


def drop(key):
    return lambda file: file.__delitem__(key)


def attribute(key, name, value):
    return lambda file: file[key].attrs.__setitem__(name, value)


def elsewhere(file):
    file["uns/far"] = h5py.ExternalLink("other.h5", "X")


def outside(file):
    file.create_dataset("uns/far", (3,), "f4", external=[("raw", 0, 12)])


def group_of_categories(file):
    del file["obs/gene/categories"]
    file.create_group("obs/gene/categories")


def no_control_cells(file):
    codes = file["obs/gene/codes"][:]
    control = file["obs/gene/categories"][:].tolist().index(b"control")
    file["obs/gene/codes"][:] = np.where(codes == control, 0, codes)


ALL = (slice(None),)
DENSE_FAULTS = {
    "NaN": (change("X", (3, 3), np.nan), "not finite"),
    "infinite": (change("X", (3, 3), np.inf), "not finite"),
    "negative": (change("X", (3, 3), -1.0), "negative"),
    "scaled": (replace("X", np.random.default_rng(0).normal(size=(CELLS, GENES))), "negative"),
    "neither counts nor logs": (replace("X", np.full((CELLS, GENES), 99.5)), "log"),
    "text in X": (replace("X", np.full((CELLS, GENES), b"text")), "numbers"),
    "complex X": (replace("X", np.ones((CELLS, GENES), complex)), "numbers"),
    "one-dimensional X": (replace("X", np.ones(CELLS)), "dimensions"),
    "no columns in X": (replace("X", np.ones((CELLS, 0))), "X"),
    "fewer rows in X": (replace("X", np.ones((CELLS - 1, GENES))), "rows"),
    "more columns in X": (replace("X", np.ones((CELLS, GENES + 1))), "columns"),
    "no X": (drop("X"), "X"),
    "no obs": (drop("obs"), "obs"),
    "no var": (drop("var"), "var"),
    "no index": (drop("var/_index"), "index"),
    "duplicate genes": (replace("var/_index", ["a"] * GENES), "more than once"),
    "no perturbation column": (drop("obs/gene"), "--perturbation-column"),
    "codes out of range": (change("obs/gene/codes", 4, 77), "codes"),
    "codes below range": (change("obs/gene/codes", 4, -2), "codes"),
    "fractional codes": (replace("obs/gene/codes", np.full(CELLS, 0.5)), "codes"),
    "two-dimensional codes": (replace("obs/gene/codes", np.zeros((CELLS, 2), int)), "dimensions"),
    "fewer codes": (replace("obs/gene/codes", np.zeros(CELLS - 5, int)), "number"),
    "no codes": (drop("obs/gene/codes"), "unknown kind"),
    "categories a group": (group_of_categories, "unknown kind"),
    "control without a name": (replace("obs/gene/categories", ["x", "y", "z"]), "--control"),
    "two control names": (replace("obs/gene/categories", ["control", "ctrl", "z"]), "be control or ctrl"),
    "control without cells": (no_control_cells, "no control label"),
    "only controls": (replace("obs/gene/codes", np.full(CELLS, 2)), "no perturbed cells"),
    "a null X": (replace("X", h5py.Empty("f4")), "X"),
    "a null column": (replace("obs/gene", h5py.Empty("f4")), "x.h5ad"),
    "a link to another file": (elsewhere, "another file"),
    "values in another file": (outside, "another file"),
    "a line break in a perturbation": (replace("obs/gene/categories", ["AAA", "B\nB", "control"]), "'B\\nB'"),
    "an escape in a gene": (replace("var/_index", [f"\x1b[{i}m" for i in range(GENES)]), "control char"),
    "an old packed file": (lambda file: file.attrs.update(format=np.bytes_("ptrag-packed")), "pack it again"),
    "claims more than the file can hold": (
        lambda file: file.create_dataset("uns/far", (10 ** 12,), np.int64, chunks=(1024,)), "claims"),
}
SPARSE_FAULTS = {
    "indptr falls": (change("X/indptr", 5, 2), "indptr"),
    "indptr ends early": (change("X/indptr", CELLS, 10), "indptr"),
    "indptr short": (replace("X/indptr", np.arange(7)), "indptr"),
    "fractional indptr": (replace("X/indptr", np.linspace(0, 1, CELLS + 1)), "whole numbers"),
    "indices too large": (change("X/indices", 5, GENES), "indices run from 0 to 10"),
    "indices negative": (change("X/indices", 5, -1), "indices run from -1 to 9"),
    "fewer indices": (lambda file: file["X/indices"].resize((9,)), "indices"),
    "no indices": (drop("X/indices"), "indices"),
    "text in data": (replace("X/data", lambda file: np.full(file["X/indices"].shape, b"t")), "numbers"),
    "NaN in data": (change("X/data", 7, np.nan), "not finite"),
    "shape of other length": (attribute("X", "shape", np.array([CELLS])), "X"),
    "absurd shape": (attribute("X", "shape", np.array([10 ** 15, GENES])), "X"),
    "numbers as encoding": (attribute("X", "encoding-type", np.arange(3)), "X"),
    "unknown encoding": (attribute("X", "encoding-type", "coo_matrix"), "X"),
}
LATE = {"NaN", "infinite", "negative", "scaled", "neither counts nor logs", "NaN in data",
        "indices too large", "indices negative"}                             # only packing reads all values


@pytest.mark.parametrize("name", [*DENSE_FAULTS, *SPARSE_FAULTS])
def test_a_file_with_a_fault_is_refused(tmp_path, capsys, name):
    path = (make if name in DENSE_FAULTS else make_sparse)(tmp_path / "x.h5ad")
    fault, needed = (DENSE_FAULTS | SPARSE_FAULTS)[name]
    with h5py.File(path, "a") as file:
        fault(file)
    refused(capsys, path, str(path), needed, commands=["pack"] if name in LATE else ["info", "pack"])


@pytest.mark.parametrize("option, value, needed", [
    ("--control", "nobody", "AAA"), ("--cell-line-column", "nowhere", "cell_line"),
    ("--batch-column", "none", "batch"), ("--perturbation-column", "nothing", "gene"),
    ("--genept", "absent.npz", "absent.npz")])
def test_option_values_that_the_file_does_not_have_are_refused(tmp_path, capsys, option, value, needed):
    refused(capsys, make(tmp_path / "x.h5ad"), value, needed, arguments=[option, value])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no", b"\x80\x04junk", b"\x89HDF\r\n\x1a\n", "bomb"])
def test_damaged_embeddings_are_refused(tmp_path, capsys, monkeypatch, content):
    path, embeddings = make(tmp_path / "x.h5ad"), tmp_path / "e.npz"
    if content == "bomb":                                       # inflates to more than a file of its size may
        np.savez_compressed(embeddings, genes=["AAA"], embeddings=np.zeros((1, 10 ** 7), np.float32))
        monkeypatch.setattr(data, "most_memory", lambda path: 30_000_000)
    else:
        embeddings.write_bytes(content)
    refused(capsys, path, str(embeddings), arguments=["--genept", embeddings])


@needs_fork
@pytest.mark.parametrize("make_source", [make, make_sparse, make_packed, make_npz, make_pickle, make_toml])
def test_mutations_of_a_file_are_read_or_refused_never_worse(tmp_path, make_source):
    source = make_source(tmp_path / ("source.toml" if make_source is make_toml else "source"))
    (tmp_path / "work").mkdir()
    cells = make(tmp_path / "cells.h5ad") if make_source in (make_npz, make_pickle) else "-"
    last = os.environ.get("MUTATIONS", "60")
    arguments = [ROOT, source, cells, tmp_path / "work", "0", last]
    result = subprocess.run([sys.executable, "-c", MUTATE, *arguments], capture_output=True, text=True,
                            timeout=int(last) * 5)
    said = result.stdout[-3000:] + result.stderr[-3000:]
    assert (result.returncode, result.stdout.strip()) == (0, "all done"), said


@needs_fork
@pytest.mark.parametrize("read, needed", [
    (lambda: time.sleep(30), "does not come to an end"),
    (lambda: os.kill(os.getpid(), signal.SIGKILL), "crashes"), (lambda: np.ones(10 ** 10), "cannot be read")])
def test_a_reader_that_hangs_crashes_or_takes_all_memory_is_an_error(tmp_path, monkeypatch, read, needed):
    path = make(tmp_path / "x.h5ad")
    monkeypatch.setattr(data, "SECONDS_TO_OPEN", 1)

    def guarded():
        with data.reading(path):
            return read()
    with pytest.raises(data.DataError, match=needed):
        data.in_child(path, guarded)


@pytest.mark.parametrize("limit", [0, 1000, 3000, 6000, 10_000, 9_000_000])
def test_a_full_disk_while_packing_is_an_error_and_leaves_nothing(tmp_path, limit):
    """A limit on the size of files stands for the full disk: writes beyond it fail in the same way."""
    resource = pytest.importorskip("resource")
    path = make(tmp_path / "x.h5ad")
    status, _, lines = run("pack", path, "-o", tmp_path / "out.h5",
                           preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    if status == 0:
        assert os.path.getsize(tmp_path / "out.h5") <= limit
    else:
        assert status == 2 and len(lines) == 1 and str(tmp_path / "out.h5") in lines[0], lines
        assert os.listdir(tmp_path) == ["x.h5ad"]


def test_places_that_cannot_be_written_are_refused(tmp_path, capsys):
    path = make(tmp_path / "x.h5ad")
    for output in (tmp_path, tmp_path / "nowhere" / "out.h5", path, Path(os.devnull), tmp_path / "o\nut.h5"):
        refused(capsys, path, str(output).replace("\n", "\\n"), arguments=["-o", output], commands=["pack"])
    assert os.listdir(tmp_path) == ["x.h5ad"] and data.main(["info", str(path)]) == 0


@needs_fork
def test_temporary_files_of_killed_processes_go_when_the_output_is_written_again(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        pass
    here = f".out.csv.{data.platform.node()}"
    names = [f"{here}-{dead.pid}.tmp", f"{here}-{os.getppid()}.tmp", f".out.csv.elsewhere-{dead.pid}.tmp"]
    for name in names:
        (tmp_path / name).touch()
    data.write_csv(tmp_path / "out.csv", ["a"], [])
    assert set(os.listdir(tmp_path)) == {*names[1:], "out.csv"}   # other machines keep theirs


@pytest.mark.skipif(os.name == "nt", reason="pipes")
def test_an_output_that_nobody_reads_is_no_error(tmp_path):
    path = make(tmp_path / "x.h5ad")
    with subprocess.Popen([sys.executable, ROOT / "data.py", "info", path], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.wait(30) == 0 and process.stderr.read() == b""


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_packing_broken_off_leaves_nothing_behind(tmp_path, sent):
    path = make(tmp_path / "x.h5ad")
    script = ("import sys, time; sys.path.insert(0, sys.argv.pop(1)); import data\n"
              "blocks = data.scaled_blocks\n"
              "def slow(*arguments):\n    print('writing', flush=True); time.sleep(9); yield from blocks()\n"
              "data.scaled_blocks = slow; sys.exit(data.main(sys.argv[1:]))")
    with subprocess.Popen([sys.executable, "-c", script, ROOT, "pack", path, "-o", tmp_path / "out.h5"],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(sent)
        assert process.wait(8) == 130 and process.stderr.read() == "stopped\n"
    assert os.listdir(tmp_path) == ["x.h5ad"]
