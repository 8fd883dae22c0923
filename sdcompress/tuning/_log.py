"""Where the loss goes while it falls: a CSV file, or TensorBoard."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sdcompress.errors import UsageError

COLUMNS = ("step", "loss", "learning_rate", "seconds")
Write = Callable[[int, float, float, float], None]


def log_path(out: Path, kind: str) -> Path:
    """Beside the bundle: the times in it must not change the bundle's digest."""
    return out.with_name(f"{out.name}.{'csv' if kind == 'csv' else 'tensorboard'}")


@contextmanager
def open_log(path: Path, kind: str, done: int) -> Iterator[Write]:
    """A function that logs one step: its number from 1, loss, learning rate, seconds.

    What an earlier process logged stays up to step `done`; later rows are of steps that are made
    again.

    Raises:
        UsageError: TensorBoard is asked for and not installed.
    """
    if kind == "tensorboard":
        with _tensorboard(path, done) as write:
            yield write
        return
    kept = []
    if done and path.is_file():
        with path.open(newline="", encoding="utf-8") as f:
            kept = [row for row in csv.reader(f) if row and row[0].isdigit()]
    with path.open("w", newline="", encoding="utf-8", buffering=1) as f:
        table = csv.writer(f, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows(row for row in kept if int(row[0]) <= done)

        def write_row(step: int, loss: float, learning_rate: float, seconds: float) -> None:
            table.writerow((step, f"{loss:.6g}", f"{learning_rate:.6g}", f"{seconds:.3f}"))

        yield write_row


@contextmanager
def _tensorboard(path: Path, done: int) -> Iterator[Write]:
    require_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(path), purge_step=done + 1) as writer:

        def write(step: int, loss: float, learning_rate: float, seconds: float) -> None:
            for name, value in zip(COLUMNS[1:], (loss, learning_rate, seconds), strict=True):
                writer.add_scalar(name, value, step)

        yield write


def require_tensorboard() -> None:
    """Raise UsageError where TensorBoard is not installed."""
    from importlib.util import find_spec

    if find_spec("tensorboard") is None:
        raise UsageError(
            "--log tensorboard needs TensorBoard: `pip install 'sdcompress[tensorboard]'`, or take "
            "--log csv"
        )
