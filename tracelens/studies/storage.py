"""Results of studies as JSON files: plain fields, and tables with the types of their columns."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracelens.errors import ResultFileError
from tracelens.output import encode, reading, write_atomically

if TYPE_CHECKING:
    import pandas as pd

VERSION = 1


def table_to_dict(table: "pd.DataFrame") -> dict[str, Any]:
    """A table as JSON can hold it: NaN and infinity have no place in JSON and become None and text."""
    rows = [[_plain(value) for value in row] for row in table.itertuples(index=False, name=None)]
    return {"columns": {str(name): str(dtype) for name, dtype in table.dtypes.items()}, "rows": rows}


def table_from_dict(data: Mapping[str, Any]) -> "pd.DataFrame":
    """What `table_to_dict` gave."""
    import pandas as pd

    columns = data["columns"]
    table = pd.DataFrame(data["rows"], columns=pd.Index(list(columns)), dtype=object)
    return table.astype(dict(columns))


def restored(data: Mapping[str, Any], *tables: str) -> dict[str, Any]:
    """Fields as they were: those named in `tables` as tables again."""
    return {name: table_from_dict(value) if name in tables else value for name, value in data.items()}


def write_result(path: str | Path, kind: str, data: Mapping[str, Any]) -> Path:
    """Writes one JSON file, whole or not at all, and returns its path."""
    text = json.dumps({kind: VERSION} | encode(dict(data)), indent=1, allow_nan=False)
    return write_atomically(Path(path), text + "\n")


def read_result(path: str | Path, kind: str) -> dict[str, Any]:
    """What `write_result` wrote; raises `ResultFileError` for anything else."""
    with reading(path, f"a {kind} file that Tracelens wrote"):
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data.pop(kind) != VERSION:
            raise ResultFileError(
                f"{path} was written by another version of Tracelens; this one reads version {VERSION}"
            )
        return data


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return None if value != value else str(value) if value in (float("inf"), -float("inf")) else value
    return value
