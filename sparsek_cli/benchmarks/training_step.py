"""A whole training step of a 1B shape, sparse beside dense: tokens per second and peak memory.

    python -m sparsek_cli.benchmarks.training_step OUT [--lengths 8192 32768 131072] [--seconds 300]

16 layers, width 2048, 32 query and 8 KV heads of 64, feed-forward 8192, vocabulary 32000: random
weights, one sequence per step, the Trainer of `sparsek finetune` with bf16 autocast, gradient
checkpointing, the chunked loss and AdamW. Sparse attention keeps k = w = 1024 keys; dense is the
same weights with torch's sdpa, once with its flash and once with its cuDNN kernel. One warm-up
step, then `--steps` timed ones (the median counts); memory is the allocator's peak.

OUT/results.json holds every row. `--smoke`: toy sizes on a CPU.
Time on one H100: about 20 s a step for dense attention to 131072 tokens.
"""

import argparse
import contextlib
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from sparsek_cli.benchmarks.session import Session, arguments
from sparsek_cli.devices import choose_device
from sparsek_cli.models import dense_attention, sparsek_config_from
from sparsek_cli.recipes.schema_finetune import FinetuneRecipe
from sparsek_cli.training.assemble import Learner, make_trainer
from sparsek_cli.training.datasets import Datasets
from sparsek_cli.training.losses.objectives import detach
from sparsek_cli.training.parameters import choose_parameters
from sparsek_cli.training.run_sizes import measure
from sparsek_cli.training.settings import settings_of

SHAPE = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32_000,
    "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}  # fmt: skip
TOY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128,
}  # fmt: skip
SPARSE = {"topk": 1024, "window": 1024, "sinks": 0}
COLUMNS = ("length", "attention", "seconds", "tokens_per_s", "peak_gib", "times_best_dense")


def main() -> None:
    given = _arguments()
    session = Session.of(given)
    Experiment(session, given).run()


def _arguments() -> argparse.Namespace:
    parser = arguments("sparsek_cli.benchmarks.training_step", __doc__, seconds=300)
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 32_768, 131_072])
    parser.add_argument("--steps", type=int, default=2, help="timed steps")
    parser.add_argument("--attentions", nargs="+", help="of flash, cudnn and sparsek (sdpa on CPU)")
    return parser.parse_args()


class Experiment:
    """Every length and every attention trains a model for a few steps."""

    def __init__(self, session: Session, given: argparse.Namespace):
        self.session, self.given = session, given
        self.device = choose_device(given.device)
        self.lengths = [256] if given.smoke else given.lengths
        self.best_dense: dict[int, float] = {}

    def run(self) -> None:
        for length in self.lengths:
            for attention in self.attentions():
                name = f"{attention} at {length}"
                self.session.run(name, partial(self.measure, length, attention), needs=15)
        print(self.session.table(COLUMNS), flush=True)
        self.session.say(f"wrote {self.session.folder / 'results.json'}")

    def attentions(self) -> tuple[str, ...]:
        """Dense ones first: the sparse row is compared with the faster of them."""
        dense = ("flash", "cudnn") if self.device.type == "cuda" else ("sdpa",)
        known = (*dense, "sparsek")
        wanted = self.given.attentions or known
        return tuple(name for name in known if name in wanted)

    def model(self) -> Any:
        from transformers import AutoConfig

        toy = self.given.smoke
        settings = {**SHAPE, **(TOY if toy else {}), "max_position_embeddings": max(self.lengths)}
        block = {**SPARSE, **({"topk": 32, "window": 32} if toy else {})}
        config = sparsek_config_from(AutoConfig.for_model("llama", **settings), block)
        with self.device:
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    def measure(self, length: int, attention: str) -> None:
        """Trains for a few steps and adds a row."""
        # A new one: the second trainer over the same model would run without autocast.
        model = self.model()
        recipe = FinetuneRecipe(
            model="random", out="none", train="all", sequence_length=length, batch_size=1,
            micro_batch_size=1, steps=1 + self.given.steps, learning_rate=1e-5,
            checkpointing=True, log_steps=1000, device=self.device.type,
        )  # fmt: skip
        choose_parameters(model, recipe.train)
        settings = settings_of(recipe)
        sizes = measure(
            model, settings.batch, recipe.steps, name="1B", out=Path("none"),
            train=recipe.train, text_tokens={}, bf16=self._bf16(), memory=0,
        )  # fmt: skip
        with _kernel(model, attention):
            clock = StepClock(self.device)
            trainer = make_trainer(
                Learner(model, None, model.dtype), settings, sizes,
                Datasets(RandomTokens(recipe.steps, length, model.config.vocab_size)),
                device=self.device, part=self.session.folder / "part", callbacks=[clock],
            )  # fmt: skip
            try:
                trainer.train()
            finally:
                detach(model)
                model.zero_grad(set_to_none=True)
        seconds = float(np.median(clock.seconds[1:]))
        if attention != "sparsek":
            best = self.best_dense.get(length, np.inf)
            self.best_dense[length] = min(best, seconds)
        dense = self.best_dense.get(length)
        self.session.row(
            length=length,
            attention=attention,
            seconds=seconds,
            tokens_per_s=round(length / seconds),
            peak_gib=clock.peak_gib,
            times_best_dense=dense / seconds if dense else None,
            each=clock.seconds,
        )

    def _bf16(self) -> bool:
        return self.device.type == "cuda"


@contextlib.contextmanager
def _kernel(model: Any, attention: str):
    """Sparse attention as it is, or dense attention through one of torch's kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    with contextlib.ExitStack() as stack:
        if attention != "sparsek":
            stack.enter_context(dense_attention(model))
        if attention in kernels:
            stack.enter_context(sdpa_kernel(kernels[attention]))
        yield


class RandomTokens:
    """Sequences of random tokens, every one of them a target."""

    def __init__(self, count: int, length: int, vocabulary: int):
        self._shape = (count, length)
        self._ids = np.random.default_rng(0).integers(0, vocabulary, self._shape)

    def __len__(self) -> int:
        return self._shape[0]

    def __getitem__(self, index: int) -> dict[str, Any]:
        roles = np.ones(self._shape[1], dtype=np.int8)
        return {"input_ids": self._ids[index], "roles": roles, "starts": (0,), "index": index}

    def name_of(self, index: int) -> str:
        return "random"


class StepClock(TrainerCallback):
    """Wall-clock seconds of every step, and the allocator's peak over all but the first."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self.seconds: list[float] = []
        self._begun = 0.0

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self._cuda and len(self.seconds) == 1:
            torch.cuda.reset_peak_memory_stats()
        self._begun = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(self._now() - self._begun)

    @property
    def peak_gib(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 2**30 if self._cuda else None


if __name__ == "__main__":
    main()
