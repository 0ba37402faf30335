"""Progress: lines for pipes, bars for terminals, and a terminal left as it was."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from fedlora.rounds import Failure, RoundRecord
from simulations.progress import Lines, LiveBars, Progress, for_terminal

SHOW_CURSOR = "\x1b[?25h"
HIDE_CURSOR = "\x1b[?25l"


def finished(number: int, **values: object) -> RoundRecord:
    """A merged round with plain numbers."""
    plain = {"merged": True, "loss": 0.5, "accuracy": 0.75, "seconds": 2.0}
    return RoundRecord(number, **{**plain, **values})  # test values


def drive(progress: Progress) -> None:
    """One run of one round, one of whose clients fails."""
    progress.run_started("fedavg, seed 0", 1)
    progress.round_done(finished(0, merged=False))
    progress.stage_started(1, "train", 2)
    progress.replied(failed=False)
    progress.replied(failed=True)
    progress.stage_started(1, "evaluate", 2)
    failure = Failure(client=1, stage="train", reason="loss is not finite")
    progress.round_done(finished(1, aggregation_error=0.0125, failures=(failure,)))
    progress.run_done()


def test_lines_tell_each_round_and_name_failures() -> None:
    target = io.StringIO()
    with Lines(Console(file=target)) as progress:
        drive(progress)
    assert target.getvalue().splitlines() == [
        "fedavg, seed 0: round 0/1  loss 0.500  accuracy 0.750  2.0 s",
        "fedavg, seed 0: round 1/1  loss 0.500  accuracy 0.750  aggregation error 0.013  2.0 s",
        "fedavg, seed 0: round 1: client 1 did not count (train): loss is not finite",
    ]


def test_a_round_that_was_not_merged_says_so() -> None:
    target = io.StringIO()
    with Lines(Console(file=target)) as progress:
        progress.run_started("x", 1)
        progress.round_done(finished(1, merged=False, accuracy=None, perplexity=9.0))
    assert target.getvalue() == "x: round 1/1  loss 0.500  perplexity 9.000  not merged  2.0 s\n"


def test_bars_show_clients_and_end_in_one_line() -> None:
    target = io.StringIO()
    with LiveBars(Console(file=target, force_terminal=True, width=100)) as progress:
        drive(progress)
    text = target.getvalue()
    assert "client 1 did not count (train): loss is not finite" in text
    assert "fedavg, seed 0: 1/1 rounds" in text
    assert text.rindex(SHOW_CURSOR) > text.rindex(HIDE_CURSOR)


def test_bars_serve_one_run_after_another() -> None:
    target = io.StringIO()
    with LiveBars(Console(file=target, force_terminal=True, width=100)) as progress:
        drive(progress)
        drive(progress)
    assert target.getvalue().count("1/1 rounds in") == 2


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_bars_close_when_a_run_is_cut_short(error: type[BaseException]) -> None:
    target = io.StringIO()
    console = Console(file=target, force_terminal=True, width=100)
    with pytest.raises(error), LiveBars(console) as progress:
        progress.run_started("x", 3)
        progress.stage_started(1, "train", 4)
        raise error
    assert target.getvalue().rindex(SHOW_CURSOR) > target.getvalue().rindex(HIDE_CURSOR)


def test_a_pipe_gets_lines_and_quiet_gets_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(for_terminal(), Lines)
    with for_terminal(quiet=True) as progress:
        drive(progress)
        progress.saving_to(Path("somewhere"))
    assert progress.folder == Path("somewhere")
    assert capsys.readouterr() == ("", "")
