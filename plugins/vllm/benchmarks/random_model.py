"""Writes a random model of the shape of a 1B Llama, dense and with SparseK, for `gpu.py`.

    python plugins/vllm/benchmarks/random_model.py FOLDER

`FOLDER/dense` and `FOLDER/sparsek` share all weights; the latter has random scorers. Queries and
keys are large, so that attention is sharp and what was forgotten matters.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def configs(args: argparse.Namespace):
    """(dense, SparseK) configs of one shape."""
    from transformers import LlamaConfig

    import sparsek_cli.models as models

    dense = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 256),
        head_dim=64,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        dtype=torch.bfloat16,
    )
    block = {"topk": args.topk, "window": args.window, "sinks": args.sinks}
    return dense, models.sparsek_config_from(dense, block)


@torch.no_grad()
def write(folder: Path, args: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM

    dense, sparse = configs(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(sparse, dtype=torch.bfloat16)
        model.to(device)
        for name, parameter in model.named_parameters():
            if name.endswith("scorer.slopes"):
                parameter.fill_(1e-4)
            elif "q_proj" in name or "k_proj" in name:
                parameter.normal_(std=0.06)
            elif "proj" in name or "lm_head" in name or "embed" in name or "scorer.weight" in name:
                parameter.normal_(std=0.02)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "sparsek")
    plain = AutoModelForCausalLM.from_config(dense, dtype=torch.bfloat16).to(device)
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    if missing or not all("scorer" in name for name in unexpected):
        raise RuntimeError(f"weights do not fit the dense model: {missing}, {unexpected}")
    plain.generation_config.eos_token_id = None
    plain.save_pretrained(folder / "dense")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--topk", type=int, default=888)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--sinks", type=int, default=4)
    args = parser.parse_args()
    write(args.folder, args)


if __name__ == "__main__":
    main()
