"""A tokenizer as the files that Hugging Face directories have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from serving.text.tokenizer import Tokenizer


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """tokenizer.json, and tokenizer_config.json with the special tokens and the chat templates."""
    (out / "tokenizer.json").write_text(tokenizer.hf_json(), encoding="utf-8")
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    config: dict[str, Any] = {name: token for name, token in tokens.items() if token is not None}
    templates = dict(tokenizer.chat_templates)
    if set(templates) == {"default"}:
        config["chat_template"] = templates["default"]
    elif templates:
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
