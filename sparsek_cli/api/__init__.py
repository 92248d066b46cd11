"""The verbs as Python functions: what the command line does, called from a program.

    import sparsek_cli as sparsek

    done = sparsek.convert("tiny", "tiny-sparsek", budget=512)
    tuned = sparsek.finetune(done.out, "tiny-tuned", data="my-documents/", steps=100)
    found = sparsek.evaluate(tuned.out, tasks=["ppl", "recall"], limit=4)
    model, tokenizer = sparsek.load(tuned.out)
    print("".join(sparsek.chat(tuned.out).ask("What is SparseK?")))

Settings are the keys of the recipes (`sparsek recipes show NAME`); nested ones are mappings, or
words such as {"evaluation.every": 50}. Every function checks them all before it starts, raises
`sparsek_cli.errors.UsageError` for what is wrong with them and `SparsekError` for what failed, and
returns an object with `text()` and `data()`.
"""

from sparsek_cli.api.models import chat, load
from sparsek_cli.api.sharing import export, export_scorers, merge
from sparsek_cli.api.verbs import convert, evaluate, finetune

__all__ = [
    "chat",
    "convert",
    "evaluate",
    "export",
    "export_scorers",
    "finetune",
    "load",
    "merge",
]
