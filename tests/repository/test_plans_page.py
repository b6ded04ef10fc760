"""docs/plans.md is what `unibiomed plan --page` writes, as far as that can be seen without compiling."""

from places import ROOT

from unibiomed_jax.planning.page import HEADER, answers, page, training

PAGE = (ROOT / "docs" / "plans.md").read_text()


def test_the_page_has_the_words_and_constants_of_the_code(tmp_path):
    assert PAGE.startswith(HEADER)
    _, constants = page(tmp_path).split("## Constants")
    assert constants.strip() in PAGE


def test_every_case_is_planned_or_said_to_be_missing():
    tables = [line for line in PAGE.splitlines() if line.startswith("| ") and " CPU min |" in line]
    _, _, missing = PAGE.partition("## Not compiled yet")
    left_out = [line for line in missing.splitlines() if line.startswith("- ")]
    assert len(tables) + len(left_out) == len([*training(), *answers()])
    assert len(set(left_out)) == len(left_out)
