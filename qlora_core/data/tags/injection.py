"""Text that a chat template would take for a turn's border. Knows no tokenizer: its special tokens are passed in.

A row that holds such text would train, or let a prompt forge, turns that nobody spoke.
"""

import re
from collections.abc import Sequence

# As text: ChatML, Llama 2 and 3, Llama 4, Gemma, Mistral, Phi, Command R, DeepSeek, Harmony. `<s>` and `</s>` are HTML
# for struck-out text and count only where they are the tokenizer's own.
TEMPLATE_MARKERS = (
    "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|endoftext|>", "<|endofprompt|>",
    "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>",
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
    "<|python_tag|>", "<|header_start|>", "<|header_end|>", "<|eot|>",
    "<start_of_turn>", "<end_of_turn>",
    "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]",
    "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
    "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>",
    "<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>",
    "<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|call|>",
)  # fmt: skip


class MarkerFinder:
    """Whether a text holds one of the markers; `more` are the tokenizer's own special tokens."""

    def __init__(self, more: Sequence[str] = ()) -> None:
        self.markers = tuple(sorted({*TEMPLATE_MARKERS, *(marker for marker in more if marker.strip())}))
        # By first character, of which there are two or three: a text is skimmed for each.
        openings = sorted({marker[0] for marker in self.markers})
        self._patterns = [(opening, self._pattern(opening)) for opening in openings]

    def found_in(self, text: str) -> bool:
        """Whether a marker stands in the text, its case as written."""
        return any(opening in text and pattern.search(text) for opening, pattern in self._patterns)

    def _pattern(self, opening: str) -> re.Pattern[str]:
        rests = [re.escape(marker[1:]) for marker in self.markers if marker[0] == opening]
        return re.compile(f"{re.escape(opening)}(?:{'|'.join(rests)})")
