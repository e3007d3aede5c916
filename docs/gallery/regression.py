"""Rows of the gallery's page on regression: the rating that a request gives, read from SNIPS (CC0)."""

from __future__ import annotations

import csv
from importlib.resources import files
from pathlib import Path

from peft_lab.data.read_files import read_rows

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
FOLDER = Path("gallery/regression")


def rating(row: dict) -> int | None:
    """Rating of a request, 0 to 6; None where it names none."""
    given = [text.strip().lower() for text, slot in row["chunks"] if slot == "rating_value"]
    if len(given) != 1:
        return None
    return NUMBERS.index(given[0]) if given[0] in NUMBERS else int(given[0])


def main() -> None:
    """Write train.csv and test.csv."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for split, source in (("train", "train"), ("test", "validate")):
        rows = read_rows("json", [str(files("peft_lab.tasks") / f"data/snips/{source}.jsonl.gz")])
        rated = [(row["text"], rating(row)) for row in rows if row["intent"] == "RateBook"]
        rated = [(text, value) for text, value in rated if value is not None]
        with (FOLDER / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["request", "rating"])
            writer.writerows(rated)
        print(f"{len(rated)} rows in {FOLDER / split}.csv")


if __name__ == "__main__":
    main()
