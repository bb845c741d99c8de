"""From files to arrays: reading, packing, splitting, sampling and simulating populations of perturbed cells.

Reads AnnData files (.h5ad, .h5, every on-disk layout from 0.6 on) with h5py alone and turns them into a `Dataset`:
log-normalised expression of the highly variable genes, three labels per cell (cell line, perturbation, gem group) and one
embedding per gene. `python data.py pack` writes the same into one file that opens in milliseconds; `python data.py info`
says what a file holds.

Reading order: errors, the Dataset, reading AnnData, normalisation, embeddings, loading, packing, splits, sampling, simulation, writing,
command line. Letters in shapes: C cells, G measured genes, P perturbations, N genes with an embedding,
E embedding size, B sets in a batch, S cells in a set.
"""
import argparse
import contextlib
import functools
import hashlib
import os
import pickle
import signal
import sys
import time
import tomllib
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import h5py
import numpy as np

PERTURBATION_COLUMNS = ("gene", "perturbation", "target_gene", "condition")
CELL_LINE_COLUMNS = ("cell_line", "cell_type", "celltype")
BATCH_COLUMNS = ("gem_group", "batch")
CONTROL_LABELS = ("non-targeting", "control", "ctrl", "NT")

TARGET_SUM = 1e4            # counts are normalised to this total per cell before log1p
LOG_NORMALISED_MAX = 20.0   # log1p of anything a sequencer counts stays below; larger non-integers are neither counts nor logs
SECONDS_TO_OPEN = 10        # and one for every 50 MB: reading labels and names takes far less, damaged files can take for ever
BLOCK_BYTES = 16 << 20      # what is read from a matrix at a time: small enough for its pages to be used again
PACKED_FORMAT, PACKED_VERSION = "ptrag-packed", 1


# ---------------------------------------------------------------------------------------------------------------- errors

class DataError(Exception):
    """Something is wrong with a file or a value from the user: one line that says which, what, and what to do."""


@contextlib.contextmanager
def reading(path):
    """Turns any failure of the file-reading calls inside it into a `DataError` that names `path`.

    Damaged files make h5py, numpy and zipfile raise nearly every exception there is, so all are caught; therefore only calls
    that read belong inside, never code of ours whose bugs would be hidden.
    """
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except PermissionError:
        raise DataError(f"{path}: no permission to read it") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{path}: cannot be read, damaged or of an unknown kind ({reason})") from None


def some(names, most=5):
    """The first few of `names` as text, with how many more there are."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@contextlib.contextmanager
def atomic_output(path):
    """Yields a temporary path beside `path`; renamed to `path` when the block ends well, removed when it does not.

    Any failure to write becomes a `DataError` that names `path`.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        raise DataError(f"{path}: is a directory; name the file to write")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise DataError(f"{path}: cannot be written, there is no folder {os.path.dirname(path)}")
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or ' '.join(str(error).split())[:200]})") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def check_room(path, size):
    """OSError unless `size` bytes can be written to the disk of `path`. The HDF5 library crashes on a full disk: it must not meet one."""
    scratch = f"{path}.room"
    try:
        with open(scratch, "wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(scratch)


# --------------------------------------------------------------------------------------------------------------- Dataset

class SparseRows:
    """Expression in compressed rows (CSR) in memory: `rows[numbers]` gives those cells as a dense (n, G) float32 array."""

    def __init__(self, values, columns, pointers, genes):
        self.values, self.columns, self.pointers, self.shape = values, columns, pointers, (len(pointers) - 1, genes)

    def __getitem__(self, rows):
        rows = np.arange(self.shape[0])[rows]
        lengths = self.pointers[rows + 1] - self.pointers[rows]
        ends = np.cumsum(lengths)
        entries = np.arange(lengths.sum()) + np.repeat(self.pointers[rows] - (ends - lengths), lengths)
        dense = np.zeros((len(rows), self.shape[1]), np.float32)                                     # (n, G)
        dense[np.repeat(np.arange(len(rows)), lengths), self.columns[entries]] = self.values[entries]
        return dense


class MappedRows:
    """Expression left on disk: `rows[numbers]` reads those cells of a memory-mapped matrix as a dense (n, G) float32 array."""

    def __init__(self, name, matrix, rows):
        self.name, self.matrix, self.rows, self.shape = name, matrix, rows, (len(rows), matrix.shape[1])

    def __getitem__(self, rows):
        dense = np.asarray(self.matrix[self.rows[rows]], np.float32)                                 # (n, G)
        check_values(dense, self.name, LOG_NORMALISED_MAX)  # a mapped matrix was never read as a whole: look at what is used
        return dense


@dataclass
class Dataset:
    """Cells with their labels, and the embeddings of genes.

    `expression[rows]` gives (n, G) float32, log1p of counts normalised to 10,000 per cell; it may lie in memory or on disk.
    The labels are codes into the lists of names; perturbation 0 is the control, the others are sorted by name.
    """
    name: str                    # the file as the user wrote it, or "simulated"
    genes: list[str]             # (G,)
    cell_lines: list[str]
    perturbations: list[str]     # (P,)
    batches: list[str]           # gem groups; a single one when the data have no such column
    expression: object           # (C, G)
    cell_line: np.ndarray        # (C,) int32
    perturbation: np.ndarray     # (C,) int32
    batch: np.ndarray            # (C,) int32
    embedding_genes: list[str]   # (N,) every gene that has an embedding
    embeddings: np.ndarray       # (N, E) float32
    notes: list[str] = field(default_factory=list)   # what loading decided or skipped, one line each

    @functools.cached_property
    def _index(self):
        """(keys, order): cells sorted by cell line, perturbation, gem group, row; `keys` are those three in one number."""
        key = (self.cell_line.astype(np.int64) * len(self.perturbations) + self.perturbation) * len(self.batches) + self.batch
        order = np.argsort(key, kind="stable")
        return key[order], order

    def _rows(self, cell_line, perturbation, batch, groups):
        """Rows of `groups` gem groups of a condition, beginning with `batch`."""
        keys, order = self._index
        first = (cell_line * len(self.perturbations) + perturbation) * len(self.batches) + batch
        begin, end = np.searchsorted(keys, [first, first + groups])
        return order[begin:end]

    def cells(self, cell_line: int, perturbation: int) -> np.ndarray:
        """Row numbers of a condition's cells, ascending: (n,) int64."""
        return np.sort(self._rows(cell_line, perturbation, 0, len(self.batches)))

    def control_cells(self, cell_line: int, batch: int) -> np.ndarray:
        """Row numbers of the control cells of one gem group of a cell line, ascending: (n,) int64."""
        return self._rows(cell_line, 0, batch, 1)

    def conditions(self) -> list[tuple[int, int]]:
        """The (cell line, perturbation) pairs that have cells, sorted; controls are not among them."""
        keys, _ = self._index
        pairs = np.unique(keys // len(self.batches))
        lines, perturbations = np.divmod(pairs, len(self.perturbations))
        return [(int(line), int(p)) for line, p in zip(lines, perturbations) if p != 0]

    def perturbation_embeddings(self) -> np.ndarray:
        """(P, E) float32: each perturbation's embedding; zero for the control and for genes without one."""
        place = {gene: i for i, gene in enumerate(self.embedding_genes)}
        table = np.zeros((len(self.perturbations), self.embeddings.shape[1]), np.float32)
        for row, name in enumerate(self.perturbations):
            if row > 0 and name in place:
                table[row] = self.embeddings[place[name]]
        return table


# ------------------------------------------------------------------------------------------------------- reading AnnData

def open_file(path):
    """Opens an HDF5 file for reading; `DataError` for anything that is not one."""
    path = os.fspath(path)
    with reading(path):
        if os.path.isdir(path):
            raise DataError(f"{path}: is a directory, not a file")
        with open(path, "rb") as file:
            if not file.read(1):
                raise DataError(f"{path}: is empty")
        if not h5py.is_hdf5(path):
            raise DataError(f"{path}: is not an HDF5 file; .h5ad, .h5 (AnnData) and packed files can be read")
        return h5py.File(path, "r")


def try_first(path, read):
    """Runs `read()` in a forked child and drops what comes of it: `DataError` if that crashes or does not end.

    The HDF5 library can loop for ever, or crash, on text in a damaged file. No exception can end that, the end of a process
    can. Where processes cannot fork the file is trusted.
    """
    if not hasattr(os, "fork"):
        return
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):    # of forking beside threads: the child uses none
        process = os.fork()
    if process == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)       # the alarm ends this process wherever it is stuck
        signal.alarm(SECONDS_TO_OPEN + os.path.getsize(path) // 50_000_000)
        with contextlib.suppress(BaseException):
            read()
        os._exit(0)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        how = "does not come to an end" if os.WTERMSIG(status) == signal.SIGALRM else "crashes the HDF5 library"
        raise DataError(f"{path}: reading it {how}: the file is damaged")


def child(group, name):
    """The member `name` of an HDF5 group, or None where there is none."""
    with reading(group.file.filename):
        return group[name] if name in group else None


def part(group, name):
    """The dataset `name` of an HDF5 group, which has to be there."""
    node = child(group, name)
    if not isinstance(node, h5py.Dataset):
        raise DataError(f"{group.file.filename}: {group.name} has no array {name!r}: the file is damaged or of an unknown kind")
    return node


def members(group):
    """The names in an HDF5 group."""
    with reading(group.file.filename):
        return list(group)


def attribute(node, name):
    """An attribute of an HDF5 node as text, number or array, or None where there is none."""
    with reading(node.file.filename):
        value = node.attrs.get(name)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def check_size(dataset):
    """Refuses a dataset that claims more than its file can hold: a flipped byte must not make anyone allocate it."""
    path = dataset.file.filename
    with reading(path):
        claimed, stored = dataset.size * dataset.dtype.itemsize, os.path.getsize(path)
    if claimed > 1100 * stored + 1_000_000:     # deflate, the usual compression, cannot do better than 1032 to 1
        raise DataError(f"{path}: {dataset.name} claims {claimed:,} bytes in a file of {stored:,}: the file is damaged")


def read_array(dataset, begin=None, end=None):
    """Rows `begin` to `end` of an HDF5 dataset (all by default) as a numpy array."""
    check_size(dataset)
    with reading(dataset.file.filename):
        return np.atleast_1d(dataset[()]) if begin is None else dataset[begin:end]


def read_column(node):
    """One column of a data frame: (values, None) for numbers, (codes, names) for text and categories, -1 meaning missing.

    Knows plain arrays, categoricals (codes and categories), and nullable arrays (values and mask).
    """
    path = node.file.filename
    if isinstance(node, h5py.Group):
        names = members(node)
        if {"codes", "categories"} <= set(names):
            with reading(path):
                categories = node["categories"]
            return categorical(node, read_array(part(node, "codes")), categories)
        if {"values", "mask"} <= set(names):
            values, texts = read_column(part(node, "values"))
            mask = read_array(part(node, "mask")).astype(bool)
            if mask.shape != values.shape:
                raise DataError(f"{path}: {node.name} has {len(values)} values and {len(mask)} marks of what is missing")
            if texts is None:
                values, texts = as_names(values)
            return np.where(mask, -1, values), texts
        raise DataError(f"{path}: {node.name} is of an unknown kind ({some(names)})")
    values = read_array(node)
    reference = attribute(node, "categories")           # before 0.8: the codes' dataset points at its categories
    if isinstance(reference, h5py.Reference):
        with reading(path):
            target = node.file[reference]
        return categorical(node, values, target)
    return as_column(values, f"{path}: {node.name}")


def as_column(values, where):
    """(values, None) for an array of numbers, (codes, names) for an array of text."""
    if values.ndim != 1:
        raise DataError(f"{where} has {values.ndim} dimensions where a column has one")
    if values.dtype.kind in "biuf":
        return values, None
    if values.dtype.kind not in "OS" or not all(isinstance(value, (bytes, str)) for value in values.tolist()):
        raise DataError(f"{where} holds neither text nor numbers ({values.dtype})")
    index = {}
    codes = np.fromiter((index.setdefault(value, len(index)) for value in values.tolist()), np.int32, len(values))
    names = [text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text) for text in index]
    return codes, names


def as_names(values):
    """Numbers as (codes, names), whole ones without a decimal point; not-a-number is missing."""
    distinct, codes = np.unique(values, return_inverse=True)
    names = [str(int(value)) if float(value).is_integer() else str(value) for value in distinct]
    return np.where(values != values, -1, codes).astype(np.int32), names


def categorical(node, codes, categories):
    """(codes, names) of a categorical column whose categories are the HDF5 node `categories`."""
    where = f"{node.file.filename}: {node.name}"
    values, names = read_column(categories)
    if names is None:
        values, names = as_names(values)
    names = [names[value] if value >= 0 else "nan" for value in values]
    if codes.dtype.kind not in "iu" or codes.ndim != 1:
        raise DataError(f"{where} has categories but its codes are not a column of whole numbers")
    if len(codes) and (codes.min() < -1 or codes.max() >= len(names)):
        raise DataError(f"{where} has codes from {codes.min()} to {codes.max()} for {len(names)} categories")
    return codes.astype(np.int32), names


def frame(file, key):
    """The data frame `key` ("obs" or "var") of an AnnData file: a function from column name to column, and the names.

    A group with one member per column, or (before 0.7) one compound table, whose categories lie in `uns`.
    """
    path = file.filename
    node = child(file, key)
    if node is None:
        raise DataError(f"{path}: has no {key}: not an AnnData file (it has {some(members(file)) or 'nothing'})")
    if isinstance(node, h5py.Group):
        legacy = child(node, "__categories")            # 0.7: categories beside the columns, under the column's name

        def column(name):
            with reading(path):
                member = node[name]
            if isinstance(legacy, h5py.Group) and isinstance(member, h5py.Dataset) and name in members(legacy):
                return categorical(member, read_array(member), part(legacy, name))
            return read_column(member)
        return column, [name for name in members(node) if name != "__categories"], index_name(node, members(node))
    with reading(path):
        names = list(node.dtype.names or ())
    if not names:
        raise DataError(f"{path}: {key} is neither a group of columns nor a table")
    table = read_array(node)

    def field_of_table(name):
        categories = child(file, f"uns/{name}_categories")
        if categories is not None and table[name].dtype.kind in "iu":
            return categorical(node, table[name], categories)
        return as_column(table[name], f"{path}: {key}/{name}")
    return field_of_table, names, index_name(node, names)


def index_name(node, names):
    """The name of the column that holds a data frame's index."""
    named = attribute(node, "_index")
    for name in (named, "_index", "index"):
        if isinstance(name, str) and name in names:
            return name
    raise DataError(f"{node.file.filename}: {node.name} has no index column (it has {some(names)})")


def text_of(column):
    """A column as a list of text, missing as empty text."""
    values, names = column
    if names is None:
        values, names = as_names(values)
    return [names[value] if value >= 0 else "" for value in values]


def read_obs(path, columns):
    """Columns of an AnnData file's obs by name: a dict of (C,) arrays, numbers as stored and text as str ("" where missing)."""
    def read():
        with open_file(path) as file:
            column, names, _ = frame(file, "obs")
            missing = [name for name in columns if name not in names]
            if missing:
                raise DataError(f"{path}: obs has no {some(missing)}; it has {some(names, 20)}")
            found = {name: column(name) for name in columns}
        return {name: values if texts is None else np.array([*texts, ""])[values] for name, (values, texts) in found.items()}
    open_file(path).close()
    try_first(path, read)
    return read()


@dataclass
class Matrix:
    """A matrix of an AnnData file: `layout` is "dense", "csr" or "csc"; `pointers` the indptr of the latter two."""
    path: str
    key: str
    layout: str
    shape: tuple[int, int]
    values: h5py.Dataset
    columns: h5py.Dataset = None
    pointers: np.ndarray = None

    @property
    def where(self):
        """What messages call it."""
        return f"{self.path}: {self.key}"


def open_matrix(file, key):
    """Recognises the matrix `key` and checks that its parts fit together; reads no values."""
    where, node = f"{file.filename}: {key}", child(file, key)
    if isinstance(node, h5py.Dataset):
        with reading(file.filename):
            shape, dtype = node.shape, node.dtype
        if len(shape) != 2:
            raise DataError(f"{where} has {len(shape)} dimensions; a matrix of cells by genes was expected")
        matrix = Matrix(file.filename, key, "dense", shape, node)
    else:
        kind = str(attribute(node, "encoding-type") or attribute(node, "h5sparse_format") or "").removesuffix("_matrix")
        shape = attribute(node, "shape") if attribute(node, "shape") is not None else attribute(node, "h5sparse_shape")
        parts = [child(node, name) for name in ("data", "indices", "indptr")]
        if kind not in ("csr", "csc") or np.shape(shape) != (2,) or not all(isinstance(part, h5py.Dataset) for part in parts):
            raise DataError(f"{where} is neither a dense nor a compressed sparse matrix (CSR, CSC)")
        matrix = Matrix(file.filename, key, kind, tuple(int(size) for size in shape), *parts[:2], read_array(parts[2]))
        check_sparse(matrix)
        dtype = parts[0].dtype
    if dtype.kind not in "biuf":
        raise DataError(f"{where} does not hold numbers ({dtype})")
    for part in filter(None, (matrix.values, matrix.columns)):
        check_size(part)
    return matrix


def check_sparse(matrix):
    """`DataError` where data, indices, indptr and shape of a sparse matrix contradict one another."""
    pointers, entries = matrix.pointers, matrix.values.size
    lines = matrix.shape[0 if matrix.layout == "csr" else 1]
    if pointers.dtype.kind not in "iu" or matrix.columns.dtype.kind not in "iu":
        raise DataError(f"{matrix.where}: indptr and indices must be whole numbers")
    matrix.pointers = pointers = pointers.astype(np.int64)
    if pointers.shape != (lines + 1,) or matrix.columns.shape != (entries,) or matrix.values.shape != (entries,):
        raise DataError(f"{matrix.where}: data ({entries}), indices ({matrix.columns.size}) and indptr ({pointers.size}) "
                        f"do not fit a {matrix.layout.upper()} matrix of shape {matrix.shape}")
    if pointers[0] != 0 or pointers[-1] != entries or (np.diff(pointers) < 0).any():
        raise DataError(f"{matrix.where}: indptr does not rise from 0 to the {entries} entries there are: the file is damaged")


def check_values(values, where, most=np.inf):
    """`DataError` unless all values are finite, at least 0 and at most `most`."""
    if values.size == 0:
        return
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise DataError(f"{where} holds values that are not finite (NaN or infinite); remove those cells or genes first")
    if low < 0:
        raise DataError(f"{where} holds negative values ({low:g}), so neither counts nor log-normalised ones (scaled data, perhaps); "
                        "give counts or log1p of normalised counts")
    if high > most:
        raise DataError(f"{where} holds values up to {high:g}, too large for log-normalised ones; "
                        "give counts or log1p of normalised counts")


def entries(matrix, begin, end):
    """Values (float32) and indices of the stored entries `begin` to `end` of a sparse matrix, checked."""
    values = read_array(matrix.values, begin, end).astype(np.float32, copy=False)
    indices = read_array(matrix.columns, begin, end)
    if len(indices) and (indices.min() < 0 or indices.max() >= matrix.shape[1 if matrix.layout == "csr" else 0]):
        raise DataError(f"{matrix.where}: indices run from {indices.min()} to {indices.max()}, outside its shape {matrix.shape}")
    return values, indices


def check_distinct(block, begin, where):
    """The block, a `SparseRows` whose first row is number `begin`; `DataError` where a row holds two values for one gene."""
    follows = block.columns[1:] > block.columns[:-1]
    starts = block.pointers[1:-1]
    follows[starts[(starts > 0) & (starts < len(block.columns))] - 1] = True
    if not follows.all():                                                       # not in order, so perhaps twice
        rows = np.repeat(np.arange(block.shape[0]), np.diff(block.pointers))
        places, counts = np.unique(rows * block.shape[1] + block.columns, return_counts=True)
        if (counts > 1).any():
            row, column = divmod(int(places[counts > 1][0]), block.shape[1])
            raise DataError(f"{where} holds several values for cell {begin + row}, gene {column}; "
                            "add them up first (scipy: sum_duplicates)")
    return block


def row_blocks(matrix):
    """The matrix in file order, a bounded number of rows at a time: yields (first row, (n, G) array or `SparseRows`)."""
    rows, genes = matrix.shape
    if matrix.layout == "csc":
        for begin, block in transposed_blocks(matrix):
            yield begin, check_distinct(block, begin, matrix.where)
    elif matrix.layout == "csr":
        begin = 0
        while begin < rows:
            most = matrix.pointers[begin] + BLOCK_BYTES // 8
            end = max(begin + 1, int(np.searchsorted(matrix.pointers, most, side="right")) - 1)
            end = min(end, begin + max(1, BLOCK_BYTES // (4 * genes)), rows)    # a block must be small when made dense, too
            first, last = matrix.pointers[[begin, end]]
            block = SparseRows(*entries(matrix, first, last), matrix.pointers[begin:end + 1] - first, genes)
            yield begin, check_distinct(block, begin, matrix.where)
            begin = end
    else:
        chunk = matrix.values.chunks[0] if matrix.values.chunks else 1
        step = max(1, BLOCK_BYTES // (genes * matrix.values.dtype.itemsize))
        step = step // chunk * chunk if chunk <= step else min(chunk, 8 * step)     # whole chunks: each is decompressed once
        for begin in range(0, rows, step):
            yield begin, read_array(matrix.values, begin, begin + step).astype(np.float32, copy=False)


def transposed_blocks(matrix):
    """Row blocks of a CSC matrix: for each block of rows one pass over the file, picking that block's entries.

    A pass costs reading time only, so blocks are large (up to 65,536 rows: row numbers that sort as 16-bit integers).
    """
    rows, genes = matrix.shape
    total = int(matrix.pointers[-1])
    block = min(rows, 1 << 16, max(1, int(2 * BLOCK_BYTES / max(1.0, total / rows))))
    step = max(1, BLOCK_BYTES // (4 * genes))
    for begin in range(0, rows, block):
        picked = []
        for first in range(0, total, BLOCK_BYTES // 8):
            last = min(first + BLOCK_BYTES // 8, total)
            values, numbers = entries(matrix, first, last)
            here = np.flatnonzero((numbers >= begin) & (numbers < begin + block))
            columns = np.searchsorted(matrix.pointers, first + here, side="right") - 1
            picked.append((values[here], columns.astype(np.int32), (numbers[here] - begin).astype(np.uint16)))
        values, columns, numbers = (np.concatenate(parts) for parts in zip(*picked)) if picked else (np.zeros(0, np.int32),) * 3
        order = np.argsort(numbers, kind="stable")
        values, columns = values[order], columns[order]
        lengths = np.bincount(numbers.astype(np.int64), minlength=min(block, rows - begin))
        pointers = np.concatenate([[0], np.cumsum(lengths)])
        for start in range(0, len(lengths), step):          # handed on in pieces that stay small when made dense
            piece = pointers[start:start + step + 1]
            yield begin + start, SparseRows(values[piece[0]:piece[-1]], columns[piece[0]:piece[-1]], piece - piece[0], genes)


# ------------------------------------------------------------------------------------------------ normalisation and HVGs

def holds_counts(matrix):
    """True for raw counts, False for log-normalised values, told from a sample; anything else is a `DataError`."""
    length = matrix.values.shape[0]
    width = 64 if matrix.layout == "dense" else 1 << 16
    starts = sorted({int(start) for start in np.linspace(0, max(0, length - width), 4)})
    sample = np.concatenate([read_array(matrix.values, start, start + width).ravel() for start in starts]).astype(np.float32)
    check_values(sample, matrix.where)
    if (sample == np.rint(sample)).all():
        return True
    check_values(sample, matrix.where, LOG_NORMALISED_MAX)
    return False


def row_sums(block):
    """Total of each row of a block: (n,) float64."""
    if isinstance(block, np.ndarray):
        return block.sum(1, dtype=np.float64)
    filled = np.diff(block.pointers) > 0
    sums = np.zeros(block.shape[0])
    if filled.any():
        sums[filled] = np.add.reduceat(block.values, block.pointers[:-1][filled], dtype=np.float64)
    return sums


def scale_rows(block, factors):
    """The block with each row multiplied by its factor."""
    factors = factors.astype(np.float32)
    if isinstance(block, np.ndarray):
        return block * factors[:, None]
    return SparseRows(block.values * np.repeat(factors, np.diff(block.pointers)), block.columns, block.pointers, block.shape[1])


def normalised_blocks(matrix, counts, totals=None):
    """Row blocks of the matrix: counts scaled to 10,000 per cell but not yet logged, log-normalised values as they are.

    `totals`: (C,) the cells' totals where the matrix holds only some of the genes; by default its own row sums.
    """
    for begin, block in row_blocks(matrix):
        values = block if isinstance(block, np.ndarray) else block.values
        check_values(values, matrix.where, np.inf if counts else LOG_NORMALISED_MAX)
        if counts:
            sums = row_sums(block) if totals is None else totals[begin:begin + block.shape[0]]
            block = scale_rows(block, TARGET_SUM / np.where(sums > 0, sums, 1.0))
        yield begin, block


def dense_columns(block, columns):
    """The genes `columns` of a block as a dense (n, len(columns)) float32 array."""
    if isinstance(block, np.ndarray):
        return block if len(columns) == block.shape[1] else block[:, columns]
    width = len(columns) + 1                            # the last column takes what is not wanted, and is dropped
    place = np.full(block.shape[1], width - 1, np.int32)
    place[columns] = np.arange(len(columns))
    starts = np.arange(block.shape[0], dtype=np.int32 if block.shape[0] * width < 1 << 31 else np.int64) * width
    flat = np.repeat(starts, np.diff(block.pointers))
    flat += place[block.columns]
    dense = np.zeros(block.shape[0] * width, np.float32)
    dense[flat] = block.values
    return dense.reshape(block.shape[0], width)[:, :-1]                                              # (n, len(columns))


def highly_variable(matrix, counts, number):
    """Columns of the `number` most variable genes, ascending, by Seurat's normalised dispersion (Satija et al. 2015).

    Mean and variance of the normalised, not logged values; log dispersion (variance / mean) standardised within 20 bins of
    log1p(mean). One streaming pass.
    """
    cells, genes = matrix.shape
    total, squares = np.zeros(genes), np.zeros(genes)
    for _, block in normalised_blocks(matrix, counts):
        dense = isinstance(block, np.ndarray)
        values = (block if dense else block.values).astype(np.float64)
        values = values if counts else np.expm1(values)
        if dense:
            total, squares = total + values.sum(0), squares + np.einsum("cg,cg->g", values, values)
        else:
            total += np.bincount(block.columns, values, genes)
            squares += np.bincount(block.columns, values * values, genes)
    mean = total / cells
    variance = np.maximum(squares - cells * mean ** 2, 0.0) / max(1, cells - 1)
    score = normalised_dispersion(mean, variance)
    return np.sort(np.argsort(-score, kind="stable")[:number])


def normalised_dispersion(mean, variance):
    """Seurat's score of each gene from its mean and variance: (G,) float64, -inf where a gene does not vary."""
    varies = variance > 0
    dispersion = np.log(variance[varies] / mean[varies])
    level = np.log1p(mean)
    edges = np.linspace(level.min(), level.max(), 21)
    bins = np.clip(np.searchsorted(edges, level, side="left") - 1, 0, 19)[varies]    # intervals open to the left, as pandas.cut
    score = np.full(len(mean), -np.inf)
    standardised = np.empty(len(dispersion))
    for number in np.unique(bins):
        here = bins == number
        alone = here.sum() == 1                         # a gene alone in its bin scores 1, as in Seurat
        spread = 1.0 if alone else dispersion[here].std(ddof=1)
        standardised[here] = 1.0 if alone else (dispersion[here] - dispersion[here].mean()) / (spread or 1.0)
    score[varies] = standardised
    return score


# ------------------------------------------------------------------------------------------------------------ embeddings

def read_embeddings(path):
    """Gene embeddings from an .npz (`genes`, `embeddings`), a GenePT pickle (dict: symbol -> numbers) or a packed file.

    Returns (genes, (N, E) float32). Genes whose embedding is all zero have none and are left out. Raises `DataError`.
    """
    with reading(path):
        if os.path.isdir(path):
            raise DataError(f"{path}: is a directory, not a file of embeddings")
        with open(path, "rb") as file:
            start = file.read(4)
    if start == b"PK\x03\x04":
        with reading(path), np.load(path, allow_pickle=False) as archive:
            missing = {"genes", "embeddings"} - set(archive.files)
            if missing:
                raise DataError(f"{path}: has no {some(sorted(missing))}; it has {some(archive.files) or 'nothing'}")
            genes, embeddings = archive["genes"], archive["embeddings"]
    elif h5py.is_hdf5(path):
        with open_file(path) as file:
            check_packed(file)
            genes, embeddings = packed_embeddings(file)
    else:
        genes, embeddings = read_genept(path)
    return check_embeddings(path, genes, embeddings)


def check_embeddings(path, genes, embeddings):
    """(genes, embeddings) as list and float32, without all-zero rows; `DataError` where they contradict one another."""
    genes, embeddings = np.asarray(genes), np.asarray(embeddings)
    if genes.ndim != 1 or embeddings.ndim != 2 or len(genes) != len(embeddings) or embeddings.dtype.kind not in "iuf":
        raise DataError(f"{path}: {genes.shape} genes and embeddings {embeddings.dtype} {embeddings.shape} do not fit: "
                        "one row of numbers per gene was expected")
    if genes.dtype.kind not in "UO" or not all(isinstance(gene, str) for gene in genes):
        raise DataError(f"{path}: gene names must be text")
    embeddings = embeddings.astype(np.float32, copy=False)
    if not np.isfinite(embeddings).all():
        raise DataError(f"{path}: some embeddings are not finite")
    if len(set(genes.tolist())) < len(genes):
        raise DataError(f"{path}: names some genes twice; each needs one embedding")
    present = embeddings.any(1)
    if not present.all():
        genes, embeddings = genes[present], embeddings[present]
    return genes.tolist(), embeddings


class PickledType:
    """Stands in for numpy's dtype while unpickling: takes the name and byte order of a number or text type, nothing else."""

    def __init__(self, code, *_):
        self.dtype = np.dtype(str(code))
        if self.dtype.kind not in "biufSU" or self.dtype.itemsize > 1 << 20:
            raise pickle.UnpicklingError(f"arrays of type {code} are not read")

    def __setstate__(self, state):
        if state[1] in ("<", ">", "="):
            self.dtype = self.dtype.newbyteorder(state[1])


class PickledArray:
    """Stands in for numpy's array while unpickling: `values` is built from the raw bytes of numbers, never from objects."""

    def __init__(self, *_):
        self.values = np.zeros(0)

    def __setstate__(self, state):
        _, shape, kind, fortran, raw = state
        self.values = np.frombuffer(raw, kind.dtype).reshape(shape, order="F" if fortran else "C")

    @classmethod
    def from_buffer(cls, buffer, kind, shape, order):
        array = cls()
        array.values = np.frombuffer(buffer, kind.dtype).reshape(shape, order=order)
        return array

    @staticmethod
    def scalar(kind, raw):
        return np.frombuffer(raw, kind.dtype)[0].item()


def latin1_bytes(text, encoding):
    """What `_codecs.encode` is used for in old pickles: the bytes of an array written as text."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding} is not read")
    return text.encode("latin1")


class PlainUnpickler(pickle.Unpickler):
    """Reads containers, numbers, text and numpy arrays of those; refuses a pickle that names anything else, and runs nothing.

    Even numpy's own functions are not called: stand-ins take the raw bytes.
    """
    STAND_INS = {("_codecs", "encode"): latin1_bytes, ("numpy", "ndarray"): PickledArray, ("numpy", "dtype"): PickledType}
    for module in ("numpy.core", "numpy._core"):
        STAND_INS |= {(module + ".multiarray", "_reconstruct"): PickledArray, (module + ".multiarray", "scalar"): PickledArray.scalar,
                      (module + ".numeric", "_frombuffer"): PickledArray.from_buffer}

    def find_class(self, module, name):
        if (module, name) not in self.STAND_INS:
            raise DataError(f"{getattr(self, 'path', 'pickle')}: names {module}.{name}; refused, since a file of embeddings holds plain "
                            "numbers only and anything else could run code")
        return self.STAND_INS[module, name]


def read_genept(path):
    """A pickled dict from gene symbol to a list or array of numbers: (genes, (N, E) float32)."""
    with reading(path), open(path, "rb") as file:
        unpickler = PlainUnpickler(file)
        unpickler.path = path
        table = unpickler.load()
    if not isinstance(table, dict) or not table:
        raise DataError(f"{path}: is no GenePT pickle: a dict from gene symbol to numbers was expected")
    embeddings = None
    for row, (gene, numbers) in enumerate(table.items()):
        numbers = numbers.values if isinstance(numbers, PickledArray) else numbers
        try:
            numbers = np.asarray(numbers, np.float32)
        except (TypeError, ValueError):
            raise DataError(f"{path}: the embedding of {gene!r} is not a list of numbers") from None
        if embeddings is None:
            embeddings = np.zeros((len(table), numbers.size), np.float32)
        if numbers.shape != embeddings.shape[1:]:
            raise DataError(f"{path}: the embedding of {gene!r} has shape {numbers.shape}, the first one {embeddings.shape[1:]}")
        embeddings[row] = numbers
    return list(table), embeddings


# --------------------------------------------------------------------------------------------------------------- loading

@dataclass
class Source:
    """What a file was recognised to hold, before its matrix is read: labels of the usable cells and where their values lie."""
    dataset: Dataset              # without expression
    matrix: object                # Matrix of an AnnData file, or the mapped expression of a packed one
    rows: np.ndarray              # (C,) rows of the matrix, one per usable cell
    counts: bool = False
    full: Matrix = None           # counts of all genes, where `matrix` holds counts of only some: their totals normalise
    layout: str = ""              # in words, for people


def choose(path, what, option, known, names, asked):
    """The one of `names` that was asked for, or else the one in a spelling the field uses; `DataError` if none or several."""
    listing = f"it has {some(names, 20) or 'none'}"
    if asked is not None:
        if asked not in names:
            raise DataError(f"{path}: no {what} {asked!r} ({option}); {listing}")
        return asked
    found = [name for name in names if name.lower() in [spelling.lower() for spelling in known]]
    if len(found) == 1:
        return found[0]
    problem = f"no {what} recognised" if not found else f"the {what} could be {' or '.join(found)}"
    raise DataError(f"{path}: {problem}; name it with {option} ({listing})")


def read_labels(file, path, perturbation_column, cell_line_column, batch_column):
    """The three labels of every cell as (codes, names), in the order cell line, perturbation, gem group, and notes."""
    column, names, index = frame(file, "obs")
    names = [name for name in names if name != index]
    wanted = [choose(path, "cell-line column in obs", "--cell-line-column", CELL_LINE_COLUMNS, names, cell_line_column),
              choose(path, "perturbation column in obs", "--perturbation-column", PERTURBATION_COLUMNS, names, perturbation_column)]
    if batch_column or {name.lower() for name in names} & set(BATCH_COLUMNS):
        wanted.append(choose(path, "batch column in obs", "--batch-column", BATCH_COLUMNS, names, batch_column))
    labels, notes = [], []
    for name in wanted:
        values, texts = column(name)
        labels.append(as_names(values) if texts is None else (values, texts))
    if len(labels) < 3:
        labels.append((np.zeros(len(labels[0][0]), np.int32), ["all"]))
        notes.append("no batch column (gem_group, batch): all cells count as one batch")
    if len({len(codes) for codes, _ in labels}) > 1:
        raise DataError(f"{path}: obs columns {some(wanted)} have different lengths {[len(codes) for codes, _ in labels]}")
    return labels, notes


def recode(codes, names, keep, first=None):
    """Codes of the kept cells into the sorted list of the names they use (`first` leading): (codes int32, names)."""
    used = {names[code] for code in np.unique(codes[keep])}
    ordered = ([first] if first is not None else []) + sorted(used - {first})
    place = {name: number for number, name in enumerate(ordered)}
    table = np.array([place.get(name, -1) for name in names] or [-1], np.int32)
    return table[codes[keep]], ordered


def usable_cells(path, labels, control, embedded):
    """Which cells can be used, by rules that are all counted in notes: (keep (cells,) bool, control label, notes).

    Left out are cells without a label, cell lines without controls, perturbations without an embedding (`embedded`: the genes
    that have one, None to keep all) and conditions of a single cell.
    """
    (line, lines), (perturbation, perturbations), _ = labels
    notes = []
    line_missing = np.array([name in ("", "nan") for name in lines] + [True])
    missing = np.array([name in ("", "nan") for name in perturbations] + [True])
    keep = ~(line_missing[line] | missing[perturbation])
    if not keep.all():
        notes.append(f"{(~keep).sum():,} cells without a cell line or perturbation left out")
    with_cells = [perturbations[code] for code in np.unique(perturbation[keep])]
    if control is not None and control in perturbations and control not in with_cells:
        raise DataError(f"{path}: the control label {control!r} (--control) has no cells")
    control = choose(path, "control label", "--control", CONTROL_LABELS, with_cells, control)
    controls = keep & (np.array([name == control for name in perturbations] + [False])[perturbation])
    has_controls = np.isin(np.arange(len(lines) + 1), np.unique(line[controls]))
    orphans = keep & ~has_controls[line]
    if orphans.any():
        names = sorted({lines[code] for code in np.unique(line[orphans])})
        notes.append(f"{len(names)} cell lines without control cells left out: {some(names)} ({orphans.sum():,} cells)")
        keep &= ~orphans
    if embedded is not None:
        known = np.array([name == control or name in embedded for name in perturbations] + [False])
        unknown = keep & ~known[perturbation]
        names = sorted({perturbations[code] for code in np.unique(perturbation[unknown])})
        if names:
            notes.append(f"{len(names)} perturbations without an embedding left out: {some(names)} ({unknown.sum():,} cells)")
        keep &= ~unknown
    pair = line.astype(np.int64) * (len(perturbations) + 1) + perturbation
    pairs, sizes = np.unique(pair[keep & ~controls], return_counts=True)
    single = keep & ~controls & np.isin(pair, pairs[sizes == 1])
    if single.any():
        notes.append(f"{single.sum():,} conditions with a single cell left out")
        keep &= ~single
    if embedded is not None and not (keep & ~controls).any():
        raise DataError(f"{path}: no perturbed cells are left to use ({'; '.join(notes) or 'all cells are controls'})")
    return keep, control, notes


def labelled_dataset(path, labels, genes, embedding_genes, embeddings, control, need_embeddings, notes):
    """The Dataset (no expression yet) of the usable cells, and their row numbers (C,)."""
    embedded = set(embedding_genes) if need_embeddings else None
    keep, control, more = usable_cells(path, labels, control, embedded)
    (line, lines), (perturbation, perturbations), (batch, batches) = labels
    if (batch[keep] < 0).any():
        batch, batches = np.where(batch < 0, len(batches), batch), [*batches, "missing"]
        more.append(f"{(batch[keep] == len(batches) - 1).sum():,} cells without a batch count as a batch of their own")
    line, lines = recode(line, lines, keep)
    perturbation, perturbations = recode(perturbation, perturbations, keep, first=control)
    batch, batches = recode(batch, batches, keep)
    dataset = Dataset(os.fspath(path), genes, lines, perturbations, batches, None, line, perturbation, batch,
                      embedding_genes, embeddings, notes + more)
    return dataset, np.flatnonzero(keep)


def open_source(path, genept=None, perturbation_column=None, cell_line_column=None, batch_column=None, control=None, need_embeddings=True):
    """Recognises an AnnData or packed file and reads everything but its matrix: (open file, `Source`)."""
    embeddings = read_embeddings(genept) if genept else None
    columns = (perturbation_column, cell_line_column, batch_column)
    open_file(path).close()
    try_first(path, lambda: recognise(path, embeddings, columns, control, need_embeddings))
    return recognise(path, embeddings, columns, control, need_embeddings)


def recognise(path, given_embeddings, columns, control, need_embeddings):
    """`open_source` with the embeddings already read, in this process."""
    file = open_file(path)
    try:
        embedding_genes, embeddings = given_embeddings or ([], np.zeros((0, 0), np.float32))
        packed = attribute(file, "format") is not None
        if packed:
            check_packed(file)
            if not given_embeddings:
                embedding_genes, embeddings = packed_embeddings(file)
        if need_embeddings and not embedding_genes:
            raise DataError(f"{path}: holds no gene embeddings; give a GenePT pickle or an .npz (genes, embeddings) with --genept")
        if packed:
            return file, packed_source(file, path, embedding_genes, embeddings, need_embeddings, any([*columns, control]))
        labels, notes = read_labels(file, path, *columns)
        matrix, genes, counts, full, more = find_expression(file, path, len(labels[0][0]))
        dataset, rows = labelled_dataset(path, labels, genes, embedding_genes, embeddings, control, need_embeddings, notes + more)
        layout = f"AnnData, {matrix.key} {matrix.layout}, {'counts' if counts else 'log-normalised'}"
        return file, Source(dataset, matrix, rows, counts, full, layout)
    except BaseException:
        file.close()
        raise


def find_expression(file, path, cells):
    """The matrix to use: obsm/X_hvg, else X, else the first layer. (matrix, genes, holds counts?, X for totals or None, notes)."""
    keys = [key for key in ("obsm/X_hvg", "X") if child(file, key) is not None]
    layers = child(file, "layers")
    keys = keys or ([f"layers/{name}" for name in members(layers)][:1] if isinstance(layers, h5py.Group) else [])
    if not keys:
        raise DataError(f"{path}: has neither X nor obsm/X_hvg")
    matrix = open_matrix(file, keys[0])
    if matrix.shape[0] != cells:
        raise DataError(f"{path}: {keys[0]} has {matrix.shape[0]:,} rows for {cells:,} cells in obs")
    if 0 in matrix.shape:
        raise DataError(f"{path}: {keys[0]} is empty: its shape is {matrix.shape}")
    genes, notes = gene_names(file, path, keys[0], matrix.shape[1])
    counts, full = holds_counts(matrix), None
    if counts:
        notes.append(f"{keys[0]} holds counts: normalised to 10,000 per cell and log1p'd")
        if keys == ["obsm/X_hvg", "X"]:
            everything = open_matrix(file, "X")
            full = everything if everything.shape[0] == cells and holds_counts(everything) else None
    else:
        notes.append(f"{keys[0]} holds log-normalised values: used as they are")
    return matrix, genes, counts, full, notes


def gene_names(file, path, key, number):
    """Names of the `number` genes of the matrix `key`, and notes."""
    column, names, index = frame(file, "var")
    genes, notes = text_of(column(index)), []
    if key.startswith("obsm") and len(genes) != number:
        chosen = np.zeros(0)
        if "highly_variable" in names:
            chosen, texts = column("highly_variable")
            chosen = np.array([texts[code] in ("True", "1") for code in chosen]) if texts else chosen.astype(bool)
        if len(chosen) == len(genes) and chosen.sum() == number:
            genes = [gene for gene, is_chosen in zip(genes, chosen) if is_chosen]
        else:
            genes = [f"hvg{column}" for column in range(number)]
            notes.append(f"the {number} genes of {key} have no names in the file: called hvg0 to hvg{number - 1}")
    if len(genes) != number:
        raise DataError(f"{path}: {key} has {number:,} columns for {len(genes):,} genes in var")
    seen, twice = set(), []
    for gene in genes:
        (twice.append if gene in seen else seen.add)(gene)
    if twice:
        raise DataError(f"{path}: {len(twice)} gene names occur more than once ({some(twice)}); make them unique "
                        "(AnnData.var_names_make_unique) so that each name means one column")
    return genes, notes


def choose_genes(source, hvg, keep_targets):
    """Columns of the matrix to use, ascending: all of X_hvg, else the `hvg` most variable ones (and the perturbed genes' own)."""
    dataset, matrix = source.dataset, source.matrix
    genes = len(dataset.genes)
    if matrix.key == "obsm/X_hvg" or genes <= hvg:
        return np.arange(genes)
    chosen = highly_variable(matrix, source.counts, hvg)
    dataset.notes.append(f"the {len(chosen):,} most variable of {genes:,} genes chosen")
    if keep_targets:
        perturbed = set(dataset.perturbations[1:])
        targets = np.array([i for i, gene in enumerate(dataset.genes) if gene in perturbed], np.int64)
        added = np.setdiff1d(targets, chosen)
        chosen = np.union1d(chosen, targets)
        dataset.notes.append(f"{len(added):,} perturbed genes kept beside them")
    return chosen


def expression_blocks(source, columns):
    """Streams the usable cells in file order: yields (first, block (n, len(columns)) float32, log-normalised)."""
    first, totals = 0, None
    if source.full is not None:
        totals = np.concatenate([row_sums(block) for _, block in row_blocks(source.full)])           # (cells of the file,)
    for begin, block in normalised_blocks(source.matrix, source.counts, totals):
        last = first + int(np.searchsorted(source.rows[first:], begin + block.shape[0]))
        if last > first:
            here = source.rows[first:last] - begin
            dense = dense_columns(block, columns)                                                    # (n, genes)
            dense = dense if len(here) == len(dense) else dense[here]
            yield first, np.log1p(dense) if source.counts else dense
        first = last


def contiguous_map(matrix, path):
    """The matrix memory-mapped where it lies in one uncompressed piece, else None."""
    dataset = matrix.values
    if matrix.layout != "dense" or dataset.chunks is not None or dataset.id.get_offset() is None:
        return None
    return map_dataset(dataset, path)


def map_dataset(dataset, path):
    """A contiguous HDF5 dataset as a read-only np.memmap."""
    offset, size = dataset.id.get_offset(), dataset.size * dataset.dtype.itemsize
    if offset is None or offset + size > os.path.getsize(path):
        raise DataError(f"{path}: {dataset.name} reaches beyond the end of the file: the file is damaged")
    with reading(path):
        return np.memmap(path, dataset.dtype, "r", offset, dataset.shape)


def load(path, genept=None, perturbation_column=None, cell_line_column=None, batch_column=None, control=None, hvg=2000,
         keep_targets=False, in_memory=False, need_embeddings=True):
    """Reads an AnnData or packed file (told by content) into a `Dataset`.

    `genept`: file of embeddings (`read_embeddings`). Column names and control label are recognised in the field's spellings
    unless given. Without obsm/X_hvg the `hvg` most variable genes are used, with `keep_targets` the perturbed genes too.
    With `need_embeddings` perturbations without one are left out. Packed and contiguous log-normalised matrices stay on disk
    (`in_memory` reads them); others become `SparseRows`, dense only with `in_memory`. Raises `DataError`.
    """
    file, source = open_source(path, genept, perturbation_column, cell_line_column, batch_column, control, need_embeddings)
    with file:
        dataset = source.dataset
        mapped = source.matrix if isinstance(source.matrix, np.ndarray) else None
        columns = np.arange(len(dataset.genes)) if mapped is not None else choose_genes(source, hvg, keep_targets)
        if mapped is None and not source.counts and len(columns) == len(dataset.genes):
            mapped = contiguous_map(source.matrix, path)
        dataset.genes = [dataset.genes[column] for column in columns]
        if mapped is not None:
            dataset.expression = MappedRows(dataset.name, mapped, source.rows)
            if in_memory:
                dataset.expression = dataset.expression[np.arange(len(source.rows))]
        elif in_memory:
            dataset.expression = np.empty((len(source.rows), len(columns)), np.float32)
            for first, block in expression_blocks(source, columns):
                dataset.expression[first:first + len(block)] = block
        else:
            dataset.expression = gather_sparse(expression_blocks(source, columns), len(columns))
    return dataset


def gather_sparse(blocks, genes):
    """Dense blocks of rows gathered into `SparseRows`."""
    values, columns, lengths = [], [], [np.zeros(1, np.int64)]
    for _, block in blocks:
        present = block != 0
        lengths.append(present.sum(1))
        values.append(block[present])
        columns.append(np.broadcast_to(np.arange(genes, dtype=np.uint16 if genes < 1 << 16 else np.int32), block.shape)[present])
    values = np.concatenate(values)     # one after the other: each list is freed before the next is joined
    columns = np.concatenate(columns)
    return SparseRows(values, columns, np.cumsum(np.concatenate(lengths)), genes)


# --------------------------------------------------------------------------------------------------------------- packing

def check_packed(file):
    """`DataError` unless the open HDF5 file is a packed file of the version this program writes."""
    kind, version = attribute(file, "format"), attribute(file, "format_version")
    if kind != PACKED_FORMAT:
        raise DataError(f"{file.filename}: is not a packed file; make one with `python data.py pack`")
    if version != PACKED_VERSION:
        raise DataError(f"{file.filename}: packed format version {version}, this program reads version {PACKED_VERSION}; pack it again")


def packed_names(file, name):
    """A list of names in a packed file."""
    return text_of(read_column(part(file, name)))


def packed_embeddings(file):
    """(genes, embeddings (N, E)) of a packed file, the latter memory-mapped."""
    genes, embeddings = packed_names(file, "embedding_genes"), part(file, "embeddings")
    if not genes:
        return [], np.zeros((0, 0), np.float32)
    if embeddings.ndim != 2 or embeddings.shape[0] != len(genes) or embeddings.dtype.kind != "f":
        raise DataError(f"{file.filename}: {len(genes)} genes and embeddings of shape {embeddings.shape} do not fit: the file is damaged")
    return genes, map_dataset(embeddings, file.filename)


def packed_source(file, path, embedding_genes, embeddings, need_embeddings, options_given):
    """The `Source` of a packed file: names and codes checked, expression memory-mapped."""
    labels = []
    for codes_name, names_name in (("cell_line", "cell_lines"), ("perturbation", "perturbations"), ("batch", "batches")):
        labels.append(categorical(part(file, codes_name), read_array(part(file, codes_name)), part(file, names_name)))
    genes, matrix = packed_names(file, "genes"), part(file, "expression")
    sizes = [len(codes) for codes, _ in labels]
    if matrix.dtype != np.float32 or matrix.shape != (sizes[0], len(genes)) or len(set(sizes)) > 1 or matrix.size == 0:
        raise DataError(f"{path}: expression {matrix.dtype} {matrix.shape}, {sizes} labels and {len(genes)} genes do not fit: "
                        "the file is damaged")
    notes = [f"column and control options have no effect: {path} is packed"] if options_given else []
    notes = [*packed_names(file, "notes"), *notes] if len(part(file, "notes")) else notes
    control = labels[1][1][0] if labels[1][1] else ""
    dataset, rows = labelled_dataset(path, labels, genes, embedding_genes, embeddings, control, need_embeddings, notes)
    return Source(dataset, map_dataset(matrix, path), rows, layout=f"packed, version {PACKED_VERSION}")


def pack(path, output, say=print, hvg=2000, keep_targets=False, **options):
    """Writes one self-contained, quickly opened file: cells sorted by cell line, perturbation and gem group. Returns the notes.

    `options` as in `load`. Expression is one contiguous float32 piece without compression, so that loading maps it and a
    condition is one slice. The input is streamed; memory stays bounded by the size of a block. Raises `DataError`.
    """
    if os.path.exists(output) and os.path.exists(path) and os.path.samefile(path, output):
        raise DataError(f"{output}: is the input; name another file to write")
    file, source = open_source(path, need_embeddings=bool(options.get("genept")), **options)
    with file:
        if isinstance(source.matrix, np.ndarray):
            raise DataError(f"{path}: is packed already")
        if not source.dataset.conditions():
            raise DataError(f"{path}: holds no perturbed cells, only controls: there is nothing to train on")
        say(f"packing: {path}, {source.layout}")
        columns = choose_genes(source, hvg, keep_targets)
        dataset = source.dataset
        dataset.genes = [dataset.genes[column] for column in columns]
        order = np.lexsort((dataset.batch, dataset.perturbation, dataset.cell_line))
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))            # where each cell of the input goes
        with atomic_output(output) as temporary:
            names = sum(len(name) for name in [*dataset.genes, *dataset.embedding_genes])
            check_room(temporary, 4 * (len(order) * (len(columns) + 3) + dataset.embeddings.size) + 100 * names + (1 << 20))
            offset = write_packed_labels(temporary, dataset, order)
            write_rows(temporary, offset, expression_blocks(source, columns), place, len(columns), say)
    return dataset.notes


def write_packed_labels(path, dataset, order):
    """Writes a packed file but for the values of `expression`, whose room is set aside: returns the offset where they belong."""
    with h5py.File(path, "w") as file:
        file.attrs.update(format=np.bytes_(PACKED_FORMAT), format_version=PACKED_VERSION)
        for name in ("genes", "cell_lines", "perturbations", "batches", "embedding_genes", "notes"):
            file[name] = np.array([text.encode() for text in getattr(dataset, name)], dtype="S")
        for name in ("cell_line", "perturbation", "batch"):
            file[name] = getattr(dataset, name)[order].astype(np.int32)
        file["embeddings"] = np.asarray(dataset.embeddings, np.float32)
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        space = h5py.h5s.create_simple((len(order), len(dataset.genes)))
        return h5py.h5d.create(file.id, b"expression", h5py.h5t.IEEE_F32LE, space, creation).get_offset()


def write_rows(path, offset, blocks, place, genes, say):
    """Writes each row of the blocks to its place, in a thread while the next block is made.

    Plain writes, not a memory map: a full disk is then an error, not a crash.
    """
    started, width = time.time(), 4 * genes
    with open(path, "rb+") as file, ThreadPoolExecutor(1) as thread:
        writing = thread.submit(lambda: None)
        for first, block in blocks:
            block = np.ascontiguousarray(block, "<f4")
            where = offset + place[first:first + len(block)] * width
            writing.result()
            writing = thread.submit(write_block, file.fileno(), block, where, width)
            done = first + len(block)
            say(f"packing: {done:,} of {len(place):,} cells, {done / (time.time() - started + 1e-9):,.0f} cells/s")
        writing.result()


def write_block(descriptor, rows, offsets, width):
    """Writes each row at its offset, rows that stay neighbours in one piece."""
    begin = 0
    for end in np.append(np.flatnonzero(np.diff(offsets) != width) + 1, len(rows)).tolist():
        write_fully(descriptor, rows[begin:end], int(offsets[begin]))
        begin = end


def write_fully(descriptor, rows, offset):
    """Writes an array at an offset of a file; the system may take it in several pieces."""
    rest = memoryview(rows).cast("B")
    while len(rest):
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


# ---------------------------------------------------------------------------------------------------------------- splits

@dataclass
class Split:
    """Conditions (cell line, perturbation) to train on, to validate with and to test. Controls belong to none: all use them."""
    train: list[tuple[int, int]]
    validation: list[tuple[int, int]]
    test: list[tuple[int, int]]
    notes: list[str] = field(default_factory=list)


def ranked(names, seed):
    """Names in a random order that depends on the seed and each name alone: the same on every machine and version."""
    return sorted(names, key=lambda name: (hashlib.sha256(f"{seed}:{name}".encode()).digest(), name))


def split(dataset, rule, seed=0):
    """Cuts the conditions of a dataset in three by a rule. Raises `DataError` for a rule it does not know or cannot follow.

    "cell-line:NAME"     few-shot: of the line's n perturbations round(0.3 n) are trained on, 10 % of the rest validate, the
                         rest is the test; all other lines are trained on.
    "perturbation:FOLD"  genes, in all lines: 30 % train, 10 % validate, 60 % test. The genes stand in one random order for
                         all folds; fold 0, 1, 2 starts cutting at 0, 1/3, 2/3 of it, so that no gene is trained on twice.
    "FILE.toml"          the field's split files: whole lines in [zeroshot], lists of perturbations in [fewshot].
    """
    kind, _, value = str(rule).partition(":")
    if kind == "cell-line":
        result = split_cell_line(dataset, value, seed)
    elif kind == "perturbation":
        result = split_perturbations(dataset, value, seed)
    elif str(rule).endswith(".toml"):
        result = split_file(dataset, rule)
    else:
        raise DataError(f"split {rule!r}: known are cell-line:NAME, perturbation:FOLD (0, 1, 2) and FILE.toml")
    for part in ("train", "validation", "test"):
        setattr(result, part, sorted(getattr(result, part)))
    for part in ("train", "test"):
        if not getattr(result, part):
            raise DataError(f"{dataset.name}: split {rule!r} leaves no condition to {part}; the data have {len(dataset.conditions())} "
                            f"conditions in the cell lines {some(dataset.cell_lines, 20)}")
    return result


def split_cell_line(dataset, name, seed):
    """The few-shot split of one held-out line; its name in any case."""
    lines = {line.lower(): number for number, line in enumerate(dataset.cell_lines)}
    if name.lower() not in lines:
        raise DataError(f"{dataset.name}: no cell line {name!r} to hold out; it has {some(dataset.cell_lines, 20)}")
    held_out = lines[name.lower()]
    conditions = dataset.conditions()
    of_name = {dataset.perturbations[p]: (line, p) for line, p in conditions if line == held_out}
    order = [of_name[name] for name in ranked(of_name, seed)]
    train = round(0.3 * len(order))
    validation = max(1, round(0.1 * (len(order) - train)))
    others = [condition for condition in conditions if condition[0] != held_out]
    return Split(others + order[:train], order[train:train + validation], order[train + validation:])


def split_perturbations(dataset, fold, seed):
    """The split over genes, in all lines."""
    if fold not in ("0", "1", "2"):
        raise DataError(f"split perturbation:{fold}: there are the folds 0, 1 and 2")
    conditions = dataset.conditions()
    order = ranked({dataset.perturbations[p] for _, p in conditions}, seed)
    start = int(fold) * len(order) // 3
    order = order[start:] + order[:start]
    train = round(0.3 * len(order))
    validation = train + max(1, round(0.1 * len(order)))
    part = {name: "train" if i < train else "validation" if i < validation else "test" for i, name in enumerate(order)}
    result = Split([], [], [])
    for line, p in conditions:
        getattr(result, part[dataset.perturbations[p]]).append((line, p))
    return result


def read_split_file(path):
    """The sections of a split file: (datasets that train, {"dataset.line": "val" or "test" or {part: [names]}})."""
    with reading(path), open(path, "rb") as file:
        table = tomllib.load(file)
    sections = [table.get(name, {}) for name in ("training", "zeroshot", "fewshot")]
    if not any(name in table for name in ("training", "zeroshot", "fewshot")) or not all(isinstance(part, dict) for part in sections):
        raise DataError(f"{path}: is no split file: it has none of the sections [training], [zeroshot], [fewshot]")
    training, zeroshot, fewshot = sections
    for key, value in zeroshot.items():
        if value not in ("val", "test"):
            raise DataError(f'{path}: [zeroshot] {key}: expected "dataset.line" = "val" or "test", with the quotes')
    for key, value in fewshot.items():
        lists = isinstance(value, dict) and set(value) <= {"train", "val", "test"}
        if not lists or not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in value.values()):
            raise DataError(f'{path}: [fewshot."{key}"]: expected "dataset.line" with lists of perturbations val and test')
        names = [name for part in value.values() for name in set(part)]
        if len(set(names)) < len(names):
            raise DataError(f'{path}: [fewshot."{key}"] puts a perturbation into two parts')
    lines = [key.partition(".")[2].lower() for key in [*zeroshot, *fewshot]]
    for line in lines:
        if not line or lines.count(line) > 1:
            raise DataError(f"{path}: the sections must name each cell line once, as dataset.line ({line or 'one has no line'})")
    return {name for name, use in training.items() if use == "train"}, zeroshot | fewshot


def split_file(dataset, path):
    """The split a .toml file describes. Its lines are found by name in the data, whichever dataset of the file they stand under."""
    training, rules = read_split_file(path)
    conditions, numbers = dataset.conditions(), {line.lower(): i for i, line in enumerate(dataset.cell_lines)}
    result, part_of, default, unknown_lines = Split([], [], []), {}, {}, []
    for key, rule in rules.items():
        owner, _, line = key.partition(".")
        number = numbers.get(line.lower())
        if number is None:
            unknown_lines.append(line)
        elif isinstance(rule, str):
            default[number] = rule
        else:
            default[number] = "train" if owner in training else None
            known = {dataset.perturbations[p] for line, p in conditions if line == number}
            unknown = [name for names in rule.values() for name in names if name not in known]
            if unknown:
                result.notes.append(f"{path}: {len(unknown)} perturbations listed for {line} are not in the data: {some(unknown)}")
            part_of |= {(number, name): part for part, names in rule.items() for name in names}
    if unknown_lines:
        result.notes.append(f"{path}: {len(unknown_lines)} cell lines are not in the data: {some(unknown_lines)}")
    lists = {"train": result.train, "val": result.validation, "test": result.test, None: []}
    for line, p in conditions:
        part = part_of.get((line, dataset.perturbations[p]), default.get(line, "train" if training else None))
        lists[part].append((line, p))
    if lists[None]:
        result.notes.append(f"{path}: {len(lists[None])} conditions belong to no part")
    return result


# -------------------------------------------------------------------------------------------------------------- sampling

@dataclass
class Batch:
    """B sets of S cells: control cells and the perturbed cells they are to become."""
    control: np.ndarray        # (B, S, G) float32
    target: np.ndarray         # (B, S, G) float32
    perturbation: np.ndarray   # (B,) int64
    cell_line: np.ndarray      # (B,) int64
    gem_group: np.ndarray      # (B, S) int64, gem group of each control cell


def pick(rng, rows, number):
    """`number` of the rows, without replacement where there are enough."""
    return rows[rng.choice(len(rows), number, replace=len(rows) < number)]


def paired_controls(dataset, rng, cell_line, batches, avoid=()):
    """A control row for each gem group in `batches` (n,): of that group where it has controls, else of the line: (n,)."""
    controls = np.empty(len(batches), np.int64)
    for batch in np.unique(batches):
        where = np.flatnonzero(batches == batch)
        pool = dataset.control_cells(cell_line, batch)
        pool = pool if len(pool) else dataset.cells(cell_line, 0)
        others = np.setdiff1d(pool, avoid) if len(avoid) else pool
        controls[where] = pick(rng, others if len(others) else pool, len(where))
    return controls


class SetSampler:
    """Draws sets of S cells; the conditions uniformly, the cells anew each time.

    With `controls_too` each cell line adds one condition, whose target is other control cells of the line.
    """

    def __init__(self, dataset, conditions, cells, seed, controls_too=True):
        lines = sorted({line for line, _ in conditions})
        self.dataset, self.cells, self.seed = dataset, cells, seed
        self.conditions = list(conditions) + ([(line, 0) for line in lines] if controls_too else [])
        if not self.conditions:
            raise DataError(f"{dataset.name}: no conditions to draw sets of cells from")

    def draw(self, step, sets) -> Batch:
        """The sets with the numbers `sets` of a step; set i depends on (seed, step, i) alone, so ranks share and runs resume."""
        sets = list(sets)
        targets, controls = np.empty((2, len(sets), self.cells), np.int64)                           # (B, S) each
        picked = np.empty((len(sets), 2), np.int64)
        for place, number in enumerate(sets):
            rng = np.random.default_rng([self.seed, step, number])
            line, perturbation = picked[place] = self.conditions[rng.integers(len(self.conditions))]
            targets[place] = pick(rng, self.dataset.cells(line, perturbation), self.cells)
            avoid = targets[place] if perturbation == 0 else ()
            controls[place] = paired_controls(self.dataset, rng, line, self.dataset.batch[targets[place]], avoid)
        shape = (len(sets), self.cells, self.dataset.expression.shape[1])
        return Batch(control=self.dataset.expression[controls.ravel()].reshape(shape),               # (B, S, G)
                     target=self.dataset.expression[targets.ravel()].reshape(shape),                 # (B, S, G)
                     perturbation=picked[:, 1].copy(), cell_line=picked[:, 0].copy(),                # (B,)
                     gem_group=self.dataset.batch[controls].astype(np.int64))                        # (B, S)


def prefetch(sampler, steps, sets):
    """Yields the batch of each step in order; the next one is drawn in a thread while the caller works with this one."""
    sets = list(sets)
    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for step in steps:
            coming = thread.submit(sampler.draw, step, sets)
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()


def evaluation_cells(dataset, condition, seed, max_cells=1000, multiple_of=1):
    """Real cells of a condition and control cells to predict them from: row numbers (n,) and (m,).

    n is the condition's cells, at most `max_cells` (a random part of them then); m is n rounded up to a multiple of
    `multiple_of`. Control i has the gem group of real cell i (of i - n beyond n). Depends on the seed and the names only, the first n
    controls not on `multiple_of`.
    """
    line, perturbation = condition
    name = f"{seed}:{dataset.cell_lines[line]}:{dataset.perturbations[perturbation]}"
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
    real = dataset.cells(line, perturbation)
    if len(real) > max_cells:
        real = np.sort(pick(rng, real, max_cells))
    groups, avoid = dataset.batch[real], real if perturbation == 0 else ()
    parts = [paired_controls(dataset, rng, line, np.resize(groups, number), avoid) for number in (len(real), -len(real) % multiple_of)]
    return real, np.concatenate(parts)


# ------------------------------------------------------------------------------------------------------------ simulation

def simulate(seed=0, cell_lines=4, perturbations=80, genes=200, cells=40, controls=300, embedding_dim=64, programs=12):
    """A simulated Replogle-like Dataset; `cells` per condition, `controls` per cell line. Made from the seed alone.

    Genes belong to one to three programs. Perturbing a gene lowers the expression of its programs' genes, by its own strength
    (weak for some, strong for others) and only as far as the cell line uses each program:
    log mean = baseline(line) + gem group effect - strength * sum_k membership_k * use(line, k) * loading(k, gene).
    Counts are negative binomial. Embeddings are a noisy linear view of program membership.
    """
    rng = np.random.default_rng(seed)
    names = [f"GENE{number + 1:03d}" for number in range(perturbations // 2 + genes)]    # the later half of the perturbed genes is measured
    names += [f"GENE{number + 1:03d}" for number in range(len(names), perturbations)]
    measured = np.arange(perturbations // 2, perturbations // 2 + genes)
    groups = 3

    members = rng.random((len(names), programs)).argsort(1) < rng.integers(1, 4, len(names))[:, None]
    membership = members * rng.gamma(2.0, 1.0, members.shape)
    membership /= membership.sum(1, keepdims=True)                                                   # (N, programs)
    loading = (membership[measured] * rng.gamma(2.0, 0.75, (genes, 1))).T                            # (programs, G)
    use = (rng.random((cell_lines, programs)) < 0.6) * rng.uniform(0.5, 1.5, (cell_lines, programs))
    strength = rng.gamma(1.5, 1.2, perturbations)
    baseline = rng.normal(0.0, 1.2, genes) + rng.normal(0.0, 0.5, (cell_lines, genes))               # (lines, G)
    group_effect = rng.normal(0.0, 0.1, (cell_lines, groups, genes))
    dispersion = rng.gamma(4.0, 0.75, genes) + 0.5

    sizes = [controls] + [cells] * perturbations
    perturbation = np.tile(np.repeat(np.arange(perturbations + 1, dtype=np.int32), sizes), cell_lines)
    cell_line = np.repeat(np.arange(cell_lines, dtype=np.int32), sum(sizes))
    batch = rng.integers(0, groups, len(cell_line)).astype(np.int32)
    expression = np.empty((len(cell_line), genes), np.float32)
    for line in range(cell_lines):                     # a line at a time keeps the double-precision draws small
        here = np.flatnonzero(cell_line == line)
        shift = -strength[:, None] * (membership[:perturbations] * use[line]) @ loading              # (P - 1, G)
        shift[np.arange(perturbations)[:, None] == measured] -= 1.5                                  # the target's own knock-down
        shift = np.vstack([np.zeros(genes), shift])
        log_mean = baseline[line] + group_effect[line][batch[here]] + shift[perturbation[here]]      # (n, G)
        depth = 2000.0 * rng.lognormal(0.0, 0.3, len(here)) / np.exp(baseline[line]).sum()
        mean = np.exp(log_mean) * depth[:, None]
        counts = rng.poisson(rng.gamma(dispersion, mean / dispersion))
        totals = np.maximum(counts.sum(1, keepdims=True), 1)
        expression[here] = np.log1p(counts * (TARGET_SUM / totals))

    view = membership @ rng.normal(0.0, 1.0, (programs, embedding_dim))
    embeddings = view + 0.5 * view.std() * rng.normal(0.0, 1.0, view.shape)                          # (N, E)
    return Dataset("simulated", [names[gene] for gene in measured], [f"sim{line_letters(line)}" for line in range(cell_lines)],
                   ["non-targeting", *names[:perturbations]], [f"gem{group + 1}" for group in range(groups)], expression,
                   cell_line, perturbation, batch, names, embeddings.astype(np.float32), ["simulated data, not measured cells"])


def line_letters(number):
    """A, B, ... Z, AA, AB, ... for 0, 1, ..."""
    return (line_letters(number // 26 - 1) if number >= 26 else "") + chr(ord("A") + number % 26)


# --------------------------------------------------------------------------------------------------------------- writing

def write_anndata(path, genes, blocks, uns=None):
    """Writes an AnnData file (opens in anndata >= 0.8), one block of cells in memory at a time; atomic.

    blocks: iterable of (X (n, G), {obs column: list of str or (n,) numbers}, {layer: (n, G)}), each with the same columns.
    uns: nested dict of text, numbers, lists of text and arrays.
    """
    with atomic_output(path) as temporary, h5py.File(temporary, "w") as file:
        encode(file, "anndata", "0.1.0")
        for name in ("layers", "obsm", "varm", "obsp", "varp"):
            encode(file.create_group(name), "dict", "0.1.0")
        matrices, columns, categories, cells = {}, {}, {}, 0
        for expression, obs, layers in blocks:
            for key, values in {"X": expression, **{f"layers/{name}": layer for name, layer in layers.items()}}.items():
                check_room(temporary, 5 * np.size(values) + 100 * len(expression) + (1 << 20))
                append_rows(file, matrices, key, np.asarray(values, np.float32), len(genes))
            for name, values in obs.items():
                if len(values) and isinstance(values[0], str):
                    known = categories.setdefault(name, {})
                    values = np.array([known.setdefault(value, len(known)) for value in values], np.int32)
                columns.setdefault(name, []).append(np.asarray(values))
            cells += len(expression)
        if "X" not in matrices:
            append_rows(file, matrices, "X", np.zeros((0, len(genes)), np.float32), len(genes))
        write_frame(file, "obs", [str(cell) for cell in range(cells)],
                    {name: (np.concatenate(parts), categories.get(name)) for name, parts in columns.items()})
        write_frame(file, "var", list(genes), {})
        write_mapping(file, "uns", uns or {})


def encode(node, kind, version):
    """Marks an HDF5 node with the AnnData encoding it has."""
    node.attrs.update({"encoding-type": kind, "encoding-version": version})
    return node


def append_rows(file, matrices, key, rows, genes):
    """Appends rows to the matrix `key`, created with the first ones."""
    if key not in matrices:
        matrices[key] = encode(file.create_dataset(key, (0, genes), np.float32, chunks=(256, max(1, genes)), maxshape=(None, genes)),
                               "array", "0.2.0")
    matrix = matrices[key]
    matrix.resize(len(matrix) + len(rows), axis=0)
    if len(rows):
        matrix[-len(rows):] = rows


def write_texts(group, name, texts):
    """A text array as AnnData stores it."""
    encode(group.create_dataset(name, data=np.array(texts, dtype=object), dtype=h5py.string_dtype()), "string-array", "0.2.0")


def write_frame(file, key, index, columns):
    """A data frame: its index and columns {name: (values, None) or (codes, categories)}."""
    group = encode(file.create_group(key), "dataframe", "0.2.0")
    group.attrs["_index"] = "_index"
    group.attrs.create("column-order", np.array(list(columns), dtype=object), dtype=h5py.string_dtype())
    write_texts(group, "_index", index)
    for name, (values, categories) in columns.items():
        if categories is None:
            encode(group.create_dataset(name, data=values), "array", "0.2.0")
        else:
            column = encode(group.create_group(name), "categorical", "0.2.0")
            column.attrs["ordered"] = False
            encode(column.create_dataset("codes", data=values), "array", "0.2.0")
            write_texts(column, "categories", list(categories))


def write_mapping(group, key, mapping):
    """A nested dict of text, numbers, lists of text and arrays."""
    node = encode(group.create_group(key), "dict", "0.1.0")
    for name, value in mapping.items():
        if isinstance(value, dict):
            write_mapping(node, name, value)
        elif isinstance(value, str):
            encode(node.create_dataset(name, data=value, dtype=h5py.string_dtype()), "string", "0.2.0")
        elif isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
            write_texts(node, name, value)
        else:
            value = np.asarray(value)
            encode(node.create_dataset(name, data=value), "array" if value.ndim else "numeric-scalar", "0.2.0")


# ---------------------------------------------------------------------------------------------------------- command line

def with_embeddings(dataset):
    """The labels of a Dataset without the perturbations that have no embedding, as a run uses them; no expression."""
    known = set(dataset.embedding_genes)
    names = [dataset.perturbations[0]] + [name for name in dataset.perturbations[1:] if name in known]
    place = {name: code for code, name in enumerate(names)}
    codes = np.array([place.get(name, -1) for name in dataset.perturbations], np.int32)[dataset.perturbation]
    keep = codes >= 0
    return replace(dataset, perturbations=names, perturbation=codes[keep], cell_line=dataset.cell_line[keep], batch=dataset.batch[keep])


def info(path, genept=None, say=print, hvg=2000, **options):
    """Prints what a person wants to know of a file before a run; reads labels, not the matrix."""
    file, source = open_source(path, genept, need_embeddings=False, **options)
    with file:
        dataset = source.dataset
    conditions = dataset.conditions()
    if not conditions:
        raise DataError(f"{path}: holds no perturbed cells, only controls: there is nothing to train on")
    say(f"{path}: {source.layout}")
    say(f"cells         {len(dataset.cell_line):,} to use")
    chosen = f"; the {hvg:,} most variable will be used" if len(dataset.genes) > hvg and "X_hvg" not in source.layout else ""
    say(f"genes         {len(dataset.genes):,}{chosen} ({some(dataset.genes, 3)})")
    say(f"perturbations {len(dataset.perturbations) - 1:,} and the control {dataset.perturbations[0]!r}")
    say(f"gem groups    {len(dataset.batches):,}")
    sizes = np.array([len(dataset.cells(*condition)) for condition in conditions])
    say(f"conditions    {len(conditions):,} (cell line x perturbation) of {sizes.min():,} to {sizes.max():,} cells, "
        f"median {np.median(sizes):,.0f}")
    for number, line in enumerate(dataset.cell_lines):
        cells, controls = (dataset.cell_line == number).sum(), len(dataset.cells(number, 0))
        say(f"  {line}: {cells:,} cells, {controls:,} controls, {sum(first == number for first, _ in conditions):,} perturbations")
    known = set(dataset.embedding_genes)
    absent = [name for name in dataset.perturbations[1:] if name not in known]
    found = len(dataset.perturbations) - 1 - len(absent)
    say(f"embeddings    for {found:,} of {found + len(absent):,} perturbations ({len(known):,} genes x {dataset.embeddings.shape[1]})"
        if known else "embeddings    none; give them with --genept")
    if known and absent:
        say(f"  without one, left out of a run: {some(absent)}")
    used = with_embeddings(dataset) if known else dataset
    for rule in [f"cell-line:{line}" for line in used.cell_lines] + ["perturbation:0"]:
        try:
            cut = split(used, rule)
            say(f"split {rule}: {len(cut.train):,} conditions to train, {len(cut.validation):,} to validate, {len(cut.test):,} to test")
        except DataError as error:
            say(f"split {rule}: not possible ({error})")
    for note in dataset.notes:
        say(f"note: {note}")


def positive(text):
    """A whole number of at least 1, for argparse."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def arguments():
    """The command line's options."""
    parser = argparse.ArgumentParser(description="Look into, or pack, a file of perturbed cells.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("info", "say what a file holds"), ("pack", "write one self-contained file that opens at once")):
        command = commands.add_parser(name, help=text)
        command.add_argument("file", help="AnnData file (.h5ad, .h5)" + (" or packed file" if name == "info" else ""))
        command.add_argument("--genept", metavar="FILE", help="gene embeddings: GenePT pickle, .npz (genes, embeddings) or packed file")
        command.add_argument("--perturbation-column", metavar="NAME", help="obs column of the perturbed gene")
        command.add_argument("--cell-line-column", metavar="NAME", help="obs column of the cell line")
        command.add_argument("--batch-column", metavar="NAME", help="obs column of the gem group")
        command.add_argument("--control", metavar="LABEL", help="perturbation label of the control cells")
        command.add_argument("--hvg", type=positive, default=2000, metavar="N", help="genes to choose without obsm/X_hvg (2000)")
    command.add_argument("--keep-targets", action="store_true", help="keep the perturbed genes' own expression, too")
    command.add_argument("-o", "--output", required=True, metavar="OUT.h5", help="the file to write")
    return parser


def main(argv=None):
    """`python data.py info FILE` and `python data.py pack IN -o OUT.h5`. Returns the exit status: 2 for bad input."""
    options = vars(arguments().parse_args(argv))
    command, path, output = options.pop("command"), options.pop("file"), options.pop("output", None)
    try:
        if command == "info":
            info(path, **options)
        else:
            progress = functools.partial(print, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
            for note in pack(path, output, progress, **options):
                print(f"note: {note}")
            print(f"wrote {output} ({os.path.getsize(output):,} bytes)")
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # leave by the same way as Ctrl-C: temporary files are removed
    sys.exit(main())
