"""Gaussian worlds in which measures of synthetic data have closed forms, and how often an interval covers them."""

import torch

from gambeson.quality.space import Sample


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(count, dimensions, g, shift=0.0, scale=1.0, labels=None):
    """A sample of N(shift, scale^2 I)."""
    z = torch.randn(count, dimensions, generator=g, dtype=torch.float64) * scale + shift
    return Sample(z.float(), labels, "world")


def sample(values, labels=None):
    """A sample of these features; one number per image is a feature of one dimension."""
    z = torch.as_tensor(values, dtype=torch.float32)
    return Sample(z[:, None] if z.dim() == 1 else z, None if labels is None else torch.as_tensor(labels), "world")


def covered(rows, truths):
    """For each number of repeated measurements the share of intervals that cover its truth (None: the mean)."""
    shares = {}
    for i, truth in enumerate(truths):
        column = [row[i] for row in rows]
        true = sum(m.value for m in column) / len(column) if truth is None else truth
        shares[column[0].name] = sum(m.low <= true <= m.high for m in column) / len(column)
    return shares


def widths(rows):
    """For each number the mean length of its interval over 3.92 standard deviations of the value: 1 is perfect."""
    found = {}
    for i in range(len(rows[0])):
        column = [row[i] for row in rows]
        spread = torch.tensor([m.value for m in column]).std().item()
        found[column[0].name] = sum(m.high - m.low for m in column) / len(column) / (3.92 * spread)
    return found
