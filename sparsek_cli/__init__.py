"""SparseK attention for the models people already have: convert, fine-tune, evaluate, chat.

>>> import sparsek_cli as sparsek
>>> done = sparsek.convert("tiny", "tiny-sparsek", budget=512)  # doctest: +SKIP

Functions are imported when they are first used: `import sparsek_cli` costs nothing. They are
documented in `sparsek_cli/api`: convert, finetune, evaluate, load, chat, export,
export_scorers, merge.
"""

TYPE_CHECKING = False  # as type checkers read it; importing typing takes longer than the rest
if TYPE_CHECKING:
    from sparsek_cli.api import (
        chat,
        convert,
        evaluate,
        export,
        export_scorers,
        finetune,
        load,
        merge,
    )

__version__ = "0.2.0.dev0"
__all__ = [
    "__version__",
    "chat",
    "convert",
    "evaluate",
    "export",
    "export_scorers",
    "finetune",
    "load",
    "merge",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'sparsek_cli' has no attribute {name!r}")
    from sparsek_cli import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
