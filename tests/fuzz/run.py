"""Coverage-guided fuzzing of the readers: `python -m tests.fuzz.run --seconds N [TARGET ...]` (pip install atheris).

Every target runs N seconds of CPU in a process of its own, from the seeds in tests/fuzz/seeds/TARGET. What breaks it is
kept in tests/fuzz/found/TARGET (not in the repository): mend the reader, then move it to the seeds, which tests replay.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).parent
SEEDS, FOUND = HERE / "seeds", HERE / "found"
NAMES = ("npz", "idx", "mat", "tar", "zip", "parquet", "recipe", "checkpoint", "pickle", "picture")
INSTRUMENTED = (
    "gambeson.data",
    "gambeson.files",
    "gambeson.canonical",
    "gambeson.models",
    "zipfile",
    "tarfile",
    "yaml",
)
OPTIONS = ("-max_len=65536", "-timeout=600", "-rss_limit_mb=6000", "-print_final_stats=1")


def fuzz(name: str, seconds: float, said: int) -> NoReturn:
    """One target, in a process of its own that ends here: findings are kept, one for each place they come from."""
    import atheris

    from tests.fuzz.bounds import OutOfBounds, Trial

    os.dup2(said, 1)
    os.dup2(said, 2)
    trial, seen, count, end = Trial(name), set[str](), 0, time.process_time() + seconds

    def one(data: bytes) -> None:
        nonlocal count
        count += 1
        try:
            trial(data)
        except (Exception, OutOfBounds) as error:
            if where(error) not in seen:
                seen.add(where(error))
                keep(name, data, error)
        if time.process_time() > end:
            print(f"\nDONE {count}", file=sys.stderr, flush=True)
            trial.close()
            os._exit(0)

    with tempfile.TemporaryDirectory() as corpus:
        atheris.Setup([sys.argv[0], *OPTIONS, f"-artifact_prefix={FOUND / name}/", corpus, str(SEEDS / name)], one)
        atheris.Fuzz()
    os._exit(1)


def where(error: BaseException) -> str:
    """Kind and place of an error, without what differs from input to input."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} {last.filename}:{last.lineno}"


def keep(name: str, data: bytes, error: BaseException) -> None:
    """Writes down an input that breaks a target, and says so."""
    path = FOUND / name / hashlib.sha256(data).hexdigest()[:12]
    path.write_bytes(data)
    path.with_suffix(".txt").write_text("".join(traceback.format_exception(error)))
    print(f"\nFOUND {where(error)}", file=sys.stderr, flush=True)


def told(name: str, output: str) -> dict[str, object]:
    """What a target's process said: executions, coverage with the seeds and at the end, findings, how it ended."""
    begun = re.findall(r"INITED cov: (\d+)", output)
    reached = re.findall(r"cov: (\d+)", output)
    return {
        "target": name,
        "executions": int((re.findall(r"DONE (\d+)", output) or re.findall(r"#(\d+)\s", output) or [0])[-1]),
        "coverage": [int(begun[0]), int(reached[-1])] if begun else None,
        "findings": sorted(set(re.findall(r"FOUND (.*)", output))),
        "broken off": re.findall(r"ERROR: libFuzzer: (.*)", output),
    }


def forked(name: str, seconds: float) -> dict[str, object]:
    """What came of one target, in a child of this process, which has imported everything."""
    (FOUND / name).mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        child = os.fork()
        if child == 0:
            fuzz(name, seconds, said.fileno())
        _, status = os.waitpid(child, 0)
        said.seek(0)
        return {**told(name, said.read()), "exit": status, "wall": round(time.monotonic() - begun)}


def main() -> int:
    """Runs the targets one after the other; 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="of CPU for each target")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(NAMES))
    asked = parser.parse_args()
    if strange := sorted(set(asked.targets) - set(NAMES)):
        parser.error(f"expected targets among {', '.join(NAMES)}, got {', '.join(strange)}")
    import atheris  # type: ignore[import-not-found]

    with atheris.instrument_imports(  # type: ignore[attr-defined]
        include=list(INSTRUMENTED), enable_loader_override=False
    ):
        import tests.fuzz.targets  # noqa: F401
    import torch

    torch.set_num_threads(1)  # no threads of its own, which a fork would lose
    results = []
    for name in asked.targets or NAMES:
        results.append(forked(name, asked.seconds))
        print(json.dumps(results[-1]), flush=True)
    return int(any(r["findings"] or r["broken off"] for r in results))


if __name__ == "__main__":
    sys.exit(main())
