"""A progress bar is drawn on a terminal and erased when done; a log gets none of its half-drawn lines."""

from __future__ import annotations

import io
import signal
import sys

import pytest

from bnp_analysis.runtime.progress import Stopped, reporting, stop_requests


class Stream(io.StringIO):
    """Text that says whether it is a terminal."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_for_terminals_and_goes_when_it_is_done(terminal: bool, monkeypatch, capsys) -> None:
    stream = Stream(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    with reporting(True, 3, "work") as update:
        for done in range(1, 4):
            update(done)
    written = stream.getvalue()
    assert ("work" in written) == terminal
    assert written.split("\r")[-1].strip() == ""
    assert capsys.readouterr().out == ""


def test_a_run_that_was_asked_to_stop_ends_where_it_looks() -> None:
    with stop_requests(signal.SIGTERM) as request:
        request.heed()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped, match=r"^SIGTERM$"):
            request.heed()
