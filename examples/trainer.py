"""A plain `transformers.Trainer` script. What makes it SVFit or SSF instead of LoRA is the config line.

python examples/trainer.py --method svfit
"""

from __future__ import annotations

import argparse
from importlib.resources import files

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from peft_lab.adapters import SSFConfig, SVFitConfig
from peft_lab.backbones.pypi_weights import resolve_model

CONFIGS = {
    "lora": lambda: LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"]),
    "svfit": lambda: SVFitConfig(task_type="SEQ_CLS", rank="full"),
    "ssf": lambda: SSFConfig(task_type="SEQ_CLS"),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", choices=CONFIGS, default="svfit")
    parser.add_argument("--model_name_or_path", default=resolve_model("minilm"))
    parser.add_argument("--train_file", default=str(files("peft_lab.tasks") / "data" / "snips" / "train.jsonl.gz"))
    parser.add_argument("--output_dir", default="trainer-run")
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--max_steps", type=int, default=50)
    args = parser.parse_args()

    rows = load_dataset("json", data_files=args.train_file, split="train").class_encode_column("intent")
    rows = rows.train_test_split(test_size=0.1, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    tokenised = rows.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=64) | {"labels": batch["intent"]},
        batched=True,
    )
    labels = rows["train"].features["intent"].num_classes
    model = AutoModelForSequenceClassification.from_pretrained(args.model_name_or_path, num_labels=labels)

    model = get_peft_model(model, CONFIGS[args.method]())
    model.print_trainable_parameters()

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output_dir,
            learning_rate=args.learning_rate,
            max_steps=args.max_steps,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=tokenised["train"],
        eval_dataset=tokenised["test"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    trainer.train()
    print(f"accuracy {trainer.evaluate()['eval_accuracy']:.3f}")
    trainer.save_model()


if __name__ == "__main__":
    main()
