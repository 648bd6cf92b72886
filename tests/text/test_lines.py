"""One reader of lines for files of data and for what arrives through a pipe."""

import io

import pytest

from minllama.common.errors import InputError
from minllama.text.lines import lines_of, read_lines


class Reads(io.RawIOBase):
    """A file with a list of reads."""

    def __init__(self, *reads: bytes):
        self.reads = list(reads)

    def read(self, size: int = -1) -> bytes:
        return self.reads.pop(0) if self.reads else b""


def test_lines_are_joined_from_reads_whatever_ends_them():
    reads = Reads(
        b"a\nb", b"c", b"d\n\ne\r\n", b"f\r", b"\ng\rh \xc2\x85", b"\x0bi\xe2", b"\x80\xa8j"
    )
    joined = [["a"], ["bcd", "", "e"], ["f", "g"], ["h \x85\x0bi\u2028j"]]
    assert list(read_lines(reads, "x")) == joined
    assert list(read_lines(Reads(), "x")) == []


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_files_lines_are_the_same_with_every_line_end(tmp_path, end):
    path = tmp_path / "x.txt"
    path.write_bytes(f"\ufeffa good film{end}{end} naïve ".encode())
    assert lines_of(path) == ["a good film", "", " naïve "]


def test_the_line_that_is_not_utf8_is_named():
    for reads in (Reads(b"a\n\nb\xff"), Reads(b"a\n\n", b"b", b"c\xe2")):
        with pytest.raises(InputError, match="x, line 3: not UTF-8"):
            list(read_lines(reads, "x"))
