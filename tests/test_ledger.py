"""The ledger: what is written comes back, whatever the process or the disk does to the file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distplateau.errors import InputError
from distplateau.record.ledger import FILE_NAME, Ledger, Line, decode, encode, read_ledger, read_lines

property_test = settings(deadline=None, derandomize=True, max_examples=200)

strings = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: text not in {"nan", "inf", "-inf"})
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | strings,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def validate(ledger, number, **fields):
    shape = {
        "epoch": float(number), "step": 10 * number, "monitor": "val/loss", "value": 1 / number,
        "decision": "improved", "lr_before": [0.1, 0.01], "lr_after": [0.1, 0.01],
        "best": 1 / number, "num_bad": 0, "cooldown": 0,
    }  # fmt: skip
    return ledger.append("validation", validation=number, **{**shape, **fields})


def numbers(run_dir):
    return [event["validation"] for event in read_ledger(run_dir).validations]


def same(one, other):
    """Compare with NaN equal to itself and 1 not equal to 1.0."""
    return repr(one) == repr(other)


# One line.


@property_test
@given(st.dictionaries(strings.filter(lambda key: key not in {"event", "config"}), values, max_size=4))
def test_an_event_comes_back_from_its_line(fields):
    event = {"event": "start", **fields}
    line = encode(event)
    assert "\n" not in line
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert same(decode(line), event)


@pytest.mark.parametrize(("value", "text"), [(math.nan, '"nan"'), (math.inf, '"inf"'), (-math.inf, '"-inf"')])
def test_nonfinite_numbers_are_strings_in_the_file_and_floats_again_in_memory(value, text):
    event = {"event": "start", "best": value, "list": [value, (value,)], "deep": {"x": value}}
    line = encode(event)
    assert line == f'{{"event":"start","best":{text},"list":[{text},[{text}]],"deep":{{"x":{text}}}}}'
    assert same(decode(line), {"event": "start", "best": value, "list": [value, [value]], "deep": {"x": value}})


def test_a_configuration_keeps_its_strings():
    event = {"event": "start", "config": {"run": {"name": "nan"}, "list": ["inf"]}}
    assert decode(encode(event)) == event


@property_test
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_are_written_shortest_and_exactly(value):
    assert encode({"event": "x", "value": value}) == f'{{"event":"x","value":{value!r}}}'
    assert decode(encode({"event": "x", "value": value}))["value"].hex() == value.hex()


@pytest.mark.parametrize(
    "line",
    ["", "{", "null", "[]", '"event"', "{}", '{"event":3}', '{"validation":1}', '{"event":"validation"}',
     '{"event":"validation","validation":"1"}', '{"event":"validation","validation":1.5}', '{"event":"resumed"}',
     '{"event":"resumed","last_validation":null}', '{"event":"a"}{"event":"b"}', '{"event":"a"', "9" * 10_000],
)  # fmt: skip
def test_a_line_that_is_no_event(line):
    with pytest.raises(ValueError, match=r".+"):
        decode(line)


# The file.


def test_events_come_back_in_order_with_their_time(tmp_path):
    ledger = Ledger(tmp_path)
    written = [ledger.append("start", run="r"), validate(ledger, 1, value=math.nan), validate(ledger, 2)]
    written.append(ledger.append("finished", best=math.inf))
    history = read_ledger(tmp_path)
    assert same(history.events, written)
    assert history.torn_lines == []
    assert history.start["run"] == "r"
    assert history.finished == written[-1]
    assert all(event["time"] > 1.7e9 for event in history.events)
    assert (tmp_path / FILE_NAME).read_bytes().count(b"\n") == 4


def test_an_event_is_on_disk_when_append_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda fd: synced.append((tmp_path / FILE_NAME).read_bytes()))
    Ledger(tmp_path).append("start")
    assert synced
    assert synced[-1].endswith(b"}\n")


@pytest.mark.parametrize(
    "name", ["Übung №1", "实验", "🚀", 'quote " and \\ backslash', "line\nbreak\r\x0b\x85\u2028\u2029", "\x00\x7f", " "]
)
def test_unicode_and_control_characters_in_names(tmp_path, name):
    folder = tmp_path / "Ünïcode 🚀"
    folder.mkdir()
    ledger = Ledger(folder)
    ledger.append("start", run=name, classes=[name], **{name: name})
    validate(ledger, 1, metrics={f"val/{name}": 0.5})
    history = read_ledger(folder)
    assert (history.start["run"], history.start["classes"], history.start[name]) == (name, [name], name)
    assert history.validations[0]["metrics"] == {f"val/{name}": 0.5}
    assert history.torn_lines == []


def test_missing_or_empty(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match=rf"{folder}: has no ledger.jsonl; give a run folder"):
            read_ledger(folder)
    for content in (b"", b"\n\n", b"{", b"\xff\xfe\n"):
        (tmp_path / FILE_NAME).write_bytes(content)
        with pytest.raises(InputError, match="holds no event"):
            read_ledger(tmp_path)


# A process that dies while it writes.


def test_a_line_torn_at_any_byte_is_ignored_and_sealed(tmp_path):
    path = tmp_path / FILE_NAME
    ledger = Ledger(tmp_path)
    ledger.append("start", run="Ü")
    validate(ledger, 1)
    whole = path.read_bytes()
    validate(ledger, 2, note="Ü🚀")
    last = path.read_bytes()[len(whole) :]
    for length in range(1, len(last) - 1):
        path.write_bytes(whole + last[:length])
        assert numbers(tmp_path) == [1]
        assert read_ledger(tmp_path).torn_lines == [3]
        ledger = Ledger(tmp_path)
        assert path.read_bytes() == whole + last[:length] + b"\n"  # nothing is truncated
        validate(ledger, 2)
        assert numbers(tmp_path) == [1, 2]
        assert read_ledger(tmp_path).torn_lines == [3]


def test_without_the_seal_the_next_event_would_be_lost(tmp_path):
    """Negative control."""
    ledger = Ledger(tmp_path)
    ledger.append("start")
    with ledger.path.open("ab") as file:
        file.write(b'{"event":"valid')
    validate(ledger, 1)  # the same object: it did not look at the file again
    assert numbers(tmp_path) == []


def test_a_whole_line_that_lacks_only_its_end_is_kept(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.append("start")
    validate(ledger, 1)
    ledger.path.write_bytes(ledger.path.read_bytes()[:-1])
    validate(Ledger(tmp_path), 2)
    assert numbers(tmp_path) == [1, 2]
    assert read_ledger(tmp_path).torn_lines == []


# Seals.


def test_each_line_is_sealed_over_the_one_before(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.append("start", run="Ü")
    validate(ledger, 1)
    ledger = Ledger(tmp_path)  # goes on where the other one stopped
    validate(ledger, 2)
    with ledger.path.open("a") as file:
        file.write('{"event":"validation","valid')
    validate(Ledger(tmp_path), 2)  # a torn line is passed over
    lines = [line for line in read_lines(ledger.path) if line.event]
    previous = ""
    for line in lines:
        content = encode(line.event)
        assert line.content == content
        previous = hashlib.sha256((previous + content).encode()).hexdigest()[:16]
        assert line.seal == previous
        assert line.text == f'{content[:-1]},"seal":"{previous}"}}'
        assert "seal" not in line.event
    assert len(lines) == 4


def test_whole_lines_are_told_from_torn_ones(tmp_path):
    Ledger(tmp_path).append("start", digest="0123456789abcdef")
    [line] = read_lines(tmp_path / FILE_NAME)
    assert line.was_whole
    assert Line(1, line.text + "\x0b", None).was_whole
    assert Line(1, line.text[:-1] + "|", None).was_whole
    assert not any(Line(1, line.text[:length], None).was_whole for length in range(len(line.text) - 3))


# Requeues.


def test_resumed_drops_the_validations_after_the_one_it_names(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.append("start")
    for number in (1, 2, 3, 4):
        validate(ledger, number, attempt=1)
    ledger.append("resumed", last_validation=2)
    for number in (3, 4, 5):
        validate(ledger, number, attempt=2)
    ledger.append("interrupted")
    ledger.append("resumed", last_validation=4)
    validate(ledger, 5, attempt=3)
    history = read_ledger(tmp_path)
    assert numbers(tmp_path) == [1, 2, 3, 4, 5]
    assert [event["attempt"] for event in history.validations] == [1, 1, 2, 2, 3]
    assert [event["event"] for event in history.events if event["event"] != "validation"] == [
        "start", "resumed", "interrupted", "resumed",
    ]  # fmt: skip


def test_resumed_from_the_start_drops_all(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.append("start")
    validate(ledger, 1)
    ledger.append("resumed", last_validation=0)
    assert numbers(tmp_path) == []


def test_a_finished_run_that_goes_on_is_no_longer_finished(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.append("start")
    validate(ledger, 1)
    ledger.append("finished")
    assert read_ledger(tmp_path).finished
    ledger.append("resumed", last_validation=1)
    assert read_ledger(tmp_path).finished is None
    validate(ledger, 2)
    ledger.append("finished")
    history = read_ledger(tmp_path)
    assert [event["event"] for event in history.events].count("finished") == 1
    assert history.finished


@property_test
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=6))
def test_numbers_stay_unique_and_in_order_over_any_preemptions(tmp_path_factory, attempts):
    """Each attempt writes some validations and is killed; the next one goes back some of them."""
    run_dir = tmp_path_factory.mktemp("run")
    ledger, last = Ledger(run_dir), 0
    ledger.append("start")
    for written, back in attempts:
        for number in range(last + 1, last + 1 + written):
            validate(ledger, number)
        last = max(0, last + written - back)
        ledger = Ledger(run_dir)
        ledger.append("resumed", last_validation=last)
        assert numbers(run_dir) == list(range(1, last + 1))


# A damaged file.


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("damaged")
    ledger = Ledger(run_dir)
    ledger.append("start", run="Ü", lr=math.inf, config={"run": {"name": "r"}})
    for number in (1, 2, 3):
        validate(ledger, number)
    ledger.append("resumed", last_validation=2)
    validate(ledger, 3)
    ledger.append("finished", best=0.5)
    return run_dir, ledger.path.read_bytes()


def read_all(run_dir):
    history = read_ledger(run_dir)
    return history.start, history.validations, history.finished


def test_a_flipped_byte_anywhere_costs_at_most_its_lines(intact):
    run_dir, content = intact
    rng, path = random.Random(0), run_dir / FILE_NAME
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        read_all(run_dir)
        assert len(read_ledger(run_dir).torn_lines) <= 2


def test_any_damage_is_an_input_error_or_read_around(intact):
    run_dir, content = intact
    rng, path = random.Random(1), run_dir / FILE_NAME
    for _ in range(1000):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 3, 30, 300])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged[rng.choice([0, rng.randrange(len(damaged))]) :])
        with contextlib.suppress(InputError):
            read_all(run_dir)
        Ledger(run_dir).append("interrupted")
        assert read_ledger(run_dir).events[-1]["event"] == "interrupted"
