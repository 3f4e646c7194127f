// One member of a study, without sockets, files and a clock of its own: plain averaging in rounds of one exchange,
// with greeting, agreed start, flow ledger, stop rule, jumps, closing exchange and signed records.
import { PIECE, Refused, encodeHeader, padOf, sha256 } from "./wire.mjs";
import { Ledger, NO_REPORT, Neighbour, StopRule, copyReport, flowOf, mix, norm, squaredDistance, toBytes, toVector } from "./rules.mjs";
import { StartAgreement } from "./start.mjs";
import { View } from "./view.mjs";

const ASK_AFTER_S = [0.5, 1, 2, 4, 5];
const HELLO_S = 0.5;
const RECORDS_S = 5;
const CATCH_UP_S = 0.05;

export class Member {
    /**
     * study: see study.mjs. keys: see sealed.mjs. first: vector. saved: what was given to save(), or null.
     * io: now() in seconds, wall() in milliseconds, send(name, make, tag), save(object), log(text), event(kind, round, peer).
     */
    constructor({ study, name, keys, first, saved, incarnation, deadline, linger, io, recordsWait = RECORDS_S }) {
        Object.assign(this, { study, name, keys, deadline, linger, io, incarnation, recordsWait });
        this.me = study.roster.indexOf(name);
        this.peers = study.graph[name];
        this.t = saved?.t ?? 0;
        this.x = saved ? toVector(Buffer.from(saved.x, "hex"), study.dtype) : first;
        this.began = saved?.began ?? io.wall();
        this.anew = saved?.anew ?? 0;
        this.reason = saved?.reason ?? null;
        this.isFinished = saved?.finished ?? false;
        this.stop = new StopRule(study.stopRule, saved?.stop);
        this.toRollBack = (saved?.toRollBack ?? []).map((text) => toVector(Buffer.from(text, "hex"), study.dtype));
        this.ownUpdates = new Map((saved?.updates ?? []).map(([exchange, text]) => [exchange, this.asUpdate(Buffer.from(text, "hex"))]));
        this.lastFacts = saved?.lastFacts ?? null;
        this.outcome = null;
        this.posted = -1;
        this.roundsDone = 0;
        const own = {
            study: study.digest, layout: study.layout, start: study.start, incarnation, anew: this.anew, exchange: () => this.t, ahead: study.ahead,
            format: () => study.format, lastExchange: study.lastExchange, stop: this.stop,
        };
        this.neighbours = new Map(this.peers.map((peer) => {
            const kept = saved?.edges[peer];
            const vector = (open) => open && { exchange: open.exchange, flow: toVector(Buffer.from(open.flow, "hex"), study.dtype) };
            const ledger = new Ledger((flow, exchange) => this.rollBack(peer, flow, exchange), kept && { ...kept, open: vector(kept.open) });
            const n = new Neighbour(peer, own, ledger, () => n.durableReport, kept?.anew ?? 0);
            n.durableReport = copyReport(ledger.own);
            Object.assign(n, { isConnected: false, sent: new Map(), saidHello: -9, isAbsent: false, isGone: false, closing: null, asked: null, proofAt: -9, wasMet: Boolean(kept?.wasMet) });
            return [peer, n];
        }));
        const identities = study.roster.map((member) => study.identities[member]);
        const common = { me: this.me, roster: study.roster, identities, key: keys.signing, study: study.digest, began: this.began };
        this.agreement = new StartAgreement({ ...common, began: io.wall(), graph: study.graph, rule: study.startRule, started: saved?.started ?? null, now: io.now() });
        this.view = new View({ ...common, lastRound: study.lastExchange, peers: this.peers });
        this.pace = saved?.pace ?? null;
        this.together = saved?.together ?? {};
        this.allowed = saved ? this.t + this.missedExchanges(saved.savedAt) : -1;
        this.view.restore(saved?.closingRecords ?? []);
        this.phase = this.reason !== null ? "closing" : this.agreement.started ? "running" : "waiting";
        if (saved) io.event("resumed", this.t, null);
        this.persist();
        if (this.phase === "running") this.begin();
        if (this.phase === "closing") this.enterClosing();
    }

    asUpdate(bytes) {
        return { bytes, digest: sha256(bytes) };
    }

    rollBack(peer, flow, exchange) {
        this.io.log(`the flow of ${exchange} with ${peer} is to be rolled back`);
        this.toRollBack.push(flow);
    }

    // ---- the checkpoint

    persist() {
        const hex = (vector) => toBytes(vector).toString("hex");
        const edges = {};
        for (const [peer, n] of this.neighbours) {
            const { own, open, heard, lostHistory } = n.ledger.kept();
            edges[peer] = { own, open: open && { exchange: open.exchange, flow: hex(open.flow) }, heard, lostHistory, anew: n.anew, wasMet: n.wasMet };
        }
        this.io.save({
            t: this.t, x: hex(this.x), began: this.began, anew: this.anew, started: this.agreement.started, reason: this.reason, finished: this.isFinished,
            stop: this.stop.kept(), toRollBack: this.toRollBack.map(hex), edges, lastFacts: this.lastFacts,
            closingRecords: this.view.closings(), savedAt: this.io.wall(), pace: this.pace, together: this.together,
            updates: [...this.ownUpdates].map(([exchange, { bytes }]) => [exchange, bytes.toString("hex")]),
        });
        for (const n of this.neighbours.values()) n.durableReport = copyReport(n.ledger.own);
        this.isDirty = false;
    }

    // ---- saying

    news(n, round = this.t) {
        return { exchange: this.t, report: copyReport(n.durableReport), stop: { agreed_for: this.stop.agreedFor(round), stop_round: this.stop.stopRound } };
    }

    say(n, name, values = {}) {
        const frames = [encodeHeader(name, values)];
        this.io.send(n.name, () => frames, null);
    }

    sayHello(n) {
        n.saidHello = this.io.now();
        this.say(n, "Hello", {
            member: this.name, study: this.study.digest, layout: this.study.layout, start: this.study.start, incarnation: this.incarnation, echo: n.incarnation,
            is_open: n.state === "open", anew: this.anew, remembered: { anew: n.anew, report: copyReport(n.ledger.heard) }, ...this.news(n),
        });
    }

    sayClosing(n) {
        if (n.state === "open" && n.isConnected) this.say(n, "Closing", { ...this.news(n), reason: this.reason });
    }

    /** Sends an own update, or its rest from an offset on, unless the neighbour has closed its exchange. */
    sendUpdate(n, exchange, offset = 0) {
        const update = this.ownUpdates.get(exchange);
        if (!update || n.state !== "open" || !n.isConnected) return;
        const isOver = () => n.ledger.heard.closed_through >= exchange || n.state !== "open";
        if (isOver()) return;
        n.sent.set(exchange, "queued");
        for (let at = offset; at < update.bytes.length; at += PIECE) {
            const isLast = at + PIECE >= update.bytes.length;
            const payload = update.bytes.subarray(at, at + PIECE);
            const make = () => {
                if (isOver()) return null;
                if (at > 0) return [encodeHeader("Chunk", { exchange, offset: at }), payload];
                const values = {
                    ...this.news(n, exchange), exchange, channels: this.study.format.channels, size_bytes: update.bytes.length, digest: update.digest, marks: null,
                };
                return [encodeHeader("Update", { ...values, pad: padOf(values) }), payload];
            };
            this.io.send(n.name, make, isLast ? exchange : null);
        }
    }

    // ---- what the links tell

    connected(name) {
        const n = this.neighbours.get(name);
        n.isConnected = true;
        if (n.state !== "open") this.sayHello(n);
        this.linksChanged();
    }

    disconnected(name) {
        const n = this.neighbours.get(name);
        n.isConnected = false;
        for (const [exchange, how] of n.sent) if (how === "queued") n.sent.delete(exchange);
        this.linksChanged();
    }

    sentOut(name, exchange) {
        this.neighbours.get(name).sent.set(exchange, "out");
    }

    linksChanged() {
        this.agreement.setUp(this.peers.filter((peer) => this.neighbours.get(peer).isConnected && this.neighbours.get(peer).state === "open"));
    }

    receive(name, frames) {
        const n = this.neighbours.get(name);
        try {
            const wasOpen = n.state === "open";
            const { message, answers, opened, startedAnew } = n.receive(frames);
            if (startedAnew) this.isDirty = true;
            for (const answer of answers) if (answer === "Hello") this.sayHello(n);
            if (opened) this.opened(n, message);
            if (message.exchange !== undefined && message.report) this.heardNews(n);
            this.react(n, message, wasOpen);
        } catch (error) {
            if (!(error instanceof Refused)) throw error;
            this.refused(n, error, frames);
        }
        this.linksChanged();
        this.advance();
        this.sayReady();
    }

    refused(n, error, frames) {
        this.io.log(`refused from ${n.name}: ${error.message}`);
        for (const answer of error.answers ?? []) {
            if (answer === "Hello") this.sayHello(n);
            else this.say(n, "Goodbye", { reason: error.reason });
        }
        if (error.reason === "state_lost" && n.ownStateWentBack) this.outcome = { code: 4, why: "state_lost" };
        if (["stale_round", "far_round", "duplicate", "contradiction"].includes(error.reason)) {
            this.heardNews(n);
            if (this.phase === "closing" && !n.closing) this.sayClosing(n);
        }
        if (["out_of_order", "stray_chunk"].includes(error.reason)) {
            const place = `${n.coming?.exchange} ${n.coming?.received}`;
            if (n.lostAt !== place) this.ask(n, true);
            n.lostAt = place;
        }
    }

    opened(n, message) {
        n.wasMet = true;
        n.isGone = false;
        n.closing = null;
        this.io.event("greeted", this.t, n.name);
        this.agreement.forget(n.name);
        this.view.sayAgain(n.name);
        n.sent.clear();
        for (const exchange of [...this.ownUpdates.keys()].sort((a, b) => a - b)) {
            if (exchange >= message.exchange && this.isPosted(exchange)) this.sendUpdate(n, exchange);
        }
        if (this.phase === "closing") this.sayClosing(n);
    }

    isPosted(exchange) {
        return exchange < this.t || this.posted === exchange;
    }

    heardNews(n) {
        if (n.isAbsent && n.exchange >= this.t - 4) {
            n.isAbsent = false;
            this.io.event("returned", this.t, n.name);
        }
        if (n.reportChanged && this.phase === "closing") this.isDirty = true;
        n.reportChanged = false;
    }

    react(n, message, wasOpen) {
        const { name } = message;
        if (name === "ResendRequest") this.answerRequest(n, message);
        else if (name === "Closing") n.closing = { exchange: message.exchange, reason: message.reason };
        else if (name === "Sent" && message.exchange === this.t && this.posted === this.t && !n.updates.has(String(this.t))) this.ask(n, true);
        else if (name === "Ready") for (const reason of this.agreement.hear(n.name, message, this.io.log)) this.io.log(`refused from ${n.name}: ${reason}`);
        else if (name === "Records") this.hearRecords(n, message.sealed);
        else if (name === "ProofRequest") this.answerProof(n, message);
        else if (name === "Goodbye") {
            this.io.log(`${n.name} said Goodbye: ${message.reason}`);
            if (message.reason === "finished") n.isGone = true;
            else n.isAbsent = true;
        }
        if (this.phase === "closing" && wasOpen && !n.closing && ["Update", "ResendRequest", "Heartbeat"].includes(name)) this.sayClosing(n);
    }

    hearRecords(n, sealed) {
        const before = this.view.closings().length;
        for (const reason of this.view.hear(n.name, sealed)) this.io.log(`refused from ${n.name}: ${reason}`);
        if (this.view.closings().length !== before) this.isDirty = true;
    }

    answerRequest(n, { exchange, whole, lost, offset, digest }) {
        const update = this.ownUpdates.get(exchange);
        if (!update || !this.isPosted(exchange)) {
            if (this.phase === "closing") this.sayClosing(n);
            else this.say(n, "Heartbeat", this.news(n));
        } else if (n.ledger.heard.closed_through >= exchange) return;
        else if (!lost && n.sent.get(exchange) === "queued") return;
        else if (!lost && n.sent.get(exchange) === "out") this.say(n, "Sent", { exchange, whole });
        else this.sendUpdate(n, exchange, digest !== null && digest.equals(update.digest) ? Number(offset) : 0);
    }

    answerProof(n, { relayed }) {
        if (this.io.now() - n.proofAt < 0.2) return;
        n.proofAt = this.io.now();
        const sealed = this.view.proof();
        if (sealed.length) this.say(n, "Records", { sealed });
        if (relayed) return;
        for (const other of this.neighbours.values()) if (other !== n && other.state === "open") this.say(other, "ProofRequest", { relayed: true });
    }

    ask(n, lost) {
        if (n.state !== "open" || !n.isConnected) return;
        const coming = n.coming?.exchange === this.t ? n.coming : null;
        this.say(n, "ResendRequest", { exchange: this.t, whole: false, lost, offset: coming?.received ?? 0, digest: coming?.digest ?? null });
    }

    // ---- exchanges

    begin() {
        this.posted = this.t;
        this.postedAt = this.io.now();
        if (!this.ownUpdates.has(this.t)) this.ownUpdates.set(this.t, this.asUpdate(toBytes(this.x)));
        for (const exchange of this.ownUpdates.keys()) if (exchange < this.t - this.study.ahead) this.ownUpdates.delete(exchange);
        for (const n of this.neighbours.values()) {
            n.dropBefore(this.t);
            n.asked = { at: this.postedAt + ASK_AFTER_S[0], step: 0 };
            for (const exchange of n.sent.keys()) if (exchange < this.t - this.study.ahead) n.sent.delete(exchange);
            // a neighbour that is here already has sent its update before this node could keep it
            if (n.exchange >= this.t && !this.came(n) && n.coming === null && !n.isGone) this.ask(n, false);
            // who has closed this exchange gets no update of it, but must hear where this node is, to wait for it again
            if (n.ledger.heard.closed_through >= this.t && n.state === "open") this.say(n, "Heartbeat", this.news(n));
            else if (!n.sent.has(this.t)) this.sendUpdate(n, this.t);
        }
    }

    came(n) {
        return n.updates.get(String(this.t)) ?? null;
    }

    isWaitedFor(n) {
        return !n.isGone && !n.isAbsent && !(n.closing && n.closing.exchange <= this.t);
    }

    advance() {
        for (let i = 0; i < 64; i++) if (!this.step()) return;
    }

    /** One thing that can be done now; false if there is none. */
    step() {
        if (this.outcome) return false;
        if (this.phase === "waiting") {
            const set = this.agreement.decide(this.io.now());
            if (!set) return false;
            this.agreement.start(set);
            this.io.event("started", 0, null);
            this.phase = "running";
            this.persist();
            this.sayReady();
            this.begin();
            return true;
        }
        if (this.phase === "closing") {
            this.close();
            return false;
        }
        this.believeClosers();
        if (this.stop.stopRound !== null && this.t > this.stop.stopRound) return this.finish();
        const furthest = this.believed();
        if (furthest > this.t + this.study.ahead) {
            this.jump(furthest);
            return true;
        }
        const all = [...this.neighbours.values()];
        const isComplete = all.every((n) => this.came(n) || !this.isWaitedFor(n)) && all.some((n) => this.came(n));
        if (!isComplete && this.io.now() - this.postedAt < this.deadline) return false;
        // a neighbour that talks and is behind gets time to come back: its jump takes longer than a quick round
        const isFollowed = all.some((n) => n.isAbsent && n.isConnected && n.state === "open" && !this.came(n));
        if (isFollowed && this.io.now() - this.postedAt < CATCH_UP_S) return false;
        this.merge(all);
        return true;
    }

    merge(all) {
        const [round, sent] = [this.t, this.x];
        const largest = 100 * Math.max(norm(sent), this.study.firstNorm, 1);
        const flows = new Map();
        const agreed = [];
        let d = 0;
        for (const n of all) {
            const update = this.came(n);
            const theirs = update && toVector(update.bytes, this.study.dtype);
            if (theirs && norm(theirs) <= largest && n.ledger.hasRoom()) {
                flows.set(n, flowOf(this.study.weights[this.name][n.name], theirs, sent));
                agreed.push(update.agreedFor);
                d += squaredDistance(sent, theirs) / 2;
                continue;
            }
            this.io.event("skipped", round, n.name);
            if (!update && this.isWaitedFor(n)) {
                n.isAbsent = true;
                n.exchange = Math.min(n.exchange, round - 5);
            }
        }
        const back = this.toRollBack;
        this.toRollBack = [];
        this.x = mix(sent, flows.values(), back);
        for (const n of all) n.ledger.close(round, flows.get(n) ?? null);
        const skipped = all.filter((n) => !flows.has(n)).map((n) => this.study.roster.indexOf(n.name));
        this.stop.endRound(round, d, norm(sent), skipped.length > 0, agreed);
        // an earlier process may have sent another update of this round: nothing is said of the models in the first two
        const isFresh = this.roundsDone++ < 2;
        for (const n of flows.keys()) this.together[n.name] = { exchange: round, at: this.io.wall() };
        const took = Math.max(0.001, this.io.now() - this.postedAt);
        this.pace = this.pace === null ? took : 0.9 * this.pace + 0.1 * took;
        this.lastFacts = {
            round, settles: round >= this.study.rounds, disagreement: isFresh ? null : d, norm: isFresh ? null : norm(sent), skipped: skipped.length, without: skipped.slice(0, 16),
            agreed_for: this.stop.h, sent: 0,
        };
        this.go(round + 1);
        this.stop.lookAgain();
        if (this.t > (this.stop.stopRound ?? Infinity) || this.t > this.study.lastExchange) this.finish();
        else {
            this.view.speak({ ...this.lastFacts, closing: false });
            this.begin();
        }
        this.passRecords();
    }

    /** The next exchange, durably. */
    go(exchange) {
        this.t = exchange;
        const isWanted = (e) => e >= this.t - this.study.ahead && [...this.neighbours.values()].some((n) => n.ledger.heard.closed_through < e);
        for (const e of this.ownUpdates.keys()) if (!isWanted(e)) this.ownUpdates.delete(e);
        this.persist();
    }

    /** How many exchanges this node would have made while it did not run, if that was longer than a deadline. */
    missedExchanges(savedAt) {
        const away = (this.io.wall() - savedAt) / 1000;
        return away > this.deadline ? Math.floor(away / (this.pace ?? this.deadline)) : 0;
    }

    /** Where all members are neighbours and only this one is heard: how far it can have come alone. */
    aloneBound(n) {
        const all = [...this.neighbours.values()];
        if (all.length !== this.study.roster.length - 1 || all.some((other) => other !== n && other.state === "open")) return -1;
        const last = this.together[n.name];
        return last ? last.exchange + Math.floor((this.io.wall() - last.at) / 1000 / this.deadline) : -1;
    }

    /** How far the claims of the neighbours are believed: to where a second member has come, too (section 5). */
    believed() {
        const { study } = this;
        let furthest = -1;
        for (const n of this.neighbours.values()) {
            if (n.exchange <= this.t + study.ahead) continue;
            furthest = Math.max(furthest, Math.min(n.exchange, Math.max(this.allowed, this.aloneBound(n))));
            for (const other of study.roster) {
                if (other === n.name || other === this.name) continue;
                const said = this.neighbours.get(other)?.exchange ?? -1;
                const reached = Math.max(said, this.view.reached(study.roster.indexOf(other)));
                if (reached > this.t + study.ahead * study.distance(this.name, other)) furthest = Math.max(furthest, Math.min(n.exchange, reached));
            }
        }
        return Math.min(furthest, study.lastExchange + 1);
    }

    jump(exchange) {
        this.io.log(`jumps from ${this.t} to ${exchange}`);
        for (const n of this.neighbours.values()) n.ledger.close(exchange - 1, null);
        this.stop.jump();
        this.ownUpdates.clear();
        this.go(exchange);
        this.io.event("jumped", exchange, null);
        if (this.t > this.study.lastExchange) return this.finish();
        this.begin();
    }

    /** A stop round that could not be told is believed once two members, or the only other one, have converged. */
    believeClosers() {
        if (!this.stop.unsure.size) return;
        const closed = this.study.roster.filter((name, place) => {
            return name !== this.name && (this.neighbours.get(name)?.closing?.reason === "converged" || this.view.closed(place));
        });
        if (closed.length >= Math.min(2, this.study.roster.length - 1)) for (const stopRound of this.stop.unsure.values()) this.stop.know(stopRound);
    }

    // ---- the end

    finish() {
        this.reason = this.stop.stopRound !== null && this.t > this.stop.stopRound && this.stop.passed ? "converged" : "rounds";
        this.persist();
        this.io.event("stopped", this.t, null);
        this.enterClosing();
        return true;
    }

    enterClosing() {
        this.phase = "closing";
        this.closingSince = this.io.now();
        this.saidClosing = -9;
        this.settledAt = null;
        this.view.speak({ ...this.closingFacts(), closing: true });
        if (this.isFinished) this.outcome = this.result();
    }

    /**
     * What the closing record says. Of one round the first record stands: where the last round was spoken of already, the closing
     * record is of the one that had begun; and a node that jumped says of a round over which it jumped that all were skipped.
     */
    closingFacts() {
        const isSpoken = this.view.hasSpoken(this.t - 1);
        if (this.lastFacts?.round === this.t - 1 && !isSpoken) return this.lastFacts;
        const round = Math.min(Math.max(0, isSpoken ? this.t : this.t - 1), this.study.lastExchange);
        const without = this.peers.map((peer) => this.study.roster.indexOf(peer));
        const isMixing = round >= this.study.rounds;
        return { round, settles: isMixing, disagreement: null, norm: null, skipped: without.length, without: without.slice(0, 16), agreed_for: 0, sent: 0 };
    }

    isSettled(n) {
        if (n.isGone || !n.wasMet) return true;
        const isOwn = n.ledger.open === null && n.durableReport.merged.length === 0;
        return isOwn && n.ledger.heard.closed_through >= n.durableReport.closed_through && n.ledger.heard.merged.length === 0;
    }

    close() {
        const now = this.io.now();
        const all = [...this.neighbours.values()];
        if (this.isDirty) {
            this.persist();
            this.saidClosing = -9;
        }
        if (now - this.saidClosing >= HELLO_S) {
            this.saidClosing = now;
            for (const n of all) this.sayClosing(n);
        }
        this.passRecords();
        const isOver = now - this.closingSince > this.linger;
        if (this.settledAt === null && (all.every((n) => this.isSettled(n)) || isOver)) this.settledAt = now;
        if (this.settledAt === null) return;
        const areHeard = this.study.roster.every((name, place) => place === this.me || this.view.closed(place));
        if (!areHeard && now - this.settledAt < this.recordsWait && all.some((n) => n.state === "open")) return;
        this.x = mix(this.x, [], this.toRollBack);
        this.toRollBack = [];
        this.isFinished = true;
        this.persist();
        for (const n of all) if (n.isConnected) this.say(n, "Goodbye", { reason: "finished" });
        this.outcome = this.result(areHeard);
    }

    result(areHeard = true) {
        const unsettled = [...this.neighbours.values()].filter((n) => n.ledger.open !== null).length;
        if (!areHeard) this.io.log("not everybody's closing record was heard");
        return { code: unsettled || !areHeard ? 3 : 0, reason: this.reason, unsettled, x: toBytes(this.x).toString("hex") };
    }

    // ---- time

    sayReady() {
        for (const n of this.neighbours.values()) {
            if (n.state !== "open" || !n.isConnected) continue;
            for (const values of this.agreement.say(n.name, this.io.now())) this.say(n, "Ready", values);
        }
    }

    passRecords() {
        for (const n of this.neighbours.values()) {
            if (n.state !== "open" || !n.isConnected) continue;
            for (const values of this.view.passOn(n.name)) this.say(n, "Records", values);
        }
    }

    /** To be called often: what falls due with time. */
    tick() {
        const now = this.io.now();
        if (this.outcome) return;
        for (const n of this.neighbours.values()) {
            if (n.isConnected && n.state !== "open" && !n.isGone && now - n.saidHello >= HELLO_S) this.sayHello(n);
            if (!n.isConnected || n.state !== "open") continue;
            if (this.phase === "running" && this.posted === this.t && !this.came(n) && n.asked && now >= n.asked.at && !n.isGone) {
                this.ask(n, false);
                n.asked.step = Math.min(n.asked.step + 1, ASK_AFTER_S.length - 1);
                n.asked.at = now + ASK_AFTER_S[n.asked.step];
            }
        }
        this.passRecords();
        this.askForProof(now);
        this.advance();
        this.sayReady();
    }

    askForProof(now) {
        if (this.phase !== "running" || now - (this.proofAskedAt ?? -9) < 0.5) return;
        const all = [...this.neighbours.values()];
        if (!all.some((n) => n.exchange > this.t + this.study.ahead) || this.believed() > this.t + this.study.ahead) return;
        this.proofAskedAt = now;
        for (const n of all) if (n.state === "open") this.say(n, "ProofRequest", { relayed: false });
    }
}
