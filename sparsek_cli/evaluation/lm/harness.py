"""lm-eval's Hugging Face model class, made to tell what it did.

Different from `HFLM`: every pass goes through the policy's own cache, so that bytes come from real
tensors; prompts that share their beginning read it once; nothing is cut unless the user said how,
and then it is counted; passages report the loss of every token. Prompts, stop sequences and scoring
are lm-eval's.
"""

from typing import Any

from sparsek_cli.data.chat_format import TemplateFails
from sparsek_cli.evaluation.lm.generation import Answers
from sparsek_cli.evaluation.lm.loglikelihood import Likelihoods


class SparsekLM(Likelihoods, Answers):
    """One model under one policy; see `PromptReader` for its arguments."""

    def apply_chat_template(self, chat_history: list[dict[str, str]], *args: Any, **options: Any):
        """As lm-eval's; raises TemplateFails where the template does."""
        try:
            return super().apply_chat_template(chat_history, *args, **options)
        except Exception as error:
            raise TemplateFails(error) from error
