"""CDP's guidance as METHOD 1.2 describes the authors' code, in VP coordinates: the literal that tests compare with."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from worlds import ENCODER, WORLD, f64

from gambeson.sampling import linear_alpha_bar

ABAR = linear_alpha_bar()


def authors_hnm(z1, z2, t=10.0, tau=0.1):
    """METHOD 1.2 word for word, beta = 1: the mean over 2B anchors, clamps and all."""
    z, b = torch.cat([z1, z2]), len(z1)
    n = 2 * b - 2
    neither = ~torch.eye(b, dtype=torch.bool).repeat(2, 2)
    neg = (z @ z.T / t).exp()[neither].view(2 * b, n).clamp(min=1e-4)
    pos = ((z1 * z2).sum(1) / t).exp().repeat(2)
    ng = (-tau * n * pos + (neg * neg).sum(1) / neg.mean(1)) / (1 - tau)
    return -(pos / (pos + ng.clamp(min=n * math.exp(-1 / t)))).clamp(min=1e-4).log().mean()


def authors_run(noise, labels, times, lam, network=None, adam=None):
    """Algorithm 1 in VP coordinates: t >= 400 only, never at the first step, one backward for image and network."""
    a = {-1: torch.tensor(1.0, dtype=f64)} | {int(t): ABAR[t] for t in times}
    embed = (lambda f: F.normalize(f, dim=1)) if network is None else network
    levels, x, before, guided = [*times.flip(0).tolist(), -1], noise, None, 0
    for t, s in pairwise(levels):
        x0 = WORLD.denoiser(x / a[t].sqrt(), float(((1 - a[t]) / a[t]).sqrt()), labels)
        eps = (x - a[t].sqrt() * x0) / (1 - a[t]).sqrt()
        if before is not None and t >= 400:
            leaf = x.clone().requires_grad_()
            loss = authors_hnm(embed(ENCODER(leaf)), embed(ENCODER(before).detach()))
            wanted = [leaf] if network is None else [leaf, *network.parameters()]
            gradient, *rest = torch.autograd.grad(loss, wanted)
            eps, guided = eps + lam * gradient, guided + 1
            if adam is not None:
                for parameter, own in zip(network.parameters(), rest, strict=True):
                    parameter.grad = own
                adam.step()
        before, x = x, a[s].sqrt() * (x - (1 - a[t]).sqrt() * eps) / a[t].sqrt() + (1 - a[s]).sqrt() * eps
    return x, guided
