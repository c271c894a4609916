"""Models that stay loaded: as many as the budget holds, and the one that nobody used for longest leaves."""

from dataclasses import dataclass

import pytest

from dicomnode.analysis.warm import WarmModels


@dataclass
class Heavy:
    memory_bytes: int


def use(warm: WarmModels[Heavy], key: str, size: int, loads: list[str]) -> Heavy:
    def load() -> Heavy:
        loads.append(key)
        return Heavy(size)

    with warm.using(key, load, expected_bytes=size) as model:
        return model


def test_a_model_is_loaded_once_while_it_stays() -> None:
    warm, loads = WarmModels[Heavy](100), list[str]()
    assert use(warm, "a", 10, loads) is use(warm, "a", 10, loads)
    assert loads == ["a"]


def test_the_one_used_least_recently_leaves() -> None:
    warm, loads = WarmModels[Heavy](100), list[str]()
    for key in ("a", "b", "a", "c"):
        use(warm, key, 40, loads)
    assert warm.warm == ("a", "c")
    assert loads == ["a", "b", "c"]


def test_room_is_made_before_the_next_is_loaded() -> None:
    warm, loads = WarmModels[Heavy](100), list[str]()
    use(warm, "a", 60, loads)

    def load() -> Heavy:
        assert warm.warm == ()
        return Heavy(60)

    with warm.using("b", load, expected_bytes=60):
        assert warm.warm == ("b",)


def test_one_larger_than_the_budget_is_used_and_is_alone() -> None:
    warm, loads = WarmModels[Heavy](100), list[str]()
    use(warm, "a", 10, loads)
    assert use(warm, "huge", 500, loads).memory_bytes == 500
    assert warm.warm == ("huge",)


def test_within_one_study_another_model_may_be_used() -> None:
    warm, loads = WarmModels[Heavy](10), list[str]()
    with warm.using("routine", lambda: Heavy(10)) as routine:
        use(warm, "urgent", 10, loads)
        assert routine.memory_bytes == 10  # it left the budget, not the study
    assert warm.warm == ("urgent",)


def test_what_fails_to_load_leaves_nothing_behind() -> None:
    warm = WarmModels[Heavy](10)

    def load() -> Heavy:
        raise ValueError

    with pytest.raises(ValueError), warm.using("a", load):  # noqa: PT011
        pass
    assert warm.warm == ()
