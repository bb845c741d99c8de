"""From files to arrays: reads and packs AnnData files of perturbed cells, splits, samples and simulates them.

Every layout of AnnData from 0.6 on is read, with h5py alone; `python data.py pack` writes a file that opens
at once. Letters in shapes: C cells, G genes, P perturbations, N genes with an embedding, E embedding size,
B sets in a batch, S cells in a set.
"""
import argparse
import atexit
import contextlib
import csv
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import tomllib
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import h5py
import numpy as np

COLUMNS = {"cell line column": ("cell_line", "cell_type", "celltype"),
           "perturbation column": ("gene", "perturbation", "target_gene", "condition"),
           "batch column": ("gem_group", "batch")}
CONTROL_LABELS = ("non-targeting", "nontargeting", "control", "ctrl", "nt", "ntc")
SYMBOL_COLUMNS = ("gene_name", "gene_symbols", "feature_name", "gene_symbol")

TARGET_SUM = 1e4            # counts are normalised to this total per cell before log1p
LOG_NORMALISED_MAX = 20.0   # log1p of anything a sequencer counts stays below
SECONDS_TO_OPEN = 10        # and one for every 50 MB: labels take far less, damaged files can take for ever
MEMORY_TO_OPEN = 2 << 30    # bytes, and 20 for every byte of the file
BLOCK_BYTES = 16 << 20      # of a matrix at a time: small enough for its pages to be used again


class DataError(Exception):
    """Something is wrong with a file or a value of the user: one line says which, what, and what to do."""
    exit_status = 2


def listed(names, most=5):
    """The first few of `names` as text, with how many more there are."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def say(text="", end="\n"):
    """Prints; once nobody reads the output any more (`| head`), what follows is dropped."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def status_of(command, *arguments):
    """Runs a command line: its exit status. What ends it is one line on stderr, but for our own bugs."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # what schedulers send ends like Ctrl-C
    try:
        command(*arguments)
        return 0
    except KeyboardInterrupt as stopped:
        status, message = 130, f"stopped{stopped}"
    except OSError as error:
        status, message = 2, f"error: {error.filename or 'output'}: {error.strerror or error}"
    except Exception as error:
        if not hasattr(error, "exit_status"):
            raise
        status, message = error.exit_status, f"error: {error}"
    print("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message), file=sys.stderr)
    return status


# --------------------------------------------------------------------------------------- files out

@contextlib.contextmanager
def locked(path):
    """One process at a time works on a file or in a folder, `DataError` for others; ends with the process."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):     # Windows and some file systems have no such locks
            import fcntl
            lock = os.path.join(path, ".lock") if os.path.isdir(path) else path
            try:
                fcntl.flock(stack.enter_context(open(lock, "ab")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{path}: another process is at work on it: name another") from None
        yield


@contextlib.contextmanager
def atomic_output(path, inputs=()):
    """Yields a temporary path beside `path`: renamed to it when the block ends well, else removed.

    Any failure to write is a `DataError` that names `path`; so is a path that is one of the files `inputs`.
    """
    taken = os.path.exists(path) and (not os.path.isfile(path) or any(
        os.path.samefile(path, used) for used in inputs if os.path.exists(used)))
    if taken or not str(path).isprintable():
        raise DataError(f"{path}: is an input, a directory, a device or no plain name; name another file")
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.tmp")
    try:
        with locked(temporary):                         # what a killed process left there is written over
            try:
                yield temporary
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(temporary)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())[:200]
        raise DataError(f"{path}: cannot be written ({reason})") from None


def write_csv(path, columns, rows):
    """Rows of values as CSV: floats with seven digits, not-a-number as an empty cell. Atomic."""
    def text(value):
        return "" if value != value else f"{value:.7g}" if isinstance(value, (float, np.floating)) else value
    with atomic_output(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([columns, *([text(value) for value in row] for row in rows)])


def write_anndata(path, genes, obs, blocks, cells, uns=None, inputs=()):
    """Writes an AnnData file (opens in anndata >= 0.8), a block of cells in memory at a time. Atomic.

    blocks: iterable of (rows, {key: (n, G)}); rows (n,) int or a slice: which of the file's `cells` rows they
            are; key: "X", "layers/NAME" or "obsm/NAME". Matrices are contiguous float32. genes: list of text.
    obs:    {column: list of text, "" where missing, or (cells,) numbers}; uns: nested dict of text, numbers,
            lists of text and arrays. Both are read after the last block: they may be filled meanwhile.
    """
    with atomic_output(path, inputs) as temporary:
        blocks = iter(blocks)
        first = next(blocks, (slice(0), {"X": np.zeros((0, len(genes)))}))
        widths, offsets = {key: np.shape(values)[1] for key, values in first[1].items()}, {}
        check_room(temporary, 4 * cells * sum(widths.values()))
        with h5py.File(temporary, "w", locking=False) as file:
            encode(file, "anndata", "0.1.0")
            for name in ("layers", "obsm", "varm", "obsp", "varp"):
                encode(file.create_group(name), "dict", "0.1.0")
            for key, width in widths.items():
                matrix = encode(file.create_dataset(key, (cells, width), "<f4"), "array")
                matrix[:1] = 0.0                        # sets the room for all of it aside
                offsets[key] = matrix.id.get_offset()
        with open(temporary, "rb+") as file:            # plain writes: a full disk is an error, not a crash
            for rows, matrices in itertools.chain([first], blocks):
                rows = np.arange(cells)[rows]
                for key, values in matrices.items():
                    if np.shape(values) != (len(rows), widths[key]):
                        raise ValueError(f"{key}: a block of shape {np.shape(values)} for {len(rows)} rows")
                    for row, line in zip(rows.tolist(), np.ascontiguousarray(values, "<f4")):
                        file.seek(offsets[key] + row * 4 * widths[key])
                        file.write(line)
        check_room(temporary, 2 * len(pickle.dumps((genes, obs, uns), 5)) + 100 * (cells + len(genes)))
        with h5py.File(temporary, "r+", locking=False) as file:
            write_frame(file, "obs", [str(cell) for cell in range(cells)], obs)
            write_frame(file, "var", genes, {})
            write_value(file, "uns", uns or {})


def check_room(path, size):
    """OSError unless a file fits beside `path`: the HDF5 library crashes on a full disk."""
    with tempfile.TemporaryFile(dir=os.path.dirname(path) or ".") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size + (8 << 20))


def encode(node, kind, version="0.2.0"):
    """Marks an HDF5 node with the AnnData encoding it has."""
    node.attrs.update({"encoding-type": kind, "encoding-version": version})
    return node


def write_frame(file, key, index, columns):
    """A data frame: its index and columns {name: list of text, "" where missing, or an array of numbers}."""
    group = encode(file.create_group(key), "dataframe")
    group.attrs["_index"] = "_index"
    group.attrs.create("column-order", list(columns), dtype=h5py.string_dtype())
    write_value(group, "_index", index)
    for name, values in columns.items():
        if len(values) != len(index):
            raise ValueError(f"{key}/{name}: {len(values)} values for {len(index)} rows")
        if len(values) and isinstance(values[0], str):
            code = dict(zip(sorted(set(values) - {""}), itertools.count()))
            codes = np.array([code.get(value, -1) for value in values], np.int32)
            write_value(group, name, {"codes": codes, "categories": list(code)})
            encode(group[name], "categorical").attrs["ordered"] = False
        else:
            write_value(group, name, np.asarray(values))


def write_value(group, name, value):
    """A nested dict, text, a list of text, a number or an array."""
    if isinstance(value, dict):
        node = encode(group.create_group(name), "dict", "0.1.0")
        for key, item in value.items():
            write_value(node, key, item)
        return
    text = all(isinstance(item, str) for item in value) if isinstance(value, list) else isinstance(value, str)
    node = group.create_dataset(name, data=value, dtype=h5py.string_dtype() if text else None)
    kinds = ("string", "string-array") if text else ("numeric-scalar", "array")
    encode(node, kinds[bool(node.shape)])


# ---------------------------------------------------------------------------------------- files in

@contextlib.contextmanager
def reading(path):
    """Turns any failure of the reading inside it into a `DataError` that names `path`.

    Damaged files make h5py, numpy, pickle and zipfile raise nearly every exception there is: all are caught.
    So only what takes a format apart belongs inside, not what is decided: our bugs keep their traceback.
    """
    try:
        yield
    except DataError:
        raise
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise DataError(f"{path}: {error.strerror.lower()}") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{path}: cannot be read, damaged or of an unknown kind ({reason})") from None


def in_child(path, read):
    """What `read()` returns, from a forked child with limits on time and memory; `DataError` beyond them.

    On a damaged file the HDF5 library can loop for ever or crash, and a pickle of a few bytes can ask for any
    amount of memory. Only the end of a process ends that. Where nothing can fork, the file is trusted.
    """
    if not hasattr(os, "fork"):
        return read()
    size = os.path.exists(path) and os.path.getsize(path)

    def answer():
        signal.signal(signal.SIGINT, signal.SIG_IGN)    # the parent ends this process
        signal.alarm(SECONDS_TO_OPEN + size // 50_000_000)      # so does the clock, inside HDF5, too
        if os.path.exists("/proc/self/statm"):          # pages in use
            import resource
            used = int(np.loadtxt("/proc/self/statm")[0]) * resource.getpagesize()
            limit = used + MEMORY_TO_OPEN + 20 * size
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        try:
            send.send(read())
        except DataError as error:                      # the traceback of any other is printed here
            send.send(error)
    fork = multiprocessing.get_context("fork")
    receive, send = fork.Pipe(duplex=False)
    child = fork.Process(target=answer, daemon=True)
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):     # beside threads
        child.start()
    send.close()
    try:
        result = receive.recv()
    except EOFError:
        raise DataError(f"{path}: reading it crashes or does not come to an end: it is damaged") from None
    finally:
        child.kill()
        child.join()
    if isinstance(result, DataError):
        raise result
    return result


def open_file(path):
    """Opens an HDF5 file for reading; refuses one whose parts lie in other files."""
    with reading(path), open(path, "rb"):
        if not h5py.is_hdf5(path):
            raise ValueError("not an HDF5 file; AnnData files, .h5ad or .h5, can be read")
        file = h5py.File(path, "r")

        def elsewhere(name, link):
            node = file[name] if isinstance(link, h5py.HardLink) else None
            stored = isinstance(node, h5py.Dataset) and node.shape
            if isinstance(link, h5py.ExternalLink) or stored and (node.external or node.is_virtual):
                return name
        if found := file.visititems_links(elsewhere):
            raise ValueError(f"{found} lies in another file")
        return file


def text_attribute(node, name):
    """An attribute of an HDF5 node as text, empty where there is none."""
    value = node.attrs.get(name, "")
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def read_column(node, categories=None):
    """A column of a data frame: (codes, names), the places of its rows among the sorted distinct values.

    node: array, categorical (codes, categories) or nullable (values, mask); `categories`: where codes point.
    Numbers are named, too, 3.0 as "3". Code -1 means missing: "", "nan", not-a-number.
    """
    mask = False
    if isinstance(node, h5py.Group) and "mask" in node:
        node, mask = node["values"], node["mask"][()].astype(bool)
    if isinstance(node, h5py.Group):
        node, categories = node["codes"], node["categories"]
    elif "categories" in getattr(node, "attrs", ()):    # as before 0.8
        categories = node.file[node.attrs["categories"]]
    rows = node[()]
    if categories is not None:
        codes, names = read_column(categories)
        if rows.dtype.kind not in "iu" or rows.size and not -1 <= rows.min() <= rows.max() < len(codes):
            raise ValueError(f"a column has codes {np.unique(rows)[[0, -1]]} for {len(codes)} categories")
        return np.append(codes, -1)[rows], names
    values, codes = np.unique(rows, return_inverse=True)
    names = [value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value).removesuffix(".0")
             for value in values.tolist()]
    return np.where(np.isin(names, ["", "nan"])[codes] | mask, -1, codes), names


def open_frame(file, key):
    """The data frame "obs" or "var": (function from a name to the column, names, name of the index)."""
    if key not in file:
        raise ValueError(f"no {key}: not an AnnData file, it has {listed(file) or 'nothing'}")
    node = file[key]
    if isinstance(node, h5py.Group):                    # else one compound table, as before 0.7
        columns, names, categories = node, list(node), key + "/__categories/{}"     # as in 0.7
    else:
        columns, names, categories = node[()], list(node.dtype.names), "uns/{}_categories"
    index = text_attribute(node, "_index") or "index"
    return (lambda name: read_column(columns[name], file.get(categories.format(name))),
            [name for name in names if name not in ("__categories", index)], index)


def texts(column):
    """A column (codes, names) as text, an array (rows,): "" where it is missing."""
    return np.array([*column[1], ""], object)[column[0]]


def read_obs(path, columns):
    """Columns of obs by name: {name: (C,) array of text}, "" where missing."""
    def read():
        with open_file(path) as file, reading(path):
            column, *_ = open_frame(file, "obs")
            return {name: texts(column(name)) for name in columns}
    return in_child(path, read)


@dataclass
class Matrix:
    """Where expression lies in an AnnData file and what it is; `row_blocks` reads it.

    `matrix[rows]` reads (n, G) float32 of log-normalised values that lie in one piece from the mapped file.
    """
    path: str
    key: str
    layout: str                  # "dense", "csr" or "csc"
    shape: tuple[int, int]       # (C, G)
    dtype: np.dtype
    offset: int                  # where the values begin if they lie in the file in one piece, else None
    pointers: np.ndarray         # where each row (csr) or column (csc) begins: (C + 1,) or (G + 1,)
    counts: bool                 # raw counts, told from a sample: whole numbers
    choose: int = 0              # how many highly variable genes are to be chosen; 0: all are used
    predicted: bool = False      # predictions: values may be of any size, every row is kept

    @functools.cached_property
    def matrix(self):
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)

    def __getitem__(self, rows):
        return self.checked(np.asarray(self.matrix[rows], np.float32))      # only what is used is looked at

    def checked(self, values):
        """The values; `DataError` unless all are finite and what counts or their logarithms can be."""
        low, high = values.min(initial=0.0), values.max(initial=0.0)
        expected = self.predicted or 0 <= low and (self.counts or high <= LOG_NORMALISED_MAX)
        if not expected or not np.isfinite(high - low):
            raise DataError(f"{self.path}: {self.key} holds values from {low:g} to {high:g}; counts, or "
                            "log1p of normalised counts, were expected, finite and not negative")
        return values


def open_matrix(file, key):
    """Recognises the matrix `key` and checks that its parts fit together; reads a sample of the values."""
    node, offset, pointers = file[key], None, None
    if isinstance(node, h5py.Dataset):
        layout, values, shape, offset = "dense", node, node.shape or (), node.id.get_offset()
    else:
        layout = text_attribute(node, "encoding-type") or text_attribute(node, "h5sparse_format")
        layout, values, indices = layout.removesuffix("_matrix"), node["data"], node["indices"]
        shape = tuple(map(int, node.attrs.get("shape", node.attrs.get("h5sparse_shape", ()))))
        pointers = node["indptr"][()].astype(np.int64, casting="same_kind")
        if (layout not in ("csr", "csc") or len(shape) != 2 or len(pointers) != shape[layout == "csc"] + 1
                or [*pointers[[0, -1]]] != [0, values.size] or (np.diff(pointers) < 0).any()
                or values.shape != indices.shape or indices.dtype.kind not in "iu"):
            raise ValueError(f"{key}: data ({values.size}), indices ({indices.size} {indices.dtype}), indptr "
                             f"({pointers.size}) are no sparse matrix, CSR or CSC, of shape {shape}")
    if (len(shape) != 2 or min(shape) < 1 or values.dtype.kind not in "biuf"
            or offset and offset + node.nbytes > os.path.getsize(file.filename)):
        raise ValueError(f"{key} has {values.dtype} of shape {shape}, not numbers, cells by genes, or no end")
    width = 64 if layout == "dense" else 1 << 16
    starts = np.linspace(0, max(0, len(values) - width), 4).astype(int)
    sample = np.concatenate([values[start:start + width].ravel() for start in starts])
    counts = bool((sample == np.abs(np.rint(sample))).all())
    return Matrix(file.filename, key, layout, shape, values.dtype, offset, pointers, counts)


def row_blocks(matrix):
    """Some rows at a time, checked: (first row, values (n, G) float32, factors (n, 1) to 10,000 per cell)."""
    with reading(matrix.path), h5py.File(matrix.path, "r") as file:
        node, (cells, genes) = file[matrix.key], matrix.shape
        step = max(1, BLOCK_BYTES // (4 * genes))
        chunk = min((getattr(node, "chunks", None) or (1,))[0], 8 * step)
        step = max(1, step // chunk) * chunk            # whole chunks: each is decompressed once
        read = 64 * step if matrix.layout == "csc" else step    # each takes a pass over the file: large ones
        for begin in range(0, cells, read):
            end = min(begin + read, cells)
            block = node[begin:end] if matrix.layout == "dense" else sparse_rows(node, matrix, begin, end)
            for first in range(0, end - begin, step):
                values = matrix.checked(block[first:first + step].astype(np.float32, copy=False))
                sums = values.sum(1) if matrix.counts else np.full(len(values), TARGET_SUM)
                yield begin + first, values, TARGET_SUM / np.where(sums > 0, sums, 1.0)[:, None]


def sparse_rows(node, matrix, begin, end):
    """Rows `begin` to `end` of a sparse matrix as a dense (n, G) array, a part of the entries at a time."""
    # a line: a row of a CSR matrix, or a column of a CSC one, from all of which the rows are picked
    by_row, size = matrix.layout == "csr", matrix.shape[matrix.layout == "csr"]
    pointers = matrix.pointers[begin:end + 1] if by_row else matrix.pointers
    dense = np.zeros((len(pointers) - 1, size if by_row else end - begin), np.float32)
    cuts = np.searchsorted(pointers, np.arange(pointers[0], pointers[-1], BLOCK_BYTES // 4))
    for first, last in itertools.pairwise(np.unique([0, *cuts, len(dense)])):
        entries = slice(*pointers[[first, last]])
        indices, values = node["indices"][entries].astype(np.int64), node["data"][entries]
        lines = np.repeat(np.arange(first, last), np.diff(pointers[first:last + 1]))
        if len(indices) and not 0 <= indices.min() <= indices.max() < size:
            raise ValueError(f"indices run from {indices.min()} to {indices.max()}, beyond {matrix.shape}")
        if not by_row:
            here = (indices >= begin) & (indices < end)
            lines, indices, values = lines[here], indices[here] - begin, values[here]
        places = lines * dense.shape[1] + indices
        if (places[1:] <= places[:-1]).any() and len(np.unique(places)) < len(places):
            raise ValueError("several values for one cell and gene: add them up (scipy: sum_duplicates)")
        dense.ravel()[places] = values
    return dense if by_row else dense.T


def read_embeddings(path):
    """Embeddings from an .npz (`genes`, `embeddings`), a GenePT pickle (symbol -> numbers) or a packed file.

    Returns (genes, (N, E) float32). Genes with an embedding of zeros have none: left out. Raises `DataError`.
    """
    def read():
        with reading(path), open(path, "rb") as file, np.errstate(over="ignore"):   # infinity is refused
            start = file.peek()[:4]
            if start == b"\x89HDF":
                with open_file(path) as packed:
                    return read_packed(packed)["embeddings"]
            if start == b"PK\x03\x04":
                with np.load(file, allow_pickle=False) as archive:
                    return check_embeddings(archive["genes"], archive["embeddings"])
            table = PlainUnpickler(file).load()
            if not isinstance(table, dict):
                raise ValueError("no GenePT pickle: a dict from gene symbol to numbers was expected")
            rows = [np.asarray(numbers, np.float32) for numbers in table.values()]
            return check_embeddings(np.array([*table], object), np.stack(rows))
    return in_child(path, read)


def check_names(names):
    """ValueError for a name with control characters, which would break lines, tables and terminals."""
    for name in names:
        if any(ord(c) < 32 or 127 <= ord(c) < 160 for c in name):
            raise ValueError(f"control characters in the name {ascii(name)}: rename it")


def check_embeddings(genes, embeddings):
    """(genes, embeddings) as list and float32, without rows of zeros; ValueError if they do not fit."""
    embeddings = embeddings.astype(np.float32, casting="same_kind", copy=False)
    distinct = {gene for gene in genes if isinstance(gene, str)}
    if not embeddings.shape[:-1] == (genes.size,) == (len(distinct),) or not np.isfinite(embeddings).all():
        raise ValueError(f"genes must be text, each once, with a row of finite numbers: {genes.shape} genes, "
                         f"{embeddings.shape} embeddings")
    check_names(genes)
    present = embeddings.any(1)
    return genes[present].tolist(), embeddings[present]


def plain_array(kind, raw, shape=(), order="C"):
    """The array or scalar, of numbers or text, that numpy would have made of the raw parts in a pickle."""
    kind = np.dtype(str(kind.arguments[0])).newbyteorder(kind.state[1])
    if kind.kind not in "iufU":
        raise ValueError(f"an array of {kind}")
    return np.frombuffer(raw, kind).reshape(shape, order=order)[()]


class Pickled:
    """Stands in for a dtype or array of numpy in a pickle: runs nothing, remembers its parts."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __setstate__(self, state):
        self.state = state

    def __array__(self, dtype=None, copy=None):
        _, shape, kind, fortran, raw = self.state
        return plain_array(kind, raw, shape, "F" if fortran else "C")


class PlainUnpickler(pickle.Unpickler):
    """Reads containers, numbers, text and numpy arrays of those; refuses a pickle that names more."""
    KNOWN = {"_codecs.encode": lambda text, _: text.encode("latin1"),       # the bytes of protocol 2
             "numpy.ndarray": Pickled, "numpy.dtype": Pickled}
    for core in ("numpy.core", "numpy._core"):
        KNOWN |= {f"{core}.multiarray._reconstruct": Pickled, f"{core}.multiarray.scalar": plain_array,
                  f"{core}.numeric._frombuffer": lambda raw, kind, *layout: plain_array(kind, raw, *layout)}

    def find_class(self, module, name):
        if f"{module}.{name}" not in self.KNOWN:
            raise ValueError(f"names {module}.{name}: refused, since it could run code")
        return self.KNOWN[f"{module}.{name}"]


# ----------------------------------------------------------------------------------------- Dataset

@dataclass
class Dataset:
    """Cells with their labels, and the embeddings of genes.

    `expression[rows]` gives (n, G) float32, log1p of counts normalised to 10,000 per cell, from memory or
    disk. Labels are codes into the lists of names; perturbation 0 is the control, the others are sorted.
    Rows are those of a file that is mapped (cell line and perturbation of cells that cannot be used are -1),
    else the usable cells, sorted.
    """
    name: str                    # the file as the user wrote it, or "simulated"
    genes: list[str]             # (G,)
    cell_lines: list[str]
    perturbations: list[str]     # (P,)
    gem_groups: list[str]        # a single one when the data have no such column
    expression: object           # (C, G)
    cell_line: np.ndarray        # (C,) int32
    perturbation: np.ndarray     # (C,) int32
    gem_group: np.ndarray        # (C,) int32
    embedding_genes: list[str]   # (N,) every gene that has an embedding
    embeddings: np.ndarray       # (N, E) float32
    notes: list[str] = field(default_factory=list)   # what loading decided or skipped, one line each

    @functools.cached_property
    def _index(self):
        """(keys, order): cells by cell line, perturbation, gem group; `keys`: the three as one number."""
        condition = self.cell_line.astype(np.int64) * len(self.perturbations) + self.perturbation
        key = condition * len(self.gem_groups) + self.gem_group         # negative for cells that are left out
        order = np.argsort(key, kind="stable")
        return key[order], order

    def cells(self, cell_line: int, perturbation: int, gem_group: int | None = None) -> np.ndarray:
        """Row numbers of a condition's cells, of one gem group or of all, ascending: (n,) int64."""
        keys, order = self._index
        groups = len(self.gem_groups)
        first = (cell_line * len(self.perturbations) + perturbation) * groups + (gem_group or 0)
        last = first + (groups if gem_group is None else 1)
        return np.sort(order[slice(*np.searchsorted(keys, [first, last]))])

    def conditions(self) -> list[tuple[int, int]]:
        """The (cell line, perturbation) pairs that have cells, sorted; controls are not among them."""
        pairs = np.unique(self._index[0] // len(self.gem_groups))
        lines, perturbations = np.divmod(pairs[pairs >= 0], len(self.perturbations))
        return [(int(line), int(p)) for line, p in zip(lines, perturbations) if p != 0]

    def perturbation_embeddings(self) -> np.ndarray:
        """(P, E) float32: each perturbation's embedding; zero for the control and for genes without one."""
        known = dict(zip(self.embedding_genes, self.embeddings))
        zeros = np.zeros(self.embeddings.shape[1], np.float32)
        return np.stack([zeros, *(known.get(name, zeros) for name in self.perturbations[1:])])


def highly_variable(matrix, number):
    """Columns of the `number` most variable genes, ascending, by Seurat's dispersion (Satija et al. 2015).

    Mean and variance of the normalised, not logged values; log dispersion (variance / mean) standardised in
    20 bins of log1p(mean), a gene alone in its bin scoring 1. One streaming pass.
    """
    cells, genes = matrix.shape
    moments = np.zeros((2, genes))
    for _, block, factors in row_blocks(matrix):
        values = block * factors.astype(np.float64) if matrix.counts else np.expm1(block.astype(np.float64))
        moments += values.sum(0), np.einsum("cg,cg->g", values, values)
    mean = moments[0] / cells
    variance = np.maximum(moments[1] - cells * mean ** 2, 0.0) / max(1, cells - 1)
    varies, level = variance > 0, np.log1p(mean)
    edges = np.linspace(level.min(), level.max(), 21)
    bins = np.clip(np.searchsorted(edges, level) - 1, 0, 19)            # open to the left, as pandas.cut
    score = np.full(genes, -np.inf)
    score[varies] = np.log(variance[varies] / mean[varies])
    for here in (varies & (bins == number) for number in np.unique(bins[varies])):
        alone, spread = here.sum() == 1, score[here].std(ddof=here.sum() > 1) or 1.0
        score[here] = 1.0 if alone else (score[here] - score[here].mean()) / spread
    return np.sort(np.argsort(-score, kind="stable")[:number])


# ----------------------------------------------------------------------------- loading and packing

def choose(path, what, names, asked, known, needed=True):
    """The one of `names` that was asked for or is in a spelling of the field; "" for none unless `needed`."""
    found = [name for name in names if name == asked or not asked and name.lower() in known]
    if len(found) == 1 or not found and not needed:
        return "".join(found)
    problem = f"the {what} could be {' or '.join(found)}" if found else f"no {what} {asked or 'recognised'}"
    raise DataError(f"{path}: {problem}; name it with --{what.removesuffix(' label').replace(' ', '-')} "
                    f"(there are {listed(names, 20) or 'none'})")


def read_packed(file):
    """What `pack` put into uns: {"control", "notes", "embeddings": (genes, (N, E))}, or {} in other files."""
    if text_attribute(file, "format") == "ptrag-packed":
        raise ValueError("packed by an earlier version: pack it again")
    if "uns/ptrag" not in file:
        return {}
    packed = file["uns/ptrag"]
    return {"control": packed["control"].asstr()[()], "notes": packed["notes"].asstr()[()].tolist(),
            "embeddings": check_embeddings(packed["embedding_genes"].asstr()[()], packed["embeddings"][()])}


def find_expression(file, hvg, predicted):
    """The matrix to use, obsm/X_hvg if it holds logarithms, else X, else the first layer: (Matrix, notes)."""
    keys = [key for key in ("obsm/X_hvg", "X") if key in file]
    keys = keys or [f"layers/{name}" for name in file.get("layers", ())][:1] or ["X"]
    matrix = open_matrix(file, keys[0])
    if matrix.counts:                                   # of some genes: X has the totals of all
        matrix = open_matrix(file, keys[-1])
    matrix.predicted = predicted
    notes = [f"{matrix.key} holds counts: normalised to 10,000 per cell and log1p'd" if matrix.counts else
             f"{matrix.key} holds log-normalised values: used as they are"]
    matrix.choose = 0 if predicted or matrix.key == "obsm/X_hvg" or matrix.shape[1] <= hvg else hvg
    if not matrix.counts and matrix.layout != "csc":  # where even a few rows take a pass over the file
        totals = np.expm1(next(row_blocks(matrix))[1].astype(np.float64)).sum(1)
        # genes left out can make a total smaller, but not larger, nor the same in every cell
        if totals.max() > 1.01 * TARGET_SUM or totals.std() < 0.01 * totals.mean() < 0.0099 * TARGET_SUM:
            notes.append(f"{matrix.key} is not on the scale of 10,000 per cell: its cells add up to "
                         f"{totals.min():,.0f} to {totals.max():,.0f} before the logarithm")
    return matrix, notes


def gene_names(file, matrix, perturbations, notes):
    """The names of the matrix's genes, if possible of the kind that perturbations have; adds to the notes."""
    column, names, index = open_frame(file, "var")
    genes, number = texts(column(index)), matrix.shape[1]
    by_id, ids = (np.mean([name.startswith("ENS") for name in of]) > 0.5 for of in (perturbations, genes))
    if ids and not by_id:
        notes.append("genes have Ensembl ids, perturbations symbols: no perturbation knows its own gene")
        for name in [name for name in SYMBOL_COLUMNS if name in names][:1]:
            symbols = texts(column(name))
            values, times = np.unique(symbols, return_counts=True)
            genes = np.where(np.isin(symbols, [*values[times > 1], ""]), genes, symbols)
            notes[-1] = f"genes are called by their symbols, var column {name}, as the perturbations are"
    if matrix.key == "obsm/X_hvg" and len(genes) != number:
        if "highly_variable" in names:
            genes = genes[np.isin(texts(column("highly_variable")), ["True", "1"])]
        if len(genes) != number:
            genes = np.array([f"hvg{i}" for i in range(number)])
            notes.append(f"the {number} genes of {matrix.key} have no names: called hvg0 to hvg{number - 1}")
    distinct, times = np.unique(genes, return_counts=True)
    if len(genes) != number or (times > 1).any():
        raise ValueError(f"{matrix.key} has {number:,} columns for {len(genes):,} genes in var, more than "
                         f"once {listed(distinct[times > 1]) or 'none'}")
    return genes.tolist()


def recognise(path, genept="", perturbation_column="", cell_line_column="", batch_column="", control="",
              hvg=2000, need_embeddings=True, predicted=False):
    """A Dataset whose expression is a `Matrix`, of which no values are read yet. Options as in `load`.

    need_embeddings None: only where there are any. Without perturbed cells an error, unless it is False.
    """
    path, given = os.fspath(path), read_embeddings(genept) if genept else None
    need_embeddings = need_embeddings and not predicted

    def read():
        with open_file(path) as file, reading(path):
            packed, (column, names, _) = read_packed(file), open_frame(file, "obs")
            (matrix, notes), labels = find_expression(file, hvg, predicted), []
            columns = cell_line_column, perturbation_column, batch_column
            for asked, (what, known) in zip(columns, COLUMNS.items()):
                name = choose(path, what, names, asked, known, asked or what == "perturbation column")
                labels.append(column(name) if name else (np.zeros(matrix.shape[0], int), ["all"]))
                if not name:
                    notes.append(f"no {what} ({', '.join(known)}): all cells count as one, called all")
                if labels[-1][0].shape != (matrix.shape[0],):
                    raise ValueError(f"obs column {name} and the rows of {matrix.key} differ in number")
            genes = gene_names(file, matrix, labels[1][1], notes)
            check_names([*genes, *(name for _, names in labels for name in names)])
        notes = packed.get("notes", notes)
        embeddings = given or packed.get("embeddings", ([], np.zeros((0, 0), np.float32)))
        if need_embeddings and not embeddings[0]:
            raise DataError(f"{path}: holds no gene embeddings; give a GenePT pickle or an .npz by --genept")
        embedded = need_embeddings is not False and embeddings[0]
        labels = usable_cells(path, labels, control or packed.get("control", ""), embedded, predicted, notes)
        codes, names = zip(*labels)
        dataset, twins = Dataset(path, genes, *names, matrix, *codes, *embeddings, notes), {}
        if need_embeddings is not False and not dataset.conditions():
            raise DataError(f"{path}: no perturbed cells are left to use ({'; '.join(notes)})")
        for name, vector in zip(dataset.perturbations, dataset.perturbation_embeddings()):
            twins.setdefault(vector.tobytes() if vector.any() else name, []).append(name)
        twins = [" = ".join(names) for names in twins.values() if len(names) > 1]
        note = f"{len(twins)} embeddings belong to several perturbations, alike in retrieval: {listed(twins)}"
        if twins and note not in notes:
            notes.append(note)
        return dataset
    return in_child(path, read)


def usable_cells(path, labels, control, embedded, predicted, notes):
    """The three labels as codes into sorted names, -1 for cells that cannot be used; the notes count those.

    embedded: the genes with an embedding; if none, perturbations without one are kept. Predictions all are.
    """
    (line, lines), (perturbation, perturbations), (group, groups) = labels
    keep = (line >= 0) & (perturbation >= 0)
    if not keep.all():
        notes.append(f"{(~keep).sum():,} cells without a cell line or perturbation left out")

    def leave_out(unusable, what, codes, names=""):
        unusable = unusable & keep
        left = np.unique(codes[unusable])
        if len(left):
            which = names and f": {listed(sorted(names[code] for code in left))} ({unusable.sum():,} cells)"
            notes.append(f"{len(left):,} {what} left out{which}")
            keep[unusable] = False
    present = [perturbations[code] for code in np.unique(perturbation[keep])]
    control = choose(path, "control label", present, control, CONTROL_LABELS, not predicted) or control
    if not predicted:
        is_control = perturbation == perturbations.index(control)
        leave_out(~np.isin(line, line[keep & is_control]), "cell lines without control cells", line, lines)
        known = {control, *(embedded or perturbations)}
        without = np.array([name not in known for name in perturbations])[perturbation]
        leave_out(without, "perturbations without an embedding", perturbation, perturbations)
        condition = np.where(keep, line * len(perturbations) + perturbation, 0)
        single = np.bincount(condition[keep], minlength=1)[condition] == 1
        leave_out(single & ~is_control, "conditions with a single cell", condition)
    if (group[keep] < 0).any():
        notes.append(f"{(group[keep] < 0).sum():,} cells without a batch count as a batch of their own")
        group, groups = np.where(group < 0, len(groups), group), [*groups, "missing"]

    def recode(codes, names, first=()):
        ordered = [*first, *sorted({names[code] for code in np.unique(codes[keep])} - set(first))]
        number = {name: i for i, name in enumerate(ordered)}
        table = np.array([*(number.get(name, -1) for name in names), -1], np.int32)
        return np.where(keep, table[codes], np.int32(-1)), ordered
    return recode(line, lines), recode(perturbation, perturbations, [control]), recode(group, groups)


def load(path, say=say, **options):
    """Reads an AnnData file, packed or not, into a `Dataset` whose expression is mapped. Raises `DataError`.

    The options are those of `recognise`. genept: file of embeddings (`read_embeddings`). Column names and
    control label are recognised in the spellings of the field unless given. Without obsm/X_hvg the `hvg` most
    variable genes are used. With `need_embeddings` perturbations without one are left out. predicted: the
    cells are predictions: values may be negative, controls and embeddings are not needed, rows and genes stay
    as they are. What cannot be mapped is packed into a temporary file first, as `say` is told.
    """
    dataset = recognise(path, **options)
    matrix = dataset.expression
    if matrix.offset and matrix.dtype.kind == "f" and not matrix.counts and not matrix.choose:
        return dataset
    say(f"{path}: {matrix.key} is packed into a temporary file; `python data.py pack` once saves this")
    folder = tempfile.TemporaryDirectory(prefix="ptrag-", ignore_cleanup_errors=True)
    with folder:
        copy = os.path.join(folder.name, "packed.h5")
        rows = write_packed(dataset, copy, say)
        with open_file(copy) as file:
            packed = open_matrix(file, "obsm/X_hvg")
        packed.counts, packed.predicted = False, matrix.predicted
        packed.matrix                                   # mapped now: the file has no name any more
    if os.path.exists(copy):                            # Windows removes no mapped file: at the end, then
        atexit.register(lambda: (packed.matrix._mmap.close(), folder.cleanup()))
    codes = {name: getattr(dataset, name)[rows] for name in ("cell_line", "perturbation", "gem_group")}
    return replace(dataset, expression=packed, **codes)


def pack(path, output, say=say, all_embeddings=False, **options):
    """Writes one AnnData file that opens at once: cells sorted by cell line, perturbation and gem group.

    Options as in `load`. Expression is one contiguous float32 piece, obsm/X_hvg, so that loading maps it and
    a condition is one slice; control label, notes and the embeddings of the perturbed genes (or of all) lie
    under uns/ptrag. Returns the notes.
    """
    dataset = recognise(path, need_embeddings=None, **options)
    needed = np.isin(dataset.embedding_genes, dataset.perturbations)
    if not all_embeddings and not needed.all():
        dataset.notes.append(f"{needed.sum():,} of {len(needed):,} embeddings packed, those of the perturbed "
                             "genes; --all-embeddings keeps what --predict may ask for")
        dataset.embedding_genes = [gene for gene, kept in zip(dataset.embedding_genes, needed) if kept]
        dataset.embeddings = dataset.embeddings[needed]
    write_packed(dataset, output, say, [path, options.get("genept") or path])
    return dataset.notes


def write_packed(dataset, output, say, inputs=()):
    """Packs what `recognise` gave; returns the rows written: the usable ones, sorted, or all predictions."""
    matrix, columns, notes = dataset.expression, slice(None), dataset.notes
    rows = np.lexsort((dataset.gem_group, dataset.perturbation, dataset.cell_line))
    rows = np.arange(matrix.shape[0]) if matrix.predicted else rows[dataset.cell_line[rows] >= 0]
    place = np.full(matrix.shape[0], -1)                # where each row of the matrix goes
    place[rows] = np.arange(len(rows))
    if matrix.choose:
        say(f"packing: choosing the {matrix.choose:,} most variable of {len(dataset.genes):,} genes")
        columns = highly_variable(matrix, matrix.choose)
        notes.append(f"the {len(columns):,} most variable of {len(dataset.genes):,} genes chosen")
        dataset.genes = [dataset.genes[column] for column in columns]

    def blocks():
        started, said = time.monotonic(), 0.0
        for begin, block, factors in row_blocks(matrix):
            done, here = begin + len(block), np.flatnonzero(place[begin:begin + len(block)] >= 0)
            block = block[:, columns] if len(here) == len(block) else block[here][:, columns]
            block = np.log1p(block * factors[here]) if matrix.counts else block
            yield place[begin + here], {"obsm/X_hvg": block}
            if time.monotonic() > said + 1 or done == len(place):
                said = time.monotonic()
                speed = done / (said - started + 1e-9)
                say(f"packing: {done:,} of {len(place):,} cells, {speed:,.0f} cells/s")

    obs = {name: texts((getattr(dataset, name)[rows], getattr(dataset, f"{name}s"))).tolist()
           for name in ("cell_line", "perturbation", "gem_group")}
    uns = {"control": dataset.perturbations[0], "notes": notes, "embedding_genes": dataset.embedding_genes,
           "embeddings": dataset.embeddings}
    write_anndata(output, dataset.genes, obs, blocks(), len(rows), {"ptrag": uns}, inputs)
    return rows


def align_genes(dataset, wanted, missing_share=0.0):
    """The dataset's expression of the genes `wanted`: (function from rows to (n, len(wanted)), notes).

    Missing genes count as zero, `DataError` if they are more than `missing_share`; others are left out. Genes
    named 0, 1, ... are taken in order if their number is right, as STATE writes its predictions.
    """
    numbered = dataset.genes == [str(i) for i in range(len(wanted))] != list(wanted)
    column = {gene: i for i, gene in enumerate(wanted if numbered else dataset.genes)}
    missing, extra = [gene for gene in wanted if gene not in column], sorted(set(column) - set(wanted))
    problem = f"{dataset.name}: {len(missing)} of the {len(wanted)} genes needed are missing"
    if len(missing) > missing_share * len(wanted):
        raise DataError(f"{problem}: {listed(missing)}")
    notes = [f"{problem} and count as zero: {listed(missing)}"] if missing else []
    if extra:
        notes.append(f"{dataset.name}: {len(extra)} genes not needed are left out: {listed(extra)}")
    if numbered:
        notes.append(f"{dataset.name}: genes are numbered, taken in the order of those needed")
    columns = np.array([column.get(gene, -1) for gene in wanted], int)      # -1: the column of zeros put last
    return (lambda rows: np.pad(dataset.expression[rows], ((0, 0), (0, 1)))[:, columns]), notes


# ------------------------------------------------------------------------------------------ splits

@dataclass
class Split:
    """Conditions (cell line, perturbation) to train on, to validate with and to test; all use controls."""
    train: list[tuple[int, int]]
    validation: list[tuple[int, int]]
    test: list[tuple[int, int]]
    notes: list[str] = field(default_factory=list)


def split(dataset, rule, seed=0):
    """Cuts the conditions of a dataset in three by a rule. `DataError` for a rule that it cannot follow.

    "cell-line:NAME"     few-shot: of the line's perturbations 30 % train, 10 % validate, 60 % test; all other
                         lines train. The name in any case.
    "perturbation:FOLD"  genes, in all lines: 30 % train, 10 % validate, 60 % test, in one random order that
                         fold 0, 1, 2 starts cutting at 0, 1/3, 2/3: no gene is trained on twice.
    "FILE.toml"          the field's split files: lines in [zeroshot], lists of perturbations in [fewshot].
    """
    kind, _, value = str(rule).partition(":")
    conditions, notes = dataset.conditions(), []
    names = [(dataset.cell_lines[line].lower(), dataset.perturbations[p]) for line, p in conditions]
    if kind == "cell-line":
        part = cut({name for line, name in names if line == value.lower()}, seed)
        parts = [part[name] if line == value.lower() else "train" for line, name in names]
    elif kind == "perturbation" and value in ("0", "1", "2"):
        part = cut({name for _, name in names}, seed, int(value))
        parts = [part[name] for _, name in names]
    elif str(rule).endswith(".toml"):
        parts = split_file(rule, names, notes)
    else:
        raise DataError(f"split {rule!r}: known are cell-line:NAME, perturbation:0, 1 and 2, and FILE.toml")
    train, validation, test = ([pair for pair, its in zip(conditions, parts) if its == part]
                               for part in ("train", "val", "test"))
    if not train or not test:
        raise DataError(f"{dataset.name}: split {rule!r} leaves nothing to {'test' if train else 'train'}; "
                        f"cell lines of the data: {listed(dataset.cell_lines, 20)}")
    return Split(train, validation, test, notes)


def cut(names, seed, fold=0):
    """{name: part}: 30 % train, 10 % val, 60 % test, in a random order that is the same on every machine."""
    order = sorted(names, key=lambda name: (hashlib.sha256(f"{seed}:{name}".encode()).digest(), name))
    start, validation = fold * len(order) // 3, max(1, round(0.1 * len(order)))
    parts = ["train"] * round(0.3 * len(order)) + ["val"] * validation + ["test"] * len(order)
    return dict(zip(order[start:] + order[:start], parts))


def split_file(path, conditions, notes):
    """The part of each condition (cell line in small letters, perturbation) or None; adds to the notes."""
    rules = {}                                          # cell line: {perturbation: part, None: of the others}
    with reading(path), open(path, "rb") as file:
        table = tomllib.load(file)
        training, zeroshot, fewshot = (table.get(name, {}) for name in ("training", "zeroshot", "fewshot"))
        training = {name.lower() for name, use in training.items() if use == "train"}
        for key, rule in [*zeroshot.items(), *fewshot.items()]:
            lists = rule if isinstance(rule, dict) else {rule: []}
            names = [name for names in lists.values() for name in dict.fromkeys(names)]
            owner, _, line = key.lower().partition(".")     # found by the line's name, whatever the dataset's
            if (not line or line in rules or {*lists} - {"train", "val", "test"} or len({*names}) < len(names)
                    or {*map(type, lists.values())} - {list} or {*map(type, names)} - {str}):
                raise ValueError(f"{key}: expected dataset.line, once, and train, val or test, or for each a "
                                 "list of perturbations that stand in no other")
            others = rule if isinstance(rule, str) else "train" if owner in training else None
            rules[line] = {None: others} | {name: part for part in lists for name in lists[part]}
    known, lines = set(conditions), {line for line, _ in conditions}
    unknown = [line for line in rules if line not in lines]
    unknown += [f"{name} in {line}" for line in rules if line in lines for name in rules[line]
                if name and (line, name) not in known]
    if unknown:
        notes.append(f"{path}: {len(unknown)} of what it lists are not in the data: {listed(unknown)}")
    rules = {line: {None: "train" if training else None} for line in lines} | rules
    parts = [rules[line].get(name, rules[line][None]) for line, name in conditions]
    if None in parts:
        notes.append(f"{path}: {parts.count(None)} conditions belong to no part")
    return parts


# ---------------------------------------------------------------------------------------- sampling

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


def paired_controls(dataset, rng, cell_line, gem_groups, avoid=()):
    """A control row for each of `gem_groups` (n,), of that group if it has controls, else of the line."""
    controls = np.empty(len(gem_groups), np.int64)
    for gem_group in np.unique(gem_groups):
        where = np.flatnonzero(gem_groups == gem_group)
        pool = dataset.cells(cell_line, 0, gem_group)
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
        """The sets numbered `sets` of a step; set i depends on (seed, step, i) alone: ranks share them."""
        dataset, sets = self.dataset, list(sets)
        picked = np.empty((2, len(sets)), np.int64)  # (2, B): cell lines, perturbations
        targets, controls = np.empty((2, len(sets), self.cells), np.int64)  # (B, S) each
        for place, number in enumerate(sets):
            rng = np.random.default_rng([self.seed, step, number])
            line, perturbation = picked[:, place] = self.conditions[rng.integers(len(self.conditions))]
            targets[place] = pick(rng, dataset.cells(line, perturbation), self.cells)
            avoid = targets[place] if perturbation == 0 else ()
            controls[place] = paired_controls(dataset, rng, line, dataset.gem_group[targets[place]], avoid)
        return Batch(dataset.expression[controls], dataset.expression[targets],  # (B, S, G) each
                     picked[1], picked[0], dataset.gem_group[controls].astype(np.int64))


def prefetch(sampler, steps, sets):
    """Yields the batch of each step in order; the next one is drawn in a thread meanwhile."""
    sets = list(sets)
    with ThreadPoolExecutor(1) as thread:
        batches = (thread.submit(sampler.draw, step, sets) for step in steps)
        for batch, _ in itertools.pairwise(itertools.chain(batches, [None])):   # the next one is submitted
            yield batch.result()


def evaluation_cells(dataset, condition, seed, max_cells=1000, multiple_of=1):
    """Real cells of a condition and control cells to predict them from: row numbers (n,) and (m,).

    n is the condition's cells, at most `max_cells` (a random part of them then); m is n rounded up to a
    multiple of `multiple_of`. Control i has the gem group of real cell i (of i - n beyond n). Depends on the
    seed and the names only, the first n controls not on `multiple_of`.
    """
    line, perturbation = condition
    name = f"{seed}:{dataset.cell_lines[line]}:{dataset.perturbations[perturbation]}"
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
    real = dataset.cells(line, perturbation)
    if len(real) > max_cells:
        real = np.sort(pick(rng, real, max_cells))
    groups, avoid = dataset.gem_group[real], real if perturbation == 0 else ()
    return real, np.concatenate([paired_controls(dataset, rng, line, np.resize(groups, number), avoid)
                                 for number in (len(real), -len(real) % multiple_of)])


# -------------------------------------------------------------------------------------- simulation

def simulate(seed=0, cell_lines=4, perturbations=80, genes=200, cells=40, controls=300, embedding_dim=64,
             programs=12):
    """A simulated Replogle-like Dataset; `cells` per condition, `controls` per line, from the seed alone.

    Genes belong to one to three programs. Perturbing a gene lowers the expression of its programs' genes, by
    its own strength (weak for some, strong for others) and only as far as the cell line uses each program:
    log mean = baseline(line) + gem group effect - strength sum_k membership(k) use(line, k) loading(k, gene).
    Counts are negative binomial. Embeddings are a noisy linear view of program membership.
    """
    rng = np.random.default_rng(seed)
    groups, measured = 3, np.arange(genes) + perturbations // 2     # half of the perturbed genes among them
    names = [f"GENE{i + 1:03d}" for i in range(max(perturbations, perturbations // 2 + genes))]  # (N,)

    members = rng.random((len(names), programs)).argsort(1) < rng.integers(1, 4, len(names))[:, None]
    membership = members * rng.gamma(2.0, 1.0, members.shape)
    membership /= membership.sum(1, keepdims=True)  # (N, programs)
    loading = (membership[measured] * rng.gamma(2.0, 0.75, (genes, 1))).T  # (programs, G)
    use = (rng.random((cell_lines, programs)) < 0.6) * rng.uniform(0.5, 1.5, (cell_lines, programs))
    strength = rng.gamma(1.5, 1.2, perturbations)
    baseline = rng.normal(0.0, 1.2, genes) + rng.normal(0.0, 0.5, (cell_lines, genes))  # (lines, G)
    group_effect = rng.normal(0.0, 0.1, (cell_lines, groups, genes))
    dispersion = rng.gamma(4.0, 0.75, genes) + 0.5

    codes = np.repeat(np.arange(perturbations + 1, dtype=np.int32), [controls] + [cells] * perturbations)
    gem_group = rng.integers(0, groups, (cell_lines, len(codes))).astype(np.int32)
    expression = np.empty((cell_lines, len(codes), genes), np.float32)
    for line in range(cell_lines):                      # a line at a time keeps the draws in float64 small
        shift = -strength[:, None] * (membership[:perturbations] * use[line]) @ loading  # (P - 1, G)
        shift[np.arange(perturbations)[:, None] == measured] -= 1.5         # the target's own knock-down
        shift = np.vstack([np.zeros(genes), shift])
        log_mean = baseline[line] + group_effect[line, gem_group[line]] + shift[codes]  # (cells of a line, G)
        depth = 2000.0 * rng.lognormal(0.0, 0.3, len(codes)) / np.exp(baseline[line]).sum()
        counts = rng.poisson(rng.gamma(dispersion, np.exp(log_mean) * depth[:, None] / dispersion))
        expression[line] = np.log1p(counts * (TARGET_SUM / np.maximum(counts.sum(1, keepdims=True), 1)))

    view = membership @ rng.normal(0.0, 1.0, (programs, embedding_dim))
    embeddings = view + 0.5 * view.std() * rng.normal(0.0, 1.0, view.shape)  # (N, E)
    lines = [f"sim{chr(ord('A') + line)}" for line in range(cell_lines)]
    return Dataset("simulated", [names[gene] for gene in measured], lines,
                   ["non-targeting", *names[:perturbations]], [f"gem{group + 1}" for group in range(groups)],
                   expression.reshape(-1, genes), np.arange(cell_lines, dtype=np.int32).repeat(len(codes)),
                   np.tile(codes, cell_lines), gem_group.ravel(), names, embeddings.astype(np.float32),
                   ["simulated data, not measured cells"])


# -------------------------------------------------------------------- runs and the command line

UNITS = "log1p of counts normalised to 10,000 per cell; perturbed as in the data, knocked down or activated"


def fingerprint(dataset, split):
    """A text that changes with the cells, labels, genes or split of a run."""
    names = dataset.genes, dataset.cell_lines, dataset.perturbations, dataset.gem_groups
    digest = hashlib.sha256(json.dumps([names, split.train, split.validation, split.test]).encode())
    cells = dataset.expression[np.linspace(0, len(dataset.cell_line) - 1, 64).astype(int)]
    labels = dataset.cell_line, dataset.perturbation, dataset.gem_group
    for array in (*labels, dataset.perturbation_embeddings(), cells):
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def claim(name, stem):
    """Makes runs/NAME or the first free of runs/STEM-1, ..., for one run alone. `DataError` if it exists."""
    for new in [name] if name else (f"{stem}-{number}" for number in itertools.count(1)):
        folder = os.path.join("runs", new)
        with contextlib.suppress(FileExistsError):      # NAME may have stopped before it wrote anything
            os.makedirs(folder, exist_ok=name and not os.path.exists(os.path.join(folder, "config.json")))
            return folder
    raise DataError(f"{folder}: exists; choose another --name, or continue it with --resume {folder}")


def info(path, say=say, **options):
    """Prints what a person wants to know of a file before a run, from its labels. Options as in `load`."""
    dataset = recognise(path, need_embeddings=None, **options)
    matrix, conditions = dataset.expression, dataset.conditions()
    chosen = f"; the {matrix.choose:,} most variable will be used" if matrix.choose else ""
    sizes = np.array([len(dataset.cells(*condition)) for condition in conditions])
    genes, width = dataset.embeddings.shape
    say(f"{path}: {matrix.key} {matrix.layout}, {'counts' if matrix.counts else 'log-normalised'}")
    say(f"cells         {(dataset.cell_line >= 0).sum():,} to use")
    say(f"genes         {len(dataset.genes):,}{chosen} ({listed(dataset.genes, 3)})")
    say(f"perturbations {len(dataset.perturbations) - 1:,} and the control {dataset.perturbations[0]!r}")
    say(f"gem groups    {len(dataset.gem_groups):,}")
    say(f"conditions    {len(conditions):,} (cell line x perturbation) of {sizes.min():,} to {sizes.max():,} "
        f"cells, median {np.median(sizes):,.0f}")
    for number, line in enumerate(dataset.cell_lines):
        say(f"  {line}: {(dataset.cell_line == number).sum():,} cells, {len(dataset.cells(number, 0)):,} "
            f"controls, {sum(first == number for first, _ in conditions):,} perturbations")
    say(f"embeddings    {f'{genes:,} genes x {width}' if genes else 'none; give them with --genept'}")
    for rule in [f"cell-line:{line}" for line in dataset.cell_lines] + ["perturbation:0"]:
        try:
            parts = split(dataset, rule)
            say(f"split {rule}: {len(parts.train):,} conditions to train, {len(parts.validation):,} to "
                f"validate, {len(parts.test):,} to test")
        except DataError as error:
            say(f"split {rule}: not possible ({error})")
    for note in dataset.notes:
        say(f"note: {note}")


def command_line(argv):
    """`python data.py info FILE` and `python data.py pack IN -o OUT.h5`."""
    parser = argparse.ArgumentParser(description="Look into, or pack, a file of perturbed cells.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("info", "say what a file holds"), ("pack", "write one file that opens at once")):
        command = commands.add_parser(name, help=text)
        parser.print_usage = command.print_usage = lambda file: None    # an error is one line
        command.add_argument("path", metavar="file", help="AnnData file (.h5ad, .h5)")
        for option, metavar, text in (
                ("genept", "FILE", "gene embeddings: GenePT pickle, .npz (genes, embeddings) or packed file"),
                ("perturbation-column", "NAME", "obs column of the perturbed gene"),
                ("cell-line-column", "NAME", "obs column of the cell line"),
                ("batch-column", "NAME", "obs column of the gem group"),
                ("control", "LABEL", "perturbation label of the control cells")):
            command.add_argument(f"--{option}", metavar=metavar, help=text)
        command.add_argument("--hvg", type=int, default=2000, metavar="N", help="genes to choose (2000)")
    command.add_argument("--all-embeddings", action="store_true", help="keep those of other genes, too")
    command.add_argument("-o", "--output", required=True, metavar="OUT.h5", help="the file to write")
    options = vars(parser.parse_args(argv))
    if options["hvg"] < 1:
        parser.error("--hvg must be at least 1")
    if options.pop("command") == "info":
        return info(**options)
    end = "\r" if sys.stderr.isatty() else "\n"
    for note in pack(say=lambda text: print(text, end=end, file=sys.stderr, flush=True), **options):
        say(f"note: {note}")
    say(f"wrote {options['output']} ({os.path.getsize(options['output']):,} bytes)")


if __name__ == "__main__":
    sys.exit(status_of(command_line, sys.argv[1:]))
