"""Parquet files whose damage is noticed, by the checksum of every page, and told by the file's name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gambeson.data.archives import DAMAGE
from gambeson.errors import EnvironmentFault, UserError

_MAGIC = b"PAR1"


class Intact(pq.ParquetFile):
    """A Parquet file: UserError where it is something else, EnvironmentFault, naming it, where it is damaged.

    wanted: what is expected there. mend: what to do with a damaged one. A bit that turned is noticed in what was
    written with `write_page_checksum=True`; pages without a checksum, of earlier versions, are read as they are.
    """

    def __init__(self, path: Path, wanted: str, mend: str) -> None:
        self.path, self.wanted, self.mend = path, wanted, mend
        with open(path, "rb") as handle:
            begins = handle.read(len(_MAGIC))
        if begins != _MAGIC:
            raise UserError(f"{path}: expected {wanted}, got something else (no Parquet); check the path")
        with self.intact():
            super().__init__(path, page_checksum_verification=True)

    @contextmanager
    def intact(self) -> Iterator[None]:
        """Inside, what damage makes readers raise becomes EnvironmentFault, naming the file."""
        try:
            yield
        except (UserError, EnvironmentFault):
            raise
        except (pa.ArrowException, *DAMAGE) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise EnvironmentFault(
                f"{self.path}: expected {self.wanted}, got a damaged file ({first}); {self.mend}"
            ) from error

    def iter_batches(self, *args: Any, **options: Any) -> Iterator[pa.RecordBatch]:
        """As pyarrow's."""
        with self.intact():
            batches = super().iter_batches(*args, **options)
        while True:
            with self.intact():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def read(self, *args: Any, **options: Any) -> pa.Table:
        """As pyarrow's."""
        with self.intact():
            return super().read(*args, **options)
