"""Whatever a config.json says, `lorakit budget` counts or says in one line what is wrong."""

import contextlib
import io
import json

from helpers.fuzz import fuzz
from hypothesis import strategies as st

from lorakit import cli

LLAMA = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2, "vocab_size": 16, "max_position_embeddings": 16}
MORE = ["num_key_value_heads", "pad_token_id", "dtype", "rope_scaling", "hidden_act", "tie_word_embeddings", "head_dim"]
MORE += ["quantization_config", "architectures", "attention_bias", "rms_norm_eps", "layer_types", "use_cache"]
WORDS = st.sampled_from(["llama", "gpt2", "opt", "vit", "float32", "float16", "gelu", "default", ""])
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-2, 20), st.floats(), WORDS, st.text(max_size=5))
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2), max_leaves=4
)
NAMES = st.sampled_from([*LLAMA, *MORE])
RANKS = st.one_of(st.integers(-2, 20), st.just(10**400))


def test_configs(tmp_path):
    def check(changes, rank):
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(["budget", str(tmp_path), "--method", "lora", "--tokens", "4", f"--rank={rank}"])
        said = [line for line in err.getvalue().split("\n") if line.startswith("lorakit: ")]
        assert code in (0, 2)
        assert len(said) == (code == 2), err.getvalue()

    fuzz("configs", check, st.dictionaries(NAMES, VALUES, min_size=1, max_size=3), RANKS)
