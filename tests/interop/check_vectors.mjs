// Checks this implementation's rules against vectors.json (section 15) and prints how many entries of each group were checked.
// Usage: node check_vectors.mjs vectors.json
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { Float, PIECE, Refused, decode, encodeHeader, padOf, sha256 } from "./wire.mjs";
import { Ledger, Neighbour, NO_REPORT, StopRule, copyReport, flowOf, mix, toBytes, toVector } from "./rules.mjs";
import {
    canonical, canonicalFloat, domain, fingerprint, isSealed, packReady, packRound, placesToBytes, bytesToPlaces, readKeys, readReady, readRound, receipt,
    sealReady, sealRound, signingKey, isSigned, updateField,
} from "./sealed.mjs";
import { checkScenario } from "./check_scenario.mjs";

const vectors = JSON.parse(readFileSync(process.argv[2], "utf8"));
const hex = (text) => Buffer.from(text, "hex");
const checked = {};

function checkKeys() {
    for (const entry of vectors.keys) {
        const keys = readKeys(entry.private_pem);
        assert.equal(keys.secret.toString("hex"), entry.ed25519_secret);
        assert.equal(keys.linkSecret.toString("hex"), entry.x25519_secret);
        assert.equal(keys.linkPublic.toString("hex"), entry.x25519_public);
        assert.equal(keys.curveSecret, entry.curve_secret);
        assert.equal(keys.curvePublic, entry.curve_public);
        const { signature, ...fields } = entry.card;
        const signed = Buffer.concat([domain("card"), Buffer.from(canonical(fields))]);
        assert.equal(signed.toString("hex"), entry.signed);
        assert.equal(keys.identity.toString("hex"), fields.identity);
        assert(isSigned(keys.identity, signed, hex(signature)));
        assert.equal(fingerprint(keys.identity, keys.linkPublic).toString("hex"), entry.fingerprint);
    }
    return vectors.keys.length;
}

function checkStudy() {
    for (const { value, written } of vectors.study.floats) assert.equal(canonicalFloat(hexFloat(value)), written);
    for (const { utf8, written } of vectors.study.texts) assert.equal(canonical(hex(utf8).toString("utf8")), written);
    for (const name of ["averaging", "model"]) {
        const { canonical: text, digest, derived, start } = vectors.study[name];
        assert.equal(sha256(domain("study"), Buffer.from(text)).toString("hex"), digest);
        assert.equal(sha256(hex(start)).toString("hex"), derived.start.digest);
        const tensors = derived.parameters.tensors.map((t) => [t.name, t.shape, t.dtype]);
        assert.equal(sha256(Buffer.from(JSON.stringify(tensors))).toString("hex"), derived.parameters.digest);
    }
    return vectors.study.floats.length + vectors.study.texts.length + 2;
}

function hexFloat(text) {
    const [, sign, whole, digits, power] = text.match(/^(-?)0x([01])\.([0-9a-f]+)p([+-]\d+)$/);
    const mantissa = Number(whole) + Number(BigInt(`0x${digits}`)) / 16 ** digits.length;
    const n = mantissa * 2 ** (Number(power) / 2 | 0) * 2 ** (Number(power) - (Number(power) / 2 | 0));
    return sign ? -n : n;
}

/** A vector's fields of a message as encodeHeader takes them. */
function fieldsOf(name, fields) {
    const bytes = new Set(["study", "layout", "start", "digest", "pad", "forward"]);
    const floats = new Set(["sum", "weight", "low", "high"]);
    const walk = (value, key) => {
        if (value !== null && typeof value === "object" && "int" in value) return BigInt(value.int);
        if (value !== null && floats.has(key)) return new Float(value);
        if (value !== null && bytes.has(key)) return hex(value);
        if (["marks", "sealed", "receipts"].includes(key) && value !== null) return value.map((v) => (v === null ? null : hex(v)));
        if (key === "outputs") return value.map((v) => new Float(v));
        if (Array.isArray(value)) return value.map((v) => walk(v, ""));
        if (value !== null && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, walk(v, k)]));
        return value;
    };
    return walk(fields, "");
}

const byRule = (n, from = 0) => Buffer.from(Uint8Array.from({ length: n }, (_, i) => (7 * (i + from) + 3) % 251));

function checkMessages() {
    const { each, other_encodings, large } = vectors.messages;
    for (const entry of each) {
        const values = fieldsOf(entry.message, entry.fields);
        assert.equal(encodeHeader(entry.message, values).toString("hex"), entry.header, entry.message);
        const frames = entry.payload ? [hex(entry.header), hex(entry.payload)] : [hex(entry.header)];
        const { name, payload, ...read } = decode(frames);
        assert.equal(name, entry.message);
        assert.deepEqual(read, values);
    }
    for (const entry of other_encodings) assert.deepEqual(decode([hex(entry.header)]), decode([hex(entry.same_as)]), entry.what);
    const whole = byRule(large.size_bytes);
    assert.equal(sha256(whole).toString("hex"), large.sha256);
    large.pieces.forEach((piece, i) => {
        const payload = whole.subarray(i * PIECE, (i + 1) * PIECE);
        assert.equal(payload.length, piece.payload_bytes);
        assert.equal(sha256(payload).toString("hex"), piece.payload_sha256);
        const update = { exchange: large.exchange, channels: [["x", "uint8", large.size_bytes]], size_bytes: large.size_bytes, digest: hex(large.sha256), marks: null, ...large.news };
        const header = i ? encodeHeader("Chunk", { exchange: large.exchange, offset: i * PIECE }) : encodeHeader("Update", { ...update, pad: padOf(update) });
        assert.equal(header.toString("hex"), piece.header);
    });
    return each.length + other_encodings.length + large.pieces.length;
}

/** A neighbour hospital-1 as hospital-0 sees it. */
function receiver(exchange, format, ledger = new Ledger(() => {})) {
    const own = {
        study: Buffer.alloc(32, 0xaa), layout: Buffer.alloc(32, 0xbb), start: Buffer.alloc(32, 0xcc), incarnation: 11, anew: 0, exchange: () => exchange,
        ahead: 1, format: () => format, lastExchange: 1e6, stop: new StopRule({ tolerance: 0.1, patience: 1, diameter: 1, lambda_2: 2, rounds: 0 }),
    };
    return new Neighbour("hospital-1", own, ledger, () => ({ ...NO_REPORT, closed_through: exchange - 1, settled: exchange - 1, confirmed: exchange - 1 }));
}

function checkRefused() {
    const { each, formats, exchange } = vectors.refused;
    const frame = (f) => (typeof f === "string" ? hex(f) : byRule(f.bytes_by_rule, f.from));
    for (const entry of each) {
        const neighbour = receiver(exchange, formats[entry.format]);
        const take = (frames) => neighbour.receive(frames.map(frame));
        for (const frames of entry.before) take(frames);
        assert.throws(() => take(entry.frames), (error) => error instanceof Refused && error.reason === entry.reason, `${entry.what}: not ${entry.reason}`);
    }
    return each.length;
}

function checkPad() {
    const update = { channels: [["x", "float32", 4]], size_bytes: 16, digest: Buffer.alloc(32), marks: null };
    for (const entry of vectors.pad) {
        const whole = { ...update, exchange: entry.exchange, report: entry.report, stop: entry.stop };
        const pad = padOf(whole);
        assert.equal(pad.length, entry.pad_bytes);
        assert.equal(encodeHeader("Update", { ...whole, pad }).length, entry.header_bytes);
    }
    return vectors.pad.length;
}

function checkGreeting() {
    let steps = 0;
    for (const talk of vectors.greeting) {
        const neighbour = receiver(7, vectors.refused.formats.small);
        assert.equal(talk.own_incarnation, 11);
        for (const step of talk.steps) {
            assert.equal(neighbour.state, step.state, talk.what);
            const values = {
                member: "hospital-1", study: hex(step.study ?? ""), layout: Buffer.alloc(32, 0xbb), start: Buffer.alloc(32, 0xcc), incarnation: step.incarnation,
                echo: step.echo, is_open: step.is_open, anew: 0, remembered: { anew: 0, report: NO_REPORT }, exchange: 7, report: NO_REPORT,
                stop: { agreed_for: 0, stop_round: null }, reason: "pausing",
            };
            let [answers, refused] = [[], null];
            try {
                answers = neighbour.receive([encodeHeader(step.message, values)]).answers;
            } catch (error) {
                [answers, refused] = [error.answers ?? [], error.reason];
            }
            assert.equal(refused, step.refused, talk.what);
            assert.equal(neighbour.state, step.then, talk.what);
            assert.deepEqual(answers, step.answer ? [step.answer.message] : [], talk.what);
            if (step.answer?.message === "Hello") assert.deepEqual([neighbour.incarnation, neighbour.state === "open"], [step.answer.echo, step.answer.is_open]);
            if (step.answer?.message === "Goodbye") assert.equal(refused, step.answer.reason);
            steps++;
        }
    }
    return steps;
}

function checkLedger() {
    let steps = 0;
    for (const [name, conversation] of Object.entries(vectors.ledger)) {
        let rolled = null;
        const fresh = (kept) => new Ledger((flow, exchange) => (rolled = exchange), kept);
        const sides = { a: { ledger: fresh() }, b: { ledger: fresh() } };
        for (const side of Object.values(sides)) side.disk = side.ledger.kept();
        for (const step of conversation) {
            const [me, other] = [sides[step.side], sides[step.side === "a" ? "b" : "a"]];
            rolled = null;
            if (step.do === "hear") me.ledger.hear(step.report ?? other.disk.own);
            else if (step.do === "close") me.ledger.close(step.exchange, step.merged ? "flow" : null);
            else if (step.do === "keep") me.disk = me.ledger.kept();
            else if (step.do === "kill") me.ledger = fresh(structuredClone(me.disk));
            else assert.fail(step.do);
            const what = `${name}: step ${steps}`;
            assert.equal(rolled, step.rolls_back, what);
            const { own, open, lostHistory } = me.ledger;
            assert.deepEqual({ ...copyReport(own), open: open?.exchange ?? null }, step.state, what);
            assert.deepEqual(me.disk.own, step.durable_report, what);
            assert.equal(lostHistory, step.lost_history, what);
            steps++;
        }
    }
    return steps;
}

function checkStop() {
    let entries = 0;
    for (const [name, network] of Object.entries(vectors.stop.networks)) {
        const nodes = network.neighbours.map(() => new StopRule({ ...network.rule, rounds: network.training_rounds }));
        assert.equal(nodes[0].earliest, network.earliest, name);
        for (const step of network.rounds) {
            const away = step.away ?? [];
            const said = nodes.map((node) => [node.h, node.stopRound]);
            nodes.forEach((node, i) => {
                if (away.includes(i)) return node.jump();
                const skipped = new Set([...(step.skipped?.[i] ?? []), ...away]);
                const came = network.neighbours[i].filter((j) => !skipped.has(j));
                for (const j of came) node.hear(j, said[j][1]);
                node.endRound(step.round, step.d[i], step.norm[i], came.length < network.neighbours[i].length, came.map((j) => said[j][0]));
                node.lookAgain();
            });
            assert.deepEqual(nodes.map((node) => node.h), step.agreed_for, `${name}, round ${step.round}`);
            assert.deepEqual(nodes.map((node) => node.stopRound), step.stop_round, `${name}, round ${step.round}`);
            entries++;
        }
    }
    const { rule, own_counters, each } = vectors.stop.claims;
    for (const { stop_round, believed } of each) {
        const counters = Object.entries(own_counters).map(([round, h]) => [Number(round), h]);
        const node = new StopRule({ ...rule, rounds: 0 }, { counters, h: counters.at(-1)[1] });
        assert.equal(node.isTooEarly(stop_round) ? "too early" : node.judge(stop_round), believed, `claim ${stop_round}`);
        entries++;
    }
    return entries;
}

/** Averages three vectors as nodes do that tell each other at once what they have merged. */
function checkAveraging() {
    let entries = 0;
    for (const [name, entry] of Object.entries(vectors.averaging)) {
        const names = Object.keys(entry.first).sort();
        const nodes = Object.fromEntries(names.map((n) => {
            const back = [];
            const ledgers = Object.fromEntries(Object.keys(entry.weights[n]).map((j) => [j, new Ledger((flow) => back.push(flow))]));
            return [n, { x: toVector(hex(entry.first[n]), entry.dtype), back, ledgers }];
        }));
        for (let round = 0; round < Math.max(...entry.after); round++) {
            const sent = Object.fromEntries(names.map((n) => [n, nodes[n].x]));
            // with the update of a round comes the report of the round before; one that is lost brings none
            const reports = Object.fromEntries(names.map((n) => [n, Object.fromEntries(Object.entries(nodes[n].ledgers).map(([j, l]) => [j, copyReport(l.own)]))]));
            for (const n of names) {
                const node = nodes[n];
                const isLost = (j) => entry.lost.some(([r, from, to]) => r === round && from === j && to === n);
                const came = Object.keys(node.ledgers).sort().filter((j) => !isLost(j));
                for (const j of came) node.ledgers[j].hear(reports[j][n]);
                const flows = came.map((j) => flowOf(entry.weights[n][j], sent[j], sent[n]));
                const back = node.back.splice(0);
                node.x = mix(node.x, flows, back);
                for (const j of Object.keys(node.ledgers)) node.ledgers[j].close(round, came.includes(j) ? flows[came.indexOf(j)] : null);
            }
            const expected = entry.vectors[round + 1];
            if (!expected) continue;
            for (const n of names) {
                assert.equal(toBytes(nodes[n].x).toString("hex"), expected[n], `${name}, after ${round + 1}, ${n}`);
                entries++;
            }
        }
    }
    return entries;
}

function checkRecord() {
    const { ed25519_secret, identity, study, update_digest, records } = vectors.record;
    assert.equal(updateField(update_digest.payload_digests.map(hex)).toString("hex"), update_digest.update);
    for (const entry of records) {
        const fields = { ...entry.fields };
        const key = signingKey(hex(ed25519_secret));
        const sealed = hex(entry.sealed);
        const isReady = entry.domain === "p2pfl ready record v1";
        if (isReady) {
            fields.links = hex(fields.links);
            fields.started = fields.started === null ? null : hex(fields.started);
            for (const set of [fields.links, fields.started]) if (set) assert.deepEqual(placesToBytes(bytesToPlaces(set)), set);
        } else fields.update = fields.update === null ? null : hex(fields.update);
        assert.equal((isReady ? packReady : packRound)(fields).toString("hex"), entry.array);
        assert.deepEqual((isReady ? sealReady : sealRound)(fields, key, hex(study)), sealed);
        assert.deepEqual(isReady ? readReady(sealed, 16) : readRound(sealed, 16, 100), fields);
        assert(isSealed(isReady ? "ready record" : "round record", sealed, hex(identity), hex(study)));
        assert.equal(receipt(sealed).toString("hex"), entry.receipt);
    }
    return records.length;
}

checked.keys = checkKeys();
checkStudy();
checked.messages = checkMessages();
checked.refused = checkRefused();
checked.pad = checkPad();
checked.greeting = checkGreeting();
checked.ledger = checkLedger();
checked.stop = checkStop();
checked.averaging = checkAveraging();
checked.record = checkRecord();
checked.scenario = await checkScenario(vectors.scenario);
console.log(JSON.stringify(checked));
