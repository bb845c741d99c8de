"""Facts about data: what is read from files, which genes are chosen, how conditions are split, sets drawn."""
import collections
import itertools
import os
import pickle
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not there")
GENES = ["AAA", "BBB", *(f"G{i}" for i in range(10))]


# ------------------------------------------------------------------------------------- files made here

def labels(cells=60):
    """obs of two lines, three perturbations and the control, two gem groups."""
    names = ["non-targeting", "AAA", "BBB", "CCC"]
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
    genes = [*GENES, *(f"H{i}" for i in range(matrix.shape[1]))][:matrix.shape[1]]
    data.write_anndata(path, genes, obs or labels(len(matrix)), [(slice(None), {"X": matrix})], len(matrix))
    return path


def rewritten(path, **members):
    """The file with members (X, obs, ...) replaced by what the functions of the open file given write."""
    with h5py.File(path, "a") as file:
        for name, make in members.items():
            if name in file:
                del file[name]
            if make is not None:
                make(file)
    return path


def sparse(matrix, kind, **storage):
    """Writes X as a CSR or CSC group, as AnnData does."""
    def make(file):
        lines = matrix if kind == "csr" else matrix.T
        number, index = np.nonzero(lines)
        group = file.create_group("X")
        data.encode(group, f"{kind}_matrix", "0.1.0").attrs["shape"] = matrix.shape
        group.create_dataset("data", data=lines[number, index], **storage)
        group.create_dataset("indices", data=index.astype(np.int32), **storage)
        ends = np.cumsum((lines != 0).sum(1))
        group.create_dataset("indptr", data=np.append(0, ends).astype(np.int32), **storage)
    return make


def store(matrix, file, **storage):
    file.create_dataset("X", data=matrix, **storage)


def write_embeddings(path, genes=("AAA", "BBB", "CCC")):
    values = np.random.default_rng(1).normal(size=(len(genes), 4)).astype(np.float32)
    np.savez(path, genes=np.array(genes), embeddings=values)
    return path


def load(path, **options):
    return data.load(path, **{"need_embeddings": False, "say": lambda line: None, **options})


def everything(dataset):
    return dataset.expression[np.arange(dataset.expression.shape[0])]


def cells_of(dataset):
    """Labels and expression of every usable cell, sorted: what must not depend on layout or order."""
    cells = zip(dataset.cell_line, dataset.perturbation, dataset.gem_group, everything(dataset).tolist())
    return sorted((dataset.cell_lines[line], dataset.perturbations[p], dataset.gem_groups[group], *values)
                  for line, p, group, values in cells if line >= 0)


def written_cells(matrix, obs):
    columns = [obs[name] for name in ("cell_line", "gene", "gem_group")]
    return sorted((*names, *values) for *names, values in zip(*columns, normalised(matrix).tolist()))


def assert_same(found, wanted, rtol=1e-5):
    assert [cell[:3] for cell in found] == [cell[:3] for cell in wanted]
    np.testing.assert_allclose([cell[3:] for cell in found], [cell[3:] for cell in wanted], rtol=rtol)


# ------------------------------------------------------------------------------------------------ reading

STORED = {"dense": "<f4", "float64": "<f8", "int32": "<i4", "big-endian": ">f4"}


@pytest.mark.parametrize("block", [None, 400])
@pytest.mark.parametrize("layout", [*STORED, "gzip", "lzf", "csr", "csc", "csr gzip", "csc gzip"])
def test_every_matrix_layout_and_block_size_gives_the_same_cells(tmp_path, monkeypatch, layout, block):
    matrix, (kind, *compression) = counts(97), layout.split()
    make = sparse(matrix, kind, **({"compression": "gzip"} if compression else {}))
    if layout in ("gzip", "lzf"):
        make = partial(store, matrix, compression=layout, chunks=(7, 5))
    elif layout in STORED:
        make = partial(store, matrix.astype(STORED[layout]))
    path = rewritten(write(tmp_path / "x.h5ad", matrix), X=make)
    monkeypatch.setattr(data, "BLOCK_BYTES", block or data.BLOCK_BYTES)
    dataset = load(path)
    assert_same(cells_of(dataset), written_cells(matrix, labels(97)))
    rows = np.array([5, 5, 3])
    np.testing.assert_array_equal(dataset.expression[rows], everything(dataset)[rows])


@pytest.mark.parametrize("kind", ["csr", "csc"])
def test_entries_of_a_sparse_matrix_may_stand_in_any_order_but_not_twice(tmp_path, kind):
    path = rewritten(write(tmp_path / "x.h5ad"), X=sparse(counts(), kind))
    with h5py.File(path, "a") as file:
        begin, end = file["X/indptr"][3:5]
        for name in ("data", "indices"):
            file["X"][name][begin:end] = file["X"][name][begin:end][::-1]
    assert_same(cells_of(load(path)), written_cells(counts(), labels()))
    with h5py.File(path, "a") as file:
        twice, line = file["X/indices"][begin], 3
        file["X/indices"][begin + 1] = twice
    cell, gene = (line, twice) if kind == "csr" else (twice, line)
    with pytest.raises(data.DataError, match="x.h5ad: .*several values for one cell.*sum_duplicates"):
        load(path)


def test_sparse_files_of_anndata_0_6_are_read(tmp_path):
    path = rewritten(write(tmp_path / "x.h5ad"), X=sparse(counts(), "csr"))
    with h5py.File(path, "a") as file:
        for name in list(file["X"].attrs):
            del file["X"].attrs[name]
        file["X"].attrs.update({"h5sparse_format": "csr", "h5sparse_shape": counts().shape})
    assert_same(cells_of(load(path)), written_cells(counts(), labels()))


def store_column(obs, name, values, layout):
    """Writes a column as one of the versions of AnnData does."""
    del obs[name]
    names = sorted(set(values))
    codes = np.array([names.index(value) for value in values], np.int8)
    if layout in ("categorical", "nullable categories"):
        obs[f"{name}/codes"] = codes
        if layout == "categorical":
            obs[f"{name}/categories"] = names
        else:
            obs[f"{name}/categories/values"] = names
            obs[f"{name}/categories/mask"] = np.zeros(len(names), bool)
    elif layout in ("__categories", "reference"):
        obs[name], obs[f"__categories/{name}"] = codes, names
        if layout == "reference":
            obs.file[f"uns/{name}"] = names
            obs[name].attrs["categories"] = obs.file[f"uns/{name}"].ref
            del obs["__categories"][name]
    elif layout == "nullable":
        whole = all(value.isdigit() for value in values)
        obs[f"{name}/values"] = np.array(values, np.int64) if whole else values
        obs[f"{name}/mask"] = np.zeros(len(values), bool)
    else:
        obs[name] = values if layout == "strings" else np.array(values, "S")


@pytest.mark.parametrize("layout", ["categorical", "nullable categories", "__categories", "reference",
                                    "nullable", "strings", "fixed strings"])
def test_every_obs_layout_gives_the_same_labels(tmp_path, layout):
    path, obs = write(tmp_path / "x.h5ad"), labels()
    with h5py.File(path, "a") as file:
        for name, values in obs.items():
            store_column(file["obs"], name, values, layout)
    assert_same(cells_of(load(path)), written_cells(counts(), obs))
    assert list(data.read_obs(path, ["gene"])["gene"]) == obs["gene"]


def test_the_compound_tables_of_anndata_0_6_are_read(tmp_path):
    path, obs = write(tmp_path / "x.h5ad"), labels()
    table = np.zeros(60, [("index", "S8"), ("gene", np.int8), ("cell_line", "S8"), ("gem_group", np.int64)])
    genes = sorted(set(obs["gene"]))
    table["gene"], table["cell_line"] = [genes.index(gene) for gene in obs["gene"]], obs["cell_line"]
    table["gem_group"] = obs["gem_group"]
    rewritten(path, obs=lambda file: file.create_dataset("obs", data=table),
              var=lambda file: file.create_dataset("var", data=np.array(GENES, "S8").view([("index", "S8")])))
    with h5py.File(path, "a") as file:
        file["uns/gene_categories"] = genes
    assert_same(cells_of(load(path)), written_cells(counts(), obs))
    assert load(path).genes == GENES


def test_whole_number_gem_groups_and_missing_ones_get_names(tmp_path):
    groups = np.where(np.arange(60) == 3, np.nan, np.arange(60) % 3)
    path = write(tmp_path / "x.h5ad", obs=labels() | {"gem_group": groups})
    dataset = load(path)
    assert dataset.gem_groups == ["0", "1", "2", "missing"] and (dataset.gem_group == 3).sum() == 1
    assert any("1 cells without a batch" in note for note in dataset.notes)


def test_gene_names_come_from_the_column_the_index_attribute_names(tmp_path):
    path = write(tmp_path / "x.h5ad")
    with h5py.File(path, "a") as file:
        file["var"].move("_index", "symbol")
        file["var"].attrs["_index"] = "symbol"
    assert load(path).genes == GENES


def test_x_hvg_is_used_before_x_mapped_and_named_by_the_highly_variable_genes(tmp_path):
    path, mask = write(tmp_path / "x.h5ad"), np.arange(12) % 3 == 0
    with h5py.File(path, "a") as file:
        file["obsm/X_hvg"] = normalised(counts())[:, mask]
    assert load(path).genes == ["hvg0", "hvg1", "hvg2", "hvg3"]
    with h5py.File(path, "a") as file:
        file["var/highly_variable"] = mask
    dataset = load(path)
    assert dataset.genes == [gene for gene, chosen in zip(GENES, mask) if chosen]
    np.testing.assert_allclose(everything(dataset), normalised(counts())[:, mask], rtol=1e-6)
    assert dataset.expression.matrix.filename == str(path)  # contiguous, log-normalised: mapped


def test_counts_in_x_hvg_are_normalised_by_the_totals_over_all_genes(tmp_path):
    path, obs = write(tmp_path / "x.h5ad"), labels()
    with h5py.File(path, "a") as file:
        file["obsm/X_hvg"] = counts()[:, :5]
    assert_same(cells_of(load(path)), [cell[:8] for cell in written_cells(counts(), obs)])


def test_log_normalised_values_are_left_alone_and_said(tmp_path):
    dataset = load(write(tmp_path / "x.h5ad", normalised(counts())))
    np.testing.assert_array_equal(everything(dataset), normalised(counts()))
    assert any("log-normalised" in note for note in dataset.notes)
    assert any("counts" in note for note in load(write(tmp_path / "y.h5ad", counts())).notes)


def test_what_cannot_be_mapped_is_packed_once_said_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(data.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    lines, path = [], write(tmp_path / "x.h5ad")
    dataset = load(path, say=lines.append)
    assert any("data.py pack" in line for line in lines) and not os.listdir(tmp_path / "temporary")
    assert dataset.name == str(path) and isinstance(dataset.expression.matrix, np.memmap)
    rewritten(path, X=partial(store, np.where(np.eye(60, 12) > 0, np.nan, 1.5), chunks=True))
    with pytest.raises(data.DataError, match="x.h5ad: X holds values that are not finite"):
        load(path)
    assert not os.listdir(tmp_path / "temporary")


def test_predicted_cells_stay_as_they_are(tmp_path):
    """Rows in the file's order, all genes, negative values; neither controls nor embeddings are needed."""
    matrix, obs = normalised(counts()) - 1.0, labels() | {"gene": ["AAA", "BBB", ""] * 20}
    path = write(tmp_path / "x.h5ad", matrix, obs)
    for storage in ({}, {"chunks": (7, 5)}):
        rewritten(path, X=partial(store, matrix, **storage))
        dataset = data.load(path, predicted=True, hvg=3, say=lambda line: None)
        np.testing.assert_array_equal(everything(dataset), matrix)
        assert [(dataset.perturbations[p] if p >= 0 else "") for p in dataset.perturbation] == obs["gene"]
        assert dataset.conditions() == [(0, 1), (0, 2), (1, 1), (1, 2)] and not len(dataset.cells(0, 0))
    with pytest.raises(data.DataError, match="negative"):
        load(path, control="AAA").expression[np.arange(60)]


@pytest.mark.parametrize("names", [
    ("perturbation", "celltype", "batch", "control"), ("target_gene", "cell_type", "gem_group", "ctrl"),
    ("condition", "cell_line", "batch", "NT"), ("Gene", "Cell_Line", "Batch", "Non-Targeting"),
    ("gene", "cell_line", "batch", "NTC"), ("gene", "cell_line", "batch", "nontargeting")])
def test_the_spellings_of_the_field_are_recognised(tmp_path, names):
    obs = labels()
    renamed = {names[0]: [names[3] if gene == "non-targeting" else gene for gene in obs["gene"]],
               names[1]: obs["cell_line"], names[2]: obs["gem_group"]}
    dataset = load(write(tmp_path / "x.h5ad", obs=renamed))
    assert dataset.perturbations == [names[3], "AAA", "BBB", "CCC"] and dataset.cell_lines == ["K562", "RPE1"]
    assert dataset.gem_groups == ["1", "2"]


def test_given_names_are_taken_before_recognised_ones(tmp_path):
    obs = labels() | {"condition": ["AAA" if gene == "non-targeting" else "B" for gene in labels()["gene"]]}
    path = write(tmp_path / "x.h5ad", obs=obs)
    with pytest.raises(data.DataError, match="gene or condition|condition or gene"):
        load(path)
    assert load(path, perturbation_column="condition", control="AAA").perturbations == ["AAA", "B"]


def test_a_file_without_a_cell_line_or_batch_column_has_one_of_each_and_says_so(tmp_path):
    dataset = load(write(tmp_path / "x.h5ad", obs={"gene": labels()["gene"]}))
    assert dataset.cell_lines == dataset.gem_groups == ["all"] and len(dataset.conditions()) == 3
    assert all(any(f"no {what} column" in note for note in dataset.notes) for what in ("cell line", "batch"))


def test_columns_that_are_missing_are_named_all_at_once_with_those_there_are(tmp_path):
    path = write(tmp_path / "x.h5ad", obs={"target": labels()["gene"]})
    with pytest.raises(data.DataError, match="no cell line column line;.*no perturbation column recognised.*"
                                             "no batch column group;.*there are target"):
        load(path, cell_line_column="line", batch_column="group")


@pytest.mark.parametrize("symbols, wanted, note", [
    ([*GENES[:10], "twice", "twice"], [*GENES[:10], "ENSG00000000010", "ENSG00000000011"], "feature_name"),
    (None, [f"ENSG{i:011d}" for i in range(12)], "no perturbation knows its own gene")])
def test_ensembl_ids_give_way_to_symbols_where_the_perturbations_are_symbols(tmp_path, symbols, wanted, note):
    path = write(tmp_path / "x.h5ad")
    with h5py.File(path, "a") as file:
        del file["var/_index"]
        file["var/_index"] = [f"ENSG{i:011d}" for i in range(12)]
        if symbols:
            file["var/feature_name"] = symbols
    dataset = load(path)
    assert dataset.genes == wanted and any(note in line for line in dataset.notes)


@pytest.mark.parametrize("scale, noted", [(1.0, False), (3.0, True), (0.3, True)])
@pytest.mark.parametrize("columns", [12, 6])
def test_logarithms_on_another_scale_are_noted(tmp_path, scale, noted, columns):
    """Some of the genes can add up to anything below 10,000, all of them to nothing else."""
    matrix = np.log1p(np.expm1(normalised(counts()))[:, :columns] * scale).astype(np.float32)
    notes = load(write(tmp_path / "x.h5ad", matrix)).notes
    wrong = noted and (columns == 12 or scale > 1)
    assert any("not on the scale of 10,000" in note for note in notes) == wrong
    notes = load(rewritten(tmp_path / "x.h5ad", X=partial(store, matrix, chunks=(7, 5)))).notes
    assert any("values are above 9.21" in note for note in notes) == (matrix > np.log1p(1e4) + 1e-3).any()


@pytest.mark.parametrize("mapped", [False, True])
def test_cells_that_cannot_be_used_are_left_out_and_counted(tmp_path, mapped):
    obs = labels(64)
    obs["gene"][60:] = ["CCC", "ONCE", "", "AAA"]
    obs["cell_line"][60:] = ["ORPHAN", "K562", "K562", ""]
    dataset = load(write(tmp_path / "x.h5ad", normalised(counts(64)) if mapped else counts(64), obs))
    assert dataset.perturbations == ["non-targeting", "AAA", "BBB", "CCC"]
    assert dataset.cell_lines == ["K562", "RPE1"]
    notes = "\n".join(dataset.notes)
    for note in ("2 cells without a cell line or perturbation", "1 conditions with a single cell",
                 "1 cell lines without control cells left out: ORPHAN (1 cells)"):
        assert note in notes
    used = np.concatenate([dataset.cells(line, p) for line in range(2) for p in range(4)])
    assert len(set(used)) == (dataset.cell_line >= 0).sum() == (dataset.perturbation >= 0).sum() == 60
    assert len(dataset.conditions()) == 6


def test_perturbations_without_an_embedding_are_dropped_counted_and_named(tmp_path):
    path = write(tmp_path / "x.h5ad")
    embeddings = write_embeddings(tmp_path / "e.npz", ["AAA", "CCC", "ELSE"])
    dataset = load(path, genept=embeddings, need_embeddings=True)
    assert dataset.perturbations == ["non-targeting", "AAA", "CCC"]
    assert dataset.embedding_genes == ["AAA", "CCC", "ELSE"]
    assert any("1 perturbations without an embedding left out: BBB" in note for note in dataset.notes)
    table = dataset.perturbation_embeddings()
    assert not table[0].any() and np.array_equal(table[2], dataset.embeddings[1])
    assert load(path, genept=embeddings).perturbations == ["non-targeting", "AAA", "BBB", "CCC"]


def test_perturbations_that_share_an_embedding_are_named(tmp_path):
    vectors = [[1.0, 2], [3, 4], [1, 2], [1, 2]]
    np.savez(tmp_path / "e.npz", genes=["AAA", "BBB", "CCC", "ELSE"], embeddings=vectors)
    packed = tmp_path / "p.h5"
    notes = data.pack(write(tmp_path / "x.h5ad"), packed, genept=tmp_path / "e.npz", say=lambda line: None)
    assert any("1 embeddings belong to several" in note and "AAA = CCC" in note for note in notes)
    assert load(packed).notes == notes


def test_cells_and_conditions_agree_with_the_labels():
    dataset = data.simulate(cell_lines=2, perturbations=5, genes=8, cells=6, controls=9)
    for line, p in itertools.product(range(2), range(6)):
        here = (dataset.cell_line == line) & (dataset.perturbation == p)
        assert np.array_equal(dataset.cells(line, p), np.flatnonzero(here))
    assert dataset.conditions() == [(line, p) for line in range(2) for p in range(1, 6)]


def test_genes_are_aligned_by_name(tmp_path):
    dataset = load(write(tmp_path / "x.h5ad", normalised(counts())))
    aligned, notes = data.align_genes(dataset, ["G3", "ABSENT", "AAA"], missing_share=0.4)
    wanted = np.stack([normalised(counts())[:, 5], np.zeros(60), normalised(counts())[:, 0]], 1)
    np.testing.assert_array_equal(aligned(np.arange(60)), wanted)
    assert "1 of the 3 genes needed are missing and count as zero: ABSENT" in notes[0]
    assert "10 genes not needed are left out" in notes[1]
    with pytest.raises(data.DataError, match="1 of the 3 genes needed are missing: ABSENT"):
        data.align_genes(dataset, ["G3", "ABSENT", "AAA"], missing_share=0.3)
    dataset.genes = [str(i) for i in range(12)]             # as STATE writes them
    aligned, notes = data.align_genes(dataset, GENES)
    np.testing.assert_array_equal(aligned(slice(None)), normalised(counts()))
    assert len(notes) == 1 and "numbered" in notes[0]


# ------------------------------------------------------------------------------------------------ HVGs

def test_chosen_genes_have_the_largest_dispersion_within_their_bin(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 4, 400)
    varying = np.where(np.arange(150) < 20, (0.3 + groups[:, None]) / 1.8, 1.0)
    matrix = rng.poisson(rng.gamma(1.0, 3.0, 150) * varying).astype(np.float32)
    path = write(tmp_path / "x.h5ad", matrix)
    scaled = (matrix * (1e4 / matrix.sum(1, keepdims=True))).astype(float)
    mean, variance = scaled.mean(0), scaled.var(0, ddof=1)
    monkeypatch.setattr(data, "BLOCK_BYTES", 150 * 4 * 37)       # several blocks
    dataset = load(path, hvg=20)
    score = np.full(150, np.nan)                                 # the plain form of Seurat's rule
    level, dispersion = np.log1p(mean), np.log(variance / mean)
    edges = np.linspace(level.min(), level.max(), 21)
    edges[0] -= 1
    for low, high in zip(edges[:-1], edges[1:]):
        here = (level > low) & (level <= high)
        if here.sum() == 1:
            score[here] = 1.0
        elif here.any():
            score[here] = (dispersion[here] - dispersion[here].mean()) / dispersion[here].std(ddof=1)
    names = [*GENES, *(f"H{i}" for i in range(150))]
    assert dataset.genes == [names[i] for i in np.sort(np.argsort(-score)[:20])]
    assert load(write(tmp_path / "log.h5ad", normalised(matrix)), hvg=20).genes == dataset.genes
    assert any("the 20 most variable of 150 genes" in note for note in dataset.notes)


# ------------------------------------------------------------------------------------------------ embeddings

@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("form", [
    list, tuple, np.array, lambda row: np.array(row, np.float32), lambda row: np.array(row, ">f4"),
    lambda row: np.array(row, np.int64) * 0.5, lambda row: [np.float64(x) for x in row]],
    ids=["lists", "tuples", "float64", "float32", "big-endian", "products", "scalars"])
def test_genept_pickles_are_read(tmp_path, protocol, form):
    rows = {"AAA": [1.0, 2, -2], "BBB": [2.0, 4, 6], np.str_("CCC"): [4.0, 0, 0], "NONE": [0.0, 0, 0]}
    path = tmp_path / "GenePT.pickle"
    table = {gene: form(row) for gene, row in rows.items()}
    path.write_bytes(pickle.dumps(table, protocol))
    genes, embeddings = data.read_embeddings(path)
    assert genes == ["AAA", "BBB", "CCC"]                               # a zero row is no embedding
    np.testing.assert_array_equal(embeddings, np.array([table[gene] for gene in genes], np.float32))


class Attack:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


ATTACKS = {
    "os.system": lambda mark: Attack(os.system, f"touch {mark}"),
    "eval": lambda mark: Attack(eval, f"open({str(mark)!r}, 'w')"),
    "exec": lambda mark: Attack(exec, f"open({str(mark)!r}, 'w')"),
    "open": lambda mark: Attack(open, str(mark), "w"),
    "getattr": lambda mark: Attack(getattr, Attack(__import__, "os"), "system"),
    "nested": lambda mark: [[{"deep": Attack(subprocess.check_call, ["touch", str(mark)])}]],
    "object array attack": lambda mark: np.array([Attack(os.system, f"touch {mark}")], dtype=object),
    "object array": lambda mark: np.array([{"any": "object"}], dtype=object),
    "other class": lambda mark: collections.Counter("ab")}
HANDMADE = [
    b"cos\nsystem\n(S'touch %s'\ntR.", b"cnumpy\ndtype\n(S'O'\ntR.", b"cnumpy\nload\n(S'%s'\ntR.",
    b"\x80\x04cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x01tC\x01bt R.",
    b"\x80\x04\x8e\x00\x00\x00\x80\x03\x00\x00\x00a.",                      # 13 bytes that ask for 15 GB
    b"\x80\x04}K\x01\x85\x94%sK\x01s." % b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(60)),  # slow
    b"\x80\x04}\x8c\x01A]\x94%ss." % b"".join(b"](h%ch%ce\x94" % (i, i) for i in range(60)),  # nested lists
    b"\x80\x04}\x94", b"\x80\x04X\xff\xff\xff\x7fa", b"junk that is no pickle at all", b"."]
TABLES = [{}, {"A": [1.0], "B": [1.0, 2.0]}, {"A": "text"}, {"A": None}, {3: [1.0]}, ["A"], {"A": 1.0},
          {"A": "12"}, {"A": [float("nan")]}, {"A": [[1.0], [2.0, 3.0]]}, {"A\n": [1.0]}]


@pytest.mark.parametrize("content", [*ATTACKS, *HANDMADE, *TABLES])
def test_a_pickle_of_anything_else_is_refused_and_runs_nothing(tmp_path, monkeypatch, content):
    monkeypatch.setattr(data, "SECONDS_TO_OPEN", 1)
    path, mark = tmp_path / "e.pickle", tmp_path / "ran"
    if isinstance(content, bytes):
        path.write_bytes(content.replace(b"%s", str(mark).encode()))
    else:
        table = {"AAA": ATTACKS[content](mark)} if isinstance(content, str) else content
        path.write_bytes(pickle.dumps(table))
    with pytest.raises(data.DataError, match="e.pickle"):
        data.read_embeddings(path)
    assert not mark.exists()


# ------------------------------------------------------------------------------------------------ packing

def test_a_packed_file_holds_the_same_data_sorted_mapped_and_is_an_anndata_file(tmp_path):
    path, packed = write(tmp_path / "x.h5ad"), tmp_path / "p.h5"
    embeddings = write_embeddings(tmp_path / "e.npz")
    data.pack(path, packed, say=lambda line: None, genept=embeddings)
    plain, dataset = load(path, genept=embeddings), data.load(packed)
    assert dataset.expression.matrix.filename == str(packed)
    key = list(zip(dataset.cell_line, dataset.perturbation, dataset.gem_group))
    assert key == sorted(key)
    assert_same(cells_of(dataset), written_cells(counts(), labels()))
    for name in ("genes", "cell_lines", "perturbations", "gem_groups", "embedding_genes", "notes"):
        assert getattr(dataset, name) == getattr(plain, name)
    for name in ("embeddings", "cell_line", "perturbation", "gem_group"):
        np.testing.assert_array_equal(getattr(dataset, name), getattr(plain, name))
    np.testing.assert_array_equal(everything(dataset), everything(plain))
    assert data.read_embeddings(packed)[0] == ["AAA", "BBB", "CCC"]
    with h5py.File(packed) as file:
        assert file.attrs["encoding-type"] == "anndata" and file["obs"].attrs["encoding-type"] == "dataframe"
        assert list(file["var/_index"].asstr()) == GENES and file["obsm/X_hvg"].chunks is None
        assert set(file["obs"]) == {"_index", "cell_line", "perturbation", "gem_group"}


@pytest.mark.parametrize("everything", [False, True])
def test_packing_keeps_the_embeddings_of_the_perturbed_genes_or_all(tmp_path, everything):
    path, options = write(tmp_path / "x.h5ad"), {"say": lambda line: None, "all_embeddings": everything}
    options["genept"] = write_embeddings(tmp_path / "e.npz", ["AAA", "CCC", "ELSE"])
    notes = data.pack(path, tmp_path / "p.h5", **options)
    assert data.load(tmp_path / "p.h5").embedding_genes == ["AAA", "CCC", "ELSE"][:3 if everything else 2]
    assert any("--all-embeddings" in note for note in notes) != everything


def test_a_file_packed_without_embeddings_takes_them_at_loading(tmp_path):
    packed = tmp_path / "p.h5"
    data.pack(write(tmp_path / "x.h5ad"), packed, say=lambda line: None)
    with pytest.raises(data.DataError, match="--genept"):
        data.load(packed)
    dataset = data.load(packed, genept=write_embeddings(tmp_path / "e.npz", ["AAA", "CCC"]))
    assert dataset.perturbations == ["non-targeting", "AAA", "CCC"]
    assert cells_of(dataset) == [cell for cell in cells_of(load(packed)) if cell[1] != "BBB"]


# ------------------------------------------------------------------------------------------------ splits

@pytest.fixture(scope="module")
def simulated():
    return data.simulate(cell_lines=3, perturbations=40, genes=10, cells=4, controls=20)


def parts_of(cut):
    return [set(cut.train), set(cut.validation), set(cut.test)]


RULES = ["cell-line:simB", "cell-line:SIMB", "perturbation:0", "perturbation:1", "perturbation:2"]


@pytest.mark.parametrize("rule", RULES)
def test_no_condition_is_in_two_parts_and_controls_are_in_none(simulated, rule):
    cut = data.split(simulated, rule)
    train, validation, test = parts_of(cut)
    assert not train & validation and not train & test and not validation & test
    assert train | validation | test == set(simulated.conditions())
    assert all(p != 0 for _, p in simulated.conditions())
    assert all(part == sorted(part) for part in (cut.train, cut.validation, cut.test))


def test_a_held_out_line_keeps_thirty_percent_and_validates_on_ten_percent(simulated):
    cut = data.split(simulated, "cell-line:simB")
    assert {line for line, _ in cut.validation + cut.test} == {1}
    assert (sum(line == 1 for line, _ in cut.train), len(cut.validation), len(cut.test)) == (12, 4, 24)
    few = data.simulate(cell_lines=2, perturbations=4, genes=4, cells=2, controls=3)
    few.cell_line[(few.cell_line == 0) & (few.perturbation == 1)] = 1       # one line lacks a perturbation
    assert [len(part) for part in parts_of(data.split(few, "cell-line:simB"))] == [3 + 1, 1, 2]


def test_the_three_folds_cut_the_genes_alike_in_all_lines_and_never_train_on_one_twice(simulated):
    trained = []
    for fold in range(3):
        cut = data.split(simulated, f"perturbation:{fold}")
        assert [len({p for _, p in part}) for part in parts_of(cut)] == [12, 4, 24]
        assert [len(part) for part in parts_of(cut)] == [36, 12, 72]
        trained += {p for _, p in cut.train}
    assert len(trained) == len(set(trained)) == 36


def test_splits_are_the_same_on_every_machine(simulated):
    """The held-out perturbations written down once: a change of this list changes everybody's results."""
    cut = data.split(simulated, "cell-line:simA", seed=0)
    names = [simulated.perturbations[p] for _, p in cut.validation]
    assert names == ["GENE012", "GENE013", "GENE031", "GENE033"]
    assert data.split(simulated, "cell-line:simA", seed=1).validation != cut.validation


def test_split_files_hold_out_lines_and_lists_and_count_unknown_names(simulated, tmp_path):
    path = tmp_path / "s.toml"
    path.write_text('[datasets]\none = "folder"\ntwo = "folder"\n[training]\none = "train"\n[zeroshot]\n'
                    '"two.simC" = "test"\n"two.nowhere" = "val"\n[fewshot."one.SIMB"]\n'
                    'val = ["GENE001", "GENE002"]\ntest = ["GENE003", "ABSENT"]\n')
    cut = data.split(simulated, path)
    names = [{(simulated.cell_lines[line], simulated.perturbations[p]) for line, p in part}
             for part in parts_of(cut)]
    assert names[1] == {("simB", "GENE001"), ("simB", "GENE002")} and len(names[0]) == 40 + 37
    assert {line for line, _ in names[2]} == {"simC", "simB"} and len(names[2]) == 41
    assert ("simB", "GENE003") in names[2]
    notes = "\n".join(cut.notes)
    assert "1 perturbations listed for SIMB are not in the data: ABSENT" in notes
    assert "1 cell lines are not in the data: nowhere" in notes and "no part" not in notes
    path.write_text('[zeroshot]\n"one.simA" = "test"\n"one.simB" = "train"\n')
    assert [len(part) for part in parts_of(data.split(simulated, path))] == [40, 0, 40]
    path.write_text('[fewshot."one.simB"]\ntrain = ["GENE001"]\nval = ["GENE002"]\ntest = ["GENE003"]\n')
    cut = data.split(simulated, path)
    assert [len(part) for part in parts_of(cut)] == [1, 1, 1]
    assert "117 conditions belong to no part" in cut.notes[0]


@pytest.mark.parametrize("text", [
    "not toml [", "[other]\n", '[zeroshot]\n"a.simA" = "somewhere"\n', '[zeroshot]\na.simA = "test"\n',
    'training = 3\n', '[fewshot."a.simA"]\nother = ["X"]\n', '[fewshot."a.simA"]\ntest = "GENE001"\n',
    '[training]\na = "train"\n', '[fewshot."a.simA"]\ntest = ["X"]\nval = ["X"]\n',
    '[fewshot."a.simA"]\ntest = [1]\n',
    '[zeroshot]\n"a.simA" = "test"\n[fewshot."b.sima"]\ntest = ["X"]\n'])
def test_wrong_split_files_are_refused_by_name(simulated, tmp_path, text):
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(data.DataError, match=r"^\S+s\.toml: |leaves nothing to test"):
        data.split(simulated, str(tmp_path / "s.toml"))


@pytest.mark.parametrize("rule, needed", [
    ("cell-line:hela", "simA, simB, simC"), ("perturbation:3", "0, 1 and 2"), ("random", "cell-line:NAME"),
    ("nowhere.toml", "no such file")])
def test_wrong_split_rules_list_what_there_is(simulated, rule, needed):
    with pytest.raises(data.DataError, match=needed):
        data.split(simulated, rule)


@needs_shared
@pytest.mark.parametrize("file", ["", "_jurkat", "_k562", "_rpe1"])
def test_the_papers_split_files_hold_out_104_and_624_genes(file):
    path = SHARED / "splits" / f"repogle_nadig{file}.toml"
    training, rules = data.read_split_file(path)
    (key, rule), = rules.items()
    names, lines = [*rule["val"], *rule["test"], "MYC", "TP53"], ["hepg2", "jurkat", "k562", "rpe1"]
    cell_line, perturbation = np.divmod(np.arange(4 * len(names) + 4), len(names) + 1)
    dataset = data.Dataset("made", ["G"], lines, ["non-targeting", *names], ["all"], None, cell_line,
                           perturbation, np.zeros(len(cell_line), int), [], np.zeros((0, 0)))
    cut = data.split(dataset, path)
    assert (len(cut.validation), len(cut.test), len(cut.train)) == (104, 624, 3 * 730 + 2)
    assert {lines[line] for line, _ in cut.test} == {key.partition(".")[2]} and not cut.notes


# ------------------------------------------------------------------------------------------------ sampling

def showing_rows(**options):
    """A simulation in which the expression of a cell is its row number."""
    dataset = data.simulate(genes=4, **options)
    dataset.expression = np.arange(len(dataset.cell_line), dtype=np.float32)[:, None].repeat(4, 1)
    return dataset


def test_a_set_holds_cells_of_its_condition_and_controls_of_the_same_gem_groups():
    dataset = showing_rows(cell_lines=2, perturbations=3, cells=30, controls=200)
    batch = data.SetSampler(dataset, dataset.conditions(), 16, seed=1).draw(0, range(40))
    assert batch.control.shape == batch.target.shape == (40, 16, 4) and batch.gem_group.shape == (40, 16)
    for number in range(40):
        target, control = batch.target[number, :, 0].astype(int), batch.control[number, :, 0].astype(int)
        assert (dataset.perturbation[target] == batch.perturbation[number]).all()
        assert (dataset.perturbation[control] == 0).all()
        assert (dataset.cell_line[np.append(target, control)] == batch.cell_line[number]).all()
        assert np.array_equal(dataset.gem_group[target], dataset.gem_group[control])
        assert np.array_equal(dataset.gem_group[control], batch.gem_group[number])
        assert len(set(target)) == len(set(control)) == 16 and not set(target) & set(control)
    seen = set(zip(batch.cell_line.tolist(), batch.perturbation.tolist()))
    assert seen == {(line, p) for line in range(2) for p in range(4)}       # controls are a condition, too


def test_cells_repeat_only_where_there_are_fewer_than_a_set_needs():
    dataset = showing_rows(cell_lines=1, perturbations=2, cells=5, controls=6)
    batch = data.SetSampler(dataset, dataset.conditions(), 12, seed=0, controls_too=False).draw(3, range(8))
    assert batch.target.shape == (8, 12, 4)
    assert (dataset.perturbation[batch.target[..., 0].astype(int)] == batch.perturbation[:, None]).all()
    with pytest.raises(data.DataError, match="no conditions"):
        data.SetSampler(dataset, [], 12, seed=0)


def test_a_gem_group_without_controls_takes_controls_of_the_line():
    dataset = data.simulate(cell_lines=2, perturbations=2, genes=4, cells=10, controls=30)
    dataset.gem_group[dataset.perturbation == 0] = 0
    real, control = data.evaluation_cells(dataset, (1, 1), seed=0)
    assert (dataset.cell_line[control] == 1).all() and (dataset.perturbation[control] == 0).all()


def test_a_set_depends_on_seed_step_and_number_alone(simulated):
    sampler = data.SetSampler(simulated, simulated.conditions(), 8, seed=5)
    whole, half = sampler.draw(7, range(6)), sampler.draw(7, [4, 5])
    np.testing.assert_array_equal(whole.target[4:], half.target)
    np.testing.assert_array_equal(whole.control[4:], half.control)
    other_seed = data.SetSampler(simulated, simulated.conditions(), 8, seed=6)
    for other in (sampler.draw(8, range(6)), other_seed.draw(7, range(6))):
        assert not np.array_equal(whole.target, other.target)


def test_prefetching_gives_the_batches_of_drawing_and_draws_ahead(simulated):
    sampler = data.SetSampler(simulated, simulated.conditions(), 8, seed=5)
    for step, batch in zip(range(3, 7), data.prefetch(sampler, range(3, 7), range(2)), strict=True):
        np.testing.assert_array_equal(batch.target, sampler.draw(step, range(2)).target)


def test_a_failing_draw_is_raised_at_the_caller_and_leaves_no_thread():
    class Failing:
        def draw(self, step, sets):
            if step == 2:
                raise data.DataError("the disk is gone")
            return step
    batches = data.prefetch(Failing(), range(5), range(1))
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(data.DataError, match="gone"):
        next(batches)
    closed = data.prefetch(Failing(), range(2), range(1))
    next(closed)
    closed.close()
    time.sleep(0.05)
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


def test_evaluation_cells_are_capped_paired_and_rounded_up():
    dataset = data.simulate(cell_lines=1, perturbations=2, genes=4, cells=90, controls=400)
    real, control = data.evaluation_cells(dataset, (0, 1), seed=3, max_cells=50, multiple_of=64)
    assert len(set(real)) == 50 and len(control) == 64
    assert np.array_equal(dataset.gem_group[control[:50]], dataset.gem_group[real])
    again, floor = data.evaluation_cells(dataset, (0, 1), seed=3, max_cells=50)
    assert np.array_equal(floor, control[:50])  # the floor does not depend on the size of a set
    assert np.array_equal(real, again) and len(data.evaluation_cells(dataset, (0, 2), seed=3)[0]) == 90
    assert not np.array_equal(real, data.evaluation_cells(dataset, (0, 1), seed=4, max_cells=50)[0])
    assert real[:6].tolist() == [402, 403, 406, 407, 408, 411]                  # the same on every machine
    real, control = data.evaluation_cells(dataset, (0, 0), seed=3, max_cells=50)
    assert not set(real) & set(control)                     # controls are predicted from other controls


# ------------------------------------------------------------------------------------------------ simulation

def test_the_simulation_comes_from_the_seed_alone_and_is_quick():
    started = time.perf_counter()
    first = data.simulate(seed=3)
    assert time.perf_counter() - started < 3.0
    second = data.simulate(seed=3)
    np.testing.assert_array_equal(first.expression, second.expression)
    np.testing.assert_array_equal(first.embeddings, second.embeddings)
    assert not np.array_equal(first.expression, data.simulate(seed=4).expression)
    assert first.name == "simulated" and any("simulated" in note for note in first.notes)


def test_simulated_responses_are_strong_for_some_perturbations_and_weak_for_others():
    dataset = data.simulate()
    control = dataset.expression[dataset.cells(0, 0)]
    half = np.linalg.norm(control[:40].mean(0) - control[40:].mean(0))
    means = [dataset.expression[dataset.cells(0, p)].mean(0) for p in range(1, 81)]
    effects = [np.linalg.norm(mean - control.mean(0)) for mean in means]
    assert max(effects) > 3 * half and min(effects) < 1.3 * half


def test_similar_simulated_embeddings_often_but_not_always_mean_similar_responses():
    dataset = data.simulate(cell_lines=1, perturbations=60, cells=60)
    table = dataset.perturbation_embeddings()[1:]
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    base = dataset.expression[dataset.cells(0, 0)].mean(0)
    response = np.stack([dataset.expression[dataset.cells(0, p)].mean(0) - base for p in range(1, 61)])
    response /= np.linalg.norm(response, axis=1, keepdims=True)
    pairs = np.triu_indices(60, 1)
    correlation = np.corrcoef((table @ table.T)[pairs], (response @ response.T)[pairs])[0, 1]
    assert 0.15 < correlation < 0.9


# ------------------------------------------------------------------------------------------------ writing

def test_written_anndata_reads_back_in_any_order_of_rows(tmp_path):
    path, obs = tmp_path / "w.h5ad", {"gene": [], "score": []}
    uns = {"note": "simulated", "deep": {"n": 3, "names": ["a", "b"]}}

    def blocks():
        for i, name in enumerate("aba"):
            obs["gene"].append(name)                        # filled while the blocks are made
            obs["score"].append(0.5 * i)
            yield [2 - i], {"X": [[1.5 * i, 2.0]], "layers/mean": np.full((1, 2), i)}
    data.write_anndata(path, ["X1", "X2"], obs, blocks(), 3, uns)
    columns = data.read_obs(path, ["gene", "score"])
    assert list(columns["gene"]) == ["a", "b", "a"] and list(columns["score"]) == [0.0, 0.5, 1.0]
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["X"][:], [[3, 2], [1.5, 2], [0, 2]])
        assert file["layers/mean"].shape == (3, 2)
        assert file["uns/deep/n"][()] == 3 and file["uns/note"][()] == b"simulated"
        assert file["X"].chunks is None and file["X"].dtype == np.float32
    data.write_anndata(path, ["X1"], {"gene": []}, [], 0)
    with h5py.File(path) as file:
        assert file["X"].shape == (0, 1)


def test_csv_files_have_seven_digits_and_empty_cells_for_nan(tmp_path):
    rows = [[1 / 3, float("nan"), "x,y"], [np.float32(2), 3, None]]
    data.write_csv(tmp_path / "x.csv", ["a", "b", "c"], rows)
    assert (tmp_path / "x.csv").read_text() == 'a,b,c\n0.3333333,,"x,y"\n2,3,\n'


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write(tmp_path / "x.h5ad")
    before = path.read_bytes()

    def blocks():
        yield slice(0, 60), {"X": counts()}
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        data.write_anndata(path, GENES, labels(), blocks(), 60)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.h5ad"]


# ------------------------------------------------------------------------------------------------ real cells

@needs_shared
@pytest.mark.parametrize("file, shape, lines", [("norman_mcfaline_4lines.h5ad", (4381, 500), 4),
                                                ("papalexi_thp1.h5ad", (20729, 299), 1)])
def test_the_real_files_are_read_with_their_embeddings(file, shape, lines):
    embeddings = SHARED / "data" / "go_embeddings.npz"
    dataset = load(SHARED / "data" / file, genept=embeddings, need_embeddings=True)
    assert dataset.expression.shape == shape and len(dataset.cell_lines) == lines
    rows = dataset.expression[np.arange(100)]
    assert rows.dtype == np.float32 and np.isfinite(rows).all() and 0 < rows.max() < 10
    assert dataset.perturbation_embeddings()[1:].any(1).all()
