"""Rows and a small T5 of the gallery's page on encoder-decoders: requests of SNIPS (CC0) and their frames."""

from __future__ import annotations

import csv
from pathlib import Path

from tiny_models import frame, make_tokenizer, save, snips
from transformers import T5Config, T5ForConditionalGeneration

FOLDER = Path("gallery/seq2seq_lm")


def main() -> None:
    """Write train.csv, test.csv and the folder t5."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    texts: list[str] = []
    for split in ("test", "train"):
        rows = [(row["text"], frame(row)) for row in snips(split)]
        texts += [text for pair in rows for text in pair]
        with (FOLDER / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["request", "frame"])
            writer.writerows(rows)
        print(f"{len(rows)} rows in {FOLDER / split}.csv")
    tokenizer = make_tokenizer(texts, "$A </s>")
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    sizes = {"d_model": 96, "d_kv": 24, "d_ff": 192, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    config = T5Config(vocab_size=len(tokenizer), **sizes, **ids)
    save(T5ForConditionalGeneration, config, tokenizer, FOLDER / "t5")


if __name__ == "__main__":
    main()
