"""`gambeson figures NAME`: the figures of the papers, drawn anew with the numbers behind them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gambeson.errors import UserError, unknown
from gambeson.options import take, take_number

if TYPE_CHECKING:
    from gambeson.theory.drawing import Panel
    from gambeson.theory.guidance_figure import Result, Setting

USAGE = """usage: gambeson figures NAME [OPTIONS]

Draws a figure of a paper anew, as SVG and PNG, and writes the numbers behind it as JSON.

figures:
  guidance         what contrastive guidance does to two Gaussian classes in 2-D (CDP, Figures 2 to 4; about a minute)

options:
  --out DIR        where the files go (default: figures)
  --seeds N        batches per panel, from 2 on (default 8); the numbers are means over them
  --images N       points of a batch, an even number (default 200)"""


def figures(argv: list[str]) -> None:
    """gambeson figures NAME [--out DIR] [--seeds N] [--images N]"""
    words = list(argv)
    if "--help" in words or "-h" in words:
        print(USAGE)
        return
    out = Path(take(words, "--out") or "figures")
    given = {"seeds": take_number(words, "--seeds"), "images": take_number(words, "--images")}
    if not words:
        raise UserError(f"figures: expected the name of a figure, one of {', '.join(FIGURES)}, got nothing")
    name, *rest = words
    if name not in FIGURES:
        raise unknown("figure", name, FIGURES)
    if rest:
        raise UserError(f"figures {name}: expected no further words, got {' '.join(rest)}; see gambeson figures --help")
    for path in FIGURES[name](out, {key: value for key, value in given.items() if value is not None}):
        print(path.resolve())


def guidance(out: Path, given: dict[str, Any]) -> list[Path]:
    """Runs the experiment and writes its figures and guidance.json into `out`; the paths."""
    from gambeson.store import open_folder, write_json
    from gambeson.theory.findings import summary
    from gambeson.theory.guidance_figure import Setting, run

    setting = Setting(**given)
    open_folder(out)
    panels, swept = run(setting, told=lambda line: print(line, flush=True))
    content = record(setting, panels, swept)
    write_json(out / "guidance.json", content)
    print(*summary(content["findings"]), sep="\n")
    return [*draw_all(setting, panels, out), out / "guidance.json"]


FIGURES: dict[str, Callable[[Path, dict[str, Any]], list[Path]]] = {"guidance": guidance}
"""The known figures: (folder, options) -> paths of the files written."""

CHOICES = {
    "world": "two classes N(-+(1, 1), I) in 2-D, equally likely (CDP, Figure 3: N(+-1, I))",
    "denoiser": "exact and class-conditional, so that every sample has a class whose accuracy can be measured; the "
    "paper names neither its network nor whether it was conditional",
    "sampler": "DDIM over 50 evenly spaced timesteps of the linear schedule; every step but the first is guided",
    "encoder": "the identity: losses see the direction of a noisy point in VP coordinates, since features are "
    "L2-normalised as in the authors' code; the paper names no encoder for this world",
    "losses": "InfoNCE temperature .1, hard negatives and debiased temperature 10, tau+ .1, beta 1 (CDP, appendix D.1)",
    "tried first": "one seed each: with encoders that keep the radius (lifted to a hemisphere or a sphere) the "
    "class-conditional loss spreads its classes too; with an unconditional denoiser there is one ring around both "
    "classes, not one within each; ratios .1, .25 and .5 differ in degree only",
    "real positives": "a real point of the sample's own class; the paper's caption says the mixture of both",
    "strength": "one rule for every panel, no tuning per variant: the mean length of the change of eps is `ratio` "
    "times the mean length of eps, along the unguided trajectories of a batch that is not measured; no sample's eps is "
    "changed by more than `clip` times its length, since the gradient of a direction grows as 1 / |x| at the origin",
    "statistics": "within: variance of a coordinate within a class; between: distance of the class means; separation: "
    "between / sqrt(within); accuracy: share of points nearest to the mean of their own class; agreement (right "
    "side): share on the side of the plane where the world has their class, by its Bayes rule; core: share of a class "
    "within half the median distance from its mean, .159 for a Gaussian and 0 for a circle; lobes: length of the "
    "mean of exp(2 i angle) around the class mean, 1 for two heaps, about .1 where points lie evenly; turn: angle "
    "in degrees between the line of the class means and that of the world; outside: share of points outside the drawn "
    "frame; clipped: share of changes that were bounded; std: over seeds",
    "difference": "to the unguided samples of the same noise, seed by seed: mean and half width of its 95 % interval; "
    "findings count a difference where this interval excludes 0",
}
"""What was chosen where the paper says nothing, and what the words of guidance.json mean."""


def record(setting: Setting, panels: list[Result], swept: list[Result]) -> dict[str, Any]:
    """The content of guidance.json."""
    from gambeson.canonical import plain
    from gambeson.store import execution, versions
    from gambeson.theory.findings import against_plain, findings
    from gambeson.theory.guidance_figure import LEVELS, SAMPLER, STARTS, ddim_alone
    from gambeson.theory.world import expected

    differences = {start: against_plain(panels, start) for start in STARTS}
    return {
        "choices": CHOICES,
        "setting": plain(setting),
        "sampler": plain(SAMPLER),
        "levels": plain(LEVELS),
        "exact": {"world": expected(), **{start: ddim_alone(scale) for start, scale in STARTS.items()}},
        "panels": [{**r.record(), "difference": differences[r.start].get(r.variant.name)} for r in panels],
        "other_ratios": [r.record() for r in swept],
        "findings": findings(panels),
        "execution": execution(),
        "versions": versions(),
    }


NOTE = (
    "variance within a class; distance of the class means; accuracy: share of points nearest to the mean of their own "
    "class; right side: share\nwhere the world has their class; core: share of a class within half the median distance "
    "from its mean (15.9 % for a Gaussian, 0 for a circle);\nturn: angle between the line of the class means and that "
    "of the world"
)


def draw_all(setting: Setting, panels: list[Result], out: Path) -> list[Path]:
    """The pictures: every variant from N(0, I) and from N(0, 4I), and those of Figure 2; their paths."""
    from gambeson.theory.drawing import write
    from gambeson.theory.guidance_figure import FIGURE_2, STARTS

    paths = []
    for (start, scale), number in zip(STARTS.items(), (3, 4), strict=True):
        own = [_panel(r) for r in panels if r.start == start]
        heading = f"Contrastive guidance from {start} (CDP, Figure {number}); {_numbers(setting)}"
        paths += write([_world(setting), *own], 4, heading, NOTE, out / f"guidance-start-{scale**2:.0f}")
    first = next(iter(STARTS))
    chosen = [_panel(r) for r in panels if r.start == first and r.variant.name in FIGURE_2]
    heading = f"Guidance without and with classes (CDP, Figure 2); {_numbers(setting)}"
    return paths + write(chosen, 3, heading, NOTE, out / "guidance-conditional")


def _numbers(setting: Setting) -> str:
    return f"mean \u00b1 standard deviation over {setting.seeds} seeds of {setting.images} samples, the first one drawn"


def _panel(result: Result) -> Panel:
    from gambeson.theory.drawing import Panel

    def number(name: str, digits: int, scale: float = 1.0) -> str:
        return f"{scale * result.mean(name):.{digits}f} \u00b1 {scale * result.spread(name):.{digits}f}"

    lines = (
        f"variance {number('within', 2)}, distance {number('between', 2)}",
        f"accuracy {number('accuracy', 0, 100.0)} %, right side {number('agreement', 0, 100.0)} %",
        f"core {number('core', 0, 100.0)} %, turn {number('turn', 0)}\u00b0",
    )
    return Panel(title=result.variant.title, lines=lines, points=result.points, classes=result.classes)


def _world(setting: Setting) -> Panel:
    """Points of the world itself, with its exact numbers."""
    from gambeson.randomness import generator
    from gambeson.theory.drawing import Panel
    from gambeson.theory.world import draw_balanced, expected

    points, classes = draw_balanced(setting.images, generator(0, "guidance figure", "world"))
    exact = expected()
    lines = (
        f"variance {exact['within']:.2f}, distance {exact['between']:.2f}",
        f"accuracy {100 * exact['accuracy']:.0f} %, right side {100 * exact['agreement']:.0f} %",
        f"core {100 * exact['core']:.0f} %, turn 0\u00b0",
    )
    return Panel(title="the world (exact numbers)", lines=lines, points=points, classes=classes)
