"""Silencing libraries: their progress bars, warnings and load reports stay off the terminal."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and load reports from transformers within the block.

    What is missing or left over is checked from the returned loading info instead.
    """
    from transformers.utils import logging as theirs

    bars, verbosity = theirs.is_progress_bar_enabled(), theirs.get_verbosity()
    theirs.disable_progress_bar()
    theirs.set_verbosity_error()
    try:
        yield
    finally:
        theirs.set_verbosity(verbosity)
        if bars:
            theirs.enable_progress_bar()


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Keeps the bars and notes of lm-eval, datasets and transformers off the terminal."""
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    from transformers.utils import logging as transformers_logging

    names = ("lm_eval", "datasets", "huggingface_hub")
    before = {name: logging.getLogger(name).level for name in names}
    verbosity = transformers_logging.get_verbosity()
    datasets_bars = datasets.utils.logging.is_progress_bar_enabled()
    modules = (lm_eval.api.task, lm_eval.api.model)
    bars = [module.tqdm for module in modules]
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    for module in modules:  # drawn without asking
        module.tqdm = lambda items, **options: items
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if datasets_bars:
            datasets.enable_progress_bars()
        for module, bar in zip(modules, bars, strict=True):
            module.tqdm = bar


def no_bars() -> None:
    """No bars of transformers from now on."""
    from transformers.utils import logging as theirs

    theirs.disable_progress_bar()
