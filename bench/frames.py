"""What cuDF would do instead of our kernels: read_csv with hex columns, a group-by per column; pandas is its twin."""

import sys
from io import BytesIO
from types import ModuleType

from gpu_etl.common.packages import install_command
from gpu_etl.schema import COLUMN_NAMES, COLUMNS, FIRST_SPARSE


def choose(device: str) -> ModuleType | None:
    """cuDF for "cuda", pandas for "cpu"; None, said on stderr, where it cannot be imported."""
    try:
        if device == "cuda":
            import cudf

            return cudf
        import pandas

        return pandas
    except Exception as error:  # whatever a package does that does not fit its neighbours
        name = "cudf" if device == "cuda" else "pandas"
        print(f"{name} cannot be used, so nothing stands beside: {error}; {install_command(name)}", file=sys.stderr)
        return None


def parse(frames: ModuleType, text: bytes):
    """A frame of 40 columns of a slab of text: the label and the integers (null where empty), the categories as
    numbers (0 where empty)."""
    names, hexes = list(COLUMN_NAMES), COLUMN_NAMES[FIRST_SPARSE:]
    numbers = {name: "Int32" if frames.__name__ == "pandas" else "int32" for name in names[:FIRST_SPARSE]}
    settings = {"sep": "\t", "header": None, "names": names}
    if frames.__name__ == "cudf":  # it reads hex columns itself
        return frames.read_csv(BytesIO(text), dtype=numbers | dict.fromkeys(hexes, "hex"), **settings)
    frame = frames.read_csv(BytesIO(text), dtype=numbers | dict.fromkeys(hexes, "str"), **settings)
    for name in hexes:
        frame[name] = frame[name].map(lambda digits: int(digits, 16), na_action="ignore").fillna(0).astype("int64")
    return frame


def count(frames: ModuleType, frame) -> list:
    """Of each category column a frame by value: its count and the first row it is in."""
    frame = frame.assign(row=range(len(frame))) if frames.__name__ == "pandas" else frame.reset_index(names="row")
    return [frame.groupby(name).agg({"row": ["count", "min"]}) for name in COLUMN_NAMES[FIRST_SPARSE:COLUMNS]]
