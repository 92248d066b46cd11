"""`sparsek finetune` under FSDP2 without GPUs: accelerate shards on GPUs only, torch on both.

Run by test_processes.py under torchrun. STOP_AT=N interrupts the run in step N + 1.
"""

import os

import accelerate.state
from accelerate.utils import DistributedType

from sparsek_cli.app import main
from sparsek_cli.training import run
from sparsek_cli.training.trainer import SparsekTrainer

_state, _step, _loss = (
    accelerate.state.PartialState.__init__,
    SparsekTrainer.training_step,
    SparsekTrainer.final_loss,
)


def like_gpus(self, *args, **kwargs):
    _state(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def interrupted(self, *args, **kwargs):
    if str(self.state.global_step) == os.environ.get("STOP_AT"):
        raise KeyboardInterrupt
    return _step(self, *args, **kwargs)


def final_loss(self):
    # Or the test would pass with whole parameters on every process.
    assert all(hasattr(p, "full_tensor") for p in self.model.model.layers.parameters())
    return _loss(self)


accelerate.state.PartialState.__init__ = like_gpus
SparsekTrainer.training_step = interrupted
SparsekTrainer.final_loss = final_loss
run.check_launch = lambda recipe, cpu: None
main()
