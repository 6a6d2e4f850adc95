"""Where stages compute, who does their items, and what bit-identity depends on besides the recipe."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

import gambeson
from gambeson import distributed
from gambeson.errors import UserError, require
from gambeson.fleet import Fleet, Here, Local

ENGINES = ("local", "ray")
"""Who may do the items of generation, labelling and scoring."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where stages compute, and in what portions: none of it in a recipe, all of it in the execution record."""

    device: str = "cpu"  # torch's name of the device: cpu, cuda, cuda:1, mps
    micro_batch: int | None = None  # images of a block that are in the networks at once; none: the whole block
    workers: int = 1  # processes of one thread that a stage may use for its blocks; their number changes no bit
    compile: bool = False  # networks in training go through torch.compile: a minute first, then faster
    engine: str = "local"  # who generates, labels and scores: local, these processes; ray, a cluster's workers
    address: str | None = None  # of the cluster; none: one is started on this machine
    cluster_workers: int | None = None  # of the cluster's, how many at most; none: as many as it has

    def __post_init__(self) -> None:
        require(self.workers >= 1, "workers", "at least 1", self.workers)
        require(self.engine in ENGINES, "engine", " or ".join(ENGINES), self.engine)
        wanted = "--engine ray beside it, whose cluster it is"
        require(self.address is None or self.engine == "ray", "address", wanted, self.address)
        require(self.micro_batch is None or self.micro_batch >= 1, "micro-batch", "at least 1", self.micro_batch)
        if self.device != "cpu":
            self._probe()

    @property
    def fleet(self) -> Fleet:
        """Who does the items of a stage: blocks, parts, shards."""
        if self.engine == "ray":
            from gambeson.cluster import Ray

            return Ray(address=self.address, workers=self.cluster_workers, gpu=self.device.startswith("cuda"))
        return Here() if self.workers == 1 else Local(self.workers)

    @contextmanager
    def reached(self) -> Iterator[Machine]:
        """The same with a cluster that other processes of this machine reach too; one without address is started."""
        if self.engine != "ray":
            yield self
            return
        from gambeson.cluster import reached

        with reached(self.address, self.cluster_workers) as address:
            yield replace(self, address=address)

    @property
    def aside(self) -> bool:
        """Whether items are done in workers of one thread, not in this process."""
        return self.workers > 1 or self.engine == "ray"

    @property
    def unit(self) -> str:
        """What hours of computing are told of."""
        return "core" if self.device == "cpu" else "GPU"

    def _probe(self) -> None:
        """UserError where there is no such device; a process of several looks at its own card, when it knows it."""
        if self.device == "cuda" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            return
        try:
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"device: expected one that this machine has, got {self.device!r} ({str(error).splitlines()[0]}); "
                f"cuda is {'there' if torch.cuda.is_available() else 'not there'}, cpu always works"
            ) from None


def make_repeatable(machine: Machine) -> None:
    """On CUDA: deterministic kernels only, so that the same work gives the same bits; the CPU needs nothing."""
    if machine.device.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs, for nothing
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32


def execution(machine: Machine = Machine(), config: Any = None, together: bool = False) -> dict[str, Any]:
    """What bit-identity depends on besides the recipe (METHOD 1.3): recorded beside every stage.

    `config` is the stage's part of the recipe in plain form, which says whether it computes in lower precision.
    `together`: the stage computes in this process (and its like), not in workers of one thread.
    """
    on_gpu = machine.device.startswith("cuda")
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(machine.device) if on_gpu else machine.device,
        "dtype": "bfloat16" if '"bfloat16"' in json.dumps(config) else "float32",
        "threads": 1 if machine.aside and not together else torch.get_num_threads(),  # of each process
        "machine": platform.machine(),
        "micro_batch": machine.micro_batch,
        "compiled": machine.compile,
        "processes": distributed.world() if together else 1,  # that train together
    }


def versions() -> dict[str, str]:
    """Versions of what computed a result."""
    import numpy
    import scipy
    import sklearn

    libraries = {m.__name__: m.__version__ for m in (torch, numpy, scipy, sklearn)}
    return {"gambeson": gambeson.__version__, "python": platform.python_version(), **libraries}
