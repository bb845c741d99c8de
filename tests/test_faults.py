"""Bad input ends with one line that names the file and exit status 2: never a traceback, a hang, a crash or a half-written file."""
import os
import resource
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

# Runs in a process of its own: makes mutation after mutation of a file, drives the command line on each, prints what is not clean.
MUTATE = """
import contextlib, io, os, random, sys, traceback
root, source, folder, first, last = sys.argv[1:]
sys.path.insert(0, root)
import data
data.SECONDS_TO_OPEN = 1
raw, target, packed = open(source, "rb").read(), os.path.join(folder, "mutated.h5ad"), os.path.join(folder, "packed.h5")
for seed in range(int(first), int(last)):
    draw, mutated = random.Random(seed), bytearray(raw)
    if seed % 4 == 0:
        mutated = mutated[:draw.randrange(len(raw))]
    for _ in range((0, 1, 4, 16)[seed % 4]):
        mutated[draw.randrange(len(raw))] ^= draw.randrange(1, 256)
    open(target, "wb").write(mutated)
    for command in (["info", target], ["pack", target, "-o", packed, "--hvg", "5"]):
        said, errors = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
                status = data.main(command)
        except BaseException:
            print("seed", seed, command[0], traceback.format_exc())
            continue
        lines = [line for line in errors.getvalue().splitlines() if not line.startswith("packing: ")]
        clean = status == 0 and not lines or status == 2 and len(lines) == 1 and lines[0].startswith("error: ") and target in lines[0]
        if not clean or set(os.listdir(folder)) - {"mutated.h5ad", "packed.h5"}:
            print("seed", seed, command[0], status, lines, os.listdir(folder))
print("all done")
"""


def make(path, matrix=None):
    """A small valid file of counts."""
    rng = np.random.default_rng(0)
    matrix = rng.poisson(3.0, (CELLS, GENES)).astype(np.float32) if matrix is None else matrix
    labels = {"gene": [["control", "AAA", "BBB"][i % 3] for i in range(CELLS)], "cell_line": ["x" if i % 2 else "y" for i in range(CELLS)],
              "batch": [str(i % 4) for i in range(CELLS)]}
    data.write_anndata(path, [f"G{i}" for i in range(GENES)], [(matrix, labels, {})])
    return path


def make_sparse(path):
    """The same as compressed CSR."""
    make(path)
    with h5py.File(path, "a") as file:
        matrix = file["X"][:]
        del file["X"]
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": np.array(matrix.shape)})
        group.create_dataset("data", data=matrix[matrix > 0], compression="gzip")
        group.create_dataset("indices", data=np.nonzero(matrix)[1].astype(np.int32), compression="gzip", maxshape=(None,))
        group["indptr"] = np.concatenate([[0], np.cumsum((matrix > 0).sum(1))])
    return path


def command(*arguments, **options):
    """Runs data.py: (status, output, error lines but for progress)."""
    result = subprocess.run([sys.executable, ROOT / "data.py", *map(str, arguments)], capture_output=True, text=True, timeout=60, **options)
    return result.returncode, result.stdout, [line for line in result.stderr.splitlines() if not line.startswith("packing: ")]


def refused(capsys, path, *needed, arguments=()):
    """Asserts that info and pack refuse a file in one line with the words `needed`, and leave nothing behind."""
    before = set(os.listdir(path.parent))
    for words in (["info", str(path)], ["pack", str(path), "-o", str(path.parent / "out.h5")]):
        assert data.main([*words, *arguments]) == 2
        output, errors = capsys.readouterr()
        lines = [line for line in errors.splitlines() if not line.startswith("packing: ")]
        assert len(lines) == 1 and lines[0].startswith("error: ") and str(path) in lines[0], lines
        assert all(word in lines[0] for word in needed), lines
    assert set(os.listdir(path.parent)) == before


def test_the_command_line_ends_with_one_line_and_status_2(tmp_path):
    status, _, lines = command("info", tmp_path / "none.h5ad")
    assert status == 2 and lines == [f"error: {tmp_path / 'none.h5ad'}: no such file"]
    pack = ["pack", "x", "-o", "y"]
    for bad in (["info"], [*pack, "--hvg", "0"], [*pack, "--hvg", "many"], ["unpack", "x"], ["pack", "x"]):
        status, _, lines = command(*bad)
        assert status == 2 and "Traceback" not in "\n".join(lines)


def test_what_is_not_hdf5_is_refused(tmp_path, capsys):
    contents = {"empty.h5ad": b"", "text.h5ad": b"cell,gene\n" * 99, "magic.h5ad": b"\x89HDF\r\n\x1a\n", "zero.h5ad": bytes(5000)}
    for name, raw in contents.items():
        (tmp_path / name).write_bytes(raw)
        refused(capsys, tmp_path / name)
    (tmp_path / "folder.h5ad").mkdir()
    refused(capsys, tmp_path / "folder.h5ad", "directory")


def test_an_hdf5_file_that_is_no_anndata_says_what_it_has(tmp_path, capsys):
    with h5py.File(tmp_path / "x.h5ad", "w") as file:
        file["matrix"] = np.zeros((3, 3))
    refused(capsys, tmp_path / "x.h5ad", "no obs", "matrix")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_without_read_permission_is_refused(tmp_path, capsys):
    path = make(tmp_path / "x.h5ad")
    path.chmod(0)
    refused(capsys, path, "permission")


def test_a_refused_open_is_told_as_a_lack_of_permission(tmp_path, capsys, monkeypatch):
    """The same for the superuser, who is never refused."""
    path = make(tmp_path / "x.h5ad")

    def no_permission(*_):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(data, "open", no_permission, raising=False)
    assert data.main(["info", str(path)]) == 2
    assert capsys.readouterr().err == f"error: {path}: no permission to read it\n"


def replace(key, values):
    def fault(file):
        attributes = dict(file[key].attrs)
        del file[key]
        file[key] = values(file) if callable(values) else values
        file[key].attrs.update(attributes)
    return fault


def change(key, index, value):
    def fault(file):
        file[key][index] = value
    return fault


def drop(*keys):
    def fault(file):
        for key in keys:
            del file[key]
    return fault


def attribute(key, name, value):
    def fault(file):
        file[key].attrs[name] = value
    return fault


NAMES = np.array(["a"] * GENES, dtype=object)
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
    "duplicate genes": (replace("var/_index", NAMES), "more than once"),
    "no perturbation column": (drop("obs/gene"), "--perturbation-column"),
    "no cell-line column": (drop("obs/cell_line"), "--cell-line-column"),
    "two perturbation columns": (replace("obs/batch", lambda file: np.arange(CELLS)), None),
    "codes out of range": (change("obs/gene/codes", 4, 77), "codes"),
    "codes below range": (change("obs/gene/codes", 4, -2), "codes"),
    "fractional codes": (replace("obs/gene/codes", np.full(CELLS, 0.5)), "codes"),
    "two-dimensional codes": (replace("obs/gene/codes", np.zeros((CELLS, 2), int)), "codes"),
    "fewer codes": (replace("obs/gene/codes", np.zeros(CELLS - 5, int)), "lengths"),
    "no codes": (drop("obs/gene/codes"), "unknown kind"),
    "categories a group": (lambda file: (drop("obs/gene/categories")(file), file.create_group("obs/gene/categories")), "unknown kind"),
    "control without a name": (replace("obs/gene/categories", np.array(["x", "y", "z"], dtype=object)), "--control"),
    "two control names": (replace("obs/gene/categories", np.array(["control", "ctrl", "z"], dtype=object)), "could be control or ctrl"),
    "only controls": (replace("obs/gene/codes", np.zeros(CELLS, int)), "no perturbed cells"),
    "unknown packed version": (lambda file: file.attrs.update(format=np.bytes_("ptrag-packed"), format_version=9), "version 9"),
    "other format": (lambda file: file.attrs.update(format=np.bytes_("other"), format_version=1), "not a packed file"),
}
SPARSE_FAULTS = {
    "indptr falls": (change("X/indptr", 5, 2), "indptr"),
    "indptr ends early": (change("X/indptr", CELLS, 10), "indptr"),
    "indptr short": (replace("X/indptr", np.arange(7)), "indptr"),
    "fractional indptr": (replace("X/indptr", np.linspace(0, 1, CELLS + 1)), "whole numbers"),
    "indices too large": (change("X/indices", 5, GENES), "indices"),
    "indices negative": (change("X/indices", 5, -1), "indices"),
    "fewer indices": (lambda file: file["X/indices"].resize((9,)), "indices"),
    "no indices": (drop("X/indices"), "X"),
    "text in data": (replace("X/data", lambda file: np.full(file["X/indices"].shape, b"t")), "numbers"),
    "NaN in data": (change("X/data", 7, np.nan), "not finite"),
    "shape of other length": (attribute("X", "shape", np.array([CELLS])), "X"),
    "absurd shape": (attribute("X", "shape", np.array([10 ** 15, GENES])), "X"),
    "unknown encoding": (attribute("X", "encoding-type", "coo_matrix"), "X"),
}


@pytest.mark.parametrize("name", [name for name in DENSE_FAULTS if name != "two perturbation columns"])
def test_a_dense_file_with_a_fault_is_refused(tmp_path, capsys, name):
    path = make(tmp_path / "x.h5ad")
    with h5py.File(path, "a") as file:
        DENSE_FAULTS[name][0](file)
    refused(capsys, path, DENSE_FAULTS[name][1])


@pytest.mark.parametrize("name", SPARSE_FAULTS)
def test_a_sparse_file_with_a_fault_is_refused(tmp_path, capsys, name):
    path = make_sparse(tmp_path / "x.h5ad")
    with h5py.File(path, "a") as file:
        SPARSE_FAULTS[name][0](file)
    if name.startswith("indices"):      # info does not read the whole matrix
        assert data.main(["pack", str(path), "-o", str(tmp_path / "out.h5")]) == 2
        assert f"{path}: X: indices run from" in capsys.readouterr().err and os.listdir(tmp_path) == ["x.h5ad"]
    else:
        refused(capsys, path, SPARSE_FAULTS[name][1])


@pytest.mark.parametrize("option, value, needed", [("--control", "nobody", "nobody"), ("--cell-line-column", "nowhere", "cell_line"),
                                                   ("--perturbation-column", "nothing", "gene"), ("--batch-column", "none", "batch"),
                                                   ("--genept", "absent.npz", "absent.npz")])
def test_option_values_that_the_file_does_not_have_are_refused(tmp_path, capsys, option, value, needed):
    path = make(tmp_path / "x.h5ad")
    assert data.main(["info", str(path), option, value]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and value in error and needed in error


def test_a_control_label_without_cells_is_refused(tmp_path, capsys):
    path = make(tmp_path / "x.h5ad")
    with h5py.File(path, "a") as file:
        codes = file["obs/gene/codes"][:]
        file["obs/gene/codes"][:] = np.where(codes == 0, 1, codes)
    refused(capsys, path, "no control label")
    refused(capsys, path, "has no cells", arguments=["--control", "control"])


def test_a_claim_of_more_than_the_file_can_hold_is_refused_before_it_is_allocated(tmp_path, capsys):
    path = make(tmp_path / "x.h5ad")
    with h5py.File(path, "a") as file:
        del file["obs/gene"]
        file.create_dataset("obs/gene", (10 ** 12,), np.int64, chunks=(1024,))
    refused(capsys, path, "claims")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x80\x04junk", b"\x89HDF\r\n\x1a\n"])
def test_damaged_embeddings_are_refused(tmp_path, capsys, content):
    path, embeddings = make(tmp_path / "x.h5ad"), tmp_path / "e.npz"
    embeddings.write_bytes(content)
    assert data.main(["info", str(path), "--genept", str(embeddings)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(embeddings) in error


@pytest.mark.parametrize("kind", ["dense", "sparse", "packed"])
def test_mutations_of_a_file_are_read_or_refused_never_worse(tmp_path, kind):
    source, folder = tmp_path / "source.h5ad", tmp_path / "work"
    folder.mkdir()
    (make_sparse if kind == "sparse" else make)(source)
    if kind == "packed":
        data.pack(source, tmp_path / "packed.h5", say=lambda line: None)
        source = tmp_path / "packed.h5"
    result = subprocess.run([sys.executable, "-c", MUTATE, ROOT, source, folder, "0", "120"], capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout.strip()) == (0, "all done"), result.stdout[-3000:] + result.stderr[-3000:]


def test_a_reader_that_hangs_or_crashes_becomes_an_error(tmp_path, monkeypatch):
    path = make(tmp_path / "x.h5ad")
    monkeypatch.setattr(data, "SECONDS_TO_OPEN", 1)
    with pytest.raises(data.DataError, match="does not come to an end"):
        data.try_first(path, lambda: time.sleep(30))
    with pytest.raises(data.DataError, match="crashes"):
        data.try_first(path, lambda: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize("limit", [0, 1000, 3000, 6000, 10_000])
def test_a_full_disk_while_packing_is_an_error_and_leaves_nothing(tmp_path, limit):
    """A limit on the size of files stands for the full disk: writes beyond it fail in the same way."""
    path = make(tmp_path / "x.h5ad", np.random.default_rng(0).poisson(3.0, (CELLS, GENES)).astype(np.float32))
    status, _, lines = command("pack", path, "-o", tmp_path / "out.h5",
                               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    if status == 0:
        assert os.path.getsize(tmp_path / "out.h5") <= limit
    else:
        assert status == 2 and len(lines) == 1 and str(tmp_path / "out.h5") in lines[0], lines
        assert os.listdir(tmp_path) == ["x.h5ad"]


def test_places_that_cannot_be_written_are_refused(tmp_path, capsys):
    path = make(tmp_path / "x.h5ad")
    for output in (tmp_path, tmp_path / "nowhere" / "out.h5", path):
        assert data.main(["pack", str(path), "-o", str(output)]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert str(output) in error and "Traceback" not in error
    assert os.listdir(tmp_path) == ["x.h5ad"] and data.main(["info", str(path)]) == 0


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_packing_broken_off_leaves_nothing_behind(tmp_path, sent):
    path = make(tmp_path / "x.h5ad")
    script = ("import os, runpy, sys, numpy, h5py; sys.path.insert(0, sys.argv.pop(1)); import data; write = os.pwrite\n"
              "def slow(*arguments):\n    import time; print('writing', flush=True); time.sleep(2)\n"
              "    os.pwrite = write; return write(*arguments)\n"
              "os.pwrite = slow; sys.argv[0] = data.__file__; runpy.run_path(data.__file__, run_name='__main__')")
    with subprocess.Popen([sys.executable, "-c", script, ROOT, "pack", path, "-o", tmp_path / "out.h5"], stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        assert len(os.listdir(tmp_path)) == 2
        process.send_signal(sent)
        process.wait(20)
    assert process.returncode != 0 and os.listdir(tmp_path) == ["x.h5ad"]
