"""TensorBoard for one run: links to its trainings' events with readable names, pictures of its synthetic images.

All of it lies in a temporary folder, and the server listens on 127.0.0.1.
"""

from __future__ import annotations

import importlib.util
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from gambeson.data.synthetic import SyntheticStore
from gambeson.errors import EnvironmentFault, UserError
from gambeson.run import Run
from gambeson.synthesis.grid import picture
from gambeson.training.journal import EVENTS
from gambeson.watching.state import State
from gambeson.watching.telling import Story

PORT = 6006
"""The port, where it is free and none is asked for."""
SHOWN, ROW = 100, 10
"""Images in a picture of synthetic images, and in each of its rows."""
SHARED = ("diffusion model", "teacher", "denoiser", "encoder")
"""Roles of trainings that the arms of a seed share."""


def trainings(state: State, story: Story) -> Iterator[tuple[str, str]]:
    """(name, folder) of every stage that a run's record names: 'seed 0/real only/student'."""
    for job in state.jobs.values():
        for stage in job.stages.values():
            seed, arm = _parts(job.name)
            role = story.role(stage) or stage.name
            alone = role == "student" and len(stage.inputs) > 1 and not stage.inputs[1]
            yield f"{seed}/{'shared' if role in SHARED else 'real only' if alone else arm}/{role}", stage.folder


def finished_trainings(run: Run) -> Iterator[tuple[str, str]]:
    """The same of a run that is complete."""
    for chapter in run.chapters:
        for role, artifact in chapter.artifacts.items():
            arm = "shared" if role in SHARED else chapter.arm.title.lstrip("+ ")
            folder = artifact.folder.relative_to(artifact.folder.parents[2]).as_posix()
            yield f"seed {chapter.seed}/{arm}/{role}", folder


def _parts(job: str) -> tuple[str, str]:
    """('seed 0', 'real only') of 'seed 0 real only'."""
    found = re.fullmatch(r"(seed -?\d+) \+? ?(.*)", job)
    return (found[1], found[2]) if found else ("run", job)


class Links:
    """A folder of links to the events of a run's trainings and of pictures of its synthetic images, each once."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder, self.root = folder, root
        self.linked: set[str] = set()

    def add(self, named: Iterable[tuple[str, str]]) -> int:
        """Links those that have events, or images, by now and are not linked yet; how many are linked."""
        for name, folder in named:
            events, images = self.root / folder / EVENTS, self.root / folder / "images"
            if folder in self.linked or not (events.is_dir() or (images / "store.json").exists()):
                continue
            self.linked.add(folder)
            safe = "/".join(re.sub(r"[^\w .+-]", "_", part).strip(". ") or "_" for part in name.split("/"))
            link = self.folder / safe
            if link.exists():  # of two trainings of one name the second says which it is
                link = link.with_name(f"{link.name} {folder.rpartition('/')[2][:8]}")
            link.parent.mkdir(parents=True, exist_ok=True)
            if events.is_dir():
                link.symlink_to(events.resolve(), target_is_directory=True)
            else:
                _draw(images, link)
        return len(self.linked)


def _draw(images: Path, place: Path) -> None:
    """Writes the first images of a store as one picture that TensorBoard shows; damaged ones are left out."""
    from torch.utils.tensorboard import SummaryWriter

    try:
        store = SyntheticStore.open(images)
        some = store.stretch(0, min(len(store), SHOWN))[0]
    except (OSError, ValueError):
        return
    with SummaryWriter(str(place)) as writer:
        writer.add_image("first images", picture(some, ROW), 0, dataformats="HWC")


def check(port: int | None) -> int:
    """The port to serve on. UserError where TensorBoard is missing, or the port that was asked for is taken."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "--tensorboard: expected the package tensorboard, found none; `pip install tensorboard`, or leave the "
            "option out: the curves are shown here all the same"
        )
    if port is not None:
        if not _free(port):
            raise UserError(f"--tensorboard: expected a free port, got {port}, which is taken; name another, or none")
        return port
    return PORT if _free(PORT) else _free_port()


def _free(port: int) -> bool:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _free_port() -> int:
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return tried.getsockname()[1]


@contextmanager
def served(root: Path, port: int) -> Iterator[Links]:
    """TensorBoard on 127.0.0.1 while the block runs, over the links that are added; both go with the block.

    Raises EnvironmentFault with what it said where it does not come up.
    """
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gambeson-watch-")))
        (place / "runs").mkdir()
        said = stack.enter_context(open(place / "said.txt", "w+b"))
        options = [
            "--logdir",
            str(place / "runs"),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--reload_interval",
            "5",
        ]
        command = [sys.executable, "-m", "tensorboard.main", *options]
        server = subprocess.Popen(command, stdout=said, stderr=said, stdin=subprocess.DEVNULL, start_new_session=True)
        stack.callback(_end, server)
        _await(server, port, place / "said.txt")
        yield Links(place / "runs", root)


def _await(server: subprocess.Popen[bytes], port: int, said: Path) -> None:
    for _ in range(600):
        with socket.socket() as tried:
            tried.settimeout(0.2)
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return
        if server.poll() is not None:
            break
        time.sleep(0.1)
    words = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    raise EnvironmentFault(f"TensorBoard did not start on port {port}: {' '.join(words[-3:]) or 'it said nothing'}")


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(5)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
