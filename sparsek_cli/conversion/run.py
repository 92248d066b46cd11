"""A planned conversion, carried out: calibrate, write, verify; then the folder takes its name."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsek_cli.checkpoint_files.shards import find_nan
from sparsek_cli.conversion.from_gguf.checkpoint import GgufCheckpoint
from sparsek_cli.conversion.from_gguf.unpack import unpacked
from sparsek_cli.conversion.planned import Plan
from sparsek_cli.conversion.tokenizer import settle
from sparsek_cli.conversion.verify import Verified, check_base, verify
from sparsek_cli.conversion.write import Scorer, Written, neutral_scorers, write_checkpoint
from sparsek_cli.hub import Checkpoint
from sparsek_cli.output import leftovers
from sparsek_cli.output.place import check_folder
from sparsek_cli.output.staging import staged
from sparsek_cli.reporter import Reporter, Silent

# Above this many bytes weights are sampled for NaN, not read whole: seconds stay seconds.
_READ_WHOLE = 4 * 2**30


@dataclass(frozen=True)
class Converted:
    """What a conversion did."""

    plan: Plan
    written: Written
    verified: Verified
    tokenizer: str
    nan_checked: str
    calibration: dict[str, Any] | None

    @property
    def out(self) -> str:
        """The folder that appeared."""
        return str(self.plan.out)

    def data(self) -> dict[str, Any]:
        """For --json."""
        return {
            **self.plan.data(),
            "linked_by": sorted(set(self.written.means)),
            "base_bytes_copied": self.written.bytes_copied,
            "base_bytes_unpacked": self.bytes_unpacked,
            "nan_check": self.nan_checked,
            "tensors": self.verified.tensors,
            "logits": self.verified.logits,
            "logit_difference": self.verified.logit_difference,
            "kv_bytes": self.verified.kv_bytes,
            "tokenizer": self.tokenizer,
            "calibration": self.calibration,
        }

    @property
    def bytes_unpacked(self) -> int:
        """Bytes of OUT that a GGUF file's tensors take."""
        return self.plan.base_bytes if isinstance(self.plan.base, GgufCheckpoint) else 0

    def _base_came(self) -> str:
        if self.plan.scorers_only:
            return "scorers, nothing of the base"
        if self.bytes_unpacked:
            return f"base unpacked into OUT, {self.bytes_unpacked:,} bytes"
        means = " and ".join(sorted(set(self.written.means)))
        return f"base by {means}, {self.written.bytes_copied:,} base bytes copied"

    def text(self) -> str:
        """For a person."""
        lines = [
            self.plan.text(),
            f"written     {self._base_came()}; NaN check: {self.nan_checked}",
            f"verified    {self.verified.text()}",
        ]
        if not self.plan.scorers_only:
            lines.append(f"tokenizer   {self.tokenizer}")
        if self.calibration:
            lines += _calibrated(self.calibration)
        return "\n".join(lines)


def _calibrated(found: Mapping[str, Any]) -> list[str]:
    """What calibration measured, and whether a plain window of as many slots would do better."""

    def nats(lost: Mapping[str, Any], kind: str = "") -> str:
        return f"{lost[f'{kind}text_loss']:.3f} and {lost[f'{kind}answer_loss']:.3f}"

    lines = [
        f"calibrated  divergence from dense, in text and at answers far back: {nats(found)} nats"
    ]
    # What was compared had none: they are fitted to what was taken alone.
    taken, without = found.get("stand_ins", {}).get("taken"), ""
    if taken:
        without = "without stand-ins "
        lines.append(
            "            without the stand-ins for evicted pairs: "
            f"{nats(found['stand_ins']['without'])}"
        )
    lines += [
        f"            a plain window of as many slots: {nats(found, 'window_')}",
        f"            recall={found['recall']:g} weighs them; {without}for text alone "
        f"{nats(found['text_alone'])} was to be had, for answers {nats(found['recall_alone'])}",
    ]
    kinds = {"text": "in text", "answer": "at answers far back"}
    worse = [w for kind, w in kinds.items() if found[f"{kind}_loss"] > found[f"window_{kind}_loss"]]
    if worse:
        lines.append(
            f"            warning: a plain window loses less {' and '.join(worse)}; give more text "
            "(calibrate_tokens), longer documents (calibrate_length) or more slots (budget)"
        )
    return lines


def run(plan: Plan, reporter: Reporter | None = None) -> Converted:
    """Carries out a plan.

    Raises:
        SparsekError: see plan, shards, write and verify; `plan.out` is then as it was before.
    """
    reporter, overwrite, contents = reporter or Silent(), plan.overwrite, plan.contents
    leftovers.clear(plan.out, reporter.say)
    check_folder(plan.out, contents, overwrite=overwrite, model=plan.base.path)  # it may be back
    # Staged first: that OUT cannot be written is told before minutes of work.
    with (
        staged(plan.out, overwrite=overwrite, contents=contents) as folder,
        unpacked(plan, reporter) as ready,
    ):
        fill = _fill_with_scorers if plan.scorers_only else _fill
        done = fill(folder, ready, reporter)
    return replace(done, plan=plan)


def _fill_with_scorers(folder: Path, plan: Plan, reporter: Reporter) -> Converted:
    """The whole model is made beside OUT, of links, and verified; `folder` gets its scorers."""
    from sparsek_cli.scorers_alone.take_scorers import keep_scorers

    whole = leftovers.make_beside(plan.out)
    try:
        with leftovers.held(whole):
            done = _fill(whole, plan, reporter)
            source = Checkpoint(whole, plan.base.name, plan.base.source)
            keep_scorers(source, plan.base.title, folder, reporter)
    finally:
        shutil.rmtree(whole, ignore_errors=True)
    return done


def _fill(folder: Path, plan: Plan, reporter: Reporter) -> Converted:
    """Calibrates and writes into the staged `folder`."""
    with reporter.progress("reading weights", plan.base_bytes) as bar:
        whole = find_nan(plan.shards, limit=_READ_WHOLE, advance=bar.advance)
    check_base(plan)
    scorers, report = neutral_scorers(plan), None
    if plan.calibrate_tokens:
        # Imported here: transformers takes longer to import than all the rest.
        from sparsek_cli.conversion.calibrate.run import calibrate

        scorers, report = calibrate(plan, reporter)
    nan = "all weights read" if whole else f"sampled above {_READ_WHOLE >> 30} GiB"
    return write_verified(plan, scorers, folder, reporter, nan, report)


def write_verified(
    plan: Plan,
    scorers: list[Scorer],
    folder: Path,
    reporter: Reporter,
    nan_checked: str,
    report: dict[str, Any] | None = None,
) -> Converted:
    """Writes a converted checkpoint into the staged `folder`, and verifies it.

    Args:
        scorers: one per converted layer. nan_checked: how weights were looked through, in words.
        report: what calibration measured.
    """
    written = write_checkpoint(plan, scorers, folder, report)
    reporter.say("verifying")
    tokenizer = settle(plan, folder)
    verified = verify(plan, scorers, folder, written)
    return Converted(plan, written, verified, tokenizer, nan_checked, report)
