"""Plain-text tables for the terminal."""

from collections.abc import Sequence


__all__ = ["print_table"]


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with the first column aligned to the left and the others to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for position, name in enumerate(header):
        table.add_column(name, justify="left" if position == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    needed = Console(width=1000).measure(table).maximum  # a narrow terminal wraps lines instead of cutting numbers
    Console(width=max(Console().width, needed)).print(table)
