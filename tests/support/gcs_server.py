"""A GCS server on the loopback for tests, in a process of its own: `with serve(folder) as environment: ...`.

It is gcp-storage-emulator, which TensorStore cannot use as it is: here it says which generation it sends,
heeds the conditions that a request makes about it, takes empty files, keeps every byte of what is uploaded
beside its metadata, and answers several at a time.
"""

import contextlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path


@contextlib.contextmanager
def serve(folder: Path, bucket: str):
    """A server with this bucket; gives the environment of processes that shall use it."""
    process = subprocess.Popen([sys.executable, __file__, str(folder), bucket], stderr=subprocess.DEVNULL)
    try:
        while not (folder / "port").exists():
            assert process.poll() is None
            time.sleep(0.05)
        yield {
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{(folder / 'port').read_text()}",
            "FSSPEC_GS_TOKEN": "anon",
            "NO_PROXY": "127.0.0.1",
        }
    finally:
        process.kill()
        process.wait()


def main(folder: Path, bucket: str) -> None:
    from http.server import ThreadingHTTPServer

    from gcp_storage_emulator import server
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects
    from gcp_storage_emulator.server import HTTPStatus

    one_at_a_time = threading.Lock()

    def conditional(handler):
        def answer(request, response, storage):
            with one_at_a_time:
                return heed(request, response, storage)

        def heed(request, response, storage):
            name = request.params.get("object_id") or request.query.get("name", [""])[0]
            if not name and isinstance(request.data, dict):
                name = request.data["meta"]["name"]
            try:
                generation = storage.get_file_obj(request.params["bucket_name"], name)["generation"]
            except NotFound:
                generation = "0"
            (wanted,), (unwanted,) = (
                request.query.get(key, [None]) for key in ("ifGenerationMatch", "ifGenerationNotMatch")
            )
            if wanted is not None and wanted != generation:
                response.status = HTTPStatus.PRECONDITION_FAILED
            elif unwanted == generation:
                response.status = HTTPStatus.NOT_MODIFIED
            else:
                if request.method == server.GET and generation != "0":
                    response["x-goog-generation"] = generation
                handler(request, response, storage)

        return answer

    changed = (objects.get, objects.download, objects.insert, objects.delete)
    server.HANDLERS = tuple(
        (
            path,
            {
                method: conditional(handler) if handler in changed else handler
                for method, handler in of.items()
            },
        )
        for path, of in server.HANDLERS
    )
    read_data = server._read_data

    def read_whole(handler, query):
        kind = handler.headers.get("Content-Type") or ""
        if not kind.startswith("multipart/related"):
            return read_data(handler, query) or (b"" if "uploadType" in query else None)
        mark = b"--" + kind.partition("boundary=")[2].strip('"').encode()
        _, meta, content, _ = server._read_raw_data(handler).split(mark)
        (_, meta), (head, content) = (
            (part.lstrip(b"\r\n").split(b"\r\n\r\n" if b"\r\n\r\n" in part[:200] else b"\n\n", 1))
            for part in (meta, content)
        )
        content = content.removesuffix(b"\n").removesuffix(b"\r")
        return {
            "meta": json.loads(meta),
            "content": content,
            "content-type": head.decode().partition(":")[2].strip(),
        }

    server._read_data = read_whole
    server.server.HTTPServer = ThreadingHTTPServer
    running = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket=bucket)
    running.start()
    (folder / "port.part").write_text(str(running._api._httpd.server_port))
    (folder / "port.part").rename(folder / "port")
    threading.Event().wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
