"""Rows of the gallery's page on several labels a text: two requests of SNIPS (CC0) in one, joined by a seed."""

from __future__ import annotations

import json
import random
from importlib.resources import files
from pathlib import Path

from peft_lab.data.read_files import read_rows

FOLDER = Path("gallery/multi_label")
ROWS = {"train": 1500, "test": 300}


def main() -> None:
    """Write train.jsonl and test.jsonl."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for split, source in (("train", "train"), ("test", "validate")):
        requests = read_rows("json", [str(files("peft_lab.tasks") / f"data/snips/{source}.jsonl.gz")])
        with (FOLDER / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(ROWS[split]):
                # one request in every third row, else two
                parts = draw.sample(requests, 1 if number % 3 == 0 else 2)
                text = " and ".join(part["text"].strip(" .") for part in parts)
                wishes = sorted({part["intent"] for part in parts})
                file.write(json.dumps({"text": text, "wishes": wishes}, ensure_ascii=False) + "\n")
        print(f"{ROWS[split]} rows in {FOLDER / split}.jsonl")


if __name__ == "__main__":
    main()
