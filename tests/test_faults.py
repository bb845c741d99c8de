"""Bad input ends with one line that names the file and exit status 2, and leaves nothing half written."""
import contextlib
import io
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import ROOT
from test_data import counts, edited, pack, stored, write, write_embeddings

import data

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def run(command, *arguments):
    """What a command line would end with: (status, error lines but for progress)."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        status = data.status_of(command, *arguments)
    return status, [line for line in errors.getvalue().splitlines() if "packing: " not in line]


def refused(path, *needed, options=(), commands=("info", "pack")):
    """Asserts that info and pack refuse a file in one line with the `needed` words; an older output stays."""
    output = path.with_name("out.h5")
    output.write_bytes(b"older")
    before = set(os.listdir(path.parent))
    for command in commands:
        arguments = [command, path, *(["-o", output] if command == "pack" else []), *options]
        status, lines = run(data.command_line, list(map(str, arguments)))
        assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        assert all(word in lines[0] for word in needed or [str(path)]), lines
    assert set(os.listdir(path.parent)) == before and output.read_bytes() == b"older"


def test_the_command_line_ends_with_one_line_and_status_2(tmp_path):
    result = subprocess.run([sys.executable, ROOT / "data.py", "info", tmp_path / "none.h5ad"],
                            capture_output=True, text=True)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith(f"error: {tmp_path / 'none.h5ad'}: no such file")
    for bad in ("info", "pack x -o y --hvg 0", "pack x -o y --hvg many", "unpack x", "pack x"):
        with pytest.raises(SystemExit, match="2"):
            data.command_line(bad.split())


def test_what_is_not_an_anndata_file_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.h5ad"
    for raw in (b"", b"cell,gene\n" * 99, b"\x89HDF\r\n\x1a\n", bytes(5000)):
        path.write_bytes(raw)
        refused(path)
    (tmp_path / "folder.h5ad").mkdir()
    refused(tmp_path / "folder.h5ad", "directory")
    path.unlink()
    refused(edited(path, {"matrix": np.zeros((3, 3))}), "no obs", "matrix")

    def no_permission(*_):                                  # for the superuser, too, who is never refused
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(data, "open", no_permission, raising=False)
    refused(path, "permission denied")


CODES, CATEGORIES = "obs/gene/codes", "obs/gene/categories"  # of AAA, BBB, CCC and non-targeting
FAULTS = {"dense": {
    **{f"no {key}": ({key: None}, needed) for key, needed in {
        "X": "X", "obs": "obs", "var": "var", "var/_index": "index", "obs/gene": "--perturbation-column",
        CODES: "unknown kind"}.items()},
    **{f"X of shape {shape}": ({"X": np.ones(shape)}, needed) for shape, needed in {
        (60,): "cells by genes", (60, 0): "X", (59, 12): "rows", (60, 13): "columns"}.items()},
    **{f"a value {value}": ({("X", (3, 3)): value}, needed) for value, needed in {
        np.nan: "nan to nan", np.inf: "0 to inf", -1.0: "from -1 to"}.items()},
    "scaled": ({"X": np.random.default_rng(0).normal(size=(60, 12))}, "not negative"),
    **{f"X of {value}": ({"X": np.full((60, 12), value)}, needed) for value, needed in (
        (99.5, "log"), (b"text", "numbers"), (1j, "numbers"))},
    "a null X": ({"X": h5py.Empty("f4")}, "X"),
    "duplicate genes": ({"var/_index": ["a"] * 12}, "more than once"),
    "a null column": ({"obs/gene": h5py.Empty("f4")}, "x.h5ad"),
    **{f"code {code}": ({(CODES, 4): code}, "codes") for code in (77, -2)},
    "fractional codes": ({CODES: np.full(60, 0.5)}, "codes"),
    **{f"codes of shape {shape}": ({CODES: np.zeros(shape, int)}, "number") for shape in ((60, 2), 55)},
    "categories a group": ({CATEGORIES: None, f"{CATEGORIES}/a": [1]}, "unknown kind"),
    "control without a name": ({CATEGORIES: list("wxyz")}, "--control"),
    "two control names": ({CATEGORIES: ["control", "ctrl", "y", "z"]}, "be control or ctrl"),
    "two perturbation columns": ({"obs/condition": list("AB") * 30}, "condition or gene"),
    "control without cells": ({CODES: np.arange(60) % 3}, "no control label"),
    "only controls": ({CODES: np.full(60, 3)}, "no perturbed cells"),
    "a link to another file": ({"uns/far": h5py.ExternalLink("other.h5", "X")}, "another file"),
    "values in another file": (
        {"far": lambda file: file.create_dataset(None, 3, "f4", external=[("raw", 0, 12)])}, "another file"),
    "a line break in a perturbation": ({CATEGORIES: ["AAA", "B\nB", "CCC", "control"]}, "'B\\nB'"),
    "an old packed file": ({("/", "format"): np.bytes_("ptrag-packed")}, "pack it again"),
    "an escape in a gene": ({"var/_index": [f"\x1b[{i}m" for i in range(12)]}, "control char"),
    "claims more than memory can hold": (
        {CODES: lambda file: file.create_dataset(None, 10 ** 12, "i8", chunks=True)}, "("),
}, "csr": {
    "one gene twice": ({("X/indices", ...): 0}, "sum_duplicates"),
    "indptr falls": ({("X/indptr", 5): 2}, "indptr"),
    "indptr ends early": ({("X/indptr", 60): 10}, "indptr"),
    "indptr short": ({"X/indptr": np.arange(7)}, "indptr"),
    "fractional indptr": ({"X/indptr": np.linspace(0, 1, 61)}, "float64"),
    **{f"indices of {value}": ({("X/indices", 5): value}, f"indices run from {found}") for value, found in (
        (12, "0 to 12"), (-1, "-1 to 11"))},
    "fewer indices": ({"X/indices": np.arange(9)}, "indices"),
    "no indices": ({"X/indices": None}, "indices"),
    "text in data": ({"X/data": np.full(int((counts() > 0).sum()), b"t")}, "numbers"),
    "NaN in data": ({("X/data", 7): np.nan}, "nan to nan"),
    **{f"{name} {value}": ({("X", name): value}, "X") for name, value in (
        ("shape", [60]), ("shape", [10 ** 15, 12]),
        ("encoding-type", [0, 1]), ("encoding-type", "coo_matrix"))},
}}
FAULTS["csc"] = {"one gene twice": FAULTS["csr"]["one gene twice"]}
LATE = {"a value nan", "a value inf", "a value -1.0", "scaled", "X of 99.5", "NaN in data",
        "one gene twice", "indices of 12", "indices of -1"}  # only packing notices


@pytest.mark.parametrize("kind, name", [(kind, name) for kind in FAULTS for name in FAULTS[kind]])
def test_a_file_with_a_fault_is_refused(tmp_path, kind, name):
    fault, needed = FAULTS[kind][name]
    path = edited(write(tmp_path / "x.h5ad"), {**stored(counts(), kind), **fault})
    refused(path, str(path), needed, commands=["pack"] if name in LATE else ["info", "pack"])


def test_option_values_that_the_file_does_not_have_are_refused(tmp_path):
    for option, value, needed in [
            ("--control", "nobody", "AAA"), ("--cell-line-column", "nowhere", "cell_line"),
            ("--batch-column", "none", "gem_group"), ("--perturbation-column", "nothing", "gene"),
            ("--genept", "absent.npz", "absent.npz")]:
        refused(write(tmp_path / "x.h5ad"), value, needed, options=[option, value])


def test_damaged_embeddings_are_refused(tmp_path, monkeypatch):
    bomb = write_embeddings(tmp_path / "e.npz", ["AAA"], np.zeros((1, 5 * 10 ** 7))).read_bytes()
    monkeypatch.setattr(data, "MEMORY_TO_OPEN", 100_000_000)    # and 20 for each byte of a file
    for content in (bomb, b"", b"PK\x03\x04 no", b"\x80\x04junk", b"\x89HDF\r\n\x1a\n"):
        (tmp_path / "e.npz").write_bytes(content)
        refused(write(tmp_path / "x.h5ad"), "e.npz", options=["--genept", tmp_path / "e.npz"])


ROWS = {"AAA": [0.5, 1.0], "BBB": np.array([1.0, 2.0]), "CCC": (np.float64(3), 4)}
SOURCES = {
    "dense": write, "sparse": lambda path: edited(write(path), stored(counts(), "csr", compression="gzip")),
    "packed": lambda path: pack(write(path.with_name("cells")), path,
                                genept=write_embeddings(path.with_name("e.npz"))),
    "npz": write_embeddings, "pickle": lambda path: path.write_bytes(pickle.dumps(ROWS)),
    "split": lambda path: path.write_text(
        '[training]\na = "train"\n[zeroshot]\n"a.simA" = "val"\n[fewshot."a.simB"]\nval = ["GENE001"]\n'
        'test = ["GENE002", "GENE003"]\n')}


@needs_fork
@pytest.mark.parametrize("name", SOURCES)
def test_mutations_of_a_file_are_read_or_refused_never_worse(tmp_path, monkeypatch, name):
    monkeypatch.setattr(data, "SECONDS_TO_OPEN", 1)
    folder, number = tmp_path / "work", int(os.environ.get("MUTATIONS", "60"))
    folder.mkdir()
    SOURCES[name](source := tmp_path / "source.npz")
    raw, target = source.read_bytes(), str(folder / "mutated.toml")
    inputs = [str(write(tmp_path / "x.h5ad")), "--genept", target] if name in ("npz", "pickle") else [target]
    commands = [(data.command_line, ["info", *inputs]),
                (data.command_line, ["pack", *inputs, "-o", str(folder / "packed.h5"), "--hvg", "5"])]
    if name == "split":
        commands, inputs = [(data.split, data.simulate(0, 2, 4, 6, 2, 3), target)], [target, "simulated"]

    def read():
        signal.alarm(5 * number)
        for seed in range(number):
            draw, mutated = random.Random(seed), bytearray(raw)
            if seed % 4 == 0:
                mutated = mutated[:draw.randrange(len(raw))]
            for _ in range((0, 1, 4, 16)[seed % 4]):
                mutated[draw.randrange(len(raw))] ^= draw.randrange(1, 256)
            Path(target).write_bytes(mutated)
            for command in commands:
                status, lines = run(*command)
                named = lines and lines[0].startswith("error: ") and any(name in lines[0] for name in inputs)
                expected = named and len(lines) == 1 if status == 2 else status == 0 and not lines
                assert expected and {*os.listdir(folder)} <= {"mutated.toml", "packed.h5"}, (seed, lines)
    process = multiprocessing.get_context("fork").Process(target=read)  # which may crash
    process.start()
    process.join()
    assert process.exitcode == 0                            # what was wrong is on stderr


@needs_fork
@pytest.mark.parametrize("read, needed", [
    (lambda: time.sleep(30), "does not come to an end"),
    (lambda: os.kill(os.getpid(), signal.SIGKILL), "crashes"), (lambda: np.ones(10 ** 10), "cannot be read")],
    ids=["hangs", "crashes", "takes all memory"])
def test_a_reader_that_hangs_crashes_or_takes_all_memory_is_an_error(tmp_path, monkeypatch, read, needed):
    path = write(tmp_path / "x.h5ad")
    monkeypatch.setattr(data, "SECONDS_TO_OPEN", 1)
    with pytest.raises(data.DataError, match=needed):
        data.in_child(path, data.reading(path)(read))


def test_a_full_disk_while_packing_is_an_error_and_leaves_nothing(tmp_path):
    """A limit on the size of files stands for the full disk: writes beyond it fail in the same way."""
    resource = pytest.importorskip("resource")
    path, limits = write(tmp_path / "x.h5ad"), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for size in (10, 1000, 3000, 6000, 10_000, 8_000_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            refused(path, "out.h5", commands=["pack"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_places_that_cannot_be_written_are_refused(tmp_path):
    path = write(tmp_path / "x.h5ad")
    for output in (tmp_path, tmp_path / "nowhere" / "out.h5", path, Path(os.devnull)):
        refused(path, str(output), options=["-o", output], commands=["pack"])
    assert run(data.command_line, ["info", str(path)]) == (0, [])


@needs_fork
def test_one_process_writes_an_output_over_what_a_killed_one_left(tmp_path):
    (tmp_path / ".out.csv.tmp").write_text("half of something longer")
    with data.locked(tmp_path / ".out.csv.tmp"), pytest.raises(data.DataError, match="another process"):
        data.write_csv(tmp_path / "out.csv", ["a"], [])
    assert os.listdir(tmp_path) == [".out.csv.tmp"]         # the other process's
    data.write_csv(tmp_path / "out.csv", ["a"], [])
    assert os.listdir(tmp_path) == ["out.csv"] and (tmp_path / "out.csv").read_text() == "a\n"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_packing_broken_off_leaves_nothing_behind(tmp_path, monkeypatch, sent):
    def broken_off(matrix, blocks=data.row_blocks):
        yield next(blocks(matrix))
        signal.raise_signal(sent)
    monkeypatch.setattr(data, "row_blocks", broken_off)
    command = ["pack", str(write(tmp_path / "x.h5ad")), "-o", str(tmp_path / "out.h5")]
    assert run(data.command_line, command) == (130, ["stopped"]) and os.listdir(tmp_path) == ["x.h5ad"]
