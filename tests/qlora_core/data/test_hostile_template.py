"""A chat template is a stranger's code: what it can reach, and how long it may take."""

import builtins
import os
import time
from pathlib import Path

import pytest

from qlora_core.data.chat_template import load_chat_tokenizer
from qlora_core.data.loss_mask import MaskedRow, Refusal, mask_rows
from qlora_core.data.row import Draft, Message, make_row
from qlora_core.errors import MaskError

WORKING = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
# {file}: what they try to write or read. Each stands before a template that works, so nothing else can refuse it.
ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "one class, shown to nobody": "{% set c = ''.__class__ %}",
    "classes by filter": "{{ (''|attr('__class__'))|attr('__mro__') }}",
    "classes by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "classes by format_map": "{{ '{x.__class__.__mro__}'.format_map({'x': ''}) }}",
    "globals of cycler": "{{ cycler.__init__.__globals__.os.popen('touch {file}').read() }}",
    "globals of lipsum": "{{ lipsum.__globals__['os'].system('touch {file}') }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}{{ m._func.__globals__['x'] }}",
    "globals of the error raiser": "{{ raise_exception.__globals__['__builtins__'] }}",
    "globals of the clock": "{{ strftime_now.__globals__['__builtins__']['open']('{file}', 'w') }}",
    "the namespace's insides": "{% set n = namespace(__class__='x') %}{{ n.__init__.__globals__ }}",
    "the template's own context": "{{ self._TemplateReference__context.environment.__init__.__globals__ }}",
    "include": "{% include '{file}' %}",
    "import": "{% import '{file}' as stolen %}{{ stolen }}",
    "extends": "{% extends '{file}' %}",
    "the rows": "{% set _ = messages.append({'role': 'user', 'content': 'x'}) %}{{ messages.clear() }}",
    "a row": "{% set _ = messages[0].update({'content': 'x'}) %}",
}
BOMBS = {
    "long range": "{% for x in range(10**9) %}{% endfor %}",
    "long range without a power": "{% for x in range(1000000000) %}{% endfor %}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "power of variables": "{% set n = 9 %}{{ (n ** n) ** n }}",
    "endless recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "more memory than there is": "{{ 'a' * 99999999999999999 }}",
    "long output": "{% for x in range(100000) %}xxxxxxxxxx{% endfor %}",
}


def load(template: str, tokenizer: Path, folder: Path) -> object:
    file = folder / "chat.jinja"
    file.write_text(template)
    return load_chat_tokenizer(tokenizer, file)


def test_the_template_behind_every_attack_works(plain_tokenizer: Path, tmp_path: Path) -> None:
    load(WORKING, plain_tokenizer, tmp_path)


@pytest.mark.parametrize("case", ESCAPES)
def test_reaching_outside_the_sandbox_is_refused_and_does_nothing(
    case: str, plain_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "touched"
    calls: list[str] = []
    for module, name in ((os, "system"), (os, "popen")):
        monkeypatch.setattr(module, name, lambda *arguments, **_: calls.append(str(arguments)))
    opened: list[str] = []
    really_open = builtins.open

    def watched(file: object, *arguments: object, **named: object) -> object:
        opened.append(str(file))
        return really_open(file, *arguments, **named)  # pyright: ignore[reportCallIssue, reportArgumentType]

    monkeypatch.setattr(builtins, "open", watched)

    with pytest.raises(MaskError, match=r"chat template \(file\).*data\.chat_template"):
        load(ESCAPES[case].replace("{file}", str(target)) + WORKING, plain_tokenizer, tmp_path)

    assert not target.exists()
    assert calls == []
    assert str(target) not in opened


@pytest.mark.parametrize("case", BOMBS)
def test_template_that_would_not_end_is_refused(case: str, plain_tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(MaskError, match=r"chat template \(file\).*data\.chat_template"):
        load(BOMBS[case] + WORKING, plain_tokenizer, tmp_path)


def test_nested_loops_are_stopped_in_time(
    plain_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_core.data.rendering.RENDER_LIMIT_S", 0.3)
    loops = "{% for x in range(100000) %}{% for y in range(100000) %}{% endfor %}{% endfor %}"

    with pytest.raises(MaskError, match=r"did not finish within 0\.3 s; does it loop"):
        load(loops + WORKING, plain_tokenizer, tmp_path)

    # What was interrupted is over: nothing strikes later.
    time.sleep(0.4)
    load(WORKING, plain_tokenizer, tmp_path)


def test_loop_that_waits_for_a_row_to_start_is_stopped_too(
    plain_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops = (
        "{% if messages[0].content == 'now' %}"
        "{% for x in range(100000) %}{% for y in range(100000) %}{% endfor %}{% endfor %}{% endif %}"
    )
    chat = load(loops + WORKING, plain_tokenizer, tmp_path)
    rows = [
        make_row(Draft([Message("user", text), Message("assistant", "b", train=True)]), "rows.jsonl", 1)
        for text in ("later", "now")
    ]
    monkeypatch.setattr("qlora_core.data.rendering.RENDER_LIMIT_S", 0.3)

    with pytest.raises(MaskError, match="did not finish"):
        mask_rows(chat, rows)  # pyright: ignore[reportArgumentType]


def test_row_on_which_the_template_writes_without_measure_is_refused_alone(
    plain_tokenizer: Path, tmp_path: Path
) -> None:
    flood = "{% if messages[0].content == 'now' %}{% for x in range(90000) %}xxxxx{% endfor %}{% endif %}"
    chat = load(flood + WORKING, plain_tokenizer, tmp_path)
    rows = [
        make_row(Draft([Message("user", text), Message("assistant", "b", train=True)]), "rows.jsonl", 1)
        for text in ("later", "now")
    ]

    fine, refused = mask_rows(chat, rows)  # pyright: ignore[reportArgumentType]

    assert isinstance(fine, MaskedRow)
    assert isinstance(refused, Refusal)
    assert refused.rule == "template_refused"
    assert "writes 450" in refused.detail
