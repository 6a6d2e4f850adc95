"""The page as one HTML text: its own style and script inline, each allowed by its hash, every string escaped."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any, get_args

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gambeson.threat import Norm, ThreatModel
from gambeson.tryout.attacking import TICKS, Attacker, about, grid
from gambeson.tryout.certifying import Certifier
from gambeson.tryout.pictures import FORMATS, MOST_BYTES, thumbnail
from gambeson.tryout.subject import Tried

NORMS: dict[Norm, str] = {
    "linf": "L∞: each pixel by at most ε",
    "l2": "L2: ε in all, as a length",
    "l1": "L1: ε in all, summed",
}
"""What each norm bounds, in words."""


def render(tried: Tried, attacker: Attacker, certifier: Certifier, token: str) -> tuple[str, str]:
    """The page, and the Content-Security-Policy that it is sent with."""
    here = Path(__file__).parent
    style, script = ((here / name).read_text(encoding="utf-8") for name in ("try.css", "try.js"))
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("page.html.j2").render(
        tried=tried,
        heading=heading(tried.title),
        size=" × ".join(map(str, tried.shape)),
        channels="grey" if tried.shape[0] == 1 else "colour" if tried.shape[0] == 3 else f"{tried.shape[0]}-channel",
        threat=threat_words,
        attack=about(attacker),
        ticks=TICKS,
        norms=[(norm, NORMS[norm]) for norm in get_args(Norm)],
        smoothing=certifier.smoothing,
        samples=_samples(tried),
        formats=", ".join(FORMATS),
        megabytes=MOST_BYTES // 1_000_000,
        facts=_facts(tried, certifier, token),
        style=Markup(style),
        script=Markup(script),
    )
    return text, policy(style, script)


def policy(style: str, script: str) -> str:
    """What the page may load: this style, this script, pictures written into it, and answers of its own server."""
    allowed = (
        f"'sha256-{base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()}'" for each in (style, script)
    )
    rules = {
        "default-src": "'none'",
        "style-src": next(allowed),
        "script-src": next(allowed),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def heading(title: str) -> str:
    """The title, of a long path in it only the last two names."""
    return re.sub(r"\S*/([^/\s]+/[^/\s]+)$", r"\1", title)


def threat_words(threat: ThreatModel) -> str:
    """'L∞ ε 8/255' or 'L2 ε 0.5'."""
    count = threat.epsilon * 255
    whole = threat.norm == "linf" and abs(count - round(count)) < 1e-6
    radius = f"{round(count)}/255" if whole else f"{threat.epsilon:.4g}"
    return f"{NORMS[threat.norm].partition(':')[0]} ε {radius}"


def _samples(tried: Tried) -> list[dict[str, Any]]:
    """A thumbnail and a name for each image to click on."""
    if tried.samples is None:
        return []
    pairs = zip(tried.samples.images.float().split(1), tried.samples.labels.tolist(), tried.places, strict=True)
    return [{"picture": thumbnail(x), "label": tried.class_names[k], "place": place} for x, k, place in pairs]


def _facts(tried: Tried, certifier: Certifier, token: str) -> dict[str, Any]:
    """What the script needs to know."""
    return {
        "token": token,
        "width": tried.shape[2],
        "height": tried.shape[1],
        "grid": {norm: grid(tried, norm) for norm in get_args(Norm)},
        "norm": tried.threat.norm,
        "tick": round(tried.threat.epsilon / grid(tried, tried.threat.norm)),
        "sigma": certifier.smoothing.sigma,
        "bytes": MOST_BYTES,
        "samples": len(tried.places),
    }
