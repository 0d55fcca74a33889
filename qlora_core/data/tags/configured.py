"""The taggers that a config asks for."""

from collections.abc import Sequence

from qlora_core.config.curation import TagsConfig
from qlora_core.data.tags.language import LanguageTagger
from qlora_core.data.tags.licence import LicenceTagger
from qlora_core.data.tags.personal_data import PersonalDataTagger
from qlora_core.data.tags.plugins import PluginTagger
from qlora_core.data.tags.tagger import Tagger
from qlora_core.data.tags.text_marks import TextMarksTagger


def configured_taggers(config: TagsConfig, special_texts: Sequence[str]) -> list[Tagger]:
    """Licence and text marks always, the others as `config` says; `special_texts` are the tokenizer's special tokens.

    Scores under the base model need it, so their tagger (`model_scores`) is made by whoever has loaded it.
    Raises ConfigError for unknown languages, patterns that are none, and plug-ins that cannot be used.
    """
    taggers: list[Tagger] = [LicenceTagger(), TextMarksTagger(special_texts)]
    if config.language:
        taggers.append(LanguageTagger(config.languages, config.min_language_letters, config.min_language_confidence))
    if config.personal_data:
        taggers.append(PersonalDataTagger(config.allow))
    return [*taggers, *(PluginTagger(spec) for spec in config.plugins)]
