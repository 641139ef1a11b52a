"""Progress bars on a screen and in a file."""

import io
import sys

import pytest

from openmm_bg.progress import FILE_SECONDS, progress_bar


class Stream(io.StringIO):
    def __init__(self, screen):
        super().__init__()
        self.screen = screen

    def isatty(self):
        return self.screen


@pytest.mark.parametrize(
    ("screen", "notebook", "seconds"), [(True, False, 0.5), (False, True, 0.5), (False, False, FILE_SECONDS)]
)
def test_a_file_gets_a_state_now_and_then(monkeypatch, screen, notebook, seconds):
    monkeypatch.setattr(sys, "stderr", Stream(screen))
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    bar = progress_bar(range(3), shown=True, mininterval=0.5)
    bar.close()
    if notebook:  # only the name counts; tqdm has chosen its own class before
        monkeypatch.setitem(sys.modules, "ipykernel", io)
        bar = progress_bar(range(3), shown=True, mininterval=0.5)
        bar.close()
    assert bar.mininterval == seconds


def test_a_long_loop_leaves_few_states_in_a_file(monkeypatch):
    for screen, fewest, most in ((False, 1, 3), (True, 20, 10_000)):
        monkeypatch.setattr(sys, "stderr", stream := Stream(screen))
        for _ in progress_bar(range(2000), shown=True, mininterval=0.0, miniters=1):
            pass
        assert fewest <= stream.getvalue().count("\r") <= most


def test_a_bar_that_is_not_shown_writes_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := Stream(True))
    assert list(progress_bar(range(5), shown=False)) == list(range(5))
    assert stream.getvalue() == ""
