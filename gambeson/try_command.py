"""`gambeson try`: a page on this machine where an image is dropped, attacked and certified, live."""

from __future__ import annotations

import os
import sys
import webbrowser
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from gambeson.data.datasets import door
from gambeson.errors import UserError, require
from gambeson.options import take, take_flag, take_machine, take_number, take_runs
from gambeson.robustness.smoothing import Smoothing
from gambeson.terminal import say
from gambeson.threat import ThreatModel
from gambeson.tryout.attacking import Attacker
from gambeson.tryout.certifying import Certifier
from gambeson.tryout.server import Server
from gambeson.tryout.subject import Asked, Shape, Tried, opened

USAGE = """usage: gambeson try CLASSIFIER [OPTIONS]

Opens a page on this machine: drop an image on it, move eps, and see what the network says, the attacked image, the
smallest eps found that breaks the answer, and the certified L2 radius of randomised smoothing. Ctrl-C ends it.
Nothing is written, nothing leaves this machine, and no other machine can open the page.

CLASSIFIER: a run (its folder, its name or the beginning of it); a folder that `gambeson train` wrote, or a
classifier.safetensors; a checkpoint file of RobustBench (.pt); an .onnx file (no gradients, so a weaker attack); with
--trust a TorchScript file (.pt), a torch.export file (.pt2) or module:function.

options:
  --data D         whose test images can be clicked on: a named set (gambeson data list), a folder with a folder of
                   images for each class, an .npz file (default: those of the run's recipe)
  --all-images     all images of an .npz file, also where training held out a share
  --data-root DIR  where named image sets lie (default ./data or $GAMBESON_DATA)
  --shape CxHxW    the size of the images, such as 3x32x32, where neither the classifier nor --data says it
  --threat T       where the slider starts: linf:8/255, l2:0.5, l1:12 (default: what it was trained to withstand)
  --steps N        gradient steps of one attack (default 40)
  --sigma S        noise of the certificate, in pixels of [0, 1] (default: what it was trained with, otherwise 0.25)
  --samples N      noisy copies that bound the certificate (default 10,000)
  --alpha A        probability that the certificate is wrong (default 0.001)
  --seed S         seed of the draws (default 0): the same image is given the same answers
  --arm A          of a run: whose classifier, such as guided or real (default: the last of its arms)
  --run-seed S     of a run: which training of it (default: the first)
  --trust          run the program that CLASSIFIER is, with your rights
  --zoo NAME       the entry of RobustBench that a checkpoint file is
  --port N         the port of the page (default: any free one)
  --no-browser     print the address only
  --runs DIR       where runs live (default ./runs or $GAMBESON_RUNS)
  --device D       cpu (default), cuda, cuda:1, mps; also $GAMBESON_DEVICE"""


@dataclass(frozen=True, kw_only=True)
class Trying:
    """What the command line asked for."""

    asked: Asked
    steps: int
    sigma: float | None
    samples: int
    alpha: float
    seed: int
    port: int
    browser: bool


def read(argv: list[str]) -> Trying:
    """The words of the command. Raises UserError: what was expected, what came, the fix."""
    words = list(argv)
    data, root, threat, shape = (take(words, f"--{name}") for name in ("data", "data-root", "threat", "shape"))
    arm, entry, seed, run_seed = (take(words, f"--{name}") for name in ("arm", "zoo", "seed", "run-seed"))
    trust, everything, alone = (take_flag(words, f"--{name}") for name in ("trust", "all-images", "no-browser"))
    steps, samples, port = (take_number(words, f"--{name}") for name in ("steps", "samples", "port"))
    sigma, alpha = (_share(words, f"--{name}") for name in ("sigma", "alpha"))
    runs, machine = take_runs(words), take_machine(words)
    first = words.pop(0) if words and not words[0].startswith("-") else None
    require(first is not None, "gambeson try", "a classifier first (a run, a folder or a file)", " ".join(argv))
    require(not words, "gambeson try", "no further words; `gambeson try --help` lists the options", " ".join(words))
    require(not everything or data is not None, "--all-images", "an .npz file as --data", data)
    require(port is None or port < 65536, "--port", "1 to 65535", port)
    assert first is not None
    if root is not None:
        os.environ["GAMBESON_DATA"] = root
    asked = Asked(
        word=first,
        runs=runs.resolve(),
        arm=arm,
        run_seed=None if run_seed is None else _whole("--run-seed", run_seed),
        data=None if data is None else door(data),
        everything=everything,
        shape=None if shape is None else _shape(shape),
        threat=None if threat is None else ThreatModel.parse(threat),
        entry=entry,
        trust=trust,
        device=machine.device,
    )
    return Trying(
        asked=asked,
        steps=steps or 40,
        sigma=sigma,
        samples=samples or 10_000,
        alpha=0.001 if alpha is None else alpha,
        seed=0 if seed is None else _whole("--seed", seed),
        port=port or 0,
        browser=not alone,
    )


def _share(words: list[str], name: str) -> float | None:
    """Removes `--name VALUE` from the words; a decimal, or a fraction such as 1/4."""
    word = take(words, name)
    try:
        return None if word is None else float(Fraction(word))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"{name}: expected a number such as 0.25, got {word!r}") from None


def _whole(name: str, word: str) -> int:
    require(word.isascii() and word.isdigit(), name, "a whole number from 0", word)
    return int(word)


def _shape(word: str) -> Shape:
    """'3x32x32' as (channels, height, width)."""
    parts = word.lower().replace(",", "x").split("x")
    fits = len(parts) == 3 and all(part.isdigit() and int(part) > 0 for part in parts)
    require(fits, "--shape", "channels, height and width such as 3x32x32", word)
    channels, height, width = map(int, parts)
    require(channels in (1, 3), "--shape", "1 or 3 channels, since pictures have no other", word)
    return channels, height, width


def try_(argv: list[str]) -> None:
    """gambeson try CLASSIFIER [OPTIONS]"""
    if not argv or {"--help", "-h"} & set(argv):
        print(USAGE)
        return
    trying = read(argv)
    tried = opened(trying.asked)
    for remark in tried.remarks:
        say(remark, file=sys.stderr)
    with serving(trying, tried) as server:
        say(f"trying {tried.title}\n{server.url}\nOpen it in a browser on this machine; Ctrl-C ends it", flush=True)
        if trying.browser and _has_window():
            webbrowser.open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nended")


def serving(trying: Trying, tried: Tried) -> Server:
    """The server of an opened classifier, bound and ready."""
    given: dict[str, Any] = {"samples": trying.samples, "alpha": trying.alpha}
    sigma = tried.noise if trying.sigma is None else trying.sigma
    smoothing = Smoothing(**given) if sigma is None else Smoothing(sigma=float(sigma), **given)
    attacker = Attacker(tried, trying.steps, seed=trying.seed)
    return Server(tried, attacker, Certifier(tried, smoothing, trying.seed), trying.port)


def _has_window() -> bool:
    """Whether a browser would have a window: a browser of the terminal would take it over."""
    return not sys.platform.startswith("linux") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
