"""An image's semantic patterns out of one forward pass (FreeSel, Xie et al., NeurIPS 2023; GEAL, Xie et al. 2021).

Local features and their weights, the few that carry half of the weight, and k-means on those. The k-means is exact:
features are rounded to a grid of integers so fine that their inner products, and the sums of those, are exact in
float64. So clusters depend neither on the batch, nor on threads, nor on the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.draws import random_uniform

ITERATIONS = 100
SEED_DRAW = 31
GRAM_ELEMENTS = 1 << 25
"""Inner products of features that are held at a time."""

Vectors = npt.NDArray[np.float32]


def transformer_features(model: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the patch tokens of the second-to-last block (r, p, d), and the last block's attention to them (r, p).

    `model` is a timm VisionTransformer with a class token and two blocks or more. Tokens have gone through the final
    layer norm (`norm`, or `fc_norm` where the model has that one). The attention is the class token's: softmax over
    all tokens, mean over heads, then only the patches, rescaled to sum 1.
    """
    before = len(model.blocks) - 2
    ((patches, prefix),) = model.forward_intermediates(
        images, indices=[before], return_prefix_tokens=True, stop_early=True, output_fmt="NLC", intermediates_only=True
    )
    last, attention = model.blocks[-1], model.blocks[-1].attn
    tokens = torch.cat([prefix, patches], dim=1)
    r, t, _ = tokens.shape
    q, k, _ = attention.qkv(last.norm1(tokens)).reshape(r, t, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, keys = attention.q_norm(q[:, :, :1]), attention.k_norm(k)
    shares = (query * attention.scale @ keys.transpose(-2, -1)).softmax(dim=-1).mean(dim=1)
    weights = shares[:, 0, prefix.shape[1] :]
    return model.fc_norm(model.norm(patches)), weights / weights.sum(dim=1, keepdim=True)


def map_features(maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions of feature maps (r, d, h, w) as features (r, p, d), and their norms (r, p) as weights.

    For convolutional networks, which have no attention (the released code keeps positions by a plain threshold).
    """
    features = maps.flatten(2).transpose(1, 2)
    return features, features.norm(dim=2)


def kept(weights: torch.Tensor, ratio: float) -> torch.Tensor:
    """Return which features make the smallest set that carries `ratio` of an image's weight, (r, p) bool.

    In ascending order (equal weights: the later position counts as larger), those whose cumulative share is above
    1 - ratio; never none. Weights that are all zero count as equal.
    """
    wide = weights.double().cpu()
    wide = torch.where(wide.sum(dim=1, keepdim=True) > 0, wide, 1.0)
    ascending, order = wide.sort(dim=1, stable=True)
    cumulative = ascending.cumsum(dim=1)
    keep = cumulative > (1 - ratio) * cumulative[:, -1:]
    keep[:, -1] = True
    return torch.zeros_like(keep).scatter_(1, order, keep).to(weights.device)


@dataclass(frozen=True)
class Clustering:
    """How an image's kept features become patterns: at most k of them, by a metric, with a seed."""

    k: int
    metric: str
    seed: int


def _on_grid(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Return each image's features (r, p, d) times a power of two, rounded: whole numbers up to 2^bits, float64."""
    _, exponent = np.frexp(x.abs().amax(dim=(1, 2)).double().cpu().numpy())
    scale = torch.from_numpy(np.ldexp(1.0, bits - exponent)).to(x.device)
    return (x.double() * scale[:, None, None]).round_()


def _grid_bits(p: int, d: int) -> int:
    """Return how fine the grid can be for sums of p inner products of d entries to stay below 2^52."""
    return (52 - math.ceil(math.log2(p)) - math.ceil(math.log2(d))) // 2


def gram(x: torch.Tensor, metric: str) -> torch.Tensor:
    """Return the inner products of each image's features on the grid, (r, p, p) float64, exact whole numbers.

    x (r, p, d) float32. For the cosine metric features are first scaled to one length (zero stays zero).
    """
    bits = _grid_bits(x.shape[1], x.shape[2])
    grid = _on_grid(x, bits)
    if metric == "cosine":
        lengths = torch.bmm(grid, grid.transpose(1, 2)).diagonal(dim1=1, dim2=2).sqrt()[:, :, None]
        grid = (grid / lengths.clamp(min=1) * 2.0**bits).round_()
    return torch.bmm(grid, grid.transpose(1, 2))


def _seeds(g: torch.Tensor, keep: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Return each feature's nearest of k seeds drawn by D^2 sampling among the kept ones, (r, p) int64.

    g (r, p, p) whole numbers, uniform (r, k) in [0, 1). Seeds that would repeat a feature own nothing.
    """
    r, p, _ = g.shape
    squares, images = g.diagonal(dim1=1, dim2=2), torch.arange(r, device=g.device)
    nearest = torch.full((r, p), torch.inf, dtype=torch.float64, device=g.device)
    cluster = torch.zeros((r, p), dtype=torch.int64, device=g.device)
    for c in range(uniform.shape[1]):
        mass = torch.where(keep, nearest if c else 1.0, 0.0).long().cumsum(dim=1)
        target = torch.minimum((uniform[:, c] * mass[:, -1].double()).long(), mass[:, -1] - 1)
        seed = torch.searchsorted(mass, target[:, None], right=True)[:, 0].clamp(max=p - 1)
        sqdist = squares + squares[images, seed][:, None] - 2 * g[images, seed]
        closer = sqdist < nearest
        cluster[closer] = c
        nearest = torch.where(closer, sqdist, nearest)
    return cluster


def _nearest_mean(g: torch.Tensor, member: torch.Tensor, metric: str) -> torch.Tensor:
    """Return the nearest of the clusters' means for each feature, (r, p); `member` (r, p, k) says who is in which.

    By squared distance, or by cosine to the mean. Equal ones go to the smaller index; empty clusters get nothing.
    """
    share = torch.bmm(g, member)
    square = (share.long() * member.long()).sum(dim=1).double()[:, None]
    count = member.sum(dim=1, keepdim=True)
    score = square / (count * count) - 2 * share / count if metric == "euclidean" else -share / square.clamp(min=1).sqrt()
    return score.where(count > 0, torch.inf).argmin(dim=2)


def clusters(g: torch.Tensor, keep: torch.Tensor, uniform: torch.Tensor, metric: str) -> torch.Tensor:
    """Return the cluster of each feature, (r, p) int64 in 0..k-1, -1 where it is not kept.

    Lloyd's steps from D^2 seeds until nothing moves, ITERATIONS at most. A cluster that loses all its features is gone.
    """
    k = uniform.shape[1]
    cluster = _seeds(g, keep, uniform).masked_fill(~keep, -1)
    for _ in range(ITERATIONS):
        member = (cluster[:, :, None] == torch.arange(k, device=g.device)).double()
        after = _nearest_mean(g, member, metric).masked_fill(~keep, -1)
        if torch.equal(after, cluster):
            break
        cluster = after
    return cluster


def _means(x: Vectors, cluster: npt.NDArray[np.int64]) -> Vectors:
    """Return the mean of each cluster that has a feature, (c, d), by cluster: float64 sums in position order."""
    order = np.argsort(cluster, kind="stable")
    starts = np.flatnonzero(np.diff(cluster[order], prepend=-1))
    sums = np.add.reduceat(x[order].astype(np.float64), starts, axis=0)
    counts = np.diff(starts, append=len(order))
    return (sums / counts[:, None]).astype(np.float32)


def patterns(x: torch.Tensor, keep: torch.Tensor, rows: npt.NDArray[np.int64], clustering: Clustering) -> list[Vectors]:
    """Return the patterns of each image, (c, d) float32 with 1 <= c <= k: the means of k-means on its kept features.

    x (r, p, d) float32, keep (r, p), rows (r,) the pool rows, which seed each image's draws. An image that keeps k
    features or fewer gives those, as they are. With the cosine metric features have length 1, also in the means.
    """
    found: list[Vectors] = []
    step = max(1, GRAM_ELEMENTS // x.shape[1] ** 2)
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        g = gram(x[part], clustering.metric)
        uniform = np.stack([random_uniform(clustering.seed, (SEED_DRAW, c), rows[part]) for c in range(clustering.k)], axis=1)
        cluster = clusters(g, keep[part], torch.from_numpy(uniform).to(g.device), clustering.metric).cpu().numpy()
        for features, own in zip(x[part].float().cpu().numpy(), cluster, strict=True):
            mine = np.flatnonzero(own >= 0)
            if len(mine) <= clustering.k:
                found.append(features[mine])
                continue
            chosen = features[mine]
            if clustering.metric == "cosine":
                lengths = np.sqrt((chosen.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
                chosen = (chosen / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)
            found.append(_means(chosen, own[mine]))
    return found
