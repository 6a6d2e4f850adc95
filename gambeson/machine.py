"""Where stages compute, and what bit-identity depends on besides the recipe."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from typing import Any

import torch

import gambeson
from gambeson import distributed
from gambeson.errors import UserError, require


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where stages compute, and in what portions: none of it in a recipe, all of it in the execution record."""

    device: str = "cpu"  # torch's name of the device: cpu, cuda, cuda:1, mps
    micro_batch: int | None = None  # images of a block that are in the networks at once; none: the whole block
    workers: int = 1  # processes of one thread that a stage may use for its blocks; their number changes no bit
    compile: bool = False  # networks in training go through torch.compile: a minute first, then faster

    def __post_init__(self) -> None:
        require(self.workers >= 1, "workers", "at least 1", self.workers)
        require(self.micro_batch is None or self.micro_batch >= 1, "micro-batch", "at least 1", self.micro_batch)
        if self.device != "cpu":
            self._probe()

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
        "threads": 1 if machine.workers > 1 and not together else torch.get_num_threads(),  # of each process
        "machine": platform.machine(),
        "micro_batch": machine.micro_batch,
        "compiled": machine.compile,
        "processes": distributed.world(),  # that train together
    }


def versions() -> dict[str, str]:
    """Versions of what computed a result."""
    import numpy
    import scipy
    import sklearn

    libraries = {m.__name__: m.__version__ for m in (torch, numpy, scipy, sklearn)}
    return {"gambeson": gambeson.__version__, "python": platform.python_version(), **libraries}
