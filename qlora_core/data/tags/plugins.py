"""Scores by functions of the user's own, such as toxicity. Knows nothing of what they measure.

A plug-in `module:function` takes a list of texts (one a row: its turns, a blank line between them) and returns as many
scores, float or None. Its tag has the function's name.
"""

import importlib
import logging
import math
import re
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import pyarrow as pa

from qlora_core.data.row import Row
from qlora_core.data.tags.tagger import Tagged, fingerprint_of, tagged
from qlora_core.digest import digest_file
from qlora_core.errors import ConfigError

logger = logging.getLogger(__name__)

_VERSION = 1
_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_SETTING = "data.tags.plugins"


class PluginTagger:
    """One column of float64, named like the function.

    The fingerprint covers the file of the function's module, so that an edited plug-in scores anew; what that module
    imports, or a model it loads, it does not: give the function an attribute `version` and change that.

    Raises ConfigError, when it is made, for a name that is not `module:function`, and for what cannot be imported or
    called; when it tags, for an answer that is no list of as many scores. A text on which the function raises, or whose
    score is NaN or infinite, gets null.
    """

    cached = True

    def __init__(self, spec: str) -> None:
        self._spec = spec
        self._function = _load(spec)
        self.name = spec.rpartition(":")[2]
        self.schema = pa.schema([(self.name, pa.float64())])
        module_file = getattr(importlib.import_module(spec.partition(":")[0]), "__file__", None)
        settings = {
            "spec": spec,
            "source": digest_file(Path(module_file)) if module_file else None,
            "version": str(getattr(self._function, "version", "")),
        }
        self.fingerprint = fingerprint_of("plugin", _VERSION, self.schema, settings)

    def tag(self, rows: Sequence[Row]) -> Tagged:
        """The scores of a batch: in one call, or text by text where that call raises."""
        texts = ["\n\n".join(message.content for message in row.messages) for row in rows]
        raised, scores = self._ask(texts) if texts else (False, [])
        if raised:
            # One text may spoil the batch; the others keep their scores.
            scores = [answer[0] if (answer := self._ask([text])[1]) else None for text in texts]
            logger.warning("%s %s: a batch of %d texts was scored one by one", _SETTING, self._spec, len(texts))
        finite = [score if score is not None and math.isfinite(score) else None for score in scores]
        # None is an answer, "not measurable"; NaN is none.
        failed = [
            (raised and score is None) or (score is not None and good is None)
            for score, good in zip(scores, finite, strict=True)
        ]
        return tagged(self.schema, [finite], failed)

    def _ask(self, texts: list[str]) -> tuple[bool, list[float | None]]:
        """Whether the function raised, and its checked scores."""
        try:
            answer = self._function(list(texts))
        except Exception as error:  # noqa: BLE001 - whatever foreign code raises, it costs its texts their scores only
            # The type alone: the message may quote the text.
            logger.debug("%s %s raised %s", _SETTING, self._spec, type(error).__name__)
            return True, []
        if isinstance(answer, str | bytes | dict) or not hasattr(answer, "__len__") or len(answer) != len(texts):
            got = f"{len(answer)} of them" if hasattr(answer, "__len__") else "no list"
            raise ConfigError(
                f"{_SETTING}: {self._spec} was given {len(texts)} texts and returned {type(answer).__name__} ({got}); "
                "it must return a list of as many scores, float or None"
            )
        wrong = [score for score in answer if not _is_score(score)]
        if wrong:
            raise ConfigError(
                f"{_SETTING}: {self._spec} returned a score of type {type(wrong[0]).__name__}; it must be float or None"
            )
        return False, [None if score is None else float(score) for score in answer]


def _is_score(score: object) -> bool:
    return score is None or (isinstance(score, Real) and not isinstance(score, bool))


def _load(spec: str) -> Callable[[list[str]], Any]:
    if not _NAME.fullmatch(spec):
        raise ConfigError(f"{_SETTING}: {spec!r} is not of the form module:function, such as my_scores:toxicity")
    module_name, _, function_name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"{_SETTING}: module {module_name!r} of {spec!r} cannot be imported: {type(error).__name__}: {error}; "
            "install it, or set PYTHONPATH to the folder that holds it"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        there = sorted(name for name, value in vars(module).items() if callable(value) and not name.startswith("_"))
        raise ConfigError(
            f"{_SETTING}: module {module_name!r} has no function {function_name!r}; it has {', '.join(there) or 'none'}"
        )
    return function
