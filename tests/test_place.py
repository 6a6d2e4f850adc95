"""Places: files and objects that are whole or not there; over the real S3 protocol, to a server of its own process."""

import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import object_store
import pytest

from gambeson import disk
from gambeson.errors import EnvironmentFault, UserError
from gambeson.objects import passes
from gambeson.place import Missing, Place, redacted

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with object_store.object_store() as url:
        yield url


@pytest.fixture(params=["files", "s3", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "files":
        return Place.of(tmp_path / "place")
    name = f"bucket-{abs(hash(tmp_path)) % 10**9}"
    if request.param == "memory":
        return Place.of(f"memory://{name}/below")
    return Place.of(object_store.bucket(request.getfixturevalue("server"), name) + "/below")


def test_one_word_for_files_and_objects(place: Place, tmp_path: Path) -> None:
    one = place / "owner/000001.json"
    assert not one.exists()
    assert (place / "owner").names() == []
    with pytest.raises(Missing, match=r"000001\.json: expected something here"):
        one.read()
    with pytest.raises(FileNotFoundError):
        one.fetch(tmp_path / "there")
    assert not (tmp_path / "there").exists()
    assert one.create(b"first")
    assert not one.create(b"second")
    assert one.read() == b"first"
    assert all(there.exists() for there in (one, place / "owner", place))
    one.write(b"third")
    assert one.fetch(tmp_path / "there").read_bytes() == b"third"
    (place / "owner/000000.json").write(b"")
    assert (place / "owner").names() == ["000000.json", "000001.json"]
    assert [(entry.name, entry.size) for entry in place.entries()] == [("owner", None)]
    assert [entry.size for entry in (place / "owner").entries()] == [0, 5]
    one.remove()
    one.remove()
    assert (place / "owner").names() == ["000000.json"]
    assert one.name == "000001.json"
    assert pickle.loads(pickle.dumps(one)) == one == Place.of(one.shown)


def test_files_are_delivered_once_and_compared_when_they_are_fetched(place: Place, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    (tmp_path / "b").write_bytes(b"other")
    there, digest = place / "x/a", disk.checksum(tmp_path / "a")
    assert there.deliver(tmp_path / "a")
    assert not there.deliver(tmp_path / "b")
    there.check(digest)
    assert there.fetch(tmp_path / "back", digest).read_bytes() == b"abc" * 1000
    assert there.deliver(tmp_path / "b", replace=True)
    with pytest.raises(EnvironmentFault, match=f"x/a: expected SHA-256 {digest[:16]}"):
        there.fetch(tmp_path / "new", digest)
    assert sorted(os.listdir(tmp_path)) in (["a", "b", "back"], ["a", "b", "back", "place"])  # nothing half-fetched


def test_a_large_file_goes_in_parts_and_is_still_made_once(server: str, tmp_path: Path) -> None:
    place = Place.of(object_store.bucket(server, "large") + "/one")
    with open(tmp_path / "large", "wb") as file:
        file.write(b"begin")
        file.truncate(101 << 20)
    assert place.deliver(tmp_path / "large")
    assert object_store.behind(server).head_object(Bucket="large", Key="one")["ETag"].endswith('-3"')  # in parts
    assert not place.deliver(tmp_path / "large")
    place.check(disk.checksum(tmp_path / "large"))


def _race(place: Place, number: int, start: Any, results: Any) -> None:
    place.exists()  # connected, before all begin
    start.wait()
    results.put([number for turn in range(5) if (place / f"{turn}").create(f"{number}".encode() * 1000)])
    results.put((number, [turn for turn in range(5) if (place / f"{turn}").read() == f"{number}".encode() * 1000]))


@pytest.mark.parametrize("kind", ["files", "s3"])
def test_of_several_processes_that_make_an_object_one_does(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = str(tmp_path / "race") if kind == "files" else object_store.bucket(request.getfixturevalue("server"), "race")
    place = Place.of(url + "/x")
    start, results = SPAWN.Barrier(4), SPAWN.Queue()
    workers = [SPAWN.Process(target=_race, args=(place, number, start, results)) for number in range(4)]
    for worker in workers:
        worker.start()
    told = [results.get(timeout=120) for _ in range(8)]
    for worker in workers:
        worker.join()
    won = [number for one in told if isinstance(one, list) for number in one]
    found = [one[0] for one in told if isinstance(one, tuple) for _ in one[1]]
    assert len(won) == 5
    assert sorted(won) == sorted(found)  # who was told that it made an object finds its own there


def test_a_file_system_without_hard_links_serves_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*words: object) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert Place.of(tmp_path / "x").create(b"one")
    assert not Place.of(tmp_path / "x").create(b"two")
    assert (tmp_path / "x").read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("how", ["busy", "hang"])
def test_a_server_that_refuses_for_a_while_is_waited_for(
    how: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, flag = object_store.bucket(server, f"while-{how}"), tmp_path / "refuse"
    with object_store.process("proxy", server.rpartition(":")[2], str(flag)) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between)
        place = Place.of(url) / "x"
        assert (place / "0").create(b"0")
        flag.write_text(how)
        over = threading.Timer(3, flag.unlink)
        over.start()
        began = time.monotonic()
        assert (place / "1").create(b"1")
        assert time.monotonic() - began > 2
        assert place.names() == ["0", "1"]
        over.join()
        flag.write_text(how)
        monkeypatch.setenv("GAMBESON_PATIENCE", "1")
        for act in ((place / "0").read, place.names, lambda: (place / "2").write(b"2"), (place / "0").exists):
            with pytest.raises(EnvironmentFault, match=rf"^s3://while-{how}/x.* within 1 s \(GAMBESON_PATIENCE\)"):
                act()


def test_who_lost_an_answer_still_knows_that_it_made_the_object(server: str, tmp_path: Path, monkeypatch) -> None:
    """The server makes it, the connection breaks before the answer: the next try finds the object there."""
    url, flag = object_store.bucket(server, "lost-answer"), tmp_path / "lose"
    with object_store.process("proxy", server.rpartition(":")[2], str(flag)) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between)
        place = Place.of(url) / "owner"
        flag.write_text("lose one")
        assert place.create(b"mine")
        assert not flag.exists()
        assert not place.create(b"mine")
        flag.write_text("lose one")
        assert not place.create(b"another's")
    assert object_store.contents(server, "lost-answer") == {"owner": b"mine"}


def test_who_lost_an_answer_and_then_the_object_made_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine made it and has removed it again (a block, when its shard is final) before it can be compared."""
    place, tries = Place.of("memory://lost-and-gone/x"), [ConnectionError("no answer"), FileExistsError("there")]

    def pipe_file(*words: object, **more: object) -> None:
        raise tries.pop(0)

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "pipe_file", pipe_file)
    assert place.create(b"mine") is False
    assert not tries


@pytest.mark.parametrize(
    ("code", "status", "over"),
    [
        ("RequestTimeout", 400, True),
        ("InternalError", 200, True),  # of a large file's last request: the head of the answer had gone before
        ("SlowDown", 503, True),
        ("InvalidRequest", 400, False),
        ("AccessDenied", 403, False),
    ],
)
def test_s3_says_in_words_too_what_passes(code: str, status: int, over: bool) -> None:
    exceptions, errors = pytest.importorskip("botocore.exceptions"), pytest.importorskip("s3fs.errors")
    answer = {"Error": {"Code": code, "Message": "x"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    fault = exceptions.ClientError(answer, "PutObject")
    assert passes(fault) is passes(errors.translate_boto_error(fault)) is over


def test_a_file_that_is_not_there_is_no_missing_bucket(place: Place, tmp_path: Path) -> None:
    for replace in (False, True):
        with pytest.raises(EnvironmentFault, match="nowhere") as caught:
            (place / "x").deliver(tmp_path / "nowhere", replace)
        assert "bucket" not in str(caught.value).partition("nowhere")[2]


def test_what_does_not_pass_is_told_at_once(server: str) -> None:
    began = time.monotonic()
    nowhere = Place.of("s3://no-such-bucket/x")
    for act in (nowhere.read, nowhere.names, lambda: nowhere.write(b""), lambda: nowhere.create(b"")):
        with pytest.raises(EnvironmentFault, match=r"s3://no-such-bucket/x: expected to .* no such bucket"):
            act()
    assert time.monotonic() - began < 10
    code = (
        "from gambeson.place import Place\n"
        "try: Place.of('s3://no-such-bucket/y').read()\nexcept OSError as error: print(error)"
    )
    without = {name: value for name, value in os.environ.items() if "ACCESS_KEY" not in name}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=without).stdout
    assert "credentials come from the environment" in out


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://AKIAKEY:hunter2@bucket/x", r"s3://\*\*\*@bucket/x"),
        ("s3://bucket/x?key=hunter2&part=2", r"s3://bucket/x\?key=\*\*\*&part=2"),
        ("https://me:hunter2@host/x", r"https://\*\*\*@host/x"),
        ("s3://AKIAKEY:12/hunter2@bucket/x", r"s3://\*\*\*@bucket/x"),  # not a port
        ("S3://AKIAKEY:hunter2/a@b@bucket/x", r"S3://\*\*\*@bucket/x"),
        ("s3://bucket/../x", None),
        ("s3://", None),
    ],
)
def test_urls_with_secrets_in_them_are_refused_and_not_shown(url: str, shown: str | None) -> None:
    with pytest.raises(UserError) as caught:
        Place.of(url)
    if shown is not None:
        assert re.search(shown, str(caught.value))
        assert "hunter2" not in str(caught.value)
        assert "AKIAKEY" not in str(caught.value)


def test_secrets_are_taken_out_of_any_text() -> None:
    assert redacted("s3://AK:wJ/xR@bucket/y") == redacted("s3://AK:7/xR@bucket/y") == "s3://***@bucket/y"
    assert redacted("by way of http://me:p@ss@proxy:80/x") == "by way of http://***@proxy:80/x"
    assert redacted("s3://bucket/x@2 and gs://b/y") == "s3://bucket/x@2 and gs://b/y"
    text = "gambeson run digits --runs s3://AK:SE/CRET+x@b/c --data 'https://u@h/a?X-Amz-Signature=ab12&n=1' --seed 3"
    clean = "gambeson run digits --runs s3://***@b/c --data 'https://***@h/a?X-Amz-Signature=***&n=1' --seed 3"
    assert redacted(text) == clean
    assert (
        redacted("mail me@home.org or see https://host:80/a@2?page=2")
        == "mail me@home.org or see https://host:80/a@2?page=2"
    )


def test_urls_mean_the_same_place_however_they_are_written(tmp_path: Path) -> None:
    assert Place.of("s3a://b//x/./y/").shown == "s3://b/x/y"
    assert Place.of(f"file://{tmp_path}/x") == Place.of(str(tmp_path / "x")) == Place.of(tmp_path) / "x"
    assert Place.of("gcs://b/x").shown == "gs://b/x"


def test_without_the_package_the_line_that_installs_it_is_told() -> None:
    code = (
        "import sys; sys.modules['s3fs'] = None\nfrom gambeson.place import Place\n"
        "try: Place.of('s3://b/x').read()\nexcept ValueError as error: print(error)\nprint('botocore' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert "pip install 'gambeson[s3]'" in out[0]
    assert out[1] == "False"


def test_a_small_disk_names_the_file_and_keeps_nothing(server: str, tmp_path: Path) -> None:
    place = Place.of(object_store.bucket(server, "small-disk")) / "x"
    place.write(b"x" * 300_000)
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from pathlib import Path; from gambeson.place import Place\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: Place.of('s3://small-disk/x').fetch(Path(sys.argv[1]) / 'x')\n"
        "except OSError as error: print(type(error).__name__, error)"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert f"EnvironmentFault {tmp_path}/x: expected to write this file, got: File too large" in out
    assert os.listdir(tmp_path) == []


def test_json_of_an_object_is_bytes_as_they_were(place: Place) -> None:
    facts = json.dumps({"host": "ä"}, ensure_ascii=False).encode()
    assert (place / "facts").create(facts)
    assert (place / "facts").read() == facts
