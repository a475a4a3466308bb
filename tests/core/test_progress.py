"""Bars appear only where a display is open, on standard error, and never change what is iterated."""

import itertools

import pytest

from trimtab.core import progress


def test_items_pass_unchanged(capfd):
    assert list(progress.track(range(3), "loop")) == [0, 1, 2]
    with progress.display():
        assert list(progress.track(iter("abc"), "loop")) == ["a", "b", "c"]
        assert list(progress.track([], "loop")) == []
    assert capfd.readouterr().out == ""


def test_a_bar_is_there_while_its_loop_runs():
    with progress.display():
        shown = progress._display.get()
        for i, _ in enumerate(progress.track("abcd", "outer")):
            (task,) = shown.tasks
            assert (task.description, task.total, task.completed) == ("outer", 4, i)
            for _ in progress.track(iter("xy"), "inner", total=2):
                assert [t.description for t in shown.tasks] == ["outer", "inner"]
        assert shown.tasks == []
    assert progress._display.get() is None


def test_a_loop_that_is_left_early_takes_its_bar_away():
    def fails():
        for _ in progress.track("abc", "loop"):
            raise RuntimeError("inside")

    with progress.display():
        with pytest.raises(RuntimeError, match="inside"):
            fails()
        loop = progress.track("abc", "loop")
        next(loop)
        loop.close()
        assert progress._display.get().tasks == []


def test_the_outermost_display_is_used():
    with progress.display():
        outer = progress._display.get()
        with progress.display(), progress.display(enabled=False):
            assert progress._display.get() is outer
    with progress.display(enabled=False):
        assert progress._display.get() is None


def test_a_loop_stops_where_the_time_is_up():
    loop = progress.track(itertools.count(), "loop")
    with progress.limit(0.02):
        assert next(loop) == 0
        with pytest.raises(progress.OutOfTime):
            sum(loop)
    assert list(progress.track(range(3), "loop")) == [0, 1, 2]


def test_an_inner_limit_cannot_give_more_time_than_the_outer():
    with progress.limit(-1):
        with progress.limit(100), pytest.raises(progress.OutOfTime):
            progress.in_time()
        with pytest.raises(progress.OutOfTime):
            progress.in_time()
    progress.in_time()
