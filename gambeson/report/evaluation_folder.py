"""The folder of a finished evaluation: rows, facts, checks, page, RobustBench's record, and what the terminal shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console

from gambeson.disk import read_json, write_json
from gambeson.errors import UserError, require
from gambeson.models.export import robustbench_entry
from gambeson.models.network import ClassifierNetwork
from gambeson.options import take, take_flag
from gambeson.report import delivery, evaluation
from gambeson.report.evaluation_words import CorruptionLine, Measured, shortfalls, terminal_lines, terminal_table
from gambeson.robustness import corrupted, zoo
from gambeson.robustness.checks import Check
from gambeson.robustness.subjects import Named
from gambeson.store import Artifact
from gambeson.terminal import console, say
from gambeson.threat import ThreatModel

ROWS = "rows.parquet"
"""The file that such a folder is known by."""
KEPT = (ROWS, "facts.json", "checks.json")
"""Files of the stage that the folder holds as they are."""
PAGE, RECORD = "report.html", "robustbench.json"
"""Files that are made for the folder."""


@dataclass(frozen=True, kw_only=True)
class Board:
    """What RobustBench's board is to say besides the numbers, and where the submission goes."""

    folder: Path | None = None  # none: no submission
    entry: str = ""  # FirstauthorYEARWord_ARCH
    title: str = ""  # of the paper
    authors: str = ""  # with commas between
    venue: str = ""  # such as ICML 2023
    link: str = ""  # to the paper
    additional_data: bool = False  # whether other real images were trained on

    @staticmethod
    def taken(words: list[str]) -> Board:
        """Removes the options of the board from the words. UserError for a submission without what it needs."""
        folder = take(words, "--submission")
        found = {name: take(words, f"--{name}") for name in ("name", "title", "authors", "venue", "link")}
        lacking = [f"--{name}" for name, value in found.items() if not value]
        require(folder is None or not lacking, "--submission", "--name, --title, --authors, --venue and --link too",
                f"no {', '.join(lacking)}")  # fmt: skip
        said = {name: value or "" for name, value in found.items()}
        place, entry = None if folder is None else Path(folder), said.pop("name")
        return Board(folder=place, entry=entry, additional_data=take_flag(words, "--additional-data"), **said)

    @property
    def paper(self) -> zoo.Paper:
        """What is said of the paper."""
        return zoo.Paper(
            link=self.link,
            name=self.title,
            authors=self.authors,
            venue=self.venue,
            additional_data=self.additional_data,
        )

    def check(self, subject: Named) -> None:
        """UserError, before anything is attacked, for a submission that could not be written after it."""
        if self.folder is None:
            return
        model = subject.network()
        if model is None:
            raise UserError(f"--submission: expected a network of RobustBench's zoo, got {subject.title}")
        robustbench_entry(model)
        zoo.check_entry_name(self.entry)
        free = not self.folder.exists() or not any(self.folder.iterdir()) or self.written is not None
        require(free, "--submission", "a new or empty folder, or one with this submission", str(self.folder))

    @property
    def written(self) -> Path | None:
        """The record of a submission of this name that the folder holds; None without."""
        return None if self.folder is None else next(self.folder.glob(f"model_info/*/*/{self.entry}.json"), None)


def measured(
    made: Artifact, corruptions: Artifact | None, subject: Named, command: str, remarks: list[str]
) -> Measured:
    """The finished stages as material of the page."""
    counted = {} if corruptions is None else corrupted.counts(pq.read_table(corruptions.file(corrupted.ROWS)))
    lines = tuple(
        CorruptionLine(name, {s: right for s, (right, _) in each.items()}, max(n for _, n in each.values()))
        for name, each in counted.items()
    )
    return Measured(
        rows=pq.read_table(made.file(ROWS)),
        facts=read_json(made.file("facts.json")),
        checks=tuple(Check(**each) for each in read_json(made.file("checks.json"))),
        record=made.record,
        subject=subject.title,
        command=command,
        corruptions=lines,
        remarks=tuple(remarks),
    )


def deliver(
    made: Artifact,
    corruptions: Artifact | None,
    subject: Named,
    board: Board,
    command: str,
    remarks: list[str],
    folder: Path,
) -> None:
    """Writes the folder and shows what came out. UserError where another evaluation lies in it, or in the submission's.

    Killed on the way, it goes on when it is called again.
    """
    found = measured(made, corruptions, subject, command, remarks)
    _copy(made, corruptions, folder)
    page = evaluation.write(found, folder / PAGE)
    network = subject.network()
    write_json(folder / RECORD, record(found, network, board))
    screen = console()
    screen.print(terminal_table(found))
    for line in terminal_lines(found):
        screen.print(line, soft_wrap=True)
    if made.record["attempts"] > 1:
        times = made.record["attempts"] - 1
        screen.print(f"this evaluation was stopped {times} time{'s' * (times > 1)} and went on where it was")
    say(f"rows: {(folder / ROWS).resolve()}\npage: {page.resolve()}")
    _submit(found, network, board, screen)


def _copy(made: Artifact, corruptions: Artifact | None, folder: Path) -> None:
    """The stages' files into the folder."""
    delivery.claim(folder, made, ROWS)
    for name in KEPT:
        delivery.copied(made.file(name), folder)
    if corruptions is not None:
        delivery.copied(corruptions.file(corrupted.ROWS), folder)


def measurement(found: Measured) -> zoo.Measurement:
    """What was found, as RobustBench's board asks for it; never called standard where it is not."""
    facts = found.facts
    version = facts["version"]
    if version == "standard" and shortfalls(found):
        version = f"standard with changes ({'; '.join(shortfalls(found))})"
    return zoo.Measurement(
        clean=found.clean.estimate,
        autoattack=found.robust.estimate,
        n=len(found.rows),
        dataset=facts["data"],
        threat=ThreatModel(norm=facts["norm"], epsilon=facts["epsilon"]),
        version=version,
        precision=facts["precision"],
    )


def record(found: Measured, network: ClassifierNetwork | None, board: Board) -> dict[str, Any]:
    """RobustBench's record, marked unreliable with the reasons where the number is none of theirs."""
    if network is None:
        return zoo.board_record(found.subject, measurement(found), board.paper, ["the classifier is a program"])
    try:
        return zoo.leaderboard(network, measurement(found), board.paper)
    except UserError:
        kind = type(network).__name__
        reason = f"RobustBench's zoo has no class for a {kind}"
        return zoo.board_record(kind, measurement(found), board.paper, [reason])


def _submit(found: Measured, network: ClassifierNetwork | None, board: Board, console: Console) -> None:
    """The submission, where one was asked for and is not there yet. UserError where one with other numbers is."""
    if board.folder is None or network is None:
        return
    if board.written is not None:
        if read_json(board.written) != zoo.leaderboard(network, measurement(found), board.paper):
            raise UserError(
                f"{board.folder}: expected a new folder, or one with this submission, got {board.entry} with other "
                "numbers or words. Nothing is lost: give another --submission to the same command"
            )
        console.print(f"submission: {board.folder.resolve()} (there already)", markup=False)
        return
    with delivery.whole(board.folder) as draft:
        why = zoo.write_submission(draft, network, board.entry, measurement(found), board.paper)
    for reason in why:
        console.print(f"not a RobustBench number: {reason}", style="yellow", markup=False)
    console.print(f"submission: {board.folder.resolve()}", markup=False)
