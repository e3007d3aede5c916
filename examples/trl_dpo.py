"""Preferences with TRL's `DPOTrainer`: the reference is the base model, with the adapter switched off.

pip install trl
python examples/trl_dpo.py --method svfit
"""

from __future__ import annotations

import argparse
from importlib.resources import files

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from peft_lab.adapters import SoftPromptConfig, SVFitConfig
from peft_lab.backbones.pypi_weights import resolve_model

CONFIGS = {
    "lora": lambda: LoraConfig(task_type="CAUSAL_LM", r=8),
    "svfit": lambda: SVFitConfig(task_type="CAUSAL_LM"),
    "soft_prompt": lambda: SoftPromptConfig(task_type="CAUSAL_LM"),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", choices=CONFIGS, default="svfit")
    parser.add_argument("--model_name_or_path", default="smollm2-135m")
    parser.add_argument("--train_file", default=str(files("peft_lab.tasks") / "data" / "snips" / "train.jsonl.gz"))
    parser.add_argument("--output_dir", default="dpo-run")
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--max_steps", type=int, default=50)
    args = parser.parse_args()

    rows = load_dataset("json", data_files=args.train_file, split="train")
    intents = sorted(set(rows["intent"]))

    def preference(row: dict) -> dict:
        """A request, the name of what it asks for, and the next name in the list, which is wrong."""
        wrong = intents[(intents.index(row["intent"]) + 1) % len(intents)]
        return {"prompt": row["text"], "chosen": f" {row['intent']}", "rejected": f" {wrong}"}

    trainer = DPOTrainer(
        resolve_model(args.model_name_or_path),
        args=DPOConfig(
            output_dir=args.output_dir,
            learning_rate=args.learning_rate,
            max_steps=args.max_steps,
            max_length=128,
            logging_steps=10,
            bf16=torch.cuda.is_available(),  # the default of TRL, which a CPU refuses
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=rows.map(preference, remove_columns=rows.column_names),
        peft_config=CONFIGS[args.method](),
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "rewards/accuracies" in entry]
    print(f"chosen before rejected {steps[-1]['rewards/accuracies']:.3f}")
    trainer.save_model()


if __name__ == "__main__":
    main()
