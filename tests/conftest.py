"""What several test files share: paths, a small model, a tiny data set, the command line."""
import contextlib
import csv
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import ptrag  # noqa: E402

SMALL = dict(hidden=16, layers=2, heads=2, head_dim=8, feed_forward=32, top_k=4, cells=8, sets=4, steps=5)
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not there")
signal.signal(signal.SIGINT, signal.default_int_handler)  # some shells ignore it
torch.set_num_threads(1)  # as fast at these sizes, and much faster beside another program


def small_model(genes=20, perturbations=12, embedding_dim=10, seed=0, **options):
    """An untrained model with random embeddings; perturbation 0, the control, has none."""
    torch.manual_seed(seed)
    embeddings = torch.randn(perturbations, embedding_dim)
    embeddings[0] = 0
    config = ptrag.Config(**{**SMALL, "method": "ptrag", **options})
    names = [f"g{i}" for i in range(genes)], [f"p{i}" for i in range(perturbations)]
    return ptrag.PTRAG(config, *names, embeddings, torch.arange(1, perturbations), ["a", "b", "c"]).eval()


@pytest.fixture(scope="session")
def simulated():
    """A tiny simulated data set; not to be changed."""
    return data.simulate(1, 2, perturbations=14, genes=30, cells=16, controls=40, embedding_dim=8, programs=3)


@pytest.fixture(scope="session")
def files(simulated, tmp_path_factory):
    """Options that name the tiny data set written as AnnData, and its embeddings."""
    folder, d, rows = tmp_path_factory.mktemp("data"), simulated, np.arange(len(simulated.gem_group))
    obs = {"gene": [d.perturbations[code] for code in d.perturbation],
           "cell_line": [d.cell_lines[code] for code in d.cell_line],
           "gem_group": [d.gem_groups[code] for code in d.gem_group]}
    data.write_anndata(folder / "small.h5ad", d.genes, obs, [(rows, {"X": d.expression[rows]})], len(rows))
    np.savez(folder / "embeddings.npz", genes=np.array(d.embedding_genes), embeddings=d.embeddings)
    return ["--data", str(folder / "small.h5ad"), "--genept", str(folder / "embeddings.npz")]


def pytest_collection_finish(session):
    """The README's first command takes more than a minute: it runs beside the other tests."""
    if any("first_command" in getattr(item, "fixturenames", ()) for item in session.items):
        folder = session.config._tmp_path_factory.mktemp("first")
        session.first_command = subprocess.Popen([sys.executable, ROOT / "ptrag.py"], cwd=folder, text=True,
                                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        session.config.add_cleanup(session.first_command.kill)


@pytest.fixture(scope="session")
def first_command(request):
    """What `python ptrag.py` prints."""
    printed, _ = request.session.first_command.communicate()
    assert request.session.first_command.returncode == 0, printed
    return printed


def run(folder, *options):
    """The exit status of `python ptrag.py OPTIONS` in a folder, run in this process; a space separates."""
    with contextlib.chdir(folder):
        return ptrag.main(" ".join(map(str, options)).split(" "))


def table(path):
    """The rows of a CSV file, each {column: text}."""
    with open(path) as file:
        return list(csv.DictReader(file))
