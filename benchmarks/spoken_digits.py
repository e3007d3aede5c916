"""Make the task spoken-digits: digits spoken by espeak-ng, synthetic speech by seed.

Usage: apt install espeak-ng, then python benchmarks/spoken_digits.py [FOLDER]

Voices are an accent and a variant. No variant of the test rows speaks in the training rows.
"""

from __future__ import annotations

import io
import random
import subprocess
import sys
from pathlib import Path

import soundfile
from datasets import Dataset

from peft_lab.utils.audio import open_sound

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-gb-x-gbclan")
#: Split -> variants that speak in it, and rows of each digit.
SPLITS = {
    "train": (("m1", "m3", "m5", "m7", "f1", "f3", "Andy", "Annie", "Mike", "Linda"), 20),
    "validation": (("m2", "f4", "Michael", "Belinda"), 5),
    "test": (("m4", "m6", "f2", "f5", "Lee", "Alicia", "John", "Andrea"), 10),
}
RATE = 8000


def spoken(digit: str, voice: str, speed: int, pitch: int) -> bytes:
    """FLAC file of a word."""
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", digit]
    sound = open_sound(io.BytesIO(subprocess.run(command, check=True, capture_output=True).stdout), RATE)
    file = io.BytesIO()
    soundfile.write(file, sound.mono(RATE), RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def main(folder: Path) -> None:
    """Write a parquet file for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, (variants, count) in SPLITS.items():
        draw, rows = random.Random(f"spoken digits, {split}"), []
        for number in range(count * len(DIGITS)):
            voice = f"{draw.choice(ACCENTS)}+{draw.choice(variants)}"
            digit, speed, pitch = DIGITS[number % 10], draw.randint(120, 210), draw.randint(25, 75)
            data = spoken(digit, voice, speed, pitch)
            file = {"bytes": data, "path": f"{number:03}.flac"}
            rows.append({"audio": file, "digit": digit, "voice": voice})
        Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")


if __name__ == "__main__":
    default = Path(__file__).resolve().parents[1] / "tasks" / "data" / "spoken-digits"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
