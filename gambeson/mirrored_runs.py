"""Runs whose folder lies in an object store: `--runs s3://bucket/prefix` of every command.

Of each run what lists need is fetched when a command opens the store, of the runs that it names all; what the command
changes is sent while it goes on and at its end. Stages have their own way there (mirror.py).
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gambeson.disk import open_folder, read_json, write_json
from gambeson.errors import EnvironmentFault
from gambeson.mirror import REMOTE, Mirror, at_once, local
from gambeson.place import Entry, Missing, Place

FACTS = {"recipe.yaml", "run.json", "version.json"}
"""What lists of runs are made from."""
NOT_OURS = {"stages", "owner"}
"""Folders that are sent by others: stages, and who owns a run."""
LEDGER = ".sent.json"
EVERY = 15.0
"""Seconds between two looks for what has changed."""

_opened: list[Runs] = []


@dataclass
class Runs:
    """The runs of an object store, in their mirror.

    ledger: of each file, by its path below the root, the store's mark, size and time here when both were the same.
    """

    root: Path
    mirror: Mirror
    words: Sequence[str]  # of the command: a run whose name begins with one is fetched whole
    ledger: dict[str, list] = field(default_factory=dict)
    wrote: bool = False  # whether this process has changed anything
    ended: threading.Event = field(default_factory=threading.Event)
    turn: threading.Lock = field(default_factory=threading.Lock)

    @staticmethod
    def open(url: str, words: Sequence[str]) -> Runs:
        """Opens them and fetches what the command needs; in the background looks for changes until `settle`."""
        root = local(url)
        mirror = Mirror.of(root)
        assert mirror is not None, "a URL of an object store"
        open_folder(root)
        runs = Runs(root, mirror, tuple(words))
        if (root / LEDGER).is_file():
            runs.ledger = read_json(root / LEDGER)
        runs.bring()
        return runs

    def bring(self) -> None:
        """Fetches what the store has, where it is another than when both were the same."""
        with self.turn, self.mirror.lock(self.root):
            place = self.mirror.place(self.root)
            top = place.entries()
            folders = [one.name for one in top if one.size is None and one.name not in NOT_OURS]
            found = [(one.name, one) for one in top if one.size is not None]
            for inside in at_once(lambda name: list(self._wanted(place / name, name)), folders):
                found += inside
            at_once(lambda one: self._fetch(*one), found)
            self._note()

    def send(self) -> None:
        """Sends what is here and has changed."""
        with self.turn, self.mirror.lock(self.root):
            changed = [name for name in self._files() if self.ledger.get(name, [])[1:] != self._state(name)]
            if not changed:
                return
            self.wrote = True
            states = {name: self._state(name) for name in changed}  # before they are read: a later change is seen
            at_once(self._send, changed)
            for parent in {os.path.dirname(name) for name in changed}:
                for one in (self.mirror.place(self.root / parent)).entries():
                    name = os.path.join(parent, one.name)
                    if name in states:
                        self.ledger[name] = [one.mark, *states[name]]
            self._note()

    def live(self) -> None:
        """Sends, and fetches while this process has written nothing, until the end."""
        while not self.ended.wait(EVERY):
            try:
                self.send()
                if not self.wrote:
                    self.bring()
            except OSError as error:  # the last sending raises it
                print(f"gambeson: {error}", file=sys.stderr, flush=True)

    def _wanted(self, place: Place, name: str) -> Iterator[tuple[str, Entry]]:
        """Files below a folder that are to be here: all, or of a run that nobody named what lists need."""
        entries = place.entries()
        run = any(one.name in FACTS for one in entries)
        whole = not run or any(name.startswith(os.path.basename(word.rstrip("/"))) for word in self.words if word)
        for one in entries:
            if one.size is not None and (whole or one.name in FACTS):
                yield f"{name}/{one.name}", one
            elif one.size is None and whole and one.name not in NOT_OURS:
                yield from self._wanted(place / one.name, f"{name}/{one.name}")

    def _fetch(self, name: str, entry: Entry) -> None:
        path, known = self.root / name, self.ledger.get(name)
        if path.is_file() and known is not None and known[0] == entry.mark:
            return
        try:
            self.mirror.fetch(path)
        except Missing:  # gone since it was listed
            return
        self.ledger[name] = [entry.mark, *self._state(name)]

    def _send(self, name: str) -> None:
        with contextlib.suppress(Missing):  # gone since it was listed
            self.mirror.send(self.root / name)

    def _state(self, name: str) -> list[int]:
        try:
            facts = (self.root / name).stat()
        except FileNotFoundError:
            return []
        return [facts.st_size, facts.st_mtime_ns]

    def _files(self) -> Iterator[str]:
        for folder, inside, files in os.walk(self.root):
            inside[:] = sorted(name for name in inside if name not in NOT_OURS and not name.startswith("."))
            for name in sorted(files):
                if not name.startswith(".") and name != REMOTE:
                    yield os.path.relpath(os.path.join(folder, name), self.root)

    def _note(self) -> None:
        write_json(self.root / LEDGER, self.ledger)


def open_runs(url: str, words: Sequence[str]) -> Path:
    """The folder of this machine for runs in an object store, fetched as far as the command's words need it.

    UserError for a URL that is none of an object store's, EnvironmentFault where the store does not answer.
    """
    path = local(url)
    if Mirror.of(path) is None:
        return path
    runs = Runs.open(url, words)
    if int(os.environ.get("RANK", 0)) == 0:  # of processes that train together one sends
        _opened.append(runs)
        threading.Thread(target=runs.live, daemon=True).start()
    return runs.root


def settle() -> None:
    """Sends what is left at the end of a command. EnvironmentFault where that fails, unless the command failed too."""
    failed = sys.exc_info()[0] is not None  # asked here: inside `except` below there is always a fault
    while _opened:
        runs = _opened.pop()
        runs.ended.set()
        try:
            runs.send()
        except EnvironmentFault as error:
            if not failed:
                raise
            print(f"gambeson: {error}", file=sys.stderr)
