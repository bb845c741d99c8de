"""PT-RAG in one file: retrieval-augmented prediction of how cells respond to a perturbation.

Given control cells of a cell line and the name of a gene, (1) look up the K genes whose text
embeddings are most similar, (2) let every cell decide, candidate by candidate, which to use, and
(3) generate the perturbed cells from what it chose with a set transformer; all of it trained
together on the energy distance between predicted and real cells.

    python ptrag.py                                               on simulated data, a minute or two
    python ptrag.py --data replogle.h5 --split cell-line:jurkat

Source: Di Francesco, Rubbi, Lio: PT-RAG, arXiv 2603.07233. The method, in the paper's order, ends
with `train`. Then come the distances that compare populations, prediction, and what a run needs.
Copied anywhere with torch and numpy the file works; runs need data.py and evaluate.py beside it.

Letters in shapes: B sets in a batch, S cells in a set, G genes, K candidates, h hidden size,
E embedding size, P perturbations (index 0 is the control), N genes in the retrieval pool; in the
distances n and m points of d dimensions.
"""
from __future__ import annotations

import argparse
import contextlib
import csv
import difflib
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

METHODS = ("state", "state-genept", "vanilla-rag", "ptrag", "ptrag-expected")


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line: what, and what to do."""
    exit_status = 2


# ---- Stage 1: retrieve, once for every perturbation --------------------------------------------
def retrieve(embeddings, pool, k, how="nearest", seed=0):
    """The k genes of the pool most similar to each perturbation, by cosine of their embeddings.

    embeddings: (P, E) float, a zero row where a perturbation has none (the control)
    pool:       (N,) int64, the distinct genes that can be retrieved, ascending
    how:        "nearest"; "random" draws k from the seed, "least" takes the least similar
    returns     candidates (P, k) int, best first, and their similarity (P, k) float

    Never retrieved are the perturbation itself and genes without an embedding; ties go to the lower
    index. A perturbation without an embedding retrieves nothing: its candidates are -1, to clamp
    and mask. Raises InputError if the pool is too small.
    """
    if how not in ("nearest", "random", "least"):
        raise ValueError(f"how {how!r}: must be nearest, random or least")
    has_embedding = (embeddings != 0).any(1)  # (P,)
    pool = pool[has_embedding[pool]]  # (N,)
    in_pool = torch.isin(torch.arange(len(embeddings), device=pool.device), pool)  # (P,)
    usable = len(pool) - in_pool.long()  # (P,), a query does not retrieve itself
    if has_embedding.any() and (fewest := int(usable[has_embedding].min())) < k:
        raise InputError(f"--top-k {k}: the pool has {fewest} usable genes: ask for no more "
                         "(less with --hard-negatives) or widen the --pool")
    unit = F.normalize(embeddings.double(), dim=1)  # (P, E)
    generator = torch.Generator(embeddings.device).manual_seed(seed)
    candidates = torch.full((len(embeddings), k), -1, device=embeddings.device)
    similarity = embeddings.new_zeros(len(embeddings), k)
    for queries in has_embedding.nonzero().flatten().split(1024):
        cosine = (unit[queries] @ unit[pool].T).round(decimals=9)  # (Q, N), equal genes tie
        score = cosine - 1e-15 * torch.arange(len(pool), device=pool.device)  # below the rounding
        if how == "random":
            score = torch.rand(cosine.shape, generator=generator, device=cosine.device)
        score = -score if how == "least" else score
        best = score.masked_fill(queries[:, None] == pool, -math.inf).topk(k).indices  # (Q, k)
        candidates[queries] = pool[best]
        similarity[queries] = cosine.gather(1, best).to(similarity.dtype)
    return candidates, similarity


# ---- Stage 2: select, for every cell and candidate ---------------------------------------------
class Selection(NamedTuple):
    """What stage 2 decided for B sets of S cells with K candidates."""
    weights: torch.Tensor        # (B, S, K), 0 or 1 where drawn
    logits: torch.Tensor | None  # (B, S, K, 2), the second meaning "use it"; None with "all"
    probability: torch.Tensor    # (B, S, K), with which a draw selects: sigmoid(l_1 - l_0)


def gumbel_noise(shape, device=None):
    """Standard Gumbel noise: -log(-log(u)), u uniform, inverts its distribution exp(-exp(-x))."""
    return -torch.rand(shape, device=device).clamp_(min=1e-37).log_().neg_().log_()


def straight_through(logits, temperature, noise):
    """Straight-through Gumbel-Softmax of two outcomes: 0 or 1 forward, the soft weight's gradient.
    logits, noise: (..., 2) -> weights (...); Jang, Gu, Poole 2017. Softmax of two is a sigmoid."""
    soft = torch.sigmoid((logits + noise).diff(dim=-1)[..., 0] / temperature)
    hard = (soft > 0.5).to(soft.dtype)
    return hard + (soft - soft.detach())


def dropout_mask(shape, p, device=None):
    """Mask that keeps with probability 1 - p, p at most 0.9: a random byte an element, eight from
    one draw, against 256 p rounded at random. F.dropout takes ten times as long."""
    if p == 0:
        return torch.ones(shape, dtype=torch.bool, device=device)
    count, threshold = math.prod(shape), (256 * p + torch.rand(())).to(torch.uint8)
    draws = torch.empty(-(-count // 8), dtype=torch.int64, device=device).random_(-2**63, None)
    return draws.view(torch.uint8)[:count].view(shape) >= threshold


class Selector(nn.Module):
    """Which candidates does each cell use? For cell s, query p and candidate k, all of size h:

        z_sk = LayerNorm([c_s; p; p_k])                                       (S, K, 3h)
        l_sk = MLP(z_sk), divided by their standard deviation over the set    (S, K, 2)
        w_sk = straight-through Gumbel-Softmax(l_sk), 0 or 1                  (S, K)
        u_s  = sum_k w_sk (z_sk Wv + bv)                                      (S, h)

    No z_sk is ever built. LayerNorm takes off the mean, multiplies by r_sk, one over the standard
    deviation, and by its gain g, and adds its shift t. So for a linear map W that reads z_sk (the
    MLP's first layer and Wv; W g: its columns scaled by g)

        W z_sk + b = r_sk (W'_c c_s + W'_p p + W'_k p_k) + W t + b,  W' = W g, rows less their mean

    one product per cell, per query and per candidate instead of one per pair: taking the mean off
    the rows of W g is taking it off [c_s; p; p_k]. Only the MLP's second half sees every pair.

    The division ties a set together (no padding, S K > 1) and bounds selection: with logits of
    variance 1 the margin's square (l_1 - l_0)^2, at most twice the sum of the squares about their
    mean, is 4 at most on average. So the mean probability, whatever the penalty, lies between
    sigmoid(-2) = 12 % and 88 %.
    """

    def __init__(self, hidden, temperature=0.5, dropout=0.1):
        super().__init__()
        if not 0 <= dropout <= 0.9:
            raise ValueError(f"dropout {dropout}: must be from 0 to 0.9")
        self.norm = nn.LayerNorm(3 * hidden)  # read by `separate`, never called
        self.score_in = nn.Linear(3 * hidden, hidden)
        self.score_out = nn.Linear(hidden, 2)
        self.value = nn.Linear(3 * hidden, hidden)
        self.temperature, self.dropout = temperature, dropout

    def forward(self, cell, query, candidate, select=None, noise=None):
        """cell (B, S, h), query (B, h), candidate (B, K, h) -> context (B, S, h), Selection

        select: "sample" (draw), "threshold" (use where likelier than not), "expected" (weigh by
                probability), "all" (no stage 2); None: "sample" in training mode, else "expected"
        noise:  (B, S, K, 2) for "sample", else drawn
        """
        select = select or ("sample" if self.training else "expected")
        parts = cell[:, :, None], query[:, None, None], candidate[:, None]  # [c_s; p; p_k]
        mean = sum(part.mean(-1) for part in parts) / 3  # (B, S, K), as LayerNorm's
        square = sum(part.square().mean(-1) for part in parts) / 3
        r = ((square - mean * mean).clamp(min=0) + self.norm.eps).rsqrt()  # (B, S, K)
        if select == "all":
            logits, weights, probability = None, torch.ones_like(r), torch.ones_like(r)
        else:
            logits = self.score(cell, query, candidate, r)  # (B, S, K, 2)
            logits = logits / logits.std(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)  # of a set
            probability = torch.sigmoid(logits[..., 1] - logits[..., 0])  # (B, S, K)
            if select == "sample":
                noise = gumbel_noise(logits.shape, logits.device) if noise is None else noise
                weights = straight_through(logits, self.temperature, noise.to(logits))  # (B, S, K)
            elif select in ("threshold", "expected"):
                weights = probability if select == "expected" else (probability > 0.5).to(r.dtype)
            else:
                raise ValueError(f"select {select!r}: must be sample, threshold, expected or all")
        per_cell, per_candidate, constant = self.separate(self.value, cell, query, candidate)
        scaled = weights * r  # (B, S, K)
        context = (scaled.sum(-1, keepdim=True) * per_cell + scaled @ per_candidate
                   + weights.sum(-1, keepdim=True) * constant)  # (B, S, h)
        return context, Selection(weights, logits, probability)

    def separate(self, linear, cell, query, candidate):
        """Parts of linear(z_sk): W'_c c_s + W'_p p (B, S, h), W'_k p_k (B, K, h), W t + b (h,)."""
        weight = linear.weight * self.norm.weight  # (h, 3h), W g
        of_cell, of_query, of_candidate = (weight - weight.mean(1, keepdim=True)).chunk(3, dim=1)
        per_cell = F.linear(cell, of_cell) + F.linear(query, of_query)[:, None]
        return per_cell, F.linear(candidate, of_candidate), linear(self.norm.bias)

    def score(self, cell, query, candidate, r):
        """The MLP of every pair, (B, S, K, 2), computed again in the backward pass, not kept: on a
        CPU some cells of every set at a time, whose pairs stay in the cache, on a GPU all."""
        per_cell, per_candidate, constant = self.separate(self.score_in, cell, query, candidate)
        dropout = self.dropout if self.training else 0.0
        keep = dropout_mask((*r.shape, len(constant)), dropout, r.device)  # (B, S, K, h)

        def score_pairs(cells, r, keep):  # (B, s, h), (B, s, K), (B, s, K, h)
            z = r[..., None] * (cells[:, :, None] + per_candidate[:, None]) + constant
            weight = self.score_out.weight / (1 - dropout)  # what is dropped is made up for
            return F.linear(F.gelu(z) * keep, weight, self.score_out.bias)  # (B, s, K, 2)

        at_once = r.shape[1] if r.is_cuda else max(1, 2**19 // keep[:, 0].numel())  # 2 MB of z
        parts = zip(*(part.split(at_once, dim=1) for part in (per_cell, r, keep)))
        logits = [checkpoint(score_pairs, *part, use_reentrant=False) for part in parts]
        return torch.cat(logits, dim=1)


# ---- Vanilla RAG, the paper's baseline: attend to all candidates instead ------------------------
class CrossAttention(nn.Module):
    """Query (c_s + p) Wq + bq; keys and values linear maps of a linear projection of the
    candidates' embeddings; softmax scaled by sqrt(h)."""

    def __init__(self, embedding_dim, hidden):
        super().__init__()
        self.project = nn.Linear(embedding_dim, hidden)
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)

    def forward(self, cell_and_query, candidate):
        """cell_and_query (B, S, h), embeddings of the candidates (B, K, E) -> context (B, S, h)"""
        query, candidate = self.query(cell_and_query), self.project(candidate)  # (B, K, h)
        return F.scaled_dot_product_attention(query, self.key(candidate), self.value(candidate))


# ---- Generator: a transformer over the set of cells ---------------------------------------------
def rotate(x, theta=10_000.0):
    """Turns (x_i, x_{i + d/2}) of the cell at position t by t theta^(-2i/d). x (B, heads, S, d)"""
    S, d = x.shape[-2:]
    speed = theta ** (-torch.arange(0, d, 2, device=x.device, dtype=torch.float32) / d)  # (d/2,)
    angle = torch.arange(S, device=x.device, dtype=torch.float32)[:, None] * speed  # (S, d/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Block(nn.Module):
    """One transformer block over the cells of a set: attention, then SwiGLU; no biases."""

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
        qkv = self.qkv(self.attention_norm(x)).view(B, S, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, S, d)
        if self.rotary:
            q, k = rotate(q), rotate(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # (B, heads, S, d)
        x = x + self.attention_out(y.transpose(1, 2).reshape(B, S, -1))
        gate, up = self.gate_up(self.feed_forward_norm(x)).chunk(2, dim=-1)  # (B, S, feed_forward)
        return x + self.down(F.silu(gate) * up)


class Generator(nn.Module):
    """A stack of blocks without positions or mask: permuting the cells permutes the output only,
    unless `causal` or `rotary`, which the paper's runs used."""

    def __init__(self, hidden, layers, heads, head_dim, feed_forward, causal=False, rotary=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(hidden, heads, head_dim, feed_forward, causal, rotary)
                                    for _ in range(layers))
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)  # every block starts near the identity

    def forward(self, x):
        """x (B, S, h) -> (B, S, h)"""
        x = x.to(self.norm.weight.dtype)  # with --bf16 the sum over blocks stays float32
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class PTRAG(nn.Module):
    """Control cells and a perturbation in, perturbed cells out: PT-RAG and what it is compared to.

    method          input u of the generator
    state           c + p, p encodes the perturbation one-hot
    state-genept    c + p, p encodes the perturbation's text embedding
    vanilla-rag     attention of c + p to all K candidates
    ptrag           the selected candidates' context (Selector)
    ptrag-expected  the same, trained without the draw: every candidate weighed by its probability
    """

    def __init__(self, config, genes, perturbations, embeddings, pool, gem_groups=("all",)):
        """genes, perturbations, gem_groups: names, the control the first of the P perturbations;
        embeddings (P, E) float, zero for the control; pool (N,) int, the genes to retrieve."""
        super().__init__()
        self.config, self.genes = config, list(genes)
        self.perturbations, self.gem_groups = list(perturbations), list(gem_groups)
        if config.method == "state":
            embeddings = torch.eye(len(embeddings))
            embeddings[0] = 0  # the control, as in every embedding
        self.register_buffer("embeddings", embeddings)  # (P, E)
        E, h, G = embeddings.shape[1], config.hidden, len(genes)
        self.cell_encoder = nn.Linear(G, h)
        self.perturbation_encoder = nn.Linear(E, h)
        self.retrieves = config.method in ("vanilla-rag", "ptrag", "ptrag-expected")
        if config.method == "vanilla-rag":
            self.attention = CrossAttention(E, h)
        elif self.retrieves:
            self.selector = Selector(h, config.temperature, config.dropout)
            if config.select == "all":  # nothing scores, so nothing to train
                self.selector.score_in.requires_grad_(False)
                self.selector.score_out.requires_grad_(False)
        self.retrieve_from(pool)
        self.gem_group = nn.Embedding(len(gem_groups), h) if config.batch_covariate else None
        self.generator = Generator(h, config.layers, config.heads, config.head_dim,
                                   config.feed_forward, config.causal, config.rotary)
        self.output = nn.Linear(h, G)
        if config.freeze_generator:
            self.generator.requires_grad_(False)
            self.output.requires_grad_(False)

    def retrieve_from(self, pool, hard_negatives=0.0):
        """Makes the table of candidates from a pool (N,). A share of them, the most similar ones,
        can give way to the least similar genes of the pool, the most dissimilar first."""
        self.register_buffer("pool", pool)
        if not self.retrieves:
            return
        K, how, seed = self.config.top_k, self.config.candidates, self.config.seed
        candidates, similarity = retrieve(self.embeddings, pool, K, how, seed)
        if hard_negatives:
            count = max(1, round(hard_negatives * K))
            least = retrieve(self.embeddings, pool, K + count, "least")  # none stands twice
            candidates[:, :count], similarity[:, :count] = (table[:, :count] for table in least)
        self.register_buffer("candidates", candidates)  # (P, K), -1 where nothing is retrieved
        self.register_buffer("similarity", similarity)  # (P, K)

    def forward(self, control, perturbation, gem_group=None, noise=None):
        """control (B, S, G) float, log1p; perturbation (B,) int; gem_group (B, S) int, read only
        with the batch covariate; noise (B, S, K, 2) to use instead of drawn Gumbel noise ->
        the perturbed cells (B, S, G), and the Selection (None without stage 2)"""
        c = self.cell_encoder(control)  # (B, S, h)
        p = self.perturbation_encoder(self.embeddings[perturbation])  # (B, h)
        u, selection = c + p[:, None], None  # (B, S, h)
        if self.retrieves:
            candidates = self.candidates[perturbation]  # (B, K)
            found = (candidates[:, :1, None] >= 0).to(c.dtype)  # (B, 1, 1), 0 for the control
            embeddings = self.embeddings[candidates.clamp(min=0)]  # (B, K, E)
            if self.config.method == "vanilla-rag":
                context = self.attention(u, embeddings)  # (B, S, h)
            else:
                context, selection = self.choose(c, p, embeddings, found, noise)
            u = context * found + (u if self.config.keep_query else 0)  # 0: no context, no change
        if self.gem_group is not None:
            u = u + self.gem_group(gem_group)
        y = self.generator(u)  # (B, S, h)
        return F.relu(self.output(y + c)), selection  # (B, S, G): cell + change, log1p >= 0

    def choose(self, c, p, embeddings, found, noise):
        """Stage 2 on candidates with embeddings (B, K, E); a query that found none uses none."""
        select = self.config.select  # at test time; "all" in training, too
        if select != "all" and self.config.method == "ptrag-expected":
            select = "expected"
        elif select != "all" and self.training:
            select = "sample"
        candidate = self.perturbation_encoder(embeddings)  # (B, K, h)
        with torch.autocast(c.device.type, enabled=False):  # bfloat16 is too coarse to choose by
            c, p, candidate = (part.to(self.output.weight.dtype) for part in (c, p, candidate))
            context, (weights, logits, probability) = self.selector(c, p, candidate, select, noise)
        return context, Selection(weights * found, logits, probability * found)


# ---- Loss: between populations, so between sets of cells without an order ----------------------
def from_products(x_square, y_square, product):
    """|x - y| (B, n, m) from |x|^2 (B, n), |y|^2 (B, m) and x.y: |x - y|^2 = |x|^2 + |y|^2 - 2 x.y.
    Below its rounding error zero, and so is the gradient: coincident points are safe."""
    size = x_square[:, :, None] + y_square[:, None]  # (B, n, m)
    square = size - 2 * product
    coincident = square <= 8 * torch.finfo(size.dtype).eps * size  # false for nan, which stays nan
    return square.masked_fill(coincident, 1).sqrt().masked_fill(coincident, 0)


def energy_distance(x, y):
    """E|X - Y| - E|X - X'| / 2 - E|Y - Y'| / 2, half the classical energy distance, over all pairs,
    the diagonal too: never negative. x (B, n, d) predicted, y (B, m, d) or (1, m, d) real -> (B,).
    No gradient to y.
    """
    y = y.detach()
    center = y.mean(1, keepdim=True)  # (B, 1, d)
    x, y = x - center, y - center  # once for all three saves a tenth of a step
    xx, xy, yy = x @ x.transpose(1, 2), x @ y.transpose(1, 2), y @ y.transpose(1, 2)
    x_square, y_square = xx.diagonal(dim1=1, dim2=2), yy.diagonal(dim1=1, dim2=2)  # (B, n), (B, m)
    between = from_products(x_square, y_square, xy).mean((1, 2))
    within_x = from_products(x_square, x_square, xx).mean((1, 2))
    within_y = from_products(y_square, y_square, yy).mean((1, 2))
    return between - within_x / 2 - within_y / 2


# ---- Training: one loss, one loop ---------------------------------------------------------------
class Step(NamedTuple):
    """What a training step measured; tensors stay on the device until someone looks at them."""
    number: int
    energy: torch.Tensor    # (B,), energy distance of every set
    sparsity: torch.Tensor  # (), mean |w|
    norm: torch.Tensor      # (), of the gradient before clipping
    validation: float       # mean energy distance of the validation sets, nan if not measured


@dataclass
class Progress:
    """How far training has come: the step, and the best validation with the weights it had."""
    step: int = 0
    validation: float = math.inf
    best: dict | None = None


def ranks():
    """Number of this process, and of all that share every step (torchrun); (0, 1) for one alone."""
    world = torch.distributed
    return (world.get_rank(), world.get_world_size()) if world.is_initialized() else (0, 1)


def seed_torch(*numbers):
    """Seeds torch from whole numbers, mixed into the 32 bits that its CPU generator reads."""
    torch.manual_seed(int(np.random.SeedSequence([*map(int, numbers)]).generate_state(1)[0]))


def groups_of_sets(config, sets, device):
    """Slices of the sets that pass the model together: on a CPU as many cells as keep activations
    in its cache, on a GPU all. Gradients add up: only the draws differ."""
    most = max(1024, 2**20 // config.feed_forward) if device.type == "cpu" else sets * config.cells
    size = max(1, (config.group_cells or most) // config.cells)
    return [slice(first, min(first + size, sets)) for first in range(0, sets, size)]


def energies(network, batch, sets, config, device):
    """Energy distances of predicted and real cells of some sets (b,), and their Selection."""
    arrays = batch.control, batch.target, batch.perturbation, batch.gem_group
    tensors = [torch.from_numpy(array[sets]) for array in arrays]
    if device.type == "cuda":
        tensors = [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
    control, target, perturbation, gem_group = tensors  # (b, S, G), (b, S, G), (b,), (b, S)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
        prediction, selection = network(control, perturbation, gem_group)  # (b, S, G)
    return energy_distance(prediction.float(), target), selection


@torch.no_grad()
def validate(model, batches, config, device):
    """Mean energy distance over the sets of all batches, with selection as at test time."""
    model.eval()
    found = [energies(model, batch, sets, config, device)[0] for batch in batches
             for sets in groups_of_sets(config, len(batch.control), device)]  # each (b,)
    return torch.cat(found).mean().item()


def train(model, optimizer, batches, validation, config, progress):
    """Trains step by step, yields a `Step` after each, ends with the best validated weights.

    batches:    one a step, from progress.step + 1 on: control, target (B, S, G), perturbation (B,)
                and gem_group (B, S), as numpy arrays
    validation: list of such batches; if empty the last weights are kept

    loss = mean over sets of the energy distance(prediction, target) + sparsity * mean |w|. The
    gradient of |w| is zero where w = 0: the penalty pushes out selected candidates only.
    Every random number comes from (seed, step, first set of the group): started from the weights,
    the optimiser and the progress of any step it goes on as if never interrupted.
    """
    device, (rank, size) = model.output.weight.device, ranks()
    network = torch.compile(model) if config.compile else model
    network = nn.parallel.DistributedDataParallel(network) if size > 1 else network
    for batch in batches:
        progress.step += 1
        network.train()
        optimizer.zero_grad()
        B, energy, sparsity = len(batch.control), [], torch.zeros((), device=device)
        for sets in groups_of_sets(config, B, device):
            seed_torch(config.seed, progress.step, rank * B + sets.start)  # dropout, Gumbel noise
            network.require_backward_grad_sync = sets.stop == B  # processes exchange once a step
            distance, selection = energies(network, batch, sets, config, device)  # (b,)
            used = selection.weights.abs().mean() if selection is not None else 0 * sparsity
            share = len(distance) / B
            (share * (distance.mean() + config.sparsity * used)).backward()
            sparsity += share * used.detach()
            energy.append(distance.detach())
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()

        due = progress.step % config.validate_every == 0 or progress.step == config.steps
        measured = validate(model, validation, config, device) if validation and due else math.nan
        if measured < progress.validation:
            best = {name: weight.cpu().clone() for name, weight in model.state_dict().items()}
            progress.validation, progress.best = measured, best
        yield Step(progress.step, torch.cat(energy), sparsity, norm, measured)
    if progress.best is not None:
        model.load_state_dict(progress.best)


# ---- Distances between populations: for comparing, not for training ------------------------------
def pairwise_distance(x, y):
    """Euclidean distances of all pairs, x (B, n, d), y (B, m, d) -> (B, n, m), without anything of
    size n m d. Both clouds are moved by the mean of y first, which shrinks the rounding error."""
    center = y.detach().mean(1, keepdim=True)  # (B, 1, d)
    x, y = x - center, y - center
    return from_products(x.square().sum(-1), y.square().sum(-1), x @ y.transpose(1, 2))


def wasserstein_1d(x, y, p=1):
    """Exact Wasserstein-p distance of numbers, x (..., n), y (..., m) -> (...); sizes of 1 expand.

    W_p^p = integral over q in (0, 1) of |F_x^-1(q) - F_y^-1(q)|^p; the root is taken. Both quantile functions
    are steps, of width 1/n and 1/m: the integral is a sum over the union of their steps.
    """
    n, m = x.shape[-1], y.shape[-1]
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()  # 1/(n m)
    width = torch.diff(ends, prepend=ends.new_zeros(1)).to(x) / (n * m)  # (steps,)
    inside = (ends - 1).to(x.device)
    by_torch = x.is_cuda or x.requires_grad or y.requires_grad  # numpy sorts short rows ten times as fast
    x, y = (z.sort(-1).values if by_torch else torch.from_numpy(np.sort(z.numpy())) for z in (x, y))
    x, y = x[..., inside // m], y[..., inside // n]  # (..., steps)
    return ((x - y).abs() ** p @ width) ** (1 / p)


def sliced_wasserstein(x, y, p=1, directions=512, seed=0):
    """Sliced Wasserstein-p distance, (mean over random directions of W_p^p)^(1/p), and its standard error.

    x (B, n, d), y (B, m, d) or (1, m, d) -> (B,), (B,). Exact along each of at least two directions, which
    depend on the seed alone; the error is the Monte-Carlo error of the mean, carried through the root.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(x.shape[-1], directions, generator=generator, dtype=torch.float64)
    direction = F.normalize(direction, dim=0).to(x)  # (d, D)
    x, y = (x @ direction).transpose(1, 2), (y @ direction).transpose(1, 2)  # (B, D, n), (B, D, m)
    power = wasserstein_1d(x, y, p) ** p  # (B, D)
    mean, error = power.mean(1), power.std(1) / math.sqrt(directions)
    value = mean ** (1 / p)
    return value, error * value / (p * mean).clamp(min=torch.finfo(x.dtype).tiny)


@torch.no_grad()
def wasserstein(x, y, p=1, tolerance=2e-3, max_rounds=500):
    """Wasserstein-p distance of equally weighted points, (min over couplings of mean |x - y|^p)^(1/p).

    x (B, n, d), y (B, m, d) or (1, m, d) -> (B,) float64 in the unit of x, nan where `max_rounds` do not
    reach the tolerance (a point a thousand times farther away than the rest can do that). No gradient.
    Sinkhorn's iteration (Cuturi 2013): a round computes the plan exp((f_i + g_j - cost_ij) / epsilon) / (n m)
    once, finds factors of its rows in ten over-relaxed steps, u <- u^(1-r) (row sums found / wanted)^-r with
    r = 1.7, and of its columns, v, and takes their logarithms into f and g. The cost of the plan rounded to a
    coupling (Altschuler, Weed, Rigollet 2017) bounds W_p^p from above, the value of the potentials made
    feasible from below; epsilon is halved once the gap is not due to rounding. A gap under `tolerance` of the
    upper bound (or of a millionth of the largest cost: smaller distances are not resolved) ends it with the
    middle, within half that gap of the exact W_p^p. O(n m) a step, 100 to 200 steps in PCA-50 space.
    """
    y = y.expand(len(x), -1, -1)
    at_once = max(1, 2**17 // (x.shape[1] * y.shape[1]))  # problems that fit the cache
    if len(x) > at_once:
        pairs = zip(x.split(at_once), y.split(at_once))
        return torch.cat([wasserstein(*pair, p, tolerance, max_rounds) for pair in pairs])
    cost = pairwise_distance(x.double(), y.double()) ** p  # (B, n, m)
    B, n, m = cost.shape
    f, g = cost.new_zeros(B, n, 1), cost.new_zeros(B, m, 1)
    largest = cost.amax((1, 2)).clamp(min=1e-300)  # (B,)
    epsilon, upper, lower = largest, largest * math.inf, -largest * math.inf
    for _ in range(max_rounds):
        plan = (f + g.mT - cost).div_(epsilon[:, None, None]).clamp_(max=600).exp_().div_(n * m)  # (B, n, m)
        across, u, v = plan.mT.contiguous(), torch.ones_like(f), torch.ones_like(g)
        for _ in range(10):  # clamped: an empty row stays finite
            u = (u ** -0.7 * (n * (plan @ v)).clamp(1e-250, 1e250) ** -1.7).clamp(1e-100, 1e100)
            v = (v ** -0.7 * (m * (across @ u)).clamp(1e-250, 1e250) ** -1.7).clamp(1e-100, 1e100)
        plan.mul_(u).mul_(v.mT)
        f, g = f + epsilon[:, None, None] * u.log(), g + epsilon[:, None, None] * v.log()

        plan.div_((n * plan.sum(2, keepdim=True)).clamp(min=1))  # no row above 1/n
        plan.div_((m * plan.sum(1, keepdim=True)).clamp(min=1))  # no column above 1/m
        rows, columns = (1 / n - plan.sum(2)).clamp(min=0), (1 / m - plan.sum(1)).clamp(min=0)  # missing
        added = torch.einsum("bi,bij,bj->b", rows, cost, columns) / rows.sum(1).clamp(min=1e-300)
        above = (plan * cost).sum((1, 2)) + added
        feasible = (cost - f).amin(1, keepdim=True)  # (B, 1, m), the g for which f_i + g_j <= cost_ij
        below = (cost - feasible).amin(2).mean(1) + feasible.mean((1, 2))
        upper, lower = torch.minimum(upper, above), torch.maximum(lower, below)
        done = upper - lower <= tolerance * upper.clamp(min=1e-6 * largest)  # false for nan
        if (done | upper.isnan()).all():
            break
        epsilon = torch.where(~done & (added < (above - below) / 2), epsilon / 2, epsilon)
    return torch.where(done, ((upper + lower) / 2).clamp(min=0), math.nan) ** (1 / p)


# ---- Prediction ----------------------------------------------------------------------------------
class Prediction(NamedTuple):
    """cells (n, G) float, log1p; probability (n, K) of using each candidate, None without stage 2."""
    cells: np.ndarray
    probability: np.ndarray | None = None


@torch.no_grad()
def predict(model, control, perturbation, gem_group=None, set_size=None, seed=0):
    """Perturbed cells for control cells (n, G) of one line, log1p; cell i is made from control cell i.

    perturbation: name of a gene the model knows (see `add_perturbations`), or its index; gem_group: (n,) int,
    for the batch covariate; set_size: cells in a set, as in training if not given; the last one is filled up
    from the first cells. Only `select = "sample"` depends on the seed, one or several numbers. InputError.
    """
    require(np.ndim(control) == 2 and len(control) and np.shape(control)[1] == len(model.genes),
            f"control cells {np.shape(control)}: must be (cells, {len(model.genes)} genes)")
    if isinstance(perturbation, str):
        gene, known = perturbation, model.perturbations
        require(gene in known, f"{gene} is unknown; see add_perturbations", gene, known)
        perturbation = known.index(gene)
    n, device, S = len(control), model.output.weight.device, set_size or model.config.cells
    control = np.asarray(control, np.float32)
    gem_group = np.zeros(n, int) if gem_group is None else np.asarray(gem_group, int)
    rows = np.resize(np.arange(n), (-(-n // S), S))  # (B, S)
    seed_torch(*np.atleast_1d(seed))
    made = []
    for sets in groups_of_sets(replace(model.config, cells=S), len(rows), device):
        own, groups = (torch.from_numpy(part[rows[sets]]).to(device) for part in (control, gem_group))
        query = torch.full((len(own),), perturbation, device=device)  # (b,)
        perturbed, selection = model.eval()(own, query, groups)  # (b, S, G)
        made.append([perturbed.cpu(), selection.probability.cpu()] if selection else [perturbed.cpu()])
    return Prediction(*(torch.cat(part).flatten(0, 1)[:n].numpy() for part in zip(*made)))


def predict_conditions(model, dataset, conditions, config):
    """Yields (condition, control rows (n,), Prediction) of each (cell line, perturbation), with as many cells
    as it has real ones, at most `config.max_cells`; sets are filled up with further control cells."""
    import data
    for number, condition in enumerate(conditions):
        real, rows = data.evaluation_cells(dataset, condition, config.seed, config.max_cells, config.cells)
        control, gem_group, n = dataset.expression[rows], dataset.gem_group[rows], len(real)
        cells, used = predict(model, control, condition[1], gem_group, seed=(config.seed, number))
        yield condition, rows[:n], Prediction(cells[:n], None if used is None else used[:n])


def add_perturbations(model, names, embeddings):
    """Teaches a trained model genes it never saw, by name and embedding (Q, E): queries, not candidates.
    InputError for a known name, and for `state`, whose one-hot perturbations cannot be extended."""
    for name in names:
        require(name not in model.perturbations, f"the model knows the perturbation {name} already")
    require(model.config.method != "state", "state predicts only genes of its data: use another --method")
    new = torch.as_tensor(np.asarray(embeddings), dtype=torch.float32, device=model.embeddings.device)
    require(new.shape[1:] == model.embeddings.shape[1:],
            f"embeddings {tuple(new.shape)}: the model's have {model.embeddings.shape[1]} numbers a gene")
    model.embeddings, model.perturbations = torch.cat([model.embeddings, new]), [*model.perturbations, *names]
    if model.retrieves:
        candidates, similarity, P = model.candidates, model.similarity, len(model.candidates)
        model.retrieve_from(model.pool)
        model.candidates[:P], model.similarity[:P] = candidates, similarity  # random ones stay


def used_candidates(model, gene, probability=None):
    """The candidates of a gene: names, similarity (K,), and the mean over cells of probability (n, K)."""
    query = model.perturbations.index(gene)
    found = [i for i in model.candidates[query].tolist() if i >= 0] if model.retrieves else []
    mean = np.full(len(found), np.nan) if probability is None else probability.mean(0)[:len(found)]
    similarity = model.similarity[query, :len(found)].cpu().numpy() if found else np.zeros(0)
    return dict(candidates=[model.perturbations[i] for i in found], similarity=similarity, probability=mean)


def require(fact, message, name="", known=()):
    """Raises InputError with the message, and the known names closest to the name, unless the fact is one."""
    if not fact:
        lower = {k.lower(): k for k in known}
        close = ", ".join(lower[k] for k in difflib.get_close_matches(name.lower(), lower, n=3))
        raise InputError(f"{message} (did you mean {close}?)" if close else message)


# ---- Settings: every field is an option of the command line --------------------------------------
# Without --data: the same method, small enough for about a minute on one core.
DEMO = dict(method=",".join(METHODS), split="cell-line:simD", steps=1200, lr=2e-3, sets=16, cells=32, top_k=8,
            hidden=64, layers=2, heads=4, head_dim=16, feed_forward=128, validate_every=50, threads=1)

# The published experiments: a random, frozen generator that reads the cells in an order.
PAPER = dict(freeze_generator=True, layers=8, heads=12, head_dim=58, feed_forward=2784, causal=True,
             rotary=True, batch_covariate=True, select="sample", steps=50_001, validate_every=2000)
UNSEEN = dict(PAPER, sparsity=1.0, test_pool="full")
PRESETS = {"paper-cell-line": dict(PAPER, top_k=32, pool="full"),
           "paper-perturbation": dict(UNSEEN, top_k=128),
           "paper-norman": dict(UNSEEN, top_k=16, steps=10_001, validate_every=500),
           "paper-controls": dict(UNSEEN, top_k=32)}
COLUMNS = "perturbation_column", "cell_line_column", "batch_column"
FOR_PREDICTION = {"predict", "cell_line", "cells", "model", "output", "method", "select", "seed", "device",
                  "threads", "data", "genept", "control", *COLUMNS}
FOR_RESUMING = {"steps", "device", "threads", "checkpoint_every", "compile"}
LOG_COLUMNS = "method", "seed", "step", "loss", "energy", "sparsity", "validation"
POOLS, SELECT = ("train", "trainval", "full"), ("expected", "threshold", "sample", "all")


def option(default, help, *limits, group=""):
    """A field: its help, the lowest and highest value or the words it may have; `group` begins with it."""
    return field(default=default, metadata={"help": help, "limits": limits, "group": group})


@dataclass
class Config:
    """All settings of a run: the paper's, but for a smaller generator, since it is trained."""
    method: str = option("state,state-genept,vanilla-rag,ptrag", "one or several", *METHODS, group="method")
    top_k: int = option(32, "K, candidates retrieved per perturbation", 1, 10**6)
    pool: str = option("train", "retrieve genes with training cells, also validation, or all", *POOLS)
    test_pool: str = option("", "the pool at test time where it is another", "", *POOLS)
    candidates: str = option("nearest", "the nearest genes of the pool or random ones", "nearest", "random")
    select: str = option("expected", "how a trained selection is used; all: none, ever", *SELECT)
    hard_negatives: float = option(0.0, "share of candidates replaced at test by the least similar", 0, 1)
    temperature: float = option(0.5, "temperature of the Gumbel-Softmax", 1e-6, 1e6)
    sparsity: float = option(0.1, "lambda, weight of the penalty on selected candidates", 0, 1e6)
    keep_query: bool = option(False, "add cell and query to the retrieved context (not the paper's method)")
    batch_covariate: bool = option(False, "add an embedding of the control cell's gem group")
    preset: str = option("", "a published experiment; options given beside it win", "", *PRESETS)
    hidden: int = option(128, "h, hidden size", 1, 2**16, group="sizes")
    layers: int = option(8, "transformer blocks of the generator", 1, 1000)
    heads: int = option(4, "attention heads", 1, 1000)
    head_dim: int = option(32, "size of an attention head", 1, 2**16)
    feed_forward: int = option(512, "inner size of the feed-forward layers", 1, 2**18)
    dropout: float = option(0.1, "dropout inside the scorer of stage 2", 0, 0.9)
    causal: bool = option(False, "causal attention over the cells, as the paper's runs")
    rotary: bool = option(False, "rotary positions over the cells, as the paper's runs")
    freeze_generator: bool = option(False, "leave generator and output layer random, as the paper's runs")
    cells: int = option(64, "S, cells in a set; --predict: cells per gene (500)", 1, 2**24, group="training")
    sets: int = option(64, "B, sets in a batch", 1, 2**20)
    steps: int = option(50_000, "training steps of each method", 1, 10**9)
    lr: float = option(1e-3, "learning rate of Adam", 1e-12, 1e38)
    clip: float = option(10.0, "largest norm of the gradient", 1e-12, 1e38)
    validate_every: int = option(100, "steps between validations; the best model is kept", 1, 10**9)
    group_cells: int = option(0, "cells in the model at once (0: what fits the cache; GPU: all)", 0, 2**40)
    seed: int = option(0, "seed of data, split, weights and sampling", 0, 2**31 - 1)
    seeds: str = option("", "several training seeds, separated by commas; data and split stay with --seed")
    device: str = option("", "cpu, cuda or cuda:N (cuda where there is one, if not given)")
    threads: int = option(0, "processor threads (0: torch's choice)", 0, 4096)
    bf16: bool = option(False, "run the network in bfloat16 (autocast)")
    compile: bool = option(False, "compile the model with torch.compile")
    data: str = option("", "AnnData file, packed (.h5) or not; without one, a simulation", group="data")
    genept: str = option("", "gene embeddings: GenePT pickle or .npz; a packed file holds its own")
    split: str = option("perturbation:0", "cell-line:NAME, perturbation:FOLD or a split FILE.toml")
    perturbation_column: str = option("", "obs column of the perturbed gene (found by name if not given)")
    cell_line_column: str = option("", "obs column of the cell line (found by name if not given)")
    batch_column: str = option("", "obs column of the gem group or batch (found by name if not given)")
    control: str = option("", "label of the control cells (found by name if not given)")
    hvg: int = option(2000, "highly variable genes to choose where the file has no obsm/X_hvg", 2, 10**6)
    name: str = option("", "the run is written to runs/NAME (a free name if not given)", group="run")
    resume: str = option("", "runs/NAME of an interrupted run to continue")
    checkpoint_every: int = option(1000, "steps between checkpoints", 1, 10**9)
    max_cells: int = option(1000, "most cells of a condition that evaluation uses", 2, 10**9)
    predict: str = option("", "genes to predict with a trained model: A,B,C or all", group="prediction")
    cell_line: str = option("", "cell line of --predict, if there are several")
    model: str = option("", "runs/NAME of the trained model for --predict")
    output: str = option("predicted.h5ad", "file that --predict writes")


def flag(name):
    """The command line's spelling of a field."""
    return f"--{name.replace('_', '-')}"


def check(config):
    """The config itself. InputError for the first value, or combination of values, that cannot be used."""
    for f in fields(config):
        value, limits, kind = getattr(config, f.name), f.metadata["limits"], type(f.default)
        must = f"{flag(f.name)} {value}: must be"
        require(type(value) is kind or (kind, type(value)) == (float, int), f"{must} {kind.__name__}")
        if limits and kind is str:
            for word in value.split(",") if f.name == "method" else [value]:
                require(word in limits, f"{must} one of {', '.join(filter(None, limits))}", word, limits)
        elif limits:  # nan is not between them, either
            require(limits[0] <= value <= limits[1], f"{must} from {limits[0]:,} to {limits[1]:,}")
    for names in (config.method, config.seeds, config.predict):
        require(len(set(names.split(","))) == names.count(",") + 1, f"{names}: one is given twice")
    number = "(0|[1-9][0-9]{0,8})"
    require(not config.seeds or re.fullmatch(f"{number}(,{number})*", config.seeds),
            f"--seeds {config.seeds}: must be whole numbers separated by commas, as in 0,1,2")
    require(config.head_dim % 2 == 0 or not config.rotary, "--head-dim: must be even with --rotary")
    require(not config.hard_negatives or config.candidates == "nearest",
            f"--hard-negatives {config.hard_negatives}: goes with --candidates nearest")
    require(config.data or config.predict or not config.genept, f"--genept {config.genept}: goes with --data")
    require(re.fullmatch(r"(\w[\w .,+=-]*)?", config.name), f"--name {config.name}: must be a plain name")
    require(bool(config.predict) == bool(config.model), "--predict GENE,GENE goes with --model runs/NAME")
    return config


def read_config(run):
    """The Config of runs/NAME. InputError if its config.json is not one."""
    path = Path(run) / "config.json"
    require(path.is_file(), f"{run}: not the folder of a run (no config.json in it)")
    try:
        return check(Config(**json.loads(path.read_text())))
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: missing, damaged or not the configuration of a run ({error})") from None


def configure(arguments):
    """Command line -> Config, of the run to resume if there is one, then with its folder, else with None."""
    parser = argparse.ArgumentParser(
        prog="ptrag.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        description="Trains PT-RAG and what it is compared with, predicts held-out cells, prints the table.",
        epilog="Without --data a simulation is run with " + " ".join(f"{flag(n)} {DEMO[n]}" for n in DEMO))
    for f in fields(Config):
        (text, limits, heading), kind = f.metadata.values(), type(f.default)
        group = parser.add_argument_group(heading) if heading else group
        words = "|".join(filter(None, limits)) if kind is str else None
        value = {"action": "store_true"} if kind is bool else {"type": kind, "metavar": words or None}
        text += f" (default {f.default})" if f.default not in ("", False) else ""
        names = (flag(f.name), "-o") if f.name == "output" else (flag(f.name),)
        group.add_argument(*names, help=text, **value)
    parser.error = lambda message: require(False, message)
    given, unknown = parser.parse_known_args(arguments)
    for word in unknown:
        require(False, f"unknown option {word}; see --help", word, [flag(f.name) for f in fields(Config)])
    given = vars(given)
    for name in given.keys() & {"method", "seeds", "predict"}:  # lists, which may have spaces
        given[name] = ",".join(map(str.strip, given[name].split(",")))
    if "resume" in given:
        stored = read_config(folder := Path(given.pop("resume")))
        for name, value in given.items():
            before = getattr(stored, name)
            require(name in FOR_RESUMING and (name != "steps" or value >= before) or value == before,
                    f"{folder}: cannot be resumed with {flag(name)} {before} -> {value}")
        return check(replace(stored, **given)), folder
    predicts = "predict" in given
    for name, value in given.items():
        fits = name in FOR_PREDICTION if predicts else name not in ("cell_line", "model", "output")
        require(fits, f"{flag(name)} {value}: goes {'without' if predicts else 'with'} --predict GENE,GENE")
    defaults = {"cells": 500} if predicts else {} if "data" in given else DEMO
    if predicts and given.get("model"):  # selected as in its test, unless told
        defaults["select"] = read_config(given["model"]).select
    return check(replace(Config(), **{**defaults, **PRESETS.get(given.get("preset"), {}), **given})), None


# ---- Runs: files, training with checkpoints, predicting ------------------------------------------
class Diverged(RuntimeError):
    """The numbers of a run are no longer finite."""
    exit_status = 1


def load_tensors(path, kind):
    """A file of torch.save whose "format" is `kind`, on the CPU. InputError for a damaged or foreign one."""
    saved = None
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:  # whatever damage makes them raise
        if archive.testzip() is None:  # check sums, which torch.load does not look at
            saved = torch.load(path, map_location="cpu", weights_only=True)
    require(isinstance(saved, dict) and saved.get("format") == kind,
            f"{path}: not a {kind} of this program, or damaged; nothing in it was run")
    return saved


def save_tensors(path, **content):
    """A file for `load_tensors`, atomically; made in memory, where torch cannot trip over a full disk."""
    import data
    import io
    torch.save(content, buffer := io.BytesIO())
    with data.atomic_output(path) as temporary:
        Path(temporary).write_bytes(buffer.getvalue())


def restore(part, state, path):
    """The model or optimiser with the state that a file held. InputError if config.json is for another."""
    try:
        part.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError):
        raise InputError(f"{path.parent}/config.json: does not fit {path.name}, one was changed") from None
    return part


def load(run, method=None, seed=None):
    """A trained model of runs/NAME, ready for `predict`: of the method and seed given, else PT-RAG if it is
    there, else the first. InputError if there is no such model, or the file is not one of ours."""
    config, path = read_config(run), Path(run) / "model.pt"
    require(path.exists(), f"{path}: is not there yet; python ptrag.py --resume {run} finishes the run")
    saved = load_tensors(path, "model")
    states = {tuple(name.rsplit("-", 1)): state for name, state in saved["models"].items()}
    fitting = [(m, s) for m, s in states if method in (None, m) and seed in (None, int(s))]
    names = ", ".join(saved["models"])
    require(fitting, f"{path}: has no model of {method or 'any method'} and seed {seed}, only {names}")
    method, seed = min(fitting, key=lambda its: its[0] != "ptrag")  # the first among equals
    config, state = replace(config, method=method, seed=int(seed)), states[method, seed]
    model = PTRAG(config, saved["genes"], saved["perturbations"], state["embeddings"], state["pool"],
                  saved["gem_groups"])
    return restore(model, state, path).eval()


def open_data(config, need_split=True):
    """The Dataset, without `data` the simulation, and the Split of a configuration (None if not needed)."""
    import data
    options = {name: getattr(config, name) for name in ("genept", "control", "hvg", *COLUMNS)}
    dataset = (data.load(config.data, need_embeddings=need_split, **options) if config.data
               else data.simulate(config.seed))
    return dataset, data.split(dataset, config.split, config.seed) if need_split else None


def device_of(config):
    """The device named, else a GPU where there is one. InputError if it is not there."""
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    there = ["cuda", *gpus, "cpu"] if gpus else ["cpu"]
    require(config.device in ("", *there), f"--device {config.device}: must be one of {', '.join(there)}")
    return torch.device(config.device or there[0])


def pool_of(name, dataset, split):
    """The genes that a pool's name allows to retrieve: (N,) int, ascending."""
    every = [(0, p) for p in range(1, len(dataset.perturbations))]
    conditions = {"train": split.train, "trainval": split.train + split.validation, "full": every}[name]
    return torch.tensor(sorted({p for _, p in conditions}), dtype=torch.long)


def each_model(config):
    """The configuration of every model of a run: each method with each seed."""
    seeds = (config.seeds or str(config.seed)).split(",")
    return [replace(config, method=m, seed=int(s)) for s in seeds for m in config.method.split(",")]


def start(config, folder, dataset, split):
    """A model of one method and seed, its optimizer, Progress and rows of log.csv, from its checkpoint in the
    folder if there is one. InputError for a pool too small and for a checkpoint that does not fit."""
    import data
    torch.manual_seed(config.seed)
    embeddings = torch.from_numpy(dataset.perturbation_embeddings())  # (P, E)
    model = PTRAG(config, dataset.genes, dataset.perturbations, embeddings,
                  pool_of(config.pool, dataset, split), dataset.gem_groups)
    if not config.freeze_generator:  # start from "no change", not from zero
        controls = np.concatenate([dataset.cells(line, 0)[:1000] for line in range(len(dataset.cell_lines))])
        model.output.bias.data = torch.from_numpy(dataset.expression[np.sort(controls)].mean(0))  # (G,)
    optimizer = torch.optim.Adam(model.to(device_of(config)).parameters(), lr=config.lr, fused=True)
    path = folder and folder / f"checkpoint-{config.method}-{config.seed}.pt"
    if not path or not path.exists():
        return model, optimizer, Progress(), []
    saved = load_tensors(path, "checkpoint")
    require(saved["fingerprint"] == data.fingerprint(dataset, split),
            f"{folder}: was trained on other data or another split: resume with the same files")
    restore(model, saved["model"], path)
    restore(optimizer, saved["optimizer"], path)
    return model, optimizer, Progress(saved["step"], saved["validation"], saved["best"]), saved["log"]


def log_row(config, step, sampler):
    """A `Step` as a row of log.csv. Raises Diverged, naming the condition, where a number is not finite."""
    energy, sparsity = step.energy.cpu(), step.sparsity.item()  # (B,)
    if not (torch.isfinite(energy).all() and torch.isfinite(step.norm)):
        worst, dataset = int(energy.nan_to_num(nan=math.inf).argmax()), sampler.dataset
        batch = sampler.draw(step.number, [worst])
        line, gene = dataset.cell_lines[batch.cell_line[0]], dataset.perturbations[batch.perturbation[0]]
        raise Diverged(f"{config.method}-{config.seed}: loss or gradient is not finite at step {step.number} "
                       f"(condition {line} / {gene}): try a smaller --lr; checkpoint-*.pt, if any, is older")
    energy = energy.mean().item()
    loss = energy + config.sparsity * sparsity
    return config.method, config.seed, step.number, loss, energy, sparsity, step.validation


def advise(step, left, forward, device):
    """Says what helps a run of hours, and where busy cores make several threads slower than one.
    step, left: seconds of a step, and to go; forward: passes a batch through the model, without gradient."""
    import timeit
    import data
    if left > 3600:
        data.say(f"at this speed all methods together train for {left / 3600:.1f} hours; less: --steps, "
                 "--method, --seeds, --sets, --cells, --top-k, --hidden, --layers, --feed-forward")
    if device.type == "cpu" and (threads := torch.get_num_threads()) > 1:
        torch.set_num_threads(1)
        slower = step / (3 * timeit.timeit(forward, number=1))  # forward and backward are three times that
        torch.set_num_threads(threads)
        if slower > 1.5:
            data.say(f"{threads} threads take {slower:.0f} times as long as one would, the cores are busy: "
                     "--threads 1 is faster")


def train_one(config, folder, dataset, split, validation, log, models, asked):
    """Trains one method with one seed from its last checkpoint on, adds its rows to the log: the model.
    validation: see `train`; models: how many are still to come, this one among them. Once `asked` holds
    anything: KeyboardInterrupt, after the step is finished and saved. Raises Diverged."""
    import data
    (rank, size), device, before, terminal = ranks(), device_of(config), len(log), sys.stdout.isatty()
    model, optimizer, progress, rows = start(config, folder, dataset, split)
    log += rows
    name = f"{config.method}-{config.seed}"
    sampler = data.SetSampler(dataset, split.train, config.cells, config.seed)
    sets = range(rank * config.sets // size, (rank + 1) * config.sets // size)
    batches = data.prefetch(sampler, range(progress.step + 1, config.steps + 1), sets)
    waiting, began, shown = [], time.perf_counter(), -math.inf
    for number, step in enumerate(train(model, optimizer, batches, validation, config, progress)):
        stopping, now = bool(asked), time.perf_counter()
        if size > 1:  # all log the same numbers and leave the loop at the same step
            shared = torch.zeros(config.sets + 2, device=device)
            shared[sets.start:sets.stop] = step.energy
            shared[-2], shared[-1] = step.sparsity / size, stopping
            torch.distributed.all_reduce(shared)
            step, stopping = step._replace(energy=shared[:-2], sparsity=shared[-2]), bool(shared[-1])
        waiting.append(step)
        last = stopping or step.number == config.steps
        save = last or step.number % config.checkpoint_every == 0
        each = (now - began) / max(number, 1)  # seconds a step
        left = each * (models * config.steps - step.number)
        if number == 0:  # it warms up and does not count once others have come
            began = now
        if number == 5:
            batch = sampler.draw(step.number, range(config.sets))
            advise(each, left, lambda: validate(model, [batch], config, device), device)
        if save or now - shown > (0.2 if terminal else 10):
            log += [log_row(config, step, sampler) for step in waiting]
            waiting, shown, speed = [], now, config.sets * config.cells / each
            line = (f"{name:<16} step {step.number}/{config.steps}  loss {log[-1][3]:.4f}  validation "
                    f"{progress.validation:.4f}  {speed:,.0f} cells/s  {timedelta(seconds=round(left))} left")
            line = line.replace(" inf ", " - ")  # not validated yet
            data.say(f"\r{line:<109}" if terminal else line, "" if terminal and not last else "\n")
        if save and rank == 0:  # the log first: it never lacks rows of the checkpoint
            data.write_csv(folder / "log.csv", LOG_COLUMNS, log)
            save_tensors(folder / f"checkpoint-{name}.pt", format="checkpoint", **vars(progress),
                         fingerprint=data.fingerprint(dataset, split), log=log[before:],
                         model=model.state_dict(), optimizer=optimizer.state_dict())
        if stopping:
            raise KeyboardInterrupt
    return model


def train_all(config, folder, dataset, split):
    """Trains every method with every seed, each saved as it is done: {"METHOD-SEED": model}."""
    import data
    models, log, validation, asked, configs = {}, [], [], [], each_model(config)
    if ranks()[0] == 0:
        with data.atomic_output(folder / "config.json") as temporary:  # resumed with more --steps, perhaps
            Path(temporary).write_text(json.dumps(asdict(config), indent=1) + "\n")
    if split.validation:
        held_out = data.SetSampler(dataset, split.validation, config.cells, config.seed, controls_too=False)
        number = min(4, -(-len(split.validation) // config.sets))
        validation = [held_out.draw(i, range(config.sets)) for i in range(number)]

    def finish_the_step(number, frame):  # on Ctrl-C and SIGTERM, which cluster schedulers send
        asked.append(signal.signal(number, signal.default_int_handler))  # a second one stops at once
    with contextlib.ExitStack() as at_the_end:
        for number in (signal.SIGINT, signal.SIGTERM):
            at_the_end.callback(signal.signal, number, signal.signal(number, finish_the_step))
        for number, one in enumerate(configs):
            model = train_one(one, folder, dataset, split, validation, log, len(configs) - number, asked)
            pool = pool_of(config.test_pool or config.pool, dataset, split)
            model.retrieve_from(pool.to(model.pool.device))
            models[f"{one.method}-{one.seed}"] = model
            if ranks()[0] == 0:
                states = {name: model.state_dict() for name, model in models.items()}
                save_tensors(folder / "model.pt", format="model", genes=model.genes, models=states,
                             perturbations=model.perturbations, gem_groups=model.gem_groups)
        if asked:  # while the last was saved
            raise KeyboardInterrupt
    return models


def run_training(config, folder=None):
    """Trains, predicts and evaluates, in the folder of the run to resume or a new one."""
    import data
    import evaluate
    began, (rank, size) = time.monotonic(), ranks()
    require(config.sets % size == 0, f"--sets {config.sets} cannot be shared equally by {size} processes")
    dataset, split = open_data(config)
    pool = pool_of(config.test_pool or config.pool, dataset, split)
    for one in each_model(config):  # what does not fit shows before anything is written
        model, *_ = start(one, folder, dataset, split)
        model.retrieve_from(pool.to(model.pool.device), config.hard_negatives)
    if rank == 0:
        folder = folder or Path(data.claim(config.name, Path(config.data).stem or "simulated"))
    if size > 1:
        torch.distributed.broadcast_object_list(shared := [folder])
        folder, = shared
    with data.locked(folder) if rank == 0 else contextlib.nullcontext():
        data.say("\n".join([
            *dataset.notes, *split.notes, f"{dataset.name}: {(dataset.perturbation >= 0).sum():,} cells, "
            f"{len(dataset.genes):,} genes, {len(dataset.cell_lines)} cell lines; {config.split}: "
            f"{len(split.train)} conditions train, {len(split.validation)} validate, {len(split.test)} test; "
            f"writing {folder}/"]))
        try:
            models = train_all(config, folder, dataset, split)
            if size > 1:
                torch.distributed.barrier()  # processes leave together, the first goes on alone
                torch.distributed.destroy_process_group()
            if rank == 0:
                evaluate.write_predictions(folder, models, dataset, split, config)
                evaluate.evaluate_runs([folder], dataset, split)
                data.say(f"{time.monotonic() - began:.0f} s in all")
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"; python ptrag.py --resume {folder} continues") from None


def open_prediction(config):
    """The model of --predict, taught the genes new to it, the genes asked for, the Dataset of the controls,
    which is that of --data or of the run, and the files that are read."""
    stored, method = read_config(config.model), None if config.method == Config.method else config.method
    model = load(config.model, method).to(device_of(config))
    model.config = replace(model.config, select="all" if stored.select == "all" else config.select)
    source = replace(config, hvg=10**6) if config.data else stored  # all its genes, the model's among them
    kept = stored.genept if not config.data or Path(stored.genept).is_file() else ""  # it may be gone
    source = check(replace(source, genept=config.genept or kept))
    dataset, _ = open_data(source, need_split=not config.data)
    known, embedded = model.perturbations[1:], dict(zip(dataset.embedding_genes, dataset.embeddings))
    genes = known if config.predict == "all" else config.predict.split(",")
    new = [gene for gene in genes if gene not in known]
    for gene in new:
        require(gene in embedded, f"--predict {gene}: no embedding in the model or in {dataset.name}; "
                "more are in the file of --genept, if any", gene, [*known, *embedded])
    if new:
        add_perturbations(model, new, [embedded[gene] for gene in new])
    return model, genes, dataset, [source.data, source.genept, *Path(config.model).glob("*")]


def run_prediction(config):
    """Predicts cells for genes, perturbed in the data or not, writes them and prints what changes most."""
    import data
    model, genes, dataset, inputs = open_prediction(config)
    method, asked, n, neighbours = model.config.method, config.cell_line.lower(), config.cells, {}
    lines = [line for line, name in enumerate(dataset.cell_lines) if asked in ("", name.lower())]
    require(len(lines) == 1, f"--cell-line {config.cell_line}: must be of {', '.join(dataset.cell_lines)}")
    rows = np.sort(data.pick(np.random.default_rng(config.seed), dataset.cells(lines[0], 0), n))  # (n,)
    aligned, notes = data.align_genes(dataset, model.genes, missing_share=0.2)
    control, line = aligned(rows), dataset.cell_lines[lines[0]]  # (n, G)
    codes = {group: code for code, group in enumerate(model.gem_groups)}  # an unknown one counts as the first
    gem_group = np.array([codes.get(dataset.gem_groups[code], 0) for code in dataset.gem_group[rows]])
    with contextlib.suppress(OSError, KeyError, ValueError), open(Path(config.model) / "summary.csv") as file:
        position = {(row["method"], row["metric"]): row["position"] for row in csv.DictReader(file)}
        notes.append(f"{config.model}: in its test {method} stood at {float(position[method, 'sw1']):.2f} on "
                     f"SW1 (0: as far from real cells as no change, 1: as near as other real cells), with "
                     f"--select {read_config(config.model).select}")
    data.say("\n".join([*dataset.notes, *notes]))

    def blocks():
        for number, gene in enumerate(genes):
            cells, probability = predict(model, control, gene, gem_group, seed=config.seed)
            neighbours[gene] = used = used_candidates(model, gene, probability)
            change, names, use = cells.mean(0) - control.mean(0), used["candidates"], used["probability"]
            most = np.argsort(-np.abs(change), kind="stable")[:10]
            changes = ", ".join(f"{model.genes[i]} {change[i]:+.2f}" for i in most)
            data.say(f"{gene} in {line}\n  changes most (mean log1p): {changes}")
            if impossible := (cells > math.log1p(10_000)).sum():
                data.say(f"  {impossible} values are above log1p(10,000), which no cell has")
            if names:
                best = np.argsort(-np.nan_to_num(use), kind="stable")[:10]
                shown = ", ".join(f"{names[i]} {use[i]:.2f}".removesuffix(" nan") for i in best)
                data.say(f"  neighbours used (probability): {shown}")
            yield slice(number * n, number * n + n), {"X": cells, "layers/control": control}

    obs = {"perturbation": np.repeat(genes, n).tolist(), "control_cell": np.tile(rows, len(genes)),
           "cell_line": [line] * (n * len(genes))}
    about = {"units": data.UNITS, "neighbours": neighbours,  # filled while the cells are written
             "model": {"method": method, "run": config.model, "split": model.config.split}}
    data.write_anndata(config.output, model.genes, obs, blocks(), n * len(genes), about, inputs)
    data.say(f"wrote {config.output}: {len(genes)} x {n} predicted cells")


def run(arguments):
    """What the command line asks for, in one process or in those that torchrun started."""
    config, folder = configure(arguments)
    device = device_of(config)  # one that is not there shows before anything is written
    torch.set_num_threads(config.threads or torch.get_num_threads())
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # torchrun started several
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if ranks()[0] > 0:
        sys.stdout = open(os.devnull, "w")  # one process speaks for all
    return run_prediction(config) if config.predict else run_training(config, folder)


def main(arguments=None):
    """The command line: 0 done, 1 numbers diverged, 2 something given cannot be used, 130 stopped."""
    import data
    return data.status_of(run, arguments)


if __name__ == "__main__":
    import ptrag  # the copy that evaluate.py imports
    sys.exit(ptrag.main())
