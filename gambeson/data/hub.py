"""The door for data sets of the Hugging Face hub (extra `hub`): the Parquet files that the hub converts every set to.

Loading never tries the network: `gambeson data get hf:ORG/NAME`, and nothing else, downloads into the hub's cache.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gambeson.data.imageset import ImageSet, data_root
from gambeson.data.parquet import ParquetImages, has_parquet
from gambeson.errors import UserError, require

PREFIX = "hf:"
REVISION = "refs/convert/parquet"
"""The branch with the Parquet files that the hub makes of every public set."""


@dataclass(frozen=True, kw_only=True)
class HubImages(ParquetImages):
    """A data set of the hub that was downloaded before."""

    path: str = ""  # ORG/NAME as the hub calls it

    def load(self) -> ImageSet:
        """The image set. Raises UserError saying the command where it is not there, and as ParquetImages."""
        return self.from_files(local_copy(self.path), check_name(self.path).replace("/", "-"))


def check_name(name: str) -> str:
    """ORG/NAME (hf: before it is left out). Raises UserError for another form."""
    plain = name.removeprefix(PREFIX)
    fits = re.fullmatch(r"[\w.-]+/[\w.-]+", plain) is not None and ".." not in plain
    require(fits, "data.path", "hf:ORGANISATION/NAME, as the hub calls it", name)
    return plain


def local_copy(name: str) -> Path:
    """The folder with the set's Parquet files: a copy of one's own below the data root's hub/, or the hub's cache.

    Raises UserError saying the command that downloads it where it is not there or not whole. No network is tried.
    """
    plain = check_name(name)
    folder = data_root() / "hub" / plain
    return folder if folder.is_dir() and has_parquet(folder) else _cached(plain, folder)


def _cached(name: str, folder: Path) -> Path:
    """The hub's own cache, which other programs fill as well."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise _missing(name, folder, "found none (the cache needs pip install 'gambeson[hub]')") from None
    try:
        found = snapshot_download(
            name, repo_type="dataset", revision=REVISION, allow_patterns="*.parquet", local_files_only=True
        )
    except (OSError, ValueError) as error:  # LocalEntryNotFoundError, and IncompleteSnapshotError, which is one
        told = "found a part of them" if "Incomplete" in type(error).__name__ else "found none"
        raise _missing(name, folder, told) from error
    if not has_parquet(Path(found)):
        raise _missing(name, folder, "found none")
    return Path(found)


def _missing(name: str, folder: Path, told: str) -> UserError:
    return UserError(
        f"hf:{name}: expected its Parquet files in the hub's cache or in {folder.resolve()}, {told}; "
        f"`gambeson data get hf:{name}` downloads them"
    )
