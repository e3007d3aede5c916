"""Contents of a report, as the page, the Markdown file and the LaTeX file show them."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft_lab.comparison.records.run import Record
from peft_lab.comparison.report import figures, tables

METHOD = (
    "A mean is over seeds. Its 95 % interval accounts for two sources of chance: another seed, and other test rows of "
    "the same kind. The variance of the seeds' scores over the number of seeds and the variance over the test rows "
    "(by the jackknife for metrics that are not means of rows) are added; the quantile is that of a mixture of t "
    "distributions with the degrees of freedom of each source: for 3 seeds alone, 4.3 standard errors each way.",
    "Two arms are compared on the same seeds and the same test rows, difference by difference. The variance between "
    "seeds is pooled over the arms of a table, and an arm that varies more than the others is charged for it. The "
    "p-values are two-sided and adjusted by Holm's method for all pairs of arms in a table, at a familywise level of "
    "5 %. An arm is called better only if this test separates it. The interval of a single difference is not widened "
    "for the number of pairs, so it may leave out zero where the adjusted test does not separate. In simulations the "
    "familywise error is 2 to 5 % where arms vary about alike with the seed; where one arm varies five times as much "
    "as the others and seeds outweigh test rows, it reaches 7 to 9 % at 3 seeds.",
    "The mean over tasks is over these tasks, not over tasks in general. Learning rates and other tuned arguments were "
    "chosen on validation rows; the test rows were scored by the final runs alone.",
)


#: Words of the sections that a newcomer may not know, with their meanings.
TERMS = (
    (
        "told apart, distinguishable",
        "whether the test of two arms has an adjusted p below 0.05; if not, either may be better",
    ),
    (
        "baseline",
        "a predictor that learned nothing from the inputs: the most frequent class, the mean, guessing, or the base "
        "without an adapter; a method that does not beat it is of no use here",
    ),
    (
        "Pareto front",
        "the arms of which no other is at least as good in score and in every cost, and better in one of them",
    ),
    ("tie", "the same score as it is printed; no arm of a tie is marked as the best"),
)


@dataclass
class Section:
    """Section on one task and backbone, or on all tasks.

    Attributes:
        anchor: its address in the page.
        title: its heading.
        words: the sentences on the arms.
        table: the arms with scores and measures.
        front: sentence on the Pareto front over all costs, "" without one.
        further_metrics: metrics besides the main one.
        parts: classes, agreement and rows, as far as the predictions of the runs are there.
        pictures: the figures.
    """

    anchor: str
    title: str
    words: str
    table: tables.Table | None
    front: str = ""
    further_metrics: tables.Subsection | None = None
    parts: list[tables.Subsection] = field(default_factory=list)
    pictures: list[figures.EmbeddedFigure] = field(default_factory=list)

    @property
    def subsections(self) -> list[tables.Subsection]:
        """Further metrics and the other parts, in the order of the page."""
        return [part for part in (self.further_metrics, *self.parts) if part is not None]

    @property
    def single_pictures(self) -> list[figures.EmbeddedFigure]:
        """Figures that stand by themselves."""
        return [picture for picture in self.pictures if not picture.group]

    @property
    def choices(self) -> dict[str, list[figures.EmbeddedFigure]]:
        """Title of a choice -> the figures of which the page shows one at a time."""
        found: dict[str, list[figures.EmbeddedFigure]] = {}
        for picture in self.pictures:
            if picture.group:
                found.setdefault(picture.group, []).append(picture)
        return found


@dataclass(frozen=True)
class RunGroup:
    """Runs of one arm on one task and backbone.

    Numbers link to the anchor.
    """

    anchor: str
    task: str
    backbone: str
    arm: str
    runs: tuple[RunLine, ...]


@dataclass(frozen=True)
class RunLine:
    """Line in the list of runs.

    Attributes:
        link: folder of the run as a relative address, "" if it left none.
        files: names of the files in it that the page links to.
    """

    record: Record
    score: str
    validation: str
    options: str
    link: str
    files: tuple[str, ...]


@dataclass
class Report:
    """Contents of a report."""

    title: str
    summary: str
    warnings: list[str]
    sections: list[Section]
    overall: Section | None
    budget: str
    tuning: tables.Table | None
    groups: list[RunGroup]
    failed: list[RunLine]
    facts: list[tuple[str, str]]
    data: tables.Table | None
    method: tuple[str, ...] = METHOD
    terms: tuple[tuple[str, str], ...] = TERMS

    @property
    def widest(self) -> int:
        """Largest number of columns that a table has."""
        return max((len(table.columns) for table in self._tables()), default=0)

    @property
    def most_options(self) -> int:
        """Largest number of figures of which one is shown at a time."""
        counts = [0]
        for section in self.all_sections:
            counts += [len(pictures) for pictures in section.choices.values()]
        return max(counts)

    @property
    def all_sections(self) -> list[Section]:
        """Sections on tasks, and on all tasks if there is one."""
        return [*self.sections, *([self.overall] if self.overall else [])]

    def _tables(self) -> list[tables.Table]:
        found = [self.tuning, self.data]
        for section in self.all_sections:
            found += [section.table, *(part.table for part in section.subsections)]
        return [table for table in found if table is not None]
