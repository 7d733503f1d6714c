"""Rows: what is said, and what is not."""

import json

from jobs.benchmark.tools.malformed_corpus.corpus import Corpus, as_json, ask, noise
from pipeline.config import ColumnsConfig


def conversations(corpus: Corpus) -> None:
    """Forms that messages come in."""
    conversation = [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "red"}]
    parts = [{"type": "text", "text": "what is "}, {"type": "image"}, {"type": "text", "text": " ?"}]
    picture = {"pictures/red.png": noise("PNG")}
    corpus.rows("llava", {"conversations": conversation, "image": "pictures/red.png"}, files=picture)
    corpus.rows("parts", ask(parts, images=["pictures/red.png"]), files=picture)
    inline = [{"type": "image_url", "image_url": {"url": "pictures/red.png"}}, *parts[:1]]
    corpus.rows("images_in_parts", ask(inline), files=picture)
    corpus.rows("messages_as_json", {"messages": json.dumps(ask()["messages"])})
    corpus.rows("several_turns", {"messages": ask()["messages"] * 4})
    corpus.rows("empty_system", {"messages": [{"role": "system", "content": ""}, *ask()["messages"]]})
    corpus.rows("same_ids", *[ask(id="same")] * 5)
    corpus.rows(
        "ids_of_all_kinds",
        *(ask(id=value) for value in (None, 0, 1.5, "", ["a"], {"b": 1}, True, "\ud83d", "x" * 9999)),
    )
    corpus.rows("no_images_at_all", *(ask(images=value) for value in (None, [], [None], "", float("nan"))))
    corpus.rows("markup", ask("<|im_end|>{question}</s>\u200b\u202e\ufeff", "\U0001f600"))
    corpus.rows("unused_bytes", as_json(ask(note="X")).replace(b"X", b"\xff\xfe"))


def no_conversations(corpus: Corpus) -> None:
    """Messages that cannot be learned."""
    user, assistant = ask()["messages"]
    for name, row, reason in (
        ("empty_question", ask(""), "the question is empty"),
        ("blank_question", ask(" \n\t"), "the question is empty"),
        ("empty_answer", ask(answer=""), "the answer is empty"),
        ("blank_answer", ask(answer="\u00a0 \n"), "the answer is empty"),
        ("no_answer", {"messages": [user]}, "the last message must be the assistant's"),
        ("no_user", {"messages": [assistant]}, "no message of the user"),
        ("wrong_order", {"messages": [assistant, user]}, "the last message must be the assistant's"),
        ("assistant_first", {"messages": [assistant, user, assistant]}, "must take turns"),
        ("user_twice", {"messages": [user, user, assistant]}, "must take turns"),
        ("unknown_role", {"messages": [{"role": "tool", "content": "x"}, assistant]}, "unknown role 'tool'"),
        ("no_role", {"messages": [{"content": "x"}, assistant]}, "unknown role None"),
        ("no_messages", {"messages": []}, "no message of the user"),
        ("null_messages", {"messages": None}, "column 'messages' is missing or null"),
        ("other_columns", {"text": "what ?"}, "column 'messages' is missing or null"),
        ("messages_as_text", {"messages": "what ?"}, "is not a list of messages"),
        ("messages_as_texts", {"messages": ["what ?", "red"]}, "is not a list of messages"),
        ("null_content", ask(None), "content is not text"),
        ("number_as_content", ask(5), "content is not text"),
        ("unknown_part", ask([{"type": "audio"}]), "neither text nor image"),
        ("no_image_for_placeholder", ask("<image>what ?"), "1 <image> in the messages, but 0 images"),
        ("too_few_placeholders", ask("<image>what ?", images=["a", "b"]), "1 <image> in the messages, but 2 images"),
        ("nul", ask("what\x00 ?"), "holds NUL characters"),
        ("half_a_character", ask("what \ud83d ?"), "half a surrogate pair"),
        ("not_utf8", as_json(ask("whatX ?")).replace(b"X", b"\xe9"), "is not valid UTF-8"),
        ("ten_megabytes", ask("x" * 10_000_000), "has 10,000,000 characters"),
        ("too_long", ask("what ? " * 9000), "data.max_tokens allows"),
    ):
        corpus.rows(name, row, reason=reason)


def answers(corpus: Corpus) -> None:
    """Rows of question and answers."""
    columns = ColumnsConfig(question="q", answer="a")
    for name, values, reason in (
        ("numbers_as_answers", (3, 3.5, -1, 1e20, True), ""),
        ("lists_of_answers", (["a", "b"], ["a", None], [1, 2], [{"answer": "a"}, {"answer": "b"}]), ""),
        ("no_numbers_as_answers", (float("nan"), float("inf"), float("-inf"), None), "is missing or null"),
        ("empty_answers", ("", " ", [""]), "the answer is empty"),
        ("no_answers_in_lists", ([], [None], [float("nan")]), "holds no answer"),
        ("nested_answers", ([["a"]], [{"answer": ["a"]}]), "where text belongs"),
    ):
        rows = [{"q": "what ?", "a": value} for value in ("red", *values)]
        good, bad = (1, len(values)) if reason else (1 + len(values), 0)
        corpus.add(name, {"rows.jsonl": b"\n".join(map(as_json, rows))}, good, bad, reason, columns=columns)
    questions = [{"q": value, "a": "red"} for value in ("what ?", None, float("nan"))]
    corpus.add(
        "no_questions", {"a.jsonl": b"\n".join(map(as_json, questions))}, 1, 2, "is missing or null", columns=columns
    )
