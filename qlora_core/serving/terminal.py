"""A conversation in the terminal with one model, or with two side by side on the same questions.

Reads lines, writes to a rich console; works as well where neither is a terminal. Each model keeps its own history.
Knows nothing of HTTP.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_core.errors import ServingError

HELP = """\
/models            the models that can be asked
/adapter NAME      go on with another model, with a history of its own
/compare A B       ask two models side by side; /adapter ends it
/system TEXT       a system message for the conversations from here on; they start anew
/reset             forget what was said
/quit              end (so does the end of input)"""

Turn = dict[str, str]


class Asked(Protocol):
    """What gives answers."""

    def models(self) -> list[str]:
        """Names of models."""
        ...

    def chat(self, model: str, messages: Sequence[Mapping[str, str]], settings: Mapping[str, Any]) -> Iterator[str]:
        """Pieces of an answer."""
        ...


class Conversation:
    """What was said to and by each model, and which of them are being talked to."""

    def __init__(self, client: Asked, console: Console, models: Sequence[str], settings: Mapping[str, Any]) -> None:
        self._client, self._console, self._settings = client, console, dict(settings)
        self._system: str | None = None
        self._known = client.models()
        self._current = [self._checked(name) for name in models] or self._known[:1]
        self.histories: dict[str, list[Turn]] = {}

    @property
    def current(self) -> tuple[str, ...]:
        """The model, or the two, that the next line goes to."""
        return tuple(self._current)

    def run(self, lines: Iterable[str]) -> None:
        """Take lines until /quit or their end; a refused question is told and taken back."""
        for line in lines:
            text = line.strip()
            if text == "/quit":
                return
            if text:
                try:
                    self.take(text)
                except ServingError as error:
                    self._console.print(f"error: {error}", style="red", markup=False, highlight=False)

    def take(self, text: str) -> None:
        """One line: a command, or something to say."""
        if text.startswith("/"):
            self._command(*text.partition(" ")[::2])
        elif len(self._current) == 1:
            self._say(text, self._current[0])
        else:
            self._say_to_both(text)

    def _command(self, name: str, rest: str) -> None:
        commands: dict[str, Callable[[list[str]], object]] = {
            "/models": lambda words: self._tell("\n".join(self._known)),
            "/adapter": lambda words: self._switch(words, 1),
            "/compare": lambda words: self._switch(words, 2),
            "/reset": lambda words: self._forget(),
            "/system": lambda words: self._set_system(rest.strip()),
            "/help": lambda words: self._tell(HELP),
        }
        if name not in commands:
            raise ServingError(f"{name} is no command; there are {', '.join(commands)} and /quit")
        commands[name](rest.split())

    def _switch(self, names: list[str], count: int) -> None:
        if len(names) != count or len(set(names)) != count:
            raise ServingError("name one model: /adapter NAME" if count == 1 else "name two models: /compare A B")
        self._current = [self._checked(name) for name in names]
        self._tell(f"talking to {' and '.join(names)}")

    def _checked(self, name: str) -> str:
        if name not in self._known:
            raise ServingError(f"no model is named {name!r}; there are {', '.join(self._known)}")
        return name

    def _set_system(self, text: str) -> None:
        self._system = text or None
        self._forget()

    def _forget(self) -> None:
        self.histories.clear()
        self._tell("forgotten")

    def _say(self, text: str, model: str) -> None:
        said: list[str] = []
        try:
            with closing(self._asked(model, text)) as pieces:
                for piece in pieces:
                    said.append(piece)
                    self._console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            self._tell(" [stopped]")
            return
        self._console.print()
        self._keep(model, text, "".join(said))

    def _say_to_both(self, text: str) -> None:
        """Both at once, so that one batch answers them; shown when both are whole."""
        found: dict[str, str | ServingError] = {}

        def ask(model: str) -> None:
            try:
                found[model] = "".join(self._asked(model, text))
            except ServingError as error:
                found[model] = error

        threads = [threading.Thread(target=ask, args=(model,), daemon=True) for model in self._current]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        table = Table(expand=True)
        for model in self._current:
            table.add_column(Text(model), ratio=1, overflow="fold")
        table.add_row(*(Text(str(found[model])) for model in self._current))
        self._console.print(table)
        failed = next((answer for answer in found.values() if isinstance(answer, ServingError)), None)
        if failed is not None:
            raise failed
        for model in self._current:
            self._keep(model, text, str(found[model]))

    def _asked(self, model: str, text: str) -> Any:
        opening = [{"role": "system", "content": self._system}] if self._system else []
        messages = [*opening, *self.histories.get(model, []), {"role": "user", "content": text}]
        return self._client.chat(model, messages, self._settings)

    def _keep(self, model: str, question: str, answer: str) -> None:
        self.histories.setdefault(model, []).extend(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        )

    def _tell(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, style="dim")
