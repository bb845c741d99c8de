"""What each difference between the published code and this implementation costs or gains, measured: one Markdown table.

`python tests/fidelity.py [--data FILE --genept FILE --split RULE --top-k K] [--steps N] [--seeds 0,1,2] [--quick]`; without data, the
simulation. Departures that ptrag.py has an option for use it; the others are the few lines below, so that ptrag.py stays the method.
Sizes are those of `python ptrag.py` without data. Progress goes to stderr, the table to stdout.
"""
import argparse
import contextlib
import math
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Callable, NamedTuple
from unittest.mock import patch

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data      # noqa: E402
import evaluate  # noqa: E402
import ptrag     # noqa: E402

DRAWS = 5        # of a sampled selection, to see how much two evaluations of one model differ
METRICS = ("sw1", "energy", "pearson_delta")


# ----------------------------------------------------------------------------- what the published code does in training

class SelfRetrieving(ptrag.PTRAG):
    """In training, every query of a batch excludes the perturbation of the batch's first set instead of itself; not at test time.

    So all queries but the first set's that are in the pool retrieve themselves, at rank 1. Validation excludes as the test does.
    """

    def __init__(self, config, genes, embeddings, pool, gem_groups=1):
        """Arguments as for `ptrag.PTRAG`; the pool needs one gene more."""
        super().__init__(config, genes, embeddings, pool, gem_groups)
        twice = torch.cat([embeddings, embeddings])                     # a copy is not in the pool, so its search finds the original
        nearest = ptrag.retrieve(twice, pool, config.top_k + 1)[0][len(embeddings):]                                        # (P, K + 1)
        self.register_buffer("nearest", nearest, persistent=False)

    def encode_candidates(self, perturbation, encoder):
        """Queries (B,) -> encoded candidates (B, K, h), and which queries have any (B,)."""
        if not self.training:
            return super().encode_candidates(perturbation, encoder)
        nearest = self.nearest[perturbation]                                                                                # (B, K + 1)
        excluded_last = (nearest == perturbation[0]).int().argsort(dim=1, stable=True)
        candidates = nearest.gather(1, excluded_last)[:, :-1]                                                               # (B, K)
        return encoder(self.embeddings[candidates.clamp(min=0)]), candidates[:, 0] >= 0


class BatchScaledSelector(ptrag.Selector):
    """Divides logits by their standard deviation over the whole batch instead of each set's own."""

    def score(self, *parts):
        """Logits (B, S, K, 2) before any scaling, kept for `weigh`."""
        self.unscaled = super().score(*parts)
        return self.unscaled

    def weigh(self, logits, select, noise=None):
        """Logits scaled per set (B, S, K, 2), which are ignored -> weights and probability (B, S, K)."""
        return super().weigh(self.unscaled / self.unscaled.std().clamp(min=1e-6), select, noise)


class RepeatingSampler(data.SetSampler):
    """Draws the sets of one epoch, in which each training cell has about one place, and repeats them in every later epoch."""

    def draw(self, step, sets):
        """The batch of a step (B sets), the same in every epoch."""
        cells = sum(len(self.dataset.cells(*condition)) for condition in self.conditions)
        return super().draw(step % math.ceil(cells / (self.cells * len(sets))), sets)


# --------------------------------------------------------------------------------- what the published code does at test

def with_selection(how):
    """A test-time change: `--select` as given."""
    return lambda model: patch.object(model, "select", how)


def without_retrieval(model):
    """No retrieval: the generator's input is c + p."""
    return patch.object(model.attention, "forward", lambda cell_and_query, candidate, retrieved: cell_and_query)


def with_zero_context(model):
    """No retrieval: the context is zero, and the generator's input too, unless the query was kept (then it is c + p)."""
    return patch.object(model.attention, "forward", lambda cell_and_query, candidate, retrieved: torch.zeros_like(cell_and_query))


# --------------------------------------------------------------------------------------------------------------- variants

class Variant(NamedTuple):
    """One row: options of ptrag.py, a class replaced while the model is made and trained, and a change at test time only."""
    label: str
    options: dict = {}
    replaced: tuple = ()                        # (module, name in it, class)
    at_test: Callable = contextlib.nullcontext  # model -> context manager within which it predicts
    draws: int = 1                              # how often each model predicts


VARIANTS = [
    Variant("**PT-RAG, as here**"),
    Variant("query retrieves itself in training, not at test", replaced=(ptrag, "PTRAG", SelfRetrieving)),
    Variant("logits scaled over the batch", replaced=(ptrag, "Selector", BatchScaledSelector)),
    Variant("sets drawn once and repeated every epoch", replaced=(data, "SetSampler", RepeatingSampler)),
    Variant("noise at evaluation (`--select sample`)", at_test=with_selection("sample"), draws=DRAWS),
    Variant("`--select threshold`", at_test=with_selection("threshold")),
    Variant("`--freeze-generator`", {"freeze_generator": True}),
    Variant("`--causal --rotary`", {"causal": True, "rotary": True}),
    Variant("`--pool full`", {"pool": "full"}),
    Variant("`--candidates random`", {"candidates": "random"}),
    Variant("`--selection all`", {"selection": "all"}),
    Variant("**vanilla RAG**, retrieval at both times", {"method": "vanilla-rag"}),
    Variant("trained with retrieval; test without, input c + p", {"method": "vanilla-rag"}, at_test=without_retrieval),
    Variant("trained with retrieval; test without, input zero", {"method": "vanilla-rag"}, at_test=with_zero_context),
    Variant("`--keep-query`, retrieval at both times", {"method": "vanilla-rag", "keep_query": True}),
    Variant("`--keep-query`; test without, input c + p", {"method": "vanilla-rag", "keep_query": True}, at_test=with_zero_context),
    Variant("**STATE + embeddings** (`state-genept`)", {"method": "state-genept"}),
    Variant("**STATE** (one-hot)", {"method": "state"}),
]


def train_models(variant, config, dataset, split):
    """The variant's trained models, a seed each: {seed: model}."""
    changed = patch.object(*variant.replaced) if variant.replaced else contextlib.nullcontext()
    with changed, tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        models = ptrag.train_all(replace(config, **variant.options), Path(folder), dataset, split)
    return {seed: model for (_, seed), model in models.items()}


def predict_all(model, dataset, split, config, draw):
    """Predicted cells of every test condition, condition -> (n, G), and of the generator's input (deviation in a set, size).

    deviation: standard deviation over the cells of a set, mean over sets and hidden units; size: root mean square of the input.
    """
    spread, square = [], []

    def watch(generator, inputs):
        spread.append(inputs[0].std(dim=1).mean(1))                                                                         # (B,)
        square.append(inputs[0].square().mean((1, 2)))                                                                      # (B,)

    hook = model.generator.register_forward_pre_hook(watch)
    cells = {condition: prediction.cells for condition, _, prediction in ptrag.predict_conditions(model, dataset, split.test, config, draw)}
    hook.remove()
    return cells, (float(torch.cat(spread).mean()), math.sqrt(torch.cat(square).mean()))


def measure_variant(variant, models, config, dataset, split, controls):
    """A variant's models on every test condition: the evaluation's `Results`, and the generator's input (deviation in a set, size)."""
    contenders, inputs = [], []
    for seed, model in models.items():
        for draw in range(variant.draws):
            with variant.at_test(model):
                cells, spread = predict_all(model, dataset, split, config, draw)
            inputs.append(spread)
            contenders.append(evaluate.Contender("variant", f"{seed}.{draw}", cells.__getitem__))
    not_measured = lambda x, y, p=None: x.new_full((len(x),), math.nan)  # joint distances and MMD: slow, and not in this table
    with patch.object(ptrag, "wasserstein", not_measured), patch.object(evaluate, "mmd", not_measured):
        results = evaluate.measure(dataset, split.test, contenders, {}, controls, config.seed, config.max_cells)
    return results, np.mean(inputs, axis=0)


# ------------------------------------------------------------------------------------------------------------------ table

HEADER = ["variant", "SW1", "energy", "r delta", "position SW1", "position energy", "input: sd in a set / rms"]


def print_row(cells):
    """Prints a row of the Markdown table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def with_spread(values):
    """Mean ± standard deviation over seeds."""
    return f"{values.mean():.3f} ± {evaluate.deviation(values):.3f}" if len(values) > 1 else f"{values.mean():.3f}"


def variant_row(variant, results, inputs):
    """The cells of a variant's row, and a line on the difference between draws (None for one draw)."""
    summary = {(row["method"], row["metric"]): row for row in evaluate.summarise(results)}
    by_draw = {metric: evaluate.average(results.values("equal", "variant", metric), 1).reshape(-1, variant.draws) for metric in METRICS}
    cells = [variant.label, *(with_spread(by_draw[metric].mean(1)) for metric in METRICS),
             *(f"{summary['variant', metric]['position']:.2f}" for metric in METRICS[:2]), " / ".join(f"{value:.2g}" for value in inputs)]
    if variant.draws == 1:
        return cells, None
    between = ", ".join(f"{evaluate.METRICS[metric][0]} {np.std(by_draw[metric], axis=1, ddof=1).mean():.4f}" for metric in METRICS)
    return cells, f"Standard deviation over {variant.draws} draws of one model, with noise at evaluation: {between}."


def anchor_rows(results):
    """The rows of the anchors, measured on the same half of the real cells as every variant."""
    summary = {(row["method"], row["metric"]): row for row in evaluate.summarise(results)}
    for label in (evaluate.FLOOR, evaluate.COLLAPSE, evaluate.CEILING):
        rows = [summary[label, metric] for metric in METRICS]
        yield [label, *(f"{row['mean_equal']:.3f}" for row in rows), *(f"{row['position'] + 0:.2f}" for row in rows[:2]), ""]


def configuration(arguments):
    """Command line -> Config: the sizes of `ptrag.DEMO` with what is given."""
    parser = argparse.ArgumentParser(description="What each difference between the published code and this implementation changes.")
    parser.add_argument("--data", help="AnnData or packed file (default: simulation)")
    parser.add_argument("--genept", help="gene embeddings of --data")
    parser.add_argument("--split", help=f"as in ptrag.py (default {ptrag.DEMO['split']}, with --data {ptrag.Config.split})")
    parser.add_argument("--top-k", type=int, help=f"candidates (default {ptrag.DEMO['top_k']})")
    parser.add_argument("--steps", type=int, help=f"training steps of each model (default {ptrag.DEMO['steps']})")
    parser.add_argument("--seeds", help="training seeds (default 0,1,2)")
    parser.add_argument("--quick", action="store_true", help="one seed and 20 steps: only to see that everything runs")
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    quick = {"steps": 20, "seeds": "0"} if given.pop("quick") else {"seeds": "0,1,2"}
    by_data = {"split": ptrag.Config.split} if "data" in given else {}
    config = ptrag.Config(**{**ptrag.DEMO, **by_data, "method": "ptrag", **quick, **given})
    ptrag.check(config)
    return config


def compare(config):
    """Trains each distinct model once per seed and prints a row per variant, as it is measured."""
    dataset, split = ptrag.open_data(config)
    controls = evaluate.control_moments(dataset, sorted({line for line, _ in split.test}))
    print(f"{Path(dataset.name).name}, {config.split}: {len(split.train)} conditions train, {len(split.test)} test; {config.steps} steps "
          f"of {config.sets} sets of {config.cells} cells, K {config.top_k}; seeds {config.seeds}, mean ± sd over them; equal counts.\n")
    print_row(HEADER)
    print_row(["---"] * len(HEADER))
    trained, notes = {}, []
    for variant in VARIANTS:
        key = (*variant.options.items(), *variant.replaced)
        if key not in trained:
            trained[key] = train_models(variant, config, dataset, split)
        results, inputs = measure_variant(variant, trained[key], config, dataset, split, controls)
        row, note = variant_row(variant, results, inputs)
        print_row(row)
        notes += [note] if note else []
    for row in anchor_rows(results):
        print_row(row)
    used, full = (len(models[min(models)].pool) for models in (trained[()], trained[("pool", "full"),]))
    print("\n" + " ".join([*notes, f"Genes in the retrieval pool: {used}; with `--pool full` {full}."]))


def main(arguments=None):
    """The command line: 0 done, 2 something given cannot be used, 130 stopped."""
    started = time.monotonic()
    try:
        compare(configuration(arguments))
    except (ptrag.InputError, data.DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ptrag.Stopped, KeyboardInterrupt):
        return 130
    print(f"{time.monotonic() - started:.0f} s in all", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
