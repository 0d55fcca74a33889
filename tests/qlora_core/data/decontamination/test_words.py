"""Words of texts: against a plain loop over characters, and in scripts that write words otherwise."""

import unicodedata

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.data.decontamination.kernels import hash_ngrams
from qlora_core.data.decontamination.words import Words, split_words


def words_of(words: Words, text: int) -> list[str]:
    first, last = words.offsets[text], words.offsets[text + 1]
    return [words.text(word, word + 1) for word in range(first, last)]


def slow_words(text: str) -> list[str]:
    """Runs of letters, digits and marks of texts in alphabets that put blanks between words."""
    found, word = [], ""
    for character in unicodedata.normalize("NFKC", text).casefold() + " ":
        kind = unicodedata.category(character)
        if kind == "Cf":
            continue
        if kind[0] in "LN" or (kind[0] == "M" and word):
            word += character
        elif word:
            found.append(word)
            word = ""
    return found


ALPHABETS = st.text(
    st.one_of(st.sampled_from("ab Z9.,'’-_\n\u0301\u00ad½éßهكतिѐ"), st.characters(max_codepoint=0x0DFF)), max_size=40
)


@settings(max_examples=300, deadline=None)
@given(st.lists(ALPHABETS, max_size=4))
def test_words_are_those_of_a_plain_loop(texts: list[str]) -> None:
    words = split_words(texts)
    assert [words_of(words, t) for t in range(len(texts))] == [slow_words(text) for text in texts]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_any_text_has_words_without_a_crash(text: str) -> None:
    words = split_words(["before it", text, "after it"])
    assert words_of(words, 0) == ["before", "it"]
    assert words_of(words, 2) == ["after", "it"]
    assert words_of(split_words([text]), 0) == words_of(words, 1)


def test_scripts_without_blanks_have_a_word_for_every_letter() -> None:
    words = split_words(["你是谁? abc", "กี่"])
    assert words_of(words, 0) == ["你", "是", "谁", "abc"]
    assert words_of(words, 1) == ["กี่"]


def test_lone_surrogates_are_separators() -> None:
    assert words_of(split_words(["one\ud800two"]), 0) == ["one", "two"]


def test_sentences_open_after_marks_but_not_after_a_comma() -> None:
    words = split_words(['He asked, then: "Who are you?" Nobody.'])
    opening = [words.text(w, w + 1) for w in range(words.offsets[1]) if words.opens[w]]
    assert opening == ["he", "who", "nobody"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "ab"]), min_size=4, max_size=12), st.integers(1, 4))
def test_equal_ngrams_and_only_they_have_equal_hashes(sample: list[str], size: int) -> None:
    words = split_words([" ".join(sample)])
    starts = list(range(len(sample) - size + 1))
    hashes = hash_ngrams(words.prefix, np.array(starts), np.full(len(starts), size)).tolist()
    ngrams = [tuple(sample[start : start + size]) for start in starts]
    assert len(set(zip(hashes, ngrams, strict=True))) == len(set(hashes)) == len(set(ngrams))
