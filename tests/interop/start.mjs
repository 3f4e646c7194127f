// The agreed start (section 4): ready records, who has which of them, and when a node may start.
import { bytesToPlaces, isSealed, placesToBytes, readReady, receipt, sealReady } from "./sealed.mjs";

const AGAIN_S = 0.5;
const newer = (a, b) => a.began > b.began || (a.began === b.began && a.number > b.number);

export class StartAgreement {
    /**
     * me: own place. roster: names. graph: names of each member's neighbours in the roster's order, by name.
     * identities: raw public keys by place. rule: {needed, within_s}. started: the set of a checkpoint, or null.
     */
    constructor({ me, roster, graph, identities, key, study, began, rule, started, now }) {
        Object.assign(this, { me, roster, graph, identities, key, study, rule, started, began });
        this.name = roster[me];
        this.peers = graph[this.name];
        this.number = -1;
        this.up = [];
        this.records = new Map();
        this.talk = new Map(this.peers.map((name) => [name, { has: new Map(), said: new Map(), receipts: new Map() }]));
        this.since = now;
        this.spreads = false;
        this.make();
    }

    make() {
        this.number++;
        const links = placesToBytes(this.up.map((name) => this.peers.indexOf(name)));
        const started = this.started === null ? null : placesToBytes(this.started);
        const fields = { member: this.me, began: this.began, number: this.number, links, started };
        this.keep(fields, sealReady(fields, this.key, this.study));
    }

    keep(fields, sealed) {
        this.records.set(fields.member, { fields, sealed, receipt: receipt(sealed).toString("hex") });
    }

    /** The links that are up now. A node that has started makes no more records of them. */
    setUp(names) {
        if (names.join("\n") === this.up.join("\n")) return;
        this.up = [...names];
        if (this.started !== null) return;
        if (names.length) this.spreads = true;
        this.make();
    }

    start(places) {
        this.started = places;
        this.make();
    }

    /** The neighbour's process is another one: all is said again. */
    forget(name) {
        this.talk.set(name, { has: new Map(), said: new Map(), receipts: new Map() });
    }

    /** Hears a Ready of a neighbour; returns the reasons of what was refused. */
    hear(name, message, log = () => {}) {
        const talk = this.talk.get(name);
        const refused = [];
        for (const bytes of message.receipts) {
            const text = bytes.toString("hex");
            for (const [member, record] of this.records) if (record.receipt === text) talk.has.set(member, text);
        }
        for (const sealed of message.sealed) {
            try {
                const fields = readReady(sealed, this.roster.length);
                const text = receipt(sealed).toString("hex");
                const held = this.records.get(fields.member);
                if (held && held.receipt !== text && !newer(fields, held.fields)) {
                    this.spreads ||= fields.member === this.me; // the newer one is said, and this one gets no receipt
                    continue;
                }
                if (held?.receipt !== text) {
                    const places = (set) => (set ? `[${bytesToPlaces(set)}]` : "nil");
                    log(`from ${name}: ready record of ${fields.member}, began ${fields.began}, number ${fields.number}, links ${places(fields.links)}, started ${places(fields.started)}`);
                    if (!isSealed("ready record", sealed, this.identities[fields.member], this.study)) {
                        refused.push("wrong_signature");
                        continue;
                    }
                    if (fields.member === this.me) {
                        if (newer(fields, held.fields)) {
                            // an earlier process of this node said so: it is outbid
                            this.began = fields.began + 1;
                            this.number = -1;
                            this.spreads = true;
                            this.make();
                        }
                    } else if (!held || newer(fields, held.fields)) this.keep(fields, sealed);
                }
                talk.has.set(fields.member, text);
                talk.receipts.set(text, Buffer.from(text, "hex"));
            } catch (error) {
                if (error.reason === undefined) throw error;
                refused.push(error.reason);
            }
        }
        return refused;
    }

    /** What is to be said to this neighbour now: values of Ready messages. */
    say(name, now) {
        const talk = this.talk.get(name);
        const sealed = [];
        for (const [member, record] of this.records) {
            if (member === this.me && !this.spreads) continue;
            if (talk.has.get(member) === record.receipt) continue;
            const said = talk.said.get(member);
            if (said && said.receipt === record.receipt && now - said.at < AGAIN_S) continue;
            talk.said.set(member, { receipt: record.receipt, at: now });
            sealed.push(record.sealed);
        }
        const receipts = [...talk.receipts.values()];
        talk.receipts.clear();
        const messages = [];
        for (let i = 0; i < Math.max(sealed.length, receipts.length); i += 16) {
            messages.push({ sealed: sealed.slice(i, i + 16), receipts: receipts.slice(i, i + 16) });
        }
        return messages;
    }

    linkIsUp(a, b) {
        const says = (from, to) => {
            const record = this.records.get(this.roster.indexOf(from));
            return record !== undefined && bytesToPlaces(record.fields.links).includes(this.graph[from].indexOf(to));
        };
        return says(a, b) && says(b, a);
    }

    /** The places of the members to start with, or null: not yet. */
    decide(now) {
        for (const { fields } of this.records.values()) {
            if (fields.started === null) continue;
            const set = bytesToPlaces(fields.started);
            if (set.length >= this.rule.needed && set.every((n) => this.records.has(n))) return set;
        }
        const there = [this.name];
        for (const name of there) for (const other of this.graph[name]) if (!there.includes(other) && this.linkIsUp(name, other)) there.push(other);
        const sorted = this.roster.filter((name) => there.includes(name));
        const down = sorted.flatMap((a) => this.graph[a].filter((b) => a < b && sorted.includes(b) && !this.linkIsUp(a, b)).map((b) => [a, b]));
        let set = null;
        if (sorted.length === this.roster.length && !down.length) set = sorted;
        else if (now - this.since > this.rule.within_s) {
            const left = new Set(sorted);
            for (const [a, b] of down) if (left.has(a) && left.has(b)) left.delete(b === this.name ? a : b);
            if (left.size >= this.rule.needed) set = [...left];
        }
        return set && set.map((name) => this.roster.indexOf(name));
    }
}
