"""The files of the folders that this tool writes, by which it knows its own again."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from sparsek_cli.families.remote_code import REMOTE_CODE_FILE
from sparsek_cli.output.tokenizer_files import FILES as TOKENIZER_FILES

SCORERS = "sparsek.safetensors"
CALIBRATION = "calibration.json"
CONVERT_RECIPE = "sparsek.yaml"
FINETUNE_RECIPE = "finetune.yaml"
RUN_RECIPE = "recipe.yaml"
RUN_INPUTS = "inputs.json"
EXPORT_NOTE = "sparsek-export.json"


@dataclass(frozen=True)
class Contents:
    """What one kind of folder holds.

    Attributes:
        name: what to call the folder.
        marks: groups of names; of each group one must be there.
        files: patterns of files that are written into it.
        folders: sub-folders, and the patterns of paths below them.
    """

    name: str
    marks: tuple[tuple[str, ...], ...]
    files: tuple[str, ...]
    folders: dict[str, tuple[str, ...]]

    def knows(self, file: str) -> bool:
        """Whether a file of this name is written into such a folder."""
        return any(fnmatchcase(file, pattern) for pattern in self.files)

    def foreign(self, folder: Path, besides: str | None = None) -> str | None:
        """The first entry that no run of this tool wrote, or None; `besides` is not looked at."""
        for entry in sorted(folder.iterdir()):
            if entry.name == besides:
                continue
            if entry.is_symlink():
                return entry.name
            if not entry.is_dir():
                if not (entry.is_file() and self.knows(entry.name)):
                    return entry.name
                continue
            below = next((p for n, p in self.folders.items() if fnmatchcase(entry.name, n)), None)
            if below is None:
                return entry.name
            for path in sorted(entry.rglob("*")):
                inside = path.relative_to(entry).as_posix()
                plain = path.is_dir() or path.is_file()
                if path.is_symlink() or not plain or not (
                    path.is_dir() or any(fnmatchcase(inside, pattern) for pattern in below)
                ):  # fmt: skip
                    return f"{entry.name}/{inside}"
        return None

    def lacks(self, folder: Path) -> str | None:
        """A mark that is missing, or None."""
        for names in self.marks:
            if not any((folder / name).is_file() for name in names):
                return " or ".join(names)
        return None

    def is_in(self, folder: Path) -> bool:
        """Whether a folder is of this kind: all marks are there, and weights."""
        return self.lacks(folder) is None and any(folder.glob("*.safetensors"))


MODEL = Contents(
    "a model that sparsek wrote",
    (("config.json",), (CONVERT_RECIPE, FINETUNE_RECIPE, EXPORT_NOTE)),
    (
        "config.json",
        "generation_config.json",
        "base-[0-9]*.safetensors",
        "model.safetensors",
        "model-[0-9]*-of-[0-9]*.safetensors",
        "model.safetensors.index.json",
        SCORERS,
        CALIBRATION,
        CONVERT_RECIPE,
        FINETUNE_RECIPE,
        EXPORT_NOTE,
        REMOTE_CODE_FILE,
        "README.md",
        "LICENSE*",
        "NOTICE*",
        *TOKENIZER_FILES,
    ),
    {"additional_chat_templates": ("*.jinja",), "chat_templates": ("*.jinja",)},
)
SCORERS_ALONE = Contents(
    "a folder of scorers",
    ((SCORERS,),),
    (SCORERS, CONVERT_RECIPE, FINETUNE_RECIPE, CALIBRATION, "README.md"),
    {},
)
ADAPTERS = Contents(
    "a folder of adapters that finetune wrote",
    (("adapter_config.json",), (FINETUNE_RECIPE,)),
    (
        "adapter_config.json",
        "adapter_model.safetensors",
        FINETUNE_RECIPE,
        "README.md",
        *TOKENIZER_FILES,
    ),
    {"additional_chat_templates": ("*.jinja",), "chat_templates": ("*.jinja",)},
)
RUN = Contents(
    "an unfinished run of finetune",
    ((RUN_RECIPE, f"{RUN_RECIPE}.new"),),
    (RUN_RECIPE, f"{RUN_RECIPE}.new", RUN_INPUTS),
    {"checkpoint-*": ("*",), "old-checkpoint-*": ("*",), "writing": ("*",), "runs": ("*",)},
)
RESULTS = Contents(
    "a result folder of evaluate",
    (("run.json",),),
    (
        "run.json",
        "results.json",
        "report.md",
        "report.html",
        *(f"{stem}_by_*.{kind}" for stem in ("score", "recall", "loss") for kind in ("png", "svg")),
        ".*.part",
    ),
    {"units": ("*/*.json", "*/.*.part"), "samples": ("*/*.jsonl", "*/.*.part")},
)
