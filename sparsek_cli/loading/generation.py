"""generation_config.json as transformers reads it: what it refuses is no fault of config.json."""

from pathlib import Path

from sparsek_cli.errors import UsageError, reason


def check_generation(path: Path) -> None:
    """Raises UsageError where the generation_config.json of a folder asks for what cannot be."""
    file = path / "generation_config.json"
    if not file.is_file():
        return
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_pretrained(path)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what it makes of values of another type is of any kind
        raise UsageError(
            f"{file} asks for what cannot be: {reason(error)}",
            hint="correct it, or remove it: it only says how to generate",
        ) from error
