"""The dense model's answer to a question that the sparse one has answered."""

from collections.abc import Iterator

from sparsek_cli.data.pieces import Reply
from sparsek_cli.dialogue.engine import Engine
from sparsek_cli.dialogue.session import Session
from sparsek_cli.errors import UsageError


def dense_reply(session: Session) -> Iterator[str]:
    """The reply that the same weights give under full attention, piece by piece.

    The conversation up to the last reply is read again, into a cache that grows with it. The
    conversation itself is left as it stands.

    Raises:
        UsageError: the model is dense already, or nothing was answered yet.
    """
    from sparsek_cli.models import dense_attention

    if not session.engine.sparse:
        raise UsageError("this model is dense already", hint="convert it first: sparsek convert")
    session.last_reply()
    text = session.engine.heard.tolist()[: session.reply_start]
    with dense_attention(session.engine.model):
        engine = Engine(session.engine.model, chunk=session.engine.chunk, dense=True)
        if not engine.feed(text):
            return
        tokens = engine.stream(session.sampling, session.stop_tokens)
        yield from Reply(session.tokenizer).pieces(tokens)
