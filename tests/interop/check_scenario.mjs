// The scenario of vectors.json (section 15): each side, fed with the other's messages, says what stands there.
// A link sends when it is a side's turn in the conversation: the frames of a message are made at that moment.
import assert from "node:assert/strict";
import { createPublicKey } from "node:crypto";
import { decode, sha256 } from "./wire.mjs";
import { Member } from "./member.mjs";
import { readReady, signingKey } from "./sealed.mjs";

const TICK_S = 0.1;
const hex = (text) => Buffer.from(text, "hex");
const publicOf = (secret) => createPublicKey(signingKey(hex(secret))).export({ type: "spki", format: "der" }).subarray(-32);
const framesOf = (step) => (step.payload ? [hex(step.header), hex(step.payload)] : [hex(step.header)]);

function studyOf(scenario) {
    const identities = Object.fromEntries(scenario.roster.map((name) => [name, publicOf(scenario.ed25519_secrets[name])]));
    const study = {
        roster: scenario.roster, graph: { a: ["b"], b: ["a"] }, digest: hex(scenario.study), layout: sha256(Buffer.from(scenario.layout)),
        start: sha256(Buffer.alloc(24)), identities, weights: { a: { b: scenario.weight }, b: { a: scenario.weight } }, dtype: "float64",
        format: { channels: [["x", "float64", 3]], full: null }, ahead: 1, lastExchange: scenario.exchanges - 1, rounds: scenario.exchanges, firstNorm: 0,
        startRule: { needed: 2, within_s: 86400 }, stopRule: null, distance: () => 1,
    };
    assert.equal(study.layout.toString("hex"), scenario.layout_digest);
    assert.equal(study.start.toString("hex"), scenario.start_digest);
    return study;
}

/** One side of the conversation with a clock that the conversation sets. */
class Side {
    constructor(scenario, name) {
        Object.assign(this, { scenario, name, now: 0, saved: null, early: [] });
        this.other = scenario.roster.find((other) => other !== name);
        this.study = studyOf(scenario);
        this.start(name);
    }

    start(who) {
        const { scenario, study } = this;
        const queue = (this.queue = []);
        const io = {
            now: () => this.now, wall: () => scenario.began_ms[who], log: () => {}, event: () => {}, save: (state) => (this.saved = structuredClone(state)),
            send: (name, make, tag) => queue.push({ make, tag }),
        };
        this.isAlive = true;
        this.isUp = false;
        this.member = new Member({
            study, name: this.name, keys: { signing: signingKey(hex(scenario.ed25519_secrets[this.name])) }, first: Float64Array.from(scenario.first[this.name]),
            saved: this.saved && structuredClone(this.saved), incarnation: scenario.incarnations[who], deadline: 30, linger: 30, io, recordsWait: 0,
        });
    }

    /** The next message that waits to be sent. */
    next() {
        while (this.queue.length) {
            const { make, tag } = this.queue.shift();
            const frames = make();
            if (frames === null) continue;
            if (tag !== null) this.member.sentOut(this.other, tag);
            return frames;
        }
        return null;
    }

    /** Whether the expected message is said now, or was said a moment before. What is said before it is given to `skip`. */
    say(expected, skip) {
        const early = this.early.findIndex((frames) => isSame(frames, framesOf(expected)));
        if (early >= 0) return Boolean(this.early.splice(early, 1));
        for (let ticks = 0; ticks < 2; ticks++) {
            for (let frames = this.next(); frames !== null; frames = this.next()) {
                if (isSame(frames, framesOf(expected))) return true;
                skip(frames);
                this.early.push(frames);
            }
            this.member.tick();
        }
        return false;
    }

    takeStep(step, skip) {
        while (this.now + TICK_S <= step.at_s + 1e-9) {
            if (this.isAlive && this.isUp) this.member.tick();
            this.now = Math.round((this.now + TICK_S) * 1000) / 1000;
        }
        if (step.killed === this.name) this.isAlive = false;
        else if (step.starts_again === this.name) this.start(`${this.name} again`);
        else if (step.starts_again) {
            this.member.disconnected(this.other);
            this.member.connected(this.other);
        }
        if (!step.from || !this.isAlive) return null;
        if (step.from === this.name) {
            if (!this.isUp) this.member.connected(this.other);
            this.isUp = true;
            return this.say(step, skip);
        }
        if (step.lost) return null;
        if (!this.isUp) this.member.neighbours.get(this.other).isConnected = true;
        this.isUp = true;
        this.member.receive(this.other, framesOf(step));
        return null;
    }
}

/** The same bytes; of Ready the same receipts, and records of the same process and number. */
function isSame(frames, expected) {
    if (frames.length === expected.length && frames.every((frame, i) => frame.equals(expected[i]))) return true;
    const [a, b] = [decode(frames), decode(expected)];
    if (a.name !== "Ready" || b.name !== "Ready" || process.env.STRICT) return false;
    const key = (sealed) => {
        const { member, began, number } = readReady(sealed, 2);
        return [member, began, number].join();
    };
    const text = (m) => JSON.stringify([m.sealed.map(key).sort(), m.receipts.map((r) => r.toString("hex")).sort()]);
    return text(a) === text(b);
}

/** Checks both sides; returns how many messages were said as they stand. What may be said at another time is named here. */
export async function checkScenario(scenario) {
    let checked = 0;
    for (const name of scenario.roster) {
        const side = new Side(scenario, name);
        const show = (what, frames) => process.env.SHOW && console.error(name, side.now, what, brief(frames));
        const skip = (frames) => {
            show("     more:", frames);
            assert(["Records", "Closing", "ResendRequest", "Ready"].includes(decode(frames).name), `${name} says ${brief(frames)}`);
        };
        for (const step of scenario.conversation) {
            const isSaid = side.takeStep(step, skip);
            if (isSaid !== null) show(isSaid ? "said" : "NOT said", framesOf(step));
            // a request may be made a moment earlier or later
            if (isSaid === false) assert.equal(step.message, "ResendRequest", `${name} does not say ${brief(framesOf(step))}`);
            if (isSaid) checked++;
        }
        assert.deepEqual([...side.member.x], scenario.last[name]);
    }
    return checked;
}

function brief(frames) {
    const left = ["study", "layout", "start", "channels", "digest", "pad", "size_bytes", "payload"];
    const short = (key, value) => (left.includes(key) ? undefined : value?.type === "Buffer" ? Buffer.from(value.data).toString("hex").slice(-40) : value);
    return JSON.stringify(decode(frames), short);
}
