"""Masks of masked language modelling: drawn anew in training, and once for an evaluation.

All of them follow from seeds, so that a resumed run masks as one that was not broken off, and every evaluation of
every run and method scores the same tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_lab.data.row_maps import identity_of_tokenizer, map_rows
from peft_lab.utils.mappings import without

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

IGNORED = -100
#: Column that marks the tokenizer's own tokens of a row.
SPECIAL = "special_tokens_mask"


class MaskingCollator:
    """Join rows into a batch, and mask those that are not masked yet.

    The masks follow from the run's seed, the epoch and the tokens of the batch, not from the state of a generator,
    which a resumed run could not bring back.

    Attributes:
        tokenizer: with the padding side of the model.
        probability: share of the tokens that are chosen.
        seed: seed of the run, by default the one that torch was seeded with.
    """

    def __init__(self, tokenizer: Any, probability: float, seed: int | None = None) -> None:
        import torch

        self.tokenizer, self.probability = tokenizer, probability
        self.seed = torch.initial_seed() if seed is None else seed
        # in shared memory, because worker processes that live on for the next epoch hold a copy of the collator
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins, so that its masks are others."""
        self._epoch.fill_(epoch)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Batch of int64 tensors (rows, tokens): masked `input_ids`, `labels`, and the other columns of the rows."""
        import torch

        labels = [row["labels"] for row in rows] if "labels" in rows[0] else None
        plain = [without(row, "labels", SPECIAL) for row in rows]
        batch = dict(self.tokenizer.pad(plain, return_tensors="pt"))
        if labels is None:
            tokens = [row["input_ids"] for row in rows]
            seed = _seed(self.seed, int(self._epoch), tokens)
            batch["input_ids"], batch["labels"] = mask(batch["input_ids"], self.tokenizer, self.probability, seed)
            return batch
        width, left = batch["input_ids"].shape[1], self.tokenizer.padding_side == "left"
        padded = []
        for row in labels:
            rest = [IGNORED] * (width - len(row))
            padded.append([*rest, *row] if left else [*row, *rest])
        batch["labels"] = torch.tensor(padded)
        return batch


def masked_once(rows: Dataset, tokenizer: Any, probability: float) -> Dataset:
    """Rows with masked `input_ids` and with `labels`, whose masks follow from their tokens alone."""
    import torch

    def draw(row: dict[str, Any]) -> dict[str, Any]:
        ids = torch.tensor([row["input_ids"]])
        masked, labels = mask(ids, tokenizer, probability, _seed(row["input_ids"]))
        return {"input_ids": masked[0].tolist(), "labels": labels[0].tolist()}

    reads = [identity_of_tokenizer(tokenizer), probability]
    return map_rows(rows.remove_columns(SPECIAL), draw, reads, desc="Masking")


def mask(ids: torch.Tensor, tokenizer: Any, probability: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked tokens and labels of token ids, all (rows, tokens).

    At least one token of a row is chosen, because a row without any has no loss.
    """
    import torch
    from transformers import DataCollatorForLanguageModeling

    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability)
    collator.generator = torch.Generator().manual_seed(seed)
    masked, labels = collator.torch_mask_tokens(ids.clone())
    for row in (labels == IGNORED).all(1).nonzero().flatten().tolist():
        special = tokenizer.get_special_tokens_mask(ids[row].tolist(), already_has_special_tokens=True)
        places = [place for place, marked in enumerate(special) if not marked]
        if places:
            place = places[int(torch.randint(len(places), (), generator=collator.generator))]
            masked[row, place], labels[row, place] = tokenizer.mask_token_id, ids[row, place]
    return masked, labels


def _seed(*values: Any) -> int:
    """Seed for a generator that follows from whole numbers and lists of them."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "big") >> 1
