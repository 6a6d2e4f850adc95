"""How well a digits denoiser predicts held-out images, and how near its samples are to training images.

`python dev/denoiser_memory.py STEPS AVERAGE PADDING ...` (triples), a line each: EDM loss on train and validation
images (8 fixed draws of noise), median distance of 600 samples to their nearest training image, share of near copies
(nearest less than a third as far as second nearest). Validation images only; results in dev/LOG.md.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.spatial.distance import cdist

from gambeson.models.denoiser import load_denoiser
from gambeson.recipes import named
from gambeson.store import Store
from gambeson.synthesis.generate import sample_block
from gambeson.training.diffusion import train_denoiser


def main() -> None:
    torch.set_num_threads(1)
    recipe = named("digits")
    real = recipe.data.load()
    store = Store(Path(tempfile.gettempdir()) / "gambeson-denoisers")
    plain = replace(recipe.generation, guidance=None)
    for steps, average, padding in zip(*[iter(sys.argv[1:])] * 3, strict=True):
        fitted = replace(recipe.denoiser.optimisation, steps=int(steps), average=float(average))
        augment = replace(recipe.denoiser.augment, padding=int(padding))
        spec = replace(recipe.denoiser, optimisation=fitted, augment=augment)
        denoiser = load_denoiser(store.once(train_denoiser, spec, real, seed=0).file("denoiser.safetensors"))
        losses = {}
        for name, part in {"train": real.train, "validation": real.validation}.items():
            draws = torch.Generator().manual_seed(0)
            with torch.no_grad():
                found = [denoiser.loss(part.images * 2 - 1, part.labels, draws).mean().item() for _ in range(8)]
            losses[name] = round(float(np.mean(found)), 3)
        samples = torch.cat([sample_block(plain, denoiser, None, real.shape, b, 0)[0] for b in range(6)])
        near = np.sort(cdist(samples.flatten(1).numpy(), real.train.images.flatten(1).numpy()), axis=1)
        copies = float(np.mean(near[:, 0] < near[:, 1] / 3))
        print(steps, average, padding, losses, f"nearest {np.median(near[:, 0]):.2f}, copies {copies:.1%}", flush=True)


main()
