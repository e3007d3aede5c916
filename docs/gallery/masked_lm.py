"""Texts and a small BERT of the gallery's page on masked language models: requests of SNIPS (CC0) for the weather."""

from __future__ import annotations

from pathlib import Path

from tiny_models import make_tokenizer, save, snips
from transformers import BertConfig, BertForMaskedLM

FOLDER = Path("gallery/masked_lm")


def main() -> None:
    """Write train.txt, test.txt and the folder bert."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    texts: list[str] = []
    for split in ("test", "train"):
        found = [" ".join(row["text"].split()) for row in snips(split) if row["intent"] == "GetWeather"]
        texts += found
        (FOLDER / f"{split}.txt").write_text("\n".join(found), encoding="utf-8")
        print(f"{len(found)} texts in {FOLDER}/{split}.txt")
    tokenizer = make_tokenizer(texts, "<s> $A </s>")
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, pad_token_id=0, **sizes, **dropout)
    save(BertForMaskedLM, config, tokenizer, FOLDER / "bert")


if __name__ == "__main__":
    main()
