"""Each planted fault of training data is found where it is, and clean data has none."""

import json

import pytest
from helpers.chat import BOS, CHATML, END, REPLY, START, TURN, byte_tokenizer

import lorakit
from lorakit import cli
from lorakit.tasks import tiny_model
from lorakit.training import audit
from lorakit.training.audit import audit_data
from lorakit.training.audit_tokens import Tokenizer as View

TEMPLATES = {
    "prefixes": CHATML,
    "marks": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}" + TURN + "{% endif %}{% endfor %}"
    )
    + REPLY,
    "system": ("{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML),
    "choosy": "{% if messages | length > 2 %}{{ raise_exception('one question only') }}{% endif %}" + CHATML,
    "forgetful": (
        "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}<|im_start|>assistant\n"
        "{{ m.content[-1:] }}<|im_end|>\n{% else %}" + TURN + "{% endif %}{% endfor %}" + REPLY
    ),
    "without an end": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}"
    "assistant: {% endif %}",
}


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def pair(i, asked="", answer=None):
    prompt = f"{START}user\nq{i}{asked}{END}\n{START}assistant\n"
    return {"prompt": prompt, "completion": f"r{i}{END}" if answer is None else answer}


def talk(i, *turns):
    turns = turns or (("user", f"q{i}"), ("assistant", f"r{i}"), ("user", f"s{i}"), ("assistant", f"t{i}"))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write(folder, rows):
    path = folder / "rows.jsonl"
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return path


def faults(report):
    return {finding.fault: finding.rows for finding in report.findings}


LONG = "z" * 200
PLANTED = {  # name -> a row (the fourth of five), what is found in it
    "not UTF-8": (json.dumps(pair(3)).encode().replace(b"q3", b"q\xff") + b"\n", {"not-utf8"}),
    "U+FFFD": (pair(3, "caf\ufffd"), {"odd-characters"}),
    "a control": (pair(3, "\x07"), {"odd-characters"}),
    "UTF-8 read as Latin-1": (pair(3, "cafÃ©"), {"odd-characters"}),
    "half a surrogate pair": (pair(3, "\ud83d"), {"odd-characters"}),
    "an end alone": (pair(3, answer=END), {"empty"}),
    "nothing": (pair(3, answer=""), {"empty", "unlabelled"}),
    "no end": (pair(3, answer="r3"), {"no-end"}),
    "an end in the midst": (pair(3, answer=f"r{END}3"), {"no-end"}),
    "two starts": ({"prompt": f"{BOS}q3", "completion": f"r3{END}"}, {"two-starts"}),
    "two ends": (pair(3, answer=f"r3{END}{END}"), {"two-ends"}),
    "a border": ({"prompt": "q3 a", "completion": f"b{END}"}, {"border"}),
    "a long answer": (pair(3, answer=f"{LONG}{END}"), {"too-long"}),
    "a long question": (pair(3, LONG), {"too-long", "labels-cut"}),
    "once more": (pair(0), {"duplicate"}),
    "roles twice": (talk(3, ("user", "q"), ("user", "q3"), ("assistant", "r")), {"roles"}),
    "answer first": (talk(3, ("assistant", "r"), ("user", "q3"), ("assistant", "r")), {"roles"}),
    "a late system": (talk(3, ("user", "q"), ("system", "q3"), ("assistant", "r")), {"roles"}),
    "no answer": (talk(3, ("system", "be"), ("user", "q3")), {"roles", "unlabelled"}),
    "an empty answer": (talk(3, ("user", "q3"), ("assistant", " ")), {"empty"}),
    "control tokens": (talk(3, ("user", f"q{END}3"), ("assistant", "r")), {"control"}),
    "an end of one's own": (talk(3, ("user", "q3"), ("assistant", f"r{END}")), {"control", "two-ends"}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found_and_nothing_else(tokenizer, tmp_path, name):
    row, found = PLANTED[name]
    report = audit_data(write(tmp_path, [pair(0), talk(1), pair(2), row, pair(4)]), tokenizer, max_length=120)
    assert faults(report) == dict.fromkeys(found, (4,))
    assert "1 row: " in str(report)
    assert "row 4" in str(report)


def test_the_same_prompt_with_other_completions_is_told_on_every_side(tokenizer, tmp_path):
    rows = [pair(0), pair(1), pair(0, answer=f"no{END}"), pair(0)]
    report = audit_data(write(tmp_path, rows), tokenizer)
    assert faults(report) == {"duplicate": (4,), "other-answers": (1, 3, 4)}


def test_words_without_a_token_are_told(tmp_path):
    words = tiny_model.make_tokenizer()
    rows = [{"prompt": "room of ada adler ?", "completion": "1 2 3 4"}, {"prompt": "zebra", "completion": "1"}]
    report = audit_data(write(tmp_path, rows), words)
    assert faults(report)["unknown"] == (2,)
    assert "'zebra'" in str(report)


@pytest.mark.parametrize(
    ("template", "method", "learned"),
    [
        ("prefixes", "prefixes of the conversation", [f"r1{END}\n", f"t1{END}\n"]),
        ("marks", "the template's generation marks", [f"r1{END}", f"t1{END}"]),
        ("system", "prefixes of the conversation", [f"r1{END}\n", f"t1{END}\n"]),
    ],
)
def test_the_assistants_turns_are_labelled(tokenizer, tmp_path, template, method, learned):
    tokenizer.chat_template = TEMPLATES[template]
    path = write(tmp_path, [talk(1)])
    report = audit_data(path, tokenizer)
    (row,) = audit.read_rows(path)
    tokens = View(tokenizer).read(row)
    assert [tokenizer.decode(span) for span in tokens.spans] == learned
    assert (report.facts["labels by"], report.findings, report.facts["end labelled"]) == (method, (), 1)
    assert report.facts["generation prompt"] == f"{START}assistant\n"
    assert bool(report.facts["system turn by default"]) == (template == "system")
    assert report.facts["template adds"] == len(tokens.ids) - 8


def test_of_a_prompt_in_messages_the_completion_alone_is_labelled(tokenizer, tmp_path):
    turns = talk(1)["messages"]
    path = write(tmp_path, [{"prompt": turns[:3], "completion": turns[3:]}, {"prompt": turns[:3], "completion": "t"}])
    for template in ("prefixes", "marks"):
        tokenizer.chat_template = TEMPLATES[template]
        first, second = map(View(tokenizer).read, audit.read_rows(path))
        assert [tokenizer.decode(span).strip() for span in first.spans + second.spans] == [f"t1{END}", f"t{END}"]


@pytest.mark.parametrize(
    ("template", "fault", "words"),
    [
        ("choosy", "refused", "one question only"),
        ("forgetful", "refused", "one that leaves out 'long'"),
        ("without an end", "no-end", ""),
        (None, "refused", "expected a tokenizer with a chat template"),
    ],
)
def test_what_a_template_does_wrong_is_told(tokenizer, tmp_path, template, fault, words):
    tokenizer.chat_template = TEMPLATES.get(template)
    two = talk(1, ("user", "q"), ("assistant", "long"), ("user", "s"), ("assistant", "t"))
    report = audit_data(write(tmp_path, [two]), tokenizer)
    assert faults(report) == {fault: (1,)}
    assert words in str(report)


def test_the_last_turn_can_be_labelled_alone(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(audit, "load_tokenizer", lambda model: (tokenizer, 100))
    path = write(tmp_path, [talk(1)])
    shares = []
    for turns in ("all", "last"):
        assert cli.main(["audit", str(path), "--model", "any", "--json", "--turns", turns]) == 0
        shares.append(json.loads(capsys.readouterr().out)[0]["facts"]["labelled"])
    assert shares[1] == pytest.approx(shares[0] / 2, abs=1e-4)


def test_plain_texts_can_be_put_into_the_template(tokenizer, tmp_path):
    path = write(tmp_path, [{"prompt": "q", "completion": "r"}])
    assert faults(audit_data(path, tokenizer)) == {"no-end": (1,)}
    assert audit_data(path, tokenizer, chat=True).findings == ()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="expected a tokenizer with a chat template"):
        audit_data(path, tokenizer, chat=True)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "line 2: Expecting property name"),
        (b"[1]", "line 2: a list"),
        (b'{"prompt": "a"}', "line 2: no 'completion'"),
        (b'{"prompt": "a", "completion": 5}', "texts, or lists of messages"),
        (b'{"messages": [{"role": 5}]}', "messages is no list of messages"),
        (b'{"messages": []}', "messages is no list of messages"),
        (b"[" * 100_000, "line 2: "),
    ],
)
def test_what_is_no_row_is_refused_in_one_line(tokenizer, tmp_path, monkeypatch, capsys, line, words):
    monkeypatch.setattr(audit, "load_tokenizer", lambda model: (tokenizer, 100))
    path = write(tmp_path, [pair(0), line])
    assert cli.main(["audit", str(path), "--model", "any"]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_the_exit_code_is_the_verdict_and_json_has_all_of_it(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(audit, "load_tokenizer", lambda model: (tokenizer, 100))
    write(tmp_path, [pair(0), pair(1)])
    command = ["audit", str(tmp_path), "--model", "any"]
    assert cli.main(command) == 0
    assert "nothing found" in capsys.readouterr().out
    assert cli.main([*command, "--max-length", "9", "--json"]) == 1
    (record,) = json.loads(capsys.readouterr().out)
    assert record["findings"][0] | {"example": ""} == {
        "fault": "too-long", "what": "above 9 tokens, cut off", "rows": [1, 2], "example": ""
    }  # fmt: skip
    assert cli.main([*command, "--max-length", "0"]) == 2
    (tmp_path / "rows.jsonl").unlink()
    assert cli.main(command) == 2
    assert cli.main(["audit", str(tmp_path / "no.jsonl"), "--model", "any"]) == 2


def test_no_tokenizer_is_said_in_one_line(tmp_path, capsys):
    assert cli.main(["audit", str(tmp_path), "--model", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("lorakit: expected a model with a tokenizer, got ")
    assert err.count("\n") == 1


@pytest.mark.slow
def test_the_sql_tasks_own_items_are_clean_in_both_forms(tmp_path):
    tokenizer, context = audit.load_tokenizer("smollm2")
    assert context == 8192
    items = lorakit.load_sql("train")
    pairs = [{"prompt": item.prompt, "completion": item.completion} for item in items]
    talks = [talk(0, ("user", item.asked), ("assistant", item.answer)) for item in items]
    for rows in (pairs, talks):
        report = audit_data(write(tmp_path, rows), tokenizer, context)
        assert report.findings == ()
        assert report.facts["end labelled"] == len(items)
    assert "You are a helpful AI assistant" in report.facts["system turn by default"]
