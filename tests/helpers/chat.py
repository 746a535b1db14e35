"""A tokenizer of single bytes with control tokens, and ChatML for it."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

START, END, BOS = "<|im_start|>", "<|im_end|>", "<s>"
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
REPLY = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}" + TURN + "{% endfor %}" + REPLY


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Single bytes, but that `ab` is one token; BOS before every text, if special tokens are asked for."""
    letters = [BOS, START, END, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, [("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([BOS, START, END])
    core.post_processor = processors.TemplateProcessing(f"{BOS} $A", special_tokens=[(BOS, 0)])
    found = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BOS, eos_token=END)
    found.chat_template = CHATML
    return found
