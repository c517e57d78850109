"""A tracking server of MLflow in a thread: as much of its interface as shipping needs, and its failures."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse


class FakeMlflow:
    """Keeps what it was sent while it is down, and comes back on the same port: a server with a database.

    ``mode``: "ok"; "hang" answers nothing; "lose_answers" stores a batch and closes the connection.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mode = "ok"
        self.requests = 0
        self.runs: dict[str, dict] = {}
        self.experiments: dict[str, str] = {}
        self.points: dict[tuple[str, int], list[tuple[object, int]]] = {}
        self._server: ThreadingHTTPServer | None = None
        # Bound once to get a free port that nobody else takes meanwhile.
        self._server = self._bind(0)
        self.port = self._server.server_address[1]
        self.down()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _bind(self, port: int) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", port), lambda *words: _Handler(self, *words))
        server.daemon_threads = True
        return server

    def up(self) -> None:
        self._server = self._bind(self.port)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def down(self) -> None:
        if self._server is not None:
            threading.Thread(target=self._server.shutdown, daemon=True).start()
            self._server.server_close()
            self._server = None

    def answer(self, path: str, query: dict, body: dict) -> tuple[int, dict]:
        name = path.split("/mlflow/")[-1]
        if name == "experiments/get-by-name":
            wanted = query["experiment_name"][0]
            if wanted not in self.experiments:
                return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such experiment"}
            return 200, {"experiment": {"experiment_id": self.experiments[wanted], "name": wanted}}
        if name == "experiments/create":
            self.experiments[body["name"]] = "1"
            return 200, {"experiment_id": "1"}
        if name == "runs/create":
            run_id = f"run{len(self.runs)}"
            info = {
                "run_id": run_id,
                "run_uuid": run_id,
                "experiment_id": "1",
                "run_name": body.get("run_name"),
                "status": "RUNNING",
                "lifecycle_stage": "active",
                "artifact_uri": (self.folder / run_id).as_uri(),
            }
            self.runs[run_id] = {"info": info, "tags": {}, "params": {}}
            self._tag(run_id, body)
            return 200, {"run": self._run(run_id)}
        if name == "runs/search":
            return 200, {"runs": [self._run(run_id) for run_id in self.runs]}
        run_id = body.get("run_id") or query.get("run_id", [""])[0]
        if run_id not in self.runs:
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such run"}
        if name == "runs/update":
            self.runs[run_id]["info"]["status"] = body.get("status")
            return 200, {"run_info": self.runs[run_id]["info"]}
        if name == "runs/log-batch":
            self._tag(run_id, body)
            for param in body.get("params", []):
                self.runs[run_id]["params"][param["key"]] = param["value"]
            for metric in body.get("metrics", []):
                kept = self.points.setdefault((metric["key"], int(metric["step"])), [])
                # The primary key of MLflow's own table: an equal point is kept once.
                point = (metric["value"], int(metric["timestamp"]))
                if point not in kept:
                    kept.append(point)
        return 200, {"run": self._run(run_id)}

    def _tag(self, run_id: str, body: dict) -> None:
        for tag in body.get("tags", []):
            self.runs[run_id]["tags"][tag["key"]] = tag["value"]

    def _run(self, run_id: str) -> dict:
        run = self.runs[run_id]
        pairs = {
            kind: [{"key": key, "value": value} for key, value in run[kind].items()]
            for kind in ("tags", "params")
        }
        return {"info": run["info"], "data": pairs}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def __init__(self, fake: FakeMlflow, *words) -> None:
        self.fake = fake
        super().__init__(*words)

    def do_GET(self) -> None:
        self._serve({})

    def do_POST(self) -> None:
        self._serve(json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}"))

    def do_PATCH(self) -> None:
        self.do_POST()

    def _serve(self, body: dict) -> None:
        fake = self.fake
        fake.requests += 1
        while fake.mode == "hang":
            time.sleep(0.05)
        address = urlparse(self.path)
        status, answer = fake.answer(address.path, parse_qs(address.query), body)
        if fake.mode == "lose_answers" and address.path.endswith("log-batch"):
            self.close_connection = True
            return
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # whoever asked has gone
            self.wfile.write(text)

    def log_message(self, *words) -> None:
        """Silence."""
