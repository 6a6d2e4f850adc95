"""`gambeson quality` as its users meet it: every measure by name, kept when killed, mistaken sets, what it writes."""

import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gambeson import files
from gambeson.canonical import field_help
from gambeson.cli import main
from gambeson.data.datasets import Digits
from gambeson.data.imageset import ImageSet
from gambeson.data.mixture import to_uint8
from gambeson.data.synthetic import Chosen, StoreWriter, SyntheticStore
from gambeson.errors import UserError
from gambeson.models.resnet import ResNetSpec
from gambeson.quality import assess as assessing
from gambeson.quality import sources
from gambeson.quality.measured import Measured
from gambeson.quality.sources import count_copies
from gambeson.quality.table import FAST, GROUPS, TABLE, Measures, chosen, described
from gambeson.quality.telling import Findings, Line, markdown, number, terminal_table
from gambeson.quality_command import USAGE, quality, read
from gambeson.recipe import Arm
from gambeson.recipes import named

DOCS = Path(__file__).parent.parent / "docs" / "quality.md"
QUICK = ["--data", "digits", "--workers", "1", "--limit", "200"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GAMBESON_DATA", raising=False)
    monkeypatch.delenv("GAMBESON_RUNS", raising=False)


@pytest.fixture(scope="module")
def real() -> ImageSet:
    return Digits().load()


def store_of(root: Path, images: torch.Tensor, labels: torch.Tensor, **provenance: Any) -> SyntheticStore:
    writer = StoreWriter(root=root, blocks=1, blocks_per_shard=1)
    writer.put(0, to_uint8(images), labels.numpy())
    writer.finish(provenance)
    return SyntheticStore.open(root)


def noisy(real: ImageSet, count: int = 240, seed: int = 0, noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """Train images with Gaussian noise, and their labels."""
    stream = torch.Generator().manual_seed(seed)
    places = torch.randint(len(real.train), (count,), generator=stream)
    images = real.train.images[places]
    return (images + noise * torch.randn(images.shape, generator=stream)).clamp(0, 1), real.train.labels[places]


@pytest.fixture(scope="module")
def store(real: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_of(tmp_path_factory.mktemp("noisy") / "store", *noisy(real)).root


def result(runs: str = "runs") -> dict[str, Any]:
    """The only result below a runs folder."""
    (path,) = Path(runs).glob("quality/*.json")
    return json.loads(path.read_text())


# ---- the table of measures ----


def test_every_measure_is_in_the_table_the_fields_the_help_and_the_page() -> None:
    assert [field.name for field in fields(Measures)] == list(TABLE)
    assert set(field_help(Measures)) == set(TABLE)
    page = DOCS.read_text()
    for name, entry in TABLE.items():
        assert entry.tells in described()
        assert f"`{name}`" in page, f"docs/quality.md does not say what {name} tells"
        assert entry.group in GROUPS
        assert entry.source
    assert described() in USAGE


def test_every_measure_takes_what_its_entry_says() -> None:
    """The needs of an entry are the parameters of its component."""
    wanted = {
        "features": {"real", "synthetic", "seed"},
        "held out": {"real", "synthetic", "held_out", "seed"},
        "images": {"real", "synthetic", "once", "seed"},
        "classifier": {"model", "real", "synthetic", "seed", "name", "device"},
        "training": {"real", "synthetic", "held_out", "once", "seed", "device"},
    }
    for name, entry in TABLE.items():
        component = Measures().component(name)
        assert set(inspect.signature(component.__call__).parameters) == wanted[entry.needs], name


def test_names_of_measures() -> None:
    assert chosen("fast") == (FAST, False)
    assert chosen("all") == (tuple(TABLE), False)
    assert chosen("kid, fid") == (("fid", "kid"), True), "in the table's order"
    assert chosen("conditional-wasserstein")[0] == ("conditional_wasserstein",)
    with pytest.raises(UserError, match=r"expected one of kid.*got 'kit'"):
        chosen("kit")
    with pytest.raises(UserError, match="unknown measure"):
        chosen("")


# ---- what comes out ----


def test_a_table_a_file_with_everything_and_markdown(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The three agree; the same words again measure nothing; another seed does."""
    quality([str(store), *QUICK])
    said, found = capsys.readouterr().out, result()
    assert {line["measure"] for line in found["lines"]} == set(FAST)
    table = next(Path("runs/quality").glob("*.md")).read_text()
    for line in found["lines"]:
        row = Measured(**line["measured"])
        assert row.space == "pixels"
        assert row.name in table
        assert number(row.value) in said
        assert number(row.value) in table
    assert found["data"]["digest"] == Digits().load().digest
    assert found["synthetic"]["digest"] == SyntheticStore.open(store).digest
    assert found["space"]["name"] == "pixels"
    assert found["command"] == f"gambeson quality {store} {' '.join(QUICK)}"
    assert {"gambeson", "torch"} <= set(found["versions"])
    quality([str(store), *QUICK])
    again = capsys.readouterr().out
    assert again.count("there already") == len(FAST) + 1  # and the list of nearest images
    assert not re.search(r"measure +done", again)
    quality([str(store), *QUICK, "--seed", "1", "--measures", "kid"])
    assert re.search(r"kid +measure +done", capsys.readouterr().out)


def test_the_nearest_train_image_of_every_synthetic_one(store: Path, real: ImageSet) -> None:
    quality([str(store), "--data", "digits", "--workers", "1", "--limit", "200", "--measures", "memorisation"])
    (path,) = Path("runs").glob("quality/*.nearest.parquet")
    rows = pq.read_table(path).to_pydict()
    assert len(rows["position"]) == 200
    assert sorted(rows["position"]) == rows["position"]
    images = SyntheticStore.open(store).read(np.array(rows["position"]))[0].reshape(200, -1) / 255
    train = to_uint8(real.train.images)[rows["train"]].reshape(200, -1) / 255
    np.testing.assert_allclose(np.linalg.norm(images - train, axis=1), rows["distance"], atol=1e-4)
    looked_at = set(sources.wanted_positions(len(real.train), 200, 0, "train").tolist())
    assert set(rows["train"]) <= looked_at
    named_copies = [m for m in result()["lines"] if m.get("measured", {}).get("name") == "copies of train"]
    assert np.mean(rows["copy"]) == pytest.approx(named_copies[0]["measured"]["value"])


def test_fields_of_measures_can_be_set(store: Path) -> None:
    asked = read([str(store), *QUICK, "--measures", "precision_recall", "--measures.precision_recall.k", "3"])
    assert asked.assessing.measures.precision_recall.k == 3
    assert asked.assessing.embedding.limit == 200
    asked = read([str(store), "--data", "digits", "--threat", "l2:0.5", "--embedding.limit", "none"])
    assert asked.assessing.measures.transfer.threat.norm == "l2"
    assert asked.assessing.embedding.limit is None


def test_out_is_never_anothers(store: Path) -> None:
    """A file that is not this command's result stays; the same command may write its own again."""
    words = [str(store), *QUICK, "--measures", "kid", "--out", "mine.json"]
    Path("mine.json").write_text("something else")
    with pytest.raises(UserError, match=r"--out: expected a path where nothing lies yet.*mine\.json"):
        quality(words)
    assert Path("mine.json").read_text() == "something else"
    Path("mine.json").unlink()
    quality(words)
    quality(words)
    assert json.loads(Path("mine.json").read_text())["lines"]
    with pytest.raises(UserError, match="--out"):
        quality([*words, "--seed", "1"])


def test_help_without_data_and_missing_words(capsys: pytest.CaptureFixture[str]) -> None:
    quality([])
    assert described() in capsys.readouterr().out
    for words, told in (
        (["--data", "digits"], "synthetic images first"),
        (["x"], "--data"),
        (["x", "--data", "digits", "--against", "all"], "--against"),
        (["x", "--data", "digits", "--out", "there.txt"], "--out"),
        (["x", "--data", "digits", "--bogus", "1"], "bogus"),
    ):
        with pytest.raises(UserError, match=told):
            quality(words)
    with pytest.raises(UserError, match="nothing there"):
        quality(["nowhere", *QUICK])


def test_exit_codes_of_the_command_line(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 and a result; 2 and one paragraph for a mistake; 3 for a damaged store."""
    assert main(["quality", str(store), *QUICK, "--measures", "kid"]) == 0
    assert main(["quality", str(store), *QUICK, "--measures", "kidd"]) == 2
    assert "gambeson: unknown measure: expected one of kid" in capsys.readouterr().err
    broken = Path("broken")
    shutil.copytree(store, broken)
    (broken / "shards" / "00000.npy").write_bytes(b"")
    assert main(["quality", "broken", *QUICK]) == 3
    assert main(["quality", "--help"]) == 0


# ---- killed and resumed; test images ----


@pytest.mark.slow
def test_killed_by_the_system(store: Path) -> None:
    """SIGKILL as soon as two measures are kept: the next start finds them, and ends as one that was left alone."""
    words = [sys.executable, "-m", "gambeson", "quality", str(store), "--data", "digits", "--workers", "1"]
    around = {**os.environ, "PYTHONPATH": str(DOCS.parent.parent), "OMP_NUM_THREADS": "1"}
    process, limit = subprocess.Popen(words, env=around, stdout=subprocess.DEVNULL), time.monotonic() + 120
    while len(list(Path("runs").glob("stages/measure/*/done.json"))) < 2 and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(Path("runs").glob("quality/*"))
    found = subprocess.run(words, env=around, capture_output=True, text=True, check=True).stdout
    assert found.count("there already") >= 2
    subprocess.run([*words, "--runs", "alone"], env=around, capture_output=True, check=True)
    assert result()["lines"] == result("alone")["lines"]


def test_a_killed_command_goes_on_with_the_rest(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second of three measures dies the first time; the first is found, the others are made."""
    words = [str(store), *QUICK, "--measures", "fid,kid,precision_recall"]
    whole, calls = assessing.WORK["features"], []

    def dies(work: Any, spec: Any, *given: Any, seed: int) -> None:
        calls.append(type(spec.measure).__name__)
        if len(calls) == 2:
            raise KeyboardInterrupt
        whole(work, spec, *given, seed=seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(assessing.WORK, "features", dies)
        with pytest.raises(KeyboardInterrupt):
            quality(words)
        assert not list(Path("runs").glob("quality/*.json"))
        quality(words)
    assert calls == ["FrechetDistance", "KernelDistance", "KernelDistance", "PrecisionRecall"]
    resumed = result()
    quality([*words, "--runs", "alone"])
    assert result("alone")["lines"] == resumed["lines"]


def test_test_images_are_read_only_when_they_are_asked_for(
    store: Path, monkeypatch: pytest.MonkeyPatch, real: ImageSet
) -> None:
    """Measures see the image set without test, whatever they need; with --against test they see it."""
    seen: list[tuple[str, list[str]]] = []
    for needs, work in assessing.WORK.items():

        def spied(workspace: Any, spec: Any, *given: Any, seed: int, needs: str = needs, work: Any = work) -> None:
            for part in given:
                if isinstance(part, sources.Part):
                    seen.append((needs, [part.name]))
                    assert part.split.images is not None
                if isinstance(part, ImageSet):
                    with pytest.raises(UserError, match="reads_test"):
                        assert part.test.images is not None
            work(workspace, spec, *given, seed=seed)

        monkeypatch.setitem(assessing.WORK, needs, spied)
    quality([str(store), *QUICK, "--measures", "arc,cas", *TINY])
    assert seen == [("images", ["train"]), ("training", ["validation"])]
    part = sources.Part.of(real, "test").without_test()
    with pytest.raises(UserError, match="reads_test"):
        assert part.split.images is not None
    seen.clear()
    quality([str(store), *QUICK, "--measures", "arc", *TINY, "--against", "test"])
    assert seen == [("images", ["test"])]
    material = assessing.Material.__dict__["held"].fget
    assert [material(SimpleNamespace(against=part)) for part in sources.PARTS] == ["validation", "validation", "test"]


def test_against_says_which_real_images(store: Path, real: ImageSet) -> None:
    for part, count in (("train", 300), ("validation", 150), ("test", 1347)):
        words = [str(store), "--data", "digits", "--workers", "1", "--measures", "kid", "--against", part]
        quality([*words, "--out", f"{part}.json"])
        found = json.loads(Path(f"{part}.json").read_text())
        assert found["lines"][0]["measured"]["real"] == count
        assert found["parts"]["compared"] == part
    assert len({json.dumps(json.loads(Path(f"{p}.json").read_text())["lines"]) for p in ("train", "test")}) == 2


# ---- the training measures, small ----

TINY = [
    *("--measures.arc.discrimination.images", "50", "--measures.cas.images", "50"),
    *("--measures.arc.epsilons", "0", "8/255", "--measures.arc.discrimination.optimisation.steps", "3"),
    *("--measures.arc.discrimination.network.width", "4", "--measures.arc.discrimination.steps", "1"),
    *("--measures.arc.attack.steps", "2", "--measures.cas.training.optimisation.steps", "4"),
    *("--measures.cas.training.network.width", "4", "--measures.cas.training.validation_steps", "1"),
    *("--measures.transfer.attack.steps", "2", "--measures.transfer.images", "40"),
]


def test_all_measures_and_the_trainings_of_another_set_are_found(
    store: Path, real: ImageSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`all` gives every measure; without a classifier `transfer` says so; the training on real images is shared."""
    quality([str(store), *QUICK, "--measures", "all", *TINY])
    lines = result()["lines"]
    assert {line["measure"] for line in lines} == set(TABLE)
    (missing,) = [line for line in lines if "not_measured" in line]
    assert missing["measure"] == "transfer"
    assert "--classifier" in missing["not_measured"]
    assert capsys.readouterr().out.count("not measured") == 1
    quality([str(store), *QUICK, "--measures", "all", *TINY])
    assert not re.search(r"(measure|classifier) +done", capsys.readouterr().out), "trainings included"
    other = store_of(tmp_path / "other", *noisy(real, seed=1)).root
    quality([str(other), *QUICK, "--measures", "cas", *TINY, "--out", "other.json"])
    said = capsys.readouterr().out
    assert re.search(r"cas +train classifier +there already", said), "the one on real images"
    assert re.search(r"cas +train classifier +done", said), "the one on synthetic images"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "net"
    ResNetSpec(width=4).build(1, 10, seed=1).eval().save_pretrained(folder, shape=(1, 8, 8))
    return folder


def test_a_classifier_gives_the_space_and_is_compared(
    store: Path, classifier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its features are embedded once, and read again for another measure; its robustness on both sets is compared."""
    words = [str(store), *QUICK, "--features", str(classifier)]
    quality([*words, "--measures", "kid"])
    assert result()["space"]["name"].startswith(f"penultimate layer of ResNet of {classifier}")
    capsys.readouterr()
    quality([*words, "--measures", "kid,precision_recall", "--out", "two.json"])
    said = capsys.readouterr().out
    assert len(re.findall(r"embed_images +there already", said)) == 2
    assert "space A: penultimate layer" in said or "A: penultimate layer" in said
    quality([str(store), *QUICK, "--measures", "transfer", "--classifier", str(classifier), *TINY, "--out", "t.json"])
    found = json.loads(Path("t.json").read_text())
    assert found["classifier"]["name"].endswith(str(classifier))
    assert {line["measured"]["name"] for line in found["lines"]} >= {"accuracy on real images"}
    three = ResNetSpec(width=4).build(1, 3, seed=1).eval()
    three.save_pretrained(Path("three"), shape=(1, 8, 8))
    with pytest.raises(UserError, match="digits's 10 classes, got 3"):
        quality([str(store), *QUICK, "--measures", "transfer", "--classifier", "three"])


@pytest.mark.parametrize("space", ["pixels", "classifier"])
def test_the_train_images_in_8_bits_are_exact_copies(real: ImageSet, classifier: Path, space: str) -> None:
    """Though digits are sixteenths, which no 8-bit number is. Of some of either, some are copies: drawn apart."""
    store_of(Path("copy"), real.train.images, real.train.labels)
    words = ["copy", "--data", "digits", "--workers", "1", "--measures", "memorisation", "--allow-copies"]
    words += ["--features", "pixels" if space == "pixels" else str(classifier)]
    for limit in ([], ["--limit", "100"]):
        quality([*words, *limit, "--out", f"found{len(limit)}.json"])
    whole, some = (
        {line["measured"]["name"]: Measured(**line["measured"]) for line in json.loads(Path(name).read_text())["lines"]}
        for name in ("found0.json", "found2.json")
    )
    same = whole["exact copies of train"]
    assert (same.value, same.real, same.synthetic) == (1.0, 450, 300)
    assert whole["copies of train"].low > 0.98
    assert 0.15 < some["exact copies of train"].value < 0.55  # a third on average
    rows = pq.read_table("found0.nearest.parquet").to_pydict()
    assert all(rows["copy"])
    assert rows["train"] == rows["position"]


def test_the_help_says_that_test_images_are_compared() -> None:
    """`count_copies` reads them whatever is asked for."""
    told = " ".join(USAGE.split())
    assert "they are always compared with the synthetic ones byte for byte" in told
    assert "only then test images are read" not in told


# ---- sets that are none, or do not fit ----


@pytest.mark.parametrize("part", sources.PARTS)
def test_real_images_passed_as_synthetic_are_refused(real: ImageSet, part: str) -> None:
    split = getattr(real, part)
    store_of(Path("mistake"), split.images, split.labels)
    with pytest.raises(UserError, match=rf"100\.0 %.*byte for byte {part} images of digits.*--allow-copies"):
        quality(["mistake", *QUICK])
    quality(["mistake", *QUICK, "--measures", "kid", "--allow-copies"])
    found = result()
    assert found["copies"][f"of_{part}"] == len(split)
    assert any(f"byte for byte, {part} images" in note for note in found["notes"])


def test_a_few_copies_pass_and_are_said(real: ImageSet) -> None:
    """Below the share that a mistake has; images that repeat each other are said too."""
    images, labels = noisy(real)
    images[:5], images[5:8] = real.train.images[:5], images[8:9]
    store_of(Path("store"), images, labels)
    quality(["store", *QUICK, "--measures", "kid"])
    assert result()["copies"] == {
        "looked_at": 240, "of_train": 5, "of_validation": 0, "of_test": 0, "repeated": 3,
    }  # fmt: skip
    images[:60] = real.train.images[:60]
    store_of(Path("quarter"), images, labels)
    with pytest.raises(UserError, match=r"60 of 240 \(25\.0 %\)"):
        quality(["quarter", *QUICK])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3]), st.integers(1, 5))
def test_marks_are_equal_for_equal_images_alone(seed: int, channels: int, side: int) -> None:
    """Against brute force over all pairs, of images with few different values."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 2, (12, side, side, channels), dtype=np.uint8) * draw.choice([1, 255], 1).astype(np.uint8)
    marks, rows = sources._marks(pixels), pixels.reshape(12, -1)
    assert np.array_equal(marks[:, None] == marks[None], (rows[:, None] == rows[None]).all(-1))


def test_marks_of_many_images_are_different_ones() -> None:
    """20,000 of them: marks of fewer than 28 bits would meet by chance, one in all bits does not."""
    pixels = np.random.default_rng(1).integers(0, 256, (20_000, 4, 4, 1), dtype=np.uint8)
    assert len(np.unique(sources._marks(pixels))) == len(np.unique(pixels.reshape(20_000, -1), axis=0))


def test_sets_that_do_not_fit(real: ImageSet) -> None:
    """Other pixels, channels, class names or classes are refused before anything is measured."""
    images, labels = noisy(real, 40)
    store_of(Path("large"), images.repeat(1, 1, 2, 2), labels)
    store_of(Path("colour"), images.repeat(1, 3, 1, 1), labels)
    store_of(Path("named"), images, labels, class_names=[f"class {k}" for k in (1, 0, *range(2, 10))])
    store_of(Path("more"), images, labels + 7)
    np.savez("large.npz", image=np.zeros((20, 9, 9, 1), np.uint8), label=np.arange(20) % 10)
    numbered = [*"1023456789"]
    store_of(Path("swapped"), images, labels, class_names=numbered)
    for word, told in (
        ("large", "8 x 8 pixels"),
        ("colour", "of 1 channels"),
        ("swapped", "expected the classes of digits in"),
        ("more", "up to 16"),
        ("large.npz", "8 x 8 pixels"),
    ):
        with pytest.raises(UserError, match=told):
            quality([word, *QUICK])
    assert not list(Path("runs").glob("stages/*/*/done.json"))


def test_images_without_a_class_are_measured_where_none_is_needed(real: ImageSet) -> None:
    images, labels = noisy(real)
    store_of(Path("store"), images, torch.full_like(labels, -1))
    quality(["store", *QUICK])
    lines = result()["lines"]
    missing = {line["measure"] for line in lines if "not_measured" in line}
    assert missing == {"conditional_wasserstein", "separation"}
    assert {"fid", "kid", "precision_recall"} <= {line["measure"] for line in lines if "measured" in line}


def test_too_few_images_are_an_error_where_the_measure_was_named(real: ImageSet) -> None:
    """... and a line that says why in `fast`."""
    images, labels = noisy(real, 5)
    store_of(Path("few"), images, labels)
    with pytest.raises(UserError, match=r"precision_recall: .*got 5"):
        quality(["few", *QUICK, "--measures", "precision_recall"])
    quality(["few", *QUICK])
    told = {line["measure"]: line.get("not_measured", "") for line in result()["lines"]}
    assert "got 5" in told["precision_recall"]
    assert "got 5" in told["kid"]


class Broken(torch.nn.Module):
    """NaN for the images whose mean lies above a tenth."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        flat = images.flatten(1)
        return torch.where(flat.mean(1, keepdim=True) > 0.3, torch.full_like(flat, float("nan")), flat)


def test_broken_features_are_an_error_whatever_was_asked_for(store: Path, real: ImageSet) -> None:
    """NaN: how many rows and of which space; a program needs --trust."""
    torch.jit.script(Broken()).save("broken.pt")
    words = [str(store), *QUICK, "--features", "broken.pt"]
    with pytest.raises(UserError, match="--trust"):
        quality(words)
    with pytest.raises(UserError, match=r"features of broken\.pt .*NaN or infinity in \d+ of 200 rows"):
        quality([*words, "--trust"])
    with pytest.raises(UserError, match="classifier: expected a folder"):
        quality([str(store), *QUICK, "--features", "nothing-here"])


def test_a_real_set_without_held_out_images(store: Path, real: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures that need them are lines with a reason, or errors where named."""
    empty = replace(real.validation, images=real.validation.images[:0], labels=real.validation.labels[:0])
    monkeypatch.setattr(Digits, "load", lambda self: replace(real, validation=empty))
    quality([str(store), *QUICK])
    told = {line["measure"]: line.get("not_measured", "") for line in result()["lines"]}
    assert "validation images" in told["complementarity"]
    assert not told["kid"]
    with pytest.raises(UserError, match="complementarity: digits: validation images"):
        quality([str(store), *QUICK, "--measures", "complementarity"])


# ---- other kinds of sets ----


def test_a_selection_and_an_npz_of_others(store: Path, real: ImageSet, tmp_path: Path) -> None:
    """A selection is measured alone; an .npz becomes a store first, and has the digest of its content."""
    own = SyntheticStore.open(store)
    folder = store.parent / "selected"
    folder.mkdir(exist_ok=True)
    places = np.arange(0, 240, 2)
    Chosen.write(folder / "chosen.parquet", own, places, own.labels[places])
    images, labels = own.read(np.arange(240))
    np.savez("theirs.npz", image=images, label=labels)
    for word, count in ((str(folder), 120), (str(folder / "chosen.parquet"), 120), ("theirs.npz", 200)):
        quality([word, *QUICK, "--measures", "kid", "--out", f"{Path(word).stem}.json"])
        found = json.loads(Path(f"{Path(word).stem}.json").read_text())
        assert found["lines"][0]["measured"]["synthetic"] == count


def finished_run(root: Path, arms: dict[str, Path]) -> None:
    """The records of a run whose arms were trained with these selections (none: real images alone)."""
    recipe = replace(named("digits"), name="mine", arms=(Arm.REAL, Arm.GAUSSIAN))
    folder = root / f"mine-{recipe.digest[:10]}"
    folder.mkdir(parents=True)
    files.save(recipe, folder / "recipe.yaml")
    made = {"stage": "select", "digest": "0" * 64}
    chapters = [{"arm": "real", "seed": 0, "artifacts": {}}] + [
        {"arm": arm, "seed": seed, "artifacts": {"chosen": {**made, "folder": os.path.relpath(place, root)}}}
        for seed in (0, 1)
        for arm, place in arms.items()
    ]
    facts = {"format": 1, "recipe_digest": recipe.digest, "chapters": chapters, "started": "", "versions": {}}
    (folder / "run.json").write_text(json.dumps(facts))


def test_an_arm_of_a_finished_run(store: Path) -> None:
    """RUN:gaussian is the selection that its student was trained with; other arms are refused by name."""
    own = SyntheticStore.open(store)
    Path("runs/stages/select/0123abcd").mkdir(parents=True)
    Chosen.write(Path("runs/stages/select/0123abcd/chosen.parquet"), own, np.arange(100), own.labels[:100])
    finished_run(Path("runs"), {"gaussian": Path("runs/stages/select/0123abcd")})
    for word in ("mine:gaussian", "mine:gaussian:1"):
        quality([word, *QUICK, "--measures", "kid"])
    found = result()
    assert found["synthetic"]["digest"] == Chosen.open(Path("runs/stages/select/0123abcd/chosen.parquet")).digest
    assert found["lines"][0]["measured"]["synthetic"] == 100
    for word, told in (
        ("mine:real", r"expected an arm.*gaussian:0, gaussian:1.*got 'real'"),
        ("mine:gaussian:9", "got 'gaussian:9'"),
        ("nothing:plain", "unknown run"),
    ):
        with pytest.raises(UserError, match=told):
            quality([word, *QUICK])


# ---- how it is told ----


def line(measure: str = "kid", **changes: Any) -> Line:
    plain = {
        "name": "KID", "value": 0.5, "low": 0.25, "high": 0.75, "better": "lower", "ideal": 0.0, "space": "pixels",
        "real": 1000, "synthetic": 2000, "randomness": "images", "note": "",
    }  # fmt: skip
    return Line(measure=measure, found=Measured(**{**plain, **changes}))


def test_numbers_have_four_digits_that_count() -> None:
    told = {0.031274: "0.0313", 12.3456: "12.35", 1234.5: "1,234", 0.0: "0", 3.2e-6: "3.200e-06", -0.5: "-0.5000"}
    assert {value: number(value) for value in told} == told


def test_lines_notes_and_spaces() -> None:
    """Groups in order; equal notes stand once; a long name of a space gets a letter; a bar does not break a cell."""
    lines = (
        line("cas", note="a | b", space=None),
        line(note="biased", space="penultimate layer of a network (012345678901)"),
        line("fid", note="biased", low=None, high=None),
        Line(measure="transfer", found=None, reason="no classifier"),
    )
    findings = Findings(lines=lines, facts={"title": "set beside train", "command": "gambeson quality"})
    assert [group for group, _ in findings.grouped()] == ["distance", "training"]
    _, below = terminal_table(findings)
    assert below == [
        "space A: penultimate layer of a network (012345678901)",
        "[1] biased",
        "[2] a | b",
        "[3] no classifier",
    ]
    text = markdown(findings)
    assert text.index("## Distance") < text.index("## Training")
    assert "a \\| b" in text
    assert "| KID | 0.5000 | none | lower (0) | pixels | 1,000 | 2,000 | biased |" in text
    assert "| transfer | not measured |" in text
    told = findings.plain()
    assert [Measured(**each["measured"]) for each in told["lines"] if "measured" in each] == [
        each.found for each in lines if each.found
    ]
    assert json.loads(json.dumps(told)) == told


def test_copies_are_counted_by_part(real: ImageSet) -> None:
    """Brute force: a set of three train, two test images and one twice."""
    images = torch.cat([real.train.images[:3], real.test.images[:2], noisy(real, 1)[0].repeat(2, 1, 1, 1)])
    found = count_copies(store_of(Path("store"), images, torch.zeros(7, dtype=torch.int64)), real, seed=0)
    assert (found.looked_at, found.of_parts, found.repeated) == (7, {"train": 3, "validation": 0, "test": 2}, 1)
    assert found.share == pytest.approx(3 / 7)
