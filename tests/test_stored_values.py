"""Values are read from JSON with the annotated types, or refused."""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from branchynet.design.advice import Advice, CandidateResult, Design
from branchynet.errors import FileError, InputError
from branchynet.policy.exit_cost import ExitCost
from branchynet.policy.fitted_scores import LearnedScore, TemperedScore
from branchynet.policy.values import Choice, Outcome, Policy, Promise
from branchynet.runs.run import open_run
from branchynet.runs.settings import Settings
from branchynet.stored_values import from_stored, read_entry


@dataclass(frozen=True)
class Inner:
    name: str
    shares: tuple[float, ...] = ()


@dataclass(frozen=True)
class Outer:
    count: int
    flag: bool
    rate: float
    pair: tuple[float, float]
    maybe: float | None
    inner: Inner
    many: tuple[Inner, ...]
    limits: dict[str, float]
    kind: Literal["a", "b"] = "a"
    free: Any = None


finite = st.floats(allow_nan=False, allow_infinity=False)
inners = st.builds(Inner, st.text(), st.lists(finite, max_size=3).map(tuple))
outers = st.builds(
    Outer,
    count=st.integers(),
    flag=st.booleans(),
    rate=finite,
    pair=st.tuples(finite, finite),
    maybe=st.none() | finite,
    inner=inners,
    many=st.lists(inners, max_size=3).map(tuple),
    limits=st.dictionaries(st.text(), finite, max_size=3),
    kind=st.sampled_from(["a", "b"]),
    free=st.none() | st.text(),
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | finite | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(outers)
def test_a_dataclass_comes_back_through_json(value):
    assert from_stored(Outer, json.loads(json.dumps(asdict(value))), "x.json", "make(...)") == value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 1.5}, r"Outer\.count is 1\.5, not int"),
        ({"count": True}, r"Outer\.count is True"),
        ({"flag": 1}, r"Outer\.flag is 1, not bool"),
        ({"rate": "fast"}, r"Outer\.rate is 'fast', not float"),
        ({"rate": 10**400}, "too large"),
        ({"pair": [1.0]}, r"Outer\.pair has 1 entries, not 2"),
        ({"maybe": "never"}, r"Outer\.maybe is 'never'"),
        ({"inner": [1]}, r"Outer\.inner is \[1\], not an object"),
        ({"many": [{"name": 3}]}, r"Outer\.many\[0\]\.name is 3, not str"),
        ({"limits": {"a": None}}, r"Outer\.limits\['a'\] is None"),
        ({"kind": "c"}, r"Outer\.kind is 'c'"),
        ({"color": 1}, "'color', which is unknown"),
    ],
)
def test_a_field_of_another_type_is_named(change, message):
    sound = asdict(Outer(1, True, 0.5, (1.0, 2.0), None, Inner("a"), (), {}))
    with pytest.raises(FileError, match=rf"x\.json is no Outer \(.*{message}.*make it with make"):
        from_stored(Outer, {**sound, **change}, "x.json", "make(...)")
    with pytest.raises(FileError, match="Outer lacks count, inner"):
        from_stored(Outer, {k: v for k, v in sound.items() if k not in ("count", "inner")}, "x.json", "make(...)")


# Stored values of the verbs, with each part replaced by other values

OUTCOME = Outcome(4, 0.5, (0.1, 0.9), 0.5, (0.5, 0.5), (0.5, None))
CHOICE = Choice(
    Policy("entropy", (0.5,)), {"max_drop": 0.1}, OUTCOME, "d", Promise("max_drop", 0.1, 0.95, "betting", 2, 2)
)
LEARNED = LearnedScore(classes=2, earlier=True, weights=((0.5, 1.0, 2.0), (0.5, 1.0, 2.0, 3.0)), bias=(0.1, 0.2))
OTHERS = [replace(CHOICE, policy=Policy(score, (0.5,))) for score in (LEARNED, TemperedScore("margin", (1.0, 2.0)))]
DESIGN = Design(("a",), ("pool",), (0.5,), 1.0, (0.9, 1.1), 0.5, (0.5, 0.5), (1.0, 1.0), (0.1, 0.0), (0.2,), 0.5)
ADVICE = Advice(
    1, 1, "entropy", 2.0, 0.5, 0.5, 4, (DESIGN,), (CandidateResult("a", "pool", 0.5, 0.5, 1.0, 0.1, None),), 0, "f"
)


def save_settings(path):
    path.write_text(json.dumps({"settings": asdict(Settings()), "environment": {}}))


KINDS = {
    "choice.json": (CHOICE.save, Choice.load, Choice),
    "learned.json": (OTHERS[0].save, Choice.load, Choice),
    "tempered.json": (OTHERS[1].save, Choice.load, Choice),
    "cost.json": (ExitCost((1.0, 2.0), (0.5, 0.0)).save, ExitCost.load, ExitCost),
    "advice.json": (ADVICE.save, Advice.load, Advice),
    "config.json": (save_settings, lambda path: open_run(path.parent).settings, Settings),
}


def places(value, here=()):
    """The path to every part of a JSON value."""
    yield here
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*here, key))


def replaced(value, place, new):
    if not place:
        return new
    copy = list(value) if isinstance(value, list) else dict(value)
    copy[place[0]] = replaced(copy[place[0]], place[1:], new)
    return copy


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_file_with_any_part_replaced_is_refused_or_whole(tmp_path_factory, kind, data):
    save, load, cls = KINDS[kind]
    path = tmp_path_factory.mktemp("stored") / kind
    save(path)
    assert isinstance(load(path), cls)
    sound = json.loads(path.read_text())
    sound.pop("sha256", None)  # it is compared first
    place = data.draw(st.sampled_from(list(places(sound))))
    path.write_text(json.dumps(replaced(sound, place, data.draw(anything))))
    try:
        found = load(path)
    except FileError as error:
        assert kind in str(error)
    except InputError as error:  # the text names a function
        assert cls is Settings and "--trust" in str(error)
    else:  # the replaced part had no fixed type, or the new value has the same type
        assert isinstance(found, cls)
        if cls is not Settings:
            found.save(path)
            assert load(path) == found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [10**400, -(10**400), 2**1024], ids=["large", "small", "just beyond"])
def test_integers_beyond_all_floats_are_refused_wherever_numbers_stand(tmp_path, kind, number):
    save, load, cls = KINDS[kind]
    save(tmp_path / kind)
    sound = json.loads((tmp_path / kind).read_text())
    sound.pop("sha256", None)
    for place in places(sound):
        (tmp_path / kind).write_text(json.dumps(replaced(sound, place, number)))
        try:
            assert isinstance(load(tmp_path / kind), cls)  # the part may be an integer, or any value
        except FileError as error:
            assert kind in str(error)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "NaN", "[-Infinity]", "[1e999]", "9" * 5000])
def test_deep_endless_and_infinite_json_is_refused(tmp_path, content):
    for kind, (_, load, _) in KINDS.items():
        (tmp_path / kind).write_text(content)
        with pytest.raises(FileError, match=kind):
            load(tmp_path / kind)


def test_an_entry_has_its_type(tmp_path):
    (tmp_path / "x.json").write_text('{"rows": [{"a": 1}], "kept": [1, 2]}')
    assert read_entry(tmp_path / "x.json", "rows", list[dict[str, Any]], "bench") == [{"a": 1}]
    assert read_entry(tmp_path / "x.json", "kept", list[int], "design") == [1, 2]
    for name, kind in (("rows", list[int]), ("kept", list[str]), ("none", list[int])):
        with pytest.raises(FileError, match=name):
            read_entry(tmp_path / "x.json", name, kind, "bench")
