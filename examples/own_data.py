"""Your own data: a CSV file and a task file of ten lines are all that training needs.

python examples/own_data.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import peft_lab

ROWS = """text,label
the delivery came two days late,complaint
my parcel never arrived,complaint
the box was open and the lamp is broken,complaint
nobody answers when I call you,complaint
I was charged twice for one order,complaint
this is the third time it fails,complaint
what a lovely blanket and so warm,praise
it arrived early and works well,praise
your support was friendly and quick,praise
best chair I have ever bought,praise
my daughter is happy with the book,praise
great quality for this price,praise
can I return it after two weeks,question
do you deliver to Norway,question
which size fits a small bed,question
is the battery included,question
how do I change my address,question
when will it be in stock again,question
"""

TASK = """name: letters
kind: text_classification
data:
  builder: csv
  files: {train: letters.csv}
columns: {text: text, label: label}
metrics: [accuracy]
validation_fraction: 0.2
version: "1"
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_name_or_path", default="minilm")
    parser.add_argument("--folder", type=Path, default=Path("own-data"))
    parser.add_argument("--max_steps", type=int, default=40)
    args = parser.parse_args()

    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / "letters.csv").write_text(ROWS)
    (args.folder / "letters.yaml").write_text(TASK)

    result = peft_lab.train(
        task=str(args.folder / "letters.yaml"),
        model_name_or_path=args.model_name_or_path,
        method="svfit",
        output_dir=str(args.folder / "adapter"),
        max_steps=args.max_steps,
    )
    print(f"validation accuracy {result.metrics['metrics']['validation']['accuracy']:.2f}")
    for answer in peft_lab.predict(args.folder / "adapter", ["the cup was broken", "do you deliver on Sundays"]):
        print(answer)


if __name__ == "__main__":
    main()
