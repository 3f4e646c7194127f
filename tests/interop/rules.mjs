// Rules without sockets and without a clock: the flow ledger of an edge (section 6), the stop rule (section 7),
// the merge (section 1), and one neighbour's greeting and incoming updates (sections 4 and 5).
import { PIECE, Refused, allFinite, channelBytes, decode, sha256 } from "./wire.mjs";

export const NO_REPORT = { closed_through: -1, merged: [], confirmed: -1, settled: -1 };
export const copyReport = (r) => ({ closed_through: r.closed_through, merged: [...r.merged], confirmed: r.confirmed, settled: r.settled });

/** Whether report a is newer than b, or says less: 1, 0, -1. */
export function compareReports(a, b) {
    for (const key of ["closed_through", "settled", "confirmed"]) if (a[key] !== b[key]) return a[key] > b[key] ? 1 : -1;
    return 0;
}
export const wentBack = (now, before) => ["closed_through", "settled", "confirmed"].some((key) => now[key] < before[key]);

/** What a node knows of one edge. `open` is {exchange, flow} or null; `rollBack` is told the open flow to take back. */
export class Ledger {
    constructor(rollBack, kept = null) {
        this.rollBack = rollBack;
        this.own = copyReport(kept?.own ?? NO_REPORT);
        this.open = kept?.open ?? null;
        this.heard = copyReport(kept?.heard ?? NO_REPORT);
        this.lostHistory = kept?.lostHistory ?? 0;
    }

    kept() {
        return { own: copyReport(this.own), open: this.open, heard: copyReport(this.heard), lostHistory: this.lostHistory };
    }

    hasRoom() {
        return this.own.merged.length < 16 && this.open === null;
    }

    /** Closes the exchange, and all before it; with a flow if the neighbour's update was merged. */
    close(exchange, flow = null) {
        this.own.closed_through = exchange;
        if (flow !== null) {
            this.own.merged.push(exchange);
            this.open = { exchange, flow };
        }
        this.settle();
    }

    hear(report) {
        if (compareReports(report, this.heard) <= 0) return false;
        this.heard = copyReport(report);
        this.settle();
        return true;
    }

    settle() {
        const [own, heard] = [this.own, this.heard];
        if (this.open && this.open.exchange <= heard.closed_through) {
            const { exchange, flow } = this.open;
            this.open = null;
            if (exchange <= heard.confirmed) this.lostHistory++;
            else if (!heard.merged.includes(exchange)) this.rollBack(flow, exchange);
        }
        own.settled = Math.max(own.settled, Math.min(own.closed_through, heard.closed_through));
        own.confirmed = Math.max(own.confirmed, Math.min(own.closed_through, heard.settled));
        own.merged = own.merged.filter((e) => e > own.confirmed && (e > heard.closed_through || heard.merged.includes(e)));
    }
}

/** The consensus counter and the stop round of one node. rule: tolerance, patience, diameter, lambda_2, rounds; or null. */
export class StopRule {
    constructor(rule, kept = null) {
        this.rule = rule;
        this.counters = new Map(kept?.counters ?? []);
        this.h = kept?.h ?? 0;
        this.stopRound = kept?.stopRound ?? null;
        this.passed = kept?.passed ?? false;
        this.unsure = new Map();
    }

    kept() {
        return { counters: [...this.counters], h: this.h, stopRound: this.stopRound, passed: this.passed };
    }

    get earliest() {
        const { rounds, patience, diameter } = this.rule;
        return rounds + patience + diameter - 1 + 2 * diameter;
    }

    /** The end of a round: d and the own norm, whether a neighbour was skipped, and agreed_for of the merged updates. */
    endRound(round, d, norm, skipped, agreed) {
        if (!this.rule) return;
        const { tolerance, lambda_2, patience, diameter, rounds } = this.rule;
        if (round < rounds) this.h = 0;
        else {
            this.passed = !skipped && d <= lambda_2 * (tolerance * norm) ** 2;
            this.h = this.passed ? 1 + Math.min(this.h, ...agreed) : 0;
        }
        this.counters.set(round, this.h);
        this.counters.delete(round - (4 * diameter + patience + 16));
        for (const r of this.counters.keys()) if (r < round - (4 * diameter + patience + 16)) this.counters.delete(r);
        if (this.h >= patience + diameter) this.know(round + 2 * diameter);
    }

    /** h of the round before the exchange. */
    agreedFor(round) {
        return this.counters.get(round - 1) ?? 0;
    }

    jump() {
        this.h = 0;
    }

    know(stopRound) {
        if (this.stopRound === null || stopRound < this.stopRound) this.stopRound = stopRound;
    }

    /** Whether a message with this stop round is refused whole. */
    isTooEarly(stopRound) {
        return stopRound !== null && (!this.rule || stopRound < this.earliest);
    }

    /** "yes", "implausible_stop" or "cannot tell". */
    judge(stopRound) {
        const { patience, diameter } = this.rule;
        const round = stopRound - 3 * diameter;
        if (this.counters.has(round)) return this.counters.get(round) >= patience ? "yes" : "implausible_stop";
        if ([...this.counters.keys()].some((r) => r > round) && this.h > 0) return "yes";
        return "cannot tell";
    }

    /** Hears a stop round from a neighbour; returns whether it was found implausible. */
    hear(name, stopRound) {
        this.unsure.delete(name);
        if (stopRound === null || !this.rule || (this.stopRound !== null && stopRound >= this.stopRound)) return false;
        const verdict = this.judge(stopRound);
        if (verdict === "yes") this.know(stopRound);
        else if (verdict === "cannot tell") this.unsure.set(name, stopRound);
        return verdict === "implausible_stop";
    }

    /** Looks again at what could not be told. */
    lookAgain() {
        for (const [name, stopRound] of [...this.unsure]) this.hear(name, stopRound);
    }
}

// ---- vectors

const ARRAYS = { float64: Float64Array, float32: Float32Array };
export const toVector = (bytes, dtype) => new ARRAYS[dtype](Uint8Array.from(bytes).buffer);
export const toBytes = (vector) => Buffer.from(Uint8Array.from(new Uint8Array(vector.buffer, vector.byteOffset, vector.byteLength)));
export const norm = (vector) => Math.sqrt(vector.reduce((sum, v) => sum + v * v, 0));
export const squaredDistance = (a, b) => a.reduce((sum, v, i) => sum + (v - b[i]) ** 2, 0);

/** w * (theirs - own), each step rounded to the vectors' type. */
export function flowOf(weight, theirs, own) {
    const flow = new own.constructor(own.length);
    const w = own.constructor.of(weight)[0];
    for (let i = 0; i < own.length; i++) {
        flow[i] = theirs[i] - own[i];
        flow[i] = w * flow[i];
    }
    return flow;
}

function add(x, y) {
    const sum = new x.constructor(x.length);
    for (let i = 0; i < x.length; i++) sum[i] = x[i] + y[i];
    return sum;
}

/** x after the flows in the roster's order, and after the flows that are to be taken back. */
export function mix(x, flows, toRollBack) {
    for (const flow of flows) x = add(x, flow);
    if (!toRollBack.length) return x;
    let r = new x.constructor(x.length);
    for (const flow of toRollBack) for (let i = 0; i < r.length; i++) r[i] = r[i] - flow[i];
    return add(x, r);
}

// ---- one neighbour

/**
 * The greeting with one neighbour and its updates that are coming in. `own` gives what this node is at the moment:
 * study, layout, start, incarnation, anew, exchange(), ahead, format() of an exchange, lastExchange, stop (StopRule).
 * `kept` of the neighbour: anew and report, the furthest heard (the ledger's), and the durable report of this edge.
 */
export class Neighbour {
    constructor(name, own, ledger, durable, anew = 0) {
        Object.assign(this, { name, own, ledger, durable, anew });
        this.state = "unknown";
        this.incarnation = 0;
        this.openedWith = 0;
        this.accepted = 0;
        this.updates = new Map();
        this.coming = null;
        this.exchange = -1;
    }

    /**
     * What a message does to the greeting. Returns {message, answers: [names of what to send], opened, ...};
     * throws Refused, with `answers` where something is to be said.
     */
    receive(frames) {
        const message = decode(frames);
        const result = { message, answers: [] };
        if (message.name === "DoctorQuestion" || message.name === "DoctorAnswer") return result;
        if (message.name === "Hello") return this.hello(message, result);
        if (message.name === "Goodbye") {
            this.forget();
            return result;
        }
        if (this.state !== "open") throw new Refused("not_greeted");
        this.plausible(message);
        if (message.name === "Update") this.update(message);
        else if (message.name === "Chunk") this.chunk(message);
        else if (message.report) this.news(message);
        return result;
    }

    plausible(message) {
        if (message.stop && this.own.stop.isTooEarly(message.stop.stop_round)) throw new Refused("implausible_stop");
        if (message.exchange !== undefined && message.exchange > this.own.lastExchange + 1) throw new Refused("implausible_exchange");
    }

    forget() {
        this.state = "unknown";
        this.incarnation = 0;
        this.coming = null;
    }

    hello(message, result) {
        const refuse = (reason, answers) => {
            this.forget();
            const error = new Refused(reason);
            error.answers = answers;
            throw error;
        };
        if (message.member !== this.name) refuse("wrong_name", ["Goodbye"]);
        for (const key of ["study", "layout", "start"]) if (!message[key].equals(this.own[key])) refuse(`wrong_${key}`, ["Goodbye"]);
        this.plausible(message);
        const said = message.remembered;
        this.ownStateWentBack = this.own.anew < said.anew || (this.own.anew === said.anew && wentBack(this.durable(), said.report));
        if (this.ownStateWentBack) refuse("state_lost", ["Hello", "Goodbye"]);
        if (this.accepted !== message.incarnation) {
            const lower = message.anew < this.anew || (message.anew === this.anew && wentBack(message.report, this.ledger.heard));
            if (lower) refuse("state_lost", ["Hello", "Goodbye"]);
        }
        this.accepted = message.incarnation;
        if (message.anew > this.anew) {
            this.anew = message.anew;
            this.ledger.heard = copyReport(NO_REPORT);
            this.updates.clear();
            result.startedAnew = true;
        }
        const isNew = message.incarnation !== this.incarnation;
        this.incarnation = message.incarnation;
        if (isNew) this.coming = null;
        const isEcho = message.echo === this.own.incarnation;
        if (isEcho) this.state = "open";
        else if (isNew || this.state !== "open") this.state = "half_open";
        if (!isEcho || !message.is_open) result.answers.push("Hello");
        if (isEcho && this.openedWith !== message.incarnation) {
            this.openedWith = message.incarnation;
            result.opened = true;
        }
        this.news(message);
        return result;
    }

    news(message) {
        this.exchange = Math.max(this.exchange, message.exchange);
        this.reportChanged = this.ledger.hear(message.report);
        if (this.own.stop.hear(this.name, message.stop.stop_round)) this.implausibleStops = (this.implausibleStops ?? 0) + 1;
    }

    inRange(exchange) {
        if (exchange < this.own.exchange()) throw new Refused("stale_round");
        if (exchange > this.own.exchange() + this.own.ahead) throw new Refused("far_round");
    }

    update(message) {
        if (message.report.closed_through < message.exchange - 1) throw new Refused("wrong_report");
        this.news(message);
        this.inRange(message.exchange);
        const there = this.updates.get(this.slot(message.exchange, message.marks));
        if (there) throw new Refused(there.digest.equals(message.digest) ? "duplicate" : "contradiction");
        const format = this.own.format(message.exchange);
        if ((message.marks !== null) !== (format.full !== null)) throw new Refused("wrong_format");
        const channels = message.marks !== null && message.marks[0] === null ? format.full : format.channels;
        if (BigInt(message.size_bytes) !== BigInt(channelBytes(channels))) throw new Refused("wrong_size");
        const same = channels.length === message.channels.length
            && channels.every((c, i) => c[0] === message.channels[i][0] && c[1] === message.channels[i][1] && BigInt(c[2]) === BigInt(message.channels[i][2]));
        if (!same) throw new Refused("wrong_format");
        this.coming = { ...message, payload: null, channels, size: Number(message.size_bytes), bytes: Buffer.alloc(channelBytes(channels)), received: 0 };
        this.piece(message.payload);
    }

    /** Of one exchange there may be an update of each kind: encoded or plain, and whole. */
    slot(exchange, marks) {
        return marks !== null && marks[0] === null ? `whole ${exchange}` : String(exchange);
    }

    chunk(message) {
        this.inRange(message.exchange);
        if (!this.coming || this.coming.exchange !== message.exchange) {
            throw new Refused(this.updates.has(String(message.exchange)) ? "duplicate" : "stray_chunk");
        }
        if (Number(message.offset) !== this.coming.received) throw new Refused("out_of_order");
        this.piece(message.payload);
    }

    piece(payload) {
        const coming = this.coming;
        if (payload.length !== Math.min(PIECE, coming.size - coming.received)) {
            this.coming = null;
            throw new Refused("bad_message", "a piece of another length");
        }
        payload.copy(coming.bytes, coming.received);
        coming.received += payload.length;
        if (coming.received < coming.size) return;
        this.coming = null;
        if (!sha256(coming.bytes).equals(coming.digest)) throw new Refused("wrong_digest");
        if (!allFinite(coming.channels, coming.bytes)) throw new Refused("not_finite");
        this.updates.set(this.slot(coming.exchange, coming.marks), {
            exchange: coming.exchange, digest: coming.digest, bytes: coming.bytes, agreedFor: coming.stop.agreed_for,
        });
    }

    /** Drops updates of exchanges before t. */
    dropBefore(t) {
        for (const [slot, update] of this.updates) if (update.exchange < t) this.updates.delete(slot);
        if (this.coming && this.coming.exchange < t) this.coming = null;
    }
}
