"""A real S3 server on the loopback for tests, in a process of its own: `with serve(folder) as server: ...`.

It is moto's. Every request is noted; it can refuse to write, stop answering, or be killed.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

# What must never be seen.
KEY_ID, SECRET = "AKIAPLANTED0KEY0ID00", "planted/secret+access+key"


class Server:
    """Its address and notes."""

    def __init__(self, folder: Path, process: subprocess.Popen, port: int):
        self.process, self.folder = process, folder
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
        }

    def reach(self, monkeypatch) -> None:
        """Let this process talk to it, and forget another one."""
        import s3fs
        from etils.epath.backend import fsspec_backend

        from unibiomed_jax import bucket

        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)
        bucket._file_system.cache_clear()
        type(fsspec_backend)._get_filesystem.cache_clear()
        s3fs.S3FileSystem.clear_instance_cache()

    def requests(self) -> list[dict]:
        """All requests so far: method, path, range (None: the whole), status, sent (bytes)."""
        return [json.loads(line) for line in (self.folder / "requests.jsonl").read_text().splitlines()]

    @contextlib.contextmanager
    def behaving(self, how: str):
        """ "refuse": every request that writes, with 403; "refuse all"; "stall": no answer; "know no
        conditions": to write under one is not implemented."""
        (self.folder / "how").write_text(how)
        yield
        (self.folder / "how").unlink()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def serve(folder: Path, *buckets: str):
    """A server with these buckets, that keeps its notes in `folder`."""
    (folder / "requests.jsonl").touch()
    process = subprocess.Popen([sys.executable, __file__, str(folder), *buckets], stderr=subprocess.DEVNULL)
    try:
        while not (folder / "port").exists():
            assert process.poll() is None
            time.sleep(0.05)
        yield Server(folder, process, int((folder / "port").read_text()))
    finally:
        process.kill()
        process.wait()


REFUSAL = (
    f"<Error><Code>AccessDenied</Code><Message>Access Denied to {KEY_ID} with {SECRET}</Message>"
    f"<AWSAccessKeyId>{KEY_ID}</AWSAccessKeyId></Error>"
).encode()
UNKNOWN = (
    b"<Error><Code>NotImplemented</Code><Message>A header implies functionality that is not implemented"
    b"</Message></Error>"
)


def main(folder: Path, *buckets: str) -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    moto = DomainDispatcherApplication(create_backend_app)
    WSGIRequestHandler.protocol_version = "HTTP/1.1"

    def application(environ, start_response):
        method, noted = environ["REQUEST_METHOD"], {}
        how = (folder / "how").read_text() if (folder / "how").exists() else ""
        if how == "stall":
            time.sleep(3600)

        def start(status, headers, *rest):
            noted["status"] = status
            return start_response(status, headers, *rest)

        if how == "refuse all" or (how == "refuse" and method not in ("GET", "HEAD")):
            length = str(len(REFUSAL))
            start("403 Forbidden", [("Content-Length", length), ("Content-Type", "application/xml")])
            parts = [REFUSAL]
        elif how == "know no conditions" and {"HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"} & environ.keys():
            environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            start("501 Not Implemented", [("Content-Length", str(len(UNKNOWN)))])
            parts = [UNKNOWN]
        else:
            parts = list(moto(environ, start))
        noted |= {"method": method, "path": environ["PATH_INFO"], "range": environ.get("HTTP_RANGE")}
        noted["sent"] = 0 if method == "HEAD" else sum(map(len, parts))
        with (folder / "requests.jsonl").open("a") as file:
            file.write(json.dumps(noted) + "\n")
        return parts

    server = make_server("127.0.0.1", 0, application, threaded=True)
    import boto3

    os.environ.update(AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="x", NO_PROXY="127.0.0.1")
    import threading

    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{server.port}", region_name="us-east-1")
    for bucket in buckets:
        client.create_bucket(Bucket=bucket)
    (folder / "port.part").write_text(str(server.port))
    (folder / "port.part").rename(folder / "port")
    threading.Event().wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
