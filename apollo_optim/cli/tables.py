"""Tables on a terminal of any width."""

from .words import console, show


def print_table(title: str, rows: list[list[str]], note: str) -> None:
    """The table; on a narrow terminal in several pieces, for a figure that is cut off is none."""
    from rich.table import Table

    show(title, style="bold")
    for columns in pieces(rows, console().width):
        head, *body = ([row[column] for column in columns] for row in rows)
        table = Table(header_style="bold")
        for column, name in enumerate(head):
            table.add_column(name, justify="right" if column else "left", no_wrap=True)
        for row in body:
            table.add_row(*row, style="bold" if row[0] == "total" else None, end_section=row[0] == "total")
        show(table)
    show(note, style="dim")


def print_below(title: str, rows: list[list[str]], left: int) -> None:
    """A smaller one, below: its first `left` columns are words."""
    from rich.table import Table

    head, *body = rows
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", header_style="bold")
    for column, name in enumerate(head):
        table.add_column(name, justify="left" if column < left else "right", overflow="fold", no_wrap=left == 1)
    for row in body:
        table.add_row(*row)
    show(table)


def pieces(rows: list[list[str]], width: int) -> list[list[int]]:
    """The columns of as many tables as the width asks for, the first column in each of them."""
    widths = [max(map(len, column)) + 3 for column in zip(*rows, strict=True)]
    found: list[list[int]] = []
    for column in range(1, len(widths)):
        if not found or 1 + sum(widths[i] for i in found[-1]) + widths[column] > width:
            found.append([0])
        found[-1].append(column)
    return found
