"""A Hugging Face hub on this machine: what the libraries ask one for while they stream a dataset, answered from a folder.

HF_ENDPOINT leads them here, so that they go the whole way that they go to the real one: the dataset's commit, its card with the
subsets, listings, files in ranges of bytes. Left out: logins, large-file redirects, errors that come and go.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub:
    """One dataset, NAME, by commit: `commits` commit -> folder; the last is the newest. `asked`: the paths, in order."""

    NAME = "some/name"

    def __init__(self, commits: dict[str, Path]):
        self.commits, self.asked = commits, []

    def answer(self, path: str, wanted: str | None) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of a path; `wanted`: the Range header."""
        self.asked.append(path)
        newest = list(self.commits)[-1]
        if found := re.fullmatch(rf"/api/datasets/{self.NAME}(?:/revision/(\w+))?", path):
            commit = found[1] if found[1] in self.commits else newest
            return self._json({"id": self.NAME, "sha": commit, "siblings": [], "tags": [], "downloads": 0, "likes": 0})
        if found := re.fullmatch(rf"/api/datasets/{self.NAME}/tree/(\w+)/?(.*)", path):
            root = self.commits[found[1]]
            return self._json([self._entry(root, inside) for inside in sorted((root / found[2]).glob("*"))])
        if found := re.fullmatch(rf"/datasets/{self.NAME}/resolve/(\w+)/(.*)", path):
            commit = found[1] if found[1] in self.commits else newest
            file = self.commits[commit] / found[2]
            if file.is_file():
                content = file.read_bytes()
                headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
                if wanted:
                    first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted).groups()
                    headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                    return 206, headers, content[int(first) : int(last) + 1]
                return 200, headers, content
        return 404, {"X-Error-Code": "EntryNotFound"}, b""

    @staticmethod
    def _json(content) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()

    @staticmethod
    def _entry(root: Path, path: Path) -> dict:
        kind = {"type": "directory", "size": 0} if path.is_dir() else {"type": "file", "size": path.stat().st_size}
        return kind | {"path": path.relative_to(root).as_posix(), "oid": hashlib.sha1(str(path).encode()).hexdigest()}

    @contextmanager
    def serving(self, home: Path) -> Iterator[dict[str, str]]:
        """The environment that leads the libraries here, with a cache of their own in `home`."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, headers, body = hub.answer(unquote(urlsplit(self.path).path), self.headers.get("Range"))
                self.send_response(status)
                for key, value in (headers | {"Content-Length": str(len(body))}).items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *_) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            offline = {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
            yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(home), **offline}
            server.shutdown()


CARD = """---
configs:
- config_name: default
  data_files: other/*.parquet
- config_name: part
  data_files:
  - split: train
    path: part/*.parquet
---
"""
