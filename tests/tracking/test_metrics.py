"""metrics.jsonl: rows on disk, listeners that fail, rows dropped on resume."""

import json
import logging

import pytest

from train_then_compress.tracking.metrics import MetricsLog


def row(stage, steps, **values):
    return {"stage": stage, "split": "train", "steps": steps, **values}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_is_on_disk_before_the_listeners_hear_of_it(tmp_path):
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    heard = []
    log.listeners.append(lambda new: heard.append((new, lines(log.path)[-1])))
    log.write(row("pretrain-1", 1, loss=2.5))
    log.write(row("pretrain-1", 2, loss=2.25))
    assert [new["loss"] for new, _ in heard] == [2.5, 2.25]
    assert all(new == written for new, written in heard)


class FailingTracker:
    """Fails from its second row on."""

    calls = 0

    def __call__(self, new):
        self.calls += 1
        if self.calls > 1:
            raise ConnectionError("no route to host")


def test_a_listener_that_raises_is_removed_with_one_warning(tmp_path, caplog):
    log, tracker, heard = MetricsLog(tmp_path / "metrics.jsonl"), FailingTracker(), []
    log.listeners += [tracker, heard.append]
    with caplog.at_level(logging.WARNING):
        for step in range(5):
            log.write(row("pretrain-1", step))
    assert tracker.calls == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"FailingTracker no longer follows {log.path}: ConnectionError: no route to host"
    ]
    assert [new["steps"] for new in heard] == list(range(5))
    assert len(lines(log.path)) == 5


def test_a_keyboard_interrupt_in_a_listener_is_not_swallowed(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")

    def interrupted(new):
        raise KeyboardInterrupt

    log.listeners.append(interrupted)
    with pytest.raises(KeyboardInterrupt):
        log.write(row("pretrain-1", 1))


@pytest.mark.parametrize(
    ("step", "kept"), [(20, [("a", 10), ("b", 10), ("a", 20), ("b", 30)]), (-1, [("b", 10), ("b", 30)])]
)
def test_drop_after_removes_only_the_later_rows_of_the_stage(tmp_path, step, kept):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for stage, steps in [("a", 10), ("b", 10), ("a", 20), ("a", 21), ("b", 30)]:
        log.write(row(stage, steps))
    with log.path.open("a") as file:
        file.write('{"stage": "a", "ste')  # torn by a crash
    log.drop_after("a", step)
    assert [(new["stage"], new["steps"]) for new in lines(log.path)] == kept
    log.write(row("a", 22))
    assert lines(log.path)[-1] == row("a", 22)


def test_drop_after_without_a_file_makes_none(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.drop_after("a", 3)
    assert not log.path.exists()
