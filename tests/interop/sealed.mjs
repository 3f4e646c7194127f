// Keys, signatures and canonical JSON (section 1), ready records (section 4) and round records (section 10).
import { createPrivateKey, createPublicKey, sign, verify } from "node:crypto";
import { Float, pack, sha256, unpack } from "./wire.mjs";

const Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#";
const PUBLIC_PREFIX = Buffer.from("302a300506032b6570032100", "hex");
const ED25519_PREFIX = Buffer.from("302e020100300506032b657004220420", "hex");

/** Z85 of bytes (ZeroMQ's RFC 32). */
export function z85(bytes) {
    let text = "";
    for (let i = 0; i < bytes.length; i += 4) {
        let n = bytes.readUInt32BE(i);
        let five = "";
        for (let k = 0; k < 5; k++) {
            five = Z85[n % 85] + five;
            n = Math.floor(n / 85);
        }
        text += five;
    }
    return text;
}

const rawPublic = (key) => createPublicKey(key).export({ type: "spki", format: "der" }).subarray(-32);
const rawPrivate = (key) => key.export({ type: "pkcs8", format: "der" }).subarray(-32);

/** The two keys of a private.pem. */
export function readKeys(pem) {
    const blocks = pem.match(/-----BEGIN PRIVATE KEY-----[^-]*-----END PRIVATE KEY-----/g) ?? [];
    if (blocks.length !== 2) throw new Error("private.pem must have two blocks");
    const [signing, link] = blocks.map((block) => createPrivateKey(block));
    return {
        signing, identity: rawPublic(signing), secret: rawPrivate(signing), linkSecret: rawPrivate(link), linkPublic: rawPublic(link),
        curveSecret: z85(rawPrivate(link)), curvePublic: z85(rawPublic(link)),
    };
}

export const signingKey = (raw) => createPrivateKey({ key: Buffer.concat([ED25519_PREFIX, raw]), format: "der", type: "pkcs8" });
const publicKey = (raw) => createPublicKey({ key: Buffer.concat([PUBLIC_PREFIX, raw]), format: "der", type: "spki" });
export const isSigned = (identity, bytes, signature) => verify(null, bytes, publicKey(identity), signature);
export const domain = (name) => Buffer.from(`p2pfl ${name} v1\0`, "latin1");
export const fingerprint = (identity, curve) => sha256(domain("keys"), identity, curve);

/** JSON as it is signed. A number that must have a point is a Float. */
export function canonical(value) {
    if (value === null || typeof value === "boolean") return String(value);
    if (typeof value === "number" || typeof value === "bigint") return String(value);
    if (value instanceof Float) return canonicalFloat(value.value);
    if (typeof value === "string") return canonicalText(value);
    if (Array.isArray(value)) return `[${value.map(canonical).join(",")}]`;
    const keys = Object.keys(value).sort((a, b) => byCodePoint(a, b));
    return `{${keys.map((key) => `${canonicalText(key)}:${canonical(value[key])}`).join(",")}}`;
}

/** Compares texts by code point, as the roster is sorted. */
export const byCodePoint = (a, b) => Buffer.compare(Buffer.from(a, "utf8"), Buffer.from(b, "utf8"));

function canonicalText(text) {
    const named = { '"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f" };
    // 0x7f is a control character, too
    return `"${text.replace(/["\\\u0000-\u001f\u007f-\uffff]/g, (c) => named[c] ?? `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`)}"`;
}

export function canonicalFloat(value) {
    if (Object.is(value, -0)) return "-0.0";
    const [digits, power] = value.toExponential().split("e");
    const exponent = Number(power);
    if (value !== 0 && (exponent >= 16 || exponent < -4)) {
        return `${digits}e${exponent < 0 ? "-" : "+"}${String(Math.abs(exponent)).padStart(2, "0")}`;
    }
    const plain = String(value);
    return plain.includes(".") ? plain : `${plain}.0`;
}

// ---- sealed records: a signature and the array that it is over

const seal = (kind, key, study, array) => Buffer.concat([sign(null, Buffer.concat([domain(kind), study, array]), key), array]);
export const receipt = (sealed) => sha256(sealed).subarray(0, 8);

/** A set of places as bytes, without zero bytes at the end. */
export function placesToBytes(places) {
    const bytes = Buffer.alloc(places.length ? Math.floor(Math.max(...places) / 8) + 1 : 0);
    for (const n of places) bytes[n >> 3] |= 1 << (n & 7);
    return bytes;
}

export function bytesToPlaces(bytes) {
    const places = [];
    for (let n = 0; n < bytes.length * 8; n++) if (bytes[n >> 3] & (1 << (n & 7))) places.push(n);
    return places;
}

export const packReady = (r) => pack([r.member, r.began, r.number, r.links, r.started]);
export const sealReady = (r, key, study) => seal("ready record", key, study, packReady(r));

const SHORT = (value) => {
    // floats of a record take four bytes where these hold the number exactly
    if (value === null) return null;
    const float = new Float(value);
    float.short = true;
    return float;
};

const ROUND_FIELDS = [
    "member", "began", "round", "level", "settles", "closing", "disagreement", "norm", "loss", "skipped", "without", "agreed_for", "sent",
    "milliseconds", "measured", "metrics", "rows",
];

export function packRound(r) {
    const floats = { disagreement: SHORT(r.disagreement), norm: SHORT(r.norm), loss: SHORT(r.loss), metrics: r.metrics.map(SHORT) };
    const array = ROUND_FIELDS.map((key) => (key in floats ? floats[key] : r[key]));
    if (r.update) array.push(r.update);
    return pack(array);
}
export const sealRound = (r, key, study) => seal("round record", key, study, packRound(r));

class BadRecord extends Error {
    constructor(reason) {
        super(reason);
        this.reason = reason;
    }
}
const must = (condition) => {
    if (!condition) throw new BadRecord("bad_record");
};
const isCount = (n) => Number.isSafeInteger(n) && n >= 0;
const number = (value) => {
    const n = value instanceof Float ? value.value : value;
    must(typeof n === "number" && Number.isFinite(n) && Math.abs(n) <= 3e38);
    return n;
};
const orNull = (value, check) => (value === null ? null : check(value));

function openArray(sealed) {
    must(sealed.length > 64);
    let array;
    try {
        array = unpack(sealed.subarray(64));
    } catch {
        must(false);
    }
    must(Array.isArray(array));
    return array;
}

/** Fields of a ready record; its signature is checked by isSealed. Throws an error with `reason`. */
export function readReady(sealed, members) {
    const [member, began, number_, links, started, ...rest] = openArray(sealed);
    must(rest.length === 0 && started !== undefined && isCount(member) && member < members && isCount(began) && isCount(number_));
    must(Buffer.isBuffer(links) && (started === null || Buffer.isBuffer(started)));
    if (started) must(bytesToPlaces(started).every((n) => n < members));
    return { member, began, number: number_, links, started };
}

/** Fields of a round record. */
export function readRound(sealed, members, lastRound) {
    const array = openArray(sealed);
    must(array.length === 17 || array.length === 18);
    const r = Object.fromEntries(ROUND_FIELDS.map((key, i) => [key, array[i]]));
    r.update = array[17] ?? null;
    must(isCount(r.member) && r.member < members && isCount(r.began) && isCount(r.round) && r.round <= lastRound);
    must(isCount(r.level) && r.level <= 32 && typeof r.settles === "boolean" && typeof r.closing === "boolean");
    r.disagreement = orNull(r.disagreement, number);
    r.norm = orNull(r.norm, number);
    must((r.disagreement ?? 0) >= 0 && (r.norm ?? 0) >= 0);
    r.loss = orNull(r.loss, number);
    must(isCount(r.skipped) && Array.isArray(r.without) && r.without.length <= 16 && r.without.every((n) => isCount(n) && n < members));
    must(isCount(r.agreed_for) && isCount(r.sent));
    must(Array.isArray(r.milliseconds) && r.milliseconds.length === 4 && r.milliseconds.every(isCount));
    must(r.measured === null || isCount(r.measured));
    must(Array.isArray(r.metrics) && r.metrics.length <= 8);
    r.metrics = r.metrics.map((m) => orNull(m, number));
    must(r.rows === null || (Array.isArray(r.rows) && r.rows.length === 2 && r.rows.every(isCount)));
    must(array.length === 17 || (Buffer.isBuffer(r.update) && r.update.length === 20));
    return r;
}

export const isSealed = (kind, sealed, identity, study) =>
    isSigned(identity, Buffer.concat([domain(kind), study, sealed.subarray(64)]), sealed.subarray(0, 64));

/** The field `update` of a round record: over the digests of the round's payloads. */
export const updateField = (digests) => sha256(...digests).subarray(0, 20);
