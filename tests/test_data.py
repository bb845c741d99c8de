"""Facts about data: what is read from files, which genes are chosen, how conditions are split, sets drawn."""
import collections
import os
import pickle
import subprocess
import threading
import time
import tomllib
from functools import partial
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from conftest import SHARED, needs_shared

import data

GENES = [f"G{i}" for i in range(12)]
load = partial(data.load, need_embeddings=False, say=lambda line: None)
pack = partial(data.pack, say=lambda line: None)
refused = partial(pytest.raises, data.DataError)


# ------------------------------------------------------------------------------------- files made here

def labels(cells=60, control="non-targeting"):
    """obs of two lines, three perturbations and the control, two gem groups."""
    names = [control, "AAA", "BBB", "CCC"]
    return {"gene": [names[i // 2 % 4] for i in range(cells)],
            "cell_line": ["K562" if i % 2 else "RPE1" for i in range(cells)],
            "gem_group": [str(1 + i // 8 % 2) for i in range(cells)]}


def counts(cells=60, genes=12):
    """Counts with some zeros; gene means differ."""
    rng = np.random.default_rng(0)
    return rng.poisson(rng.gamma(2.0, 2.0, genes), (cells, genes)).astype(np.float32)


def normalised(matrix):
    return np.log1p(matrix * (1e4 / matrix.sum(1, keepdims=True)))


def write(path, matrix=None, obs=None):
    matrix = counts() if matrix is None else matrix
    genes = [f"G{i}" for i in range(matrix.shape[1])]
    data.write_anndata(path, genes, obs or labels(len(matrix)), [(slice(None), {"X": matrix})], len(matrix))
    return path


def edited(path, change):
    """The file after `change`: a dict from a member (None removes it), from (member, attribute) or from
    (member, index) to what is written there, or to a function of the file that gives it."""
    with h5py.File(path, "a") as file:
        for key, value in change.items():
            value = value(file) if callable(value) else value
            if isinstance(key, tuple):
                node, place = file[key[0]], key[1]
                (node.attrs if isinstance(place, str) else node)[place] = value
            else:
                file.pop(key, None)
                if value is not None:
                    file[key] = value
    return path


def stored(matrix, kind="dense", marks=("encoding-type", "shape"), direction=1, **storage):
    """For `edited`: X is stored anew, dense or as a CSR or CSC group, as AnnData does."""
    dataset = lambda values: lambda file: file.create_dataset(None, data=values, **storage)
    if kind == "dense":
        return {"X": dataset(matrix)}
    lines = matrix if kind == "csr" else matrix.T
    number, index = np.nonzero(lines)
    index = index[np.lexsort((direction * index, number))]          # -1: each line stands in reverse
    return {"X": None, "X/data": dataset(lines[number, index]), "X/indices": dataset(index.astype(np.int32)),
            "X/indptr": dataset(np.append(0, np.cumsum((lines != 0).sum(1)))), ("X", marks[1]): matrix.shape,
            ("X", marks[0]): kind if "h5sparse_format" in marks else f"{kind}_matrix"}


def write_embeddings(path, genes=("AAA", "BBB", "CCC"), vectors=None):
    vectors = np.random.default_rng(1).normal(size=(len(genes), 4)) if vectors is None else vectors
    np.savez_compressed(path, genes=np.array(genes), embeddings=np.float32(vectors))
    return path


def cells_of(dataset):
    """Labels and expression of every usable cell, sorted: what must not depend on layout or order."""
    cells = zip(dataset.cell_line, dataset.perturbation, dataset.gem_group, dataset.expression[:].tolist())
    return sorted((dataset.cell_lines[line], dataset.perturbations[p], dataset.gem_groups[group], *values)
                  for line, p, group, values in cells if line >= 0)


# ------------------------------------------------------------------------------------------------ reading

LABELS, LOGS, MASK = labels(), normalised(counts()), np.zeros(60, bool)
NAMES, CODES = np.unique(LABELS["gene"], return_inverse=True)
NAMES, LINES, GROUPS = NAMES.tolist(), LABELS["cell_line"], list(map(int, LABELS["gem_group"]))
COMPOUND = [("index", "S8"), ("gene", np.int8), ("cell_line", "S8"), ("gem_group", np.int64)]
X = partial(stored, counts())
LAYOUTS = {
    "dense": X(), "float64": X(dtype="<f8"), "int32": X(dtype="<i4"), "big-endian": X(dtype=">f4"),
    "gzip": X(compression="gzip", chunks=(7, 5)), "lzf": X(compression="lzf", chunks=(7, 5)),
    "csr": X("csr"), "csr gzip": X("csr", compression="gzip"), "csr in reverse": X("csr", direction=-1),
    "csc": X("csc"), "csc gzip": X("csc", compression="gzip"), "csc in reverse": X("csc", direction=-1),
    "csr of 0.6": X("csr", marks=("h5sparse_format", "h5sparse_shape")),
    "obs of 0.6": {"obs": np.array(list(zip("c" * 60, CODES, LINES, GROUPS)), COMPOUND),
                   "uns/gene_categories": NAMES, "var": np.array(GENES, "S8").view([("index", "S8")])},
    "obs of 0.7": {"obs/gene": np.int8(CODES), "obs/__categories/gene": NAMES},
    "references": {"obs/gene": np.int8(CODES), "uns/__categories/gene": NAMES,
                   ("obs/gene", "categories"): lambda file: file["uns/__categories/gene"].ref},
    "nullable": {
        "obs/gene": None, "obs/gene/codes": CODES, "obs/gene/categories/values": NAMES,
        "obs/gene/categories/mask": MASK[:4], "obs/cell_line": None, "obs/cell_line/values": LINES,
        "obs/cell_line/mask": MASK, "obs/gem_group": None, "obs/gem_group/values": GROUPS,
        "obs/gem_group/mask": MASK},
    "plain": {"obs/gene": LABELS["gene"], "obs/cell_line": np.array(LINES, "S"), "obs/gem_group": GROUPS}}


@pytest.mark.parametrize("block", [data.BLOCK_BYTES, 400])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_block_size_gives_the_same_cells(tmp_path, monkeypatch, layout, block):
    monkeypatch.setattr(data, "BLOCK_BYTES", block)
    path = edited(write(tmp_path / "x.h5ad"), LAYOUTS[layout])
    dataset, rows = load(path), np.array([5, 5, 3])
    wanted = sorted(zip(LINES, LABELS["gene"], LABELS["gem_group"], *LOGS.T.tolist()))
    found, wanted = np.array(cells_of(dataset), object), np.array(wanted, object)
    np.testing.assert_array_equal(found[:, :3], wanted[:, :3])
    np.testing.assert_allclose(*(np.float64(cells[:, 3:]) for cells in (found, wanted)), rtol=1e-5)
    assert dataset.genes == GENES and list(data.read_obs(path, ["gene"])["gene"]) == LABELS["gene"]
    np.testing.assert_array_equal(dataset.expression[rows], dataset.expression[:][rows])


IDS = [f"ENSG{i:011d}" for i in range(12)]
BATCHES = np.where(np.arange(60) == 3, np.nan, np.arange(60) % 3)
UNUSED = {name: [*column[:60], *last] for (name, column), last in zip(labels(64).items(), (
    ["CCC", "ONCE", "", "AAA"], ["ORPHAN", "K562", "K562", ""], "1111"))}
FILES = {   # the matrix and obs written, what is edited, options; all else is what is read
    **{f"called {' '.join(names)}": {
        "obs": dict(zip(names, labels(control=names[3]).values())), "cell_lines": ["K562", "RPE1"],
        "gem_groups": ["1", "2"], "perturbations": [names[3], "AAA", "BBB", "CCC"]} for names in (
            ("perturbation", "celltype", "batch", "control"), ("condition", "cell_line", "batch", "NT"),
            ("target_gene", "cell_type", "gem_group", "ctrl"), ("gene", "cell_line", "batch", "NTC"),
            ("Gene", "Cell_Line", "Batch", "Non-Targeting"), ("gene", "cell_line", "batch", "nontargeting"))},
    "names given": {"obs": LABELS | {"condition": [*"AABB"] * 15}, "perturbations": ["A", "B"],
                    "options": {"perturbation_column": "condition", "control": "A"}},
    "neither cell line nor batch": {
        "obs": {"gene": LABELS["gene"]}, "cell_lines": ["all"], "gem_groups": ["all"],
        "conditions": [(0, 1), (0, 2), (0, 3)], "notes": ["no cell line column", "no batch column"]},
    "whole-number batches, one missing": {
        "obs": LABELS | {"gem_group": BATCHES}, "matrix": LOGS, "notes": ["1 cells without a batch"],
        "gem_groups": ["0", "1", "2", "missing"], "gem_group": np.nan_to_num(BATCHES, nan=3).tolist()},
    "another index of var": {
        "edit": {"var/_index": None, "var/symbol": IDS, ("var", "_index"): "symbol"}, "genes": IDS},
    "X_hvg": {"edit": {"obsm/X_hvg": LOGS[:, ::3]}, "genes": ["hvg0", "hvg1", "hvg2", "hvg3"]},
    "X_hvg with names, mapped": {
        "edit": {"obsm/X_hvg": LOGS[:, ::3], "var/highly_variable": np.arange(12) % 3 == 0},
        "genes": GENES[::3], "exactly": LOGS[:, ::3], "mapped": True},
    "counts in X_hvg: X has their totals": {
        "edit": {"obsm/X_hvg": counts()[:, :5]}, "genes": GENES, "notes": ["X holds counts"]},
    "logarithms": {"matrix": LOGS, "exactly": LOGS, "notes": ["X holds log-normalised"]},
    "counts": {"mapped": False, "notes": ["X holds counts"]},
    "Ensembl ids and symbols": {
        "edit": {"var/_index": IDS, "var/feature_name": [*GENES[:10], "twice", "twice"]},
        "genes": [*GENES[:10], *IDS[10:]], "notes": ["feature_name"]},
    "Ensembl ids": {"edit": {"var/_index": IDS}, "genes": IDS, "notes": ["no perturbation knows its own"]},
    **{f"{columns} genes x {scale}": {     # some of the genes can add up to less, all of them to nothing else
        "matrix": np.log1p(np.expm1(LOGS)[:, :columns] * scale), text: ["not on the scale of 10,000"]}
        for columns, scale, text in ((12, 1, "silent"), (12, 3, "notes"), (12, 0.3, "notes"),
                                     (6, 1, "silent"), (6, 3, "notes"), (6, 0.3, "silent"))},
    **{f"unused cells, {kind}": {
        "matrix": matrix, "obs": UNUSED, "perturbations": ["non-targeting", "AAA", "BBB", "CCC"],
        "cell_lines": ["K562", "RPE1"], "conditions": [(line, p) for line in (0, 1) for p in (1, 2, 3)],
        "used": 60, "notes": [
            "2 cells without a cell line or perturbation", "1 conditions with a single cell",
            "1 cell lines without control cells left out: ORPHAN (1 cells)"]}
        for kind, matrix in (("mapped", normalised(counts(64))), ("packed", counts(64)))}}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_as_the_field_means_it_and_what_was_guessed_is_noted(tmp_path, name):
    case = {"matrix": None, "obs": None, "edit": {}, "options": {}, "notes": (), "silent": (), **FILES[name]}
    matrix, obs, edit, options, notes, silent = (case.pop(key) for key in list(case)[:6])
    path = edited(write(tmp_path / "x.h5ad", matrix, obs), edit)
    dataset = load(path, **options)
    if "exactly" in case:
        np.testing.assert_array_equal(dataset.expression[:], case.pop("exactly"))
    conditions = np.ndindex(len(dataset.cell_lines), len(dataset.perturbations))
    cells = [cell for condition in conditions for cell in dataset.cells(*condition)]
    assert len(set(cells)) == (dataset.cell_line >= 0).sum() == (dataset.perturbation >= 0).sum()
    found = {**vars(dataset), "conditions": dataset.conditions(), "used": len(cells),
             "gem_group": dataset.gem_group.tolist(), "mapped": dataset.expression.path == str(path)}
    assert {key: found[key] for key in case} == case
    noted = str(dataset.notes)
    assert all(text in noted for text in notes) and not any(text in noted for text in silent)


def test_what_cannot_be_mapped_is_packed_once_said_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(data.tempfile, "tempdir", str(tmp_path))
    lines, path = [], write(tmp_path / "x.h5ad")
    dataset = load(path, say=lines.append)
    assert "data.py pack" in " ".join(lines) and os.listdir(tmp_path) == ["x.h5ad"]
    assert dataset.name == str(path) and isinstance(dataset.expression.matrix, np.memmap)
    edited(path, stored(np.where(np.eye(60, 12) > 0, np.nan, 1.5), chunks=True))
    with refused(match="x.h5ad: X holds values from nan to nan"):
        load(path)
    assert os.listdir(tmp_path) == ["x.h5ad"]


def test_predicted_cells_stay_as_they_are(tmp_path):
    """Rows in the file's order, all genes, values of any size; neither controls nor embeddings are needed."""
    matrix, obs = 3 * LOGS - 1.0, LABELS | {"gene": ["AAA", "BBB", ""] * 20}
    path = write(tmp_path / "x.h5ad", matrix, obs)
    for storage in ({}, {"chunks": (7, 5)}):
        dataset = data.load(edited(path, stored(matrix, **storage)), predicted=True, hvg=3, say=print)
        np.testing.assert_array_equal(dataset.expression[:], matrix)
        assert [(dataset.perturbations[p] if p >= 0 else "") for p in dataset.perturbation] == obs["gene"]
        assert dataset.conditions() == [(0, 1), (0, 2), (1, 1), (1, 2)] and not len(dataset.cells(0, 0))
    with refused(match="negative"):
        load(path, control="AAA").expression[:]


def test_genes_are_aligned_by_name(tmp_path):
    dataset = load(write(tmp_path / "x.h5ad", LOGS))
    aligned, notes = data.align_genes(dataset, ["G5", "ABSENT", "G0"], missing_share=0.4)
    np.testing.assert_array_equal(aligned(np.arange(60)), LOGS[:, [5, 5, 0]] * [1, 0, 1])
    assert "1 of the 3 genes needed are missing and count as zero: ABSENT" in notes[0]
    assert "10 genes not needed are left out" in notes[1]
    with refused(match="1 of the 3 genes needed are missing: ABSENT"):
        data.align_genes(dataset, ["G5", "ABSENT", "G0"], missing_share=0.3)
    dataset.genes = [str(i) for i in range(12)]             # as STATE writes them
    aligned, notes = data.align_genes(dataset, GENES)
    np.testing.assert_array_equal(aligned(slice(None)), LOGS)
    assert len(notes) == 1 and "numbered" in notes[0]


def test_chosen_genes_have_the_largest_dispersion_within_their_bin(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    varying = np.where(np.arange(150) < 20, (0.3 + rng.integers(0, 4, (400, 1))) / 1.8, 1.0)
    matrix = rng.poisson(rng.gamma(1.0, 3.0, 150) * varying).astype(np.float32)
    monkeypatch.setattr(data, "BLOCK_BYTES", 150 * 4 * 37)       # several blocks
    dataset = load(write(tmp_path / "x.h5ad", matrix), hvg=20)
    scaled = (matrix * (1e4 / matrix.sum(1, keepdims=True))).astype(float)
    mean, variance, score = scaled.mean(0), scaled.var(0, ddof=1), np.ones(150)
    level, dispersion = np.log1p(mean), np.log(variance / mean)  # the plain form of Seurat's rule
    bins = np.maximum(1, np.ceil(20 * (level - level.min()) / np.ptp(level)))
    for here in (bins == number for number in range(1, 21)):
        if here.sum() > 1:
            score[here] = (dispersion[here] - dispersion[here].mean()) / dispersion[here].std(ddof=1)
    assert dataset.genes == [f"G{i}" for i in np.sort(np.argsort(-score)[:20])]
    assert load(write(tmp_path / "log.h5ad", normalised(matrix)), hvg=20).genes == dataset.genes
    assert "the 20 most variable of 150 genes" in str(dataset.notes)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_genept_pickles_are_read(tmp_path, protocol):
    rows = {"AAA": [1.0, 2, -2], "BBB": [2.0, 4, 6], np.str_("CCC"): [4.0, 0, 0], "NONE": [0.0, 0, 0]}
    for form in (list, tuple, np.array, partial(np.array, dtype=np.float32), partial(np.array, dtype=">f4"),
                 lambda row: np.array(row, np.int64) * 0.5, lambda row: [np.float64(x) for x in row]):
        path, table = tmp_path / "GenePT.pickle", {gene: form(row) for gene, row in rows.items()}
        path.write_bytes(pickle.dumps(table, protocol))
        genes, embeddings = data.read_embeddings(path)
        assert genes == ["AAA", "BBB", "CCC"]                           # a zero row is no embedding
        np.testing.assert_array_equal(embeddings, np.array([table[gene] for gene in genes], np.float32))


class Attack(partial):
    __reduce__ = lambda self: (self.func, self.args)


PICKLES = {
    **{call.__name__: {"AAA": Attack(call, *inputs)} for call, *inputs in (
        (os.system, "> ran"), (eval, "open('ran', 'w')"), (exec, "open('ran', 'w')"), (open, "ran", "w"))},
    "getattr": {"AAA": Attack(getattr, Attack(__import__, "os"), "system")},
    "nested": {"AAA": [[{"deep": Attack(subprocess.check_call, ["touch", "ran"])}]]},
    "object array attack": {"AAA": np.array([Attack(os.system, "touch ran")], dtype=object)},
    "object array": {"AAA": np.array([{"any": "object"}], dtype=object)},
    "other class": {"AAA": collections.Counter("ab")},
    "handmade os.system": b"cos\nsystem\n(S'touch ran'\ntR.",
    "dtype of objects": b"cnumpy\ndtype\n(S'O'\ntR.",
    "numpy.load": b"cnumpy\nload\n(S'ran'\ntR.",
    "empty array": b"\x80\x04cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x01tC\x01bt R.",
    "13 bytes that ask for 15 GB": b"\x80\x04\x8e\x00\x00\x00\x80\x03\x00\x00\x00a.",
    "a key slow to hash": b"\x80\x04}K\x01\x85\x94%sK\x01s." % b"".join(
        b"h%ch%c\x86\x94" % (i, i) for i in range(60)),
    "lists in lists": b"\x80\x04}\x8c\x01A]\x94%ss." % b"".join(
        b"](h%ch%ce\x94" % (i, i) for i in range(60)),
    "no end": b"\x80\x04}\x94", "text beyond the end": b"\x80\x04X\xff\xff\xff\x7fa",
    "junk": b"junk that is no pickle at all", "nothing to return": b".",
    "an empty dict": {}, "other lengths": {"A": [1.0], "B": [1.0, 2.0]}, "text": {"A": "text"},
    "digits": {"A": "12"}, "None": {"A": None}, "a number as gene": {3: [1.0]}, "a list": ["A"],
    "a number as row": {"A": 1.0}, "not-a-number": {"A": [float("nan")]},
    "ragged": {"A": [[1.0], [2.0, 3.0]]}, "a line break in a gene": {"A\n": [1.0]}}


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_of_anything_else_is_refused_and_runs_nothing(tmp_path, monkeypatch, name):
    monkeypatch.setattr(data, "SECONDS_TO_OPEN", 1)
    monkeypatch.chdir(tmp_path)                             # where attacks leave a file
    content, path = PICKLES[name], tmp_path / "e.pickle"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    with refused(match="e.pickle"):
        data.read_embeddings(path)
    assert os.listdir() == ["e.pickle"]


def test_a_packed_file_holds_the_same_data_sorted_mapped_and_is_an_anndata_file(tmp_path):
    path, packed = write(tmp_path / "x.h5ad"), tmp_path / "p.h5"
    embeddings = write_embeddings(tmp_path / "e.npz")
    pack(path, packed, genept=embeddings)
    plain, dataset = load(path, genept=embeddings), data.load(packed)
    assert dataset.expression.matrix.filename == str(packed)
    assert (keys := list(zip(dataset.cell_line, dataset.perturbation, dataset.gem_group))) == sorted(keys)
    for name in vars(plain).keys() - {"name", "expression"}:
        np.testing.assert_array_equal(getattr(dataset, name), getattr(plain, name))
    np.testing.assert_array_equal(dataset.expression[:], plain.expression[:])
    assert data.read_embeddings(packed)[0] == ["AAA", "BBB", "CCC"]
    with h5py.File(packed) as file:
        assert file.attrs["encoding-type"] == "anndata" and file["obs"].attrs["encoding-type"] == "dataframe"
        assert list(file["var/_index"].asstr()) == GENES and file["obsm/X_hvg"].chunks is None
        assert set(file["obs"]) == {"_index", "cell_line", "perturbation", "gem_group"}


def test_packing_keeps_the_embeddings_of_the_perturbed_genes_or_all_and_names_twins(tmp_path):
    path, packed, genes = write(tmp_path / "x.h5ad"), tmp_path / "p.h5", ["AAA", "CCC", "ELSE"]
    embeddings = write_embeddings(tmp_path / "e.npz", genes, [[1, 2], [1, 2], [1, 2]])
    for keep_all in (False, True):
        notes = pack(path, packed, genept=embeddings, all_embeddings=keep_all)
        assert data.load(packed).embedding_genes == genes[:3 if keep_all else 2]
        assert ("--all-embeddings" in str(notes)) != keep_all and load(packed).notes == notes
        assert any("1 embeddings belong to several" in note and "AAA = CCC" in note for note in notes)


def test_perturbations_without_an_embedding_are_dropped_counted_and_named_packed_or_not(tmp_path):
    packed, path = tmp_path / "p.h5", write(tmp_path / "x.h5ad")
    pack(path, packed)
    for file in (path, packed):
        with refused(match="--genept"):
            data.load(file)
        embeddings = write_embeddings(tmp_path / "e.npz", genes := ["AAA", "CCC", "ELSE"])
        dataset = load(file, genept=embeddings, need_embeddings=True)
        assert dataset.perturbations == ["non-targeting", "AAA", "CCC"] and dataset.embedding_genes == genes
        assert "1 perturbations without an embedding left out: BBB" in str(dataset.notes)
        table = dataset.perturbation_embeddings()
        assert not table[0].any() and np.array_equal(table[2], dataset.embeddings[1])
        assert cells_of(dataset) == [cell for cell in cells_of(load(file)) if cell[1] != "BBB"]
        assert load(file, genept=embeddings).perturbations == ["non-targeting", "AAA", "BBB", "CCC"]


# ------------------------------------------------------------------------------------------------ splits

SCREEN = data.simulate(cell_lines=3, perturbations=40, genes=10, cells=4, controls=20)   # not to be changed


def sizes(cut):
    return len(cut.train), len(cut.validation), len(cut.test)


def test_every_condition_is_in_one_part_and_the_control_in_none_and_has_the_cells_with_its_labels():
    for line, p in np.ndindex(3, 41):
        here = (SCREEN.cell_line == line) & (SCREEN.perturbation == p)
        assert np.array_equal(SCREEN.cells(line, p), np.flatnonzero(here))
    assert SCREEN.conditions() == [(line, p) for line in range(3) for p in range(1, 41)]
    for rule in ("cell-line:simB", "cell-line:SIMB", "perturbation:0", "perturbation:1", "perturbation:2"):
        cut = data.split(SCREEN, rule)
        assert sorted(cut.train + cut.validation + cut.test) == SCREEN.conditions()    # without controls
        assert all(part == sorted(part) for part in (cut.train, cut.validation, cut.test))


def test_a_held_out_line_keeps_thirty_percent_and_validates_on_ten_percent():
    cut = data.split(SCREEN, "cell-line:simB", seed=0)
    assert {line for line, _ in cut.validation + cut.test} == {1}
    assert (sum(line == 1 for line, _ in cut.train), *sizes(cut)) == (12, 92, 4, 24)
    few = data.simulate(cell_lines=2, perturbations=4, genes=4, cells=2, controls=3)
    few.cell_line[(few.cell_line == 0) & (few.perturbation == 1)] = 1       # one line lacks a perturbation
    assert sizes(data.split(few, "cell-line:simB")) == (3 + 1, 1, 2)
    cut = data.split(SCREEN, "cell-line:simA", seed=0)     # the same on every machine: everybody's results
    assert cut.validation == [(0, 12), (0, 13), (0, 31), (0, 33)]
    assert data.split(SCREEN, "cell-line:simA", seed=1).validation != cut.validation


def test_the_three_folds_cut_the_genes_alike_in_all_lines_and_never_train_on_one_twice():
    cuts = [data.split(SCREEN, f"perturbation:{fold}") for fold in range(3)]
    for cut in cuts:
        assert sizes(cut) == (36, 12, 72)
        assert [len({p for _, p in part}) for part in (cut.train, cut.validation, cut.test)] == [12, 4, 24]
    assert len({p for cut in cuts for _, p in cut.train}) == 36


def test_split_files_hold_out_lines_and_lists_and_count_unknown_names(tmp_path):
    def cut_of(text):
        (tmp_path / "s.toml").write_text(text)
        return data.split(SCREEN, tmp_path / "s.toml")
    cut = cut_of('[datasets]\none = "folder"\ntwo = "folder"\n[training]\none = "train"\n[zeroshot]\n'
                 '"two.simC" = "test"\n"two.nowhere" = "val"\n[fewshot."one.SIMB"]\n'
                 'val = ["GENE001", "GENE002"]\ntest = ["GENE003", "ABSENT"]\n')
    assert cut.validation == [(1, 1), (1, 2)] and sizes(cut) == (40 + 37, 2, 41)
    assert cut.test == [(1, 3), *((2, p) for p in range(1, 41))]
    note, = cut.notes                                       # and none of conditions that belong to no part
    assert "2 of what it lists are not in the data: nowhere, ABSENT in simb" in note
    assert sizes(cut_of('[zeroshot]\n"one.simA" = "test"\n"one.simB" = "train"\n')) == (40, 0, 40)
    cut = cut_of('[fewshot."one.simB"]\ntrain = ["GENE001"]\nval = ["GENE002"]\ntest = ["GENE003"]\n')
    assert sizes(cut) == (1, 1, 1) and "117 conditions belong to no part" in cut.notes[0]


def test_wrong_splits_are_refused_with_the_file_or_what_there_is(tmp_path):
    path, file = tmp_path / "s.toml", r"^\S+s\.toml: |leaves nothing to t"
    for rule, said in {"cell-line:hela": "simA, simB, simC", "perturbation:3": "0, 1 and 2",
                       "random": "cell-line:NAME", "nowhere.toml": "no such file"}.items():
        with refused(match=said):
            data.split(SCREEN, rule)
    for wrong in ('not toml [', '[other]\n', 'training = 3\n', '[training]\na = "train"\n',
                  '[zeroshot]\n"a.simA" = "somewhere"\n', '[zeroshot]\na.simA = "test"\n',
                  *(f'[fewshot."a.simA"]\n{lists}\n' for lists in (
                      'other = ["X"]', 'test = "GENE001"', 'test = [1]', 'test = ["X"]\nval = ["X"]')),
                  '[zeroshot]\n"a.simA" = "test"\n[fewshot."b.sima"]\ntest = ["X"]\n'):
        path.write_text(wrong)
        with refused(match=file):
            data.split(SCREEN, path)


@needs_shared
def test_the_papers_split_files_hold_out_104_and_624_genes():
    for name in ("", "_jurkat", "_k562", "_rpe1"):
        path = SHARED / f"splits/repogle_nadig{name}.toml"
        (key, rule), = tomllib.loads(path.read_text())["fewshot"].items()
        genes = [*rule["val"], *rule["test"], "MYC", "TP53"]
        made = data.simulate(cell_lines=4, perturbations=len(genes), genes=1, cells=1, controls=1)
        made.cell_lines, made.perturbations = ["hepg2", "jurkat", "k562", "rpe1"], ["control", *genes]
        cut = data.split(made, path)
        assert sizes(cut) == (3 * 730 + 2, 104, 624) and not cut.notes
        assert {made.cell_lines[line] for line, _ in cut.test} == {key.partition(".")[2]}


# ------------------------------------------------------------------------------------------------ sampling

def test_a_set_holds_cells_of_its_condition_and_controls_of_the_same_gem_groups():
    shown = data.simulate(cell_lines=2, perturbations=3, genes=4, cells=30, controls=200)
    shown.expression = np.float32(np.arange(len(shown.cell_line)))[:, None].repeat(4, 1)    # the row numbers
    batch = data.SetSampler(shown, shown.conditions(), 16, seed=1).draw(0, range(40))
    assert batch.control.shape == batch.target.shape == (40, 16, 4)
    target, control = batch.target[..., 0].astype(int), batch.control[..., 0].astype(int)
    for rows, perturbation in ((target, batch.perturbation), (control, np.zeros(40))):
        assert (shown.perturbation[rows] == perturbation[:, None]).all()
        assert (shown.cell_line[rows] == batch.cell_line[:, None]).all()
        np.testing.assert_array_equal(shown.gem_group[rows], batch.gem_group)
    assert all(len({*a}) == len({*b}) == 16 and not {*a} & {*b} for a, b in zip(target, control))
    assert {*zip(batch.cell_line, batch.perturbation)} == {*np.ndindex(2, 4)}      # controls are, too
    sampler = data.SetSampler(shown, shown.conditions(), 300, seed=0, controls_too=False)
    batch = sampler.draw(3, range(8))                       # of 30 cells, 200 controls: some repeat
    assert batch.target.shape == (8, 300, 4) and (batch.perturbation > 0).all()
    assert (shown.perturbation[batch.target[..., 0].astype(int)] == batch.perturbation[:, None]).all()
    with refused(match="no conditions"):
        data.SetSampler(shown, [], 12, seed=0)


def test_a_set_depends_on_seed_step_and_number_alone_drawn_ahead_or_not():
    sampler, other_seed = (data.SetSampler(SCREEN, SCREEN.conditions(), 8, seed) for seed in (5, 6))
    whole, half = sampler.draw(7, range(6)), sampler.draw(7, [4, 5])
    for name in ("target", "control"):
        np.testing.assert_array_equal(getattr(whole, name)[4:], getattr(half, name))
    for other in (sampler.draw(8, range(6)), other_seed.draw(7, range(6))):
        assert not np.array_equal(whole.target, other.target)
    for step, batch in zip(range(3, 7), data.prefetch(sampler, range(3, 7), range(2)), strict=True):
        np.testing.assert_array_equal(batch.target, sampler.draw(step, range(2)).target)


def test_a_failing_draw_is_raised_at_the_caller_and_leaves_no_thread():
    failing = SimpleNamespace(draw=lambda step, sets: 1 // (2 - step))      # at step 2
    batches = data.prefetch(failing, range(5), range(1))
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(batches)
    closed = data.prefetch(failing, range(2), range(1))
    next(closed)
    closed.close()
    time.sleep(0.05)
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


def test_evaluation_cells_are_capped_paired_and_rounded_up():
    made = data.simulate(cell_lines=1, perturbations=2, genes=4, cells=90, controls=400)
    cells = partial(data.evaluation_cells, made, seed=3, max_cells=50)
    (real, floor), (again, control) = cells((0, 1)), cells((0, 1), multiple_of=64)
    assert len(set(real)) == 50 and len(control) == 64 and np.array_equal(real, again)
    assert np.array_equal(floor, control[:50])              # the floor does not depend on the size of a set
    assert np.array_equal(made.gem_group[floor], made.gem_group[real])
    assert len(cells((0, 2), max_cells=1000)[0]) == 90 and not np.array_equal(real, cells((0, 1), seed=4)[0])
    assert real[:6].tolist() == [402, 403, 406, 407, 408, 411]                  # the same on every machine
    real, control = cells((0, 0))
    assert not set(real) & set(control)                     # controls are predicted from other controls
    made = data.simulate(cell_lines=2, perturbations=2, genes=4, cells=10, controls=30)
    made.gem_group[made.perturbation == 0] = 0              # the others take controls of the line
    real, control = data.evaluation_cells(made, (1, 1), seed=0)
    assert (made.cell_line[control] == 1).all() and (made.perturbation[control] == 0).all()


def test_the_simulation_comes_from_the_seed_alone_and_is_quick():
    started = time.perf_counter()
    first, again, other = (data.simulate(seed=seed) for seed in (3, 3, 4))
    assert time.perf_counter() - started < 9.0 and first.name == "simulated" in first.notes[0]
    assert np.array_equal(first.expression, again.expression) and (first.embeddings == again.embeddings).all()
    assert not np.array_equal(first.expression, other.expression)


def test_simulated_responses_are_strong_or_weak_and_often_alike_where_embeddings_are():
    made = data.simulate(cell_lines=1, perturbations=60, cells=60)
    control = made.expression[made.cells(0, 0)]
    means = np.stack([made.expression[made.cells(0, p)].mean(0) for p in range(1, 61)])
    response, pairs = means - control.mean(0), np.triu_indices(60, 1)
    half = np.linalg.norm(control[:60].mean(0) - control[60:120].mean(0))
    effects = np.linalg.norm(response, axis=1)
    assert effects.max() > 3 * half and effects.min() < 1.3 * half
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True)
            for rows in (response, made.perturbation_embeddings()[1:])]
    assert 0.15 < np.corrcoef(*((rows @ rows.T)[pairs] for rows in unit))[0, 1] < 0.9


def test_written_anndata_reads_back_in_any_order_of_rows(tmp_path):
    path, obs = tmp_path / "w.h5ad", {"gene": [], "score": []}

    def blocks():
        for i, name in enumerate("aba"):
            obs["gene"].append(name)                        # filled while the blocks are made
            obs["score"].append(0.5 * i)
            yield [2 - i], {"X": [[1.5 * i, 2.0]], "layers/mean": np.full((1, 2), i)}
    uns = {"note": "simulated", "deep": {"n": 3, "names": ["a", "b"]}}
    data.write_anndata(path, ["X1", "X2"], obs, blocks(), 3, uns)
    columns = data.read_obs(path, ["gene", "score"])
    assert list(columns["gene"]) == ["a", "b", "a"] and list(columns["score"]) == ["0", "0.5", "1"]
    with h5py.File(path) as file:
        assert file["X"][:].tolist() == [[3, 2], [1.5, 2], [0, 2]] and file["layers/mean"].shape == (3, 2)
        assert file["uns/deep/n"][()] == 3 and file["uns/note"][()] == b"simulated"
        assert file["X"].chunks is None and file["X"].dtype == np.float32
    for names, cells in (["a"], [[1], [2]]), (["a", "b"], [[1], [2], [3]]):
        with pytest.raises(ValueError, match="obs/gene: 1 values for 2|block of shape .3, 1. for 2"):
            data.write_anndata(tmp_path / "no.h5ad", ["X"], {"gene": names}, [(slice(2), {"X": cells})], 2)
    assert not (tmp_path / "no.h5ad").exists()
    data.write_anndata(path, ["X1"], {"gene": []}, [], 0)
    with h5py.File(path) as file:
        assert file["X"].shape == (0, 1)


def test_csv_files_have_seven_digits_and_empty_cells_for_nan(tmp_path):
    rows = [[1 / 3, float("nan"), "x,y"], [np.float32(2), 3, None]]
    data.write_csv(tmp_path / "x.csv", ["a", "b", "c"], rows)
    assert (tmp_path / "x.csv").read_text() == 'a,b,c\n0.3333333,,"x,y"\n2,3,\n'


@needs_shared
def test_the_real_files_are_read_with_their_embeddings():
    for file, shape, lines in ("norman_mcfaline_4lines", (4381, 500), 4), ("papalexi_thp1", (20729, 299), 1):
        path, embeddings = SHARED / f"data/{file}.h5ad", SHARED / "data/go_embeddings.npz"
        dataset = load(path, genept=embeddings, need_embeddings=True)
        assert dataset.expression.shape == shape and len(dataset.cell_lines) == lines
        assert dataset.expression[:100].dtype == np.float32 and 0 < dataset.expression[:100].max() < 10
        assert dataset.perturbation_embeddings()[1:].any(1).all()
