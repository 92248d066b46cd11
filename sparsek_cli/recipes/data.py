"""`--data`: other text in the place of a recipe's own."""

from collections.abc import Sequence

from sparsek_cli.recipes.load import Draft


def set_text(draft: Draft, data: Sequence[str], origin: str) -> None:
    """Every text source of the recipe reads `data`; where there is none, one is made.

    Args:
        data: files, folders and globs, or one hub id.
        origin: what the user wrote, for messages.
    """
    from sparsek_cli.data.text.find_files import is_hub_id

    is_hub = len(data) == 1 and is_hub_id(data[0])
    place = {"files": None, "dataset": data[0]} if is_hub else {"files": [*data], "dataset": None}
    place = {"kind": "text", **place}
    sources = draft.get("data") or {}
    named = [
        name
        for name, block in sources.items()
        # Words like data.text.column=story may say only something of it.
        if isinstance(block, dict) and block.get("kind", "text") == "text"
    ]
    if not named and all(isinstance(block, dict) for block in sources.values()):
        draft.set("data.text", place, origin)
    for name in named:
        for key, value in place.items():
            draft.set(f"data.{name}.{key}", value, origin)
