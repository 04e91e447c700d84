"""Read passages by row from a memory-mapped Arrow file; only requested passages are held in RAM.

Owner of `passages.arrow` inside an index: an Arrow IPC file of record batches of equal size (the last may be
shorter), columns `id`, `title`, `text`, in the order of the index's rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from rag_core.corpus.formats.rows import first_line
from rag_core.corpus.passages import Passage
from rag_core.errors import ArtifactError

BATCH_ROWS = 4096
SCHEMA = pa.schema([("id", pa.string()), ("title", pa.string()), ("text", pa.string())])


def write_passage_store(tables: Iterable[pa.Table], out_file: Path) -> int:
    """Write tables with columns id, title, text as one row-addressable file; return the number of rows."""
    rows = 0
    pending: pa.Table = SCHEMA.empty_table()
    with pa.OSFile(str(out_file), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for table in tables:
            pending = pa.concat_tables([pending, table.select(SCHEMA.names).cast(SCHEMA)])
            whole = pending.num_rows // BATCH_ROWS * BATCH_ROWS
            for batch in pending.slice(0, whole).combine_chunks().to_batches(max_chunksize=BATCH_ROWS):
                writer.write_batch(batch)
            rows += whole
            pending = pending.slice(whole)
        for batch in pending.combine_chunks().to_batches():
            writer.write_batch(batch)
    return rows + pending.num_rows


class PassageStore:
    """Row access to a `passages.arrow`. Opening maps the file and reads only where its record batches are.

    Raises:
        ArtifactError: the file is not such a store. The content of a record batch is checked when its first row is
            read, because Arrow does not check the offsets in a file and follows them into any memory.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        with self._damage_as_error():
            self._reader = pa.ipc.open_file(pa.memory_map(str(file)))
            if not self._reader.schema.equals(SCHEMA):
                raise self._damaged(f"its columns are {self._reader.schema.names}, not {SCHEMA.names}")
            batches = self._reader.num_record_batches
            last = self._reader.get_batch(batches - 1).num_rows if batches else 0
        self._rows = max(batches - 1, 0) * BATCH_ROWS + last
        # Columns of the record batches read so far, as views of the map: getting them costs more than reading a row.
        self._columns: dict[int, list[pa.Array]] = {}

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> Passage:
        """The passage at a row; raises IndexError outside 0 … len − 1, ArtifactError if its record batch is damaged."""
        if not 0 <= row < self._rows:
            raise IndexError(f"row {row} of {self._rows} passages")
        number, place = divmod(row, BATCH_ROWS)
        columns = self._columns.get(number)
        if columns is None:
            columns = self._columns[number] = self._checked_columns(number)
        return Passage(*(column[place].as_py() for column in columns))

    def take(self, rows: Sequence[int]) -> list[Passage]:
        """The passages at some rows, in the requested order."""
        return [self[int(row)] for row in rows]

    def ids_among(self, wanted: Set[str]) -> set[str]:
        """The members of `wanted` that are ids of passages. All ids are read, a record batch at a time."""
        values, matches = pa.array(sorted(wanted), pa.string()), set[str]()
        for number in range(self._reader.num_record_batches):
            ids = self._checked_columns(number)[0]
            matches |= set(ids.filter(pc.is_in(ids, value_set=values)).to_pylist())
        return matches

    def _checked_columns(self, number: int) -> list[pa.Array]:
        with self._damage_as_error():
            batch = self._reader.get_batch(number)
            batch.validate(full=True)
        expected = min(BATCH_ROWS, self._rows - number * BATCH_ROWS)
        if batch.num_rows != expected or any(column.null_count for column in batch.columns):
            raise self._damaged(f"record batch {number} has nulls, or not {expected} rows")
        return [batch.column(name) for name in SCHEMA.names]

    @contextlib.contextmanager
    def _damage_as_error(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._damaged(first_line(error)) from error

    def _damaged(self, reason: str) -> ArtifactError:
        return ArtifactError(f"{self._file} cannot be read: {reason}. Build the index again, or copy it again.")
