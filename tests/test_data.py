"""Facts about data: what is read from files, which genes are chosen, how conditions are split, which cells a set holds."""
import collections
import itertools
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(__file__).resolve().parents[2] / "shared"
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not there")


# ------------------------------------------------------------------------------------------------------- files made here

def labels(cells=60):
    """obs of two lines, three perturbations and the control, two gem groups."""
    names = ["non-targeting", "AAA", "BBB", "CCC"]
    return {"gene": [names[i // 2 % 4] for i in range(cells)], "cell_line": ["K562" if i % 2 else "RPE1" for i in range(cells)],
            "gem_group": [str(1 + i // 8 % 2) for i in range(cells)]}


def counts(cells=60, genes=12, seed=0):
    """Counts with some zeros; gene means differ."""
    rng = np.random.default_rng(seed)
    return rng.poisson(rng.gamma(2.0, 2.0, genes), (cells, genes)).astype(np.float32)


def genes_of(number):
    return ["AAA", "BBB", *(f"G{i}" for i in range(number - 2))]


def expected(matrix):
    return np.log1p(matrix * (1e4 / matrix.sum(1, keepdims=True)))


def write(path, matrix=None, obs=None, genes=None):
    matrix = counts() if matrix is None else matrix
    data.write_anndata(path, genes or genes_of(matrix.shape[1]), [(matrix, obs or labels(len(matrix)), {})])
    return path


def write_sparse(file, key, matrix, kind, **storage):
    """A CSR or CSC group as AnnData writes it."""
    lines = matrix if kind == "csr" else matrix.T
    number, index = np.nonzero(lines)
    group = file.create_group(key)
    group.attrs.update({"encoding-type": f"{kind}_matrix", "encoding-version": "0.1.0", "shape": np.array(matrix.shape)})
    group.create_dataset("data", data=lines[number, index], **storage)
    group.create_dataset("indices", data=index.astype(np.int32), **storage)
    group.create_dataset("indptr", data=np.concatenate([[0], np.cumsum((lines != 0).sum(1))]).astype(np.int32), **storage)
    return group


def texts(values):
    return np.array(values, dtype=object)


def write_embeddings(path, genes=("AAA", "BBB", "CCC"), size=4):
    np.savez(path, genes=np.array(genes), embeddings=np.random.default_rng(1).normal(size=(len(genes), size)).astype(np.float32))
    return path


def load(path, **options):
    return data.load(path, need_embeddings=False, **options)


def everything(dataset):
    return dataset.expression[np.arange(dataset.expression.shape[0])]


def names_of_cells(dataset):
    return [(dataset.cell_lines[line], dataset.perturbations[p], dataset.batches[b])
            for line, p, b in zip(dataset.cell_line, dataset.perturbation, dataset.batch)]


# --------------------------------------------------------------------------------------------------------------- reading

@pytest.mark.parametrize("layout", ["dense", "gzip", "lzf", "float64", "int32", "big-endian", "csr", "csc", "csr-gzip", "csc-gzip"])
def test_every_matrix_layout_gives_the_same_expression(tmp_path, layout):
    matrix, path = counts(), tmp_path / "x.h5ad"
    write(path, matrix)
    with h5py.File(path, "a") as file:
        del file["X"]
        kind, _, compression = layout.partition("-")
        if kind in ("csr", "csc"):
            write_sparse(file, "X", matrix, kind, **({"compression": compression} if compression else {}))
        elif layout in ("gzip", "lzf"):
            file.create_dataset("X", data=matrix, compression=layout, chunks=(7, 5))
        else:
            file["X"] = matrix.astype({"dense": "<f4", "float64": "<f8", "int32": "<i4", "big-endian": ">f4"}[layout])
    np.testing.assert_allclose(everything(load(path)), expected(matrix), rtol=1e-5)


@pytest.mark.parametrize("kind", ["csr", "csc"])
def test_entries_of_a_sparse_matrix_may_stand_in_any_order_but_not_twice(tmp_path, kind):
    matrix, path = counts(), tmp_path / "x.h5ad"
    write(path, matrix)
    with h5py.File(path, "a") as file:
        del file["X"]
        group = write_sparse(file, "X", matrix, kind)
        begin, end = group["indptr"][3:5]
        for name in ("data", "indices"):
            group[name][begin:end] = group[name][begin:end][::-1]
    np.testing.assert_allclose(everything(load(path)), expected(matrix), rtol=1e-5)
    with h5py.File(path, "a") as file:
        file["X/indices"][begin + 1] = file["X/indices"][begin]
    with pytest.raises(data.DataError, match="several values for cell .*, gene .*sum_duplicates"):
        load(path)


@pytest.mark.parametrize("kind", ["csr", "csc"])
def test_matrices_larger_than_a_block_are_read_whole(tmp_path, monkeypatch, kind):
    matrix, path = counts(97), tmp_path / "x.h5ad"
    write(path, matrix)
    with h5py.File(path, "a") as file:
        del file["X"]
        write_sparse(file, "X", matrix, kind)
    monkeypatch.setattr(data, "BLOCK_BYTES", 400)
    dataset = load(path)
    np.testing.assert_allclose(everything(dataset), expected(matrix), rtol=1e-5)
    assert dataset.expression[np.array([5, 5, 3])].shape == (3, 12)


def test_sparse_files_of_anndata_0_6_are_read(tmp_path):
    matrix, path = counts(), tmp_path / "x.h5ad"
    write(path, matrix)
    with h5py.File(path, "a") as file:
        del file["X"]
        group = write_sparse(file, "X", matrix, "csr")
        for name in list(group.attrs):
            del group.attrs[name]
        group.attrs.update({"h5sparse_format": "csr", "h5sparse_shape": np.array(matrix.shape)})
    np.testing.assert_allclose(everything(load(path)), expected(matrix), rtol=1e-5)


def categorical_group(obs, name, values):
    names = sorted(set(values) - {""})
    group = obs.create_group(name)
    group["codes"] = np.array([names.index(value) if value else -1 for value in values], np.int8)
    group["categories"] = texts(names)


def legacy_categories(obs, name, values):
    names = sorted(set(values))
    categories = obs.require_group("__categories").create_dataset(name, data=texts(names))
    obs[name] = np.array([names.index(value) for value in values], np.int8)
    obs[name].attrs["categories"] = categories.ref


def nullable(obs, name, values):
    group = obs.create_group(name)
    whole = all(value.isdigit() for value in values)
    group["values"] = np.array(values, np.int64) if whole else texts(values)
    group["mask"] = np.zeros(len(values), bool)


@pytest.mark.parametrize("column", [categorical_group, legacy_categories, nullable,
                                    lambda obs, name, values: obs.create_dataset(name, data=texts(values)),
                                    lambda obs, name, values: obs.create_dataset(name, data=np.array(values, dtype="S")),
                                    ], ids=["categorical", "__categories", "nullable", "strings", "fixed strings"])
def test_every_obs_layout_gives_the_same_labels(tmp_path, column):
    path, obs = write(tmp_path / "x.h5ad"), labels()
    with h5py.File(path, "a") as file:
        for name, values in obs.items():
            del file["obs"][name]
            column(file["obs"], name, values)
    assert names_of_cells(load(path)) == list(zip(obs["cell_line"], obs["gene"], obs["gem_group"]))
    assert list(data.read_obs(path, ["gene"])["gene"]) == obs["gene"]


def test_the_compound_tables_of_anndata_0_6_are_read(tmp_path):
    path, obs = write(tmp_path / "x.h5ad"), labels()
    with h5py.File(path, "a") as file:
        genes = sorted(set(obs["gene"]))
        table = np.zeros(60, [("index", "S8"), ("gene", np.int8), ("cell_line", "S8"), ("gem_group", np.int64)])
        table["gene"], table["cell_line"], table["gem_group"] = [genes.index(g) for g in obs["gene"]], obs["cell_line"], obs["gem_group"]
        variables = np.zeros(12, [("index", "S8")])
        variables["index"] = genes_of(12)
        del file["obs"], file["var"]
        file["obs"], file["var"], file["uns/gene_categories"] = table, variables, texts(genes)
    dataset = load(path)
    assert names_of_cells(dataset) == list(zip(obs["cell_line"], obs["gene"], obs["gem_group"]))
    assert dataset.genes == genes_of(12)


def test_whole_number_gem_groups_and_missing_ones_get_names(tmp_path):
    path = write(tmp_path / "x.h5ad")
    with h5py.File(path, "a") as file:
        del file["obs/gem_group"]
        file["obs/gem_group"] = np.where(np.arange(60) == 3, np.nan, np.arange(60) % 3)
    dataset = load(path)
    assert dataset.batches == ["0", "1", "2", "missing"] and (dataset.batch == 3).sum() == 1


def test_gene_names_come_from_the_column_the_index_attribute_names(tmp_path):
    path = write(tmp_path / "x.h5ad")
    with h5py.File(path, "a") as file:
        file["var"].move("_index", "symbol")
        file["var"].attrs["_index"] = "symbol"
    assert load(path).genes == genes_of(12)


def test_x_hvg_is_used_before_x_and_named_by_the_highly_variable_genes(tmp_path):
    path, matrix = write(tmp_path / "x.h5ad"), counts()
    mask = np.arange(12) % 3 == 0
    with h5py.File(path, "a") as file:
        file["obsm/X_hvg"] = expected(matrix)[:, mask]
    assert load(path).genes == ["hvg0", "hvg1", "hvg2", "hvg3"]
    with h5py.File(path, "a") as file:
        file["var/highly_variable"] = mask
    dataset = load(path)
    assert dataset.genes == [gene for gene, chosen in zip(genes_of(12), mask) if chosen]
    np.testing.assert_allclose(everything(dataset), expected(matrix)[:, mask], rtol=1e-6)
    assert isinstance(dataset.expression, data.MappedRows)      # contiguous and log-normalised: stays on disk


def test_counts_in_x_hvg_are_normalised_by_the_totals_over_all_genes(tmp_path):
    path, matrix = write(tmp_path / "x.h5ad"), counts()
    with h5py.File(path, "a") as file:
        file["obsm/X_hvg"] = matrix[:, :5]
    np.testing.assert_allclose(everything(load(path)), expected(matrix)[:, :5], rtol=1e-5)


def test_log_normalised_values_are_left_alone_and_said(tmp_path):
    matrix = expected(counts())
    dataset = load(write(tmp_path / "x.h5ad", matrix))
    np.testing.assert_array_equal(everything(dataset), matrix)
    assert any("log-normalised" in note for note in dataset.notes)
    assert any("counts" in note for note in load(write(tmp_path / "y.h5ad", counts())).notes)


@pytest.mark.parametrize("names", [("perturbation", "celltype", "batch", "control"), ("target_gene", "cell_type", "gem_group", "ctrl"),
                                   ("condition", "cell_line", "batch", "NT")])
def test_the_spellings_of_the_field_are_recognised(tmp_path, names):
    obs = labels()
    renamed = {names[0]: [names[3] if gene == "non-targeting" else gene for gene in obs["gene"]],
               names[1]: obs["cell_line"], names[2]: obs["gem_group"]}
    dataset = load(write(tmp_path / "x.h5ad", obs=renamed))
    assert dataset.perturbations == [names[3], "AAA", "BBB", "CCC"] and dataset.cell_lines == ["K562", "RPE1"]


def test_given_names_are_taken_before_recognised_ones(tmp_path):
    obs = labels() | {"condition": ["AAA" if gene == "non-targeting" else "B" for gene in labels()["gene"]]}
    path = write(tmp_path / "x.h5ad", obs=obs)
    with pytest.raises(data.DataError, match="gene or condition|condition or gene"):
        load(path)
    assert load(path, perturbation_column="condition", control="AAA").perturbations == ["AAA", "B"]


def test_a_file_without_a_batch_column_has_one_batch(tmp_path):
    obs = labels()
    del obs["gem_group"]
    dataset = load(write(tmp_path / "x.h5ad", obs=obs))
    assert len(dataset.batches) == 1 and any("no batch column" in note for note in dataset.notes)


def test_cells_that_cannot_be_used_are_left_out_and_counted(tmp_path):
    obs = labels(64)
    obs["gene"][60:] = ["CCC", "ONCE", "", "AAA"]
    obs["cell_line"][60:] = ["ORPHAN", "K562", "K562", ""]
    dataset = load(write(tmp_path / "x.h5ad", counts(64), obs))
    assert dataset.cell_lines == ["K562", "RPE1"] and dataset.perturbations == ["non-targeting", "AAA", "BBB", "CCC"]
    notes = "\n".join(dataset.notes)
    assert "2 cells without a cell line or perturbation" in notes
    assert "1 cell lines without control cells left out: ORPHAN (1 cells)" in notes and "1 conditions with a single cell" in notes
    assert len(dataset.cell_line) == 60


def test_perturbations_without_an_embedding_are_dropped_counted_and_named(tmp_path):
    path, embeddings = write(tmp_path / "x.h5ad"), write_embeddings(tmp_path / "e.npz", ["AAA", "CCC", "ELSE"])
    dataset = data.load(path, genept=embeddings)
    assert dataset.perturbations == ["non-targeting", "AAA", "CCC"] and dataset.embedding_genes == ["AAA", "CCC", "ELSE"]
    assert any("1 perturbations without an embedding left out: BBB" in note for note in dataset.notes)
    table = dataset.perturbation_embeddings()
    assert not table[0].any() and np.array_equal(table[2], dataset.embeddings[1])
    assert load(path, genept=embeddings).perturbations == ["non-targeting", "AAA", "BBB", "CCC"]


def test_cells_and_conditions_agree_with_the_labels():
    dataset = data.simulate(cell_lines=2, perturbations=5, genes=8, cells=6, controls=9)
    for line, p in itertools.product(range(2), range(6)):
        assert np.array_equal(dataset.cells(line, p), np.flatnonzero((dataset.cell_line == line) & (dataset.perturbation == p)))
    assert dataset.conditions() == [(line, p) for line in range(2) for p in range(1, 6)]


# ------------------------------------------------------------------------------------------------------------------ HVGs

def test_chosen_genes_have_the_largest_dispersion_within_their_bin(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 4, 400)
    matrix = rng.poisson(rng.gamma(1.0, 3.0, 150) * np.where(np.arange(150) < 20, (0.3 + groups[:, None]) / 1.8, 1.0)).astype(np.float32)
    path = write(tmp_path / "x.h5ad", matrix)
    normalised = (matrix * (1e4 / matrix.sum(1, keepdims=True))).astype(float)
    mean, variance = normalised.mean(0), normalised.var(0, ddof=1)
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
    assert dataset.genes == [genes_of(150)[i] for i in np.sort(np.argsort(-score)[:20])]
    log_path = write(tmp_path / "log.h5ad", expected(matrix))
    assert load(log_path, hvg=20).genes == dataset.genes


def test_keep_targets_adds_the_perturbed_genes(tmp_path):
    matrix = counts(genes=40)
    matrix[:, :2] = 3.0                                          # AAA and BBB hardly vary
    path = write(tmp_path / "x.h5ad", matrix)
    assert not {"AAA", "BBB"} & set(load(path, hvg=5).genes)
    kept = load(path, hvg=5, keep_targets=True).genes
    assert len(kept) == 7 and kept[:2] == ["AAA", "BBB"]


# ------------------------------------------------------------------------------------------------------------ embeddings

@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["lists", "float32", "float64", "big-endian", "scalars"])
def test_genept_pickles_are_read(tmp_path, protocol, kind):
    rows = {"AAA": [0.5, 1.0, -2.0], "BBB": [1.0, 2.0, 3.0], "NONE": [0.0, 0.0, 0.0]}
    form = {"lists": list, "float32": lambda r: np.array(r, np.float32), "float64": np.array,
            "big-endian": lambda r: np.array(r, ">f4"), "scalars": lambda r: [np.float64(x) for x in r]}[kind]
    path = tmp_path / "GenePT.pickle"
    path.write_bytes(pickle.dumps({gene: form(row) for gene, row in rows.items()}, protocol))
    genes, embeddings = data.read_embeddings(path)
    assert genes == ["AAA", "BBB"]                               # a zero row is no embedding
    np.testing.assert_array_equal(embeddings, np.array([rows["AAA"], rows["BBB"]], np.float32))


class Attack:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("attack", [
    lambda mark: Attack(os.system, f"touch {mark}"),
    lambda mark: Attack(eval, f"open({str(mark)!r}, 'w')"),
    lambda mark: Attack(exec, f"open({str(mark)!r}, 'w')"),
    lambda mark: Attack(open, str(mark), "w"),
    lambda mark: Attack(getattr, Attack(__import__, "os"), "system"),
    lambda mark: [[{"deep": Attack(subprocess.check_call, ["touch", str(mark)])}]],
    lambda mark: np.array([Attack(os.system, f"touch {mark}")], dtype=object),
    lambda mark: np.array([{"any": "object"}], dtype=object),
    lambda mark: collections.Counter("ab"),
], ids=["os.system", "eval", "exec", "open", "getattr", "nested", "object array attack", "object array", "other class"])
def test_a_pickle_that_names_anything_else_is_refused_and_runs_nothing(tmp_path, attack):
    path, mark = tmp_path / "e.pickle", tmp_path / "ran"
    path.write_bytes(pickle.dumps({"AAA": attack(mark)}))
    with pytest.raises(data.DataError, match="e.pickle"):
        data.read_embeddings(path)
    assert not mark.exists()


@pytest.mark.parametrize("raw", [
    b"cos\nsystem\n(S'touch %s'\ntR.",
    b"\x80\x04cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x01tC\x01bt R.",
    b"cnumpy\ndtype\n(S'O'\ntR.",
    b"cnumpy\nload\n(S'%s'\ntR.",
    b"\x80\x04}\x94", b"\x80\x04X\xff\xff\xff\x7fa", b"junk that is no pickle at all", b"."])
def test_handmade_pickles_are_refused_and_run_nothing(tmp_path, raw):
    path, mark = tmp_path / "e.pickle", tmp_path / "ran"
    path.write_bytes(raw.replace(b"%s", str(mark).encode()))
    with pytest.raises(data.DataError, match="e.pickle"):
        data.read_embeddings(path)
    assert not mark.exists()


@pytest.mark.parametrize("table", [{}, {"A": [1.0], "B": [1.0, 2.0]}, {"A": "text"}, {"A": None}, {3: [1.0]}, {"A": [float("nan")]},
                                   ["A"], {"A": [[1.0], [2.0, 3.0]]}])
def test_embeddings_that_do_not_fit_are_refused(tmp_path, table):
    path = tmp_path / "e.pickle"
    path.write_bytes(pickle.dumps(table))
    with pytest.raises(data.DataError, match="e.pickle"):
        data.read_embeddings(path)


# --------------------------------------------------------------------------------------------------------------- packing

def test_a_packed_file_holds_the_same_data_sorted_and_opens_as_a_map(tmp_path):
    path, embeddings, packed = write(tmp_path / "x.h5ad"), write_embeddings(tmp_path / "e.npz"), tmp_path / "p.h5"
    data.pack(path, packed, say=lambda line: None, genept=embeddings)
    plain, dataset = data.load(path, genept=embeddings), data.load(packed)
    assert isinstance(dataset.expression, data.MappedRows)
    key = list(zip(dataset.cell_line, dataset.perturbation, dataset.batch))
    assert key == sorted(key)
    order = np.lexsort((plain.batch, plain.perturbation, plain.cell_line))
    np.testing.assert_array_equal(everything(dataset), everything(plain)[order])
    assert names_of_cells(dataset) == [names_of_cells(plain)[i] for i in order]
    assert dataset.genes == plain.genes and dataset.embedding_genes == plain.embedding_genes
    np.testing.assert_array_equal(dataset.embeddings, plain.embeddings)
    assert plain.notes == dataset.notes
    assert data.read_embeddings(packed)[0] == ["AAA", "BBB", "CCC"]
    in_memory = data.load(packed, in_memory=True)
    assert isinstance(in_memory.expression, np.ndarray) and not isinstance(in_memory.expression, np.memmap)


def test_a_file_packed_without_embeddings_takes_them_at_loading(tmp_path):
    packed = tmp_path / "p.h5"
    data.pack(write(tmp_path / "x.h5ad"), packed, say=lambda line: None)
    with pytest.raises(data.DataError, match="--genept"):
        data.load(packed)
    dataset = data.load(packed, genept=write_embeddings(tmp_path / "e.npz", ["AAA", "CCC"]))
    assert dataset.perturbations == ["non-targeting", "AAA", "CCC"]
    np.testing.assert_array_equal(everything(dataset), everything(load(packed))[load(packed).perturbation != 2])


def test_a_packed_file_of_an_unknown_version_is_refused(tmp_path):
    packed = tmp_path / "p.h5"
    data.pack(write(tmp_path / "x.h5ad"), packed, say=lambda line: None)
    with h5py.File(packed, "a") as file:
        file.attrs["format_version"] = 2
    with pytest.raises(data.DataError, match="p.h5: packed format version 2"):
        load(packed)


# ---------------------------------------------------------------------------------------------------------------- splits

@pytest.fixture(scope="module")
def simulated():
    return data.simulate(cell_lines=3, perturbations=40, genes=10, cells=4, controls=20)


def parts_of(cut):
    return [set(cut.train), set(cut.validation), set(cut.test)]


@pytest.mark.parametrize("rule", ["cell-line:simB", "cell-line:SIMB", "perturbation:0", "perturbation:1", "perturbation:2"])
def test_no_condition_is_in_two_parts_and_controls_are_in_none(simulated, rule):
    cut = data.split(simulated, rule)
    train, validation, test = parts_of(cut)
    assert not train & validation and not train & test and not validation & test
    assert train | validation | test == set(simulated.conditions())
    assert all(p != 0 for part in parts_of(cut) for _, p in part)


def test_a_held_out_line_keeps_thirty_percent_and_validates_on_ten_percent_of_the_rest(simulated):
    cut = data.split(simulated, "cell-line:simB")
    assert {line for line, _ in cut.validation + cut.test} == {1}
    assert (sum(line == 1 for line, _ in cut.train), len(cut.validation), len(cut.test)) == (12, 3, 25)


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
    assert [simulated.perturbations[p] for _, p in cut.validation] == EXPECTED_VALIDATION
    assert data.split(simulated, "cell-line:simA", seed=1).validation != cut.validation


EXPECTED_VALIDATION = ["GENE012", "GENE013", "GENE031"]


def test_split_files_hold_out_lines_and_lists_and_count_unknown_names(simulated, tmp_path):
    path = tmp_path / "s.toml"
    path.write_text('[datasets]\none = "folder"\ntwo = "folder"\n[training]\none = "train"\n[zeroshot]\n"two.simC" = "test"\n'
                    '"two.nowhere" = "val"\n[fewshot."one.SIMB"]\nval = ["GENE001", "GENE002"]\ntest = ["GENE003", "ABSENT"]\n')
    cut = data.split(simulated, str(path))
    names = [{(simulated.cell_lines[line], simulated.perturbations[p]) for line, p in part} for part in parts_of(cut)]
    assert names[1] == {("simB", "GENE001"), ("simB", "GENE002")}
    assert {line for line, _ in names[2]} == {"simC", "simB"} and ("simB", "GENE003") in names[2] and len(names[2]) == 41
    assert len(names[0]) == 40 + 37
    notes = "\n".join(cut.notes)
    assert "1 perturbations listed for SIMB are not in the data: ABSENT" in notes and "1 cell lines are not in the data: nowhere" in notes


@pytest.mark.parametrize("text", ["not toml [", "[other]\n", '[zeroshot]\n"a.simA" = "somewhere"\n', '[zeroshot]\na.simA = "test"\n',
                                  '[fewshot."a.simA"]\ntest = "GENE001"\n', '[fewshot."a.simA"]\ntest = ["X"]\nval = ["X"]\n',
                                  '[zeroshot]\n"a.simA" = "test"\n[fewshot."b.sima"]\ntest = ["X"]\n', '[training]\na = "train"\n'])
def test_wrong_split_files_are_refused_by_name(simulated, tmp_path, text):
    path = tmp_path / "s.toml"
    path.write_text(text)
    with pytest.raises(data.DataError, match="s.toml"):
        data.split(simulated, str(path))


@pytest.mark.parametrize("rule, listed", [("cell-line:hela", "simA, simB, simC"), ("perturbation:3", "0, 1 and 2"),
                                          ("random", "cell-line:NAME"), ("nowhere.toml", "no such file")])
def test_wrong_split_rules_list_what_there_is(simulated, rule, listed):
    with pytest.raises(data.DataError, match=listed):
        data.split(simulated, rule)


@needs_shared
@pytest.mark.parametrize("file", ["repogle_nadig", "repogle_nadig_jurkat", "repogle_nadig_k562", "repogle_nadig_rpe1"])
def test_the_papers_split_files_hold_out_104_and_624_genes(file):
    training, rules = data.read_split_file(SHARED / "splits" / f"{file}.toml")
    (key, rule), = rules.items()
    names = [*rule["val"], *rule["test"], "MYC", "TP53"]
    lines = ["hepg2", "jurkat", "k562", "rpe1"]
    cell_line, perturbation = (part.ravel().astype(np.int32) for part in np.meshgrid(range(4), range(len(names) + 1), indexing="ij"))
    dataset = data.Dataset("made", ["G"], lines, ["non-targeting", *names], ["all"], np.zeros((len(cell_line), 1)), cell_line,
                           perturbation, np.zeros(len(cell_line), np.int32), [], np.zeros((0, 0)))
    cut = data.split(dataset, str(SHARED / "splits" / f"{file}.toml"))
    assert (len(cut.validation), len(cut.test), len(cut.train)) == (104, 624, 3 * 730 + 2)
    assert {lines[line] for line, _ in cut.test} == {key.partition(".")[2]} and not cut.notes


# -------------------------------------------------------------------------------------------------------------- sampling

def test_a_set_holds_cells_of_its_condition_and_controls_of_the_same_gem_groups():
    dataset = data.simulate(cell_lines=2, perturbations=3, genes=6, cells=30, controls=200)
    dataset.expression = np.arange(len(dataset.cell_line), dtype=np.float32)[:, None].repeat(6, 1)    # each cell shows its row
    batch = data.SetSampler(dataset, dataset.conditions(), 16, seed=1).draw(0, range(40))
    assert batch.control.shape == batch.target.shape == (40, 16, 6) and batch.gem_group.shape == (40, 16)
    seen = set()
    for number in range(40):
        target, control = batch.target[number, :, 0].astype(int), batch.control[number, :, 0].astype(int)
        assert (dataset.perturbation[target] == batch.perturbation[number]).all() and (dataset.perturbation[control] == 0).all()
        assert (dataset.cell_line[np.append(target, control)] == batch.cell_line[number]).all()
        assert np.array_equal(dataset.batch[target], dataset.batch[control])
        assert np.array_equal(dataset.batch[control], batch.gem_group[number])
        assert len(set(target)) == len(set(control)) == 16 and not set(target) & set(control)
        seen.add((batch.cell_line[number], batch.perturbation[number]))
    assert seen == {(line, p) for line in range(2) for p in range(4)}        # controls are a condition of each line


def test_cells_repeat_only_where_there_are_fewer_than_a_set_needs():
    dataset = data.simulate(cell_lines=1, perturbations=2, genes=4, cells=5, controls=6)
    dataset.expression = np.arange(len(dataset.cell_line), dtype=np.float32)[:, None].repeat(4, 1)
    batch = data.SetSampler(dataset, dataset.conditions(), 12, seed=0, controls_too=False).draw(3, range(8))
    assert batch.target.shape == (8, 12, 4)
    assert (dataset.perturbation[batch.target[..., 0].astype(int)] == batch.perturbation[:, None]).all()


def test_a_gem_group_without_controls_takes_controls_of_the_line():
    dataset = data.simulate(cell_lines=2, perturbations=2, genes=4, cells=10, controls=30)
    dataset.batch[dataset.perturbation == 0] = 0
    real, control = data.evaluation_cells(dataset, (1, 1), seed=0)
    assert (dataset.cell_line[control] == 1).all() and (dataset.perturbation[control] == 0).all()


def test_a_set_depends_on_seed_step_and_number_alone(simulated):
    sampler = data.SetSampler(simulated, simulated.conditions(), 8, seed=5)
    whole, half = sampler.draw(7, range(6)), sampler.draw(7, [4, 5])
    np.testing.assert_array_equal(whole.target[4:], half.target)
    np.testing.assert_array_equal(whole.control[4:], half.control)
    assert not np.array_equal(whole.target, sampler.draw(8, range(6)).target)
    assert not np.array_equal(whole.target, data.SetSampler(simulated, simulated.conditions(), 8, seed=6).draw(7, range(6)).target)


def test_prefetching_gives_the_batches_of_drawing_and_draws_ahead(simulated):
    sampler = data.SetSampler(simulated, simulated.conditions(), 8, seed=5)
    for step, batch in zip(range(3, 7), data.prefetch(sampler, range(3, 7), range(2)), strict=True):
        np.testing.assert_array_equal(batch.target, sampler.draw(step, range(2)).target)


def test_a_failing_draw_is_raised_at_the_caller_and_leaves_no_thread(simulated):
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


def test_evaluation_cells_are_capped_paired_and_rounded_up(simulated):
    dataset = data.simulate(cell_lines=1, perturbations=2, genes=4, cells=90, controls=400)
    real, control = data.evaluation_cells(dataset, (0, 1), seed=3, max_cells=50, multiple_of=64)
    assert len(set(real)) == 50 and len(control) == 64 and np.array_equal(dataset.batch[control[:50]], dataset.batch[real])
    again, floor = data.evaluation_cells(dataset, (0, 1), seed=3, max_cells=50)
    assert np.array_equal(floor, control[:50])                             # the floor of a table does not depend on the size of a set
    assert np.array_equal(real, again) and not np.array_equal(real, data.evaluation_cells(dataset, (0, 1), seed=4, max_cells=50)[0])
    assert len(data.evaluation_cells(dataset, (0, 2), seed=3)[0]) == 90


# ------------------------------------------------------------------------------------------------------------ simulation

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
    line, effects, noise = 0, [], []
    control = dataset.expression[dataset.cells(line, 0)]
    half = np.linalg.norm(control[:40].mean(0) - control[40:].mean(0))
    for _, p in [condition for condition in dataset.conditions() if condition[0] == line]:
        effects.append(np.linalg.norm(dataset.expression[dataset.cells(line, p)].mean(0) - control.mean(0)))
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


# --------------------------------------------------------------------------------------------------------------- writing

def test_written_anndata_reads_back(tmp_path):
    path = tmp_path / "w.h5ad"
    blocks = (([[1.5 * i, 2.0]], {"gene": [name], "score": np.array([0.5 * i])}, {"mean": [[i, i]]}) for i, name in enumerate("aba"))
    data.write_anndata(path, ["X1", "X2"], ((np.array(x, np.float32), obs, {k: np.array(v, np.float32) for k, v in layers.items()})
                                            for x, obs, layers in blocks), uns={"note": "simulated", "deep": {"n": 3, "names": ["a", "b"]}})
    columns = data.read_obs(path, ["gene", "score"])
    assert list(columns["gene"]) == ["a", "b", "a"] and list(columns["score"]) == [0.0, 0.5, 1.0]
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["X"][:], [[0, 2], [1.5, 2], [3, 2]])
        assert file["layers/mean"].shape == (3, 2) and file["uns/deep/n"][()] == 3 and file["uns/note"][()] == b"simulated"


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write(tmp_path / "x.h5ad")
    before = path.read_bytes()

    def blocks():
        yield counts(), labels(), {}
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        data.write_anndata(path, genes_of(12), blocks())
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.h5ad"]


# ------------------------------------------------------------------------------------------------------------ real cells

@needs_shared
@pytest.mark.parametrize("file, shape, lines", [("norman_mcfaline_4lines.h5ad", (4381, 500), 4), ("papalexi_thp1.h5ad", (20729, 299), 1)])
def test_the_real_files_are_read_with_their_embeddings(file, shape, lines):
    dataset = data.load(SHARED / "data" / file, genept=SHARED / "data" / "go_embeddings.npz")
    assert dataset.expression.shape == shape and len(dataset.cell_lines) == lines
    rows = dataset.expression[np.arange(100)]
    assert rows.dtype == np.float32 and np.isfinite(rows).all() and 0 < rows.max() < 10
    assert dataset.perturbation_embeddings()[1:].any(1).all()
