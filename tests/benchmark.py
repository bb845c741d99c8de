"""Speed and memory of every part, as ratios within one run on one machine: one table.

    python tests/benchmark.py [--quick] [--only NAME,...] [--device cuda] [--threads N]

The sides of a ratio take turns; the median over five rounds is given (--quick: three, and smaller shapes).
The other side is the published algorithm, written out below cell by cell. What else runs on the machine
disturbs seconds much, ratios little. Peak memory is that of a process of its own. The last two parts, data
and run, make files of 643,413 cells (25 GB of disk, an hour): only if named, or with --only all.
"""
import argparse
import collections
import contextlib
import functools
import itertools
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import evaluate  # noqa: E402
import ptrag  # noqa: E402

GENES, POOL, EMBEDDING = 2000, 2009, 1536  # G, N, E of the published runs
CELLS, ALL_GENES, DENSITY = 643_413, 6_546, 0.12  # the full Replogle-Nadig shape, and of its counts
NAMES = [f"GENE{number}" for number in range(POOL)]
DEFAULT = ptrag.Config(method="ptrag", steps=10**9)
PUBLISHED = replace(DEFAULT, heads=12, head_dim=58, feed_forward=2784, causal=True, rotary=True,
                    freeze_generator=True)
DEVICE = torch.device("cpu")


# ---- Measuring ---------------------------------------------------------------------------------------------

def seconds(side):
    began = time.perf_counter()
    side()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def take_turns(quick, *sides):
    """Seconds (sides, rounds) of functions called in turn, after one call each to warm up."""
    return np.array([[seconds(side) for side in sides] for _ in range(4 if quick else 6)])[1:].T


def against(slow, fast, least=0, most=np.inf):
    """What was measured of two sides: the end of a row."""
    ratio, goal = np.median(slow / fast), f"at least {least} x" if least else f"at most {most} x"
    measured = f"{ratio:.2f} x: {np.median(slow):.3f} s, {np.median(fast):.3f} s"
    return measured, goal, bool(least <= ratio <= most)


def memory(kind="VmRSS", process="self"):
    """GB that a process has (VmRSS), had at most (VmHWM) or has to itself (RssAnon: no pages of mapped files,
    which the system can take back); of this one with a GPU, what torch has allocated there."""
    if DEVICE.type == "cuda" and process == "self":
        return (torch.cuda.max_memory_allocated if kind == "VmHWM" else torch.cuda.memory_allocated)() / 1e9
    found = re.search(rf"{kind}:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) / 1e6 if found else 0


def watched(*command, part_of=lambda line: "all", until=Path("never")):
    """Runs a Python program, kills it once a file is there: seconds and peak GB of each of its parts, told by
    the last line printed so far; seconds of CPU."""
    taken, peaks, cpu = collections.Counter(), collections.Counter(), sum(os.times()[2:4])
    with open("output", "w") as output:
        process = subprocess.Popen([sys.executable, *map(str, command)], stdout=output, stderr=output)
    while process.poll() is None:
        before = time.perf_counter()
        time.sleep(0.02)
        part = part_of(Path("output").read_text().rstrip().rpartition("\n")[2])
        peaks[part] = max(peaks[part], memory("RssAnon", process.pid))
        taken[part] += time.perf_counter() - before
        if until.exists():
            process.kill()
    if process.returncode and not until.exists():
        raise RuntimeError(f"{command} ended with {process.returncode}: {Path('output').read_text()[-2000:]}")
    return taken, peaks, sum(os.times()[2:4]) - cpu


def set_up(device, threads):
    global DEVICE
    DEVICE = device
    torch.set_num_threads(threads)


def in_a_process(task, *arguments):
    """What a function of this file returns in a process of its own."""
    spawn, own = multiprocessing.get_context("spawn"), (DEVICE, torch.get_num_threads())
    with ProcessPoolExecutor(1, spawn, set_up, own) as process:
        return process.submit(task, *arguments).result()


# ---- The published algorithm, cell by cell -----------------------------------------------------------------

def plain_context(model, perturbation, cell, query, noise=None):
    """Retrieval and selection as published, everything anew for every cell of every set: perturbation (B,),
    cell (B, S, h), query (B, h), noise (B, S, K, 2) -> context (B, S, h), Selection."""
    (B, S, h), K, stage = cell.shape, model.candidates.shape[1], model.selector
    pool = model.embeddings[model.pool]  # (N, E)
    asked = model.embeddings[perturbation].repeat_interleave(S, 0)  # (B * S, E)
    similarity = F.normalize(asked) @ F.normalize(pool).T  # (B * S, N)
    for i in range(B):
        similarity[i * S:(i + 1) * S, model.pool == perturbation[i]] = -torch.inf
    found = pool[similarity.topk(K).indices]  # (B * S, K, E)
    candidate = model.perturbation_encoder(found).view(B, S, K, h)
    parts = cell[:, :, None], query[:, None, None], candidate
    z = stage.norm(torch.cat([part.expand(B, S, K, h) for part in parts], -1))  # (B, S, K, 3h)
    scored = F.dropout(F.gelu(stage.score_in(z)), stage.dropout, stage.training)  # (B, S, K, h)
    logits = stage.score_out(scored)  # (B, S, K, 2)
    logits = logits / logits.std(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
    noise = ptrag.gumbel_noise(logits.shape, logits.device) if noise is None else noise
    soft = torch.softmax((logits + noise) / stage.temperature, -1)  # 0 or 1 with its gradient
    weights = (F.one_hot(soft.argmax(-1), 2) + (soft - soft.detach()))[..., 1]  # (B, S, K)
    context = (weights[..., None] * stage.value(z)).sum(2)  # (B, S, h)
    return context, ptrag.Selection(weights, logits, torch.sigmoid(logits.diff(dim=-1)[..., 0]))


class PlainPTRAG(ptrag.PTRAG):
    """PT-RAG with the published retrieval and selection, and the same generator."""

    def forward(self, control, perturbation, gem_group=None, noise=None):
        c, p = self.cell_encoder(control), self.perturbation_encoder(self.embeddings[perturbation])
        u, selection = plain_context(self, perturbation, c, p, noise)
        return F.relu(self.output(self.generator(u) + c)), selection


# ---- Steps -------------------------------------------------------------------------------------------------

def make_model(config, kind=ptrag.PTRAG):
    """A model whose pool is random embeddings: sets share few candidates, which is the hard case."""
    embeddings = torch.randn(POOL + 1, EMBEDDING, generator=torch.Generator().manual_seed(0))
    embeddings[0] = 0
    torch.manual_seed(0)
    return kind(config, range(GENES), range(POOL + 1), embeddings, torch.arange(1, POOL + 1)).to(DEVICE)


@functools.cache
def make_batch(sets, cells):
    """A batch of random log1p counts."""
    rng, shape = np.random.default_rng(0), (sets, cells)
    control, target = (np.log1p(rng.poisson(0.6, (*shape, GENES))).astype(np.float32) for _ in range(2))
    perturbation, nothing = rng.integers(1, POOL + 1, sets), np.zeros(shape, np.int64)
    return data.Batch(control, target, perturbation, nothing[:, 0], nothing)


def training(config, kind=ptrag.PTRAG):
    """ptrag.train on one batch, a step a call."""
    model, batch = make_model(config, kind), make_batch(config.sets, config.cells)
    optimizer = torch.optim.Adam(model.parameters(), config.lr, fused=True)
    steps = ptrag.train(model, optimizer, itertools.repeat(batch), [], config, ptrag.Progress())
    return lambda: next(steps)


def growing_step(cells):
    """Peak GB over its batch of a step with so many cells a set; its seconds, and the default step's."""
    config = replace(DEFAULT, cells=cells)
    make_batch(config.sets, cells)
    before, step = memory(), training(config)
    seconds(step), seconds(step)
    return memory("VmHWM") - before, *take_turns(True, step, training(DEFAULT))


# ---- Rows: name, measured, goal, whether it is met ---------------------------------------------------------

def step_rows(quick):
    B = 4 if quick else 64
    published, default = replace(PUBLISHED, sets=B), replace(DEFAULT, sets=B)
    plain, ours, own, without = take_turns(
        quick, training(replace(published, group_cells=2**40), PlainPTRAG),  # it knows no groups of sets
        *map(training, (published, default, replace(default, method="state-genept"))))
    yield f"step against the published algorithm, B {B}: default generator", *against(plain, own, least=7)
    yield "  published generator", *against(plain, ours, least=3.5)
    yield f"ptrag step against state-genept, B {B}, default generator", *against(own, without, most=1.35)


def selected(model, perturbation, cell, noise, plain=False):
    """Stages 1 and 2, forward and backward: weights (B, S, K); context, logits and all gradients."""
    encode = lambda genes: model.perturbation_encoder(model.embeddings[genes])
    cell, query = cell.clone().requires_grad_(), encode(perturbation)
    context, selection = plain_context(model, perturbation, cell, query, noise) if plain else model.selector(
        cell, query, encode(model.candidates[perturbation]), "sample", noise)
    model.zero_grad()
    ((context * torch.linspace(-1, 1, cell.shape[2]).to(cell)).sum() + selection.weights.mean()).backward()
    gradients = [weight.grad for weight in (cell, *model.parameters()) if weight.grad is not None]
    return selection.weights.detach(), [context.detach(), selection.logits.detach(), *gradients]


def selection_rows(quick):
    """Stages 1 and 2 against the plain form, and how far the two differ."""
    config = replace(DEFAULT, sets=4 if quick else 64)
    model, shape = make_model(config).train(), (config.sets, config.cells)
    perturbation = torch.from_numpy(make_batch(*shape).perturbation).to(DEVICE)
    cell = torch.randn(*shape, config.hidden, device=DEVICE)
    noise = ptrag.gumbel_noise((*shape, config.top_k, 2), DEVICE)
    sides = [lambda plain=plain: selected(model, perturbation, cell, noise, plain) for plain in (True, False)]
    yield (f"retrieval + selection, forward + backward, against the plain form, B {config.sets}",
           *against(*take_turns(quick, *sides), least=12))
    model.selector.dropout = 0.0  # the same numbers need the same noise
    weights, values = selected(model, perturbation, cell, noise)
    exact, oracle = selected(model.double(), perturbation, cell.double(), noise.double(), plain=True)
    flips = int((weights != exact).sum())
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(values, oracle))
    yield ("  values and gradients against double", f"{error:.0e}, {flips} decisions differ", "1e-5, 0",
           error <= 1e-5 and not flips)


def table_rows(quick):
    N = 3000 if quick else 20_000
    embeddings, pool = torch.randn(N, EMBEDDING, device=DEVICE), torch.arange(N, device=DEVICE)
    taken = seconds(lambda: ptrag.retrieve(embeddings, pool, DEFAULT.top_k))
    yield f"retrieval table of {N:,} genes", f"{taken:.2f} s", "under 3 s", None if quick else taken < 3


def metrics_rows(quick):
    rng = np.random.default_rng(0)
    level = rng.gamma(0.5, 1.0, GENES)
    cells = lambda n, change=1.0: np.log1p(rng.poisson(level * change, (n, GENES))).astype(np.float32)
    control, (real, predicted) = cells(500), (cells(100, rng.lognormal(0, 0.3, GENES)) for _ in range(2))
    profiles, excluded = np.stack([cells(20).mean(0) for _ in range(500)]), np.arange(GENES) == 0
    of_control, pca = evaluate.moments([control]), evaluate.fit_pca([control, real])
    line = evaluate.Line(of_control, *pca, profiles, of_control.mean, of_control.mean)
    row = lambda: evaluate.condition_rows(real, [predicted], line, 0, excluded)
    taken = np.median(take_turns(quick, row))
    yield "one condition's whole metric row, 100 + 100 cells", f"{taken:.3f} s", "under 0.1 s", taken < 0.1


def inference_rows(quick):
    for S, n in ((64, 512), (512, 512)) if quick else ((64, 4096), (512, 4096)):
        control, published = make_batch(n // S, S).control.reshape(n, GENES), replace(PUBLISHED, cells=S)
        models = make_model(published, PlainPTRAG), make_model(published), make_model(DEFAULT)
        sides = [lambda model=model: ptrag.predict(model, control, 1, set_size=S) for model in models]
        plain, *ours = take_turns(quick, *sides)
        for title, taken in zip(("published", "default"), ours):
            yield f"inference, S {S}, {n:,} cells, {title} generator", *against(plain, taken, least=1)


def growth_rows(quick):
    """Peak memory of the default step; memory and time at 8 times the cells, against the default step."""
    peak, *_ = in_a_process(growing_step, DEFAULT.cells)
    yield "peak memory of the default step over the loaded data", f"{peak:.2f} GB", "under 0.7 GB", peak < 0.7
    if not quick:
        peak, *sides = in_a_process(growing_step, 512)
        measured, goal, met = against(*sides, most=13)
        yield ("step at S 512 against the default step; its peak memory", f"{measured}; {peak:.2f} GB",
               f"{goal}, 2 GB", met and peak < 2)


def gpu_rows(quick):
    """A step on a GPU, and its profile, against one on two cores; nothing without one."""
    if DEVICE.type == "cuda":
        own, fast = (DEVICE, torch.get_num_threads()), take_turns(quick, step := training(DEFAULT))
        with torch.profiler.profile() as profile:
            seconds(step)
        print(profile.key_averages().table(sort_by="self_device_time_total", row_limit=20))
        set_up(torch.device("cpu"), 2)
        slow = take_turns(quick, training(DEFAULT))
        set_up(*own)
        yield "step on two cores against this GPU", *against(slow, fast, least=20)


# ---- Data at full shape ------------------------------------------------------------------------------------

def make_file(path, cells, sparse):
    """Cells in random order: counts of all genes in CSR, or log-normalised dense obsm/X_hvg, as published;
    and genept.npz beside it."""
    np.savez("genept.npz", genes=NAMES, embeddings=np.random.default_rng(0).normal(size=(POOL, EMBEDDING)))
    rng, width = np.random.default_rng(0), ALL_GENES if sparse else GENES
    gene = np.where(rng.random(cells) < 0.06, 0, rng.integers(1, POOL, cells))
    lines = np.array(["hepg2", "jurkat", "k562", "rpe1"])[rng.integers(0, 4, cells)]
    obs = {"gene": np.array(["non-targeting", *NAMES])[gene].tolist(), "cell_line": lines.tolist(),
           "gem_group": rng.integers(1, 57, cells)}
    tile, share = 1 + rng.poisson(0.6, (4096, width)).astype(np.float32), rng.gamma(0.4, 1.0, width)
    tile *= rng.random(tile.shape) < np.clip(share / share.mean() * DENSITY, 0, 0.95)
    dense = ((slice(i, i + 4096), {"obsm/X_hvg": np.log1p(tile[:cells - i])}) for i in range(0, cells, 4096))
    blocks = [(slice(0), {"obsm/none": tile[:0, :1]})] if sparse else dense
    data.write_anndata(path, [f"GENE{number}" for number in range(width)], obs, blocks, cells)
    if sparse:
        with h5py.File(path, "r+") as file:
            group, kind = file.create_group("X"), {"encoding-type": "csr_matrix", "encoding-version": "0.1.0"}
            group.attrs.update(kind, shape=[cells, width])
            group["indptr"] = np.append(0, np.resize((tile > 0).sum(1), cells).cumsum())
            for name, values in {"data": tile[tile > 0], "indices": np.int32(np.nonzero(tile)[1])}.items():
                stored = group.create_dataset(name, group["indptr"][-1:], values.dtype)
                for i in range(0, len(stored), len(values)):
                    stored[i:i + len(values)] = values[:len(stored) - i]


def forget(path):
    """Asks the system to drop a file from its cache, so that the next reader goes to the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sampler_of(path):
    dataset = data.load(path)
    return data.SetSampler(dataset, data.split(dataset, DEFAULT.split).train, DEFAULT.cells, 0)


def first_batch(path):
    """Seconds until the first batch is there."""
    return seconds(lambda: sampler_of(path).draw(0, range(DEFAULT.sets)))


def data_rows(quick):
    path, packed, copy = map(Path, ("in.h5ad", "packed.h5", "copy"))
    pack = ROOT / "data.py", "pack", path, "--genept", "genept.npz", "-o", packed
    for kind in ("CSR", "dense"):
        make_file(path, CELLS // 50 if quick else CELLS, kind == "CSR")
        forget(path)
        plain = seconds(lambda: (shutil.copyfile(path, copy), forget(copy)))
        copy.unlink()
        forget(path)
        seconds_taken, peaks, cpu = watched(*pack)
        taken, peak = seconds_taken["all"], peaks["all"]
        goal, met = ("45 s of CPU", cpu < 45) if kind == "CSR" else ("3 x a copy", taken < 3 * plain)
        yield (f"pack {kind}, {path.stat().st_size / 1e9:.2f} GB -> {packed.stat().st_size / 1e9:.2f} GB",
               f"{taken:.1f} s, {cpu:.1f} s of CPU, {taken / plain:.2f} x a copy; {peak:.2f} GB",
               f"{goal}, 2 GB", None if quick else met and peak < 2)
        info = watched(ROOT / "data.py", "info", path)[0]["all"]
        yield f"info {kind}", f"{info:.2f} s", "under 2 s", info < 2
    forget(packed)
    cold, cached = (in_a_process(first_batch, packed) for _ in range(2))
    yield "first batch from the packed file", f"{cold:.2f} s, cached {cached:.2f} s", "under 2 s", cold < 2
    sampler, train = sampler_of(packed), training(DEFAULT)
    forget(packed)
    batches = data.prefetch(sampler, range(100, 108), range(64))
    working, waiting = take_turns(False, train, lambda: next(batches)).sum(1)
    yield ("share of training spent waiting for batches from disk", f"{waiting / (waiting + working):.1%}",
           "5 %", waiting < 0.05 * (waiting + working))


def run_rows(quick):
    """One command from counts to the report, killed in its last training and resumed."""
    cells, steps, tested = (CELLS // 50, 20, 50) if quick else (CELLS, 2000, 1250)
    make_file("in.h5ad", cells, sparse=True)
    parts = f"val = {NAMES[1:200]}\ntest = {NAMES[200:200 + tested]}\n"
    Path("split.toml").write_text("".join(f"[fewshot.'x.{line}']\n{parts}" for line in ("hepg2", "jurkat"))
                                  + "[training]\nx = 'train'\n")
    options = ("--data in.h5ad --genept genept.npz --split split.toml --method state-genept,ptrag --name run "
               f"--steps {steps} --checkpoint-every {steps // 4} --threads {torch.get_num_threads()}").split()
    folder = Path("runs/run")

    def part_of(line):
        if (folder / "predictions.h5ad").exists():
            return "evaluate"
        trained = re.match(f"ptrag-0 +step {steps}/", line)
        return "predict" if trained else re.match("(packing|ptrag-0|state-genept-0)?", line)[0] or "open"
    first = watched(ROOT / "ptrag.py", *options, part_of=part_of, until=folder / "checkpoint-ptrag-0.pt")
    second = watched(ROOT / "ptrag.py", "--resume", folder, part_of=part_of)
    taken, peaks = first[0] + second[0], first[1] | second[1]  # the sum, the larger
    for part in taken:
        yield f"  {part}", f"{taken[part]:.0f} s; {peaks[part]:.2f} GB", "", None
    peak = max(peaks.values())
    yield (f"ptrag.py --data, two methods, {steps:,} steps, killed and resumed",
           f"{sum(taken.values()):.0f} s; {peak:.2f} GB", "3 GB", peak < 3)
    taken, peak, _ = watched(ROOT / "ptrag.py", "--resume", folder)  # trained: it predicts and evaluates
    yield (f"predict and evaluate {2 * tested:,} conditions, both methods",
           f"{taken['all']:.0f} s; {peak['all']:.2f} GB", "6 minutes, 1 GB",
           taken["all"] < 360 and peak["all"] < 1)


# ---- Command line ------------------------------------------------------------------------------------------

PARTS = {name.removesuffix("_rows"): rows for name, rows in globals().items() if name.endswith("_rows")}


def main():
    """Measures what is asked for and prints each row as it is known."""
    parser = argparse.ArgumentParser(description="Speed and memory of every part, as ratios within one run.")
    parser.add_argument("--quick", action="store_true", help="smaller shapes and medians of three")
    parser.add_argument("--only", default=",".join([*PARTS][:-2]), help=f"all, or some of {','.join(PARTS)}")
    parser.add_argument("--device", type=torch.device, default=DEVICE, help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="processor threads")
    options = parser.parse_args()
    set_up(options.device, options.threads)
    names = [*PARTS] if options.only == "all" else options.only.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"--only {','.join(sorted(unknown))}: must be among all,{','.join(PARTS)}")
    print(f"{DEVICE}, {options.threads} threads, torch {torch.__version__}")
    line = "{:86} {:46} {:20} {}".format
    print("goals are for full shapes" * options.quick, line("row", "measured", "goal", "met"), sep="\n")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for *row, met in itertools.chain.from_iterable(PARTS[name](options.quick) for name in names):
            print(line(*row, {True: "yes", False: "NO", None: ""}[met]), flush=True)


if __name__ == "__main__":
    main()
