"""Several processes, one model each: `accelerate launch -m sparsek_cli evaluate ...`.

lm-eval deals the samples of a task out to the processes and gathers them on the first one, which
alone writes and speaks. What each process saw of its share is added up here.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from sparsek_cli.devices import choose_device, meet_others, world_size
from sparsek_cli.errors import SparsekError
from sparsek_cli.evaluation.lm.proof import Proof

SUMMED = ("sparse_calls", "sparse_queries", "prompts", "truncated_prompts", "truncated_tokens")


class Ranks:
    """This process among its kind; alone unless a launcher says otherwise.

    Args:
        device: as users name it.
        say: hears that others are waited for.

    Raises:
        SparsekError: they do not come, or do not find each other.
    """

    def __init__(self, device: str, say: Callable[[str], None]) -> None:
        self.accelerator: Any = None
        self.rank, self.count = 0, 1
        if world_size() > 1:
            meet_others(say)
            from accelerate import Accelerator

            # Without a GPU it would be one process alone, unless told that this is meant.
            self.accelerator = Accelerator(cpu=choose_device(device).type == "cpu")
            self.rank = self.accelerator.process_index
            self.count = self.accelerator.num_processes
            if self.count != world_size():
                raise SparsekError(
                    f"{world_size()} processes were started, and accelerate sees {self.count}",
                    hint="start it in one process",
                )

    @property
    def first(self) -> bool:
        return self.rank == 0

    def device(self, wanted: str) -> str:
        """The device of this process: its own GPU where no single one was named."""
        if self.accelerator is None or wanted not in ("auto", "cuda"):
            return wanted
        return str(self.accelerator.device)

    def join(self, lm: Any) -> None:
        """Tells lm-eval's model class about the others."""
        if self.accelerator is not None:
            lm.accelerator = self.accelerator
            lm._rank, lm._world_size = self.rank, self.count
            # How lm-eval asks who has most requests: parts of one model must take equally many
            # steps, so that the others would repeat their last one. Here each has a whole model.
            lm.all_gather = lambda requests: requests.expand(self.count)

    def wait(self) -> None:
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    def add_up(self, lm: Any) -> Proof:
        """The proof of all processes together; only the first one's result counts."""
        everyone = lm.gather_object(lm.proof)
        if not self.first or self.count == 1:
            return lm.proof
        longest = max(everyone, key=lambda proof: proof.kv_tokens)
        joint = Proof(**{f.name: getattr(longest, f.name) for f in fields(Proof)})
        for name in SUMMED:
            setattr(joint, name, sum(getattr(proof, name) for proof in everyone))
        joint.longest_prompt = max(proof.longest_prompt for proof in everyone)
        joint.backends = {}
        for proof in everyone:
            for name, calls in proof.backends.items():
                joint.backends[name] = joint.backends.get(name, 0) + calls
        return joint
