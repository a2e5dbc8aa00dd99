"""Every fault is found by its rule, every sound set-up has nothing to find above info."""

from __future__ import annotations

import pytest
import test_prepared
from conftest import give_memory_back

from ygivenx.proof.rules import RULES

from .exhibits import EXHIBITS, Exhibit, run
from .harness import Setup
from .pages import DOCS, guide, title

# Trainers of other libraries warn of their own plans.
pytestmark = pytest.mark.filterwarnings("ignore")
FAULTS = [e for e in EXHIBITS if e.rule is not None]
SOUND = [e for e in EXHIBITS if e.rule is None]


@pytest.fixture(autouse=True)
def trainer_given_back():
    """A trainer and its logits take hundreds of megabytes."""
    yield
    give_memory_back()


def cases(exhibits):
    return [pytest.param(e, id=e.name, marks=pytest.mark.full if e.slow else ()) for e in exhibits]


@pytest.mark.parametrize("exhibit", cases(FAULTS))
def test_a_fault_is_found_by_its_rule(exhibit: Exhibit, setup: Setup):
    report = run(exhibit, setup)
    found = {f.rule: f.severity for f in report.findings}
    assert found.get(exhibit.rule) in ("error", "warning"), str(report)
    assert report.exit_code("warning") == 1


@pytest.mark.parametrize("exhibit", cases(SOUND))
def test_a_sound_set_up_has_no_finding_above_info(exhibit: Exhibit, setup: Setup):
    report = run(exhibit, setup)
    assert report.exit_code("warning") == 0, str(report)


def test_the_museum_is_large_enough_and_has_its_pages():
    assert (len(FAULTS) + len(test_prepared.BROKEN), len(SOUND) + len(test_prepared.SOUND)) == (62, 37)
    assert "62 broken set-ups" in guide()
    assert "37 sound ones" in guide()
    assert {e.rule for e in FAULTS} <= RULES.keys()
    for exhibit in EXHIBITS:
        page = (DOCS / f"{exhibit.name}.md").read_text()
        assert title(exhibit) in page
        assert exhibit.rule is None or f"`{exhibit.rule}`" in page
