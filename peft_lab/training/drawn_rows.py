"""Training rows of a run that ends within its first epoch: only those that it draws are preprocessed."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import Dataset as TorchDataset
from transformers import TrainingArguments

from peft_lab.training.read_training_data import reads_training_data

if TYPE_CHECKING:
    from datasets import Dataset

#: Orders of the rows that do not depend on what is in them.
_BLIND_ORDERS = ("random", "sequential")


class DrawnRows(TorchDataset):
    """Rows that are preprocessed when they are drawn, and then kept.

    The order of a sampler is known before the training, so `read` can preprocess all of them at once. A row that is
    drawn without it is preprocessed then.

    Args:
        raw: all rows.
        prepare: function from rows to the rows as the model takes them, in the same order.
    """

    def __init__(self, raw: Dataset, prepare: Callable[[Dataset], Dataset]) -> None:
        self.raw = raw
        self._prepare = prepare
        #: Rows that were preprocessed together, and position -> number of such a part, and place in it.
        self.parts: list[Dataset] = []
        self._places: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self.raw)

    def read(self, positions: Sequence[int]) -> None:
        """Preprocess the rows at these positions, unless they are."""
        # in the order of the source, so that another run on the same rows finds what is kept on the disk
        missing = sorted(set(positions) - self._places.keys())
        if not missing:
            return
        for place, position in enumerate(missing):
            self._places[position] = len(self.parts), place
        self.parts.append(self._prepare(self.raw.select(missing)))

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """Preprocessed rows, in the order of the positions; a loader asks for a batch by this name."""
        self.read(positions)
        places = [self._places[position] for position in positions]
        return [self.parts[part][place] for part, place in places]


def draws_few(arguments: TrainingArguments, model: nn.Module, rows: Any, packed: bool) -> bool:
    """Test whether a run ends before it has drawn all its training rows, in an order that does not depend on them.

    Not so for a stream, for packing, which joins all rows, and for an adapter that reads all of them.
    """
    if not isinstance(rows, Sized) or packed or reads_training_data(model):
        return False
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    blind = str(arguments.train_sampling_strategy) in _BLIND_ORDERS
    return blind and 0 < arguments.max_steps * batch < len(rows)


def known_rows(rows: Any) -> Any:
    """Preprocessed training rows whose answers a predictor without input may know.

    Of drawn rows: labels of all rows, because they need no preprocessing; other answers of those that are drawn.
    """
    if not isinstance(rows, DrawnRows):
        return rows
    if "label" in rows.raw.column_names:
        return rows.raw.select_columns(["label"]).rename_column("label", "labels")
    from datasets import concatenate_datasets

    return concatenate_datasets(rows.parts)
