"""Grouping by shared beginnings holds every request once and never shares too much."""

from hypothesis import given, settings
from hypothesis import strategies as st

from sparsek_cli.evaluation.lm.shared_prefixes import MIN_SHARED, group_by_prefix


def test_questions_about_one_document_are_one_group():
    document = list(range(500))
    prompts = [document + [900 + i, 7] for i in range(5)] + [[3] * 90, document[:30]]
    groups = group_by_prefix(prompts, [len(p) - 1 for p in prompts])
    assert [(g.prefix, sorted(g.members)) for g in groups] == [
        (500, [0, 1, 2, 3, 4]),
        (0, [5]),
        (0, [6]),
    ]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_groups_are_valid(data):
    bases = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=8))
    prompts, longest = [], []
    for base in bases:
        shared = data.draw(st.integers(1, 200))
        tail = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=5))
        prompts.append([base] * shared + [9] + tail)
        longest.append(len(prompts[-1]) - data.draw(st.integers(1, len(tail))))
    groups = group_by_prefix(prompts, longest)
    assert sorted(i for g in groups for i in g.members) == list(range(len(prompts)))
    for group in groups:
        lead = prompts[group.members[0]][: group.prefix]
        if len(group.members) == 1:
            assert group.prefix == 0
        else:
            assert group.prefix >= MIN_SHARED
        for i in group.members:
            assert prompts[i][: group.prefix] == lead
            assert group.prefix <= longest[i] or group.prefix == 0
