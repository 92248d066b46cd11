"""lm-eval's Hugging Face model class, made to tell what it did.

Different from `HFLM`: every pass goes through the policy's own cache, so that bytes come from real
tensors; prompts that share their beginning read it once; nothing is cut unless the user said how,
and then it is counted; passages report the loss of every token. Prompts, stop sequences and scoring
are lm-eval's.
"""

from sparsek_cli.evaluation.lm.generation import Answers
from sparsek_cli.evaluation.lm.loglikelihood import Likelihoods


class SparsekLM(Likelihoods, Answers):
    """One model under one policy; see `PromptReader` for its arguments."""
