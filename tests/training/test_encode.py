"""Conversations in any chat template: what the assistant writes is labelled, to the token, or the row is refused."""

from pathlib import Path

import pytest
import trl
from helpers.chat import BOS, END, byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorakit import encode, encode_row, read_rows
from lorakit.training.batch import IGNORE
from lorakit.training.encode import in_parts

SYSTEM = {"role": "system", "content": "Be kind."}
ASKED, ANSWERED = {"role": "user", "content": "one"}, {"role": "assistant", "content": " yes "}
AGAIN, LAST = {"role": "user", "content": "two"}, {"role": "assistant", "content": "no"}
TALK = [ASKED, ANSWERED, AGAIN, LAST]
LLAMA = (  # begins with BOS, strips
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
)
MISTRAL = (  # no header of a reply; roles in turn, no system
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (  # refuses a system's turn, calls the assistant otherwise
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|turn|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>model\n{% endif %}"
)
PHI = (  # ends every conversation by eos
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
THOUGHTS = (  # empty thoughts before the last reply alone
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ '<think></think>' if m.role == 'assistant' and loop.last }}"
    "{{ m.content }}<|eot|>\n{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
PLAIN = (  # no control tokens: the space before a reply could be part of its first word
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TOOLS = (
    "{% for tool in tools %}{{ tool.function.name }}{% endfor %}{% for m in messages %}<|turn|>{{ m.role }}\n"
    "{{ m.content }}{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
SWITCH = (
    "{% for m in messages %}[{{ m.role }}]{{ '' if short else '~' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{{ '' if short else '!' }}{% endif %}"
)


def tokenizer_of(template):
    found = byte_tokenizer()
    words = [f"<|{word}|>" for word in ("system", "user", "assistant", "tool", "turn", "eot", "end")]
    found.add_special_tokens({"additional_special_tokens": words})
    found.chat_template = template
    return found


def learned(tokenizer, example):
    """The runs of labelled tokens, as texts."""
    text = "".join(
        tokenizer.decode([token]) if label != IGNORE else "\0"
        for token, label in zip(example.input_ids, example.labels, strict=True)
    )
    return [run for run in text.split("\0") if run]


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        (LLAMA, ["yes<|eot|>", "no<|eot|>"]),
        (MISTRAL, [f"  yes {END}", f" no{END}"]),
        (GEMMA, ["yes<|eot|>\n", "no<|eot|>\n"]),
        (PHI, [" yes <|end|>\n", f"no<|end|>\n{END}"]),
        (PLAIN, [" yes \n", "no\n"]),
    ],
    ids=["llama", "mistral", "gemma", "phi", "plain"],
)
def test_the_assistants_turns_are_labelled_and_nothing_else(template, turns):
    tokenizer = tokenizer_of(template)
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    example = encode_row(tokenizer, {"messages": TALK})
    assert tokenizer.decode(example.input_ids) == whole
    assert example.input_ids.count(tokenizer.bos_token_id) == whole.count(BOS)
    assert learned(tokenizer, example) == turns
    assert learned(tokenizer, encode_row(tokenizer, {"messages": TALK}, turns="last")) == turns[1:]
    for completion in (TALK[3:], "no"):
        given = encode_row(tokenizer, {"prompt": TALK[:3], "completion": completion})
        assert (given.input_ids, learned(tokenizer, given)) == (example.input_ids, turns[1:])
    several = encode_row(tokenizer, {"prompt": TALK[:1], "completion": TALK[1:]})
    assert several == example
    # generation sees the same tokens before the reply
    prompt = tokenizer.apply_chat_template(TALK[:3], add_generation_prompt=True, return_dict=False)
    assert given.input_ids[: len(prompt)] == prompt
    assert set(given.labels[: len(prompt)]) == {IGNORE}


PAIRS = ["cohere", "cohere2", "gemma", "gemma3", "lfm2", "llama3", "phi3", "qwen3_instruct_2507"]


@pytest.mark.parametrize("name", PAIRS)
def test_a_templates_own_marks_say_what_its_prefixes_say(name):
    """TRL has templates as models come with them, and again with marks."""
    plain, marked = (
        tokenizer_of((Path(trl.__file__).parent / "chat_templates" / f"{name}{kind}.jinja").read_text())
        for kind in ("", "_training")
    )
    for turns in ("all", "last"):
        assert encode_row(plain, {"messages": TALK}, turns) == encode_row(marked, {"messages": TALK}, turns)
    pair = {"prompt": TALK[:3], "completion": TALK[3:]}
    assert encode_row(plain, pair) == encode_row(marked, pair)


def test_marks_may_divide_a_turn():
    tokenizer = tokenizer_of(
        "{% for m in messages %}{{ m.role }} {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}.{% generation %}!{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert learned(tokenizer, encode_row(tokenizer, {"messages": TALK})) == [" yes ", "!", "no", "!"]
    assert learned(tokenizer, encode_row(tokenizer, {"messages": TALK}, "last")) == ["no", "!"]


def test_what_cannot_be_labelled_exactly_is_refused():
    talk, system = {"messages": TALK}, {"messages": [SYSTEM, *TALK]}
    for template, row, words in (
        (THOUGHTS, talk, "shows turn 2 alike all along"),
        (GEMMA, system, "takes, got 'System role not supported'"),
        (MISTRAL, {"messages": [ASKED, AGAIN, LAST]}, "roles must alternate"),
        (MISTRAL.replace("{% if m.role", "{% if m.role == 'system' %}{% elif m.role"), system, "roles must alternate"),
        (
            LLAMA.replace("{{ m.content | trim }}", "{{ m.content if m.role != 'system' }}"),
            system,
            "leaves out 'Be kind.'",
        ),
        (LLAMA, talk | {"tools": [{"type": "function", "function": {"name": "add"}}]}, "leaves out 'add'"),
        (SWITCH, talk, r"prompt begins the reply, got '.*\[assistant\]!' before turn 2"),
        (None, talk, "tokenizer with a chat template"),
        (LLAMA, {"messages": TALK[:1]}, "at least one labelled token"),
        (LLAMA, {"conversations": []}, "expected a row with prompt and completion, or messages, got no 'prompt'"),
    ):
        with pytest.raises(ValueError, match=words):
            encode_row(tokenizer_of(template), row)
    tokenizer = tokenizer_of(THOUGHTS)
    assert learned(tokenizer, encode_row(tokenizer, talk, "last")) == ["<think></think>no<|eot|>\n"]
    with pytest.raises(ValueError, match="expected turns, got 'first'; near: last; also: all"):
        encode_row(tokenizer_of(LLAMA), talk, "first")


def test_tools_and_settings_go_through_the_template():
    tokenizer = tokenizer_of(TOOLS)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    talk = [ASKED, call, {"role": "tool", "content": "2"}, LAST]
    tools = [{"type": "function", "function": {"name": "add"}}]
    for given in (tools, '[{"type": "function", "function": {"name": "add"}}]'):
        example = encode_row(tokenizer, {"messages": talk, "tools": given})
        assert learned(tokenizer, example) == ['{"name": "add", "arguments": {"a": 1}}<|eot|>', "no<|eot|>"]
        assert tokenizer.decode(example.input_ids).startswith("add<|turn|>user")
    tokenizer = tokenizer_of(SWITCH)
    example = encode_row(tokenizer, {"messages": TALK, "chat_template_kwargs": {"short": True}})
    assert learned(tokenizer, example) == [" yes ", "no"]


def test_too_long_a_conversation_loses_its_oldest_turns_and_then_the_start_of_its_prompt():
    tokenizer = tokenizer_of(LLAMA)
    talk = {"messages": [SYSTEM, *TALK]}
    short = encode_row(tokenizer, {"messages": [SYSTEM, *TALK[2:]]})
    length = len(encode_row(tokenizer, talk).input_ids)
    assert encode_row(tokenizer, talk, max_length=length) == encode_row(tokenizer, talk)
    assert encode_row(tokenizer, talk, max_length=length - 1) == short
    assert encode_row(tokenizer, {"prompt": talk["messages"][:4], "completion": "no"}, max_length=length - 1) == short
    cut = encode_row(tokenizer, talk, max_length=8)
    assert cut.input_ids == [tokenizer.bos_token_id, *short.input_ids[-7:]]
    assert learned(tokenizer, cut) == ["no<|eot|>"]
    both = encode_row(tokenizer, {"prompt": TALK[:1], "completion": TALK[1:]}, max_length=length - 20)
    assert learned(tokenizer, both) == ["yes<|eot|>", "no<|eot|>"]  # a completion stays whole
    with pytest.raises(ValueError, match="completion of at most max_length tokens, got 2 more"):
        encode_row(tokenizer, talk, max_length=1)


@pytest.fixture
def spaced():
    """As Llama 2's: a text's first word gets a space."""
    letters = ["<unk>", "\u2581", *"abcdefgh:\n", "\u2581a", "\u2581b"]
    core = Tokenizer(
        models.BPE(
            {letter: i for i, letter in enumerate(letters)}, [("\u2581", "a"), ("\u2581", "b")], unk_token="<unk>"
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def test_a_completion_goes_on_and_does_not_begin_a_text(spaced):
    def tokens(*parts):
        return [spaced.convert_ids_to_tokens(ids) for ids in in_parts(spaced, parts)]

    assert tokens("a:", " b") == [["\u2581a", ":"], ["\u2581b"]]
    assert tokens("a:", "b") == [["\u2581a", ":"], ["b"]]
    assert tokens("a: ", "b", "c") == [["\u2581a", ":", "\u2581"], ["b"], ["c"]]  # as generation sees it
    assert encode(spaced, "a: ", "b").labels[-1:] == [spaced.convert_tokens_to_ids("b")]
    assert tokens("", "b") == [[], ["\u2581b"]]


def test_a_token_across_a_border_is_divided_as_generation_sees_it():
    tokenizer = byte_tokenizer()  # `ab` is one token
    ids = [tokenizer.convert_tokens_to_ids(list(text)) for text in ("xa", "b", "ya")]
    ab = tokenizer.convert_tokens_to_ids(["ab"])
    assert in_parts(tokenizer, ["xa", "b"]) == ids[:2]
    assert in_parts(tokenizer, ["xa", "b", "ya", "b"]) == [*ids, ids[1]]
    assert in_parts(tokenizer, ["x", "ab"]) == [ids[0][:1], ab]


def test_words_without_a_token_are_named_one_by_one(spaced):
    with pytest.raises(ValueError, match="expected words that the tokenizer knows, got 'x', 'y'"):
        encode_row(spaced, {"prompt": "a x", "completion": "y"})


def test_rows_are_read_from_a_file(tmp_path):
    (tmp_path / "chat.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"messages": [{"role": "user"}]}\n')
    pair, talk = read_rows(tmp_path / "chat.jsonl")
    tokenizer = byte_tokenizer()
    assert encode_row(tokenizer, pair) == encode(tokenizer, "a", "b")
    assert talk.messages == ({"role": "user"},)
