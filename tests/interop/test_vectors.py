"""docs/vectors.json: it is what the code generates, and the code reproduces each outcome from the file's own inputs."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from hashlib import sha256
from typing import Any

import make_vectors
import numpy as np
import pytest
import vector_belief
import vector_messages
import vector_scenario
import vector_sequences
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from p2pfl.algorithms.stopping import StopRule
from p2pfl.errors import BadMessage, PeerError
from p2pfl.governance.card import Card, card_message
from p2pfl.governance.encoding import canonical
from p2pfl.governance.identity import Identity
from p2pfl.governance.study import Study
from p2pfl.wire import ready_record, round_record
from p2pfl.wire.codec import decode, encode
from p2pfl.wire.messages import MESSAGES, Busy, Goodbye, Report, StopNews, Update
from p2pfl.wire.update import Assembly, UpdateFormat

VECTORS: dict[str, Any] = json.loads(make_vectors.PAGE.read_text(encoding="utf-8"))
GROUPS = [name for name in VECTORS if name != "schema"]


def differences(found: Any, expected: Any, place: str = "") -> list[str]:
    """Places in which two values differ; floats may differ in their last bits, which an eigenvalue's do from machine to machine."""
    if isinstance(found, float) and isinstance(expected, float):
        return [] if found == pytest.approx(expected, rel=1e-12, abs=1e-300) else [f"{place}: {found} and {expected}"]
    if isinstance(found, dict) and isinstance(expected, dict) and found.keys() == expected.keys():
        return [each for key in found for each in differences(found[key], expected[key], f"{place}.{key}")]
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        return [each for i, pair in enumerate(zip(found, expected, strict=True)) for each in differences(*pair, f"{place}.{i}")]
    return [] if type(found) is type(expected) and found == expected else [f"{place}: {str(found)[:80]} and {str(expected)[:80]}"]


def test_the_file_is_what_the_code_generates():
    assert differences(make_vectors.vectors(), VECTORS) == []


def test_all_twelve_groups_are_there():
    expected = ["keys", "study", "messages", "refused", "pad", "greeting", "ledger", "stop", "belief", "averaging", "record", "scenario"]

    assert expected == GROUPS


@pytest.mark.parametrize("keys", VECTORS["keys"], ids=lambda keys: keys["card"]["name"])
def test_keys_give_their_public_halves_and_the_cards_signature(tmp_path, keys):
    path = tmp_path / "private.pem"
    path.write_text(keys["private_pem"])
    path.chmod(0o600)
    identity = Identity.load(tmp_path)

    assert (identity.curve_public.decode(), identity.curve_secret.decode()) == (keys["curve_public"], keys["curve_secret"])
    card = Card.from_mapping(keys["card"], "vectors")  # which checks the signature
    assert identity.owns(card)
    assert card_message(keys["card"]).hex() == keys["signed"]
    assert identity.signing.sign(bytes.fromhex(keys["signed"])).hex() == keys["card"]["signature"]
    raw = bytes.fromhex(keys["card"]["identity"]) + bytes.fromhex(keys["x25519_public"])
    assert sha256(b"p2pfl keys v1\0" + raw).hexdigest() == card.fingerprint == keys["fingerprint"]


@pytest.mark.parametrize("kind", ["averaging", "model"])
def test_a_studys_text_gives_its_bytes_and_digests(kind):
    given = VECTORS["study"][kind]
    study = Study.from_mapping(yaml.safe_load(given["yaml"]), "vectors")

    assert canonical(study.as_dict()).decode() == given["canonical"]
    assert sha256(b"p2pfl study v1\0" + given["canonical"].encode()).hexdigest() == study.digest == given["digest"]
    assert sha256(bytes.fromhex(given["start"])).hexdigest() == given["derived"]["start"]["digest"]
    layout = [[each["name"], each["shape"], each["dtype"]] for each in given["derived"]["parameters"]["tensors"]]
    assert sha256(json.dumps(layout, separators=(",", ":")).encode()).hexdigest() == given["derived"]["parameters"]["digest"]


def test_the_documents_table_of_channels_is_that_of_the_algorithms():
    """Names by phase; those of choco and powergossip depend on more, and are in the text beside."""
    document = (make_vectors.PAGE.parent / "protocol.md").read_text(encoding="utf-8")
    table = document.partition("| algorithm | phase 0 | phase 1 |")[2].partition("\n\n")[0]
    rows = {
        name: [re.findall(r"`(\w+)`", phase) for phase in phases if phase.strip()]
        for names, *phases in (line.strip("|").split("|") for line in table.splitlines()[2:])
        for name in re.findall(r"`([\w-]+)`", names)
    }

    assert rows.keys() == {each["algorithm"] for each in VECTORS["study"]["channels"]}
    for each in VECTORS["study"]["channels"]:
        names = [[name for name, _, _ in phase["channels"]] for phase in each["channels"]]
        if each["algorithm"] == "choco":
            full = [name for name, _, _ in each["channels"][0]["full"]["channels"]]
            assert (rows["choco"], len(names)) == ([["halvings", *full]], 1)
        else:
            assert rows[each["algorithm"]] == names


def test_floats_and_texts_are_written_as_the_file_has_them():
    assert [canonical(float.fromhex(each["value"])).decode() for each in VECTORS["study"]["floats"]] == [
        each["written"] for each in VECTORS["study"]["floats"]
    ]
    assert [canonical(bytes.fromhex(each["utf8"]).decode()).decode() for each in VECTORS["study"]["texts"]] == [
        each["written"] for each in VECTORS["study"]["texts"]
    ]


def test_every_kind_of_message_is_read_and_written_as_the_file_has_it():
    for given in VECTORS["messages"]["each"]:
        frames = [bytes.fromhex(each) for each in (given["header"], given["payload"]) if each]
        message, payload = decode(frames)

        assert (type(message).__name__, vector_messages.plain(asdict(message))) == (given["message"], given["fields"])
        assert [bytes(frame) for frame in encode(message, payload if len(frames) > 1 else None)] == frames
    assert {given["message"] for given in VECTORS["messages"]["each"]} == {kind.__name__ for kind in MESSAGES.values()}


@pytest.mark.parametrize("given", VECTORS["messages"]["other_encodings"], ids=lambda given: given["what"])
def test_other_encodings_are_the_same_message(given):
    assert decode([bytes.fromhex(given["header"])])[0] == decode([bytes.fromhex(given["same_as"])])[0]
    assert given["header"] != given["same_as"]


def test_a_large_update_is_put_together_from_its_pieces():
    given = VECTORS["messages"]["large"]
    data, assembly, start = (
        vector_messages.frame_from({"bytes_by_rule": given["size_bytes"], "from": 0}),
        Assembly(vector_messages.LARGE),
        0,
    )
    for piece in given["pieces"]:
        part = data[start : start + piece["payload_bytes"]]
        assert sha256(part).hexdigest() == piece["payload_sha256"]
        message, payload = decode([bytes.fromhex(piece["header"]), part])
        found = assembly.begin(message, payload) if isinstance(message, Update) else assembly.extend(message, payload)
        start += len(part)

    assert found is not None
    assert sha256(found[0]["x"].tobytes()).hexdigest() == given["sha256"]


@pytest.mark.parametrize("given", VECTORS["refused"]["each"], ids=lambda given: given["what"])
def test_a_message_is_refused_for_the_reason_in_the_file(given):
    opened = vector_messages.session(vector_messages.FORMATS[given["format"]])
    frames = [[vector_messages.frame_from(each) for each in message] for message in (*given["before"], given["frames"])]
    outcomes = [vector_messages.outcome(opened, message) for message in frames]

    assert outcomes == [*[None] * len(given["before"]), given["reason"]]


def test_there_is_a_message_for_each_reason_of_the_wire():
    reasons = {each["reason"] for each in VECTORS["refused"]["each"]}

    assert reasons == {
        *("bad_message", "wrong_schema", "wrong_name", "wrong_study", "wrong_layout", "wrong_start", "not_greeted", "wrong_report"),
        *("stale_round", "far_round", "duplicate", "contradiction", "stray_chunk", "out_of_order", "wrong_size", "wrong_format"),
        *("wrong_digest", "not_finite"),
    }


def report_of(given: dict[str, Any]) -> Report:
    return Report(**{**given, "merged": tuple(given["merged"])})


def test_padding_follows_from_exchange_and_news():
    for given in VECTORS["pad"]:
        update_format = UpdateFormat(channels=(("x", "float32", (4,)),))
        encoded = update_format.pack(given["exchange"], {"x": np.zeros(4, dtype="<f4")})
        header = next(iter(encoded.messages(report_of(given["report"]), StopNews(**given["stop"]))))[0]
        update = decode([header, b"\0"])[0]

        assert isinstance(update, Update)
        assert (len(update.pad), len(header)) == (given["pad_bytes"], given["header_bytes"])


def test_padding_is_as_the_document_says():
    """The header with the longest news, less the header with an empty pad."""
    for given in VECTORS["pad"]:
        t = given["exchange"]
        largest = next(most for most in (2**7 - 1, 2**8 - 1, 2**16 - 1, 2**32 - 1, 2**64 - 1) if t + 12 <= most)
        own = {"exchange": t, "report": given["report"], "stop": given["stop"]}
        news = {"closed_through": largest, "merged": [largest - 2, largest - 1, largest], "confirmed": largest - 3, "settled": largest}
        longest = {"exchange": largest, "report": news, "stop": {"agreed_for": largest, "stop_round": 2**32 - 1}}
        lengths = []
        for fields in (own, longest):
            channels = {"channels": [["x", "float32", 4]], "size_bytes": 16, "digest": bytes(32), "marks": None, "pad": b""}
            lengths.append(len(vector_messages.header_of({"v": 4, "t": 2, **channels, **fields})[0]))

        assert given["pad_bytes"] == max(0, lengths[1] - lengths[0])


@pytest.mark.parametrize("given", VECTORS["greeting"], ids=lambda given: given["what"])
def test_a_greeting_goes_as_the_file_has_it(given):
    opened = vector_messages.session(incarnation=given["own_incarnation"])
    for step in given["steps"]:
        assert opened.state.name.lower() == step["state"]
        fields = {key: step[key] for key in ("incarnation", "echo", "is_open") if key in step}
        if "study" in step:
            fields["study"] = bytes.fromhex(step["study"])
        message = {"Goodbye": Goodbye(reason="pausing"), "Busy": Busy(exchange=7), "Hello": replace(vector_messages.HELLO, **fields)}
        reason, needs_answer = None, False
        try:
            needs_answer = opened.receive(encode(message[step["message"]]), exchange=7).needs_answer
        except PeerError as error:
            reason = error.reason

        assert (opened.state.name.lower(), reason) == (step["then"], step["refused"])
        if needs_answer:
            mine = opened.hello(exchange=7, **vector_messages.NEWS)
            assert step["answer"] == {"message": "Hello", "echo": mine.echo, "is_open": mine.is_open}
        else:
            assert step["answer"] == ({"message": "Goodbye", "reason": reason} if reason and reason.startswith("wrong_") else None)


OUTCOMES = ("rolls_back", "state", "durable_report", "lost_history")


@pytest.mark.parametrize("what", VECTORS["ledger"])
def test_a_ledger_goes_as_the_file_has_it(what):
    given = VECTORS["ledger"][what]
    steps = [{key: value for key, value in step.items() if key not in OUTCOMES} for step in given]

    assert json.loads(json.dumps(vector_sequences.run_ledger(steps))) == given


@pytest.mark.parametrize("what", VECTORS["stop"]["networks"])
def test_a_network_stops_as_the_file_has_it(what):
    given = VECTORS["stop"]["networks"][what]

    assert json.loads(json.dumps(vector_sequences.run_stop(given))) == given["rounds"]
    assert StopRule(**given["rule"]).earliest(given["training_rounds"]) == given["earliest"]
    assert given["rounds"][-1]["stop_round"] == [given["rounds"][-1]["round"]] * len(given["neighbours"])


def test_stop_rounds_are_believed_as_the_file_has_it():
    given = VECTORS["stop"]["claims"]
    counters = {int(number): counter for number, counter in given["own_counters"].items()}
    words = {True: "yes", False: "implausible_stop", None: "cannot tell"}

    assert [words[StopRule(**given["rule"]).admits(each["stop_round"], counters)] for each in given["each"]] == [
        each["believed"] for each in given["each"]
    ]


@pytest.mark.parametrize("given", VECTORS["belief"], ids=lambda given: given["what"])
def test_a_node_jumps_as_the_file_has_it(given):
    assert vector_belief.run_belief(given) == given["jumps_to"]


@pytest.mark.parametrize("given", VECTORS["belief"], ids=lambda given: given["what"])
def test_a_node_believes_what_the_document_says(given):
    """The second furthest of the members that are further than the links to them explain; beside the code."""
    reached: dict[str, int] = {}
    for each in given["heard"]:
        there = each["says"] if "says" in each else (each["record_of_round"] + 1) * given["phases"]
        reached[each["member"]] = max(reached.get(each["member"], -1), there)
    claim = max(each["says"] for each in given["heard"] if "says" in each)
    count = sorted(there for name, there in reached.items() if there > given["exchange"] + given["links"][name] * given["ahead"])
    believed = min(claim, count[-2]) if len(count) > 1 else given["exchange"]
    jumps = believed > given["exchange"] + given["ahead"]

    assert given["jumps_to"] == (-(-believed // given["phases"]) * given["phases"] if jumps else None)


@pytest.mark.parametrize("what", VECTORS["averaging"])
def test_vectors_are_averaged_as_the_file_has_them(what):
    given = VECTORS["averaging"][what]

    assert vector_sequences.run_averaging(given) == given["vectors"]


@pytest.mark.parametrize("what", VECTORS["averaging"])
def test_averaging_is_the_sum_of_the_document(what):
    """x + sum of w (x_j - x) in the roster's order, and then what is rolled back; in numpy, beside the code."""
    given = VECTORS["averaging"][what]
    dtype = np.dtype(given["dtype"])
    x = {name: np.frombuffer(bytes.fromhex(each), dtype) for name, each in given["first"].items()}
    back: dict[str, np.ndarray] = {}
    mean = np.mean([each.astype(np.float64) for each in x.values()], axis=0)
    for number in range(max(given["after"])):
        after, owed = {}, {}
        for name, row in given["weights"].items():
            total = x[name].copy()
            for other in sorted(row):
                if [number, other, name] in given["lost"]:
                    continue
                flow = dtype.type(row[other]) * (x[other] - x[name])
                total = total + flow
                if [number, name, other] in given["lost"]:
                    owed[name] = -flow
            after[name] = total + back.pop(name) if name in back else total
        x, back = after, owed
        if str(number + 1) in given["vectors"]:
            assert {name: each.tobytes().hex() for name, each in x.items()} == given["vectors"][str(number + 1)]

    last = np.mean([each.astype(np.float64) for each in x.values()], axis=0)
    largest = np.max([np.abs(np.frombuffer(bytes.fromhex(each), dtype)) for each in given["first"].values()], axis=0)
    assert (np.abs(last - mean) <= 64 * np.finfo(dtype).eps * largest).all()  # what was lost was rolled back


def test_records_are_sealed_as_the_file_has_them():
    given = VECTORS["record"]
    secret, study = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(given["ed25519_secret"])), bytes.fromhex(given["study"])
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(given["identity"]))
    for each in given["records"]:
        sealed, array = bytes.fromhex(each["sealed"]), bytes.fromhex(each["array"])
        kind = round_record if each["domain"] == "p2pfl round record v1" else ready_record
        signed = each["domain"].encode() + b"\0" + study + array

        assert sealed == secret.sign(signed) + array
        kind.verify(sealed, key, study)
        shown = {name: value.hex() if isinstance(value, bytes) else value for name, value in asdict(kind.unseal(sealed)).items()}
        assert json.loads(json.dumps(shown)) == each["fields"]
        assert sha256(sealed).digest()[:8].hex() == each["receipt"]
        with pytest.raises(BadMessage, match="wrong_signature"):
            kind.verify(sealed, key, bytes(32))


@pytest.mark.parametrize("me", vector_scenario.NAMES)
def test_each_side_of_the_scenario_answers_what_it_hears(me):
    """One side of the code, fed with the messages of the other one as the file has them, says what the file has."""
    given = VECTORS["scenario"]
    side = vector_scenario.Side(me, incarnation=given["incarnations"][me], began_ms=given["began_ms"][me])
    saved, now_s, said = None, -1.0, 0
    for row in given["conversation"]:
        while now_s < row["at_s"] - 1e-9:
            if side is not None and now_s >= 0:
                side.settle()
            now_s = round(now_s + vector_scenario.STEP_S, 1) if now_s >= 0 else 0.0
            if side is not None and not (row.get("starts_again") == me and now_s == row["at_s"]):
                side.protocol.tick(now_s)
                side.advance(now_s)
        if row.get("killed") == me:
            saved, side = side.saved, None
        elif row.get("starts_again") == me:
            side = vector_scenario.Side(
                me, incarnation=row["incarnation"], began_ms=given["began_ms"][f"{me} again"], saved=saved, now_s=now_s
            )
            side.protocol.tick(now_s)
            side.advance(now_s)
        elif row.get("from") == me:
            frames = side.next_messages(now_s)
            if not frames:
                side.settle()
                frames = side.next_messages(now_s)
            assert [[bytes(frame).hex() for frame in message] for message in frames] == [
                [each for each in (row["header"], row["payload"]) if each]
            ]
            said += 1
        elif "from" in row and side is not None and not row.get("lost"):
            side.hear([bytes.fromhex(each) for each in (row["header"], row["payload"]) if each], now_s)
            side.advance(now_s)

    assert said > 10
    assert side.x.tolist() == given["last"][me]
