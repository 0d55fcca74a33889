"""The tokenizer with the chat template that training and evaluation share, and the stop token that template writes.

Templates run in transformers' sandbox and are treated as black boxes: what they do is measured on their output. This
module knows nothing of datasets; `loss_mask` proves the mask row by row.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qlora_core.data.rendering import NEXT_STEP, Origin, check_code, render, render_all
from qlora_core.data.row import Message
from qlora_core.data.tokenizer_proof import check_text
from qlora_core.errors import DataError, MaskError, ModelError

logger = logging.getLogger(__name__)

# For base tokenizers that bring no template. It needs nothing of a tokenizer but a stop token.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '### Assistant:\\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}"
    "{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] + '\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)

PROBE = (
    Message("user", "Which comes first, alpha or Beta?"),
    Message("assistant", "Alpha comes first; then comes Beta.", train=True),
)


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer whose `chat_template` is the one in use.

    `origin` says where the template came from; `stop_token` is what it writes after an assistant's text. `bos_token_id`
    is what every row must open with, exactly once; None where the tokenizer adds none by itself. `named_bos_id` is the
    tokenizer's BOS in either case. `bos_added` says that the template lacked it and was given it. Padding is nobody's
    business here: rows are padded by position, so that a pad token equal to the stop token hides no label.
    """

    tokenizer: PreTrainedTokenizerBase
    origin: Origin
    stop_token: str
    stop_token_id: int
    bos_token_id: int | None
    named_bos_id: int | None
    bos_added: bool
    special_text: re.Pattern[str]

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as text. Raises MaskError with the template's own complaint if it refuses."""
        return render(self.tokenizer, messages, self.origin, add_generation_prompt=add_generation_prompt)

    def render_all(
        self, conversations: Sequence[Sequence[Message]], *, add_generation_prompt: bool = False
    ) -> list[str | MaskError]:
        """Each conversation as text, or the template's complaint; in the order given."""
        return render_all(self.tokenizer, conversations, self.origin, add_generation_prompt=add_generation_prompt)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered texts, uncut and unpadded: the template writes the BOS, so none is added here."""
        if not texts:
            return []
        if isinstance(self.tokenizer, PreTrainedTokenizerFast):
            # The same as calling the tokenizer without its offsets, which take a third of the time.
            backend = self.tokenizer.backend_tokenizer
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = bool(self.tokenizer.split_special_tokens)
            return [one.ids for one in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return list(encoded["input_ids"])

    def decode(self, ids: Sequence[list[int]]) -> list[str]:
        """Texts of token ids, special tokens shown, nothing tidied."""
        if not ids:
            return []
        if isinstance(self.tokenizer, PreTrainedTokenizerFast):
            # The same as batch_decode without its look at every single id, which takes longer than decoding.
            return self.tokenizer.backend_tokenizer.decode_batch(list(ids), skip_special_tokens=False)
        return self.tokenizer.batch_decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def load_chat_tokenizer(folder: Path, chat_template_file: Path | None = None) -> ChatTokenizer:
    """The tokenizer in `folder` with its chat template: the file if given, else its own, else `PLAIN_TEMPLATE`.

    Only local files are read and no code from the folder is run. Raises ModelError for a folder without a usable
    tokenizer, DataError for an unreadable template file, MaskError for a template whose assistant text and stop token
    cannot be told apart from the rest, and for a tokenizer that loses characters of what the template writes.
    """
    tokenizer = _load_tokenizer(folder)
    template, origin = _choose_template(tokenizer, chat_template_file)
    check_code(template, origin)
    tokenizer.chat_template = template
    bos_token_id = _own_bos(tokenizer)
    bos_added = bos_token_id is not None and str(tokenizer.bos_token) not in render(tokenizer, PROBE, origin)
    if bos_added:
        tokenizer.chat_template = "{{ bos_token }}" + template
        if origin != "plain default":
            logger.warning("the chat template (%s) writes no %s; it is written first now", origin, tokenizer.bos_token)
    stop_token = _find_stop_token(tokenizer, origin)
    logger.info("chat template: %s; stop token %s", origin, stop_token)
    named_bos = _named_token(tokenizer, "bos_token")
    chat = ChatTokenizer(
        tokenizer=tokenizer,
        origin=origin,
        stop_token=stop_token,
        stop_token_id=tokenizer.get_vocab()[stop_token],
        bos_token_id=bos_token_id,
        named_bos_id=None if named_bos is None else tokenizer.get_vocab().get(named_bos),
        bos_added=bos_added,
        special_text=_special_text(tokenizer, stop_token),
    )
    check_text(chat, chat.render(PROBE), f"what the chat template ({origin}) writes")
    return chat


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not folder.is_dir():
        raise ModelError(f"tokenizer folder {str(folder)!r} does not exist; base.model must name a checkpoint folder")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust reader of tokenizer.json raises bare Exception on damage
        raise ModelError(
            f"the tokenizer in {str(folder)!r} cannot be loaded: {error}. The folder needs tokenizer.json and "
            "tokenizer_config.json beside the weights; fetch the checkpoint again"
        ) from error


def _choose_template(tokenizer: PreTrainedTokenizerBase, file: Path | None) -> tuple[str, Origin]:
    if file is not None:
        return _read_template(file), "file"
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if own:
        return str(own), "tokenizer"
    if tokenizer.eos_token is None:
        raise MaskError(
            "the base tokenizer has neither a chat template nor an eos token, so an answer has no end to learn. Add an "
            "eos token to its tokenizer_config.json, or name a Jinja file in data.chat_template"
        )
    logger.warning(
        "the base tokenizer has no chat template; the plain default is used ('### User:' / '### Assistant:' lines, %s "
        "after each answer) and saved with the tokenizer",
        tokenizer.eos_token,
    )
    return PLAIN_TEMPLATE, "plain default"


def _read_template(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"chat template file {str(file)!r} cannot be read: {error}. data.chat_template names a Jinja file in "
            "UTF-8; relative paths start at the folder of the config file"
        ) from error
    if not text.strip():
        raise DataError(f"chat template file {str(file)!r} is empty. {NEXT_STEP}")
    return text


def _own_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS id if the tokenizer opens a plain text with it by itself, else None."""
    bos = _named_token(tokenizer, "bos_token")
    if bos is None:
        return None
    ids = list(tokenizer("a", verbose=False)["input_ids"])
    bos_id = tokenizer.get_vocab()[bos]
    return bos_id if ids[:1] == [bos_id] else None


def _named_token(
    tokenizer: PreTrainedTokenizerBase, name: Literal["bos_token", "eos_token", "pad_token", "unk_token"]
) -> str | None:
    token = getattr(tokenizer, name)
    return None if token is None else str(token)


def _find_stop_token(tokenizer: PreTrainedTokenizerBase, origin: Origin) -> str:
    text = render(tokenizer, PROBE, origin)
    prompt = render(tokenizer, PROBE[:1], origin, add_generation_prompt=True)
    answer = PROBE[1].content
    sample = f"Rendered sample: {text!r}"
    where = f"the chat template ({origin}) cannot be masked"
    if not text.startswith(prompt):
        raise MaskError(
            f"{where}: what add_generation_prompt writes, {prompt!r}, does not open the row. {sample}. {NEXT_STEP}"
        )
    written = text[len(prompt) :].lstrip()
    if not written.startswith(answer):
        raise MaskError(
            f"{where}: the assistant's text {answer!r} does not follow the generation prompt unchanged. "
            f"{sample}. {NEXT_STEP}"
        )
    after = written[len(answer) :].lstrip()
    added = (token.content for token in tokenizer.added_tokens_decoder.values())
    known = {*added, *tokenizer.all_special_tokens}
    not_a_stop = {_named_token(tokenizer, name) for name in ("bos_token", "pad_token", "unk_token")}
    not_a_stop.discard(_named_token(tokenizer, "eos_token"))
    stops = [token for token in known - not_a_stop if token.strip() and after.startswith(token)]
    if not stops:
        raise MaskError(f"{where}: no stop token follows the assistant's text. {sample}. {NEXT_STEP}")
    return max(stops, key=len)


def _special_text(tokenizer: PreTrainedTokenizerBase, stop_token: str) -> re.Pattern[str]:
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= {*tokenizer.all_special_tokens, stop_token}
    longest_first = sorted((token for token in special if token.strip()), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)))
