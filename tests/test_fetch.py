"""Downloads over a site of our own that cuts, lies, is busy or knows no ranges; and the catalogue's checks."""

import dataclasses
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from local_site import CONTENT, DIGEST, Page, Site

from gambeson.data import catalogue, fetch
from gambeson.data.catalogue import CATALOGUE, Published, check_published
from gambeson.data.fetch import Patience
from gambeson.errors import EnvironmentFault, UserError

EAGER = Patience(timeout=5.0, attempts=3, pause=0.01)


@pytest.fixture
def site() -> Iterator[Site]:
    served = Site()
    yield served
    served.shutdown()
    served.server_close()


def listed(*urls: str, checksum: str | None = f"sha256:{DIGEST}", size: int | None = None) -> Published:
    return Published(folder="set", name="file.bin", urls=urls, checksum=checksum, size=size, source="this test")


def got(file: Published, root: Path, patience: Patience = EAGER) -> bytes:
    told: list[tuple[int, int | None]] = []
    path = fetch.fetch(file, root, lambda done, total: told.append((done, total)), patience)
    assert path == root / "set" / "file.bin"
    left = {p.name for p in path.parent.iterdir()} - {"file.bin", "file.bin.checked", ".file.bin.lock"}
    assert not left, "nothing of a download stays behind"
    return path.read_bytes()


def test_a_file_is_loaded_once_and_told_of_byte_by_byte(site: Site, tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    path = fetch.fetch(listed(site.url), tmp_path, lambda done, total: told.append((done, total)), EAGER)
    assert path.read_bytes() == CONTENT
    assert told[0] == (0, len(CONTENT))
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert [d for d, _ in told] == sorted(d for d, _ in told)
    assert json.loads((path.parent / "file.bin.checked").read_text())["checksum"] == f"sha256:{DIGEST}"
    assert got(listed(site.url), tmp_path) == CONTENT
    assert site.asked == [None]


def test_what_was_told_is_on_the_disk(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "PORTION", 1000)
    part, checked = tmp_path / "set" / "file.bin.part", []
    fetch.fetch(listed(site.url), tmp_path, lambda done, _: checked.append(part.stat().st_size == done), EAGER)
    assert all(checked)
    assert len(checked) > 300


def test_the_file_protocol_works_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.time, "sleep", lambda _: pytest.fail("a file that is not there will not come"))
    source = tmp_path / "elsewhere.bin"
    source.write_bytes(CONTENT)
    assert got(listed(source.as_uri()), tmp_path) == CONTENT
    with pytest.raises(EnvironmentFault, match=r"nothing\.bin"):
        fetch.fetch(listed((tmp_path / "nothing.bin").as_uri()), tmp_path / "b", lambda *_: None, EAGER)


@pytest.mark.parametrize("checksum", [f"sha256:{DIGEST}", f"md5:{hashlib.md5(CONTENT).hexdigest()}", None])
def test_a_cut_connection_is_resumed(site: Site, tmp_path: Path, checksum: str | None) -> None:
    site.faults = ["cut 100000", "cut 50000"]
    assert got(listed(site.url, checksum=checksum), tmp_path) == CONTENT
    assert site.asked == [None, "bytes=100000-", "bytes=150000-"]


def test_a_chunkless_reply_without_length_is_checked_by_size_and_digest(site: Site, tmp_path: Path) -> None:
    site.length, site.faults = False, ["cut 100000"]
    assert got(listed(site.url, size=len(CONTENT)), tmp_path) == CONTENT
    assert site.asked == [None, "bytes=100000-"]


def test_a_site_that_has_moved_is_followed_and_still_resumed(site: Site, tmp_path: Path) -> None:
    """As CIFAR's does."""
    site.faults = ["cut 100000", "move"]
    assert got(listed(site.url), tmp_path) == CONTENT
    assert site.asked == [None, "bytes=100000-", "bytes=100000-"]


def test_a_site_without_ranges_starts_anew(site: Site, tmp_path: Path) -> None:
    site.ranges, site.faults = False, ["cut 100000"]
    assert got(listed(site.url), tmp_path) == CONTENT
    assert site.asked == [None, "bytes=100000-"]


@pytest.mark.parametrize("checksum", [f"sha256:{DIGEST}", None])
def test_a_file_that_changed_meanwhile_starts_anew(site: Site, tmp_path: Path, checksum: str | None) -> None:
    old = bytes(200_000) + CONTENT[:100_000]
    site.content, site.faults, site.etag = old, ["cut 100000", "status 404"], '"old"'
    with pytest.raises(EnvironmentFault, match="404"):
        fetch.fetch(listed(site.url, checksum=checksum), tmp_path, lambda *_: None, EAGER)
    assert (tmp_path / "set" / "file.bin.part").stat().st_size == 100_000
    site.content, site.etag = CONTENT, '"one"'
    assert got(listed(site.url, checksum=checksum), tmp_path) == CONTENT
    assert site.asked == [None, "bytes=100000-", "bytes=100000-"], "one request: If-Range says what is known"


def test_a_site_that_ignores_if_range_is_found_out(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Page, "_start", lambda self, asked: int(asked.removeprefix("bytes=").rstrip("-")))
    part = tmp_path / "set" / "file.bin.part"
    part.parent.mkdir()
    part.write_bytes(bytes(100_000))
    part.with_name("file.bin.part.json").write_text(json.dumps({"url": site.url, "state": '"old"'}))
    assert got(listed(site.url, checksum=None), tmp_path) == CONTENT
    assert site.asked == ["bytes=100000-", None]


def test_a_part_of_something_else_is_dropped_when_the_digest_tells(site: Site, tmp_path: Path) -> None:
    part = tmp_path / "set" / "file.bin.part"
    part.parent.mkdir()
    for size in (1000, len(CONTENT), len(CONTENT) + 5):
        part.write_bytes(bytes(size))
        assert got(listed(site.url, size=len(CONTENT)), tmp_path) == CONTENT
        part.with_name("file.bin").unlink()
        part.write_bytes(bytes(size))
        assert got(listed(site.url), tmp_path) == CONTENT
        part.with_name("file.bin").unlink()


def test_a_whole_part_only_gets_its_name(site: Site, tmp_path: Path) -> None:
    part = tmp_path / "set" / "file.bin.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT)
    assert got(listed(site.url, size=len(CONTENT)), tmp_path) == CONTENT
    assert site.asked == []
    part.with_name("file.bin").unlink()
    part.write_bytes(CONTENT)
    assert got(listed(site.url), tmp_path) == CONTENT
    assert site.asked == ["bytes=300000-"]


def test_without_checksum_a_part_of_unknown_origin_is_not_built_upon(site: Site, tmp_path: Path) -> None:
    part = tmp_path / "set" / "file.bin.part"
    part.parent.mkdir()
    part.write_bytes(bytes(1000))
    assert got(listed(site.url, checksum=None), tmp_path) == CONTENT
    assert site.asked == [None]


def test_wrong_bytes_are_removed_and_both_digests_and_the_address_named(site: Site, tmp_path: Path) -> None:
    site.faults = ["wrong"]
    found = hashlib.sha256(bytes(len(CONTENT))).hexdigest()
    with pytest.raises(EnvironmentFault, match=f"{re.escape(site.url)}: expected sha256:{DIGEST}, got sha256:{found}"):
        fetch.fetch(listed(site.url), tmp_path, lambda *_: None, EAGER)
    assert {p.name for p in (tmp_path / "set").iterdir()} == {".file.bin.lock"}
    assert len(site.asked) == 1, "the same wrong file is not loaded twice"


def test_another_length_is_refused_before_it_is_loaded(site: Site, tmp_path: Path) -> None:
    site.content = b"<html>please accept our terms</html>"
    with pytest.raises(EnvironmentFault, match="expected a file of 300,000 bytes, got one of 36"):
        fetch.fetch(listed(site.url, size=len(CONTENT)), tmp_path, lambda *_: None, EAGER)
    site.content, site.length = CONTENT + b"more", False
    with pytest.raises(EnvironmentFault, match="expected 300,000 bytes, got more"):
        fetch.fetch(listed(site.url, size=len(CONTENT)), tmp_path, lambda *_: None, EAGER)
    assert not (tmp_path / "set" / "file.bin").exists()


def test_a_busy_site_is_asked_again_and_a_mirror_follows(site: Site, tmp_path: Path) -> None:
    site.faults = ["status 503", "status 429"]
    assert got(listed(site.url), tmp_path / "a") == CONTENT
    assert len(site.asked) == 3
    site.faults = ["status 503"] * 3
    assert got(listed(site.url, site.url), tmp_path / "b") == CONTENT
    assert len(site.asked) == 7
    site.faults = ["status 404"]
    assert got(listed(site.url, site.url), tmp_path / "c") == CONTENT
    assert len(site.asked) == 9
    site.faults = ["wrong"]
    assert got(listed(site.url, site.url), tmp_path / "d") == CONTENT
    assert len(site.asked) == 11


def test_pauses_double_and_a_try_that_brings_something_starts_the_count_again(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(fetch.time, "sleep", pauses.append)
    site.faults = ["status 503", "status 503", "cut 1000", "status 503", "cut 1000", "status 503"]
    site.pace = 0.0
    assert got(listed(site.url), tmp_path, Patience(timeout=5.0, attempts=3, pause=1.0)) == CONTENT
    assert [p for p in pauses if p] == [1.0, 2.0, 1.0, 2.0, 1.0, 2.0]
    site.faults = ["status 503"] * 9
    with pytest.raises(EnvironmentFault, match="HTTP 503"):
        fetch.fetch(listed(site.url), tmp_path / "b", lambda *_: None, EAGER)
    assert len(site.faults) == 6


def test_a_silent_site_and_one_that_is_not_there_time_out(site: Site, tmp_path: Path) -> None:
    site.faults = ["hang 2"]
    began = time.monotonic()
    assert got(listed(site.url), tmp_path, Patience(timeout=0.2, attempts=2, pause=0.01)) == CONTENT
    assert time.monotonic() - began < 1.9
    with pytest.raises(EnvironmentFault, match=r"refused.*Is there a network\?"):
        fetch.fetch(listed("http://127.0.0.1:9/file.bin"), tmp_path / "b", lambda *_: None, EAGER)


def test_a_full_disk_and_a_place_that_cannot_be_written_are_faults_of_the_machine(site: Site, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # no file may grow beyond this, as on a disk that is full
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(EnvironmentFault, match=r"file\.bin: expected to write this file, got: File too large"):
            fetch.fetch(listed(site.url), tmp_path / "a", lambda *_: None, EAGER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert got(listed(site.url), tmp_path / "a") == CONTENT
    assert site.asked == [None, "bytes=100000-"]
    (tmp_path / "b").write_text("a file where the folder should be")
    with pytest.raises(EnvironmentFault, match="Not a directory"):
        fetch.fetch(listed(site.url), tmp_path / "b", lambda *_: None, EAGER)


def test_too_little_room_is_said_before_anything_is_loaded(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: type("U", (), {"free": 1000})())
    with pytest.raises(EnvironmentFault, match="expected 300,000 bytes free for the download, got 1,000"):
        fetch.fetch(listed(site.url), tmp_path, lambda *_: None, EAGER)
    assert not (tmp_path / "set" / "file.bin.part").exists()


def test_a_file_that_lies_there_already_is_checked_and_never_replaced(site: Site, tmp_path: Path) -> None:
    place = tmp_path / "set" / "file.bin"
    place.parent.mkdir()
    place.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"move it away and say `gambeson data get set`"):
        fetch.fetch(listed(site.url), tmp_path, lambda *_: None, EAGER)
    assert place.read_bytes() == b"mine"
    assert site.asked == []


CHILD = """
import sys
from pathlib import Path
from gambeson.data.catalogue import Published
from gambeson.data.fetch import fetch
file = Published(folder="set", name="file.bin", urls=(sys.argv[1],), checksum=sys.argv[2], size=None, source="test")
told = []
fetch(file, Path(sys.argv[3]), lambda done, total: told.append(done))
print(len(told))
"""


def child(site: Site, root: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", CHILD, site.url, f"sha256:{DIGEST}", str(root)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_killed_in_the_middle_the_next_start_goes_on_from_there(site: Site, tmp_path: Path) -> None:
    site.pace = 0.2
    process, part = child(site, tmp_path), tmp_path / "set" / "file.bin.part"
    while not part.exists() or part.stat().st_size < 40_000:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept, site.pace = part.stat().st_size, 0.0
    assert 40_000 <= kept < len(CONTENT)
    assert part.read_bytes() == CONTENT[:kept]
    assert not (tmp_path / "set" / "file.bin").exists()
    assert got(listed(site.url), tmp_path) == CONTENT
    assert site.asked == [None, f"bytes={kept}-"]


def test_of_two_processes_one_loads_and_the_other_waits(site: Site, tmp_path: Path) -> None:
    site.pace = 0.1
    process = child(site, tmp_path)
    while not site.asked:
        assert process.poll() is None
        time.sleep(0.01)
    told: list[int] = []
    path = fetch.fetch(listed(site.url), tmp_path, lambda done, total: told.append(done), EAGER)
    assert path.read_bytes() == CONTENT
    assert process.wait(20) == 0
    assert site.asked == [None]
    assert 0 < told[0] < len(CONTENT), "who waits sees how far the other is"


def test_the_catalogue_is_whole() -> None:
    assert list(CATALOGUE) == ["cifar10", "cifar100", "mnist", "fashion-mnist", "svhn", "gtsrb", "tiny-imagenet"]
    lengths = {"md5": 32, "sha256": 64}
    files = [(name, file) for name, held in CATALOGUE.items() for file in held.files]
    for name, file in files:
        kind, _, digest = (file.checksum or f"md5:{'0' * 32}").partition(":")
        assert re.fullmatch(f"[0-9a-f]{{{lengths[kind]}}}", digest)
        assert file.folder == name
        assert file.source
        assert file.size
        assert file.urls
        assert all(url.startswith("http") and url.endswith(f"/{file.name}") for url in file.urls)
    assert len({file.checksum for _, file in files}) == len(files), "no checksum was copied to a second file"
    assert [file.name for _, file in files if file.checksum is None] == ["GTSRB_Final_Training_Images.zip"]
    assert all(held.licence and held.citation and held.homepage and held.about for held in CATALOGUE.values())


def small(monkeypatch: pytest.MonkeyPatch, content: bytes = CONTENT) -> Published:
    """The catalogue with the checksum of a small file for CIFAR-10's archive."""
    held = CATALOGUE["cifar10"]
    digest = f"md5:{hashlib.md5(content).hexdigest()}"
    file = dataclasses.replace(held.files[0], checksum=digest, size=len(content))
    monkeypatch.setitem(CATALOGUE, "cifar10", dataclasses.replace(held, files=(file,)))
    return file


def test_a_file_that_was_not_published_so_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = small(monkeypatch)
    place = file.path(tmp_path)
    place.parent.mkdir()
    place.write_bytes(CONTENT[:-1])
    found = hashlib.md5(CONTENT[:-1]).hexdigest()
    with pytest.raises(UserError, match=rf"cifar-10-python\.tar\.gz.*{file.checksum}, got md5:{found} \(299,999 bytes"):
        check_published(place)
    place.write_bytes(CONTENT)
    check_published(place)
    (tmp_path / "my-own.npz").write_bytes(b"x")
    check_published(tmp_path / "my-own.npz")


def test_a_check_is_kept_until_size_or_time_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = small(monkeypatch).path(tmp_path)
    place.parent.mkdir()
    place.write_bytes(CONTENT)
    check_published(place)
    counted: list[Path] = []
    real = catalogue.digest_of
    monkeypatch.setattr(catalogue, "digest_of", lambda path, kind: counted.append(path) or real(path, kind))
    check_published(place)
    assert not counted
    os.utime(place, ns=(1, 1))
    check_published(place)
    assert len(counted) == 1
    place.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(UserError, match=r"cifar-10-python"):
        check_published(place)
    assert not place.with_name(f"{place.name}.checked").exists()
    place.write_bytes(CONTENT)
    check_published(place)
    place.with_name(f"{place.name}.checked").write_text("{ damaged")
    check_published(place)
    small(monkeypatch, b"the catalogue has learnt another checksum")
    with pytest.raises(UserError, match="got md5"):
        check_published(place)


def test_names_that_two_sets_share_are_told_apart_by_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "t10k-labels-idx1-ubyte.gz"
    for folder in ("mnist", "fashion-mnist"):
        held = CATALOGUE[folder]
        digest = f"sha256:{hashlib.sha256(folder.encode()).hexdigest()}"
        files = tuple(dataclasses.replace(f, checksum=digest) for f in held.files if f.name == name)
        monkeypatch.setitem(CATALOGUE, folder, dataclasses.replace(held, files=files))
    for folder, content, right in [("mnist", "mnist", True), ("mnist", "fashion-mnist", False), ("x", "mnist", True)]:
        place = tmp_path / folder / name
        place.parent.mkdir(exist_ok=True)
        place.write_text(content)
        if right:
            check_published(place)
        else:
            with pytest.raises(UserError, match="of mnist with"):
                check_published(place)
    place = tmp_path / "x" / name
    place.write_text("fashion-mnist")
    check_published(place)


def test_without_a_checksum_the_size_must_be_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = CATALOGUE["gtsrb"]
    file = dataclasses.replace(next(f for f in held.files if f.checksum is None), size=5)
    monkeypatch.setitem(CATALOGUE, "gtsrb", dataclasses.replace(held, files=(file,)))
    place = file.path(tmp_path)
    place.parent.mkdir()
    place.write_text("12345")
    check_published(place)
    place.write_text("1234")
    with pytest.raises(UserError, match=r"got 4 bytes where 5 were published.*get gtsrb"):
        check_published(place)


def test_a_check_works_where_nothing_may_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(path: Path, value: object) -> None:
        raise EnvironmentFault(f"{path}: read-only file system")

    monkeypatch.setattr(catalogue, "write_json", read_only)
    place = small(monkeypatch).path(tmp_path)
    place.parent.mkdir()
    place.write_bytes(CONTENT)
    check_published(place)
    assert not place.with_name(f"{place.name}.checked").exists()


SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download of Parquet files asks for; org/plain has none, org/closed may not be read."""

    asked: ClassVar[list[str]] = []

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, body: bool) -> None:
        self.asked.append(self.path)
        content, status, extra = b"{}", 200, {}
        name = "/".join(self.path.removeprefix("/api").split("/")[2:4])
        files = {"default/train/0000.parquet": CONTENT[:999], "default/test/0000.parquet": CONTENT[:99], "read.me": b""}
        if name == "org/closed":
            status, extra = 401, {"X-Error-Code": "RepoNotFound"}
        elif name == "org/busy":
            status = 500
        elif name == "org/plain":
            status, extra = 404, {"X-Error-Code": "RevisionNotFound"}
        elif "/tree/" in self.path:
            content = json.dumps(
                [
                    {"type": "file", "path": p, "size": len(c), "oid": hashlib.md5(c).hexdigest()}
                    for p, c in files.items()
                ]
            ).encode()
        elif "/api/datasets/" in self.path:
            content = json.dumps({"id": name, "sha": SHA, "siblings": [{"rfilename": p} for p in files]}).encode()
        elif "/resolve/" in self.path:
            content = files[self.path.partition(f"/resolve/{SHA}/")[2]]
            extra = {"ETag": f'"{hashlib.md5(content).hexdigest()}"', "X-Repo-Commit": SHA}
        self.send_response(status)
        for header, value in {"Content-Length": str(len(content)), **extra}.items():
            self.send_header(header, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


HUB_CHILD = """
import sys
from gambeson.data.fetch import fetch_hub
from gambeson.errors import EnvironmentFault, UserError
for word in sys.argv[1:]:
    try:
        print(fetch_hub(word))
    except (EnvironmentFault, UserError) as error:
        print(error.code, error)
from gambeson.data.hub import local_copy
print(local_copy(sys.argv[1]))
"""


def test_the_hub_gives_its_parquet_files_once(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True).start()
    words = ["hf:org/name", "hf:org/name", "hf:org/closed", "hf:org/plain", "hf:org/busy", "hf:org"]
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path), "HF_TOKEN": ""}
    run = [sys.executable, "-c", HUB_CHILD, *words]
    out = subprocess.run(run, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    hub.shutdown()
    assert out[0] == out[1]
    assert (Path(out[0]) / "default" / "train" / "0000.parquet").read_bytes() == CONTENT[:999]
    assert not (Path(out[0]) / "read.me").exists()
    loaded = [path for path in Hub.asked if path.endswith("train/0000.parquet")]
    assert 1 <= len(loaded) <= 2, "its head and its body, and nothing the second time"
    assert out[2].startswith("2 hf:org/closed: expected a data set of the hub")
    assert out[3].startswith("2 hf:org/plain: expected a data set of the hub with Parquet files")
    assert out[4].startswith("3 hf:org/busy: expected the hub to answer")
    assert out[5].startswith("2 data.path: expected hf:ORGANISATION/NAME")
    assert out[6] == out[0], "the door finds it"


def test_the_hub_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install gambeson\[hub\]"):
        fetch.fetch_hub("hf:org/name")
