"""The dashboard tool: which run it finds, which command it starts, what it says where there is nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from bdtrain.errors import ConfigError

SERVER = """\
import http.server, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


@pytest.fixture
def tool(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "open_dashboard", repository / "tools" / "open_dashboard.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "open_dashboard", module)
    spec.loader.exec_module(module)
    return module


def make_run(folder: Path, *, database: bool = True, uid: str = "uid-1") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 0, "attempt": 1, "time": 1.0, "event": "start"}\n')
    (folder / "run.json").write_text(json.dumps({"run_uid": uid}))
    if database:
        with sqlite3.connect(folder / "mlflow.db") as store:
            store.execute("CREATE TABLE runs (run_uuid, experiment_id, start_time, lifecycle_stage)")
            store.execute("CREATE TABLE tags (key, value, run_uuid)")
            store.execute("INSERT INTO runs VALUES ('aaa', 1, 5, 'deleted'), ('bbb', 7, 3, 'active')")
            store.execute("INSERT INTO runs VALUES ('ccc', 9, 9, 'active')")
            tags = "('bdtrain.run_uid', 'uid-1', 'aaa'), ('bdtrain.run_uid', 'uid-1', 'bbb')"
            store.execute(f"INSERT INTO tags VALUES {tags}, ('bdtrain.run_uid', 'uid-2', 'ccc')")
        store.close()
    return folder


def test_a_run_is_found_in_its_folder_or_alone_below_it(tool: ModuleType, tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "quickstart" / "run")
    for folder in (run, run.parent, run.parent.parent):
        assert tool.find_run(folder) == run


def test_several_runs_are_listed_newest_first(tool: ModuleType, tmp_path: Path) -> None:
    old, new = make_run(tmp_path / "old"), make_run(tmp_path / "deep" / "new")
    os.utime(old / "metrics.jsonl", (1000, 1000))
    with pytest.raises(ConfigError) as caught:
        tool.find_run(tmp_path)
    text = str(caught.value)
    assert "holds 2 runs; choose one" in text
    assert text.index(f"make dashboard RUN={new}") < text.index(f"make dashboard RUN={old}")


def test_what_cannot_be_shown_is_refused_with_a_way_out(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no run .* make dashboard RUN=runs/quickstart/run"):
        tool.find_run(tmp_path / "empty")
    with pytest.raises(ConfigError, match="is no folder"):
        tool.find_run(tmp_path / "missing")
    run = make_run(tmp_path / "run", database=False)
    with pytest.raises(ConfigError, match=r"has no mlflow.db: .* python tools/mlflow_sync.py"):
        tool.find_run(run)
    (run / "config.yaml").write_text("tracking: {mlflow_uri: 'http://me:secret@far:5000'}")
    with pytest.raises(ConfigError, match=r"go to http://\*\*\*@far:5000: open that page") as caught:
        tool.find_run(run)
    assert "secret" not in str(caught.value)
    (run / "mlflow.db").write_text("no database, but long enough to be taken for one" * 100)
    with pytest.raises(ConfigError, match="is no database of MLflow"):
        tool.find_page(run)


def test_database_without_tables_is_not_filled_yet(tool: ModuleType, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", database=False)
    sqlite3.connect(run / "mlflow.db").close()
    with pytest.raises(ConfigError, match="nothing was shipped; try again in a minute"):
        tool.find_page(run)


def test_printed_commands_can_be_pasted(tool: ModuleType, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "my runs" / name, database=False) for name in ("a", "b")]
    with pytest.raises(ConfigError) as caught:
        tool.find_run(tmp_path)
    assert f"make dashboard RUN='{runs[0]}'" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        tool.find_run(runs[0])
    assert f"python tools/mlflow_sync.py '{runs[0]}' makes it" in str(caught.value)
    (runs[0] / "config.yaml").write_text("tracking: {mlflow_uri: 'http://far:5000'}")
    with pytest.raises(ConfigError) as caught:
        tool.find_run(runs[0])
    assert f"mlflow_sync.py '{runs[0]}' --uri 'sqlite:///" in str(caught.value)


def test_second_signal_while_it_ends_leaves_no_server(repository: Path, tmp_path: Path) -> None:
    # The server does not heed SIGTERM: it ends only if the wait for it is not cut short.
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)\n"
    stubborn += "import time; time.sleep(60)"
    driver = f"""
import importlib.util, signal, subprocess, sys
spec = importlib.util.spec_from_file_location("tool", {str(repository / "tools" / "open_dashboard.py")!r})
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
tool.STOP_GRACE_S = 1.0
tool.require_server = lambda: None
tool.version = lambda name: "3"
tool.server_command = lambda folder, port: [sys.executable, "-c", {stubborn!r}]
def ready(process, port, log):
    while b"up" not in open(f"/proc/self/fd/{{log.fileno()}}", "rb").read():
        pass
    print("pid", process.pid, flush=True)
tool.wait_until_ready = ready
real = tool.stop
def stop(process):
    print("stopping", flush=True)
    real(process)
tool.stop = stop
sys.exit(tool.main([{str(make_run(tmp_path / "run"))!r}, "--port", "0"]))
"""
    with subprocess.Popen([sys.executable, "-c", driver], stdout=subprocess.PIPE, text=True) as dashboard:
        assert dashboard.stdout is not None
        server = 0
        for line in dashboard.stdout:
            if line.startswith("pid"):
                server = int(line.split()[1])
            elif "Ctrl-C ends it" in line:
                dashboard.send_signal(signal.SIGTERM)
            elif line.startswith("stopping"):
                time.sleep(0.3)
                dashboard.send_signal(signal.SIGTERM)
                dashboard.send_signal(signal.SIGHUP)
        assert dashboard.wait(30) == 0
    assert server
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)


def test_server_listens_on_this_machine_only_and_reads_the_runs_database(
    tool: ModuleType, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "a run")
    command = tool.server_command(run, 5123)
    assert command[:5] == [sys.executable, "-P", "-m", "mlflow", "server"]
    settings = dict(zip(command[5::2], command[6::2], strict=True))
    assert settings["--host"] == "127.0.0.1"
    assert settings["--port"] == "5123"
    assert settings["--backend-store-uri"] == f"sqlite:///{run}/mlflow.db"
    assert settings["--workers"] == "1"


def test_page_is_that_of_the_run_in_training_mode(tool: ModuleType, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    mode = "workflowType=machine_learning"
    assert tool.find_page(run) == f"/#/experiments/7/runs/bbb/model-metrics?{mode}"
    assert tool.find_page(make_run(tmp_path / "b", uid="uid-2")).startswith("/#/experiments/9/runs/ccc/")
    assert tool.find_page(make_run(tmp_path / "c", uid="unknown")) == f"/#/experiments?{mode}"


def test_a_taken_port_is_replaced_by_a_free_one(tool: ModuleType) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        other = tool.choose_port(port)
        assert other not in (0, port)
    assert tool.choose_port(other) == other
    with pytest.raises(ConfigError, match="is no port"):
        tool.choose_port(70000)


def test_without_the_server_it_says_how_to_install_it(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise tool.PackageNotFoundError(name)

    monkeypatch.setattr(tool, "version", missing)
    with pytest.raises(ConfigError, match="make dashboard installs it"):
        tool.require_server()


def test_interrupt_ends_the_server_and_what_it_started(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, script = make_run(tmp_path / "run"), tmp_path / "server.py"
    script.write_text(
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', sys.argv[2], sys.argv[1]])\n"
    )
    monkeypatch.setattr(tool, "version", lambda name: "3")
    monkeypatch.setattr(
        tool, "server_command", lambda folder, port: [sys.executable, str(script), str(port), SERVER]
    )
    wait = tool.wait_until_ready

    def interrupt_when_ready(process: subprocess.Popen[bytes], port: int, log: object) -> None:
        wait(process, port, log)
        monkeypatch.setattr(process, "wait", interrupted(process.wait))

    def interrupted(real: object) -> object:
        calls = []

        def fake(timeout: float | None = None) -> int:
            calls.append(timeout)
            if len(calls) == 1:
                raise KeyboardInterrupt
            return real(timeout)  # type: ignore[operator]

        return fake

    monkeypatch.setattr(tool, "wait_until_ready", interrupt_when_ready)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    try:
        port = tool.choose_port(0)
        assert tool.main([str(run), "--port", str(port)]) == 0
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), handlers, strict=True):
            signal.signal(number, handler)
    printed = capsys.readouterr().out
    assert f"http://127.0.0.1:{port}/#/experiments/7/runs/bbb" in printed
    assert f"report   {run / 'report.html'}" in printed
    assert (run / "report.html").is_file()
    until = time.monotonic() + 10  # a signal is not at once
    while _listens(port):
        assert time.monotonic() < until
        time.sleep(0.05)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_server_that_does_not_start_is_told_with_its_words(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    monkeypatch.setattr(tool, "version", lambda name: "3")
    words = "import sys; print('the schema is out of date'); sys.exit(5)"
    monkeypatch.setattr(tool, "server_command", lambda folder, port: [sys.executable, "-c", words])
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    try:
        assert tool.main([str(run), "--port", "0"]) == 3
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), handlers, strict=True):
            signal.signal(number, handler)
    error = capsys.readouterr().err
    assert "did not start (code 5)" in error
    assert "the schema is out of date" in error
