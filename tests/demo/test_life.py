from syncd.demo.build import Past, build_practice
from syncd.demo.clock import SimulatedClock
from syncd.demo.life import Habits, Life
from syncd.demo.practice import Practice

NOON = 1_747_760_400.0
DAY = 86_400.0


def lived(days: int, seed: int = 3) -> tuple[Practice, Life]:
    clock = SimulatedClock(NOON)
    practice = build_practice(150, seed, clock, past=Past(documents=3, sheets=1))
    life = Life(practice, seed, Habits(merges=30, mount_moves=60))
    for _ in range(days):
        clock.advance(DAY)
        life.advance(clock.now())
    return practice, life


def test_the_same_seed_lives_the_same_life() -> None:
    first, second = lived(10)[0], lived(10)[0]
    assert first.history == second.history
    assert len(first.history) > 100


def test_a_life_says_when_the_next_thing_happens() -> None:
    practice, life = lived(1)
    assert practice.clock.now() < life.next_at() < practice.clock.now() + DAY


def test_a_life_has_everything_that_happens_in_a_practice() -> None:
    practice, life = lived(90)
    expected = {"visit", "scan", "image", "mount", "sheet", "letter", "web form", "edit", "back office file", "merge"}
    assert expected <= set(life.applied)
    since = [event for event in practice.history if event.at > NOON]
    assert {event.what for event in since} == {"appeared", "changed", "stamped", "gone"}
    assert [event.at for event in since] == sorted(event.at for event in since)
    assert practice.truth()


def test_three_hundred_patients_have_thousands_of_documents() -> None:
    practice = build_practice(300, 1, SimulatedClock(NOON))
    truth = practice.truth().values()
    assert sum(len(patient.documents) for patient in truth) >= 4_000
    assert sum(len(patient.mounts) for patient in truth) >= 150
    assert sum(len(patient.sheets) for patient in truth) >= 900
    names = [row["FileName"] for row in practice.rows("SELECT FileName FROM document")]
    assert any("/" in name for name in names)
    assert any("\n" in name for name in names) or any(len(name) > 255 for name in names)


def test_no_two_files_of_a_patient_have_one_name() -> None:
    practice, _ = lived(30)
    doubled = practice.rows("SELECT PatNum FROM document GROUP BY PatNum, FileName HAVING COUNT(*) > 1")
    assert doubled == []
