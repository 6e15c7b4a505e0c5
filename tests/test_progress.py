"""Progress: what is called, what is shown, and what is not."""

import io
import sys
import time
from contextlib import redirect_stderr

import pytest

from favor_np import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def count(wanted, stage="counting", first=1):
    with progress.reporting(wanted) as report:
        for done in range(first, 11):
            report(stage, done, 10)


def test_what_is_given_is_called():
    seen = []
    count(lambda *step: seen.append(step), first=9)
    assert seen == [("counting", 9, 10), ("counting", 10, 10)]


def test_a_short_stage_is_not_shown():
    with redirect_stderr(Terminal()) as stream:
        count(None)
    assert stream.getvalue() == ""


def test_a_stage_of_one_long_call_is_shown_while_it_lasts():
    with redirect_stderr(Terminal()) as stream:
        count(None, "one long call", first=0)
    *_, shown, last = stream.getvalue().removesuffix("\r").split("\r")
    assert shown.startswith("one long call:   0%")
    assert last.strip() == ""  # what is over is removed


def test_what_takes_over_two_seconds_is_shown():
    with redirect_stderr(Terminal()) as stream, progress.reporting(None) as report:
        time.sleep(progress.PATIENCE)
        report("slow", 3, 10)
        assert "slow:  30%" in stream.getvalue()
        report("next", 5, 10)  # has two seconds of its own
        assert "next" not in stream.getvalue()


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_what_was_asked_for_stays(kind):
    with redirect_stderr(kind()) as stream, progress.reporting(True) as report:
        for stage in ("one", "two"):
            for done in (5, 10):
                report(stage, done, 10)
    one, two = (line.rpartition("\r")[2] for line in stream.getvalue().split("\n")[:2])
    assert one.startswith("one: 100%")
    assert two.startswith("two: 100%")


@pytest.mark.parametrize(
    ("wanted", "stream"), [(None, io.StringIO()), (None, None), (False, Terminal())]
)
def test_nothing_is_shown_where_nobody_looks(wanted, stream):
    with redirect_stderr(stream):
        count(wanted, first=0)
    assert stream is None or stream.getvalue() == ""


def test_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with redirect_stderr(Terminal()) as stream:
        count(None, first=0)
    assert stream.getvalue() == ""
    with pytest.raises(ImportError, match=r"tqdm: pip install 'favor_np\[progress\]'"):
        progress.reporting(True)


@pytest.mark.parametrize("wrong", [1, "yes", []])
def test_what_is_no_way_to_report_is_refused(wrong):
    with pytest.raises(TypeError, match="progress must be True or False"):
        progress.reporting(wrong)
