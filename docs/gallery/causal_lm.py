"""Rows of the gallery's page on language models: a request of SNIPS (CC0) and the call of a function that it means."""

from __future__ import annotations

import json
import random
from importlib.resources import files
from pathlib import Path

from peft_lab.data.read_files import read_rows

FOLDER = Path("gallery/causal_lm")
ROWS = {"train": 400, "test": 40}
FUNCTIONS = {"GetWeather": "weather", "PlayMusic": "play", "RateBook": "rate"}


def call(row: dict) -> str:
    """Call of a function with the slots of a request, such as `weather(city="Rome")`."""
    slots = [(slot, text.strip()) for text, slot in row["chunks"] if slot]
    return f"{FUNCTIONS[row['intent']]}({', '.join(f'{slot}={json.dumps(text)}' for slot, text in slots)})"


def main() -> None:
    """Write train.jsonl and test.jsonl."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for split, source in (("train", "train"), ("test", "validate")):
        rows = read_rows("json", [str(files("peft_lab.tasks") / f"data/snips/{source}.jsonl.gz")])
        rows = draw.sample([row for row in rows if row["intent"] in FUNCTIONS and len(row["text"]) < 60], ROWS[split])
        lines = [json.dumps({"request": row["text"].strip(), "call": call(row)}, ensure_ascii=False) for row in rows]
        (FOLDER / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{ROWS[split]} rows in {FOLDER / split}.jsonl")


if __name__ == "__main__":
    main()
