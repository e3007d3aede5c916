"""Report of an incremental protocol: CSV, JSON, Markdown and the curve of accuracies."""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from peft_lab.protocols.incremental_metrics import BOUNDS, SUMMARIES, over_orders
from peft_lab.utils import strict_json
from peft_lab.utils.atomic_files import new_file, write_text

RESULTS, CSV, MARKDOWN, JSON, CURVE = "results.jsonl", "results.csv", "report.md", "report.json", "curve.png"

#: Values of a step in results.csv.
_OF_STEP = ("accuracy", "base", "new", "harmonic")


def write_report(
    folder: Path,
    records: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    facts: Mapping[str, Any],
    draws: bool = True,
) -> list[dict[str, Any]]:
    """Write all files of a report, and return the rows of its table.

    Args:
        folder: where to.
        records: one for each method and order.
        options: of the protocol.
        facts: on data and machine.
        draws: draw the curve too, if matplotlib is installed.
    """
    rows = summary_rows(records)
    write_text(folder / CSV, _csv(records))
    whole = {"options": dict(options), **facts, "summary": rows, "curves": curves(records)}
    write_text(folder / JSON, strict_json.dumps(whole, indent=2) + "\n")
    if draws and records and importlib.util.find_spec("matplotlib") is not None:
        _draw(folder / CURVE, curves(records), len(facts["groups"]))
    write_text(folder / MARKDOWN, _markdown(records, rows, options, (folder / CURVE).is_file()))
    return rows


def summary_rows(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over orders with their 95 % intervals, a row for each method, the best average first."""
    rows = []
    for method in dict.fromkeys(record["method"] for record in records):
        own = [record for record in records if record["method"] == method]
        kept = any(record.get("keeps_features") for record in own)
        row: dict[str, Any] = {"method": method, "orders": len(own), "keeps_features": kept}
        for name in SUMMARIES:
            value, low, high = over_orders([record[name] for record in own], BOUNDS[name])
            row[name] = {"value": value, "low": low, "high": high}
        row["seconds"] = sum(record["seconds"] for record in own) / len(own)
        rows.append(row)
    return sorted(rows, key=lambda row: -row["average"]["value"])


def curves(records: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Accuracy after each session by method, with its mean and interval over orders."""
    found: dict[str, list[dict[str, Any]]] = {}
    for method in dict.fromkeys(record["method"] for record in records):
        own = [record for record in records if record["method"] == method]
        points = []
        for number in range(len(own[0]["steps"])):
            value, low, high = over_orders([record["steps"][number]["accuracy"] for record in own])
            # orders may differ in the classes of a session, never in their number
            seen = sum(len(part) for part in own[0]["sessions"][: number + 1])
            points.append({"session": number + 1, "seen": seen, "value": value, "low": low, "high": high})
        found[method] = points
    return found


def _csv(records: Sequence[Mapping[str, Any]]) -> str:
    """One line for each method, order and session."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "order", "session", "seen", *_OF_STEP])
    for record in records:
        seen = 0
        for number, step in enumerate(record["steps"]):
            seen += len(record["sessions"][number])
            values = [_cell(step[name]) for name in _OF_STEP]
            writer.writerow([record["method"], record["order"], number + 1, seen, *values])
    return text.getvalue()


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def interval(value: Mapping[str, float | None]) -> str:
    """Format a mean with its interval: `0.812 [0.790, 0.834]`; without one for one order."""
    if value["low"] is None:
        return f"{value['value']:.3f}"
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _markdown(
    records: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], options: Mapping[str, Any], drawn: bool
) -> str:
    what, several = ("Domain", "domains") if options.get("domain_column") else ("Class", "classes")
    source = "the frozen backbone"
    if options.get("adapter"):
        when = "first session" if options["adapt"] == "first" else "session that comes"
        source = f"the backbone with {options['adapter']}, trained on the {when}"
    lines = [
        f"# {what}-incremental: {Path(str(options['task'])).stem}",
        "",
        f"{options['steps']} sessions on {Path(str(options['model_name_or_path'])).name}; estimators read the features "
        f"of {source}. No row of an earlier session is kept. Means over orders of the {several}, with 95 % intervals "
        "by Student's t.",
    ]
    keeping = [row["method"] for row in rows if row["keeps_features"]]
    if keeping:
        lines[-1] += f" Fitted anew to the kept features of all sessions: {', '.join(keeping)}."
    head = ["method", *SUMMARIES.values(), "orders", "seconds an order"]
    lines += ["", _line(head), _line(["-", *["-:"] * (len(head) - 1)])]
    for row in rows:
        cells = [interval(row[name]) for name in SUMMARIES]
        lines.append(_line([row["method"], *cells, str(row["orders"]), f"{row['seconds']:.1f}"]))
    lines += ["", "What methods share, features or an adapter, is in the seconds of the first of them that needs it."]
    found = curves(records)
    if found:
        points = next(iter(found.values()))
        lines += ["", "## Accuracy over all that has been seen", ""]
        lines += [_line(["method", *[str(point["seen"]) for point in points]]), _line(["-", *["-:"] * len(points)])]
        for row in rows:
            lines.append(_line([row["method"], *[f"{point['value']:.3f}" for point in found[row["method"]]]]))
    if drawn:
        lines += ["", f"![Accuracy after each session]({CURVE})"]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _draw(path: Path, found: Mapping[str, Sequence[Mapping[str, Any]]], total: int) -> None:
    """Draw the accuracies after each session, with intervals over orders as bars side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.2), layout="constrained")
    axes = figure.subplots()
    markers = "os^DvPX<>p"
    sessions = [point["seen"] for point in next(iter(found.values()))]
    step = 0.35 * min(after - before for before, after in pairwise(sessions)) / len(found)
    for number, (method, points) in enumerate(found.items()):
        at = [point["seen"] + step * (number - (len(found) - 1) / 2) for point in points]
        values = [point["value"] for point in points]
        lengths = None
        if points[0]["low"] is not None:
            below = [point["value"] - point["low"] for point in points]
            lengths = [below, [point["high"] - point["value"] for point in points]]
        marker = markers[number % len(markers)]
        axes.errorbar(at, values, lengths, marker=marker, markersize=4, elinewidth=0.8, capsize=2, label=method)
    axes.set_xlabel(f"classes or domains seen, of {total}", fontsize=9)
    axes.set_ylabel("accuracy over all seen", fontsize=9)
    axes.set_xticks(sessions)
    axes.set_ylim(0, 1)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    with new_file(path) as partial:
        figure.savefig(partial, dpi=170, format="png")
