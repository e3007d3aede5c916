"""Rows of the gallery's page on question answering: questions after slots, read from SNIPS (CC0), by a seed."""

from __future__ import annotations

import json
import random
from importlib.resources import files
from pathlib import Path

from peft_lab.data.read_files import read_rows

FOLDER = Path("gallery/question_answering")


def question(row: dict, draw: random.Random) -> dict | None:
    """Question after one of the slots of a request; None where the request has none."""
    if not row["spans"]:
        return None
    span = draw.choice(row["spans"])
    start, end = int(span["start"]), int(span["end"])
    answers = {"text": [row["text"][start:end]], "answer_start": [start]}
    return {"question": f"What is the {span['label'].replace('_', ' ')}?", "context": row["text"], "answers": answers}


def main() -> None:
    """Write train.jsonl and test.jsonl."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for split, source in (("train", "train"), ("test", "validate")):
        rows = read_rows("json", [str(files("peft_lab.tasks") / f"data/snips-slots/{source}.jsonl.gz")])
        asked = [found for found in (question(row, draw) for row in rows) if found is not None]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in asked)
        (FOLDER / f"{split}.jsonl").write_text(text, encoding="utf-8")
        print(f"{len(asked)} rows in {FOLDER / split}.jsonl")


if __name__ == "__main__":
    main()
