"""`sparsek finetune` under FSDP2 without GPUs: accelerate shards on GPUs only, torch on both.

Run by test_processes.py under torchrun with a file of jobs, which are run one after the other in
the same processes: [{"words": [...], "stop_at": N or null, "result": file}, ...]. `stop_at`
interrupts the run in step N + 1; `result` gets what the command prints.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import accelerate.state
import torch
from accelerate.utils import DistributedType

from sparsek_cli.app import main
from sparsek_cli.training import plan
from sparsek_cli.training.trainer import SparsekTrainer

_state, _step, _loss = (
    accelerate.state.PartialState.__init__,
    SparsekTrainer.training_step,
    SparsekTrainer.final_loss,
)
_job: dict = {}


def like_gpus(self, *args, **kwargs):
    _state(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def interrupted(self, *args, **kwargs):
    if self.state.global_step == _job["stop_at"]:
        raise KeyboardInterrupt
    return _step(self, *args, **kwargs)


def final_loss(self):
    # Or the test would pass with whole parameters on every process.
    assert all(hasattr(p, "full_tensor") for p in self.model.model.layers.parameters())
    return _loss(self)


accelerate.state.PartialState.__init__ = like_gpus
SparsekTrainer.training_step = interrupted
SparsekTrainer.final_loss = final_loss
plan.check_launch = lambda settings, **kwargs: None
first = os.environ["RANK"] == "0"
for _job in json.loads(Path(sys.argv[1]).read_text()):
    sys.argv[1:] = _job["words"]
    with (
        Path(_job["result"] if first else os.devnull).open("w") as out,
        contextlib.redirect_stdout(out),
    ):
        try:
            main()
        except SystemExit as end:
            wanted = 0 if _job["stop_at"] is None else 130
            assert (end.code or 0) == wanted, f"{_job['words']} ended with {end.code}"
    # As between two commands: nobody begins before all have ended.
    torch.distributed.barrier()
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
