"""A driver that generates a few images, for tests to kill: python fault_driver.py ROOT ENGINE [ADDRESS]."""

import sys
from pathlib import Path

import torch

from gambeson import mirror
from gambeson.data.datasets import Digits
from gambeson.errors import EnvironmentFault
from gambeson.machine import Machine
from gambeson.models.unet import UNetSpec
from gambeson.sampling.levels import NoiseLevels
from gambeson.store import Artifact, Store
from gambeson.synthesis.generate import generate
from gambeson.synthesis.generation import Generation
from gambeson.training.diffusion import DenoiserTraining, train_denoiser
from gambeson.training.loop import Optimisation

BLOCKS, PER_SHARD = 12, 3
SPEC = Generation(count=58, block=5, blocks_per_shard=PER_SHARD, levels=NoiseLevels(steps=16), guidance=None)
"""Shards of three blocks; the last block has 3 images, the others 5."""
TRAINING = DenoiserTraining(
    network=UNetSpec(width=8), optimisation=Optimisation(steps=20, batch_size=16, learning_rate=2e-3, momentum=0.0)
)


def images(root: Path, machine: Machine = Machine()) -> Artifact:
    """The images; the denoiser is found where it was trained before."""
    store, real = Store(root, machine=machine, say=print), Digits(train_images=100, validation_images=50).load()
    return store.once(generate, SPEC, real, store.once(train_denoiser, TRAINING, real, seed=0), None, None, seed=1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    root, engine, *address = sys.argv[1:]
    local = Machine(workers=2)
    machine = local if engine == "local" else Machine(engine="ray", address=address[0], cluster_workers=2)
    try:
        images(mirror.local(root), machine)
    except EnvironmentFault as error:
        print(error, file=sys.stderr)
        sys.exit(error.code)
