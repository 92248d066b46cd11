"""pytest's capture of log records without what it does six times a test.

Each time it looks through all loggers there are, and adds its handler to some sixty of torch's,
which do not hand on what they get: four milliseconds of each test. And whenever a level is set, as
around each model that is loaded, logging empties what hundreds of loggers remember, most nothing.
"""

from __future__ import annotations

import logging

import pytest


def catch_logs_quickly(patch: pytest.MonkeyPatch) -> None:
    """Records of all loggers but torch's are caught as ever; nothing happens to another pytest."""
    from _pytest import logging as theirs

    catching = getattr(theirs, "catching_logs", None)
    if not {"attached_loggers", "handler", "level"} <= set(getattr(catching, "__slots__", ())):
        return
    enter = catching.__enter__
    known: dict[int, list[logging.Logger]] = {}  # by how many loggers there are

    def apart() -> list[logging.Logger]:
        loggers = logging.root.manager.loggerDict
        if len(loggers) not in known:
            found = [x for x in loggers.values() if isinstance(x, logging.Logger)]
            known.clear()
            known[len(loggers)] = [
                x for x in found if not x.propagate and x.name.split(".")[0] != "torch"
            ]
        return known[len(loggers)]

    def enter_quickly(self):
        if self.level is not None:
            return enter(self)
        for logger in (logging.root, *apart()):
            logger.addHandler(self.handler)
            self.attached_loggers.append(logger)
        return self.handler

    patch.setattr(catching, "__enter__", enter_quickly)
    patch.setattr(logging.Manager, "_clear_cache", _clear_what_is_there)


def _clear_what_is_there(self: logging.Manager) -> None:
    for logger in (*self.loggerDict.values(), self.root):
        if getattr(logger, "_cache", None):  # placeholders have none
            logger._cache.clear()
