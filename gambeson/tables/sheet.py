"""A table asked for: its cells at a tier, and the folder where the rows of finished cells are kept.

FOLDER/rows/CELL-KEY/seed-K.json              what was measured, of which stages, on which machine; written last
FOLDER/rows/CELL-KEY/seed-K-validation.parquet  one row per image; seed-K-test.parquet likewise
FOLDER/table.json, table.md                   written anew whenever a cell is finished

Rows are a few kilobytes: the folder can be committed, and the table made from it anew without a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gambeson.disk import atomic, open_folder, read_json, write_json
from gambeson.tables.cells import Cell, Setting

Part = Literal["validation", "test"]
KEPT = ("seed", "index", "label", "prediction", "pgd", "apgd_ce", "apgd_t", "apgd", "autoattack")
"""Columns of rows that are kept: verdicts, no margins and no curve."""
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table at a tier. Plain values alone, so that it goes to other processes."""

    name: str
    tier: str
    title: str
    source: str
    notes: tuple[str, ...]
    cells: tuple[Cell, ...]
    squares: tuple[tuple[str, str, str, str], ...]  # cells of each 2 x 2: neither, first, second, both
    seeds: tuple[int, ...]
    facts: dict[str, Any]  # base recipe, data, threat, command
    folder: Path
    only: tuple[str, ...] = ()  # the cells that are made; none named: all

    @property
    def made(self) -> tuple[Cell, ...]:
        """The cells that are to be made."""
        return tuple(cell for cell in self.cells if not self.only or cell.name in self.only)

    def cell(self, name: str) -> Cell:
        """The cell of that name. KeyError where there is none."""
        return {cell.name: cell for cell in self.cells}[name]

    def place(self, setting: Setting, seed: int) -> Path:
        """The record of a setting and seed."""
        return self.folder / "rows" / setting.folder / f"seed-{seed}.json"

    def rows_at(self, setting: Setting, seed: int, part: Part) -> Path:
        """The rows of it."""
        return self.place(setting, seed).with_name(f"seed-{seed}-{part}.parquet")

    def record(self, setting: Setting, seed: int) -> dict[str, Any]:
        """What is kept of a setting and seed; {} where nothing is."""
        path = self.place(setting, seed)
        return read_json(path) if path.exists() else {}

    def has(self, setting: Setting, seed: int, part: Part) -> bool:
        """Whether rows of these images, of this version's kind, are kept."""
        found = self.record(setting, seed)
        told = self.facts.get("data_digest")
        same = told is None or found.get("data_digest") == told
        return found.get("format") == FORMAT and part in found.get("parts", {}) and same

    def failure(self, setting: Setting, seed: int) -> str | None:
        """Why a setting and seed could not be made; None where it was made or not tried."""
        path = self.place(setting, seed).with_suffix(".failed")
        return path.read_text(encoding="utf-8").strip() if path.exists() else None

    def keep(self, setting: Setting, seed: int, part: Part, rows: pa.Table, facts: dict[str, Any]) -> None:
        """Writes the rows, then the record with what is new of it; what failed before is forgotten."""
        open_folder(self.place(setting, seed).parent)
        with atomic(self.rows_at(setting, seed, part)) as draft:
            pq.write_table(rows.select([c for c in KEPT if c in rows.schema.names]), draft, compression="zstd")
        found = self.record(setting, seed) if self.has(setting, seed, "validation") else {}
        parts = found.get("parts", {}) | {part: facts}
        named = {"cell": setting.cell, "choice": setting.choice, "seed": seed, "key": setting.key, "format": FORMAT}
        write_json(self.place(setting, seed), named | {"data_digest": self.facts.get("data_digest"), "parts": parts})
        self.place(setting, seed).with_suffix(".failed").unlink(missing_ok=True)

    def keep_failure(self, setting: Setting, seed: int, reason: str) -> None:
        """Writes why it could not be made."""
        with atomic(self.place(setting, seed).with_suffix(".failed")) as draft:
            draft.write_text(reason + "\n", encoding="utf-8")

    def rows(self, setting: Setting, part: Part) -> pa.Table | None:
        """The kept rows of the wanted seeds; None where there are none."""
        kept = [self.rows_at(setting, seed, part) for seed in self.seeds if self.has(setting, seed, part)]
        return pa.concat_tables([pq.read_table(path) for path in kept], promote_options="default") if kept else None

    def chosen(self, cell: Cell) -> Setting | None:
        """The setting that stands for a cell: the one with the highest robust accuracy on the validation images.

        Over the seeds that are wanted; of equal ones the first. Settings that cannot be made are left out. None until
        all others are measured with all seeds.
        """
        if not cell.chooses:
            return cell.settings[0]
        able = [s for s in cell.settings if all(self.failure(s, seed) is None for seed in self.seeds)]
        if not able or not all(self.has(setting, seed, "validation") for setting in able for seed in self.seeds):
            return None
        return max(able, key=self.validation_accuracy)

    def validation_accuracy(self, setting: Setting) -> float:
        """The robust accuracy on validation images, over all kept seeds that are wanted."""
        rows = self.rows(setting, "validation")
        assert rows is not None
        return float(np.mean(rows["apgd"].to_numpy(zero_copy_only=False)))
