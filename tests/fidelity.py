"""What each difference between the published code and this implementation, and each part of the method, does.

    python tests/fidelity.py [--data FILE --genept FILE --split RULE --top-k K] [--steps N] [--seeds 0,1,2]
    python tests/fidelity.py --table parts ...        methods and ablations instead of departures

Without data, on the simulation; sizes are those of `python ptrag.py`. Progress goes to stderr, a Markdown
table to stdout. Departures without an option of ptrag.py are the few lines below. Every row is compared with
the first, condition by condition, seeds averaged, by Student's paired test.
"""
import argparse
import contextlib
import itertools
import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
import evaluate  # noqa: E402
import ptrag  # noqa: E402

METRICS = ("sw1", "energy", "pearson_delta")
HEADER = ("variant", "SW1", "energy", "r delta", "position SW1", "position energy",
          "SW1 better than in the first row")


class SelfRetrieving(ptrag.PTRAG):
    """In training, every query excludes the perturbation of the batch's first set, not itself: all others
    retrieve themselves, at rank 1. Not at test time."""

    def forward(self, control, perturbation, *others):
        own = self.candidates  # (P, K)
        if self.training:
            itself = torch.arange(len(own), device=own.device).where(own[:, 0] >= 0, -1)  # not the control
            nearest = torch.cat([itself[:, None], own], dim=1)  # (P, K + 1)
            excluded_last = (nearest == perturbation[0]).int().argsort(dim=1, stable=True)
            self.candidates = nearest.gather(1, excluded_last)[:, :-1]
        result, self.candidates = super().forward(control, perturbation, *others), own
        return result


class BatchScaledSelector(ptrag.Selector):
    """Divides logits by their standard deviation over the whole batch instead of each set's own."""

    def forward(self, *inputs):
        with patch.object(torch.Tensor, "std", lambda logits, **each_set: torch.std(logits)):
            return super().forward(*inputs)


class RepeatingSampler(data.SetSampler):
    """Draws the sets of one epoch, in which each training cell has about one place, and repeats them."""

    def draw(self, step, sets):
        cells = sum(len(self.dataset.cells(*condition)) for condition in self.conditions)
        return super().draw(step % math.ceil(cells / (self.cells * len(sets))), sets)


VANILLA, NO_DRAW, RANDOM, ALL, KEPT = ({"method": "vanilla-rag"}, {"method": "ptrag-expected"},
                                       {"candidates": "random"}, {"select": "all"}, {"keep_query": True})
C_AND_P, ZERO = (lambda model, input=input: patch.object(  # vanilla RAG without retrieval
    model.attention, "forward", lambda c_and_p, candidates: input(c_and_p))
    for input in (torch.clone, torch.zeros_like))
SAMPLE, THRESHOLD = (lambda model, how=how: patch.object(model.config, "select", how)
                     for how in ("sample", "threshold"))
STATES = [("**STATE + embeddings** (`state-genept`)", {"method": "state-genept"}),
          ("**STATE** (one-hot)", {"method": "state"})]
# label, options, (module, name, class) replaced in training, change at test time, predictions of each model
TABLES = {"departures": [
    ("**PT-RAG, as here**",),
    ("query retrieves itself in training, not at test", {}, (ptrag, "PTRAG", SelfRetrieving)),
    ("logits scaled over the batch", {}, (ptrag, "Selector", BatchScaledSelector)),
    ("sets drawn once and repeated every epoch", {}, (data, "SetSampler", RepeatingSampler)),
    ("noise at evaluation (`--select sample`)", {}, (), SAMPLE, 5),
    ("`--select threshold`", {}, (), THRESHOLD),
    ("`--freeze-generator`", {"freeze_generator": True}),
    ("`--causal --rotary`", {"causal": True, "rotary": True}),
    ("`--pool full`", {"pool": "full"}), ("`--candidates random`", RANDOM), ("`--select all`", ALL),
    ("**vanilla RAG**, retrieval at both times", VANILLA),
    ("trained with retrieval; test without, input c + p", VANILLA, (), C_AND_P),
    ("trained with retrieval; test without, input zero", VANILLA, (), ZERO),
    ("`--keep-query`, retrieval at both times", VANILLA | KEPT),
    ("`--keep-query`; test without, input c + p", VANILLA | KEPT, (), ZERO), *STATES],
"parts": [
    ("**PT-RAG**",), ("random candidates", RANDOM), ("all candidates", ALL), ("query kept", KEPT),
    ("**no draw** (`ptrag-expected`)", NO_DRAW), ("no draw, random candidates", NO_DRAW | RANDOM),
    ("no draw, query kept", NO_DRAW | KEPT), ("**vanilla RAG**", VANILLA),
    ("random candidates", VANILLA | RANDOM), ("query kept", VANILLA | KEPT), *STATES]}


def measure(models, at_test, draws, config, dataset, split, controls):
    """The evaluation's `Results` of models on every test condition, each with several draws."""
    contenders, seed = [], ptrag.seed_torch
    for (number, model), draw in itertools.product(enumerate(models), range(draws)):
        with at_test(model), patch.object(ptrag, "seed_torch", lambda *numbers: seed(*numbers, draw)):
            cells = {condition: prediction.cells for condition, _, prediction
                     in ptrag.predict_conditions(model, dataset, split.test, config)}
        contenders.append(evaluate.Contender("variant", f"{number}.{draw}", cells.__getitem__))
    not_measured = lambda x, y, p=None: x.new_full((len(x),), math.nan)  # slow, and not in this table
    with patch.object(ptrag, "wasserstein", not_measured), patch.object(evaluate, "mmd", not_measured):
        return evaluate.measure(dataset, split.test, contenders, {}, controls, config.seed)


def columns(results, label, draws=1):
    """SW1, energy, r delta, ± their deviation over seeds, and two positions."""
    values = [evaluate.average(results.values(label, metric), 1).reshape(-1, draws) for metric in METRICS]
    found = {row["metric"]: row for row in evaluate.summarise(results) if row["method"] == label}
    cells = [f"{value.mean():.3f}" + f" ± {evaluate.deviation(value.mean(1)):.3f}" * (len(value) > 1)
             for value in values]
    return cells + [f"{found[metric]['position'] + 0:.2f}" for metric in METRICS[:2]]


def compared(values, first):
    """Share of conditions where a row beats the first, and p of Student's paired test; (C,) each."""
    gain = (first - values)[~np.isnan(first - values)]
    error = max(evaluate.deviation(gain) / math.sqrt(len(gain)), 1e-300)  # a row may equal the first
    return f"{(gain > 0).mean():.0%}, p {evaluate.student_t_tail(gain.mean() / error, len(gain) - 1):.1g}"


def run(arguments):
    """Trains each distinct model once per seed and prints a row per variant, as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, kind in dict(data=str, genept=str, split=str, top_k=int, steps=int, seeds=str).items():
        parser.add_argument(ptrag.flag(name), type=kind, help="as in ptrag.py")
    parser.add_argument("--table", choices=TABLES, default="departures", help="which rows")
    parser.add_argument("--quick", action="store_true", help="one seed and 20 steps, to try it")
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    table, quick = given.pop("table"), given.pop("quick")
    own = dict(method="ptrag", group_cells=2**40, seeds="0,1,2")  # the published code knows no groups of sets
    own |= {"split": ptrag.Config.split} if "data" in given else {}
    config = ptrag.Config(**{**ptrag.DEMO, **own, **(dict(seeds="0", steps=20) if quick else {}), **given})
    ptrag.check(config)
    torch.set_num_threads(config.threads)
    dataset, split = ptrag.open_data(config)
    controls = evaluate.control_moments(dataset, {line for line, _ in split.test})
    trained, first, notes = {}, None, []
    print(f"{Path(dataset.name).name}, {config.split}: {len(split.train)} conditions train, "
          f"{len(split.test)} test; {config.steps} steps of {config.sets} sets of {config.cells} cells, "
          f"K {config.top_k}; seeds {config.seeds}, mean ± sd over them; equal counts.\n")
    print_row = lambda *cells: print(f"| {' | '.join(cells)} |", flush=True)
    print_row(*HEADER)
    print_row(*["---"] * len(HEADER))
    for label, *more in TABLES[table]:
        options, replaced, at_test, draws = [*more, *({}, (), contextlib.nullcontext, 1)[len(more):]]
        key = (*options.items(), *replaced)
        if key not in trained:
            changed = patch.object(*replaced) if replaced else contextlib.nullcontext()
            with changed, tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
                models = ptrag.train_all(replace(config, **options), Path(folder), dataset, split)
            trained[key] = [*models.values()]
        results = measure(trained[key], at_test, draws, config, dataset, split, controls)
        sw1 = evaluate.average(results.values("variant", "sw1"), 0)  # (C,)
        print_row(label, *columns(results, "variant", draws), "" if first is None else compared(sw1, first))
        first = sw1 if first is None else first
        if not more or "pool" in options:
            notes.append(f"{label}: {len(trained[key][0].pool)} genes in the retrieval pool.")
    for label in (evaluate.FLOOR, evaluate.COLLAPSE, evaluate.CEILING):
        print_row(label, *columns(results, label), "")
    print("\n" + " ".join(notes))


if __name__ == "__main__":
    sys.exit(data.status_of(run, sys.argv[1:]))
