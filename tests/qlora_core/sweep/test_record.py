"""What a trial's record takes from a worker's reports, and gives to `sweep.json`."""

from dataclasses import asdict

from qlora_core.sweep.record import TrialRecord
from qlora_core.training.trial import TrialProgress


def progress(step: int, loss: float | None, accuracy: float | None) -> TrialProgress:
    return TrialProgress("t000", step, 8, [], loss, 10 * step, 1.0, "adamw", reward_accuracy=accuracy)


def test_the_reward_accuracy_of_preference_pairs_is_in_the_row_and_its_rungs() -> None:
    record = TrialRecord("t000", {})
    record.add_progress(asdict(progress(4, 0.6, 0.625)))
    record.add_progress(asdict(progress(6, None, None)))  # interrupted: nothing was scored
    assert record.reward_accuracy == 0.625
    record.add_progress(asdict(progress(8, 0.5, 0.75)))
    assert record.row()["reward_accuracy"] == 0.75
    assert record.row()["rungs"] == [
        {"step": 4, "loss": 0.6, "reward_accuracy": 0.625},
        {"step": 8, "loss": 0.5, "reward_accuracy": 0.75},
    ]
    again = TrialRecord("t000", {})
    again.restore(record.stored())
    assert again.reward_accuracy == 0.75


def test_a_trial_on_examples_has_no_reward_accuracy() -> None:
    record = TrialRecord("t000", {})
    record.add_progress(asdict(progress(4, 1.5, None)))
    assert record.row()["reward_accuracy"] is None
    assert record.rungs == [{"step": 4, "loss": 1.5}]
