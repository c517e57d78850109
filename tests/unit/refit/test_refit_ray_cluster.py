"""What stands around Ray is judged without starting it: sockets, environment, token, folder, quorum."""

import fcntl
import os
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from bdtrain.diffusion.variance import BlockRecords
from bdtrain.errors import RefitError
from bdtrain.refit.outcome import (
    RaySettings,
    ShardOutcome,
    ShardQueue,
    required_shards,
    split_address,
)
from bdtrain.refit.ray_cluster import (
    ListeningSocket,
    Process,
    check_loopback,
    end_processes,
    is_loopback_cluster,
    listening_sockets,
    prepare_environment,
    private_folder,
    read_socket_address,
    runs,
    session_processes,
    strip_launch_environment,
    token_path,
)

TABLE_HEAD = (
    "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
)
DRIVER, CHILD, GRANDCHILD, ORPHAN, STRANGER, GONE = 50, 51, 52, 53, 54, 55


def records(first):
    return BlockRecords(
        np.array([first, first + 1]), np.array([4, 4]), np.array([1, 3]), np.array([0.5, float(first)])
    )


def table_line(number, local, state, inode):
    remote = "0" * len(local.partition(":")[0]) + ":0000"
    return f"   {number}: {local} {remote} {state} 00000000:00000000 00:00000000 00000000 0 0 {inode} 1\n"


def kernel_address(host, port):
    """As the kernel prints it: each 32-bit word of the address in the machine's own byte order."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    words = np.frombuffer(socket.inet_pton(family, host), dtype=np.uint32)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"


def make_process(proc, pid, parent, *, state="S", inodes=(), environment=(), started=1000, name="a (b) c"):
    folder = proc / str(pid)
    (folder / "fd").mkdir(parents=True)
    fields = [state, str(parent), *["0"] * 17, str(started), "0"]
    (folder / "stat").write_text(f"{pid} ({name}) {' '.join(fields)}\n")
    (folder / "environ").write_bytes(b"".join(one.encode() + b"\0" for one in environment))
    for number, inode in enumerate(inodes):
        (folder / "fd" / str(number)).symlink_to(f"socket:[{inode}]")
    (folder / "fd" / "99").symlink_to("/dev/null")


def make_tables(proc, sockets, sockets6=()):
    (proc / "net").mkdir(parents=True)
    for name, rows in (("tcp", sockets), ("tcp6", sockets6)):
        lines = [table_line(number, *row) for number, row in enumerate(rows)]
        (proc / "net" / name).write_text(TABLE_HEAD + "".join(lines))


@pytest.fixture
def proc(tmp_path):
    """A driver with a child and a grandchild, an orphan of its session, a stranger, an ended child."""
    root = tmp_path / "proc"
    mark = f"RAY_AUTH_TOKEN_PATH={token_path(tmp_path / 'private')}"
    make_process(root, 1, 0)
    make_process(root, DRIVER, 1, inodes=[10])
    make_process(root, CHILD, DRIVER, inodes=[11, 12])
    make_process(root, GRANDCHILD, CHILD, inodes=[13])
    make_process(root, ORPHAN, 1, environment=["A=1", mark], inodes=[14])
    make_process(root, STRANGER, 1, environment=[f"{mark}-other"], inodes=[15])
    make_process(root, GONE, DRIVER, state="Z")
    (root / "self").symlink_to(str(DRIVER))
    return root


class TestSockets:
    @pytest.mark.skipif(
        sys.byteorder != "little", reason="the kernel's texts here are of a little-endian one"
    )
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            # Lines of a real kernel: 127.0.0.1, 0.0.0.0, 192.0.2.2, ::1, ::, ::ffff:127.0.0.1, fe80::1.
            ("0100007F:1F90", ("127.0.0.1", 8080)),
            ("00000000:0016", ("0.0.0.0", 22)),
            ("020200C0:18FF", ("192.0.2.2", 6399)),
            ("00000000000000000000000001000000:0277", ("::1", 631)),
            ("00000000000000000000000000000000:0050", ("::", 80)),
            ("0000000000000000FFFF00000100007F:0050", ("::ffff:127.0.0.1", 80)),
            ("000080FE000000000000000001000000:0050", ("fe80::1", 80)),
        ],
    )
    def test_addresses_are_read_as_the_kernel_writes_them(self, text, expected):
        host, port = read_socket_address(text)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        assert (socket.inet_pton(family, host), port) == (socket.inet_pton(family, expected[0]), expected[1])

    def test_a_real_listening_socket_of_this_process_is_found(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            wanted = ListeningSocket(os.getpid(), "127.0.0.1", server.getsockname()[1])
            assert wanted in listening_sockets([os.getpid()])
        assert wanted not in listening_sockets([os.getpid()])

    def test_only_sockets_that_listen_and_belong_to_the_session_count(self, proc, tmp_path):
        established = "01"
        make_tables(
            proc,
            [
                (kernel_address("127.0.0.1", 1), "0A", 10),
                (kernel_address("127.0.0.1", 2), "0A", 11),
                (kernel_address("192.0.2.2", 3), established, 12),
                (kernel_address("0.0.0.0", 4), "0A", 15),
            ],
            [(kernel_address("::1", 5), "0A", 13)],
        )
        assert listening_sockets([DRIVER, CHILD, GRANDCHILD], proc=proc) == [
            ListeningSocket(DRIVER, "127.0.0.1", 1),
            ListeningSocket(CHILD, "127.0.0.1", 2),
            ListeningSocket(GRANDCHILD, "::1", 5),
        ]
        assert check_loopback(DRIVER, tmp_path / "private", proc=proc) == 3

    @pytest.mark.parametrize("inode", [10, 12, 13, 14])
    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.2"])
    def test_one_socket_of_any_process_of_the_session_on_another_address_is_refused(
        self, proc, tmp_path, inode, host
    ):
        row = (kernel_address(host, 4321), "0A", inode)
        make_tables(proc, [] if ":" in host else [row], [row] if ":" in host else [])
        with pytest.raises(RefitError, match=rf"on {host} port 4321"):
            check_loopback(DRIVER, tmp_path / "private", proc=proc)

    def test_a_machine_without_ipv6_is_judged_by_its_ipv4_sockets(self, proc):
        make_tables(proc, [(kernel_address("127.0.0.1", 1), "0A", 11)])
        (proc / "net" / "tcp6").unlink()
        assert len(listening_sockets([CHILD], proc=proc)) == 1


class TestProcesses:
    def test_a_session_is_what_the_driver_started_and_what_carries_its_token(self, proc, tmp_path):
        found = session_processes(DRIVER, tmp_path / "private", proc=proc)
        assert {process.pid for process in found} == {CHILD, GRANDCHILD, ORPHAN}
        assert set(found.values()) == {"a (b) c"}

    def test_a_number_that_was_given_to_another_process_is_not_the_old_one(self, proc):
        assert runs(Process(CHILD, 1000), proc=proc)
        assert not runs(Process(CHILD, 999), proc=proc)
        assert not runs(Process(GONE, 1000), proc=proc)
        assert not runs(Process(4711, 1000), proc=proc)

    def test_a_process_that_stays_is_killed_and_one_that_goes_is_not(self, tmp_path):
        stays = subprocess.Popen(["sleep", "100"])
        goes = subprocess.Popen(["sleep", "0.2"])
        try:
            ours = {
                process.pid: process
                for process in session_processes(os.getpid(), tmp_path)
                if process.pid in (stays.pid, goes.pid)
            }
            assert end_processes(ours.values(), grace_s=1.0) == [stays.pid]
            assert (stays.wait(), goes.wait()) == (-9, 0)
        finally:
            stays.kill()


class TestEnvironment:
    def test_what_a_launcher_says_is_taken_away_and_nothing_else(self):
        said = {
            **dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), "1"),
            **dict.fromkeys(("SLURM_PROCID", "PMI_RANK", "OMPI_COMM_WORLD_SIZE", "PMIX_RANK"), "1"),
            "TORCHELASTIC_RUN_ID": "x",
        }
        kept = {"PATH": "/bin", "PYTHONPATH": "here", "RANKING": "1", "MY_RANK": "2", "OMP_NUM_THREADS": "1"}
        environment = {**said, **kept}
        assert strip_launch_environment(environment) == sorted(said)
        assert environment == kept

    def test_a_local_session_listens_on_loopback_with_our_token_and_no_other(self, tmp_path):
        environment = {
            "RANK": "0",
            "RAY_AUTH_MODE": "disabled",
            "RAY_AUTH_TOKEN": "of the user",
            "RAY_AUTH_TOKEN_PATH": "/home/user/.ray/auth_token",
            "RAY_ADDRESS": "10.0.0.1:6379",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
        }
        prepare_environment(RaySettings(), tmp_path, environment)
        expected = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        assert expected.items() <= environment.items()
        assert not {"RANK", "RAY_AUTH_TOKEN", "RAY_ADDRESS"} & set(environment)

    def test_a_cluster_keeps_the_token_of_the_user(self, tmp_path):
        token = tmp_path / "token"
        token.write_text("secret")
        environment = {"RAY_AUTH_TOKEN_PATH": str(token), "RANK": "0"}
        prepare_environment(RaySettings(address="10.0.0.1:6379"), None, environment)
        assert environment == {
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def test_a_cluster_without_a_token_is_not_asked_for_one(self):
        environment = {}
        prepare_environment(RaySettings(address="10.0.0.1:6379"), None, environment)
        assert "RAY_AUTH_MODE" not in environment

    @pytest.mark.parametrize("content", [None, " \n"])
    def test_a_token_file_that_is_missing_or_empty_is_named(self, tmp_path, content):
        path = tmp_path / "token"
        if content is not None:
            path.write_text(content)
        with pytest.raises(RefitError, match=str(path)):
            prepare_environment(RaySettings(address="auto"), None, {"RAY_AUTH_TOKEN_PATH": str(path)})

    def test_a_cluster_on_loopback_is_joined_on_loopback(self, tmp_path):
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:6399")
        assert is_loopback_cluster("127.0.0.1:6379", {})
        assert is_loopback_cluster("localhost:6379", {})
        assert is_loopback_cluster("auto", {"RAY_ADDRESS": "127.0.0.1:6379"})
        assert is_loopback_cluster("auto", {"RAY_TMPDIR": str(tmp_path)})
        assert not is_loopback_cluster("auto", {"RAY_ADDRESS": "10.0.0.1:6379", "RAY_TMPDIR": str(tmp_path)})
        assert not is_loopback_cluster("10.0.0.1:6379", {})


@pytest.fixture
def short_folder():
    """Short enough for sockets, which pytest's own is not."""
    with tempfile.TemporaryDirectory(prefix="bdt-", dir="/tmp") as path:
        yield Path(path)


class TestPrivateFolder:
    def test_folder_and_token_are_for_the_owner_only_and_gone_afterwards(self, short_folder):
        before = os.umask(0)
        try:
            with private_folder(short_folder) as folder:
                assert stat.S_IMODE(folder.stat().st_mode) == 0o700
                token = token_path(folder)
                assert stat.S_IMODE(token.stat().st_mode) == 0o600
                first = token.read_text()
                assert len(first) == 64 and int(first, 16)
            assert not folder.exists()
            with private_folder(short_folder) as folder:
                assert token_path(folder).read_text() != first
        finally:
            os.umask(before)

    def test_the_longest_socket_of_a_session_fits_the_systems_limit(self, short_folder):
        with private_folder(short_folder) as folder:
            name = folder / "r" / "session_2026-11-22_13-36-52_816534_4194304" / "sockets" / "plasma_store"
            room = 107 - len(str(name))
        deep = short_folder / ("x" * (room - 1))
        deep.mkdir()
        with private_folder(deep):
            pass
        too_deep = short_folder / ("x" * room)
        too_deep.mkdir()
        with pytest.raises(RefitError, match="too long"), private_folder(too_deep):
            pass

    def test_folders_of_killed_sessions_are_removed_and_those_in_use_are_not(self, short_folder):
        abandoned = short_folder / "bdr-abandone"
        abandoned.mkdir()
        (abandoned / "lock").touch()
        with private_folder(short_folder) as first:
            assert not abandoned.exists()
            with private_folder(short_folder) as second:
                assert first.exists() and second.exists()

    def test_a_folder_that_is_just_being_made_is_left_alone(self, short_folder):
        young = short_folder / "bdr-youngone"
        young.mkdir()
        held = short_folder / "bdr-heldheld"
        held.mkdir()
        with (held / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with private_folder(short_folder):
                assert young.exists() and held.exists()


class TestSettings:
    @pytest.mark.parametrize(
        ("values", "named"),
        [
            ({"num_workers": 0}, "num_workers=0"),
            ({"cpus_per_worker": -1.0}, "cpus_per_worker"),
            ({"gpus_per_worker": float("nan")}, "gpus_per_worker"),
            ({"retries": -1}, "retries"),
            ({"object_store_mb": 10}, "object_store_mb"),
            ({"placement_s": 0.0}, "placement_s"),
            ({"tp": 0}, "tp=0"),
            ({"tp": 2, "gpus_per_worker": 0.5}, "gpus_per_worker=0.5 must be 0 or 1 with tp=2"),
            ({"tp": 2, "cpus_per_worker": 0.0}, "cpus_per_worker=0 must be above 0"),
            ({"address": "ray://host:1"}, "address"),
            ({"address": "host"}, "address"),
        ],
    )
    def test_settings_that_cannot_work_are_refused_by_name(self, values, named):
        with pytest.raises(RefitError, match=named):
            RaySettings(**values)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("node-1:6379", ("node-1", 6379)),
            ("10.0.0.1:1", ("10.0.0.1", 1)),
            ("[::1]:6379", ("::1", 6379)),
            *((text, None) for text in ("a", ":1", "a:", "a:0", "a:65536", "a:b", "ray://a:1", "::1:6379")),
        ],
    )
    def test_an_address_is_a_host_and_a_port(self, text, expected):
        assert split_address(text) == expected


class TestOutcome:
    def test_the_share_counts_measured_shards_among_all(self):
        outcome = ShardOutcome({0: {4: records(0)}, 2: {4: records(2)}, 3: {}}, {1: "died"}, {"start_s": 1.0})
        assert outcome.complete_share == 0.75

    @pytest.mark.parametrize(
        ("measured", "failed", "seconds", "named"),
        [
            ({1: {}}, {1: "died"}, {}, "shard 1"),
            ({}, {}, {}, "no shards"),
            ({1: {}}, {}, {"stop_s": -1.0}, "stop_s"),
            ({1: {}}, {}, {"stop_s": float("nan")}, "stop_s"),
        ],
    )
    def test_what_no_measurement_comes_to_is_refused(self, measured, failed, seconds, named):
        with pytest.raises(RefitError, match=named):
            ShardOutcome(measured, failed, seconds)


class TestQueue:
    @pytest.mark.parametrize(
        ("shards", "quorum", "expected"),
        [(10, 0.7, 7), (6, 0.75, 5), (4, 0.75, 3), (1, 0.01, 1), (3, 1.0, 3), (100, 0.29, 29)],
    )
    def test_a_quorum_is_rounded_up_and_not_by_floating_point(self, shards, quorum, expected):
        assert required_shards(shards, quorum) == expected

    def test_a_failed_shard_waits_behind_the_others_and_is_given_up_after_its_attempts(self):
        queue = ShardQueue(3, retries=1)
        assert queue.take() == 0
        queue.failed(0, "broke")
        order = [queue.take(), queue.take(), queue.take(), queue.take()]
        assert order == [1, 2, 0, None]
        queue.failed(0, "broke again")
        assert queue.failures == {0: "broke again (after 2 attempts)"}
        queue.measured(1, {4: records(1)})
        assert queue.open
        queue.measured(2, {4: records(2)})
        assert not queue.open

    def test_a_quorum_that_is_missed_names_shards_and_reasons(self):
        queue = ShardQueue(4, retries=0)
        for _ in range(3):
            queue.take()
        queue.failed(0, "died")
        assert not queue.hopeless(0.75)
        queue.failed(2, "died")
        assert queue.hopeless(0.75) and not queue.hopeless(0.5)
        queue.close("too late")
        with pytest.raises(RefitError) as caught:
            queue.check_quorum(0.75)
        assert str(caught.value) == (
            "0 of 4 shards were measured and quorum=0.75 asks for 3: shards 0, 2: died (after the only "
            "attempt); shard 1: running: too late; shard 3: waiting: too late"
        )

    def test_no_module_needs_ray_before_it_is_used(self, repository):
        code = (
            "import sys; sys.modules['ray'] = None; "
            "import bdtrain.refit.outcome, bdtrain.refit.ray_cluster, bdtrain.refit.ray_backend"
        )
        subprocess.run([sys.executable, "-c", code], check=True, cwd=repository)
