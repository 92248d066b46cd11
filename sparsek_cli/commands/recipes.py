"""`sparsek recipes`."""

import typer

app = typer.Typer(help="List, show and copy recipes.")


@app.callback()
def recipes() -> None:
    """List, show and copy recipes."""
