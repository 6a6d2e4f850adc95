"""Writes the demo's table in docs/start.md and README's figure from a finished run: python dev/demo.py RUN."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from gambeson.report import verdict
from gambeson.report.gather import gather
from gambeson.run import open_run

BEGIN, END = "<!-- from dev/demo.py -->\n", "<!-- end -->"


def side(grid: np.ndarray) -> np.ndarray:
    """[classes, k, H, W, 1] -> one picture, a column per class, a white line between images."""
    padded = np.pad(grid[..., 0], ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=255)
    return padded.transpose(1, 2, 0, 3).reshape(padded.shape[1] * padded.shape[2], -1)


def main() -> None:
    material = gather(open_run(Path(sys.argv[1])))
    assert material.grids is not None
    sides = [side(g) for g in (material.grids.plain, material.grids.guided) if g is not None]
    gap = np.full((sides[0].shape[0], 3), 255, np.uint8)
    picture = Image.fromarray(np.concatenate([sides[0], gap, sides[1]], axis=1))
    picture.resize((picture.width * 6, picture.height * 6), Image.Resampling.NEAREST).save("docs/samples.png")
    sentences = "\n".join(f"- {s}" for s in verdict.judge(material).sentences)
    text = f"{BEGIN}\n{verdict.markdown_table(material)}\n\n{sentences}\n\n{END}"
    page = Path("docs/start.md")
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(before + text + rest.split(END, 1)[1], encoding="utf-8")


main()
