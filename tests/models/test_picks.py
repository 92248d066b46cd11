"""The likeliest token of every row, by whoever finds it; logits of the model's own dtype."""

import torch
from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper

import sparsek_cli.models as models
from sparsek_cli.models.generation import likeliest as picks
from sparsek_cli.models.generation.cuda_graphs import Decoder
from sparsek_cli.models.generation.decoding import Choice


def test_what_is_sampled_or_processed_is_float32():
    """bfloat16 probabilities would be rounded before they are drawn from."""
    seen = []

    class Noted(TemperatureLogitsWarper):
        def __call__(self, ids, scores):
            seen.append(scores.dtype)
            return super().__call__(ids, scores)

    logits = torch.tensor([[1.0, 3.0, 3.0, -1.0]]).bfloat16()
    for sample in (False, True):
        options = {"sample": sample, "ends": None, "pad": None, "batch": 1}
        choice = Choice(LogitsProcessorList([Noted(0.5)]), device=logits.device, **options)
        choice(logits)
    assert seen == [torch.float32] * 2


@torch.no_grad()
def test_a_decoder_gives_float32_logits_and_picks_from_the_models_own(sparse_model):
    model = sparse_model("llama", topk=4, window=4, sinks=1).bfloat16()
    cache = models.SparseKCache(model.config)
    model(torch.randint(4, 128, (2, 9)), past_key_values=cache)
    seen = []

    def pick(logits):
        seen.append(logits)
        return picks.likeliest(logits)

    decoder = Decoder(model, 2, pick=pick)
    with decoder.over(cache, torch.full((2,), 9)):
        logits = decoder.read(torch.tensor([5, 6]))
    assert logits.dtype == torch.float32 and seen[0].dtype == torch.bfloat16
    assert torch.equal(logits, seen[0].float())
    assert torch.equal(decoder.words, logits.argmax(-1))
