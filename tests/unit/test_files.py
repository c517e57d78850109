"""Lines that are appended: whole or not at all, whatever a crash or a full disk left before."""

import errno
import resource

import pytest

from bdtrain.files import append_line


def test_lines_follow_each_other(tmp_path):
    path = tmp_path / "lines.jsonl"
    for text in ("one", "zwölf\ntwo", "three"):
        append_line(path, text, sync=text == "three")
    assert path.read_text(encoding="utf-8") == "one\nzwölf\ntwo\nthree\n"


@pytest.mark.parametrize("torn", ['{"step": 1', "\udcff", "x"])
def test_a_line_that_a_crash_tore_gets_an_end_of_its_own(tmp_path, torn):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"whole\n" + torn.encode(errors="surrogateescape"))
    append_line(path, "next")
    assert path.read_bytes().split(b"\n") == [b"whole", torn.encode(errors="surrogateescape"), b"next", b""]


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("room", [0, 1, 7])
def test_a_disk_that_is_full_in_the_middle_of_a_line_keeps_nothing_of_it(tmp_path, room, sync):
    """A call that writes a part of a line is no error by itself; the next one is."""
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"whole\nto")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            append_line(path, "a line of some length", sync=sync)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    # What the system says, not a guess.
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == b"whole\nto"
    append_line(path, "next")
    assert path.read_bytes() == b"whole\nto\nnext\n"
