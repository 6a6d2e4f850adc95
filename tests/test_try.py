"""gambeson try: closed forms of attack and certificate, pictures of any kind, a server that only its page can ask."""

import base64
import http.client
import io
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import norm as gauss
from tiny import tiny_recipe
from torch import nn

from gambeson import files
from gambeson.data.datasets import Digits
from gambeson.data.imageset import Split
from gambeson.data.pictures import Rule
from gambeson.disk import checksum
from gambeson.errors import EnvironmentFault, UserError
from gambeson.models.classifiers import classifier_header
from gambeson.models.files import save_tensors
from gambeson.models.hub import save_pretrained
from gambeson.models.resnet import ResNetSpec
from gambeson.recipe import Arm, Recipe
from gambeson.robustness.smoothing import Smoothing
from gambeson.threat import ThreatModel
from gambeson.try_command import read, serving
from gambeson.tryout import pictures
from gambeson.tryout.attacking import TICKS, Attacker, Outcome, grid, smallest
from gambeson.tryout.certifying import Certifier
from gambeson.tryout.desk import Desk
from gambeson.tryout.page import heading
from gambeson.tryout.pictures import magnified, packed, picture_of, read_picture, thumbnail, unpacked
from gambeson.tryout.server import TOKEN, Server
from gambeson.tryout.subject import Asked, Tried, opened

SHAPE = (1, 4, 4)
STEPS = 8
MARGIN = 1.04  # of the grey image
SIGNS = torch.tensor([1.0, -1.0] * 8)
WEIGHT = 0.5 * SIGNS  # L1 norm 8, L2 norm 2: the answer breaks at 0.13 in linf, 0.52 in L2
GREY = torch.full((1, *SHAPE), 0.5)
NASTY = "yes </script><b>\"&'"


class Line(nn.Module):
    """Images -> logits 0 and w x + b."""

    def __init__(self, margin: float = MARGIN) -> None:
        super().__init__()
        self.bias = margin - float(WEIGHT.sum()) * 0.5

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        score = images.flatten(1) @ WEIGHT.to(images) + self.bias
        return torch.stack([torch.zeros_like(score), score], 1)


def tried(network: Any = None, **changes: Any) -> Tried:
    """The linear classifier, ready to be tried."""
    facts: dict[str, Any] = {
        "title": "a line",
        "network": (network or Line()).eval() if isinstance(network or Line(), nn.Module) else network,
        "shape": SHAPE,
        "class_names": ("no", NASTY),
        "threat": ThreatModel(epsilon=0.1),
        "trained": None,
        "noise": None,
        "gradients": True,
        "samples": Split(torch.cat([GREY, 1 - GREY * SIGNS.reshape(1, 1, 4, 4).clamp(0)]), torch.tensor([1, 0])),
        "places": (3, 8),
        "source": "lines",
    }
    return Tried(**(facts | changes))


# --- attacks -----------------------------------------------------------------------------------------------------


def told(attacker: Attacker, norm: Any, tick: int, image: torch.Tensor = GREY) -> dict[str, Any]:
    """The last line of each kind that an answer ends with."""
    found: dict[str, Any] = {}
    for line in attacker.answer(image, norm, tick):
        found |= line or {}
    return found


@pytest.mark.parametrize(
    ("norm", "radius"), [("linf", MARGIN / 8), ("l2", MARGIN / 2), ("l1", 2 * MARGIN)], ids=["linf", "l2", "l1"]
)
def test_the_smallest_radius_is_that_of_the_closed_form(norm, radius):
    """A linear margin m falls by eps times the dual norm of w: it is 0 at m / ||w||_dual."""
    attacker = Attacker(tried(), STEPS)
    step = grid(attacker.tried, norm)
    tick = math.ceil(radius / step)
    assert 1 < tick < TICKS
    searched = told(attacker, norm, 0)["smallest"]
    assert (searched["tick"], searched["final"]) == (tick, True)
    assert searched["epsilon"] == pytest.approx(tick * step)
    found = told(attacker, norm, tick)
    assert found["attack"]["broken"]
    assert found["attack"]["classes"][0][0] == "no"
    assert found["attack"]["distance"] <= tick * step * (1 + 1e-5)
    below = told(attacker, norm, tick - 1)["attack"]
    assert not below["broken"]
    assert below["steps"] == below["of"] == STEPS
    assert below["classes"][0][0] == NASTY


def test_a_grid_is_four_times_the_threat_and_usual_where_it_says_nothing():
    subject = tried()
    assert grid(subject, "linf") * TICKS == pytest.approx(0.4)
    assert grid(subject, "linf") * TICKS / 4 == pytest.approx(0.1)
    assert grid(subject, "l2") * TICKS == pytest.approx(2.0)
    assert grid(replace(subject, threat=ThreatModel(norm="l2", epsilon=1.0)), "linf") == pytest.approx(1 / 255)


def test_probabilities_are_the_softmax_and_radius_0_is_no_attack():
    found = told(Attacker(tried(), STEPS), "linf", 0)
    share = 1 / (1 + math.exp(-MARGIN))
    assert found["clean"]["classes"] == [[NASTY, pytest.approx(share)], ["no", pytest.approx(1 - share)]]
    assert found["attack"]["none"]
    assert found["attack"]["attacked"] == picture_of(GREY)
    assert found["attack"]["classes"] == found["clean"]["classes"]
    assert found["done"]


def test_the_attack_is_against_the_networks_own_answer():
    """The other side of the line: the answer is 'no', and breaking it means 'yes'."""
    found = told(Attacker(tried(Line(-MARGIN)), STEPS), "linf", 16)
    assert found["clean"]["classes"][0][0] == "no"
    assert found["attack"]["broken"]
    assert found["attack"]["classes"][0][0] == NASTY
    assert found["smallest"]["tick"] == math.ceil(0.13 / 0.0125)


def test_what_nothing_breaks_is_said_to_be_unbroken():
    found = told(Attacker(tried(Line(100.0)), STEPS), "linf", 5)
    assert not found["attack"]["broken"]
    assert found["smallest"] == {"tick": None, "epsilon": None, "final": True, "last": pytest.approx(0.4)}


def test_an_image_found_in_a_smaller_ball_counts_in_a_larger_one():
    """Attacks are not monotone: one that fails at 8 does not mend what another broke at 5, inside that ball."""
    attacker, image = Attacker(tried(), STEPS), GREY

    def climb(x: Any, logits: Any, norm: Any, tick: int) -> Iterator[int | Outcome]:
        broken = tick != 8 and tick >= 5
        yield 1
        yield Outcome(tick=tick, broken=broken, steps=1, of=STEPS, image=image, logits=logits, distance=0.1)

    attacker.climb = climb  # type: ignore[method-assign]
    assert told(attacker, "linf", 5)["smallest"]["tick"] == 5
    found = told(attacker, "linf", 8)["attack"]
    assert (found["broken"], found["found_at"], found["tick"]) == (True, 5, 8)
    alone = Attacker(tried(), STEPS)
    alone.climb = climb  # type: ignore[method-assign]
    found = told(alone, "linf", 8)
    assert (found["attack"]["broken"], found["smallest"]["tick"]) == (False, 9)


def test_a_search_is_remembered_and_the_same_again():
    attacker = Attacker(tried(), STEPS)
    first, begun = told(attacker, "linf", 12), len(attacker._known)
    calls = []
    attacker.climb = lambda *words: calls.append(words)  # type: ignore[method-assign]
    assert told(attacker, "linf", 12) == first
    assert (calls, begun) == ([], 1)
    assert told(Attacker(tried(), STEPS), "linf", 12) == first


def test_without_gradients_the_attack_asks_for_answers_alone():
    class Deaf(Line):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images.detach())

    attacker = Attacker(tried(Deaf(), gradients=False), queries=60)
    found = told(attacker, "linf", 16)
    assert found["attack"]["of"] == 59
    assert found["attack"]["broken"]
    assert found["smallest"]["tick"] >= math.ceil(0.13 / 0.0125)


def test_what_was_added_is_magnified_to_the_full_range():
    image = torch.full((1, *SHAPE), 0.5)
    moved = image.clone()
    moved[0, 0, 0, 0] += 0.1
    moved[0, 0, 0, 1] -= 0.05
    uri, times = magnified(image, moved)
    assert times == pytest.approx(5.0, rel=1e-5)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
    assert shown[0, :3].tolist() == [255, 64, 128]
    assert magnified(image, image)[1] == 1.0


# --- certificates ------------------------------------------------------------------------------------------------


def test_the_last_certificate_is_that_of_certify_and_nears_the_closed_form():
    """The smoothed line has radius m / ||w||_2 = 0.52 whatever sigma is; n copies certify a little less."""
    subject, smoothing = tried(), Smoothing(sigma=0.25, samples=3000)
    steps = [step for step in Certifier(subject, smoothing, seed=4).steps(GREY, 0.25) if step is not None]
    whole = smoothing.certify(subject.network, GREY, seed=4)
    assert steps[-1].final
    assert not any(step.final for step in steps[:-1])
    assert steps[-1].radius == whole.radius.item()
    assert steps[-1].p_lower == whole.p_lower.item()
    assert steps[-1].candidate == whole.predicted.item() == 1
    assert steps[-1].share == whole.votes[0, 1].item() / 3000
    assert steps[-1].share == pytest.approx(gauss.cdf(MARGIN / (0.25 * 2)), abs=0.01)
    assert 0.45 < steps[-1].radius < MARGIN / 2
    assert [step.copies for step in steps] == sorted({step.copies for step in steps})
    assert len(steps) > 3


def test_an_image_on_the_line_abstains():
    lines = [line for line in Certifier(tried(Line(0.0)), Smoothing(samples=500)).answer(GREY, 0.25) if line]
    last = lines[-1]["certificate"]
    assert (last["abstains"], last["radius"], last["final"]) == (True, 0.0, True)


def test_a_certificate_says_whether_the_classifier_knows_the_noise():
    def hint(noise: float | None, sigma: float) -> str:
        return Certifier(tried(noise=noise), Smoothing()).hint(sigma)

    assert hint(0.25, 0.25) == ""
    assert "σ 0.5" in hint(0.5, 0.25)
    assert "Nothing says" in hint(None, 0.25)


def test_a_finished_certificate_is_remembered():
    certifier = Certifier(tried(), Smoothing(samples=300))
    first = [line for line in certifier.answer(GREY, 0.5) if line][-1]
    certifier.steps = lambda *_: pytest.fail("asked again")  # type: ignore[method-assign]
    assert list(certifier.answer(GREY, 0.5)) == [first]


# --- pictures ----------------------------------------------------------------------------------------------------


def file_of(picture: Image.Image, kind: str = "PNG", **words: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **words)
    return buffer.getvalue()


def noise_picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def test_a_picture_becomes_what_the_doors_of_data_sets_make_of_it():
    for size, grey in (((50, 30), False), ((9, 21), True), ((16, 16), False)):
        content = file_of(noise_picture(*size))
        expected = Rule(size=8, grey=grey).image(content)
        found = read_picture(content, (1 if grey else 3, 8, 8)).image
        assert np.array_equal((found[0] * 255).round().byte().permute(1, 2, 0).numpy(), expected)


def test_a_picture_of_the_right_size_keeps_every_pixel():
    seen = read_picture(file_of(noise_picture(8, 8)), (3, 8, 8))
    assert np.array_equal(
        (seen.image[0] * 255).round().byte().permute(1, 2, 0).numpy(), np.asarray(noise_picture(8, 8))
    )
    assert "no pixel was changed" in seen.told[-1]


@pytest.mark.parametrize(
    ("mode", "kind", "words"),
    [
        ("RGBA", "PNG", "transparency laid on white"),
        ("LA", "PNG", "transparency laid on white"),
        ("P", "GIF", "a palette turned into RGB"),
        ("CMYK", "JPEG", "colours for print turned into RGB"),
        ("1", "PNG", "grey in all three channels"),
        ("L", "BMP", "grey in all three channels"),
        ("I;16", "PNG", "16 bits cut to 8"),
    ],
)
def test_any_mode_is_read_and_what_was_changed_is_said(mode, kind, words):
    picture = noise_picture(12, 9, "L" if mode == "I;16" else mode)
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
    seen = read_picture(file_of(picture, kind), (3, 8, 8))
    assert words in seen.told
    assert seen.image.shape == (1, 3, 8, 8)
    if mode == "I;16":
        plain = read_picture(file_of(noise_picture(12, 9, "L")), (3, 8, 8))
        assert torch.equal(seen.image, plain.image)


def test_transparency_is_white_and_exif_turns():
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert read_picture(file_of(clear), (3, 8, 8)).image.min() == 1
    lying = noise_picture(10, 20)
    note = Image.Exif()
    note[0x0112] = 6
    turned = read_picture(file_of(lying, "PNG", exif=note), (3, 8, 8))
    assert "turned as its EXIF note says" in turned.told
    upright = read_picture(file_of(lying.rotate(-90, expand=True)), (3, 8, 8))
    assert torch.equal(turned.image, upright.image)


def test_networks_of_oblong_images_get_the_centre():
    picture = Image.new("RGB", (40, 20), "black")
    picture.paste("white", (15, 0, 25, 20))
    seen = read_picture(file_of(picture), (3, 8, 4)).image
    assert seen.shape == (1, 3, 8, 4)
    assert seen.min() > 0.9


def bomb(side: int) -> bytes:
    """A PNG that says it has side x side pixels, in a few bytes."""
    content = bytearray(file_of(Image.new("L", (8, 8))))
    content[16:24] = side.to_bytes(4) * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4)
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"hello", "no picture of a kind"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture of a kind"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture of a kind"),
        (file_of(noise_picture(64, 64))[:900], "damaged"),
        (bomb(7000), "40,000,000 are read"),
        (bomb(60000), "too many pixels"),
        (file_of(Image.new("L", (600, 2))), "too thin"),
        (file_of(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), "32-bit numbers"),
        (file_of(Image.fromarray(np.full((8, 8), 1 << 20, np.int32)), "TIFF"), "32-bit numbers"),
        (b"\0" * 20_000_001, "20 MB"),
    ],
    ids=["empty", "text", "svg", "eps", "cut", "large", "bomb", "thin", "float", "int", "bytes"],
)
def test_what_is_no_picture_is_refused_in_words(content, words):
    with pytest.raises(UserError, match=words):
        read_picture(content, (3, 8, 8))


def test_damaged_files_are_refused_or_read_but_nothing_else_happens():
    """Random bytes changed in files of every kind: an image of the right size, or UserError."""
    rng, outcomes = random.Random(0), set()
    for kind in pictures.FORMATS:
        whole = file_of(noise_picture(24, 16), kind)
        for _ in range(40):
            content = bytearray(whole)
            for _ in range(rng.randint(1, 8)):
                content[rng.randrange(len(content))] = rng.randrange(256)
            try:
                assert read_picture(bytes(content), (3, 8, 8)).image.shape == (1, 3, 8, 8)
                outcomes.add("read")
            except UserError:
                outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_pixels_travel_without_loss():
    image = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpacked(packed(image), (3, 5, 7)), image)
    bad = image.clone()
    bad[0, 0, 0, 0] = math.nan
    for text in (None, 5, "", "äö", packed(image)[:-8], packed(bad), packed(image + 1), packed(image - 1)):
        with pytest.raises(UserError, match="105 pixels"):
            unpacked(text, (3, 5, 7))


def test_thumbnails_are_small():
    uri = thumbnail(torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)))
    assert Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size == (64, 64)


# --- the desk ----------------------------------------------------------------------------------------------------


def slow(name: str, log: list[str], steps: int = 1000, first: threading.Event | None = None) -> Iterator[dict | None]:
    for i in range(steps):
        log.append(name)
        if first is not None:
            first.set()
        time.sleep(0.002)
        yield {"i": i} if i == steps - 1 else None


def test_only_the_newest_of_a_kind_is_finished_and_attacks_come_first():
    desk, log, begun = Desk(), [], threading.Event()
    certificate = desk.ask("certificate", slow("certificate", log, 60, begun))
    assert begun.wait(5)
    old = desk.ask("attack", slow("old", log, 10_000))
    new = desk.ask("attack", slow("new", log, 20))
    assert [set(line) for line in old] == [{"stopped"}]
    assert list(new) == [{"i": 19}]
    assert list(certificate) == [{"i": 59}]
    here = [i for i, name in enumerate(log) if name == "new"]
    assert "certificate" not in log[here[0] : here[-1]]
    assert log.count("old") < 100
    desk.close()


def test_a_failure_is_told_in_words_and_the_next_is_answered(capsys):
    def fails(error: Exception) -> Iterator[dict | None]:
        yield {"i": 0}
        raise error

    desk = Desk()
    assert list(desk.ask("attack", fails(UserError("expected this")))) == [{"i": 0}, {"error": "expected this"}]
    (_, line) = desk.ask("attack", fails(RuntimeError("secret\nTraceback (most recent call last)")))
    assert "RuntimeError: secret" in line["error"]
    assert "Traceback" not in line["error"]
    assert "RuntimeError: secret" in capsys.readouterr().err
    (_, line) = desk.ask("attack", fails(RuntimeError("CUDA out of memory")))
    assert "not enough memory" in line["error"]
    assert list(desk.ask("attack", slow("", [], 2))) == [{"i": 1}]
    desk.close()


def test_closing_ends_whoever_waits_and_whoever_comes_later():
    desk, log = Desk(), []
    waiting = desk.ask("attack", slow("old", log, 100_000))
    desk.close()
    assert [set(line) for line in waiting] == [{"stopped"}]
    assert list(desk.ask("attack", slow("late", log))) == []


# --- the server --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    yield from running(tried())


def running(subject: Tried, samples: int = 2000, steps: int = STEPS) -> Iterator[Server]:
    made = Server(subject, Attacker(subject, steps), Certifier(subject, Smoothing(samples=samples)))
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join(5)


def ask(server: Server, path: str, body: bytes | dict | None = None, **headers: str | None) -> tuple[int, Any]:
    """Status and answer, as text or as JSON lines. body None: GET. A header of None is left out."""
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    given: dict[str, str | None] = {TOKEN: server.token, "Host": f"127.0.0.1:{server.server_port}"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    if content is not None and "Content-Length" not in given:
        given["Content-Length"] = str(len(content))
    line = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    line.putrequest("GET" if body is None else "POST", path, skip_host=True, skip_accept_encoding=True)
    for name, value in given.items():
        if value is not None:
            line.putheader(name, value)
    line.endheaders(content)
    answer = line.getresponse()
    text = answer.read().decode()
    line.close()
    if "json" in (answer.headers["Content-Type"] or ""):
        return answer.status, [json.loads(each) for each in text.splitlines()]
    return answer.status, text


def question(**changes: Any) -> dict[str, Any]:
    return {"pixels": packed(GREY), "norm": "linf", "tick": 12, "sigma": 0.25} | changes


def alive(server: Server) -> bool:
    return ask(server, "/attack", question(tick=0))[0] == 200


def test_the_page_is_its_own_small_and_escaped(server):
    status, text = ask(server, f"/?token={server.token}")
    assert status == 200
    assert NASTY not in text
    assert "&lt;/script&gt;" in text
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    here = Path(pictures.__file__).parent
    assert sum((here / name).stat().st_size for name in ("page.html.j2", "try.css", "try.js")) < 60_000
    facts = text.partition('id="facts">')[2].partition("</script>")[0]
    assert json.loads(facts)["token"] == server.token


def test_the_page_may_load_nothing(server):
    line = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    line.request("GET", f"/?token={server.token}")
    headers = line.getresponse().headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert "Python" not in headers["Server"]
    line.close()


def test_it_listens_on_this_machine_alone(server):
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "host", [None, "evil.example", "evil.example:80", "127.0.0.1.evil.example", "0.0.0.0", "", "a:b:c"]
)
def test_another_host_is_refused(server, host):
    for path, body in ((f"/?token={server.token}", None), ("/attack", question())):
        status, words = ask(server, path, body, Host=host)
        assert status == 403
        assert "alone" in str(words)
    assert alive(server)


def test_a_tunnel_may_have_another_port(server):
    assert ask(server, f"/?token={server.token}", Host="localhost:1234")[0] == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1"])
def test_a_page_from_elsewhere_is_refused(server, origin):
    assert ask(server, "/attack", question(), Origin=origin)[0] == 403
    own = f"http://127.0.0.1:{server.server_port}"
    assert ask(server, "/attack", question(tick=0), Origin=own)[0] == 200


@pytest.mark.parametrize("token", [None, "", "wrong", "ü"])
def test_a_wrong_token_is_refused(server, token):
    for path in ("/image", "/sample", "/attack", "/certify"):
        status, words = ask(server, path, question(), **{TOKEN: token and token.encode().decode("latin-1")})
        assert (status, "terminal" in str(words)) == (403, True)
    assert ask(server, f"/?token={'x' if token is None else 'wrong'}")[0] == 403
    assert ask(server, "/")[0] == 403


@pytest.mark.parametrize("path", ["/etc/passwd", "/../../etc/passwd", "/try.js", "/%2e%2e/", "/favicon.ico"])
def test_no_file_is_served(server, path):
    status, words = ask(server, f"{path}?token={server.token}")
    assert status == 404
    assert "root:" not in words
    assert ask(server, path, question())[0] == 404


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/attack", b"", "JSON object"),
        ("/attack", b"[1]", "JSON object"),
        ("/attack", b"[" * 100_000, "JSON object"),
        ("/attack", b"\xff\xfe", "JSON object"),
        ("/attack", question(pixels=None), "16 pixels"),
        ("/attack", question(pixels="AAAA"), "16 pixels"),
        ("/attack", question(pixels=packed(GREY * math.nan)), "16 pixels"),
        ("/attack", question(tick=-1), "tick"),
        ("/attack", question(tick=33), "tick"),
        ("/attack", question(tick=1.5), "tick"),
        ("/attack", question(tick=True), "tick"),
        ("/attack", question(norm="l7"), "norm"),
        ("/attack", question(norm=["linf"]), "norm"),
        ("/certify", question(sigma=0), "σ"),
        ("/certify", question(sigma=-1), "σ"),
        ("/certify", question(sigma="1"), "σ"),
        ("/certify", question(sigma=math.nan), "σ"),
        ("/certify", question(sigma=math.inf), "σ"),
        ("/certify", question(sigma=10**400), "σ"),
        ("/sample", {"index": 2}, "index"),
        ("/sample", {"index": -1}, "index"),
        ("/sample", {}, "index"),
        ("/image", b"", "empty"),
        ("/image", b"no picture", "no picture"),
        ("/image", bomb(60000), "pixels"),
    ],
)
def test_bad_requests_are_answered_in_words(server, path, body, words):
    status, (answer,) = ask(server, path, body)
    assert status == 400
    assert words in answer["error"]
    assert "Traceback" not in answer["error"]
    assert alive(server)


def test_a_large_upload_is_refused_in_words(server):
    status, (answer,) = ask(server, "/image", b"\0" * 20_000_001)
    assert status == 413
    assert "20 MB" in answer["error"]
    assert alive(server)


@pytest.mark.parametrize(("told", "status"), [("-5", 400), ("1e3", 400), ("9" * 30, 400), ("²", 400)])
def test_a_length_that_is_none_is_refused(server, told, status):
    assert ask(server, "/image", b"x", Content_Length=told.encode().decode("latin-1"))[0] == status
    assert alive(server)


def test_no_length_and_other_methods_are_refused(server):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as line:
        line.sendall(f"POST /image HTTP/1.1\r\nHost: 127.0.0.1\r\n{TOKEN}: {server.token}\r\n\r\n".encode())
        assert b" 411 " in line.recv(100)
    for method in ("PUT", "DELETE", "OPTIONS", "HEAD", "TRACE"):
        line = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        line.request(method, "/")
        answer = line.getresponse()
        assert answer.status == 501
        assert b"<" not in answer.read()
        line.close()


def test_whoever_leaves_early_stops_nothing(server, capsys):
    def leave(content: bytes) -> None:
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as line:
            line.sendall(content)

    def posted(path: str, length: int, body: bytes) -> bytes:
        head = ["Host: 127.0.0.1", f"{TOKEN}: {server.token}", f"Content-Length: {length}"]
        return "\r\n".join([f"POST {path} HTTP/1.1", *head, "", ""]).encode() + body

    body = json.dumps(question()).encode()
    for content in (b"", b"GET", b"GARBAGE\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", posted("/image", 900, b"abc")):
        leave(content)
    for path in ("/attack", "/certify"):
        leave(posted(path, len(body), body))
    time.sleep(0.2)
    assert alive(server)
    assert "Traceback" not in capsys.readouterr().err


def test_a_dropped_picture_is_seen_attacked_and_certified(server):
    grey = Image.new("L", (40, 30), 128)
    status, (seen,) = ask(server, "/image", file_of(grey))
    assert (status, seen["label"]) == (200, None)
    assert seen["told"][0] == "PNG of 40 × 30 pixels."
    assert "centre" in seen["told"][-1]
    assert torch.equal(unpacked(seen["pixels"], SHAPE), torch.full((1, *SHAPE), 128 / 255))
    status, lines = ask(server, "/attack", question(pixels=seen["pixels"], tick=12))
    assert status == 200
    assert lines[0]["clean"]["classes"][0][0] == NASTY
    assert [line["attack"]["broken"] for line in lines if line.get("attack", {}).get("final")] == [True]
    assert lines[-1] == {"done": True}
    status, lines = ask(server, "/certify", question(pixels=seen["pixels"]))
    assert 0.4 < lines[-1]["certificate"]["radius"] < 0.53
    assert lines[-1]["certificate"]["final"]


def test_a_sample_comes_exactly_with_its_label(server):
    _, (seen,) = ask(server, "/sample", {"index": 1})
    assert torch.equal(unpacked(seen["pixels"], SHAPE), server.tried.samples.images[1:])
    assert seen["label"] == "no"
    assert seen["told"] == ["Test image 8 of lines, as it is."]


class Slow(Line):
    """A line that takes its time."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return super().forward(images)


def test_of_many_requests_at_once_the_last_is_answered_and_the_others_are_told():
    for server in running(tried(Slow(100.0)), samples=100_000, steps=40):
        ends: dict[int, Any] = {}

        def one(i: int, server: Server = server, ends: dict[int, Any] = ends) -> None:
            ends[i] = ask(server, "/attack", question(tick=i + 1))[1][-1]

        threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
        long = threading.Thread(target=lambda server=server: ask(server, "/certify", question()))
        long.start()
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        for thread in threads:
            thread.join(60)
        assert ends[7] == {"done": True}
        assert sum("stopped" in end for end in ends.values()) == 7
        assert alive(server)
        assert long.is_alive()
    long.join(10)
    assert not long.is_alive()


def test_a_network_that_fails_is_told_in_words(capsys):
    def broken(images: torch.Tensor) -> torch.Tensor:
        raise TypeError("my own code")

    for server in running(tried(broken)):
        _, lines = ask(server, "/attack", question())
        assert "my own code" in lines[-1]["error"]
        _, lines = ask(server, "/certify", question())
        assert "my own code" in lines[-1]["error"]
    diverged: Callable[[torch.Tensor], torch.Tensor] = lambda images: torch.full((len(images), 2), math.nan)  # noqa: E731
    for server in running(tried(diverged)):
        assert "finite" in ask(server, "/attack", question())[1][-1]["error"]
    assert "Traceback" not in capsys.readouterr().err


def test_a_taken_port_is_told(server):
    subject = tried()
    with pytest.raises(EnvironmentFault, match="free port"):
        Server(subject, Attacker(subject), Certifier(subject, Smoothing()), server.server_port)


# --- what is tried -----------------------------------------------------------------------------------------------

NETWORK = ResNetSpec(width=4)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A classifier.safetensors in a folder such as a stage leaves."""
    folder = tmp_path_factory.mktemp("stage")
    model = NETWORK.build(1, 10)
    save_tensors(folder / "classifier.safetensors", model.state_dict(), classifier_header(model, (1, 8, 8)))
    record = {"config": {"loss": {"class": "AWP", "loss": {"threat": {"norm": "l2", "epsilon": 0.7}}}}}
    (folder / "done.json").write_text(json.dumps(record))
    return folder / "classifier.safetensors"


def test_a_checkpoint_is_opened_with_what_its_stage_says(weights):
    subject = opened(Asked(word=str(weights)))
    assert (subject.shape, subject.classes, subject.samples) == ((1, 8, 8), 10, None)
    assert subject.class_names[3] == "class 3"
    assert subject.trained == subject.threat == ThreatModel(norm="l2", epsilon=0.7)
    assert heading(subject.title) == f"ResNet of {weights.parent.name}/classifier.safetensors"
    folder = opened(Asked(word=str(weights.parent), data=Digits(), threat=ThreatModel()))
    assert (folder.class_names[3], folder.threat, folder.trained) == ("3", ThreatModel(), subject.trained)
    assert folder.samples is not None
    assert folder.samples.labels.tolist() == [k for k in range(10) for _ in range(2)]
    real = Digits().load().test
    assert torch.equal(real.images[list(folder.places)], folder.samples.images)


def test_a_folder_of_the_hub_says_names_threat_and_noise(tmp_path):
    names = tuple(f"<{k}>" for k in range(10))
    threat = ThreatModel(epsilon=0.15)
    model = NETWORK.build(1, 10)
    save_pretrained(model, tmp_path / "m", class_names=names, shape=(1, 8, 8), threat=threat, noise=0.5)
    subject = opened(Asked(word=str(tmp_path / "m")))
    assert (subject.class_names, subject.trained, subject.noise) == (names, threat, 0.5)
    made = serving(read([str(tmp_path / "m")]), subject)
    assert made.certifier.smoothing.sigma == 0.5
    made.server_close()


def test_what_cannot_be_tried_is_told(weights, tmp_path):
    with pytest.raises(UserError, match="a run or a checkpoint"):
        opened(Asked(word="nothing", runs=tmp_path))
    with pytest.raises(UserError, match="--arm"):
        opened(Asked(word=str(weights), arm="guided"))
    with pytest.raises(UserError, match="trained on"):
        opened(Asked(word=str(weights), shape=(1, 9, 9)))
    with pytest.raises(UserError, match="expected --trust"):
        opened(Asked(word="os:getcwd", shape=(1, 8, 8)))
    with pytest.raises(UserError, match="--shape 3x32x32"):
        opened(Asked(word="os:getcwd", trust=True))
    model = NETWORK.build(3, 7)
    save_tensors(tmp_path / "bare.safetensors", model.state_dict(), classifier_header(model))
    with pytest.raises(UserError, match="--shape"):
        opened(Asked(word=str(tmp_path / "bare.safetensors")))
    with pytest.raises(UserError, match="expected a classifier of images"):
        opened(Asked(word=str(tmp_path / "bare.safetensors"), shape=(1, 8, 8)))
    assert opened(Asked(word=str(tmp_path / "bare.safetensors"), shape=(3, 20, 12))).shape == (3, 20, 12)
    other = NETWORK.build(1, 7)
    save_tensors(tmp_path / "seven.safetensors", other.state_dict(), classifier_header(other))
    with pytest.raises(UserError, match="7 classes"):
        opened(Asked(word=str(tmp_path / "seven.safetensors"), data=Digits()))


def finished_run(root: Path, weights: Path) -> tuple[Path, Recipe]:
    """A run of one arm, its classifier not trained: the files that a finished one leaves."""
    recipe, stage = tiny_recipe((Arm.REAL,)), root / "stages" / "train_classifier" / "abcdef01"
    folder = root / f"{recipe.name}-{recipe.digest[:10]}"
    folder.mkdir(parents=True)
    stage.mkdir(parents=True)
    shutil.copy(weights, stage)
    (stage / "done.json").write_text(json.dumps({"files": {weights.name: checksum(weights)}}))
    student = {"stage": "train_classifier", "digest": "abc", "folder": str(stage.relative_to(root))}
    facts = {"format": 1, "recipe_digest": recipe.digest, "started": "", "finished": "", "versions": {}}
    chapter = {"arm": "real", "seed": 0, "artifacts": {"student": student}}
    (folder / "run.json").write_text(json.dumps(facts | {"chapters": [chapter]}))
    files.save(recipe, folder / "recipe.yaml")
    return folder, recipe


def test_an_arm_of_a_run_is_opened_with_its_data(tmp_path, weights):
    folder, recipe = finished_run(tmp_path, weights)
    subject = opened(Asked(word="tiny", runs=tmp_path))
    assert subject.title == f"{folder.name}, arm real, seed 0"
    assert (subject.threat, subject.trained) == (recipe.threat, None)  # nothing says what its training withstood
    assert len(subject.places) == 20
    with pytest.raises(UserError, match="--arm"):
        opened(Asked(word=str(folder), arm="guided"))
    with pytest.raises(UserError, match="--run-seed"):
        opened(Asked(word=str(folder), run_seed=5))
    (tmp_path / "moved").mkdir()
    shutil.move(folder, tmp_path / "moved" / folder.name)
    with pytest.raises(EnvironmentFault, match="stages"):
        opened(Asked(word=str(tmp_path / "moved" / folder.name)))


# --- the command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "classifier first"),
        (["--data", "digits"], "classifier first"),
        (["x", "y"], "no further words"),
        (["x", "--sigma", "much"], "--sigma"),
        (["x", "--port", "70000"], "--port"),
        (["x", "--port", "0"], "--port"),
        (["x", "--shape", "3x32"], "--shape"),
        (["x", "--shape", "4x8x8"], "1 or 3 channels"),
        (["x", "--threat", "l3:1"], "threat"),
        (["x", "--seed", "-1"], "--seed"),
        (["x", "--all-images"], "--all-images"),
        (["x", "--data", "nosuchset"], "data set"),
    ],
)
def test_words_that_are_wrong_are_told(words, expected):
    with pytest.raises(ValueError, match=expected):
        read(words)


def test_words_are_read():
    numbers = ["--sigma", "1/4", "--samples", "500", "--steps", "9", "--port", "8123", "--run-seed", "0"]
    found = read(["m", *numbers, "--threat=l2:1/2", "--shape=3x8x9", "--arm=real", "--no-browser"])
    assert found.asked.threat == ThreatModel(norm="l2", epsilon=0.5)
    assert (found.sigma, found.samples, found.steps, found.port, found.browser) == (0.25, 500, 9, 8123, False)
    assert (found.asked.shape, found.asked.run_seed, found.asked.arm) == ((3, 8, 9), 0, "real")


def test_the_command_serves_until_it_is_interrupted(weights):
    command = [sys.executable, "-m", "gambeson", "try", str(weights), "--no-browser"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored below a shell's `&`
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    host, _, rest = lines[1].strip().removeprefix("http://").partition("/")
    line = http.client.HTTPConnection(host, timeout=20)
    line.request("GET", f"/{rest}")
    assert line.getresponse().status == 200
    before = sorted(weights.parent.iterdir())
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=20)
    assert (process.returncode, out.strip(), error) == (0, "ended", "")
    assert sorted(weights.parent.iterdir()) == before


# --- in a browser ------------------------------------------------------------------------------------------------

DROP = """async ([text, name, type]) => {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0)), data = new DataTransfer();
  data.items.add(new File([bytes], name, {type}));
  document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}));
}"""


def test_in_a_browser_an_image_is_dropped_and_numbers_follow_the_slider():
    binary = next((b for n in ("chromium", "chromium-browser", "google-chrome") if (b := shutil.which(n))), None)
    if binary is None:
        pytest.skip("no chromium or google-chrome on PATH, so the page was not opened in a browser")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    troubles, asked = [], []
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
    for server in running(tried()):
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=binary, args=flags)
            tab = browser.new_page(viewport={"width": 1280, "height": 900})
            tab.on("console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else None)
            tab.on("pageerror", lambda e: troubles.append(str(e)))
            tab.on("request", lambda r: asked.append(r.url) if not r.url.startswith("data:") else None)
            tab.goto(server.url)
            status, expect = tab.locator("#status"), sync_api.expect
            expect.set_options(timeout=60_000)
            expect(status).to_contain_text("withstood this attack")
            expect(tab.locator("#told")).to_contain_text("Test image 3 of lines")
            expect(tab.locator("#smallest")).to_have_text("L∞ ε 0.138")
            expect(tab.locator("#copies-words")).to_have_text("2,000 of 2,000")
            certified = tab.locator("#certified").inner_text()
            tab.locator("#eps").focus()
            for _ in range(3):
                tab.keyboard.press("ArrowRight")
            expect(status).to_contain_text("it says no")
            expect(status).to_contain_text("broken")
            expect(tab.locator("#eps-words")).to_contain_text("0.138")
            expect(tab.locator("#attack-words")).to_contain_text("✗ Broken after")
            assert tab.locator("#certified").inner_text() == certified
            tab.locator("#norm").select_option("l2")
            expect(tab.locator("#smallest")).to_have_text("L2 ε 0.563")
            dropped = base64.b64encode(file_of(noise_picture(30, 20))).decode()
            tab.evaluate(DROP, [dropped, "some.png", "image/png"])
            expect(tab.locator("#told")).to_contain_text("PNG of 30 × 20 pixels")
            expect(status).to_contain_text("Attacked within L2")
            tab.locator("#sigma").fill("1")
            tab.locator("#sigma").press("Tab")
            expect(tab.locator("#certified-words")).to_contain_text("σ 1)")
            over = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            for width, scheme in ((375, "light"), (820, "dark"), (1280, "light")):
                tab.set_viewport_size({"width": width, "height": 900})
                tab.emulate_media(color_scheme=scheme)
                assert tab.evaluate(over) <= 0
            assert troubles == []
            tab.evaluate(DROP, [base64.b64encode(b"nothing").decode(), "some.txt", "text/plain"])
            expect(tab.locator("#fault")).to_contain_text("no picture")
            tab.locator(".samples button").nth(1).press("Enter")
            expect(tab.locator("#fault")).to_be_hidden()
            expect(tab.locator("#told")).to_contain_text("Its label says no")
            assert all(tab.locator(f"#{each}").get_attribute("alt") for each in ("seen", "attacked", "difference"))
            expect(tab.locator("#copies-words")).to_have_text("2,000 of 2,000")
            tab.locator("#sigma").fill("")
            tab.locator(".samples button").nth(0).press(
                "Enter"
            )  # no certificate of another image stands under this one
            expect(tab.locator("#told")).to_contain_text("Test image 3 of lines")
            expect(tab.locator("#fault")).to_contain_text("Noise σ")
            assert tab.locator("#certified").inner_text() == tab.locator("#certified-words").inner_text() == ""
            browser.close()
        assert all("400" in each for each in troubles)
        assert {url.partition("?")[0].rpartition("/")[0] for url in asked} == {f"http://127.0.0.1:{server.server_port}"}


def test_the_smallest_known_position_is_the_least_broken_one():
    outcome = Outcome(tick=1, broken=True, steps=1, of=1, image=GREY, logits=torch.zeros(1, 2), distance=0.0)
    assert smallest({}) is None
    assert smallest({9: outcome, 4: outcome, 2: replace(outcome, broken=False)}) == 4
