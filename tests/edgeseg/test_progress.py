"""Progress where there is no terminal: a line now and then, with the time left."""

from __future__ import annotations

import pytest

from edgeseg.progress import progress


@pytest.mark.parametrize(
    ("seconds", "done", "total", "line"),
    [
        (9.0, 1, 10, ""),
        (11.0, 2, 10, "counting: 2 of 10, about 44 s left\n"),
        (60.0, 1, 4, "counting: 1 of 4, about 3 min left\n"),
        (30.0, 10, 10, "counting: 10 of 10, about 1 s left\n"),
        (30.0, 7, 0, "counting: 7\n"),
        (30.0, 0, 5, "counting: 0 of 5\n"),
    ],
)
def test_plain_lines(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seconds: float,
    done: int,
    total: int,
    line: str,
) -> None:
    now = [100.0]
    monkeypatch.setattr("edgeseg.progress.time.monotonic", lambda: now[0])
    with progress("counting") as update:
        now[0] += seconds
        update(done, total)
    assert capsys.readouterr().err == line
