"""BLEU of a corpus by sacrebleu, from counts of each row.

BLEU is a function of sums of counts over the rows and no mean over them, so that the counts of each row are what is
kept: the metric of any choice of rows follows from them, which the jackknife needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_ORDER = 4
#: Columns of the counts: words of the text and of the reference, n-grams that are in both, n-grams of the text.
COLUMNS = (
    *("bleu_length", "bleu_reference_length"),
    *(f"bleu_hits_{order}" for order in range(1, _ORDER + 1)),
    *(f"bleu_total_{order}" for order in range(1, _ORDER + 1)),
)


def counts(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Counts of texts and their references, tokenised as mteval-v13a does, (n, columns)."""
    import numpy as np
    from sacrebleu.metrics import BLEU

    # with this option sacrebleu does not warn of single texts; it does not change the counts
    metric = BLEU(effective_order=True)
    found = np.zeros((len(predictions), len(COLUMNS)))
    for row, (text, wanted) in enumerate(zip(predictions, references, strict=True)):
        score = metric.sentence_score(text, [wanted])
        found[row] = (score.sys_len, score.ref_len, *score.counts, *score.totals)
    return found


def bleu_of_counts(sums: np.ndarray) -> np.ndarray:
    """BLEU from 0 to 100 of sums of counts, (m, columns) -> (m,)."""
    import numpy as np
    from sacrebleu.metrics import BLEU

    values = []
    for row in np.rint(sums).astype(int).tolist():
        length, reference_length, *rest = row
        found = BLEU.compute_bleu(rest[:_ORDER], rest[_ORDER:], length, reference_length, smooth_method="exp")
        values.append(found.score)
    return np.asarray(values)
