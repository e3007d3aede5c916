"""Intrinsic dimension from the runs of a search: the smallest d that is good enough, as table, text and picture."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Columns of a search's runs; d is 0 for the head alone and empty for full fine-tuning.
COLUMNS = ("method", "d", "learning_rate", "score", "adapter_parameters", "train_seconds")

#: d90 on MRPC and QQP, as published: (model, SAID MRPC, SAID QQP, DID MRPC, DID QQP).
PUBLISHED = (
    ("BERT-base", 1608, 8030, 1861, 9295),
    ("BERT-large", 1037, 1200, 2493, 1389),
    ("RoBERTa-base", 896, 896, 1000, 1389),
    ("RoBERTa-large", 207, 774, 322, 774),
)
_INK, _ACCENT, _FAINT = "#1d2733", "#1f5fa8", "#9aa5b1"


@dataclass(frozen=True)
class Dimension:
    """Result of a search.

    Attributes:
        metric: name of the score, greater is better.
        share: share of the full score that d must reach.
        full: best run of full fine-tuning, a row of `COLUMNS`.
        curve: best run of each d over the learning rates, by d.
    """

    metric: str
    share: float
    full: pd.Series
    curve: pd.DataFrame

    @classmethod
    def of(cls, runs: pd.DataFrame, metric: str, share: float) -> Dimension:
        """Best runs among those of a search; the first of equals."""
        best = runs.loc[runs.groupby(runs["d"].fillna(-1))["score"].idxmax()]
        return cls(metric, share, best[best["d"].isna()].iloc[0], best[best["d"].notna()].sort_values("d"))

    @property
    def target(self) -> float:
        """Score that counts as reached."""
        return self.share * float(self.full["score"])

    @property
    def found(self) -> int | None:
        """Smallest d of the search that reaches the target; None if none does."""
        # 0.9 x 0.8 is a little more than 0.72 in floating point
        reached = self.curve.loc[self.curve["score"] >= self.target - 1e-9, "d"]
        return None if reached.empty else int(reached.iloc[0])

    @property
    def name(self) -> str:
        """Name of the measure: d90 for a share of 0.9."""
        return f"d{round(100 * self.share)}"

    def sentence(self) -> str:
        """Result in one sentence."""
        goal = f"{self.share:.0%} of the {self.metric} of full fine-tuning ({self.target:.4f})"
        if self.found is None:
            largest = int(self.curve["d"].max())
            return f"No d up to {largest} reaches {goal}; try larger ones, or more steps."
        if self.found == 0:
            return f"{self.name} = 0: the head alone reaches {goal}."
        return f"{self.name} = {self.found}, the smallest d of the search that reaches {goal}."

    def document(self) -> dict[str, Any]:
        """Result as plain values."""
        rows = self.curve.to_dict("records")
        return {
            "metric": self.metric,
            "share": self.share,
            "target": self.target,
            self.name: self.found,
            "full": {"learning_rate": float(self.full["learning_rate"]), "score": float(self.full["score"])},
            "curve": [{"d": int(row["d"]), **_values(row)} for row in rows],
        }

    def page(self, settings: dict[str, Any]) -> str:
        """Result as a Markdown page."""
        full = self.full
        lines = [
            f"# Intrinsic dimension: {settings['task']}, {settings['model_name_or_path']}\n",
            f"{self.sentence()} Each line is the best of the learning rates on the validation rows.\n",
            f"| d | {self.metric} | share of full | learning rate | parameters beside the head |",
            "| -: | -: | -: | -: | -: |",
        ]
        for row in self.curve.to_dict("records"):
            share = row["score"] / full["score"] if full["score"] else float("nan")
            cells = (int(row["d"]), f"{row['score']:.4f}", f"{share:.1%}", f"{row['learning_rate']:g}")
            lines.append(f"| {' | '.join(map(str, cells))} | {int(row['adapter_parameters']):,} |")
        count = int(full["adapter_parameters"])
        lines.append(f"| full | {full['score']:.4f} | 100.0% | {full['learning_rate']:g} | {count:,} |")
        given = ", ".join(f"{key} {value}" for key, value in settings.items() if key not in ("task", "share"))
        lines += [
            "",
            "The task head is trained on top of the d numbers; d = 0 is the head alone.",
            f"Settings: {given}.\n",
            "![Score over d](intrinsic_dimension.png)\n",
            "## Published d90\n",
            "From the paper's table (arXiv 2012.13255), of other models and tasks; there the head is projected too,",
            "and runs are longer. Not measured here.\n",
            "| model | SAID, MRPC | SAID, QQP | DID, MRPC | DID, QQP |",
            "| - | -: | -: | -: | -: |",
        ]
        lines += [f"| {' | '.join(map(str, row))} |" for row in PUBLISHED]
        return "\n".join(lines) + "\n"

    def picture(self) -> bytes:
        """Picture of the score over d, as PNG."""
        from matplotlib import style

        drawn = io.BytesIO()
        # a matplotlibrc of the working directory may be anybody's, and ask for a run of LaTeX
        with style.context("default"):
            self._figure().savefig(drawn, format="png", dpi=170)
        return drawn.getvalue()

    def _figure(self) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4, 3), facecolor="white", layout="constrained")
        axes: Any = figure.subplots()
        # on this axis 0, the head alone, has a place before the powers of ten
        axes.set_xscale("symlog", linthresh=1)
        axes.plot(self.curve["d"], self.curve["score"], "o-", color=_ACCENT, label="best learning rate")
        axes.axhline(float(self.full["score"]), color=_INK, linewidth=1, label="full fine-tuning")
        axes.axhline(self.target, color=_INK, linewidth=1, linestyle="--", label=f"{self.share:.0%} of it")
        if self.found is not None:
            axes.axvline(self.found, color=_FAINT, linewidth=1, linestyle=":", label=f"{self.name} = {self.found}")
        axes.set_xlabel("d", size=9, color=_INK)
        axes.set_ylabel(f"validation {self.metric}".replace("_", " "), size=9, color=_INK)
        axes.tick_params(labelsize=8, colors=_INK)
        axes.legend(fontsize=8, frameon=False, loc="lower right")
        return figure


def _values(row: dict[Any, Any]) -> dict[str, Any]:
    names = ("learning_rate", "score", "train_seconds")
    return {**{name: float(row[name]) for name in names}, "adapter_parameters": int(row["adapter_parameters"])}
