"""Windows over contexts that are longer than a model takes, and the answers found in them.

A window holds the question and a part of the context. Neighbours share some tokens, so that an answer that one window
cuts stands whole in another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_lab.data.text_inputs import length_limit
from peft_lab.errors import TaskError

if TYPE_CHECKING:
    import numpy as np

    from peft_lab.data.task_schema import Task

MAX_LENGTH = 384
#: Answers of a row that its score is taken among, as in the script of transformers.
_BEST = 20


@dataclass(frozen=True)
class Window:
    """One window of a row.

    Attributes:
        inputs: arguments of a model's forward, such as `input_ids`.
        first: place of the first token of the context.
        starts, ends: for each token of the context, its first character and the one behind its last.
        null: place that stands for "no answer": the token for the whole sequence, or the first one.
    """

    inputs: dict[str, list[int]]
    first: int
    starts: list[int]
    ends: list[int]
    null: int


@dataclass(frozen=True)
class WindowedRow:
    """Windows of one row.

    Attributes:
        windows: the windows, in order.
        cuts_question: True if the question is longer than half the limit, and has lost its end.
    """

    windows: list[Window]
    cuts_question: bool


@dataclass(frozen=True)
class FoundAnswer:
    """Answer found in a context.

    Attributes:
        text: the answer; empty for none.
        score: probability among the best answers.
        start, end: its first character and the one behind its last; both 0 for none.
    """

    text: str
    score: float
    start: int
    end: int


@dataclass(frozen=True)
class Windows:
    """Maker of windows.

    Attributes:
        processor: a fast tokenizer.
        limit: tokens of a window.
        stride: tokens of the context that neighbours share; less where the question leaves no room for them.
    """

    processor: Any
    limit: int
    stride: int

    @classmethod
    def of(cls, task: Task, processor: Any, model: Any) -> Windows:
        """Windows of a task.

        Raises `TaskError` if a window has no room for question and context.
        """
        limit, own = length_limit(task, MAX_LENGTH, processor, model), processor.num_special_tokens_to_add(True)
        # half of a window is the most that a question takes
        if limit - own < 4:
            raise TaskError(
                f'Task "{task.name}": {limit} tokens have no room for question and context beside the {own} of the '
                'tokenizer; raise "max_length".'
            )
        return cls(processor, limit, int(task.options["doc_stride"]))

    def of_row(self, question: str, context: str) -> WindowedRow:
        """Windows of a question and its context."""
        room = self.limit - self.processor.num_special_tokens_to_add(True)
        alone = self.processor(question, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        count, most = len(alone["input_ids"]), room // 2
        if count > most:
            question, count = question[: alone["offset_mapping"][most - 1][1]], most
        stride = min(self.stride, (room - count) // 2)
        # the tokenizer writes windows itself, with the special tokens of each
        found = self.processor(
            question,
            context,
            truncation="only_second",
            max_length=self.limit,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        windows = [self._window(found, index) for index in range(len(found["input_ids"]))]
        return WindowedRow(windows, len(alone["input_ids"]) > most)

    def _window(self, found: Any, index: int) -> Window:
        extra = ("offset_mapping", "overflow_to_sample_mapping")
        inputs = {name: list(values[index]) for name, values in found.items() if name not in extra}
        places = [place for place, part in enumerate(found.sequence_ids(index)) if part == 1]
        offsets = [found["offset_mapping"][index][place] for place in places]
        ids, special = inputs["input_ids"], self.processor.cls_token_id
        null = ids.index(special) if special in ids else 0
        first = places[0] if places else len(ids)
        return Window(inputs, first, [start for start, _ in offsets], [end for _, end in offsets], null)


def answer_places(window: Window, start: int, end: int) -> tuple[int, int] | None:
    """Places of the first and the last token of an answer in a window; None if it does not stand there whole.

    Args:
        window: the window.
        start, end: first character of the answer, and the one behind its last.
    """
    if not window.starts or start < window.starts[0] or end > window.ends[-1]:
        return None
    first = max(place for place, begin in enumerate(window.starts) if begin <= start)
    last = min(place for place, stop in enumerate(window.ends) if stop >= end)
    # an answer between two tokens has none of its own
    return (window.first + first, window.first + last) if first <= last else None


def best_answer(
    context: str,
    windows: Sequence[Window],
    start_logits: Sequence[np.ndarray],
    end_logits: Sequence[np.ndarray],
    most_tokens: int,
    may_be_none: bool,
) -> FoundAnswer:
    """Answer with the highest sum of start and end logit over all windows of a row.

    Args:
        context: the context.
        windows: its windows.
        start_logits, end_logits: logits of each window, (t,).
        most_tokens: tokens that an answer has at most.
        may_be_none: the answer may be none, whose logits are the lowest sum over windows at their null place.
    """
    import numpy as np
    from scipy.special import softmax

    candidates: list[tuple[float, int, int]] = []
    for window, starts, ends in zip(windows, start_logits, end_logits, strict=True):
        candidates += _candidates(window, np.asarray(starts, float), np.asarray(ends, float), most_tokens)
    candidates = sorted(candidates, key=lambda each: -each[0])[:_BEST]
    if may_be_none or not candidates:
        pairs = zip(windows, start_logits, end_logits, strict=True)
        null = min(float(starts[window.null]) + float(ends[window.null]) for window, starts, ends in pairs)
        # before those of the same score, so that no answer is made up at a tie
        candidates = sorted([(null, 0, 0), *candidates], key=lambda each: -each[0])
    _, start, end = candidates[0]
    probability = float(softmax([each[0] for each in candidates])[0])
    # tokens of some tokenizers hold the space before a word
    text = context[start:end]
    start += len(text) - len(text.lstrip())
    text = text.strip()
    return FoundAnswer(text, probability, start if text else 0, start + len(text) if text else 0)


def _candidates(window: Window, starts: np.ndarray, ends: np.ndarray, most: int) -> list[tuple[float, int, int]]:
    """Best answers within a window: score, first character, and the one behind the last."""
    import numpy as np

    count = len(window.starts)
    if not count:
        return []
    inside = slice(window.first, window.first + count)
    # row i holds the ends of answers that begin at token i, as many as an answer may have tokens
    width = min(most, count)
    padded = np.concatenate([ends[inside], np.full(width - 1, -np.inf)])
    scores = starts[inside][:, None] + np.lib.stride_tricks.sliding_window_view(padded, width)
    best = np.argsort(-scores, axis=None, kind="stable")[:_BEST]
    found = []
    for first, length in zip(*np.unravel_index(best, scores.shape), strict=True):
        if np.isfinite(scores[first, length]):
            found.append((float(scores[first, length]), window.starts[first], window.ends[first + length]))
    return found
