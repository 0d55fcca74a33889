"""The answers of a server that are no faults but decide what the caller does next."""

from enum import StrEnum


class Outcome(StrEnum):
    """Which no it is."""

    MISSING = "there is no such object"
    CHANGED = "the object is not, or no longer, the one in the condition"
    OTHER_SIZE = "the object does not have the size, or the range, that was asked for"
    UPLOAD_ENDED = "the multipart upload, or a part of it, is no more"


OUTCOMES: dict[str, Outcome] = {
    **dict.fromkeys(("NoSuchKey", "404", "NotFound"), Outcome.MISSING),
    **dict.fromkeys(("PreconditionFailed", "412"), Outcome.CHANGED),
    **dict.fromkeys(("InvalidRange", "416"), Outcome.OTHER_SIZE),
    **dict.fromkeys(("NoSuchUpload", "InvalidPart", "InvalidPartOrder"), Outcome.UPLOAD_ENDED),
}


class Refused(Exception):  # noqa: N818  an answer, not an error
    """The server said no. `uncertain`: an earlier try of the same request may have had its effect unseen."""

    def __init__(self, outcome: Outcome, *, uncertain: bool = False) -> None:
        super().__init__(outcome.value)
        self.outcome = outcome
        self.uncertain = uncertain
