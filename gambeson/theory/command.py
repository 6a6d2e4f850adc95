"""`gambeson figures NAME`: the figures of the papers, drawn anew with the numbers behind them.

`gambeson theory`: CDP's theory checked, in theory/laboratory.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gambeson.errors import UserError, require, unknown
from gambeson.options import take, take_flag, take_number

if TYPE_CHECKING:
    from gambeson.theory.drawing import Panel
    from gambeson.theory.guidance_figure import Result, Setting

USAGE = """usage: gambeson figures NAME [OPTIONS]

Draws a figure of a paper anew, as SVG and PNG, and writes the numbers behind it as JSON.

figures:
  guidance         what contrastive guidance does to two Gaussian classes in 2-D (CDP, Figures 2 to 4; about a minute)
  figure-1         the cases of Proposition 1: which synthetic class means help (seconds)
  figure-2         contrastive guidance without and with classes, from N(0, I)
  figure-3         every contrastive loss from N(0, I)
  figure-4         every contrastive loss from N(0, 4 I)

options:
  --out DIR        where the files go (default: figures)
  --seeds N        batches per panel, from 2 on (default 8); the numbers are means over them (not figure-1)
  --images N       points of a batch, an even number (default 200; not figure-1)"""


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
    from gambeson.disk import open_folder, write_json
    from gambeson.theory.findings import summary
    from gambeson.theory.guidance_figure import Setting, run

    setting = Setting(**given)
    open_folder(out)
    panels, swept = run(setting, told=lambda line: print(line, flush=True))
    content = record(setting, panels, swept)
    write_json(out / "guidance.json", content)
    print(*summary(content["findings"]), sep="\n")
    return [*draw_all(setting, panels, out), out / "guidance.json"]


def figure_1(out: Path, given: dict[str, Any]) -> list[Path]:
    """The cases of Proposition 1 in the plane. UserError for options: its numbers are exact or of 4,000 trials."""
    from gambeson.disk import open_folder
    from gambeson.theory.proposition_figure import write

    if given:
        raise UserError(f"figures figure-1: expected no option but --out, got --{next(iter(given))}")
    open_folder(out)
    return write(out)


def figure_of_guidance(number: int) -> Callable[[Path, dict[str, Any]], list[Path]]:
    """Figure 2, 3 or 4 alone: (folder, options) -> figure-N.svg, .png and .json."""

    def draw_it(out: Path, given: dict[str, Any]) -> list[Path]:
        from gambeson.disk import open_folder, write_json
        from gambeson.theory.drawing import write
        from gambeson.theory.findings import against_plain
        from gambeson.theory.guidance_figure import FIGURE_2, STARTS, Setting, run, variants

        setting, name = Setting(**given), f"figure-{number}"
        start = list(STARTS)[number == 4]
        chosen = FIGURE_2 if number == 2 else [v.name for v in variants(setting.images)]
        open_folder(out)
        panels, _ = run(setting, lambda line: print(line, flush=True), [start], chosen)
        panels = [r for r in panels if r.start == start]
        write_json(out / f"{name}.json", _figure_record(setting, panels, against_plain(panels, start)))
        shown = [_panel(r) for r in panels]
        many, words = (3, "without and with classes") if number == 2 else (4, f"from {start}")
        heading = f"Contrastive guidance {words} (CDP, Figure {number}); {_numbers(setting)}"
        drawn = write(shown if number == 2 else [_world(setting), *shown], many, heading, NOTE, out / name)
        return [*drawn, out / f"{name}.json"]

    return draw_it


THEORY_USAGE = """usage: gambeson theory [OPTIONS]

Checks Contrastive-DP's theory: closed forms, Proposition 1, its tables beside ours with a verdict per cell, sweeps,
PORT's and IRGD's theory of the same world. Writes theory.html, tables.json, tables.md, theory.json and figures 1 to 4.

options:
  --out DIR          where the files go (default: theory); figures that lie there are not drawn again
  --tables LIST      tables to set ours beside (default: 1,7,8,9)
  --trials N         trials per cell, from 2 on (default 10000; the paper has 50)
  --sweep-trials N   trials per setting of the sweeps (default 300)
  --seed N           seed of all draws (default 0); with --features that of the recipe
  --seeds N          batches per panel of figures 2 to 4 (default 2)
  --no-figures       leave figures 2 to 4 out, which take most of the time
  --features RECIPE  also: does the theory say which images train the more robust head on a teacher's features? Trains
                     what the recipe needs (digits: minutes); takes the recipe's own fields and the options of
                     gambeson generate (--runs, --device, ...)"""


def theory(argv: list[str]) -> None:
    """gambeson theory [--out DIR] [--tables 1,7,8,9] [--trials N] [--features RECIPE ...]"""
    words = list(argv)
    if "--help" in words or "-h" in words:
        print(THEORY_USAGE)
        return
    out, drawn = Path(take(words, "--out") or "theory"), not take_flag(words, "--no-figures")
    seeds, recipe = take_number(words, "--seeds") or 2, take(words, "--features")
    seed = take(words, "--seed") if recipe is None else None
    given = {"trials": take_number(words, "--trials"), "sweep_trials": take_number(words, "--sweep-trials")}
    listed = take(words, "--tables")
    if recipe is None and words:
        raise UserError(f"theory: expected no further words, got {' '.join(words)}; see gambeson theory --help")
    from gambeson.disk import open_folder
    from gambeson.theory.laboratory import Laboratory, summary, write

    require(seeds >= 2, "--seeds", "at least 2, so that there is a spread", seeds)
    known: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    known |= {} if listed is None else {"tables": _numbers_of(listed)}
    spec = Laboratory(**known, seed=_seed(seed))
    study = None if recipe is None else study_of([recipe, *words])
    open_folder(out)  # before anything long, in case it cannot be made
    features = None if study is None else study()
    figures_made = _figures_for(out, seeds, drawn)
    paths = write(spec, out, figures=figures_made, features=features, told=lambda line: print(line, flush=True))
    import json

    print(*summary(json.loads(paths[0].read_text(encoding="utf-8"))), sep="\n")
    for path in [*paths, *figures_made]:
        print(path.resolve())


def _numbers_of(listed: str) -> tuple[int, ...]:
    """'1,7' -> (1, 7). UserError for anything but whole numbers between commas."""
    parts = listed.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise UserError(f"--tables: expected numbers between commas, such as 1,7,8,9, got {listed!r}")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _seed(word: str | None) -> int:
    if word is not None and not word.isdigit():
        raise UserError(f"--seed: expected a whole number from 0 on, got {word!r}")
    return int(word or 0)


def _figures_for(out: Path, seeds: int, drawn: bool) -> list[Path]:
    """The SVG files of Figures 1 to 4 in `out`: those that are there, and the missing ones drawn now."""
    found = []
    for number in (1, 2, 3, 4):
        path = out / f"figure-{number}.svg"
        if not path.exists() and (number == 1 or drawn):
            FIGURES[path.stem](out, {} if number == 1 else {"seeds": seeds})
        if path.exists():
            found.append(path)
    return found


def study_of(words: list[str]) -> Callable[[], dict[str, Any]]:
    """The study of real features for `RECIPE [--field value ...] [--runs DIR ...]`; call it to find or make its stages.

    UserError for what cannot be meant.
    """
    from gambeson.commands import ask
    from gambeson.theory.feature_sets import of_recipe

    asked = ask(words, "theory --features", weights=False)
    return lambda: asked.make("real features", of_recipe, asked.recipe)


FIGURES: dict[str, Callable[[Path, dict[str, Any]], list[Path]]] = {
    "guidance": guidance,
    "figure-1": figure_1,
    **{f"figure-{number}": figure_of_guidance(number) for number in (2, 3, 4)},
}
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
    from gambeson.machine import execution, versions
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


def _figure_record(setting: Setting, panels: list[Result], differences: dict[str, Any]) -> dict[str, Any]:
    """The content of figure-N.json: choices and panels as in guidance.json."""
    from gambeson.canonical import plain

    shown = [{**r.record(), "difference": differences.get(r.variant.name)} for r in panels]
    return {"choices": CHOICES, "setting": plain(setting), "panels": shown}


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
