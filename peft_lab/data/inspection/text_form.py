"""Form of text files: encoding, delimiter, quotes, and a header that is none."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from peft_lab.data.profile import is_number
from peft_lab.data.read_files import guess_encoding, unpacked

#: Characters that separate cells, in the order in which they are tried.
_DELIMITERS = (",", "\t", ";", "|")
#: Lines that are looked at.
_LINES = 20_000


def csv_options(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Options by which a csv file is read, and doubts about them."""
    options, doubts = text_options(path)
    beginning = _beginning(path, options.get("encoding", "utf-8-sig"))
    delimiters = ("\t", *_DELIMITERS) if ".tsv" in path.name.lower() else _DELIMITERS
    delimiter, quoting, lines = _cells(beginning, delimiters)
    if delimiter != ",":
        options["delimiter"] = delimiter
    if quoting == csv.QUOTE_NONE:
        options["quoting"] = "none"
    if lines and _is_row(lines[0], lines[1:]):
        names = [f"column_{index + 1}" for index in range(len(lines[0]))]
        options["column_names"] = names
        doubts.append(
            f'the first line of "{path.name}" looks like a row and not like names ({", ".join(lines[0])[:60]}), so '
            f"that the columns are called {names[0]}, ...; name them in column_names"
        )
    return options, doubts


def text_options(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Encoding of a text file that is not UTF-8, and a doubt about it."""
    encoding = guess_encoding(unpacked(str(path))[0])
    if encoding is None:
        return {}, []
    return {"encoding": encoding}, [f'"{path.name}" is not UTF-8 and is read as {encoding}: look at its accents']


def _beginning(path: Path, encoding: str) -> str:
    """First lines of a file."""
    with open(unpacked(str(path))[0], encoding=encoding, errors="replace", newline="") as file:
        return "".join(islice(file, _LINES))


def _cells(text: str, delimiters: Sequence[str]) -> tuple[str, Literal[0, 3], list[list[str]]]:
    """Delimiter, quoting and rows of the first form in which all rows have as many cells, more than one."""
    for delimiter in delimiters:
        for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE):
            rows = _parsed(text, delimiter, quoting)
            widths = {len(row) for row in rows or ()}
            if rows and len(widths) == 1 and widths != {1}:
                return delimiter, quoting, rows
    return ",", csv.QUOTE_MINIMAL, _parsed(text, ",", csv.QUOTE_MINIMAL) or []


def _parsed(text: str, delimiter: str, quoting: Literal[0, 3]) -> list[list[str]] | None:
    """Rows of a text; None if its quotes are not those of csv."""
    # the module's own limit of 128 kB would refuse long texts
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    rows = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    try:
        for row in reader:
            if row:
                rows.append(row)
    except csv.Error as error:
        # a quoted cell may go on behind the lines that were read
        if "unexpected end" not in str(error):
            return None
    return rows


def _is_row(header: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Test whether a first line holds values: a number, or a text that its column repeats."""
    if [cell.strip() for cell in header] == [str(index) for index in range(len(header))]:
        return False  # numbers that a program gave to columns without names
    for place, cell in enumerate(header):
        column = [row[place] for row in rows if place < len(row)]
        if is_number(cell) or (cell.strip() and column.count(cell) > 1):
            return True
        # long texts with several words are no names
        if len(re.findall(r"\w+", cell)) > 8:
            return True
    return False
