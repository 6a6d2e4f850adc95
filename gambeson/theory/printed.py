"""CDP's Tables 1, 7, 8 and 9 as printed, with the line of each row in the paper's text (shared/papers/001_*.txt)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Measure = Literal["clean", "robust"]
TRIALS = 50
"""Independent trials behind each of the paper's numbers."""
LENGTHS = {(2, 0): 2**0.5, (2, 90): 2**0.5, (2, 30): 1.0, (2, 60): 1.0, (100, 0): 2.0}
"""|mu| by (dimension, angle). Table 1 names it for 0 degrees; Table 8's 1 is found, not printed: METHOD, section 4."""
EPSILONS = {2: 0.5, 100: 0.1}
"""epsilon by dimension (caption of Table 1)."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One printed number: where it stands, of which trials it is the mean, and its deviation.

    c is None in the rows of real images. deviation is None where the paper repeats the mean in its place.
    """

    table: int
    line: int
    dimension: int
    degrees: int
    c: float | None
    count: int
    measure: Measure
    mean: float
    deviation: float | None

    @property
    def source(self) -> str:
        """`real`, or `c = 0.5` and so on."""
        return "real" if self.c is None else f"c = {self.c:g}"


# line of the text | c | n | (mean, deviation) of accuracy and robust accuracy, at the first and the second angle
_TABLE_7 = """
379 - 10   .9201 .0012 .7593 .0020   .9171 .0046 .7552 .0040
380 - 20   .9204 .0007 .7598 .0016   .9186 .0017 .7563 .0012
381 - 50   .9206 .0004 .7605 .0007   .9196 .0009 .7566 .0006
382 - 100  .9205 .0004 .7608 .0006   .9199 .0006 .7565 .0007
383 .5 10  .9159 .0099 .7541 .0096   .9104 .0121 .7492 .0122
384 .5 20  .9179 .0047 .7562 .0050   .9161 .0052 .7546 .0054
385 .5 50  .9200 .0023 .7586 .0024   .9183 .0022 .7570 .0022
386 .5 100 .9213 .0011 .7601 .0009   .9193 .0012 .7576 .0010
387 1 10   .9133 .0066 .7502 .0061   .9161 .0048 .7598 .0048
388 1 20   .9155 .0020 .7516 .0019   .9180 .0017 .7612 .0020
389 1 50   .9161 .0009 .7525 .0006   .9186 .0010 .7620 .0006
390 1 100  .9165 .0005 .7528 .0006   .9189 .0005 .7622 .0003
391 1.5 10 .9209 .0038 .7523 .0025   .9221 .0017 .7583 .0015
392 1.5 20 .9228 .0010 .7536 .0006   .9226 .0013 .7588 .0013
393 1.5 50 .9229 .0008 .7538 .0005   .9232 .0005 .7594 .0006
394 1.5 100 .9232 .0003 .7538 .0005  .9233 .0005 .7595 .0005
"""
_TABLE_8 = """
400 - 10   .8307 .0123 .6343 .0283   .8348 .0117 .6378 .0293
401 - 20   .8353 .0055 .6404 .0234   .8391 .005 .6433 .0222
402 - 50   .8371 .0022 .6450 .0168   .8410 .0017 .6494 .0134
403 - 100  .8385 .0010 .6461 .0097   .8413 .0013 .6522 .0102
404 .5 10  .8265 .0184 .6282 .0418   .8338 .0132 .6303 .0335
405 .5 20  .8299 .0129 .6352 .0325   .8365 .0132 .6393 .0316
406 .5 50  .8372 .0046 .6483 .0215   .8414 .0034 .6489 .0199
407 .5 100 .8402 .0015 .6466 .0110   .8431 .0012 .6510 .0135
408 1 10   .8383 .0158 .6439 .0319   .8377 .0074 .6396 .0267
409 1 20   .8425 .0060 .6480 .0218   .8416 .0034 .6513 .0178
410 1 50   .8455 .0023 .6553 .0128   .8432 .0020 .6503 .0122
411 1 100  .8457 .0021 .6535 .0100   .8435 .0014 .6501 .0096
412 1.5 10 .8431 .0045 .6542 .0173   .8368 .0073 .6446 .0213
413 1.5 20 .8447 .0021 .6542 .0142   .8393 .0022 .6479 .0150
414 1.5 50 .8455 .0006 .6556 .0082   .8404 .0005 .6488 .0089
415 1.5 100 .8457 .0004 .6547 .0057  .8404 .0007 .6486 .0082
"""
_TABLE_9 = """
420 - 10 .9023 .0192 .6843 -
420 - 20 .9341 .0128 .7519 -
420 - 50 .9599 .0028 .8078 -
420 - 100 .9682 .0014 .8239 -
421 .5 10 .7562 .0564 .4611 -
421 .5 20 .8566 .0307 .6047 -
421 .5 50 .9261 .0117 .7328 -
421 .5 100 .9505 .0047 .7848 -
422 1 10 .8866 .0273 .6557 -
422 1 20 .9371 .0091 .7555 -
422 1 50 .9620 .0028 .8085 -
422 1 100 .9695 .0012 .8239 -
423 1.5 10 .9400 .0100 .7603 -
423 1.5 20 .9591 .0037 .8031 -
423 1.5 50 .9710 .0013 .8280 -
423 1.5 100 .9743 .0008 .8343 -
"""
_TABLE_1 = """
119 - 10 .9159 .0099 .7541 .0096 .7562 .0564 .4611 -
119 - 100 .9213 .0011 .7601 .0009 .9505 .0047 .7848 -
120 .5 10 .9159 .0099 .7541 .0096 .7562 .0564 .4611 -
120 .5 100 .9213 .0011 .7601 .0009 .9505 .0047 .7848 -
121 1 10 .9133 .0066 .7502 .0061 .8866 .0273 .6557 -
121 1 100 .9165 .0005 .7528 .0006 .9695 .0012 .8239 -
122 1.5 10 .9209 .0038 .7523 .0025 .9400 .0100 .7603 -
122 1.5 100 .9232 .0003 .7538 .0005 .9743 .0008 .8343 -
"""
_LAYOUT: dict[int, tuple[str, tuple[tuple[int, int], ...]]] = {
    1: (_TABLE_1, ((2, 0), (100, 0))),
    7: (_TABLE_7, ((2, 0), (2, 90))),
    8: (_TABLE_8, ((2, 30), (2, 60))),
    9: (_TABLE_9, ((100, 0),)),
}
"""table -> its rows, and the (dimension, angle) of each group of four columns."""
_MEASURES: tuple[tuple[int, Measure], ...] = ((0, "clean"), (2, "robust"))
TABLES = tuple(_LAYOUT)


def cells(table: int) -> list[Cell]:
    """The numbers of a table, row by row. KeyError for another table."""
    text, groups = _LAYOUT[table]
    return [cell for row in text.split("\n") if row for cell in _row(table, row.split(), groups)]


def _row(table: int, words: list[str], groups: tuple[tuple[int, int], ...]) -> list[Cell]:
    line, c, count, *numbers = words
    found = []
    for place, (dimension, degrees) in enumerate(groups):
        for offset, measure in _MEASURES:
            mean, deviation = numbers[4 * place + offset : 4 * place + offset + 2]
            cell = Cell(
                table=table, line=int(line), dimension=dimension, degrees=degrees, count=int(count), measure=measure,
                c=None if c == "-" else float(c), mean=float(mean),
                deviation=None if deviation == "-" else float(deviation),
            )  # fmt: skip
            found.append(cell)
    return found
