"""What tasks have in common: one small interface, any chat format around a text, a reader's own files."""

import json
from dataclasses import replace

import pytest
from helpers.texts import TOKENIZER

import lorakit
from lorakit.tasks import tiny_model
from lorakit.tasks.extraction import EXTRACTION, messages
from lorakit.tasks.facts import BOS, EOS, FACTS, facts, known_facts
from lorakit.tasks.sql.questions import CHATML
from lorakit.tasks.sql.task import generate, sql_task
from lorakit.tasks.task import ChatFormat, Task, encoded, own_task
from lorakit.training.batch import IGNORE

TEMPLATES = {  # as models have them, without their branches: how each writes a question and an answer
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        CHATML,
    ),
    "llama": (
        "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ChatFormat(
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|eot_id|>",
        ),
    ),
    "phi": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        ChatFormat("<|user|>\n", "<|end|>\n<|assistant|>\n", "<|end|>"),
    ),
    "without an end": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        ChatFormat("user: ", "\nassistant: ", EOS),
    ),
}


@pytest.fixture
def tokenizer():
    return tiny_model.make_tokenizer()


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_format_is_read_off_a_template(tokenizer, name):
    tokenizer.chat_template, expected = TEMPLATES[name]
    found = ChatFormat.of(tokenizer)
    assert found == expected
    turn = [{"role": "user", "content": "a question"}]
    assert found.prompt("a question") == tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def test_a_template_that_is_missing_or_hides_a_turn_is_refused(tokenizer):
    with pytest.raises(ValueError, match="with a chat template, got one without"):
        ChatFormat.of(tokenizer)
    for template in (
        "{{ messages[0].content }}{{ messages[0].content }}",
        "{{ messages[0].content }}:{% if add_generation_prompt %}a{% else %}{{ messages[-1].content }}{% endif %}",
    ):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match="shows each turn once, as its prompt begins it"):
            ChatFormat.of(tokenizer)


def test_what_a_template_puts_before_each_reply_belongs_to_the_prompt(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ '<think></think>' if m.role == 'assistant' }}{{ m.content }}|"
        "{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert ChatFormat.of(tokenizer) == ChatFormat("[user]", "|[assistant]<think></think>", "|")


@pytest.mark.parametrize("task", [lorakit.SQL, sql_task(3), EXTRACTION, FACTS], ids=lambda task: task.name)
def test_every_task_has_the_same_interface(task):
    for split in task.splits:
        items = task.items(split, 6, seed=1)
        assert len(items) == 6 == len({task.prompt(item) for item in items})
        assert items == task.items(split, 6, seed=1)
        assert task.score(items, [item.answer for item in items]) == [True] * 6
        assert not any(task.score(items, ["nonsense"] * 6))
        assert [(task.prompt(item), task.completion(item)) for item in items] == [
            (item.prompt, item.completion) for item in items
        ]
        with pytest.raises(ValueError, match="5 answers for 6 items"):
            task.score(items, ["nonsense"] * 5)
    assert len(task.items(task.splits[0])) > 6
    with pytest.raises(ValueError, match=f"{task.name}, got 'x{task.splits[0]}'; near: {task.splits[0]}"):
        task.items("x" + task.splits[0])


def test_a_task_draws_what_its_own_functions_draw():
    assert lorakit.SQL.items("iid") == lorakit.load_sql("iid")
    assert sql_task(2).items("iid", 20, 3) == generate("iid", 20, seed=3, level=2)
    assert EXTRACTION.items("kinds") == messages("kinds") == messages("kinds", 208)
    assert FACTS.items("new", 5, 2) == facts(5, 2)
    assert FACTS.items("known", 5) == known_facts(5)
    assert FACTS.items("new", 5) != FACTS.items("known", 5)


def test_any_chat_format_goes_around_the_items_of_a_chat_task():
    plain = ChatFormat("Q: ", "\nA: ", "\n\n")
    item, (message,) = lorakit.load_sql("train")[0], messages("train", 1)
    assert replace(lorakit.SQL, chat=plain).prompt(item) == f"Q: {item.schema}\n{item.question}\nA: "
    assert replace(lorakit.SQL, chat=plain).completion(item) == f"{item.answer}\n\n"
    assert replace(EXTRACTION, chat=plain).prompt(message) == (
        f"Q: Fields: {', '.join(message.fields)}\n{message.text}\nA: "
    )


def test_encode_labels_the_completion_of_the_format():
    item = lorakit.load_sql("train")[0]
    task = replace(lorakit.SQL, chat=ChatFormat("<", ">", "\x02"))
    (example,) = task.encode(TOKENIZER, [item])
    labelled = [label for label in example.labels if label != IGNORE]
    assert TOKENIZER.decode(labelled) == TOKENIZER.decode(
        TOKENIZER(item.answer + "\x02", add_special_tokens=False)["input_ids"]
    )
    assert len(example.input_ids) - len(labelled) == len(item.asked) + 2
    assert encoded(TOKENIZER, [item]) == lorakit.SQL.encode(TOKENIZER, [item])


def test_answers_end_at_the_formats_end(monkeypatch):
    seen = []

    def spy(model, tokenizer, prompts, **more):
        seen.append((prompts, more))
        return prompts

    monkeypatch.setattr("lorakit.tasks.task.greedy", spy)
    (item,), (fact,) = lorakit.SQL.items("train", 1), facts(1)
    lorakit.SQL.answers(None, None, [item], max_new_tokens=5)
    replace(lorakit.SQL, chat=ChatFormat("", "", "</s>")).answers(None, None, [item])
    FACTS.answers(None, None, [fact])
    replace(FACTS, end=None).answers(None, None, [fact], stop="?")
    assert [more.get("stop") for _, more in seen] == ["<|im_end|>", "</s>", EOS, "?"]
    assert seen[0] == ([item.prompt], {"stop": "<|im_end|>", "max_new_tokens": 5})
    assert seen[2][0] == [f"{BOS} extension of {fact.name} ?"]


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + "\n", encoding="utf-8")


def test_what_is_exact_is_right_and_not_generated(monkeypatch):
    """The tiny base knows most of its facts; all answers scored one by one say the same."""
    model, tokenizer = lorakit.load_model("tiny")
    items = [*known_facts()[:24], *facts(8, 1)]
    whole = FACTS.score(items, FACTS.answers(model, tokenizer, items, show=False))
    assert 0 < sum(whole) < len(items)
    asked = []

    def counted(self, model, tokenizer, items, **settings):
        asked.extend(items)
        return real(self, model, tokenizer, items, **settings)

    real = Task.answers
    monkeypatch.setattr(Task, "answers", counted)
    assert FACTS.right(model, tokenizer, items, show=False) == whole
    assert len(asked) == len(items) - sum(whole)
    asked.clear()
    assert FACTS.right(model, tokenizer, items[:3], [True, False, True], show=False) == [True, whole[1], True]
    assert asked == [items[1]]


def test_a_folder_is_a_task(tmp_path):
    rows = [{"prompt": f"question {i} é\u2028", "completion": f" {i}"} for i in range(3)]  # a line separator in it
    with pytest.raises(FileNotFoundError, match=r"train.jsonl and test.jsonl, got '.*nowhere'"):
        own_task(tmp_path / "nowhere")
    write_lines(tmp_path / "train.jsonl", *rows)
    with pytest.raises(FileNotFoundError, match=r"test\.jsonl"):
        own_task(tmp_path)
    write_lines(tmp_path / "test.jsonl", *rows[:1])
    task = own_task(tmp_path)
    assert task.splits == ("test", "train")
    assert [task.prompt(item) for item in task.items("train")] == [row["prompt"] for row in rows]
    assert task.items("train", 2) == task.items("train")[:2]
    assert task.items("train", 0) == []
    assert task.score(task.items("train"), ["0", " 1\n", "3"]) == [True, True, False]
    with pytest.raises(ValueError, match="n up to 3"):
        task.items("train", 4)
    chat = own_task(tmp_path, CHATML)
    assert chat.prompt(chat.items("test")[0]) == CHATML.prompt("question 0 é\u2028")
    assert chat.completion(chat.items("test")[0]) == " 0<|im_end|>"


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_only_a_newline_ends_a_line(tmp_path, mark):
    row = {"prompt": f"a{mark}b", "completion": f"c{mark}d"}
    for part in ("train", "test"):
        (tmp_path / f"{part}.jsonl").write_bytes(f"{json.dumps(row, ensure_ascii=False)}\r\n".encode() * 2)
    assert [vars(line) for line in own_task(tmp_path).items("train")] == [row, row]


@pytest.mark.parametrize(
    "line",
    ['{"prompt": "x"}', "[1]", "{", '{"prompt": 1, "completion": "y"}', '{"prompt": "x", "completion": ""}'],
)
def test_a_line_that_is_not_an_example_is_named(tmp_path, line):
    write_lines(tmp_path / "train.jsonl", {"prompt": "x", "completion": "y"})
    (tmp_path / "test.jsonl").write_text('{"prompt": "x", "completion": "y"}\n\n' + line)
    with pytest.raises(ValueError, match=r"an object with prompt and completion in .*test.jsonl, line 3"):
        own_task(tmp_path).items("test")
