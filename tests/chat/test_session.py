"""Turns are appended: every token is fed once, and a turn reads as the template wrote it."""

import json
import random
import signal

import pytest
from transformers import ByT5Tokenizer

from sparsek_cli.data.pieces import BLOCK, Encoder, Reply
from sparsek_cli.dialogue.drawing.sampling import Sampling
from sparsek_cli.dialogue.engine import Engine
from sparsek_cli.dialogue.files import save_conversation
from sparsek_cli.dialogue.session import Session
from sparsek_cli.dialogue.template import render
from sparsek_cli.errors import SparsekError, UsageError


def talk(session: Session, question: str) -> str:
    return "".join(session.ask(question))


@pytest.fixture
def session(engine, tokenizer) -> Session:
    return Session(engine(), tokenizer, Sampling(max_new_tokens=6))


def whole(session: Session) -> list[int]:
    """The conversation so far as the template would render it at once, up to the last reply."""
    start = [{"role": "system", "content": session.system}] if session.system else []
    said = [*start, *session.messages]
    text = render(session.tokenizer, said[:-1]) + said[-1]["content"]
    return session.tokenizer(text, add_special_tokens=False).input_ids


def fed(session: Session) -> list[int]:
    return [*session.engine.seen, *session.engine._unfed]


@pytest.mark.parametrize("given", [3, None, b"words", ["words", 3], "half of a pair: \ud83d"])
def test_what_is_no_text_is_refused(session, given):
    """They were errors of whatever met them first, in the middle of a turn."""
    with pytest.raises(UsageError, match="should be text|not valid UTF-8"):
        talk(session, given)
    with pytest.raises(UsageError, match="should be text|not valid UTF-8"):
        session.load(given)
    if given is not None:
        with pytest.raises(UsageError, match="should be text|not valid UTF-8"):
            session.set_system(given)
    assert talk(session, "Who are you?")


def test_turns_feed_exactly_the_rendered_conversation_once(session):
    for question in ("Who are you?", "And why?", "One more."):
        talk(session, question)
        assert fed(session) == whole(session)
    assert session.engine.fed == len(session.engine.seen)


def test_system_message_opens_the_conversation(engine, tokenizer):
    session = Session(engine(), tokenizer, Sampling(max_new_tokens=3), system="Be brief.")
    talk(session, "Hello?")
    talk(session, "Again?")
    assert fed(session) == whole(session)
    session.set_system(None)
    assert session.engine.fed == 0 and session.messages == []


def test_document_and_question_share_one_user_turn(session):
    session.load("The code is 42.\n", "note.txt")
    before = session.engine.fed
    reply = talk(session, "What is the code?")
    expected = render(
        session.tokenizer,
        [{"role": "user", "content": "The code is 42.\n\nWhat is the code?"}],
    )
    assert fed(session) == session.tokenizer(expected + reply, add_special_tokens=False).input_ids
    assert 0 < before < len(fed(session))
    assert session.messages[0]["content"] == "[note.txt]\n\nWhat is the code?"
    talk(session, "Sure?")
    talk(session, "Really?")
    assert session.tokenizer.decode(fed(session)).count("<s>user: ") == 3


def test_special_tokens_in_the_users_text_end_nothing(session):
    session.load("In this file </s> is written, and <s>user: too.", "a")
    talk(session, "What does </s> mean?")
    text = "In this file </s> is written, and <s>user: too.\n\nWhat does </s> mean?"
    ids = fed(session)
    assert text in session.tokenizer.decode(ids)
    # One opening of the user's turn and one of the reply, one end of the user's.
    assert ids.count(session.tokenizer.bos_token_id) == 2
    assert ids.count(session.tokenizer.eos_token_id) == 1


def test_two_documents_then_a_question(session):
    session.load("First text.", "a")
    session.load("Second text.", "b")
    talk(session, "Compare.")
    text = session.tokenizer.decode(fed(session))
    assert "<s>user: First text.\n\nSecond text.\n\nCompare.</s>" in text


def test_long_document_reads_as_if_tokenized_at_once(engine, pair_tokenizer):
    words = random.Random(0).choices(
        ["import", "def", "return", "tokens", "é", "(x)\n", "a"], k=3000
    )
    document = " ".join(words)
    assert len(document) > BLOCK
    session = Session(
        engine(chunk=1024, vocab_size=512), pair_tokenizer, Sampling(max_new_tokens=1)
    )
    read = []
    assert session.load(document, on_progress=read.append)
    assert sum(read) == len(document) and len(read) > 1
    talk(session, "def what?")
    joint = pair_tokenizer(document + "\n\ndef what?", add_special_tokens=False).input_ids
    assert session.engine.seen[: len(joint)] == joint


def test_chunked_feeding_gives_the_logits_of_feeding_at_once(engine):
    import torch

    ids = torch.randint(3, 120, (100,)).tolist()
    chunked, whole = engine(chunk=7), engine(chunk=1000)
    chunked.feed(ids)
    whole.feed(ids)
    torch.testing.assert_close(chunked._logits, whole._logits, atol=1e-4, rtol=1e-4)


def test_no_template_continues_text(engine, tokenizer):
    tokenizer.chat_template = None
    session = Session(engine(), tokenizer, Sampling(max_new_tokens=4))
    assert session.plain
    first = talk(session, "Once upon")
    second = talk(session, "a time")
    assert tokenizer.decode(fed(session)) == f"Once upon{first}\na time{second}"
    with pytest.raises(UsageError, match="no chat template"):
        session.set_system("Be brief.")


def test_template_that_rewrites_history_still_appends(engine, tokenizer):
    # As reasoning models do: earlier replies are rendered differently from what was said.
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'].split('</think>')[-1] | trim }}"
        "</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    session = Session(engine(), tokenizer, Sampling(max_new_tokens=5))
    talk(session, "One?")
    kept = fed(session)
    talk(session, "Two?")
    assert fed(session)[: len(kept)] == kept


@pytest.mark.parametrize(
    ("body", "appends"),
    [
        # Refuses the marks that cutting uses, but grows by appending.
        ("{% if m['role'] == 'user' and '?' not in m['content'] %}{{ raise_exception('no') }}"
         "{% endif %}{{ m['content'] }}", True),
        ("{{ m['content'] | upper }}", False),
    ],
)  # fmt: skip
def test_template_that_cannot_be_cut_falls_back_to_whole_renders(engine, tokenizer, body, appends):
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}: " + body + "</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    session = Session(engine(), tokenizer, Sampling(max_new_tokens=4))
    assert session.feed.whole
    session.load("Some text?")
    talk(session, "One?")
    forwards = session.engine.forwards
    talk(session, "Two?")
    text = tokenizer.decode(session.engine.seen)
    expected = render(tokenizer, session.feed.full[:-1])
    assert text.startswith(expected)
    assert (session.engine.forwards > forwards) == appends  # a rebuild starts counting anew


def test_ctrl_c_stops_the_reply_and_keeps_the_conversation_whole(session):
    session.sampling = Sampling(max_new_tokens=50)
    stream = session.ask("Tell me everything?")
    pieces = [next(stream)]
    signal.raise_signal(signal.SIGINT)
    pieces += list(stream)
    assert session.engine.interrupted
    assert session.messages[-1]["content"] == "".join(pieces)
    talk(session, "Go on?")
    assert fed(session) == whole(session)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_while_reading_keeps_what_was_read(session):
    def stop(characters: int) -> None:
        signal.raise_signal(signal.SIGINT)

    assert not session.load("word " * 4000, on_progress=stop)
    read = session.engine.fed
    assert 0 < read < 4 * BLOCK
    talk(session, "What was it?")
    assert session.engine.fed > read


def test_second_ctrl_c_is_a_real_one(session):
    stream = session.ask("Hello?")
    next(stream)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    stream.close()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("family", "size"),
    [("gpt2", "n_positions"), ("opt", "max_position_embeddings"),
     ("biogpt", "max_position_embeddings")],
)  # fmt: skip
def test_full_table_of_positions_is_an_error_that_leaves_the_session_usable(
    engine, tokenizer, family, size
):
    session = Session(engine(family, **{size: 64}), tokenizer, Sampling(max_new_tokens=2))
    talk(session, "Hi?")
    with pytest.raises(SparsekError, match="context is full"):
        talk(session, "x" * 100)
    before = fed(session)
    talk(session, "ok?")
    assert session.tokenizer.decode(fed(session)[len(before) :]).startswith("</s>\n<s>user: ok?")


def test_stop_tokens_are_neither_shown_nor_fed(session, monkeypatch):
    from sparsek_cli.dialogue import engine as module

    drawn = iter([70, 71, 2])
    monkeypatch.setattr(module, "draw", lambda *a: next(drawn))
    reply = talk(session, "Well?")
    assert reply == session.tokenizer.decode([70, 71])
    assert fed(session)[-2:] == [70, 71]


@pytest.mark.parametrize(("drawn", "cut"), [([70, 71, 72], True), ([70, 71, 2], False)])
def test_a_reply_that_had_no_end_is_told_as_cut(session, monkeypatch, drawn, cut):
    """Of a model that never comes to an end one saw the text, and not that more would follow."""
    from sparsek_cli.dialogue import engine as module

    session.sampling = Sampling(max_new_tokens=3)
    words = iter(drawn)
    monkeypatch.setattr(module, "draw", lambda *a: next(words))
    talk(session, "Well?")
    assert session.stats().reply_at_limit == cut
    session.clear()
    assert not session.stats().reply_at_limit


def test_greedy_and_seeded_sampling_repeat(engine, tokenizer):
    def reply(sampling: Sampling) -> str:
        return talk(Session(engine(), tokenizer, sampling), "Say?")

    assert reply(Sampling(max_new_tokens=8)) == reply(Sampling(max_new_tokens=8))
    warm = Sampling(temperature=1.0, top_p=0.9, max_new_tokens=8, seed=3)
    assert reply(warm) == reply(warm)
    # Nucleus sampling keeps at least the likeliest token, so a tiny mass is greedy.
    assert reply(Sampling(1.0, 1e-9, 8)) == reply(Sampling(max_new_tokens=8))


def test_nan_logits_are_reported():
    import torch

    from sparsek_cli.dialogue.drawing.sampling import draw

    with pytest.raises(SparsekError, match="not a number"):
        draw(torch.tensor([0.0, float("nan")]), Sampling())


def test_empty_inputs_are_refused(session):
    with pytest.raises(UsageError):
        talk(session, "  ")
    with pytest.raises(UsageError, match="empty"):
        session.load("\n \n", "blank.txt")


def test_reply_never_shows_half_a_character(pair_tokenizer):
    text = "naïve café 😀 – 日本語 done"
    reply = Reply(pair_tokenizer)
    pieces = [reply.add(token) for token in pair_tokenizer(text).input_ids]
    pieces.append(reply.rest())
    assert "".join(pieces) == text == reply.text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("bytewise", [False, True])
def test_ids_that_the_tokenizer_does_not_know_have_no_text_and_are_told(
    tokenizer, bytewise, dense_model, tmp_path, caplog
):
    """Embeddings have more rows than tokenizers have tokens; of ByT5's the first such id failed."""
    if bytewise:
        tokenizer = ByT5Tokenizer()
    size, model = len(tokenizer), dense_model("llama", vocab_size=len(tokenizer) + 9)
    letters = tokenizer("ab", add_special_tokens=False).input_ids
    written = [size, letters[0], size + 3, size + 8, letters[1]]
    session = Session(Engine(model), tokenizer)
    session.engine.stream = lambda *_: iter(written)
    assert talk(session, "Who?") == "ab" == session.messages[-1]["content"]
    assert caplog.messages == [
        f"the tokenizer knows nothing of 3 of the 5 tokens that the model wrote (the first is "
        f"{size}): they have no text, and are left out"
    ]
    session.engine.heard.extend(written)
    save_conversation(session, tmp_path / "said.jsonl")
    assert json.loads((tmp_path / "said.jsonl").read_text())["text"].endswith("ab")
    assert "".join(Reply(tokenizer).pieces(letters)) == "ab" and len(caplog.messages) == 1


def test_sentencepiece_style_tokenizers_add_no_space_between_pieces():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz.", "\n"]
    vocab = {token: index for index, token in enumerate(["<s>", "</s>", *letters])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    slow = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    encode = Encoder(slow)
    assert slow.convert_ids_to_tokens(encode("", "ab", first=True)) == ["▁", "a", "b"]
    assert slow.convert_ids_to_tokens(encode("", "ab", first=False)) == ["a", "b"]
