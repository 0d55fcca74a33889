import random

from qlora_core.demo.tasks import make_tasks
from qlora_core.demo.text import pretraining_documents
from qlora_core.demo.words import with_article


def test_documents_depend_on_the_seed_alone() -> None:
    assert pretraining_documents(50, random.Random(4)) == pretraining_documents(50, random.Random(4))
    assert pretraining_documents(50, random.Random(4)) != pretraining_documents(50, random.Random(5))
    assert pretraining_documents(0, random.Random(4)) == []


def test_conversations_alternate_and_end_with_the_assistant() -> None:
    chats = [document for document in pretraining_documents(300, random.Random(0)) if not isinstance(document, str)]
    assert len(chats) > 100
    for turns in chats:
        roles = [role for role, _ in turns if role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert roles


def test_pretraining_holds_no_question_of_the_instruction_set() -> None:
    asked = {
        content
        for document in pretraining_documents(3000, random.Random(0))
        if not isinstance(document, str)
        for role, content in document
        if role == "user"
    }
    assert asked
    assert not asked & {task.prompt for task in make_tasks(280, random.Random(0))}


def test_article_follows_the_first_letter() -> None:
    assert [with_article(word) for word in ("ant", "fox", "orange fruit")] == ["an ant", "a fox", "an orange fruit"]
