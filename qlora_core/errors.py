"""Every error the project raises on purpose, as one tree.

    QloraError
    ├── ConfigError      (ValueError)    the pipeline config or a command's arguments; exit code 2
    ├── DataError        (ValueError)    dataset files, rows, splits
    │   └── MaskError                    a chat template whose assistant tokens cannot be told apart
    ├── ModelError       (ValueError)    base checkpoints, tokenizers, adapters
    ├── TrainingError    (RuntimeError)  nothing to train on, a checkpoint that does not fit
    │   └── NumericError                 a loss or gradient that is not finite, or jumped
    ├── SweepError       (RuntimeError)  no trial finished, no cluster, an impossible search space
    ├── EvaluationError  (ValueError)    verdict and label files, statistics that have no answer
    ├── JudgeError       (RuntimeError)  the judge's endpoint, its answers, its budget
    │   └── JudgeUnavailableError        it may answer later
    ├── ServingError     (RuntimeError)  the endpoint that answers with adapters, in serving or in asking it
    │   ├── QueueFullError               as many requests wait as may
    │   └── EngineStoppedError           nobody answers any more
    ├── StoreError       (OSError)       the artifact store cannot be read or written
    │   ├── CorruptArtifactError         bytes that do not match their manifest
    │   ├── LeaseLostError               another producer took over what this one was building
    │   └── StoreUnavailableError        its server may answer later
    └── RegistryError    (RuntimeError)  MLflow, versions, aliases
        └── RegistryUnavailableError     its server or database may answer later

A message names the value, what is allowed, and the next step. To add one: inherit from the root and from the standard
library's error it replaces, take one positional message (so that it survives the way between Ray processes), draw it
above.
"""


class QloraError(Exception):
    """Root of the tree. `exit_code` is what the command line ends with; `passing` faults are worth another try."""

    exit_code = 1
    passing = False


class ConfigError(QloraError, ValueError):
    """The pipeline config or a command's arguments are wrong."""

    exit_code = 2


class DataError(QloraError, ValueError):
    """A dataset file or what is left of it cannot be used."""


class MaskError(DataError):
    """The loss mask of a chat template cannot be proven to hold the assistant's tokens and nothing else."""


class ModelError(QloraError, ValueError):
    """A base checkpoint, tokenizer or adapter cannot be used."""


class TrainingError(QloraError, RuntimeError):
    """A training run cannot go on."""


class NumericError(TrainingError):
    """A step of training whose loss or gradient is not finite or jumped: it was not taken."""


class SweepError(QloraError, RuntimeError):
    """A sweep cannot start or has no result."""


class EvaluationError(QloraError, ValueError):
    """An evaluation's input or statistic is unusable."""


class JudgeError(QloraError, RuntimeError):
    """The judge could not be asked."""


class JudgeUnavailableError(JudgeError):
    """The judge's endpoint is away, overloaded or out of quota."""

    passing = True


class ServingError(QloraError, RuntimeError):
    """The endpoint cannot be reached, or refuses what was asked."""


class QueueFullError(ServingError):
    """As many requests wait for an answer as may."""

    passing = True


class EngineStoppedError(ServingError):
    """The engine has ended, or is about to."""


class StoreError(QloraError, OSError):
    """The artifact store cannot be read or written."""


class CorruptArtifactError(StoreError):
    """Stored bytes do not match their manifest."""


class LeaseLostError(StoreError):
    """A producer was silent for so long that another took over its lease."""


class StoreUnavailableError(StoreError):
    """The store's server does not answer, or answers with a fault of its own."""

    passing = True


class RegistryError(QloraError, RuntimeError):
    """The model registry refused, or holds something other than what was asked for."""


class RegistryUnavailableError(RegistryError):
    """MLflow's server or database does not answer, or is busy."""

    passing = True
