"""Runner of a comparison.

Any process may be killed at any time; the same command goes on from there.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from peft_lab.adapter_files.names import write_json
from peft_lab.comparison.records.results import (
    COMPARISON,
    RUNS,
    STUDY,
    Journal,
    append_record,
    repair,
)
from peft_lab.comparison.records.run import Record, Run
from peft_lab.comparison.records.search_budget import search_budgets
from peft_lab.comparison.run import plan
from peft_lab.comparison.run.backends import Backend, is_import_of_main, make_backend
from peft_lab.comparison.run.plan import Choice
from peft_lab.comparison.run.progress import Progress
from peft_lab.comparison.run.worker import Job, Start, lock_file, one_line, record_of
from peft_lab.comparison.study import parameter_budget
from peft_lab.comparison.study.schema import load_study
from peft_lab.comparison.study.study import Arm, Cell, Study
from peft_lab.errors import ConfigError, WriteError
from peft_lab.runs.run_config import dump_yaml
from peft_lab.utils.atomic_files import check_can_be_made, write_errors, write_text
from peft_lab.utils.interruption import going_on

if TYPE_CHECKING:
    import pandas as pd

#: Seconds between two looks at what other processes have done.
POLL = 0.5


@dataclass(frozen=True)
class Comparison:
    """Result of a comparison.

    Attributes:
        folder: its folder, with results.jsonl, the runs and the report.
        study: the study.
        records: of all its runs.
        choices: result of each arm's search on each cell.
        unfinished: number of runs that were not made because the time was over.
        report: the report's page; None if none was written.
    """

    folder: Path
    study: Study
    records: list[Record]
    choices: list[Choice]
    unfinished: int = 0
    report: Path | None = None

    @property
    def failed(self) -> list[Record]:
        """Records of the runs that failed."""
        return [record for record in self.records if not record.ok]

    def frame(self, stage: str | None = None) -> pd.DataFrame:
        """Runs as a pandas DataFrame, one row each: settings, scores, measures, times.

        Args:
            stage: "search" or "final" for the runs of that stage alone; None for all.
        """
        from peft_lab.comparison.records.run_frame import results_frame

        return results_frame(self.records, stage)


def compare(
    study: Study | Mapping[str, Any] | str | Path,
    output_dir: str | Path | None = None,
    *,
    workers: int | None = None,
    backend: str | Backend = "local",
    address: str | None = None,
    retry_failed: bool = False,
    deadline: float | None = None,
    report: bool = True,
) -> Comparison:
    """Compare methods by a study: a search, then final runs.

    The search sees the validation rows.

    The final runs see the test rows once. The same call goes on with a comparison that was interrupted. A script must
    call this below `if __name__ == "__main__":`, because its runs are processes of their own.

    Args:
        study: a study, its mapping, or its YAML file.
        output_dir: the comparison's folder, "comparisons/NAME" by default.
        workers: runs at once; by default one for each GPU, else one for every two cores.
        backend: "local", "ray", or an object with `workers`, `submit` and `close`.
        address: of a Ray cluster.
        retry_failed: make the failed runs again.
        deadline: `time.monotonic()` from which no run is started and those under way are ended.
        report: write report.html and what belongs to it.

    Raises:
        ConfigError, TaskError: the study is not what it should be; a failing run raises nothing.
        WriteError: the folder cannot be written; the same call goes on once it can.
    """
    # a child imports the user's script; without this it would start the comparison again
    if is_import_of_main():
        raise ConfigError('A script that compares must do so below `if __name__ == "__main__":`.')
    study = load_study(study)
    folder = Path(output_dir or Path("comparisons") / study.name).expanduser().absolute()
    with going_on(lambda: _how_to_go_on(folder)), write_errors(folder):
        _open(folder, study)
        carrier = make_backend(backend, workers, address) if isinstance(backend, str) else backend
        try:
            runner = _Runner(study, folder, carrier, retry_failed, deadline)
            runner.execute(runner.groups(), plan.count_runs(study))
        finally:
            # a backend that the caller made is the caller's to close
            if isinstance(backend, str):
                carrier.close()
        page = _report(folder) if report and any(record.ok for record in runner.records()) else None
    return Comparison(folder, study, runner.records(), runner.choices, runner.unfinished, page)


def carry_out(
    study: Study,
    folder: Path,
    backend: Backend,
    waves: Sequence[Generator[list[Run], Sequence[Record], Choice]],
    deadline: float | None = None,
) -> list[Record]:
    """Carry out runs beside those of the study, such as pilot runs.

    Args:
        study: the study in whose folder they are recorded.
        folder: that folder.
        backend: where they run.
        waves: generators of runs, like `plan.arm_runs`.
        deadline: as for `compare`.
    """
    with going_on(lambda: _how_to_go_on(folder)), write_errors(folder):
        _open(folder, study)
        runner = _Runner(study, folder, backend, False, deadline)
        runner.execute([_ArmRuns(each) for each in waves])
    return runner.records()


def _open(folder: Path, study: Study) -> None:
    """Prepare the folder: empty, or with a comparison of that name."""
    if folder.is_file():
        raise ConfigError(f'output_dir "{folder}" is a file; name a folder.')
    check_can_be_made(folder / STUDY)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / STUDY).is_file():
        raise ConfigError(f'output_dir "{folder}" is not empty and holds no comparison; choose another --output_dir.')
    if (folder / STUDY).is_file():
        name = load_study(folder / STUDY).name
        if name != study.name:
            raise ConfigError(
                f'output_dir "{folder}" holds the comparison "{name}", not "{study.name}"; choose another --output_dir.'
            )
    # first, because a folder without it is taken for something else when the command is repeated
    write_text(folder / STUDY, dump_yaml(study.to_dict()))
    (folder / RUNS).mkdir(exist_ok=True)
    # taken once now, so that a lock that cannot be opened is found before any work
    with FileLock(folder / f"{COMPARISON}.lock"):
        repair(folder)


def _how_to_go_on(folder: Path) -> str:
    """Sentence for a comparison that is stopped."""
    journal = Journal(folder)
    journal.read()
    return f"Stopped with {len(journal.records)} runs recorded in {folder}; the same command goes on."


def _report(folder: Path) -> Path:
    from peft_lab.comparison.report.report import write_report

    return write_report(folder)


class _ArmRuns:
    """Runs of one arm on one cell, in waves."""

    def __init__(self, waves: Generator[list[Run], Sequence[Record], Choice]) -> None:
        self._waves = waves
        # a generator takes records only once it waits at its first yield
        self.wave: list[Run] = next(waves)
        self.choice: Choice | None = None

    def advance(self, records: Sequence[Record]) -> None:
        """Take the records of the wave.

        Afterwards `wave` is the next one, or `choice` is the result.
        """
        try:
            self.wave = self._waves.send(records)
        except StopIteration as stop:
            self.wave, self.choice = [], stop.value


class _Runner:
    """Loop that submits runs by what results.jsonl holds."""

    def __init__(
        self, study: Study, folder: Path, backend: Backend, retry_failed: bool, deadline: float | None
    ) -> None:
        self.study, self.folder, self.backend, self.deadline = study, folder, backend, deadline
        self.journal = Journal(folder)
        self.journal.read()
        # only failures that are there now are tried again, or the runs that always fail would never end
        self.retry_until = self.journal.lines if retry_failed else 0
        self.running: dict[Future[None], Run] = {}
        self.planned: dict[str, Run] = {}
        self.started: dict[str, Start] = {}
        self.shown: set[str] = set()
        self.choices: list[Choice] = []
        self.unfinished = 0

    def records(self) -> list[Record]:
        """Records of the runs of this comparison."""
        return [record for record in self.journal.records.values() if record.id in self.planned]

    def groups(self) -> list[_ArmRuns]:
        """Runs of every arm on every cell."""
        sizes = self._sizes()
        groups = []
        for cell, arm in self._pairs():
            sized = sizes.get((cell.task, cell.backbone, arm.label))
            groups.append(_ArmRuns(plan.arm_runs(self.study, cell, arm, sized)))
        return groups

    def execute(self, groups: Sequence[_ArmRuns], total: int = 0) -> None:
        """Make all runs, or those that the deadline leaves time for.

        `total` is their number if it is known.
        """
        for group in groups:
            # the check also notes these runs as planned, which makes them part of the comparison
            plan.check_distinct(group.wave, self.planned)
        with Progress(self.study.name, total or len(self.planned), self.backend.workers) as self.progress:
            waiting = self._advance(groups)
            if not self._over():
                self.progress.kept(len(self.shown))
            while not self._over() and any(group.choice is None for group in groups):
                self._submit(waiting)
                self._wait()
                self._show_running()
                waiting = self._advance(groups)
        self.journal.read()  # records that were renamed
        planned = itertools.chain.from_iterable(group.wave for group in groups)
        self.unfinished = sum(self._record(run) is None for run in planned)
        self.choices = [group.choice for group in groups if group.choice is not None]
        self._write()

    def _pairs(self) -> list[tuple[Cell, Arm]]:
        return list(itertools.product(self.study.cells, self.study.arms))

    def _over(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def _record(self, run: Run) -> Record | None:
        """Record of the run; None if it is to be made."""
        return self.journal.standing(run.id, self.retry_until)

    def _advance(self, groups: Sequence[_ArmRuns]) -> list[Run]:
        """Read new records, advance groups; returns runs without a record."""
        self.journal.read()
        waiting = []
        for group in groups:
            # a comparison that goes on may find the records of several waves at once
            while group.wave:
                records = [self._record(run) for run in group.wave]
                found = [record for record in records if record is not None]
                self._show(found)
                if len(found) < len(group.wave):
                    break
                group.advance([self._relabelled(run, record) for run, record in zip(group.wave, found, strict=True)])
                plan.check_distinct(group.wave, self.planned)
                self.progress.more(sum(run.beyond for run in group.wave))
            # written at every choice, because this process may be killed before the end
            if group.choice is not None and group.choice not in self.choices:
                self.choices.append(group.choice)
                self._write()
            waiting += [run for run in group.wave if self._record(run) is None]
        return waiting

    def _show(self, records: Sequence[Record]) -> None:
        """Show the records that have not been shown yet."""
        for record in records:
            if record.id not in self.shown:
                self.shown.add(record.id)
                self.progress.done(record, fresh=record.id in self.started)

    def _relabelled(self, run: Run, record: Record) -> Record:
        """Record with the names and the mark of today's study."""
        # names are not part of a run's id, so its record may bear those of an earlier study
        renamed = replace(record, study=run.study, arm=run.arm, task=run.task, beyond=run.beyond)
        if renamed != record:
            append_record(self.folder, renamed)
        return renamed

    def _submit(self, waiting: Sequence[Run]) -> None:
        """Fill the workers with runs that no process works on."""
        under_way = {run.id for run in self.running.values()}
        for run in waiting:
            if len(self.running) >= self.backend.workers or self._over():
                break
            # another process of the same comparison may be at it
            if run.id in under_way or not _is_free(lock_file(self.folder, run.id)):
                continue
            job = Job("run", str(self.folder), run, self.retry_until)
            # kept here because a process that dies cannot record its start
            self.started[run.id] = Start.now()
            self.running[self.backend.submit(job)] = run
        self._show_running()

    def _show_running(self) -> None:
        under_way = [run for future, run in self.running.items() if not future.done()]
        self.progress.running([f"{run.arm} seed {run.seed}" for run in under_way])

    def _wait(self) -> None:
        """Wait until a run ends, at most `POLL` seconds."""
        # all that is left is run by other processes
        if not self.running:
            time.sleep(POLL)
            return
        done, _ = wait(self.running, timeout=POLL, return_when=FIRST_COMPLETED)
        for future in done:
            run, error = self.running.pop(future), future.exception()
            if error is None:
                continue
            if isinstance(error, WriteError):
                raise error
            # the process died without a word, unless another one has recorded the run meanwhile
            self.journal.read()
            if self._record(run) is None and not self._over():
                values = {"status": "failed", "error": one_line(error)}
                append_record(self.folder, record_of(run, self.started[run.id], **values))

    def _sizes(self) -> dict[tuple[str, str, str], dict[str, int]]:
        """Arguments that give arms the study's number of parameters, by cell.

        Raises:
            ConfigError: an arm cannot be sized.
        """
        limit = self.study.limits.trainable_parameters
        if limit is None:
            return {}
        found = {}
        for cell, arm in self._pairs():
            name = parameter_budget.size_field(arm.method, {**arm.args, **arm.tune}, arm.size)
            run = plan.size_run(self.study, cell, arm, name, limit)
            file = parameter_budget.size_file(self.folder, run.id)
            # sizes are kept, so a comparison that goes on does not search for them again
            if not file.is_file():
                job = Job("size", str(self.folder), run, size_argument=name, limit=limit)
                self.backend.submit(job).result()
            found[cell.task, cell.backbone, arm.label] = parameter_budget.read_size(file)
        return found

    def _write(self) -> None:
        """Write comparison.json: runs of the comparison, choices, and search budgets."""
        budgets = search_budgets(self.records())
        values = {
            "runs": list(self.planned),
            "choices": [asdict(choice) for choice in self.choices],
            "budgets": [asdict(budget) for budget in budgets],
            "equal_budgets": self._equal_budgets(),
        }
        # processes of one comparison share the partial file, so they take turns
        with FileLock(self.folder / f"{COMPARISON}.lock"):
            write_json(self.folder / COMPARISON, values)

    def _equal_budgets(self) -> bool:
        """Test whether all arms of each cell had equal searches.

        Runs beyond an edge are left out.
        """
        by_cell: dict[tuple[str, str], set[tuple[int, int]]] = {}
        for budget in search_budgets(record for record in self.records() if not record.beyond):
            by_cell.setdefault((budget.task, budget.backbone), set()).add((budget.trials, budget.steps))
        return all(len(budgets) == 1 for budgets in by_cell.values())


def _is_free(file: Path) -> bool:
    """Test whether no process holds a run's lock."""
    try:
        # only a look: the run's process takes the lock itself and gives way if another was faster
        with FileLock(file, timeout=0):
            return True
    except Timeout:
        return False
