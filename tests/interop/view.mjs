// The network's view, as far as a node owes it to others (section 10): round records are checked, kept and passed on,
// and the own one is made when it is asked for, and at the end of the run.
import { isSealed, readRound, sealRound } from "./sealed.mjs";

const KEPT_ROUNDS = 200;

export class View {
    constructor({ me, roster, identities, key, study, began, lastRound, peers }) {
        Object.assign(this, { me, roster, identities, key, study, began, lastRound, peers });
        this.members = new Map();
        this.waiting = new Map(peers.map((name) => [name, []]));
    }

    member(place) {
        if (!this.members.has(place)) this.members.set(place, { began: -1, rounds: new Map(), newest: null, closing: null });
        return this.members.get(place);
    }

    /** Hears Records; returns the reasons of what was refused. */
    hear(name, sealedRecords) {
        const refused = [];
        for (const sealed of sealedRecords) {
            try {
                const fields = readRound(sealed, this.roster.length, this.lastRound);
                if (fields.member === this.me) continue;
                const held = this.member(fields.member);
                if (fields.began < held.began) continue;
                const old = fields.began === held.began ? held.rounds.get(fields.round) : undefined;
                if (old) old.knownBy.add(name);
                // the closing record of a round may come behind another one of the same round
                if (old && (old.fields.closing || !fields.closing)) continue;
                if (!isSealed("round record", sealed, this.identities[fields.member], this.study)) {
                    refused.push("wrong_signature");
                    continue;
                }
                if (fields.began > held.began) Object.assign(held, { began: fields.began, rounds: new Map(), newest: null, closing: null });
                this.keep(held, { fields, sealed, knownBy: new Set([name]) });
            } catch (error) {
                if (error.reason === undefined) throw error;
                refused.push(error.reason);
            }
        }
        return refused;
    }

    keep(held, record) {
        held.rounds.set(record.fields.round, record);
        if (!held.newest || record.fields.round >= held.newest.fields.round) held.newest = record;
        if (record.fields.closing) held.closing = record;
        for (const round of held.rounds.keys()) if (round < held.newest.fields.round - KEPT_ROUNDS) held.rounds.delete(round);
        for (const list of this.waiting.values()) list.push(record);
    }

    /** The own record of a round. `facts` are its fields but for those that the node's place and run give. */
    speak(facts) {
        const held = this.member(this.me);
        held.began = this.began;
        const old = held.rounds.get(facts.round);
        if (old && old.fields.closing === facts.closing) return old;
        const fields = {
            member: this.me, began: this.began, level: 0, loss: null, milliseconds: [0, 0, 0, 0], measured: null, metrics: [], rows: null, update: null, ...facts,
        };
        const record = { fields, sealed: sealRound(fields, this.key, this.study), knownBy: new Set() };
        this.keep(held, record);
        return record;
    }

    hasSpoken(round) {
        return this.member(this.me).rounds.has(round);
    }

    /** What is to be passed on to a neighbour now, in messages' worth. */
    passOn(name) {
        const list = this.waiting.get(name).splice(0).filter((record) => !record.knownBy.has(name));
        for (const record of list) record.knownBy.add(name);
        const messages = [];
        for (let i = 0; i < list.length; i += 32) messages.push({ sealed: list.slice(i, i + 32).map((record) => record.sealed) });
        return messages;
    }

    /** A link has opened: all closing records are said over it, as the earlier ones may be lost. */
    sayAgain(name) {
        for (const held of this.members.values()) {
            if (!held.closing) continue;
            held.closing.knownBy.delete(name);
            if (!this.waiting.get(name).includes(held.closing)) this.waiting.get(name).push(held.closing);
        }
    }

    /** The answer to a ProofRequest: the own record, and the newest of the three other members that are furthest. */
    proof() {
        const own = this.member(this.me).newest;
        const others = [...this.members].filter(([place, held]) => place !== this.me && held.newest).map(([, held]) => held.newest);
        others.sort((a, b) => b.fields.round - a.fields.round);
        return [...(own ? [own] : []), ...others.slice(0, 3)].map((record) => record.sealed);
    }

    /** The exchange that a member has reached by its own record (one phase), or -1. */
    reached(place) {
        const newest = this.members.get(place)?.newest;
        return newest ? newest.fields.round + 1 : -1;
    }

    /** The closing records of the others, as they are kept in the checkpoint: neighbours say them only once. */
    closings() {
        return [...this.members].filter(([place, held]) => place !== this.me && held.closing).map(([, held]) => held.closing.sealed.toString("hex"));
    }

    restore(closings) {
        for (const text of closings) this.hear(null, [Buffer.from(text, "hex")]);
    }

    closed(place) {
        return Boolean(this.members.get(place)?.closing);
    }
}
