"""The files of one side of a curated set: how they are named, and that none is missing. Knows nothing of columns."""

import re
from pathlib import Path

from qlora_core.data.split import SIDES
from qlora_core.errors import DataError

SHARD = re.compile(r"(?P<side>[a-z]+)-(?P<number>\d{5,})-of-(?P<count>\d{5,})\.parquet")


def shard_name(side: str, number: int, count: int) -> str:
    """`train-00000-of-00002.parquet`: file `number`, from 0, of `count`."""
    return f"{side}-{number:05d}-of-{count:05d}.parquet"


def shard_files(folder: Path, side: str) -> list[Path]:
    """The files that hold `train`, `validation` or `test`, in the order of their rows.

    Raises DataError for another name, and for a side without files, with one missing, or with files of two writings.
    """
    if side not in SIDES:
        raise DataError(f"unknown split {side!r}; a curated set has {', '.join(SIDES)}")
    found = [match for path in folder.glob(f"{side}-*.parquet") if (match := SHARD.fullmatch(path.name))]
    what = f"{str(folder / side)!r}-*.parquet is no split of a curated set"
    if not found:
        raise DataError(f"{what}: no such file. Name the folder that `qlora curate` reports, or curate the data again")
    counts = {int(match["count"]) for match in found}
    if len(counts) > 1:
        raise DataError(f"{what}: its files say they are {sorted(counts)} in all. Curate the data again")
    [count] = counts
    missing = sorted(set(range(count)) - {int(match["number"]) for match in found})
    if missing or len(found) > count:
        fault = f"{shard_name(side, missing[0], count)} is missing" if missing else f"{len(found)} files of {count}"
        raise DataError(f"{what}: {fault}. Fetch the set again, or curate the data again")
    return [folder / shard_name(side, number, count) for number in range(count)]
