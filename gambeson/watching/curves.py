"""Curves of a training that goes on, from its journal: as a line of small bars, and their last values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from gambeson.training.journal import LOG
from gambeson.watching.lines import Tail, number, text

BARS = "▁▂▃▄▅▆▇█"
UNDRAWN = ("step", "epoch", "rate")
"""What a journal's line says besides results: TensorBoard shows it."""
KEPT = 4000
"""Points of a curve that are kept; of more, every second one goes."""


def bars(values: Sequence[float], width: int = 16) -> str:
    """The values as `width` small bars, the lowest of them lowest; each is the mean of its stretch. '' for none."""
    some = [v for v in values if math.isfinite(v)]
    if not some:
        return ""
    width = min(width, len(some))
    edges = [i * len(some) // width for i in range(width + 1)]
    means = [math.fsum(v / (b - a) for v in some[a:b]) for a, b in pairwise(edges)]
    low = min(means) / 2  # halves: the difference of two floats may be none
    heights = [m / 2 - low for m in means]
    unit = max(heights) / len(BARS)
    return "".join(BARS[min(int(h / unit), len(BARS) - 1) if unit > 0 else 0] for h in heights)


class Curves:
    """A training's curves by name, read on as its journal grows."""

    def __init__(self, folder: Path) -> None:
        self.tail = Tail(folder / LOG)
        self.points: dict[str, list[tuple[int, float]]] = {}

    def look(self) -> None:
        """Reads what is new; a training that was resumed writes its journal anew."""
        anew, lines = self.tail.lines()
        if anew:
            self.points = {}
        for line in lines:
            self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        step = number(line.get("step"))
        if step is None:
            return
        for name, value in line.items():
            value = math.nan if isinstance(value, float) and not math.isfinite(value) else number(value)
            if name in UNDRAWN or value is None or not text(name) or len(self.points) > 50:
                continue
            points = self.points.setdefault(text(name), [])
            points.append((int(step), value))
            if len(points) > KEPT:
                del points[::2]

    def told(self, drawn: bool = True, width: int = 16) -> list[str]:
        """The curves in words: 'loss ▇▃▁ 0.52', 'clean ▁▄▇ 91.2 %'; `drawn`: with bars."""
        return [self._one(name, points, drawn, width) for name, points in self.points.items() if points]

    @staticmethod
    def _one(name: str, points: list[tuple[int, float]], drawn: bool, width: int) -> str:
        step, last = points[-1]
        drawing = bars([value for _, value in points], width) if drawn and len(points) > 1 else ""
        share = name in ("clean", "robust", "noisy") or name.startswith("accuracy")
        shown = f"{100 * last:.1f} %" if share else f"{last:.3g}"
        return " ".join(
            word for word in (name.replace("_", " "), drawing, shown, f"(step {step})" if share else "") if word
        )
