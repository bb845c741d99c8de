"""Speed and memory, each as a ratio within one run on one machine: the table behind the README's numbers.

    python tests/benchmark.py [--quick] [--json FILE] [--only NAME,...]

Two sides of a ratio take turns, and the median of their ratios over five rounds (--quick: three, smaller shapes) is given. The other side
is the published algorithm, written out below cell by cell as it was published; seconds of the published program are those measured once
for it, divided by our ratio. The machine's own matrix product, timed in the same rounds, is the ceiling. What else runs on the machine
disturbs seconds much and ratios little. Peak memory is that of a process of its own.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import evaluate  # noqa: E402
import ptrag  # noqa: E402

GENES, POOL, EMBEDDING = 2000, 2009, 1536                                   # G, N, E of the published runs
DEFAULT = ptrag.Config(method="ptrag")
PUBLISHED = replace(DEFAULT, heads=12, head_dim=58, feed_forward=2784, causal=True, rotary=True, freeze_generator=True)
PUBLISHED_STEP = 7.1                                                        # seconds of the published program at B = S = 64
PUBLISHED_INFERENCE = {64: 761, 512: 1151}                                  # cells per second by S
PUBLISHED_PARTS = {"similarity": "219", "mask loop": "18", "gather": "291", "candidate encoding": "412/371",    # ms, forward/backward
                   "concatenation and norm": "137/140", "scorer": "120/290", "value map": "135/228", "sum": "31/48"}


# --------------------------------------------------------------------------------------------------------------- measuring

def row(name, measured, goal="", met=None):
    """One line of the table; met is None where there is nothing to meet."""
    return {"row": name, "measured": measured, "goal": goal, "met": None if met is None else bool(met)}


def seconds(side):
    """Seconds one call takes."""
    began = time.perf_counter()
    side()
    return time.perf_counter() - began


def take_turns(rounds, *sides):
    """Seconds (sides, rounds) of functions called in turn, after one call each to warm up."""
    for side in sides:
        side()
    return np.array([[seconds(side) for side in sides] for _ in range(rounds)]).T


def rounds(quick):
    """How often two sides take turns."""
    return 3 if quick else 5


def ratio(slow, fast):
    """Median over the rounds of one side's seconds against another's."""
    return float(np.median(slow / fast))


MATRIX = torch.rand(2048, 2048)


def matrix_product():
    """The machine's ceiling: 2 * 2048^3 operations."""
    return MATRIX @ MATRIX


def billions(taken):
    """Matrix products' seconds -> median billions of operations per second."""
    return 2 * len(MATRIX)**3 / float(np.median(taken)) / 1e9


def memory(kind):
    """GB that this process has resident now (VmRSS) or had at most (VmHWM); getrusage would count its parent's too."""
    return int(re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e6


def in_a_process(task, **settings):
    """What `task(**settings)` of this file returns in a process of its own."""
    asked = json.dumps({"task": task.__name__, **settings})
    out = subprocess.run([sys.executable, __file__, "--process", asked], stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


# ------------------------------------------------------------------------------------------------------ the published form

def at_once(name, part, *inputs):
    """A part of the plain form, just computed."""
    return part(*inputs)


def plain_context(model, perturbation, cell, query, noise=None, run=at_once):
    """Retrieval and selection as published: everything anew for every cell of every set.

    perturbation (B,), cell (B, S, h), query (B, h), noise (B, S, K, 2) -> context (B, S, h), ptrag.Selection. `run` computes each part;
    `PartTimes` is a `run` that also measures.
    """
    (B, S, h), K, stage = cell.shape, model.candidates.shape[1], model.selector
    pool = model.embeddings[model.pool]                                                            # (N, E)
    asked = model.embeddings[perturbation].repeat_interleave(S, 0)                                 # (B * S, E)

    def mask_loop():
        for i in range(B):
            similarity[i * S:(i + 1) * S, model.pool == perturbation[i]] = -torch.inf

    def join(cell, query, candidate):
        shape = (B, S, K, h)
        return stage.norm(torch.cat([cell[:, :, None].expand(shape), query[:, None, None].expand(shape), candidate.view(shape)], -1))

    def score(z):
        hidden = F.dropout(F.gelu(stage.score_in(z)), stage.dropout, stage.training)               # (B, S, K, h)
        return stage.score_out(hidden)                                                             # (B, S, K, 2)

    similarity = run("similarity", lambda: F.normalize(asked) @ F.normalize(pool).T)               # (B * S, N)
    run("mask loop", mask_loop)
    found = run("gather", lambda: pool[similarity.topk(K).indices])                                # (B * S, K, E)
    candidate = run("candidate encoding", model.perturbation_encoder, found)                       # (B * S, K, h)
    z = run("concatenation and norm", join, cell, query, candidate)                                # (B, S, K, 3h)
    logits = run("scorer", score, z)                                                               # (B, S, K, 2)
    logits = logits / logits.std(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
    weights, probability = stage.weigh(logits, "sample", noise)                                    # (B, S, K)
    value = run("value map", stage.value, z)                                                       # (B, S, K, h)
    context = run("sum", lambda w, v: (w[..., None] * v).sum(2), weights, value)                   # (B, S, h)
    return context, ptrag.Selection(weights, logits, probability)


class PlainPTRAG(ptrag.PTRAG):
    """PT-RAG with the published retrieval and selection, and the same generator."""

    def forward(self, control, perturbation, gem_group=None, noise=None):
        c = self.cell_encoder(control)                                                             # (B, S, h)
        p = self.perturbation_encoder(self.embeddings[perturbation])                               # (B, h)
        u, selection = plain_context(self, perturbation, c, p, noise)
        return F.relu(self.output(self.generator(u) + c)), selection


class PartTimes:
    """A `run` for `plain_context` that notes each part's forward and backward milliseconds."""

    def __init__(self):
        self.taken = {name: [] for name in PUBLISHED_PARTS}

    def __call__(self, name, part, *inputs):
        inputs = [x.detach().requires_grad_(name != "candidate encoding") for x in inputs]         # embeddings are not trained
        began = time.perf_counter()
        result = part(*inputs)
        middle = time.perf_counter()
        if result is not None and result.requires_grad:
            result.backward(torch.ones_like(result))
        self.taken[name].append((middle - began, time.perf_counter() - middle))
        return result if result is None else result.detach()

    def text(self):
        """Each part's median milliseconds, forward/backward."""
        return {name: "{:.0f}/{:.0f}".format(*np.median(taken, axis=0) * 1e3) for name, taken in self.taken.items()}


# ------------------------------------------------------------------------------------------------------------------- steps

def make_model(config, kind=ptrag.PTRAG, genes=GENES, pool=POOL):
    """A model whose pool is `pool` random embeddings: sets of a batch share few candidates, which is the hard case."""
    embeddings = torch.randn(pool + 1, EMBEDDING, generator=torch.Generator().manual_seed(0))
    embeddings[0] = 0
    torch.manual_seed(0)
    return kind(config, genes, embeddings, torch.arange(1, pool + 1))


def make_batch(config, genes=GENES, pool=POOL):
    """A batch of random log1p counts."""
    rng = np.random.default_rng(0)
    cells = lambda: np.log1p(rng.poisson(0.6, (config.sets, config.cells, genes))).astype(np.float32)
    return data.Batch(cells(), cells(), rng.integers(1, pool + 1, config.sets), np.zeros(config.sets, np.int64),
                      np.zeros((config.sets, config.cells), np.int64))


class Training(ptrag.Run):
    """ptrag.train on one batch, a step a call; the run it takes keeps the optimiser from call to call and writes nothing."""

    def __init__(self, model, config, batch):
        self.model, self.config, self.batch, self.state = model, replace(config, steps=1), batch, None
        self.device, self.rank, self.ranks = torch.device("cpu"), 0, 1
        self.network = super().wrap(model)

    def __call__(self):
        ptrag.train(self.model, lambda done: iter([self.batch]), [], self.config, self)

    def wrap(self, model):
        return self.network

    def restore(self, model, optimizer):
        optimizer.state = self.state if self.state else optimizer.state
        self.state = optimizer.state
        return ptrag.Progress()

    def record(self, step, loss, *others):
        loss.item()

    def save(self, *everything):
        pass


def step_memory(sets, cells, top_k, genes, pool, alternate):
    """Peak GB over the loaded batch of training steps; with `alternate`, also their seconds against those of the default step."""
    config = replace(DEFAULT, sets=sets, cells=cells, top_k=top_k)
    batch, before = make_batch(config, genes, pool), memory("VmRSS")
    began = time.perf_counter()
    model = make_model(config, genes=genes, pool=pool)
    table = time.perf_counter() - began
    train = Training(model, config, batch)
    for _ in range(3):
        train()
    peak, result = memory("VmHWM") - before, {}
    if alternate:
        default = Training(make_model(DEFAULT), DEFAULT, make_batch(DEFAULT))
        taken = take_turns(3, train, default)
        result = {"seconds": float(np.median(taken[0])), "ratio": ratio(taken[0], taken[1])}
    return {"memory": peak, "table": table, **result}


# -------------------------------------------------------------------------------------------------------------------- rows

def selection_rows(quick):
    """Stages 1 and 2, forward and backward, against the plain form; the plain form's parts; how far the two differ."""
    config = replace(DEFAULT, sets=16 if quick else 64)
    model = make_model(config).train()
    perturbation = torch.from_numpy(make_batch(config, genes=2).perturbation)
    cell = torch.randn(config.sets, config.cells, config.hidden, requires_grad=True)
    upstream = torch.randn(config.sets, config.cells, config.hidden)
    noise = ptrag.gumbel_noise((config.sets, config.cells, config.top_k, 2))

    def ours():
        query = model.perturbation_encoder(model.embeddings[perturbation])
        candidate, retrieved = model.encode_candidates(perturbation, model.perturbation_encoder)
        return finish(cell, *model.selector(cell, query, candidate, retrieved, noise=noise))

    def plain(cell=cell, noise=noise):
        query = model.perturbation_encoder(model.embeddings[perturbation])
        return finish(cell, *plain_context(model, perturbation, cell, query, noise))

    def finish(cell, context, selection):
        model.zero_grad()
        cell.grad = None
        ((context * upstream).sum() + selection.weights.mean()).backward()
        gradients = [weight.grad.clone() for weight in (cell, *model.parameters()) if weight.grad is not None]
        return selection.weights.detach(), [context.detach(), selection.logits.detach(), *gradients]

    model.selector.dropout = 0.0                                                                   # the same numbers need the same noise
    weights, values = ours()
    model.double()                                                                                 # float32 blurs the plain form more
    exact_weights, exact_values = plain(cell.detach().double().requires_grad_(), noise.double())
    model.float()
    flips = int((weights != exact_weights.float()).sum())
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(values, exact_values))
    model.selector.dropout = config.dropout
    part_times = PartTimes()
    query = model.perturbation_encoder(model.embeddings[perturbation]).detach()
    parts = lambda: plain_context(model, perturbation, cell, query, noise, part_times)
    slow, fast, ceiling, _ = take_turns(rounds(quick), plain, ours, matrix_product, parts)
    faster, shapes = ratio(slow, fast), f"B {config.sets}, S 64, K 32, E {EMBEDDING}, N {POOL}"
    rows = [row(f"retrieval + selection, forward + backward ({shapes})",
                f"{faster:.1f} x: {np.median(slow):.3f} s plain, {np.median(fast):.3f} s here", "at least 20 x", faster >= 20),
            row("  the same numbers: values and gradients against the plain form in double", f"{error:.1e}, {flips} decisions differ",
                "1e-5", error <= 1e-5 and flips == 0),
            row("  machine's matrix product, 2048^3", f"{billions(ceiling):.0f} GFLOP/s")]
    return rows + [row(f"  plain form, {name}", f"{text} ms", f"published, at B 64: {PUBLISHED_PARTS[name]} ms")
                   for name, text in part_times.text().items()]


def operations(train, config):
    """Multiplications and additions of the matrix products of one step; attention's, which the counter misses, from its shapes."""
    with FlopCounterMode(display=False) as counter:
        train()
    counted = sum(count for name, count in counter.get_flop_counts()["Global"].items() if "scaled_dot_product" not in str(name))
    attention = 2 * config.sets * config.layers * config.heads * config.cells**2 * config.head_dim
    return counted + 6 * attention                                                                 # two products forward, four backward


def rate_row(name, operations, taken, ceiling, goal=""):
    """A step's billions of operations per second as a share of the machine's matrix product."""
    share = operations / (2 * len(MATRIX)**3) * ratio(ceiling, taken)
    return row(name, f"{100 * share:.0f} % of the machine's {billions(ceiling):.0f} GFLOP/s ({operations / 1e9:.0f} GFLOP a step)", goal,
               share >= 0.5 if goal else None)


def two_steps(sets, turns):
    """Seconds (3, turns) of the default step, of the same without retrieval and of the matrix product; the default step's operations."""
    config = replace(DEFAULT, sets=sets)
    batch, genept = make_batch(config), replace(config, method="state-genept")
    ours, without = Training(make_model(config), config, batch), Training(make_model(genept), genept, batch)
    return {"taken": take_turns(turns, ours, without, matrix_product).tolist(), "operations": operations(ours, config)}


def step_rows(quick):
    """The default step: against the same generator without retrieval, and its rate against the machine's; in a process of its own."""
    config = replace(DEFAULT, sets=16 if quick else 64)
    found = in_a_process(two_steps, sets=config.sets, turns=3 if quick else 15)                    # more: the ratio is near its goal
    taken, plain, ceiling = np.array(found["taken"])
    slower = ratio(taken, plain)
    return [row(f"step, ptrag against state-genept, default generator (B {config.sets})",
                f"{slower:.2f} x: {np.median(taken):.3f} s against {np.median(plain):.3f} s", "at most 1.15 x", slower <= 1.15),
            rate_row("  rate of the default step's matrix products", found["operations"], taken, ceiling, "at least 50 %")]


def published_rows(quick):
    """Steps with the published generator and with ours, through the ratio to the plain form's step with the published generator."""
    small = dict(sets=8) if quick else {}
    published, default = replace(PUBLISHED, **small), replace(DEFAULT, **small)
    batch = make_batch(published)
    sides = [Training(make_model(published, PlainPTRAG), published, batch), Training(make_model(published), published, batch),
             Training(make_model(default), default, batch)]
    plain, ours, own, ceiling = take_turns(rounds(quick), *sides, matrix_product)
    faster, much_faster = ratio(plain, ours), ratio(plain, own)
    return [row(f"step with the published generator against the plain form's (B {published.sets})",
                f"{faster:.2f} x: {np.median(plain):.2f} s, {np.median(ours):.2f} s; {PUBLISHED_STEP} s -> {PUBLISHED_STEP / faster:.1f} s",
                "at least 1.5 x", faster >= 1.5),
            rate_row("  rate of its matrix products", operations(sides[1], published), ours, ceiling),
            row(f"step with the default generator against the same (B {published.sets})",
                f"{much_faster:.1f} x: {np.median(own):.2f} s; {PUBLISHED_STEP} s -> {PUBLISHED_STEP / much_faster:.2f} s",
                "at least 6 x", much_faster >= 6)]


def memory_rows(quick):
    """Peak memory of the default step, at full size in either mode."""
    peak = in_a_process(step_memory, sets=64, cells=64, top_k=32, genes=GENES, pool=POOL, alternate=False)["memory"]
    return [row("peak memory of the default step over the loaded batch", f"{peak:.2f} GB", "under 2 GB", peak < 2)]


def metric_rows(quick):
    """All metrics of one condition, 100 real and 100 predicted cells."""
    rng = np.random.default_rng(0)
    level = rng.gamma(0.5, 1.0, GENES)
    cells = lambda n, change=1.0: np.log1p(rng.poisson(level * change, (n, GENES))).astype(np.float32)
    control, real, predicted = cells(500), cells(100, rng.lognormal(0, 0.3, GENES)), cells(100, rng.lognormal(0, 0.3, GENES))
    profiles = np.stack([cells(20).mean(0) for _ in range(500)])
    line = evaluate.Line(evaluate.moments([control]), *evaluate.fit_pca([control, real]), profiles, profiles)
    excluded = np.arange(GENES) == 0
    measure = lambda: evaluate.condition_rows(real, [line.population(predicted)], line, profiles, 0, excluded)
    taken = take_turns(rounds(quick), measure, matrix_product)
    median = float(np.median(taken[0]))
    return [row(f"one condition's whole metric row, 100 + 100 cells x {GENES} genes, 500 conditions ranked",
                f"{median:.3f} s (machine {billions(taken[1]):.0f} GFLOP/s)", "under 0.1 s", median < 0.1)]


def inference_rows(quick):
    """Predicted cells per second against the plain form with the published generator, and with ours."""
    rows = []
    for cells, published_rate in PUBLISHED_INFERENCE.items():
        config = replace(PUBLISHED, cells=cells)
        n = 512 if quick else 4096
        control = make_batch(replace(config, sets=n // cells)).control.reshape(n, GENES)
        models = [make_model(config, PlainPTRAG), make_model(config), make_model(DEFAULT)]
        query = np.arange(1, 1 + n // cells)
        sides = [lambda model=model: ptrag.predict(model, control, query, set_size=cells) for model in models]
        plain, ours, own = take_turns(rounds(quick), *sides)
        rows.append(row(f"inference, S {cells}, {n:,} cells: published generator; ours",
                        f"{ratio(plain, ours):.2f} x ({published_rate * ratio(plain, ours):,.0f} cells/s); {ratio(plain, own):.1f} x "
                        f"({published_rate * ratio(plain, own):,.0f} cells/s)", f"above {published_rate:,} cells/s",
                        ratio(plain, ours) > 1))
    return rows


def broadcast_energy(x, y):
    """The energy distance as written: every difference of two cells, (B, S, S, G)."""
    distance = lambda a, b: ((a[:, :, None] - b[:, None]).square().sum(-1) + 1e-12).sqrt().mean((1, 2))
    return distance(x, y) - distance(x, x) / 2 - distance(y, y) / 2


def energy_memory(form, sets):
    """Peak GB over its input of one energy distance, forward and backward."""
    x, y = torch.rand(sets, 64, GENES, requires_grad=True), torch.rand(sets, 64, GENES)
    before = memory("VmRSS")
    {"here": ptrag.energy_distance, "plain": broadcast_energy}[form](x, y).sum().backward()
    return memory("VmHWM") - before


def energy_rows(quick):
    """The loss against the form with a (B, S, S, G) tensor, where that fits."""
    sets = 2 if quick else 8
    x, y = torch.rand(sets, 64, GENES, requires_grad=True), torch.rand(sets, 64, GENES)
    forms = [lambda form=form: form(x, y).sum().backward() for form in (broadcast_energy, ptrag.energy_distance)]
    slow, fast = take_turns(rounds(quick), *forms)
    much, little = (in_a_process(energy_memory, form=form, sets=sets) for form in ("plain", "here"))
    with torch.no_grad():
        error = float((broadcast_energy(x, y) / ptrag.energy_distance(x, y) - 1).abs().max())
    return [row(f"energy distance, forward + backward, against the (B, S, S, G) form (B {sets})",
                f"{ratio(slow, fast):.0f} x faster; {little:.2f} GB against {much:.2f} GB; values within {error:.0e}",
                "a quarter of the memory", little < much / 4)]


def option_rows(quick):
    """--compile and --bf16: the step against the plain one, and how far the predictions are from it."""
    config, rows = replace(DEFAULT, sets=8 if quick else 64), []
    batch, model = make_batch(config), make_model(DEFAULT)
    plain = Training(model, config, batch)
    control, perturbation = torch.from_numpy(batch.control[:4]), torch.from_numpy(batch.perturbation[:4])
    for name, tolerance in (("bf16", 2e-2), ("compile", 1e-4)):
        if quick and name == "compile":
            continue                                                                               # compiling takes minutes
        option = Training(model, replace(config, **{name: True}), batch)
        try:
            usual, special = take_turns(rounds(quick), plain, option)
        except Exception as failure:                                                               # no compiler here: said, not hidden
            rows.append(row(f"step with --{name}", f"fails: {str(failure).strip().splitlines()[0][:60]}", "works", False))
            continue
        with torch.no_grad():
            exact = model.eval()(control, perturbation)[0]
            with option.precision():
                other = option.network(control, perturbation)[0].float()
        error = float((other - exact).abs().max() / exact.abs().max())
        rows.append(row(f"step with --{name} (B {config.sets})", f"{ratio(usual, special):.2f} x faster; predictions within {error:.0e}",
                        f"within {tolerance:.0e}", error <= tolerance))
    return rows


def growth_rows(quick):
    """Time and peak memory of the default step as one size grows; in a process each, alternating with the default step."""
    if quick:
        return []
    rows, usual = [], dict(sets=64, cells=64, top_k=32, genes=GENES, pool=POOL)
    for letter, name, sizes in (("K", "top_k", (8, 32, 128)), ("S", "cells", (32, 128, 512)), ("G", "genes", (500, 2000, 8000)),
                                ("N", "pool", (1000, 5000, 20000))):
        for size in sizes:
            found = in_a_process(step_memory, **{**usual, name: size}, alternate=True)
            rows.append(row(f"step at {letter} {size:,}", f"{found['ratio']:.2f} x the default step, {found['seconds']:.2f} s, "
                            f"{found['memory']:.2f} GB; model and retrieval table {found['table']:.1f} s"))
    return rows


# -------------------------------------------------------------------------------------- data, at the full Replogle-Nadig shape

CELLS, ALL_GENES, LINES, PERTURBATIONS, DENSITY = 643_413, 6_546, 4, 2_000, 0.12


def write_labels(file, cells, genes, rng):
    """obs and var of a file whose cells stand in random order."""
    names = ["non-targeting"] + [f"GENE{number}" for number in range(PERTURBATIONS)]
    codes = np.where(rng.random(cells) < 0.06, 0, rng.integers(1, len(names), cells))
    columns = {"gene": (codes.astype(np.int32), names),
               "cell_line": (rng.integers(0, LINES, cells).astype(np.int8), ["hepg2", "jurkat", "k562", "rpe1"]),
               "gem_group": (rng.integers(1, 57, cells), None)}
    data.write_frame(file, "obs", [f"cell{number}" for number in range(cells)], columns)
    data.write_frame(file, "var", [f"GENE{number}" for number in range(genes)], {})


def make_dense(path, cells):
    """Log-normalised, dense, uncompressed obsm/X_hvg, as in the published file."""
    rng = np.random.default_rng(0)
    tile = np.log1p(rng.poisson(0.6, (4096, GENES))).astype(np.float32)
    with h5py.File(path, "w") as file:
        write_labels(file, cells, GENES, rng)
        matrix = file.create_dataset("obsm/X_hvg", (cells, GENES), np.float32)
        for begin in range(0, cells, len(tile)):
            matrix[begin:begin + len(tile)] = tile[:cells - begin] + np.float32(begin % 7 * 1e-3) * (tile[:cells - begin] > 0)


def make_csr(path, cells):
    """Counts of all genes in CSR, uncompressed."""
    rng = np.random.default_rng(0)
    share = rng.gamma(0.4, 1.0, ALL_GENES)
    present = rng.random((4096, ALL_GENES)) < np.clip(share / share.mean() * DENSITY, 0.0, 0.95)
    indices = np.nonzero(present)[1].astype(np.int32)
    values = (1 + rng.poisson(1.0, len(indices))).astype(np.float32)
    pointers = np.concatenate([[0], np.cumsum(present.sum(1))])
    tiles, rest = divmod(cells, len(present))
    total = tiles * len(indices) + int(pointers[rest])
    with h5py.File(path, "w") as file:
        write_labels(file, cells, ALL_GENES, rng)
        group = data.encode(file.create_group("X"), "csr_matrix", "0.1.0")
        group.attrs["shape"] = np.array([cells, ALL_GENES])
        group.create_dataset("data", (total,), np.float32)
        group.create_dataset("indices", (total,), np.int32)
        starts = np.arange(tiles + 1) * len(indices)
        group["indptr"] = np.concatenate([(starts[:, None] + pointers[:-1]).ravel()[:cells], [total]])
        for begin in starts:
            group["data"][begin:begin + len(values)] = values[:total - begin]
            group["indices"][begin:begin + len(indices)] = indices[:total - begin]


def forget(path):
    """Asks the system to drop a file from its cache, so that the next reader goes to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def plain_copy(path, target):
    """Copies a file, down to the disk."""
    shutil.copyfile(path, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())


COMMAND = """import re, sys
sys.path.insert(0, sys.argv.pop(1))
import data
assert data.main(sys.argv[1:]) == 0
"""
FIRST_BATCH = """import re, sys
sys.path.insert(0, sys.argv[1])
import data
dataset = data.load(sys.argv[2])
data.SetSampler(dataset, data.split(dataset, "perturbation:0").train, 64, 0).draw(0, range(64))
"""
PEAK = 'print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])'


def measured_run(script, *arguments):
    """Seconds and peak memory in GB of a Python process, its start included; torch is not part of it."""
    began = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", script + PEAK, str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return time.perf_counter() - began, int(result.stdout.splitlines()[-1]) / 1e6


def pack_rows(kind, path, packed, genept):
    """Packing one file, against a plain copy of it, and looking into it."""
    size = os.path.getsize(path)
    forget(path)
    plain = seconds(lambda: plain_copy(path, packed))
    os.remove(packed)
    forget(path)
    taken, peak = measured_run(COMMAND, "pack", path, "--genept", genept, "-o", packed)
    forget(path)
    info, info_peak = measured_run(COMMAND, "info", path)
    full = size > 1e9                                                                              # start-up is all that a small file shows
    return [row(f"pack {kind} ({size / 1e9:.2f} GB)", f"{taken:.1f} s, {taken / plain:.2f} x the copy's {plain:.1f} s",
                "at most 3 x a plain copy", taken <= 3 * plain if full else None),
            row(f"pack {kind}, peak memory", f"{peak:.2f} GB", "under 2 GB", peak < 2),
            row(f"pack {kind}, bytes on disk", f"{os.path.getsize(packed) / 1e9:.2f} GB"),
            row(f"info {kind}", f"{info:.2f} s, {info_peak:.2f} GB", "under 2 s", info < 2)]


def drawing_rows(packed, train, steps=6):
    """Opening the packed file, drawing from it, and waiting for the next batch while `train` works."""
    forget(packed)
    cold, peak = measured_run(FIRST_BATCH, packed)
    warm, _ = measured_run(FIRST_BATCH, packed)
    info, _ = measured_run(COMMAND, "info", packed)
    dataset = data.load(packed)
    sampler = data.SetSampler(dataset, data.split(dataset, "perturbation:0").train, 64, 0)
    forget(packed)
    draw, cached = (np.mean([seconds(lambda: sampler.draw(step, range(64))) for step in range(steps)]) for _ in range(2))
    train()
    batches = data.prefetch(sampler, range(100, 100 + steps), range(64))
    next(batches)                                                                                  # the first batch is a row above
    working = waiting = 0.0
    for _ in range(steps - 1):
        working += seconds(train)
        waiting += seconds(lambda: next(batches))
    step = working / (steps - 1)
    share = waiting / (waiting + working)
    return [row("start Python, open the packed file, split, draw the first batch (64 x 64)",
                f"{cold:.2f} s from disk, {warm:.2f} s cached; {peak:.2f} GB", "under 2 s", cold < 2),
            row("info packed", f"{info:.2f} s", "under 2 s", info < 2),
            row("draw one batch", f"{draw:.3f} s from disk, {cached:.3f} s cached; {draw / step:.2f} of a step of {step:.2f} s",
                "under 0.25 of a step", draw < step / 4),
            row("share of a training step spent waiting for data", f"{100 * share:.1f} %", "under 25 %", share < 0.25)]


def whole_test_set(packed, conditions):
    """Seconds to predict and to evaluate many test conditions of a packed file with an untrained default model; their cells; peak GB.

    Memory is what the process allocated (RssAnon): pages of the mapped file are the system's to take back.
    """
    config, peak, watching = replace(DEFAULT, data=packed), [0.0], threading.Event()

    def watch():
        while not watching.wait(0.05):
            peak.append(memory("RssAnon"))

    dataset = data.load(packed)
    split = data.split(dataset, config.split)
    split.test = split.test[::max(1, len(split.test) // conditions)][:conditions]
    models = {("ptrag", 0): ptrag.build_model(config, dataset, split)}
    before, watcher = memory("RssAnon"), threading.Thread(target=watch)
    watcher.start()
    with tempfile.TemporaryDirectory() as folder:
        ptrag.write_file(Path(folder, "config.json"), json.dumps(asdict(config)).encode())
        predicting = seconds(lambda: ptrag.write_predictions(Path(folder), models, dataset, split, config))
        evaluating = seconds(lambda: evaluate.evaluate_runs([folder], dataset, split, say=lambda text: None))
        stored = os.path.getsize(Path(folder, "predictions.h5ad")) / 1e9
    watching.set()
    watcher.join()
    cells = sum(min(config.max_cells, len(dataset.cells(*condition))) for condition in split.test)
    return {"conditions": len(split.test), "cells": cells, "predicting": predicting, "evaluating": evaluating,
            "memory": max(peak) - before, "stored": stored}


def test_set_row(packed, conditions):
    """The whole test set, a condition at a time."""
    found = in_a_process(whole_test_set, packed=packed, conditions=conditions)
    return row(f"predict and evaluate {found['conditions']:,} test conditions, {found['cells']:,} cells x {GENES}",
               f"{found['predicting']:.0f} s + {found['evaluating']:.0f} s, {found['memory']:.2f} GB; "
               f"the predictions are {found['stored']:.1f} GB",
               "under 2 GB", found["memory"] < 2)


def data_rows(quick):
    """Packing, looking into and drawing from files of the full shape (--quick: a fiftieth of the cells), made here; the test set."""
    cells = CELLS // 50 if quick else CELLS
    with tempfile.TemporaryDirectory() as folder:
        path, packed, genept = (os.path.join(folder, name) for name in ("input.h5ad", "packed.h5", "embeddings.npz"))
        names = np.array([f"GENE{number}" for number in range(PERTURBATIONS)])
        np.savez(genept, genes=names, embeddings=np.random.default_rng(0).normal(size=(len(names), EMBEDDING)).astype(np.float32))
        make_csr(path, cells)
        rows = pack_rows(f"CSR {cells:,} x {ALL_GENES:,}", path, packed, genept)
        make_dense(path, cells)
        rows += pack_rows(f"dense {cells:,} x {GENES:,}", path, packed, genept)
        rows += drawing_rows(packed, Training(make_model(DEFAULT), DEFAULT, make_batch(DEFAULT)))
        return rows if quick else rows + [test_set_row(packed, 2500)]


# ------------------------------------------------------------------------------------------------------------ command line

PARTS = {"selection": selection_rows, "step": step_rows, "published": published_rows, "memory": memory_rows, "metrics": metric_rows,
         "inference": inference_rows, "energy": energy_rows, "options": option_rows, "growth": growth_rows, "data": data_rows}
MARKS = {True: "yes", False: "NO", None: ""}


def main(arguments=None):
    """Measures what is asked for, prints each row as it is known, and writes all of them as JSON where asked."""
    parser = argparse.ArgumentParser(description="Speed and memory of every part, as ratios within one run.")
    parser.add_argument("--quick", action="store_true", help="smaller shapes and medians of three, under a minute")
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--process", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.process:
        asked = json.loads(options.process)
        task = {task.__name__: task for task in (two_steps, step_memory, energy_memory, whole_test_set)}[asked.pop("task")]
        print(json.dumps(task(**asked)))
        return 0
    if unknown := set(options.only.split(",")) - set(PARTS):
        parser.error(f"--only {','.join(sorted(unknown))}: must be among {', '.join(PARTS)}")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'row':84} {'measured':72} {'goal':24} met")
    rows = []
    for name in options.only.split(","):
        for found in PARTS[name](options.quick):
            rows.append(found)
            print(f"{found['row']:84} {found['measured']:72} {found['goal']:24} {MARKS[found['met']]}", flush=True)
    if options.json:
        ptrag.write_file(options.json, (json.dumps(rows, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
