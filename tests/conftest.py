"""Checks every lorakit signature at run time, and keeps libraries quiet and offline."""

import os

from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
install_import_hook("lorakit", "typecheck.checker")
