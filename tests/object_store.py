"""An S3 server of its own process (moto's), and a proxy before it that refuses while a file says so.

python object_store.py serve PORT            one request after another, so that conditions on them are exact
python object_store.py proxy PORT TO FILE    passes bytes on; while FILE is there it answers 503, or as FILE says: hangs
                                             up ("hang"), passes one request on and loses its answer ("lose one")
"""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BUSY = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\nContent-Length: 93\r\n\r\n"
    b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Reduce your rate</Message></Error>\n'
)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def process(*words: str) -> Iterator[str]:
    """This file as a process, until the block ends; its URL, once it answers."""
    port = free_port()
    command = [sys.executable, __file__, words[0], str(port), *words[1:]]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        try:
            _await(running, port)
            yield f"http://127.0.0.1:{port}"
        finally:
            running.kill()


def _await(running: subprocess.Popen, port: int) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        assert running.poll() is None, "the server did not start"
        time.sleep(0.1)
    raise AssertionError("the server does not answer")


@contextlib.contextmanager
def object_store() -> Iterator[str]:
    """A server with no buckets; its endpoint stands in the environment, with credentials as it takes any."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    with process("serve") as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrEXAMPLEKEY")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("GAMBESON_PATIENCE", "20")
        yield url


def behind(url: str) -> Any:
    """Another client of the server than ours: boto3's."""
    import boto3

    return boto3.client("s3", endpoint_url=url)


def bucket(url: str, name: str) -> str:
    """Makes a bucket; its URL."""
    behind(url).create_bucket(Bucket=name)
    return f"s3://{name}"


def put(url: str, bucket_name: str, key: str, data: bytes) -> None:
    """Overwrites an object: what somebody does behind our back."""
    behind(url).put_object(Bucket=bucket_name, Key=key, Body=data)


def contents(url: str, bucket_name: str) -> dict[str, bytes]:
    """All objects of a bucket."""
    client = behind(url)
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket_name)
    keys = [one["Key"] for page in pages for one in page.get("Contents", [])]
    return {key: client.get_object(Bucket=bucket_name, Key=key)["Body"].read() for key in keys}


def _serve(port: int) -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    run_simple("127.0.0.1", port, DomainDispatcherApplication(create_backend_app), threaded=False)


async def _proxy(port: int, to: int, refuse: Path) -> None:
    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        how = refuse.read_text() if refuse.exists() else None
        if how == "lose one":
            refuse.unlink()
            there, back = await asyncio.open_connection("127.0.0.1", to)
            passing = asyncio.create_task(pass_on(reader, back))
            await there.read(1 << 16)  # the server has done it
            passing.cancel()
            back.close()
            writer.close()
            return
        if how is not None:
            if how != "hang":
                await reader.read(1 << 20)
                writer.write(BUSY)
                await writer.drain()
            writer.close()
            return
        there, back = await asyncio.open_connection("127.0.0.1", to)
        await asyncio.gather(pass_on(reader, back), pass_on(there, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    os.environ.setdefault("MOTO_S3_CUSTOM_ENDPOINTS", "")
    if sys.argv[1] == "serve":
        _serve(int(sys.argv[2]))
    else:
        asyncio.run(_proxy(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])))
