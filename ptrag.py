"""PT-RAG in one file: retrieval-augmented prediction of how cells respond to a genetic perturbation.

Given control cells of a cell line and the name of a gene, (1) look up the K genes whose text embeddings are most similar,
(2) let every cell decide, candidate by candidate, which of them to use, and (3) generate the perturbed cells from what it chose
with a set transformer. All of it is trained together on the energy distance between predicted and real cells.

    python ptrag.py                                          a minute on simulated data
    python ptrag.py --data replogle.h5 --split cell-line:jurkat

Source: Di Francesco, Rubbi, Lio: PT-RAG, arXiv 2603.07233. The file follows the paper's order: configuration, stage 1 (retrieve),
stage 2 (select), generator, loss and distances, training, prediction; then what a safe run needs, a run from end to end and the
command line. Everything up to prediction works alone, copied into any project with torch and numpy; the command line needs data.py and
evaluate.py beside it.

Letters in shapes: B sets in a batch, S cells in a set, G genes, K candidates, h hidden size, E embedding size, P perturbations (index 0
is the control), N genes in the retrieval pool; in the distances n and m points of d dimensions.
"""
from __future__ import annotations

import argparse
import contextlib
import csv
import difflib
import hashlib
import io
import json
import math
import os
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------------------------------------
# Configuration: every field is an option of the command line
# ---------------------------------------------------------------------------------------------------------------------

METHODS = ("state", "state-genept", "vanilla-rag", "ptrag")


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that says what and what to do."""


def option(default, help, **limits):
    """A field with its line of help and what it may be: `choices`, or `low` and `high` (both included), or `above`."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass
class Config:
    """All settings of a run. The defaults are those of the paper's runs, but for the generator, which is smaller since it is trained."""

    # data
    data: str = option("", "AnnData file (.h5ad) or packed file (.h5); without one, a small simulation")
    genept: str = option("", "gene embeddings: GenePT pickle or .npz; a packed file holds its own")
    split: str = option("perturbation:0", "cell-line:NAME, perturbation:FOLD or a split FILE.toml")
    perturbation_column: str = option("", "obs column of the perturbed gene (found by name if not given)")
    cell_line_column: str = option("", "obs column of the cell line (found by name if not given)")
    batch_column: str = option("", "obs column of the gem group or batch (found by name if not given)")
    control: str = option("", "label of the control cells (found by name if not given)")
    hvg: int = option(2000, "highly variable genes to choose where the file has no obsm/X_hvg", low=2)
    keep_targets: bool = option(False, "keep the perturbed genes' own expression beside the chosen genes")
    in_memory: bool = option(False, "hold all expression values in memory, dense")

    # method
    method: str = option("state,state-genept,vanilla-rag,ptrag", "methods to train, separated by commas")
    top_k: int = option(32, "K, candidates retrieved per perturbation", low=1)
    pool: str = option("train", "genes to retrieve: with training cells, also validation, or all", choices=("train", "trainval", "full"))
    candidates: str = option("nearest", "candidates by similarity, or at random from the pool (ablation)", choices=("nearest", "random"))
    selection: str = option("learned", "stage 2, or every candidate used (ablation)", choices=("learned", "all"))
    select: str = option("expected", "how a trained selection is used at test time", choices=("expected", "threshold", "sample"))
    draws: int = option(1, "with --select sample: how often test conditions are drawn; the table shows mean and spread", low=1)
    temperature: float = option(0.5, "temperature of the Gumbel-Softmax", above=0)
    sparsity: float = option(0.1, "weight of the sparsity penalty on selected candidates", low=0)
    keep_query: bool = option(False, "add cell and query to the retrieved context (not the paper's method)")
    batch_covariate: bool = option(False, "add an embedding of the control cell's gem group")
    hard_negatives: float = option(0.0, "share of candidates replaced at test time by the least similar genes", low=0, high=1)

    # sizes
    hidden: int = option(128, "h, hidden size", low=1)
    layers: int = option(8, "transformer blocks of the generator", low=1)
    heads: int = option(4, "attention heads", low=1)
    head_dim: int = option(32, "size of an attention head", low=1)
    feed_forward: int = option(512, "inner size of the feed-forward layers", low=1)
    dropout: float = option(0.1, "dropout inside the scorer of stage 2", low=0, high=0.9)
    causal: bool = option(False, "causal attention over the cells, as the paper's runs")
    rotary: bool = option(False, "rotary positions over the cells, as the paper's runs")
    freeze_generator: bool = option(False, "leave generator and output layer at their random start, as the paper's runs")

    # training
    cells: int = option(64, "S, cells in a set; with --predict, cells to predict per gene (500 if not given)", low=1)
    sets: int = option(64, "B, sets in a batch", low=1)
    steps: int = option(50_000, "training steps of each method", low=1)
    lr: float = option(1e-3, "learning rate of Adam", above=0)
    clip: float = option(10.0, "largest norm of the gradient", above=0)
    validate_every: int = option(100, "steps between validations; the best model is kept", low=1)
    seed: int = option(0, "seed of data, split, weights and sampling", low=0, high=2**31 - 1)
    seeds: str = option("", "several training seeds, separated by commas; data and split stay with --seed")
    device: str = option("", "cpu, cuda or cuda:N (cuda where there is one, if not given)")
    bf16: bool = option(False, "run the network in bfloat16 (autocast)")
    compile: bool = option(False, "compile the model with torch.compile")

    # run
    name: str = option("", "the run is written to runs/NAME (a free name is found if not given)")
    resume: str = option("", "runs/NAME of an interrupted run to continue")
    checkpoint_every: int = option(1000, "steps between checkpoints", low=1)
    checkpoint_minutes: float = option(10.0, "minutes between checkpoints, if that is sooner", above=0)
    max_cells: int = option(1000, "most cells of a condition that evaluation uses", low=2)

    # prediction
    predict: str = option("", "genes to predict with a trained model, separated by commas; all: every perturbation of its data")
    cell_line: str = option("", "cell line of --predict")
    model: str = option("", "runs/NAME of the trained model for --predict")
    output: str = option("predicted.h5ad", "file that --predict writes")


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1: retrieve, once for every perturbation
# ---------------------------------------------------------------------------------------------------------------------

def retrieve(embeddings, pool, k, how="nearest", seed=0):
    """The k genes of the pool most similar to each perturbation, by cosine similarity of their embeddings.

    embeddings: (P, E) float, a zero row where a perturbation has none (the control)
    pool:       (N,) int, indices of the genes that can be retrieved, ascending
    how:        "nearest"; "random" draws k genes of the pool from the seed, "least" takes the least similar (both are controls)
    returns     candidates (P, k) int, best first, and their similarity (P, k) float

    A perturbation is never its own candidate, a gene without an embedding is never retrieved, ties go to the lower index.
    A perturbation without an embedding retrieves nothing: its candidates are -1. Raises InputError if the pool is too small.
    """
    if how not in ("nearest", "random", "least"):
        raise ValueError(f"how {how!r}: must be nearest, random or least")
    has_embedding = (embeddings != 0).any(1)                                                       # (P,)
    pool = pool[has_embedding[pool]]                                                               # (N,)
    usable = len(pool) - torch.isin(torch.arange(len(embeddings), device=pool.device), pool).long()     # without itself
    if has_embedding.any() and (fewest := int(usable[has_embedding].min())) < k:
        raise InputError(f"the retrieval pool has {fewest} usable genes for a query, fewer than --top-k {k}: lower --top-k or widen --pool")
    unit = F.normalize(embeddings.double(), dim=1)                                                 # (P, E), double: equal genes tie exactly
    chance = torch.Generator(embeddings.device).manual_seed(seed)
    candidates = torch.full((len(embeddings), k), -1, device=embeddings.device)
    similarity = embeddings.new_zeros(len(embeddings), k)
    for queries in has_embedding.nonzero().flatten().split(1024):
        cosine = (unit[queries] @ unit[pool].T).round(decimals=9)                                  # (Q, N)
        rank = cosine if how == "nearest" else -cosine
        if how == "random":
            rank = torch.rand(cosine.shape, generator=chance, device=cosine.device).double()
        rank = rank - 1e-15 * torch.arange(len(pool), device=pool.device)                          # less than the rounding: breaks ties
        best = rank.masked_fill(queries[:, None] == pool, -math.inf).topk(k).indices               # (Q, k)
        candidates[queries] = pool[best]
        similarity[queries] = cosine.gather(1, best).to(similarity.dtype)
    return candidates, similarity


# ---------------------------------------------------------------------------------------------------------------------
# Stage 2: select, for every cell and candidate (to take it alone, take everything up to the next line of dashes)
# ---------------------------------------------------------------------------------------------------------------------

class Selection(NamedTuple):
    """What stage 2 decided: weights (B, S, K), 0 or 1 in training; logits (B, S, K, 2), the second meaning "use it", None with "all".

    probability (B, S, K): with which a draw selects each candidate, sigmoid(l_1 - l_0); zero where nothing was retrieved.
    """

    weights: torch.Tensor
    logits: torch.Tensor | None
    probability: torch.Tensor


def gumbel_noise(shape, device=None):
    """Standard Gumbel noise of any shape, -log(-log(u)) of a uniform u: the inverse of its distribution exp(-exp(-x))."""
    return -torch.rand(shape, device=device).clamp_(min=1e-38).log_().neg_().log_()


def straight_through(logits, temperature, noise):
    """Straight-through Gumbel-Softmax over two outcomes: 0 or 1 forward, the gradient of the soft weight backward.

    logits, noise: (..., 2) -> weights (...); Jang, Gu, Poole 2017. The softmax over two is the sigmoid of their difference.
    """
    soft = torch.sigmoid((logits + noise).diff(dim=-1)[..., 0] / temperature)
    hard = (soft > 0.5).to(soft.dtype)
    return hard + (soft - soft.detach())


class Selector(nn.Module):
    """Which candidates does each cell use?

    For cell s, query p and candidate k, with z_sk = LayerNorm([c_s; p; p_k]) of size 3h:
        logits   l_sk = MLP(z_sk), divided by their standard deviation over the set        (S, K, 2)
        weights  w_sk = straight-through Gumbel-Softmax(l_sk) in {0, 1}                     (S, K)
        context  u_s  = sum_k w_sk (z_sk Wv + bv)                                           (S, h)

    No z_sk is ever built. With gain g and shift b of the LayerNorm, and W any linear map that follows it,
        W z_sk = (W g) [c_s - m; p - m; p_k - m] r_sk + W b,      m the mean and r_sk one over the standard deviation of the 3h numbers.
    Subtracting the mean before W g is the same as giving each row of W g the mean zero. Call that W': then
        W z_sk = r_sk (W'_c c_s + W'_p p + W'_k p_k) + W b:
    one product per cell, one per query, one per candidate, added. r_sk needs only the sums and sums of squares of the three parts.
    Both maps that read z, the first layer of the MLP and Wv, go through the same product. In the context the sum over k is then a
    product of (S, K) and (K, h); only the GELU of the MLP has to see every pair (`PairLogits`).

    The division bounds selection from both sides: logits of variance 1 have margins l_1 - l_0 with a mean square of at most 4, so on
    average at least sigmoid(-2) = 12 % of the candidates are drawn, however they are scored, and at most 88 %.
    """

    def __init__(self, hidden, temperature=0.5, dropout=0.1):
        super().__init__()
        if not 0 <= dropout <= 0.9:
            raise ValueError(f"dropout {dropout}: must be from 0 to 0.9")
        self.norm = nn.LayerNorm(3 * hidden)                                                       # its gain, shift and eps; never called
        self.score_in = nn.Linear(3 * hidden, hidden)
        self.score_out = nn.Linear(hidden, 2)
        self.value = nn.Linear(3 * hidden, hidden)
        self.temperature, self.dropout = temperature, dropout

    def forward(self, cell, query, candidate, retrieved=None, select=None, noise=None):
        """cell (B, S, h), query (B, h), candidate (B, K, h) -> context (B, S, h), Selection

        retrieved: (B,) bool, false where a query has no candidates: it uses none of those given. True for all if not given.
        select: "sample" (draw; the gradient is straight-through), "threshold" (use where more likely than not), "expected" (weigh each
        candidate by its probability), "all" (no stage 2); if not given "sample" in training mode, else "expected".
        noise: (B, S, K, 2) to use instead of drawn Gumbel noise.
        """
        select = select or ("sample" if self.training else "expected")
        B, S, h = cell.shape
        maps = torch.cat([self.score_in.weight, self.value.weight])                                # (2h, 3h), both that read z
        weight = maps * self.norm.weight                                                           # (2h, 3h), W g
        shift = F.linear(self.norm.bias, maps, torch.cat([self.score_in.bias, self.value.bias]))   # (2h,), W b
        weight_c, weight_p, weight_k = (weight - weight.mean(1, keepdim=True)).split(h, dim=1)     # each (2h, h)
        per_cell = F.linear(cell, weight_c) + F.linear(query, weight_p)[:, None]                   # (B, S, 2h), the query's part in it
        per_candidate = F.linear(candidate, weight_k)                                              # (B, K, 2h)
        scale = self.inverse_deviation(cell, query, candidate)                                     # (B, S, K), r_sk

        score_cell, value_cell = per_cell.split(h, dim=-1)                                         # each (B, S, h)
        score_candidate, value_candidate = per_candidate.split(h, dim=-1)                          # each (B, K, h)
        score_shift, value_shift = shift.split(h)                                                  # each (h,)

        if select == "all":
            logits, weights, probability = None, torch.ones_like(scale), torch.ones_like(scale)    # (B, S, K)
        else:
            logits = self.score(score_cell, score_candidate, scale, score_shift)                   # (B, S, K, 2)
            logits = logits / logits.std(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
            weights, probability = self.weigh(logits, select, noise)                               # (B, S, K), (B, S, K)
        if retrieved is not None:
            weights, probability = weights * retrieved[:, None, None], probability * retrieved[:, None, None]
        scaled = weights * scale                                                                   # (B, S, K)
        context = scaled.sum(-1, keepdim=True) * value_cell + scaled @ value_candidate + weights.sum(-1, keepdim=True) * value_shift
        return context, Selection(weights, logits, probability)

    def inverse_deviation(self, cell, query, candidate):
        """One over the standard deviation of [c_s; p; p_k], from the sums of its parts and of their squares: (B, S, K)."""
        with torch.autocast(cell.device.type, enabled=False):                                      # bfloat16 is too coarse here
            parts = [part.to(self.norm.weight.dtype) for part in (cell[:, :, None], query[:, None, None], candidate[:, None])]
            mean = sum(part.sum(-1) for part in parts) / self.norm.normalized_shape[0]             # (B, S, K)
            square = sum((part * part).sum(-1) for part in parts) / self.norm.normalized_shape[0]  # (B, S, K)
            return ((square - mean * mean).clamp(min=0) + self.norm.eps).rsqrt()

    def score(self, score_cell, score_candidate, scale, shift):
        """The MLP of every (cell, candidate) pair, a set at a time: (B, S, K, 2)."""
        keep_share = 1 - self.dropout if self.training else 1.0
        keep = dropout_mask((*scale.shape, len(shift)), self.dropout, scale.device) if keep_share < 1 else None
        with torch.autocast(scale.device.type, enabled=False):                                     # bfloat16 is too coarse here
            parts = [part.to(self.score_out.weight.dtype) for part in (score_cell, score_candidate, scale, shift)]
            return PairLogits.apply(*parts, self.score_out.weight / keep_share, keep) + self.score_out.bias

    def weigh(self, logits, select, noise=None):
        """Logits (B, S, K, 2) -> weights (B, S, K) as `select` says, and the probability (B, S, K) of a draw to select."""
        probability = torch.sigmoid(logits[..., 1] - logits[..., 0])
        if select == "expected":
            return probability, probability
        if select == "threshold":
            return (logits[..., 1] > logits[..., 0]).to(logits.dtype), probability
        if select != "sample":
            raise ValueError(f"select {select!r}: must be sample, threshold, expected or all")
        noise = gumbel_noise(logits.shape, logits.device) if noise is None else noise
        return straight_through(logits, self.temperature, noise), probability


def dropout_mask(shape, p, device):
    """Bernoulli(1 - p) mask of zeros and ones, p at most 0.9: a random byte an element, eight from one draw, against 256 p.

    256 p is rounded up or down at random in every call, up with the probability of its fraction, so an element is zero with
    probability p. F.dropout does not hand out its mask, which the gradient of `PairLogits` needs, and draws each element alone, which
    takes several times as long.
    """
    count, threshold = math.prod(shape), (256 * p + torch.rand(())).to(torch.uint8)
    draws = torch.empty(-(-count // 8), dtype=torch.int64, device=device).random_(-2**63, None)
    return draws.view(torch.uint8)[:count].view(shape).ge_(threshold)


class PairLogits(torch.autograd.Function):
    """The scorer's MLP on every (cell, candidate) pair: l_sk = (GELU(a_sk) * keep_sk) V^T with a_sk = r_sk (C_s + P_k) + b.

    cell C_s = W'_c c_s + W'_p p (B, S, h), candidate P_k = W'_k p_k (B, K, h), scale r (B, S, K), shift b (h,), weight V (2, h) over
    the share that dropout keeps, keep (B, S, K, h) of 0 and 1 (dropout) or None -> (B, S, K, 2). Written as a function with its own
    gradient because the pairs are the only large thing in stage 2: one set at a time they stay in the cache, and the backward pass
    computes them again instead of keeping them. With dl the gradient of the logits and d_sk = (dl_sk V) keep_sk GELU'(a_sk):
        dC_s = sum_k r_sk d_sk,  dP_k = sum_s r_sk d_sk,  dr_sk = (C_s + P_k).d_sk,  db = sum_sk d_sk,
        dV = sum_sk dl_sk^T (GELU(a_sk) keep_sk).
    """

    @staticmethod
    def forward(ctx, cell, candidate, scale, shift, weight, keep):
        ctx.save_for_backward(cell, candidate, scale, shift, weight, keep)
        logits = []
        for i in range(len(cell)):
            hidden = F.gelu(torch.addcmul(shift, scale[i, :, :, None], cell[i, :, None] + candidate[i]))        # (S, K, h)
            logits.append((hidden if keep is None else hidden.mul_(keep[i])) @ weight.T)           # (S, K, 2)
        return torch.stack(logits)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_logits):
        cell, candidate, scale, shift, weight, keep = ctx.saved_tensors
        d_cell, d_candidate, d_scale, d_shift, d_weight, _ = [None if x is None else torch.zeros_like(x) for x in ctx.saved_tensors]
        for i, d in enumerate(d_logits):
            pair = cell[i, :, None] + candidate[i]                                                 # (S, K, h)
            inside = torch.addcmul(shift, scale[i, :, :, None], pair)                              # (S, K, h)
            hidden, d_hidden = F.gelu(inside), d @ weight                                          # (S, K, h)
            if keep is not None:
                hidden.mul_(keep[i])
                d_hidden.mul_(keep[i])
            d_weight += d.flatten(0, 1).T @ hidden.flatten(0, 1)
            d_inside = torch.ops.aten.gelu_backward(d_hidden, inside)                              # (S, K, h)
            d_shift += d_inside.sum((0, 1))
            d_scale[i] = pair.mul_(d_inside).sum(-1)
            d_inside.mul_(scale[i, :, :, None])
            d_cell[i], d_candidate[i] = d_inside.sum(1), d_inside.sum(0)
        return d_cell, d_candidate, d_scale, d_shift, d_weight, None


# ---------------------------------------------------------------------------------------------------------------------
# Vanilla RAG, the paper's baseline: attend to all candidates instead
# ---------------------------------------------------------------------------------------------------------------------

class CrossAttention(nn.Module):
    """Cross-attention of each cell to its K candidates.

    query (c_s + p) Wq + bq; keys and values linear maps of a linear projection of the candidates' embeddings; softmax scaled by sqrt(h).
    """

    def __init__(self, embedding_dim, hidden):
        super().__init__()
        self.project = nn.Linear(embedding_dim, hidden)
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)

    def forward(self, cell_and_query, candidate, retrieved):
        """cell_and_query (B, S, h), candidate (B, K, h) projected, retrieved (B,) bool -> context (B, S, h), zero where not retrieved."""
        query, key, value = self.query(cell_and_query), self.key(candidate), self.value(candidate)
        score = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])                           # (B, S, K)
        return torch.softmax(score, dim=-1) @ value * retrieved[:, None, None]                     # (B, S, h)


# ---------------------------------------------------------------------------------------------------------------------
# Generator: a transformer over the set of cells
# ---------------------------------------------------------------------------------------------------------------------

def rotate(x, theta=10_000.0):
    """Rotary positions: turns the pair (x_i, x_{i + d/2}) of the cell at position t by t * theta^(-2i/d). x: (B, heads, S, d), d even."""
    S, d = x.shape[-2:]
    speed = theta ** (-torch.arange(0, d, 2, device=x.device, dtype=torch.float32) / d)            # (d/2,)
    angle = torch.arange(S, device=x.device, dtype=torch.float32)[:, None] * speed                 # (S, d/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Block(nn.Module):
    """One transformer block over the cells of a set: RMSNorm, attention, RMSNorm, SwiGLU; no biases."""

    def __init__(self, hidden, heads, head_dim, feed_forward, causal=False, rotary=False):
        super().__init__()
        self.attention_norm = nn.RMSNorm(hidden, eps=1e-6)
        self.qkv = nn.Linear(hidden, 3 * heads * head_dim, bias=False)
        self.attention_out = nn.Linear(heads * head_dim, hidden, bias=False)
        self.feed_forward_norm = nn.RMSNorm(hidden, eps=1e-6)
        self.gate_up = nn.Linear(hidden, 2 * feed_forward, bias=False)
        self.down = nn.Linear(feed_forward, hidden, bias=False)
        self.heads, self.head_dim, self.causal, self.rotary = heads, head_dim, causal, rotary

    def forward(self, x):
        """x (B, S, h) -> (B, S, h)"""
        B, S, _ = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(B, S, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)   # (B, heads, S, d)
        if self.rotary:
            q, k = rotate(q), rotate(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)                         # (B, heads, S, d)
        x = x + self.attention_out(y.transpose(1, 2).reshape(B, S, -1))
        gate, up = self.gate_up(self.feed_forward_norm(x)).chunk(2, dim=-1)                        # each (B, S, f)
        return x + self.down(F.silu(gate) * up)


class Generator(nn.Module):
    """A stack of blocks without positions or mask: permuting the cells of a set permutes the output and nothing else.

    Unless `causal` or `rotary`, which the paper's runs used: then a cell sees the cells before it, or its position.
    """

    def __init__(self, hidden, layers, heads, head_dim, feed_forward, causal=False, rotary=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(hidden, heads, head_dim, feed_forward, causal, rotary) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)                                                  # every block starts near the identity

    def forward(self, x):
        """x (B, S, h) -> (B, S, h)"""
        x = x.to(self.norm.weight.dtype)                                                           # sums stay exact with --bf16
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class PTRAG(nn.Module):
    """Control cells and a perturbation in, perturbed cells out; PT-RAG and the three methods it is compared with.

    method        input of the generator
    state         c + p, p encodes the perturbation one-hot
    state-genept  c + p, p encodes the perturbation's text embedding
    vanilla-rag   attention of c + p to all K candidates
    ptrag         the selected candidates' context (Selector)
    """

    def __init__(self, config, genes, embeddings, pool, gem_groups=1):
        """genes: G; embeddings (P, E) float, zero for the control; pool (N,) int; gem_groups: how many the batch covariate tells apart."""
        super().__init__()
        self.method, self.select, self.keep_query = config.method, config.select, config.keep_query
        self.use_all, self.set_size = config.selection == "all", config.cells
        if self.method == "state":
            embeddings = torch.eye(len(embeddings))
            embeddings[0] = 0                                                                      # the control, as in every embedding
        self.register_buffer("embeddings", embeddings)                                             # (P, E)
        self.register_buffer("pool", pool)                                                         # (N,)
        self.cell_encoder = nn.Linear(genes, config.hidden)
        self.perturbation_encoder = nn.Linear(embeddings.shape[1], config.hidden)
        if self.method == "ptrag":
            self.selector = Selector(config.hidden, config.temperature, config.dropout)
            if self.use_all:                                                                       # nothing scores, so nothing to train
                self.selector.score_in.requires_grad_(False)
                self.selector.score_out.requires_grad_(False)
        if self.method == "vanilla-rag":
            self.attention = CrossAttention(embeddings.shape[1], config.hidden)
        if self.method in ("ptrag", "vanilla-rag"):
            self.retrieval = (config.top_k, config.candidates, config.seed)
            candidates, similarity = retrieve(embeddings, pool, *self.retrieval)
            self.register_buffer("candidates", candidates)                                         # (P, K)
            self.register_buffer("similarity", similarity)                                         # (P, K)
        self.gem_group = nn.Embedding(gem_groups, config.hidden) if config.batch_covariate else None
        self.generator = Generator(config.hidden, config.layers, config.heads, config.head_dim, config.feed_forward,
                                   config.causal, config.rotary)
        self.output = nn.Linear(config.hidden, genes)
        if config.freeze_generator:
            self.generator.requires_grad_(False)
            self.output.requires_grad_(False)

    def forward(self, control, perturbation, gem_group=None, noise=None):
        """The perturbed cells of B sets.

        control:      (B, S, G) float, log1p expression of control cells
        perturbation: (B,) int
        gem_group:    (B, S) int, read only with the batch covariate
        noise:        (B, S, K, 2) Gumbel noise to use instead of drawing it
        returns       prediction (B, S, G), and the Selection (None unless the method is ptrag)
        """
        c = self.cell_encoder(control)                                                             # (B, S, h)
        p = self.perturbation_encoder(self.embeddings[perturbation])                               # (B, h)
        selection = None
        if self.method == "ptrag":
            candidate, retrieved = self.encode_candidates(perturbation, self.perturbation_encoder)     # (B, K, h), (B,)
            select = "all" if self.use_all else "sample" if self.training else self.select
            u, selection = self.selector(c, p, candidate, retrieved, select, noise)                # (B, S, h)
        elif self.method == "vanilla-rag":
            candidate, retrieved = self.encode_candidates(perturbation, self.attention.project)    # (B, K, h), (B,)
            u = self.attention(c + p[:, None], candidate, retrieved)                               # (B, S, h)
        else:
            u = c + p[:, None]                                                                     # (B, S, h)
        if self.keep_query and self.method in ("ptrag", "vanilla-rag"):
            u = u + c + p[:, None]
        if self.gem_group is not None:
            u = u + self.gem_group(gem_group)
        y = self.generator(u)                                                                      # (B, S, h)
        return F.relu(self.output(y + c)), selection                                               # (B, S, G): cell + change, log1p >= 0

    def encode_candidates(self, perturbation, encoder):
        """Candidates of the queries (B,), each gene encoded once however many sets share it: (B, K, h); which queries have any: (B,)."""
        candidates = self.candidates[perturbation]                                                 # (B, K), -1 where there is none
        genes, position = candidates.clamp(min=0).unique(return_inverse=True)
        return encoder(self.embeddings[genes])[position], candidates[:, 0] >= 0


# ---------------------------------------------------------------------------------------------------------------------
# Loss and distances: between populations, so between sets of cells without an order
# ---------------------------------------------------------------------------------------------------------------------

def pairwise_distance(x, y):
    """Euclidean distances of all pairs, x (B, n, d), y (B, m, d) -> (B, n, m), with |x - y|^2 = |x|^2 + |y|^2 - 2 x.y.

    Nothing of size n * m * d is made. Both clouds are moved by the mean of y first: the distances stay, the rounding error shrinks.
    """
    center = y.detach().mean(1, keepdim=True)                                                      # (B, 1, d)
    x, y = x - center, y - center
    return distance_from_products(x.square().sum(-1), y.square().sum(-1), x @ y.transpose(1, 2))


def distance_from_products(x_square, y_square, product):
    """|x - y| of all pairs from |x|^2 (B, n), |y|^2 (B, m) and x.y (B, n, m): (B, n, m).

    Squares below the rounding error of the difference are zero, distance and gradient: coincident points are safe.
    """
    size = x_square[:, :, None] + y_square[:, None, :]                                             # (B, n, m)
    square = size - 2 * product
    together = square <= 8 * torch.finfo(size.dtype).eps * size                                    # false for nan, which stays nan
    return torch.where(together, 0, torch.where(together, 1, square).sqrt())


def energy_distance(x, y):
    """E|X - Y| - E|X - X'| / 2 - E|Y - Y'| / 2 over all pairs, the diagonal too: half the classical energy distance.

    x (B, n, d) predicted, y (B, m, d) or (1, m, d) real -> (B,). No gradient flows to y: the last term is measured, never differentiated.
    All three come from products of the clouds, moved by the mean of y; |x|^2 and |y|^2 are the diagonals of x x^T and y y^T.
    """
    y = y.detach()
    center = y.mean(1, keepdim=True)                                                               # (B, 1, d)
    x, y = x - center, y - center
    xx, xy, yy = x @ x.transpose(1, 2), x @ y.transpose(1, 2), y @ y.transpose(1, 2)               # (B, n, n), (B, n, m), (B, m, m)
    x_square, y_square = xx.diagonal(dim1=1, dim2=2), yy.diagonal(dim1=1, dim2=2)                  # (B, n), (B, m)
    between, within_x, within_y = (distance_from_products(*terms).mean((1, 2)) for terms in
                                   ((x_square, y_square, xy), (x_square, x_square, xx), (y_square, y_square, yy)))
    return between - within_x / 2 - within_y / 2


def wasserstein_1d(x, y, p=1):
    """Exact Wasserstein-p distance of two samples on the line, x (..., n), y (..., m) -> (...), root taken; leading sizes may be 1.

    W_p^p = integral over q in (0, 1) of |F_x^-1(q) - F_y^-1(q)|^p: both quantile functions are steps, of width 1/n and 1/m, so the
    integral is a sum over the union of their steps.
    """
    n, m = x.shape[-1], y.shape[-1]
    step = torch.unique(torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]))       # in units of 1/(n m), ascending
    width = torch.diff(step, prepend=step.new_zeros(1)).to(x) / (n * m)                            # (steps,)
    left = (step - 1).to(x.device)
    gap = (x.sort(-1).values[..., left // m] - y.sort(-1).values[..., left // n]).abs()            # (..., steps)
    return ((gap**p) @ width) ** (1 / p)


def sliced_wasserstein(x, y, p=1, directions=512, seed=0):
    """Sliced Wasserstein-p distance, (mean over random unit directions of W_p^p)^(1/p), and its Monte-Carlo standard error.

    x (B, n, d), y (B, m, d) or (1, m, d), at least two directions -> (B,), (B,). Exact along each direction; the error is that of the
    mean, carried through the root. The directions depend on the seed alone.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = F.normalize(torch.randn(x.shape[-1], directions, generator=generator, dtype=torch.float64), dim=0).to(x)    # (d, D)
    power = wasserstein_1d((x @ direction).transpose(1, 2), (y @ direction).transpose(1, 2), p) ** p                       # (B, D)
    value = power.mean(1) ** (1 / p)
    error = power.std(1) / math.sqrt(directions)                                                   # of the mean of W_p^p
    return value, error * value / (p * power.mean(1)).clamp(min=torch.finfo(x.dtype).tiny)


@torch.no_grad()
def wasserstein(x, y, p=1, tolerance=2e-3, max_rounds=500):
    """Wasserstein-p distance of two clouds of equally weighted points, (min over couplings of the mean |x - y|^p)^(1/p).

    x (B, n, d), y (B, m, d), n and m free -> (B,) float64 in the unit of x, root taken.
    Sinkhorn's iteration for the cost |x - y|^p (Cuturi 2013), ten steps a round. After each round the plan is rounded to a true coupling
    (Altschuler, Weed, Rigollet 2017), whose cost bounds W_p^p from above, and the potentials are made feasible, whose value bounds it from
    below; epsilon is halved once the gap is not due to rounding. Stops when the gap is under `tolerance` of the upper bound (or of a
    millionth of the largest cost, where the clouds are nearer than that) and returns the middle: W_p^p is then within half the tolerance of
    exact optimal transport. Cost O(n m) a step, 100 to 200 steps in PCA-50 space.
    RuntimeError if `max_rounds` do not close the gap (a point a thousand times farther away than the rest can do that). No gradient.
    """
    together = max(1, 2**17 // (x.shape[1] * y.shape[1]))                                          # problems that fit the cache
    if len(x) > together:
        return torch.cat([wasserstein(*pair, p, tolerance, max_rounds) for pair in zip(x.split(together), y.split(together))])
    cost = pairwise_distance(x.double(), y.double()) ** p                                          # (B, n, m)
    B, n, m = cost.shape
    power, problem = cost.new_zeros(B), torch.arange(B, device=cost.device)                        # W_p^p; the problems still open
    f, g = cost.new_zeros(B, n, 1), cost.new_zeros(B, m, 1)                                        # the two potentials
    largest = cost.amax((1, 2)).clamp(min=1e-300)                                                  # (B,)
    epsilon, upper, lower = largest.clone(), torch.full_like(largest, math.inf), torch.full_like(largest, -math.inf)
    for _ in range(max_rounds):
        plan, f, g = sinkhorn_steps(cost, f, g, epsilon[:, None, None])
        above, below, rounding = coupling_bounds(cost, plan, f, g)                                 # each (B,)
        upper, lower = torch.minimum(upper, above), torch.maximum(lower, below)
        closed = upper - lower <= tolerance * upper.clamp(min=1e-6 * largest)
        power[problem[closed]] = (upper + lower)[closed] / 2
        if closed.all():
            return power.clamp(min=0) ** (1 / p)
        epsilon = torch.where(rounding < (above - below) / 2, epsilon / 2, epsilon)
        if closed.any():
            problem, cost, f, g, largest, epsilon, upper, lower = (
                part[~closed] for part in (problem, cost, f, g, largest, epsilon, upper, lower))
    raise RuntimeError(f"optimal transport of {n} and {m} points did not come within {tolerance:g} in {10 * max_rounds} steps")


def sinkhorn_steps(cost, f, g, epsilon, steps=10, relaxation=1.7):
    """Over-relaxed Sinkhorn steps from the potentials f (B, n, 1), g (B, m, 1): the plan (B, n, m) they end with, and the new f, g.

    The plan exp((f_i + g_j - cost_ij) / epsilon) / (n m) that the steps start from is computed once; they only find factors u_i, v_j
    for its rows and columns, by matrix products: u <- u^(1-r) (row sums wanted / row sums found)^r, v the same with columns.
    In the end f moves by epsilon log u and g by epsilon log v.
    """
    n, m = cost.shape[1:]
    plan = (f + g.transpose(1, 2) - cost).div_(epsilon).clamp_(max=600).exp_().div_(n * m)         # (B, n, m)
    across = plan.transpose(1, 2).contiguous()                                                     # (B, m, n)
    u, v = torch.ones_like(f), torch.ones_like(g)
    for _ in range(steps):                                                                         # clamped: an empty row stays finite
        u = (u ** (1 - relaxation) * (n * (plan @ v)).clamp(1e-250, 1e250) ** -relaxation).clamp(1e-100, 1e100)
        v = (v ** (1 - relaxation) * (m * (across @ u)).clamp(1e-250, 1e250) ** -relaxation).clamp(1e-100, 1e100)
    return plan.mul_(u).mul_(v.transpose(1, 2)), f + epsilon * u.log(), g + epsilon * v.log()


def coupling_bounds(cost, plan, f, g):
    """Cost of a coupling near the plan, value of feasible potentials near f and g, and what rounding added to the former: three of (B,).

    cost, plan (B, n, m), f (B, n, 1), g (B, m, 1); the optimum lies between the first two.
    """
    n, m = cost.shape[1:]
    a = (1 / (n * plan.sum(2, keepdim=True))).clamp(max=1)                                         # a plan: no row above 1/n
    columns = plan.transpose(1, 2) @ a                                                             # (B, m, 1)
    b = (1 / (m * columns)).clamp(max=1)                                                           # a plan b: no column above 1/m
    missing_rows, missing_columns = 1 / n - a * (plan @ b), 1 / m - b * columns                    # (B, n, 1), (B, m, 1)
    rest = (missing_rows * (cost @ missing_columns)).sum((1, 2)) / missing_rows.sum((1, 2)).clamp(min=1e-300)
    above = (a * ((plan * cost) @ b)).sum((1, 2)) + rest
    g = (cost - f).amin(1)[:, :, None]                                                             # now f_i + g_j <= cost_ij everywhere
    f = (cost - g.transpose(1, 2)).amin(2)
    return above, f.mean(1) + g.mean((1, 2)), rest


# ---------------------------------------------------------------------------------------------------------------------
# Training: one loss, one loop
# ---------------------------------------------------------------------------------------------------------------------

def train(model, batches, validation, config, run):
    """Trains the model and leaves it with the weights of the best validation.

    batches:    callable, first step -> iterator of batches with `control`, `target` (B, S, G), `perturbation` (B,), `gem_group` (B, S)
    validation: list of such batches, measured every `config.validate_every` steps; if empty the last weights are kept
    run:        what keeps it safe: restoring, logging, checkpoints, several processes (section "A safe run")

    loss = mean over sets of the energy distance(prediction, target) + sparsity * mean |w|, whose gradient is zero where w = 0: the
    penalty pushes out selected candidates only.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=config.lr, fused=True)
    network = run.wrap(model)
    progress = run.restore(model, optimizer)
    for step, batch in enumerate(batches(progress.step), start=progress.step + 1):
        run.seed_step(step)
        network.train()
        control, target, perturbation, gem_group = on_device(batch, run.device)
        with run.precision():
            prediction, selection = network(control, perturbation, gem_group)                      # (B, S, G)
        energy = energy_distance(prediction.float(), target)                                       # (B,)
        penalty = selection.weights.abs().mean() if selection is not None else energy.new_zeros(())
        loss = energy.mean() + config.sparsity * penalty

        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(weights, config.clip)
        run.stop_unless_finite(step, energy, norm, batch)
        optimizer.step()

        measured = math.nan
        if validation and (step % config.validate_every == 0 or step == config.steps):
            measured = validate(model, validation, run)
            progress.offer(measured, model)
        run.record(step, loss, energy, penalty, measured, control.shape)
        run.save(step, model, optimizer, progress)
    progress.use_best(model)


@torch.no_grad()
def validate(model, batches, run):
    """Mean energy distance of predicted and real cells over the sets of all batches, with selection as at test time."""
    model.eval()
    energies = []
    for batch in batches:
        control, target, perturbation, gem_group = on_device(batch, run.device)
        with run.precision():
            prediction, _ = model(control, perturbation, gem_group)                                # (B, S, G)
        energies.append(energy_distance(prediction.float(), target))                               # (B,)
    return torch.cat(energies).mean().item()


def on_device(batch, device):
    """Control (B, S, G), target (B, S, G), perturbation (B,), gem group (B, S) of a batch of numpy arrays, as tensors."""
    arrays = (batch.control, batch.target, batch.perturbation, batch.gem_group)
    return [torch.from_numpy(array).to(device, non_blocking=True) for array in arrays]


# ---------------------------------------------------------------------------------------------------------------------
# Prediction
# ---------------------------------------------------------------------------------------------------------------------

class Prediction(NamedTuple):
    """cells (n, G) float, log1p; probability (n, K) with which each cell selects each candidate, None without stage 2."""

    cells: np.ndarray
    probability: np.ndarray | None


@torch.no_grad()
def predict(model, control, perturbation, gem_group=None, set_size=None, seed=0):
    """Perturbed cells for control cells of one line.

    control: (n, G) float array, log1p; the last set is filled up from the first cells
    perturbation: name of a gene the model knows (see `add_perturbations`), or its index, or an (n / set_size,) array of indices, one a set
    gem_group: (n,) int array, read only with the batch covariate
    set_size: cells in a set, as many as in training if not given
    returns Prediction, cell i made from control cell i. Depends on `seed` (one or several numbers) only with `select = "sample"`.
    Leaves torch seeded with it and the model in evaluation mode. Raises InputError for an unknown name or control cells of another shape.
    """
    device, set_size = model.output.weight.device, set_size or model.set_size
    if np.ndim(control) != 2 or not len(control) or np.shape(control)[1] != len(model.output.bias):
        raise InputError(f"control cells of shape {np.shape(control)}: must be (cells, {len(model.output.bias)} genes), at least one cell")
    if isinstance(perturbation, str):
        if perturbation not in model.perturbations:
            raise InputError(f"the model does not know the perturbation {perturbation!r}{suggest(perturbation, model.perturbations)}")
        perturbation = model.perturbations.index(perturbation)
    n, sets = len(control), -(-len(control) // set_size)
    fill = np.arange(sets * set_size) % n
    control = torch.from_numpy(np.asarray(control, dtype=np.float32)[fill]).view(sets, set_size, -1).to(device)              # (B, S, G)
    perturbation = torch.as_tensor(np.broadcast_to(perturbation, sets).copy(), device=device)                               # (B,)
    if gem_group is not None:
        gem_group = torch.from_numpy(np.asarray(gem_group)[fill]).view(sets, set_size).to(device)                           # (B, S)
    seed_torch(*np.atleast_1d(seed))
    cells, selection = model.eval()(control, perturbation, gem_group)                                                       # (B, S, G)
    probability = None
    if selection is not None:
        probability = selection.probability.flatten(0, 1)[:n].cpu().numpy()                                                 # (n, K)
    return Prediction(cells.flatten(0, 1)[:n].cpu().numpy(), probability)


def add_perturbations(model, names, embeddings):
    """Teaches a trained model genes it never saw, by name and embedding (Q, E) float: they become queries, not candidates.

    Raises InputError for a name that is known already and for the method `state`, whose one-hot perturbations cannot be extended.
    """
    if known := [name for name in names if name in model.perturbations]:
        raise InputError(f"the model knows the perturbation {known[0]} already")
    if model.method == "state":
        raise InputError("the method state knows only the perturbations it was trained with: use ptrag, vanilla-rag or state-genept")
    known = torch.cat([model.embeddings, torch.as_tensor(np.asarray(embeddings), dtype=torch.float32, device=model.embeddings.device)])
    model.embeddings, model.perturbations = known, model.perturbations + list(names)
    if hasattr(model, "candidates"):
        before = len(model.candidates)
        candidates, similarity = retrieve(known, model.pool, *model.retrieval)
        model.candidates = torch.cat([model.candidates, candidates[before:]])                      # (P + Q, K)
        model.similarity = torch.cat([model.similarity, similarity[before:]])                      # (P + Q, K)


def use_hard_negatives(model, share):
    """Replaces the last `share` of every perturbation's candidates by the least similar genes of the pool, most dissimilar last."""
    k = model.candidates.shape[1]
    count = round(share * k)
    if count:
        candidates, similarity = retrieve(model.embeddings, model.pool, k, how="least")
        model.candidates[:, k - count:] = candidates[:, :count].flip(1)
        model.similarity[:, k - count:] = similarity[:, :count].flip(1)


def seed_torch(*numbers):
    """Seeds torch from several whole numbers, mixed into the 32 bits that its CPU generator reads."""
    torch.manual_seed(int(np.random.SeedSequence([int(number) for number in numbers]).generate_state(1)[0]))


def suggest(name, known):
    """" (did you mean A, B?)" from the known names closest to a misspelt one, whatever their case, or nothing."""
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
    return f" (did you mean {', '.join(by_lower[k] for k in close)}?)" if close else ""


# ---------------------------------------------------------------------------------------------------------------------
# A safe run: files, checkpoints, several processes, progress
# ---------------------------------------------------------------------------------------------------------------------

class Diverged(RuntimeError):
    """The numbers of a run are no longer finite."""


class Stopped(Exception):
    """Ctrl-C: the step was finished and saved."""


def write_file(path, content):
    """Writes bytes to a temporary name, flushes to disk, renames: the file is either the old one or the whole new one."""
    temporary = Path(f"{path}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_csv(path, header, rows):
    """Writes a table, atomically; floats in the shortest form that reads back the same."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(header)
    table.writerows(rows)
    write_file(path, text.getvalue().encode())


def save_tensors(path, content):
    """torch.save to a file, atomically; holds only tensors and plain containers, so it loads with weights_only=True."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getbuffer())


def load_tensors(path):
    """A file of `save_tensors`, on the CPU. InputError for anything else: nothing but tensors and plain containers is ever built."""
    try:
        with warnings.catch_warnings(action="ignore"):                                             # torch's remarks on foreign pickles
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except Exception:
        raise InputError(f"{path}: not a model or checkpoint of this program, or damaged; nothing in it was run") from None


LOG_COLUMNS = ("method", "seed", "step", "loss", "energy", "sparsity", "validation")


class Progress:
    """The step training has reached, and the weights with the lowest validation energy so far."""

    def __init__(self):
        self.step, self.validation, self.state = 0, math.inf, None

    def offer(self, validation, model):
        if validation < self.validation:
            self.validation = validation
            self.state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}

    def use_best(self, model):
        if self.state is not None:
            model.load_state_dict(self.state)


class Run:
    """One method and seed in training: where it writes, on which device, among which processes, and when to stop.

    All random numbers of a step come from (seed, step), so a checkpoint needs no random state beside the step it was made at.
    """

    def __init__(self, folder, config, device, names, fingerprint="", log_before=(), rank=0, ranks=1, say=print):
        """names: (cell lines, perturbations) for messages; fingerprint of the data, so that a resumed run has the same;
        log_before: the lines of the log that runs before this one wrote."""
        self.folder, self.config, self.device, self.rank, self.ranks, self.say = Path(folder), config, device, rank, ranks, say
        self.names, self.fingerprint, self.log_before = names, fingerprint, list(log_before)
        self.label = f"{config.method}-{config.seed}"
        self.checkpoint = self.folder / f"checkpoint-{self.label}.pt"
        self.log = []
        self.first_step, self.cells_done, self.validation, self.interrupted = 0, 0, math.nan, False
        self.started, self.saved_at, self.last_said = time.monotonic(), time.monotonic(), -math.inf

    # -- before the first step

    def wrap(self, model):
        """The model as the loop calls it: compiled if asked, averaging gradients over the processes if there are several."""
        model.to(self.device)
        network = torch.compile(model) if self.config.compile else model
        return nn.parallel.DistributedDataParallel(network) if self.ranks > 1 else network

    def restore(self, model, optimizer):
        """Continues from the checkpoint where there is one; otherwise starts at step 0."""
        progress = Progress()
        if self.checkpoint.exists():
            saved = load_tensors(self.checkpoint)
            if saved["fingerprint"] != self.fingerprint:
                raise InputError(f"{self.folder}: was trained on other data or another split than these: resume with the same files")
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            progress.step, progress.validation, progress.state = saved["step"], saved["validation"], saved["best"]
            self.log = [tuple(line) for line in saved["log"]]
            if self.rank == 0 and progress.step < self.config.steps:
                self.say(f"{self.label}: continues after step {progress.step}")
        self.first_step = progress.step
        return progress

    # -- in every step

    def seed_step(self, step):
        seed_torch(self.config.seed, step, self.rank)

    def precision(self):
        """bfloat16 where asked, else nothing."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.config.bf16 else contextlib.nullcontext()

    def stop_unless_finite(self, step, energy, norm, batch):
        """Raises Diverged naming the step, the condition and the last checkpoint if the loss or a gradient is not a finite number."""
        if torch.isfinite(energy).all() and torch.isfinite(norm):
            return
        worst = int(energy.detach().nan_to_num(nan=math.inf).argmax())
        lines, perturbations = self.names
        condition = f"{lines[batch.cell_line[worst]]} / {perturbations[batch.perturbation[worst]]}"
        kept = f"the last good checkpoint is {self.checkpoint}" if self.checkpoint.exists() else "there is no checkpoint yet"
        raise Diverged(f"{self.label}: loss or gradient is not finite at step {step} (condition {condition}); {kept}; try a smaller --lr")

    def record(self, step, loss, energy, penalty, validation, shape):
        """Keeps the step's line of the log and shows progress: step, loss, validation, cells per second, time left."""
        self.log.append((self.config.method, self.config.seed, step, loss.item(), energy.mean().item(), penalty.item(), validation))
        self.validation = self.validation if math.isnan(validation) else validation
        self.cells_done += shape[0] * shape[1] * self.ranks
        now, last = time.monotonic(), step == self.config.steps
        if self.rank == 0 and (last or now - self.last_said > (0.2 if sys.stdout.isatty() else 10)):
            self.last_said, seconds = now, now - self.started
            left = seconds / (step - self.first_step) * (self.config.steps - step)
            shown = "-" if math.isnan(self.validation) else f"{self.validation:.4f}"
            line = (f"{self.label:<16} step {step}/{self.config.steps}  loss {loss.item():.4f}  validation {shown}"
                    f"  {self.cells_done / seconds:,.0f} cells/s  {left:.0f} s left")
            self.say(f"\r{line:<110}" if sys.stdout.isatty() else line, end="\n" if last or not sys.stdout.isatty() else "", flush=True)

    def save(self, step, model, optimizer, progress):
        """Writes a checkpoint when one is due, at the end, and on Ctrl-C, which then ends the run."""
        progress.step = step
        stopping = self.any_rank(self.interrupted)
        due = step % self.config.checkpoint_every == 0 or time.monotonic() - self.saved_at > 60 * self.config.checkpoint_minutes
        if self.rank == 0 and (due or stopping or step == self.config.steps):
            self.saved_at = time.monotonic()
            save_tensors(self.checkpoint, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                                           "validation": progress.validation, "best": progress.state, "log": self.log,
                                           "fingerprint": self.fingerprint})
            write_csv(self.folder / "log.csv", LOG_COLUMNS, self.log_before + self.log)
        if stopping and step < self.config.steps:
            raise Stopped

    def any_rank(self, flag):
        """True on every process if it is on one: they must leave the loop at the same step."""
        if self.ranks == 1:
            return flag
        flag = torch.tensor(float(flag), device=self.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)

    @contextlib.contextmanager
    def watching_for_interrupt(self):
        """Ctrl-C lets the step finish; a second one stops at once."""
        def note(signum, frame):
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------------------------------------------------------------
# A run from end to end
# ---------------------------------------------------------------------------------------------------------------------

def open_data(config):
    """The Dataset and the Split that a configuration names, exactly as training uses them; without `data` the simulation."""
    import data
    if config.data:
        dataset = data.load(config.data, config.genept or None, config.perturbation_column or None, config.cell_line_column or None,
                            config.batch_column or None, config.control or None, config.hvg, config.keep_targets, config.in_memory)
    else:
        dataset = data.simulate(config.seed)
    return dataset, data.split(dataset, config.split, config.seed)


def methods_of(config):
    """The methods of a configuration, in the order given."""
    return [name.strip() for name in config.method.split(",")]


def seeds_of(config):
    """The training seeds of a configuration."""
    return [int(seed) for seed in config.seeds.split(",")] if config.seeds else [config.seed]


def device_of(name):
    """The device of a name, cpu, cuda or cuda:N; without one a GPU where there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def fingerprint(dataset, split):
    """A text that changes with the cells, labels, genes or split of a run."""
    digest = hashlib.sha256(json.dumps([dataset.genes, dataset.cell_lines, dataset.perturbations, dataset.batches,
                                        split.train, split.validation, split.test]).encode())
    for codes in (dataset.cell_line, dataset.perturbation, dataset.batch, dataset.perturbation_embeddings()):
        digest.update(np.ascontiguousarray(codes))
    digest.update(np.ascontiguousarray(dataset.expression[np.linspace(0, len(dataset.cell_line) - 1, 64).astype(int)]))
    return digest.hexdigest()


def build_model(config, dataset, split):
    """An untrained model of `config.method` for the data, with the retrieval pool that `config.pool` names."""
    conditions = {"train": split.train, "trainval": split.train + split.validation,
                  "full": [(0, p) for p in range(1, len(dataset.perturbations))]}[config.pool]
    pool = torch.tensor(sorted({perturbation for _, perturbation in conditions}), dtype=torch.long)                         # (N,)
    embeddings = torch.from_numpy(dataset.perturbation_embeddings())                                                       # (P, E)
    torch.manual_seed(config.seed)
    model = PTRAG(config, len(dataset.genes), embeddings, pool, len(dataset.batches))
    if not config.freeze_generator:                                                                # start from "no change", not from zero
        controls = np.concatenate([dataset.cells(line, 0)[:1000] for line in range(len(dataset.cell_lines))])
        with torch.no_grad():
            model.output.bias.copy_(torch.from_numpy(dataset.expression[np.sort(controls)].mean(0)))                       # (G,)
    return name_things(model, dataset.genes, dataset.perturbations, dataset.batches)


def name_things(model, genes, perturbations, gem_groups):
    """Gives the model the names behind its indices, which prediction by name needs."""
    model.genes, model.perturbations, model.gem_groups = list(genes), list(perturbations), list(gem_groups)
    return model


def save_models(path, config, models):
    """Writes trained models, {(method, seed): model}, with all that `load` needs, into one file."""
    any_model = next(iter(models.values()))
    save_tensors(path, {"format": "ptrag-model", "version": 1, "config": asdict(config), "genes": any_model.genes,
                        "perturbations": any_model.perturbations, "gem_groups": any_model.gem_groups,
                        "models": {f"{method}-{seed}": model.state_dict() for (method, seed), model in models.items()}})


def load(run, method=None, seed=None):
    """A trained model of runs/NAME, ready for `predict`: of the method and seed given, else PT-RAG if it is there, else the first.

    InputError if there is no such model, or the file is not one of ours.
    """
    path = Path(run) / "model.pt"
    saved = load_tensors(path)
    if not isinstance(saved, dict) or saved.get("format") != "ptrag-model":
        raise InputError(f"{path}: not a model of this program")
    if saved["version"] != 1:
        raise InputError(f"{path}: model format {saved['version']} is newer than this program reads: use the program that wrote it")
    names = sorted(saved["models"], key=lambda name: not name.startswith("ptrag-"))                # each METHOD-SEED
    names = [name for name in names if method in (None, name.rpartition("-")[0]) and seed in (None, int(name.rpartition("-")[2]))]
    if not names:
        raise InputError(f"{path}: no model of {method or 'any method'}, seed {seed}; it holds {', '.join(saved['models'])}")
    state = saved["models"][names[0]]
    method, _, seed = names[0].rpartition("-")
    config = replace(Config(**saved["config"]), method=method, seed=int(seed))
    model = PTRAG(config, len(saved["genes"]), state["embeddings"], state["pool"], len(saved["gem_groups"]))
    model.load_state_dict(state)
    return name_things(model.eval(), saved["genes"], saved["perturbations"], saved["gem_groups"])


def predict_conditions(model, dataset, conditions, config, draw=0):
    """Predicts every condition (cell line, perturbation), many in a batch; yields (condition, control rows (n,), Prediction).

    draw: number of the draw, which only `--select sample` depends on. n is the number of real cells of the condition, at most
    `config.max_cells`; sets are filled up with further control cells.
    """
    import data
    waiting, sets = [], 0
    for number, condition in enumerate(conditions, start=1):
        real, control = data.evaluation_cells(dataset, condition, config.seed, config.max_cells, config.cells)
        waiting.append((condition, len(real), control))
        sets += len(control) // config.cells
        if sets < config.sets and number < len(conditions):
            continue
        rows = np.concatenate([control for _, _, control in waiting])
        perturbation = np.concatenate([np.full(len(control) // config.cells, p) for (_, p), _, control in waiting])
        predicted = predict(model, dataset.expression[rows], perturbation, dataset.batch[rows].astype(np.int64), config.cells,
                            seed=(config.seed, draw, number))
        ends = np.cumsum([len(control) for _, _, control in waiting])
        for (condition, n, control), end in zip(waiting, ends):
            part = slice(end - len(control), end - len(control) + n)
            yield condition, control[:n], Prediction(*(None if values is None else values[part] for values in predicted))
        waiting, sets = [], 0


def train_all(config, folder, dataset, split, rank=0, ranks=1):
    """Trains every method with every seed, one after the other, each saved as it is done: {(method, seed): model}."""
    import data
    device = device_of(config.device)
    mark, log, models = fingerprint(dataset, split), [], {}
    sets = range(rank * config.sets // ranks, (rank + 1) * config.sets // ranks)
    for seed in seeds_of(config):
        sampler = data.SetSampler(dataset, split.train, config.cells, seed)
        validation = []
        if split.validation:
            held_out = data.SetSampler(dataset, split.validation, config.cells, config.seed, controls_too=False)
            validation = [held_out.draw(i, range(config.sets)) for i in range(min(4, -(-len(split.validation) // config.sets)))]
        for method in methods_of(config):
            one = replace(config, method=method, seed=seed)
            model = build_model(one, dataset, split)
            run = Run(folder, one, device, (dataset.cell_lines, dataset.perturbations), mark, log, rank, ranks)
            with run.watching_for_interrupt():
                train(model, lambda done: data.prefetch(sampler, range(done + 1, config.steps + 1), sets), validation, one, run)
            models[method, seed], log = model, run.log_before + run.log
            if rank == 0:
                save_models(folder / "model.pt", config, models)
    return models


def write_predictions(folder, models, dataset, split, config):
    """Predicts all test conditions with every model: predictions.h5ad, a condition in memory at a time, and retrieval.csv."""
    import data
    report = []

    def blocks():
        for (method, trained_with), model in models.items():
            if config.hard_negatives and hasattr(model, "candidates"):
                use_hard_negatives(model, config.hard_negatives)
            predicted = ((draw, *one) for draw in range(config.draws)
                         for one in predict_conditions(model, dataset, split.test, config, draw))
            for draw, (line, p), rows, prediction in predicted:
                n, chance = len(rows), prediction.probability
                if not np.isfinite(prediction.cells).all():
                    raise Diverged(f"{method}-{trained_with}: predicts numbers that are not finite; train with a smaller --lr")
                seed = f"{trained_with}.{draw}" if config.draws > 1 else str(trained_with)
                nothing = np.full(n, np.nan)
                if chance is not None:
                    nothing = (chance <= 0.5).all(1) if config.select == "threshold" else (1 - chance).prod(1)                 # (n,)
                    report.extend(retrieval_rows(model, method, seed, dataset.cell_lines[line], p, chance))
                yield prediction.cells, {"method": [method] * n, "seed": [seed] * n, "cell_line": [dataset.cell_lines[line]] * n,
                                         "perturbation": [dataset.perturbations[p]] * n, "control_cell": rows,
                                         "nothing_selected": nothing.astype(np.float32)}, {}

    data.write_anndata(folder / "predictions.h5ad", dataset.genes, blocks())
    write_csv(folder / "retrieval.csv", RETRIEVAL_COLUMNS, report)


RETRIEVAL_COLUMNS = ("method", "seed", "cell_line", "perturbation", "rank", "candidate", "similarity", "probability", "selected")


def retrieval_rows(model, method, seed, cell_line, perturbation, probability):
    """What became of a condition's candidates over its n cells: mean probability, and share of cells that rather use it than not.

    probability: (n, K) -> K rows of RETRIEVAL_COLUMNS, most similar candidate first.
    """
    used = (probability > 0.5).mean(0)                                                             # (K,)
    candidates, similarity = model.candidates[perturbation].tolist(), model.similarity[perturbation].tolist()
    return [(method, seed, cell_line, model.perturbations[perturbation], rank + 1, model.perturbations[candidates[rank]],
             f"{similarity[rank]:.6f}", f"{probability[:, rank].mean():.6f}", f"{used[rank]:.6f}")
            for rank in range(len(candidates)) if candidates[rank] >= 0]


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------

# What `python ptrag.py` without data runs: the same method, small enough for about a minute on two cores.
DEMO = dict(split="cell-line:simD", steps=400, lr=2e-3, sets=16, cells=32, top_k=8, hidden=64, layers=2, heads=4, head_dim=16,
            feed_forward=128, validate_every=50)


PREDICTION_OPTIONS = {"predict", "cell_line", "cells", "model", "output", "method", "select", "seed", "device", "data", "genept", "control",
                      "perturbation_column", "cell_line_column", "batch_column"}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the nearest option's name for one that does not exist."""

    def error(self, message):
        raise InputError(message)


def parse(arguments):
    """Command line -> {field: value} of the options given. InputError for an unknown option or a value of the wrong type."""
    parser = Parser(prog="ptrag.py", allow_abbrev=False, argument_default=argparse.SUPPRESS, formatter_class=argparse.RawTextHelpFormatter,
                    description="Trains PT-RAG and the methods it is compared with, predicts held-out perturbations, prints the table.",
                    epilog="Without --data a simulation is run with these instead: " + ", ".join(f"{k} {v}" for k, v in DEMO.items()))
    for f in fields(Config):
        flags = [f"--{f.name.replace('_', '-')}"] + (["-o"] if f.name == "output" else [])
        kind = type(f.default)
        if kind is bool:
            parser.add_argument(*flags, action="store_true", help=f.metadata["help"])
        else:
            shown = f" (default {f.default})" if f.default != "" else ""
            parser.add_argument(*flags, type=kind, metavar="|".join(f.metadata.get("choices", ())) or kind.__name__.upper(),
                                help=f.metadata["help"] + shown)
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        raise InputError(f"unknown option {unknown[0]}{suggest(unknown[0], known)}; python ptrag.py --help lists all")
    return vars(given)


def check_values(config):
    """Raises InputError, in one line, for the first field whose value alone cannot be used."""
    for f in fields(config):
        value, limits, flag = getattr(config, f.name), f.metadata, f"--{f.name.replace('_', '-')}"
        if "choices" in limits and value not in limits["choices"]:
            raise InputError(f"{flag} {value}: must be one of {', '.join(limits['choices'])}{suggest(value, limits['choices'])}")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{flag} {value}: must be a finite number")
        if "low" in limits and value < limits["low"]:
            raise InputError(f"{flag} {value}: must be at least {limits['low']}")
        if "high" in limits and value > limits["high"]:
            raise InputError(f"{flag} {value}: must be at most {limits['high']}")
        if "above" in limits and value <= limits["above"]:
            raise InputError(f"{flag} {value}: must be above {limits['above']}")
    for method in methods_of(config):
        if method not in METHODS:
            raise InputError(f"--method {method}: must be among {', '.join(METHODS)}{suggest(method, METHODS)}")
    check_list("--method", methods_of(config))
    if config.seeds:
        if not all(seed.strip().isdigit() and int(seed) < 2**31 for seed in config.seeds.split(",")):
            raise InputError(f"--seeds {config.seeds}: must be whole numbers from 0, separated by commas, as in 0,1,2")
        check_list("--seeds", seeds_of(config))


def check(config):
    """Raises InputError, in one line, for the first value or combination of values that cannot be used here and now; reads no data."""
    check_values(config)
    if config.draws > 1 and config.select != "sample":
        raise InputError(f"--draws {config.draws} goes with --select sample: {config.select} gives the same cells every time")
    if config.rotary and config.head_dim % 2:
        raise InputError(f"--rotary turns pairs of numbers: --head-dim {config.head_dim} must be even")
    for name in ("data", "genept"):
        if getattr(config, name) and not Path(getattr(config, name)).exists():
            raise InputError(f"--{name} {getattr(config, name)}: no such file")
    if not config.data and config.genept:
        raise InputError("--genept goes with --data: the simulation has embeddings of its own")
    rule, _, what = config.split.partition(":")
    if not (rule in ("cell-line", "perturbation") and what) and not config.split.endswith(".toml"):
        raise InputError(f"--split {config.split}: must be cell-line:NAME, perturbation:FOLD or a FILE.toml")
    if config.split.endswith(".toml") and not Path(config.split).exists():
        raise InputError(f"--split {config.split}: no such file")
    check_device(config.device)
    if config.name and (Path(config.name).name != config.name or config.name in (".", "..")):
        raise InputError(f"--name {config.name}: must be a plain name, the run is written to runs/NAME")
    if not Path(config.output).parent.is_dir() or Path(config.output).is_dir():
        raise InputError(f"--output {config.output}: must be a file in a folder that exists")
    if config.predict and not (config.model and config.cell_line):
        raise InputError("--predict needs --model runs/NAME and --cell-line LINE")
    if not config.predict and (config.model or config.cell_line):
        raise InputError(f"--{'model' if config.model else 'cell-line'} goes with --predict GENE,GENE")
    if config.model and not (Path(config.model) / "config.json").is_file():
        raise InputError(f"--model {config.model}: not the folder of a run (no config.json in it)")
    if config.output != Config.output and not config.predict:
        raise InputError("--output goes with --predict GENE,GENE: a run is written to runs/NAME")


def check_list(flag, values):
    """Raises InputError if a value is given twice."""
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise InputError(f"{flag}: {twice[0]} is given twice")


def check_device(name):
    """Raises InputError unless the device exists here."""
    kind, _, number = name.partition(":")
    if kind not in ("", "cpu", "cuda") or (number and not number.isdigit()):
        raise InputError(f"--device {name}: must be cpu, cuda or cuda:N")
    if kind == "cuda" and (not torch.cuda.is_available() or int(number or 0) >= torch.cuda.device_count()):
        raise InputError(f"--device {name}: there is no such device here; --device cpu always works")


def configure(given):
    """The options given -> (Config, folder of the run or None for --predict). A resumed run takes its configuration from its folder."""
    if "resume" in given:
        folder = Path(given["resume"])
        check_values(replace(Config(), **given))
        if not (folder / "config.json").is_file():
            raise InputError(f"--resume {folder}: not the folder of a run (no config.json in it)")
        stored = read_config(folder)
        may_change = {"resume", "steps", "device", "checkpoint_every", "checkpoint_minutes", "compile"}
        changed = [f"--{name.replace('_', '-')} {getattr(stored, name)} -> {value}" for name, value in given.items()
                   if name not in may_change and value != getattr(stored, name)]
        if changed:
            raise InputError(f"{folder}: cannot be resumed with other options: {'; '.join(changed)}")
        config = replace(stored, **{**given, "resume": ""})
        check(replace(config, name=""))
        if config.steps < stored.steps:
            raise InputError(f"{folder}: was started for --steps {stored.steps}; resume with as many or more")
        return config, folder
    if "data" not in given and "predict" not in given:
        given = {**DEMO, **given}
    if "predict" in given:
        useless = sorted(set(given) - PREDICTION_OPTIONS)
        if useless:
            raise InputError(f"--{useless[0].replace('_', '-')} goes with training, not with --predict")
        given = {"cells": 500, **given}
    config = replace(Config(), **given)
    check(config)
    if config.predict:
        return config, None
    folder = Path("runs") / (config.name or free_name(Path("runs"), config.data))
    if folder.exists() and processes()[0] == 0:
        raise InputError(f"{folder}: exists; choose another --name, or continue it with --resume {folder}")
    return config, folder


def free_name(runs, data_file):
    """The first of NAME-1, NAME-2, ... that is free in the folder of runs; NAME is that of the data."""
    stem = Path(data_file).stem if data_file else "simulated"
    return next(name for name in (f"{stem}-{i}" for i in range(1, 10**9)) if not (runs / name).exists())


def read_config(folder):
    """The Config of runs/NAME. InputError if its config.json is not one."""
    path = Path(folder) / "config.json"
    try:
        config = Config(**json.loads(path.read_text()))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: not the configuration of a run ({str(error).splitlines()[0]})") from None
    check_values(config)                                                                           # its files may have moved since
    return config


def processes():
    """Rank of this process and number of processes, as torchrun tells them; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def run_training(config, folder):
    """Trains, predicts and evaluates: everything below runs/NAME."""
    import evaluate
    started = time.monotonic()
    rank, ranks = processes()
    if config.sets % ranks:
        raise InputError(f"--sets {config.sets} cannot be shared equally by {ranks} processes")
    dataset, split = open_data(config)
    if not split.test:
        raise InputError(f"--split {config.split}: leaves no test condition in {dataset.name}")
    for method in methods_of(config):                                                              # a pool too small shows before training
        build_model(replace(config, method=method), dataset, split)
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "config.json", (json.dumps(asdict(config), indent=1) + "\n").encode())
        for note in (*dataset.notes, *split.notes):
            print(note)
        print(f"{dataset.name}: {len(dataset.cell_line):,} cells, {len(dataset.genes):,} genes, {len(dataset.cell_lines)} cell lines; "
              f"{config.split}: {len(split.train)} conditions train, {len(split.validation)} validate, {len(split.test)} test; "
              f"writing {folder}/")
    models = train_all(config, folder, dataset, split, rank, ranks)
    if rank == 0:
        write_predictions(folder, models, dataset, split, config)
        evaluate.evaluate_runs([str(folder)], dataset, split)
        print(f"{time.monotonic() - started:.0f} s in all")


def run_prediction(config, method=None):
    """Predicts cells for genes, perturbed in the data or not, writes them as AnnData and prints what changes most."""
    import data
    stored = read_config(config.model)
    model = load(config.model, method).to(device_of(config.device))
    model.select = config.select
    genept = config.genept or (stored.genept if Path(stored.genept).is_file() else "")
    if config.data:                                                                                # all its genes: the model's among them
        dataset = data.load(config.data, genept or None, config.perturbation_column or None,
                            config.cell_line_column or None, config.batch_column or None, config.control or None, hvg=sys.maxsize,
                            need_embeddings=False)
        for note in dataset.notes:
            print(note)
    else:
        dataset = open_data(stored)[0]
    if config.cell_line not in dataset.cell_lines:
        raise InputError(f"--cell-line {config.cell_line}: {dataset.name} has {', '.join(dataset.cell_lines)}")
    line = dataset.cell_lines.index(config.cell_line)
    genes = model.perturbations[1:] if config.predict == "all" else [gene.strip() for gene in config.predict.split(",")]
    check_list("--predict", genes)
    learn_genes(model, dataset, genes)

    controls = dataset.cells(line, 0)                                                              # (m,)
    rng = np.random.default_rng(config.seed)
    rows = np.sort(rng.choice(controls, config.cells, replace=config.cells > len(controls)))       # (n,)
    control = align_genes(dataset.expression[rows], dataset.genes, model.genes, dataset.name)      # (n, G)
    gem_group = gem_group_codes(model, dataset, rows)
    neighbours = {}

    def blocks():
        for gene in genes:
            prediction = predict(model, control, gene, gem_group, seed=config.seed)
            neighbours[gene] = used_candidates(model, gene, prediction.probability)
            print(describe(model, gene, config.cell_line, prediction.cells.mean(0) - control.mean(0), neighbours[gene]))
            labels = {"perturbation": [gene] * len(rows), "cell_line": [config.cell_line] * len(rows), "control_cell": rows}
            yield prediction.cells, labels, {"control": control}

    about = {"neighbours": neighbours, "model": {"method": model.method, "run": config.model}}     # filled while the cells are written
    data.write_anndata(config.output, model.genes, blocks(), about)
    print(f"wrote {config.output}: {len(genes)} x {len(rows)} predicted cells")


def align_genes(expression, genes, wanted, name):
    """Columns of expression (n, len(genes)) in the order of the `wanted` genes: (n, G). A gene that is missing counts as zero and is named.

    InputError if fewer than four fifths of the wanted genes are there.
    """
    column = {gene: i for i, gene in enumerate(genes)}
    missing = [gene for gene in wanted if gene not in column]
    if len(missing) > 0.2 * len(wanted):
        raise InputError(f"{name}: has {len(wanted) - len(missing)} of the model's {len(wanted)} genes, too few to predict from")
    if missing:
        print(f"{name}: {len(missing)} of the model's {len(wanted)} genes are missing and count as zero: {', '.join(missing)}")
    aligned = np.zeros((len(expression), len(wanted)), np.float32)
    present = [i for i, gene in enumerate(wanted) if gene in column]
    aligned[:, present] = expression[:, [column[wanted[i]] for i in present]]
    return aligned


def learn_genes(model, dataset, genes):
    """Adds the genes that the model does not know but the data have an embedding for. InputError, with near names, for any other."""
    new = [gene for gene in genes if gene not in model.perturbations[1:]]
    known = {gene: i for i, gene in enumerate(dataset.embedding_genes)}
    for gene in new:
        if gene not in known:
            near = suggest(gene, [*model.perturbations[1:], *known])
            raise InputError(f"--predict {gene}: no embedding in the model or in {dataset.name}{near}; --genept FILE adds some")
    if new:
        add_perturbations(model, new, dataset.embeddings[[known[gene] for gene in new]])


def gem_group_codes(model, dataset, rows):
    """The model's codes of the control cells' gem groups (n,); a group it never saw counts as its first."""
    place = {group: i for i, group in enumerate(model.gem_groups)}
    return np.array([place.get(dataset.batches[code], 0) for code in dataset.batch[rows]])


def used_candidates(model, gene, probability):
    """Candidates of a gene, most similar first, and the mean probability over the cells to use each; empty without retrieval."""
    if not hasattr(model, "candidates"):
        return {"candidates": [], "similarity": np.zeros(0), "probability": np.zeros(0)}
    query = model.perturbations.index(gene)
    candidates = [model.perturbations[i] for i in model.candidates[query].tolist() if i >= 0]
    mean = np.full(len(candidates), np.nan) if probability is None else probability.mean(0)[:len(candidates)]
    return {"candidates": candidates, "similarity": model.similarity[query, :len(candidates)].cpu().numpy(), "probability": mean}


def describe(model, gene, cell_line, change, neighbours):
    """A few lines on a prediction: the ten genes whose mean changes most (G,), in log1p units, and the neighbours used most."""
    most = np.argsort(-np.abs(change), kind="stable")[:10]
    lines = [f"{gene} in {cell_line}", "  changes most: " + ", ".join(f"{model.genes[i]} {change[i]:+.2f}" for i in most)]
    if neighbours["candidates"]:
        order = np.argsort(-np.nan_to_num(neighbours["probability"]), kind="stable")[:10]
        lines.append("  neighbours used: " + ", ".join(f"{neighbours['candidates'][i]} {neighbours['probability'][i]:.2f}" for i in order))
    return "\n".join(lines)


def main(arguments=None):
    """The command line: 0 done, 1 the numbers diverged, 2 something given cannot be used, 130 stopped by Ctrl-C."""
    from data import DataError
    folder = None
    try:
        config, folder = configure(parse(sys.argv[1:] if arguments is None else arguments))
        if processes()[1] > 1:
            torch.distributed.init_process_group("nccl" if torch.cuda.is_available() and config.device != "cpu" else "gloo")
        if config.predict:
            run_prediction(config, None if config.method == Config.method else config.method)
        else:
            run_training(config, folder)
        return 0
    except (InputError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or folder or ''}: {error.strerror or error}", file=sys.stderr)
        return 2
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (Stopped, KeyboardInterrupt):
        how = f"; python ptrag.py --resume {folder} continues" if folder and list(folder.glob("checkpoint-*.pt")) else ""
        print(f"\nstopped{how}", file=sys.stderr)
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    import ptrag                                                                                   # the copy that evaluate.py imports
    sys.exit(ptrag.main())
