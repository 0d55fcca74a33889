"""The data of a trainer by objective: what batches are made of, and what trials are scored on.

Knows nothing of steps, checkpoints or settings other than the objective's own.
"""

from collections.abc import Sequence

from qlora_core.data.dataset import TokenRow
from qlora_core.errors import TrainingError
from qlora_core.training.examples import Examples, PairExamples, TokenExamples
from qlora_core.training.pack.pack import Pack
from qlora_core.training.preference import preference_rows
from qlora_core.training.scoring import ValidationPairs, validation_loss
from qlora_core.training.trial import TrialProgress
from qlora_core.training.trial_run import TrialRun


class Objectives:
    """`train` and `validation` are rows, `sequences` the training rows as batches take them: packed, or one by one."""

    def __init__(
        self, pack: Pack, train: Sequence[TokenRow], sequences: Sequence[TokenRow], validation: Sequence[TokenRow]
    ) -> None:
        self._pack = pack
        self._train = train
        self._sequences = sequences
        self._validation = validation
        self._examples: dict[str, Examples] = {}
        self._validation_pairs: ValidationPairs | None = None

    def examples(self, objective: str) -> Examples:
        """What batches are made of. Raises TrainingError for dpo where training or validation rows hold no pair."""
        if objective not in self._examples:
            if objective == "dpo":
                self._validation_pairs = ValidationPairs(preference_rows(self._validation, "validation"))
                self._examples[objective] = PairExamples(preference_rows(self._train, "training"), self._pack)
            else:
                self._examples[objective] = TokenExamples(self._sequences)
        return self._examples[objective]

    def score(self, run: TrialRun) -> TrialProgress:
        """Where the run stands, with its validation loss, or the error that there is none."""
        trial, step = run.trial, run.counters.step
        try:
            if trial.params.objective == "sft" or self._validation_pairs is None:
                return run.progress(validation_loss(self._pack, run.slot, self._validation, trial.id, step))
            loss, accuracy = self._validation_pairs.score(self._pack, run.slot, trial.params, trial.id, step)
        except TrainingError as error:
            return run.progress(None, str(error))
        return run.progress(loss, reward_accuracy=accuracy)
