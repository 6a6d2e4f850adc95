"""Images of a store or a selection in the formats of others, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from gambeson.data.exchange import folder, npz, parquet, port, webdataset
from gambeson.data.exchange.incoming import about_file
from gambeson.data.exchange.outgoing import Outgoing, free
from gambeson.data.exchange.store_card import card_file, source_card
from gambeson.disk import atomic, write_json
from gambeson.errors import require, unknown

FILES: dict[str, tuple[str, Callable[[Outgoing, Path], None]]] = {
    "edm": (".npz", partial(npz.write, keys=npz.KEYS[0])),
    "cdp": (".npz", partial(npz.write, keys=npz.KEYS[1])),
    "port": (".bin", port.write),
}
"""Formats of a single file (PORT's has its labels beside it): its ending, and what writes it."""
FOLDERS = ("webdataset", "folder", "parquet")
FORMATS = (*FILES, *FOLDERS)


def export(out: Outgoing, form: str, path: Path, per_file: int | None = None, images_as: str = "png") -> None:
    """Writes the images at `path`, whole or not at all, with a JSON beside that says what they are.

    `per_file`: images of a shard, for WebDataset and Parquet; `images_as`: png or npy, for WebDataset. A folder that
    was interrupted goes on. UserError for an unknown format and where something lies already.
    """
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    require(images_as == "png" or form == "webdataset", "--images-as", f"png in the format {form}", images_as)
    require(per_file is None or form in ("webdataset", "parquet"), "--per-file", f"none in the format {form}", per_file)
    if form in FILES:
        _file(out, form, path)
    elif form == "webdataset":
        webdataset.write(out, path, per_file or webdataset.PER_SHARD, images_as)
    elif form == "parquet":
        parquet.write(out, path, per_file)
    else:
        folder.write(out, path)


def _file(out: Outgoing, form: str, path: Path) -> None:
    """A single file; its JSON and its card come first, which are nothing without it."""
    ending, write = FILES[form]
    require(path.suffix == ending, "--out", f"a file that ends with {ending}, for the format {form}", str(path))
    beside, card = about_file(path), card_file(path)
    for place in (path, beside, card):
        free(place)
    try:
        write_json(beside, out.about)
        with atomic(card) as temporary:
            temporary.write_text(source_card(out.source, path.name, {}), encoding="utf-8")
        write(out, path)
    except BaseException:
        if not path.exists():
            beside.unlink(missing_ok=True)
            card.unlink(missing_ok=True)
        raise
