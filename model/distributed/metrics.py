"""Exact metrics over rows that lie on many ranks: no rank ever holds more than about twice its share."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

from model.distributed.process_group import Ranks
from model.metrics import Metrics


def _runs(scores: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """scores [n] with what stands behind each, counts int64 [n, 2] -> distinct scores, rising, and their counts."""
    ordered, order = scores.sort()
    values, run = torch.unique_consecutive(ordered, return_inverse=True)
    return values, counts.new_zeros(len(values), 2).index_add_(0, run, counts[order])


def _limits(values: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """[N - 1] scores that cut everybody's values [n] (sorted, distinct) into N shares, none above twice the mean (plus
    N): parallel sorting by regular sampling, Shi and Schaeffer 1992, each sample with the weight of what it stands for,
    as ranks may have shares of any size."""
    world = ranks.world
    samples = values.new_zeros(2, world, dtype=torch.float64)
    if len(values):
        samples[0] = values[torch.arange(world, device=values.device) * len(values) // world]
        samples[1] = len(values) / world
    found = samples.new_empty(world, 2, world)
    dist.all_gather_into_tensor(found.view(-1), samples.view(-1))
    ordered, order = found[:, 0].flatten().sort()
    before = found[:, 1].flatten()[order].cumsum(0)
    wanted = torch.arange(1, world, device=values.device) * (before[-1] / world)
    return ordered[torch.bucketize(wanted, before).clamp(max=len(ordered) - 1)].to(values.dtype)


def _share(values: torch.Tensor, counts: torch.Tensor, ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
    """All ranks' values and counts that fall between this rank's limits."""
    place = torch.bucketize(values, _limits(values, ranks), right=True)
    sizes = torch.bincount(place, minlength=ranks.world)
    incoming = torch.empty_like(sizes)
    dist.all_to_all_single(incoming, sizes)
    incoming, sizes = incoming.tolist(), sizes.tolist()
    scores, numbers = values.new_empty(sum(incoming)), counts.new_empty(sum(incoming), 2)
    dist.all_to_all_single(scores, values, incoming, sizes)
    dist.all_to_all_single(numbers, counts, incoming, sizes)
    return scores, numbers


def auc(scores: torch.Tensor, labels: torch.Tensor, ranks: Ranks) -> float:
    """metrics.auc over all ranks' scores float [n] and labels [n], to the last bit, on every rank."""
    broken = torch.isnan(scores).any().to(torch.int64)
    ranks.all_reduce(broken)
    if broken.item():
        return math.nan
    positive = labels.to(torch.int64)
    # Equal scores become one line before they travel: a model that scores all rows alike must not fill one rank.
    values, counts = _share(*_runs(scores, torch.stack([1 - positive, positive], 1)), ranks)
    _, counts = _runs(values, counts)
    here = counts.sum(0)
    everywhere = here.new_empty(ranks.world * 2)
    dist.all_gather_into_tensor(everywhere, here)
    everywhere = everywhere.view(-1, 2)
    negatives, positives = everywhere.sum(0).tolist()
    if not positives or not negatives:
        return math.nan
    below = everywhere[: ranks.rank, 0].sum() + counts[:, 0].cumsum(0) - counts[:, 0]
    twice_wins = (counts[:, 1] * (2 * below + counts[:, 0])).sum()
    ranks.all_reduce(twice_wins)
    return twice_wins.item() / (2 * positives * negatives)


def measure(logits: torch.Tensor, labels: torch.Tensor, ranks: Ranks) -> Metrics:
    """metrics.measure over all ranks' logits float [n] and labels [n]; the same on every rank."""
    wide, truth = logits.double(), labels.double()
    loss = F.binary_cross_entropy_with_logits(wide, truth, reduction="sum")
    sums = torch.stack([loss, torch.sigmoid(wide).sum(), truth.sum(), truth.new_tensor(float(len(truth)))])
    ranks.all_reduce(sums)
    loss, clicks, positives, rows = sums.tolist()
    loss, rate = loss / rows, positives / rows
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate)) if 0 < rate < 1 else math.nan
    return Metrics(
        auc(logits, labels, ranks), loss, loss / entropy, clicks / positives if positives else math.nan, int(rows)
    )
