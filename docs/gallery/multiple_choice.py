"""Rows of the gallery's page on multiple choice: what a request of SNIPS (CC0) wants, out of four, by a seed."""

from __future__ import annotations

import csv
import random
from importlib.resources import files
from pathlib import Path

from peft_lab.data.read_files import read_rows

FOLDER = Path("gallery/multiple_choice")
ROWS = {"train": 1500, "test": 300}
WISHES = {
    "AddToPlaylist": "put a song on a list of songs",
    "BookRestaurant": "reserve a table for a meal",
    "GetWeather": "hear what the weather will be",
    "PlayMusic": "listen to music now",
    "RateBook": "give a book some points",
    "SearchCreativeWork": "find a book, film, game or picture",
    "SearchScreeningEvent": "know when films are shown in cinemas",
}


def main() -> None:
    """Write train.csv and test.csv."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for split, source in (("train", "train"), ("test", "validate")):
        requests = read_rows("json", [str(files("peft_lab.tasks") / f"data/snips/{source}.jsonl.gz")])
        with (FOLDER / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["request", "a", "b", "c", "d", "answer"])
            for row in draw.sample(requests, ROWS[split]):
                right = WISHES[row["intent"]]
                choices = [right, *draw.sample([wish for wish in WISHES.values() if wish != right], 3)]
                draw.shuffle(choices)
                writer.writerow([row["text"].strip(), *choices, "ABCD"[choices.index(right)]])
        print(f"{ROWS[split]} rows in {FOLDER / split}.csv")


if __name__ == "__main__":
    main()
