// Runs one member of a study: node node.mjs CONFIG.json. The rules are in member.mjs; here are files, clocks and links.
import { randomBytes } from "node:crypto";
import { closeSync, existsSync, fsyncSync, mkdirSync, openSync, readFileSync, renameSync, writeSync } from "node:fs";
import { join } from "node:path";
import { Dialled, Listening } from "./links.mjs";
import { Member } from "./member.mjs";
import { toVector } from "./rules.mjs";
import { readKeys } from "./sealed.mjs";
import { readStudy } from "./study.mjs";

const config = JSON.parse(readFileSync(process.argv[2], "utf8"));
const study = readStudy(JSON.parse(readFileSync(config.derived, "utf8")));
const keys = readKeys(readFileSync(config.keys, "utf8"));
if (keys.curvePublic !== study.curve[config.member]) throw new Error("private.pem has another key than the study's");
mkdirSync(config.state, { recursive: true });

const begin = process.hrtime.bigint();
const now = () => Number(process.hrtime.bigint() - begin) / 1e9;
const log = (text) => console.log(`${now().toFixed(3)} ${text}`);
const events = [];

/** Writes a file so that it is there whole, also after a crash. */
function writeDurably(name, value) {
    const path = join(config.state, name);
    const file = openSync(`${path}.new`, "w");
    writeSync(file, JSON.stringify(value));
    fsyncSync(file);
    closeSync(file);
    renameSync(`${path}.new`, path);
    const folder = openSync(config.state, "r");
    fsyncSync(folder);
    closeSync(folder);
}

/** A number from 1 to 2^63 - 1 that announces no schema, so 4. */
function drawIncarnation() {
    const drawn = randomBytes(8).readBigUInt64BE() >> 1n;
    return drawn <= BigInt(Number.MAX_SAFE_INTEGER) ? drawIncarnation() : drawn;
}

const statePath = join(config.state, "state.json");
const saved = existsSync(statePath) ? JSON.parse(readFileSync(statePath, "utf8")) : null;
const links = new Map();
const io = {
    now, log, wall: () => Date.now(),
    send: (name, make, tag) => links.get(name)?.send(make, tag),
    save: (state) => writeDurably("state.json", state),
    event: (kind, round, peer) => {
        events.push([Number(now().toFixed(3)), round, kind, peer]);
        log(`event ${kind} ${round} ${peer ?? ""}`);
    },
};
const first = toVector(Buffer.from(config.first, "hex"), study.dtype);
const member = new Member({ study, name: config.member, keys, first, saved, incarnation: drawIncarnation(), deadline: config.deadline_s, linger: config.linger_s, io });

const told = {
    connected: (name) => {
        log(`connected ${name}`);
        member.connected(name);
    },
    disconnected: (name) => {
        log(`disconnected ${name}`);
        member.disconnected(name);
    },
    message: (name, frames) => member.receive(name, frames),
    sent: (name, tag) => member.sentOut(name, tag),
};
const diallers = study.graph[config.member].filter((peer) => study.dials[[config.member, peer].sort().join(" ")] !== config.member);
if (diallers.length > 1) throw new Error(`this node can listen for one neighbour only, not for ${diallers.join(", ")}`);
if (!member.outcome) {
    for (const peer of study.graph[config.member]) {
        const link = diallers.includes(peer)
            ? await Listening.open(peer, config.listen, study.curve[peer], keys, told)
            : new Dialled(peer, study.addresses[peer], study.curve[peer], keys, told);
        links.set(peer, link);
    }
}

const beat = setInterval(() => links.forEach((link) => link.beat()), study.heartbeat * 1000);
const clock = setInterval(async () => {
    member.tick();
    if (!member.outcome) return;
    clearInterval(clock);
    clearInterval(beat);
    const { code, ...result } = member.outcome;
    writeDurably("result.json", { ...result, events });
    log(`ends with ${code}: ${JSON.stringify(result)}`);
    for (const link of links.values()) await link.drain(1000);
    setTimeout(() => {
        for (const link of links.values()) link.close();
        setTimeout(() => process.exit(code), 600);
    }, 200);
}, 50);
