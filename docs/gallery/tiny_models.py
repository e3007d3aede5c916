"""Tokenizer and models that the pages of the gallery train from scratch, on the requests of SNIPS (CC0)."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from peft_lab.data.read_files import read_rows

VOCABULARY = 2000
SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>", "cls_token": "<s>"}


def snips(split: str) -> list[dict[str, Any]]:
    """Rows of SNIPS: `text`, `intent`, and `chunks` of the text with the name of their slot."""
    source = {"train": "train", "test": "validate"}[split]
    return read_rows("json", [str(files("peft_lab.tasks") / f"data/snips/{source}.jsonl.gz")])


def frame(row: dict[str, Any]) -> str:
    """Intent of a request, and the names of its slots in their order."""
    return " ".join([row["intent"], *(slot for _, slot in row["chunks"] if slot)])


def make_tokenizer(texts: Iterable[str], template: str) -> Any:
    """Byte pairs learnt from texts; `template` puts special tokens around `$A`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL.values()), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    around = [(token, tokenizer.token_to_id(token)) for token in SPECIAL.values() if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=around)
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=128, model_input_names=inputs, sep_token="</s>", **SPECIAL
    )


def save(model_class: Any, config: Any, tokenizer: Any, folder: Path) -> None:
    """Write a random model, always the same, and its tokenizer."""
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"a model without any training in {folder}")
