"""The survey as files for programs: a table in CSV, and one JSON document, both written row by row.

Owns their form, which docs/file_formats.md describes.
"""

from __future__ import annotations

import csv
import json
from typing import IO, TextIO

from aiprod_ds.survey.rows import CSV_COLUMNS, Row
from aiprod_ds.survey.run import Survey

FORMAT = 1


class CsvWriter:
    """Writes a line for each file that was looked into.

    Args:
        file: Open for writing text, with no translation of line ends.
    """

    def __init__(self, file: TextIO) -> None:
        self._writer = csv.writer(file)
        self._writer.writerow(CSV_COLUMNS)

    def row(self, row: Row) -> None:
        """See `Writer`."""
        self._writer.writerow([_cell(value) for value in row.cells()])

    def ignored(self, path: str, reason: str) -> None:
        """See `Writer`; these stand in the JSON document."""


class JsonWriter:
    """Writes the document, whose `files` and `ignored` may be long; call `finish` at the end.

    Args:
        file: Open for writing text.
        ignored: An empty text file, open for writing and reading, in which ignored files wait.
    """

    def __init__(self, file: IO[str], ignored: IO[str]) -> None:
        self._file, self._ignored = file, ignored
        self._begins = {file: True, ignored: True}
        file.write(f'{{"format": {FORMAT}, "files": [')

    def row(self, row: Row) -> None:
        """See `Writer`."""
        self._item(self._file, json.dumps(row.document()))

    def ignored(self, path: str, reason: str) -> None:
        """See `Writer`."""
        self._item(self._ignored, json.dumps({"path": path, "reason": reason}))

    def finish(self, survey: Survey) -> None:
        """Writes what is known at the end."""
        self._file.write('\n], "ignored": [')
        self._ignored.seek(0)
        self._file.writelines(self._ignored)
        configuration = survey.demands.configuration
        rest = {
            "source": str(survey.source),
            "configuration": None if configuration is None else str(configuration),
            "copies": survey.num_copies,
            "summary": survey.tally.document(),
        }
        self._file.write(f"\n], {json.dumps(rest, indent=1)[1:]}\n")

    def _item(self, file: IO[str], text: str) -> None:
        file.write(f"\n{text}" if self._begins[file] else f",\n{text}")
        self._begins[file] = False


def _cell(value: object) -> object:
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, str):
        # What a spreadsheet would take for a formula, and characters that no file may hold.
        text = value.encode("utf-8", "backslashreplace").decode("utf-8")
        return f"'{text}" if text[:1] in ("=", "+", "@", "\t") else text
    return "" if value == 0 else value
