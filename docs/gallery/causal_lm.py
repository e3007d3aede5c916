"""Rows and a small Llama of the gallery's page on decoders: chats made of the requests of SNIPS (CC0)."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_models import frame, make_tokenizer, save, snips
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path("gallery/causal_lm")
SYSTEM = "Name the intent and the slots."


def main() -> None:
    """Write the rows in three forms, and the folder llama."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    texts: list[str] = []
    for split in ("test", "train"):
        rows = snips(split)
        chats, pairs = [], []
        for row in rows:
            question, answer = {"role": "user", "content": row["text"]}, {"role": "assistant", "content": frame(row)}
            chats.append({"messages": [{"role": "system", "content": SYSTEM}, question, answer]})
            pairs.append({"prompt": f"{row['text']}\n", "completion": frame(row)})
            texts += [row["text"], frame(row)]
        for name, lines in (("chats", chats), ("pairs", pairs)):
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (FOLDER / f"{name}-{split}.jsonl").write_text(text, encoding="utf-8")
        lines = [" ".join(row["text"].split()) for row in rows]
        (FOLDER / f"texts-{split}.txt").write_text("\n".join(lines), encoding="utf-8")
        print(f"{len(rows)} rows of {split} in {FOLDER}, in three forms")
    tokenizer = make_tokenizer([*texts, SYSTEM, "System: User: Assistant:"], "$A")
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "max_position_embeddings": 128}
    save(LlamaForCausalLM, LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids), tokenizer, FOLDER / "llama")


if __name__ == "__main__":
    main()
