"""Answers as safe HTML. What a model wrote is text: no tag, script, image or odd address of it reaches the page.

Knows markdown, nothing of pairs or raters.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token


def rendered(text: str) -> str:
    """`text` as HTML: CommonMark with tables; raw HTML is escaped and images stay text (they would tell who looks)."""
    return _parser().render(text)


@cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    parser.disable("image")
    parser.add_render_rule("link_open", _open_link)
    return parser


def _open_link(self: Any, tokens: Sequence[Token], position: int, options: Any, env: Any) -> str:
    tokens[position].attrSet("target", "_blank")
    tokens[position].attrSet("rel", "noopener noreferrer nofollow")
    return self.renderToken(tokens, position, options, env)
