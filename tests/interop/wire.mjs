// Bytes of the protocol: a strict MessagePack reader and a writer (section 3), the messages with their keys and ranges,
// and the length that an update's header is filled up to (section 5). No sockets, no clock.
// Whole numbers beyond 2^53 - 1 are BigInt; floats of 64 bits are Float objects when read and when written.
import { createHash } from "node:crypto";

export const PIECE = 1048576;
const MAX_HEADER = 65536;
const SAFE = BigInt(Number.MAX_SAFE_INTEGER);

export const sha256 = (...parts) => parts.reduce((hash, part) => hash.update(part), createHash("sha256")).digest();

/** A message that is refused; `reason` is the protocol's name for why. */
export class Refused extends Error {
    constructor(reason, detail = "") {
        super(detail ? `${reason}: ${detail}` : reason);
        this.reason = reason;
    }
}
const bad = (detail) => new Refused("bad_message", detail);

/** A msgpack float, told apart from an int. */
export class Float {
    constructor(value) {
        this.value = value;
    }
}

// ---- writing

function head(out, small, smallLimit, codes, n) {
    if (n < smallLimit) out.push(Buffer.from([small | n]));
    else if (n < 0x100 && codes[0] !== null) out.push(Buffer.from([codes[0], n]));
    else if (n < 0x10000) out.push(Buffer.from([codes[1], n >> 8, n & 255]));
    else {
        const bytes = Buffer.alloc(5);
        bytes[0] = codes[2];
        bytes.writeUInt32BE(n, 1);
        out.push(bytes);
    }
}

function writeInt(out, value) {
    const n = BigInt(value);
    if (n >= 0n) {
        if (n < 0x80n) return out.push(Buffer.from([Number(n)]));
        const [code, size] = n < 0x100n ? [0xcc, 1] : n < 0x10000n ? [0xcd, 2] : n < 0x100000000n ? [0xce, 4] : [0xcf, 8];
        const bytes = Buffer.alloc(1 + size);
        bytes[0] = code;
        if (size === 8) bytes.writeBigUInt64BE(n, 1);
        else bytes.writeUIntBE(Number(n), 1, size);
        return out.push(bytes);
    }
    if (n >= -32n) return out.push(Buffer.from([256 + Number(n)]));
    const [code, size] = n >= -128n ? [0xd0, 1] : n >= -32768n ? [0xd1, 2] : n >= -2147483648n ? [0xd2, 4] : [0xd3, 8];
    const bytes = Buffer.alloc(1 + size);
    bytes[0] = code;
    if (size === 8) bytes.writeBigInt64BE(n, 1);
    else bytes.writeIntBE(Number(n), 1, size);
    out.push(bytes);
}

function write(out, value) {
    if (value === null) out.push(Buffer.from([0xc0]));
    else if (value === true || value === false) out.push(Buffer.from([value ? 0xc3 : 0xc2]));
    else if (typeof value === "number" || typeof value === "bigint") writeInt(out, value);
    else if (value instanceof Float) {
        const bytes = Buffer.alloc(9);
        // a float that 32 bits hold is written as 64 bits in headers; records choose for themselves, see packRecord
        bytes[0] = 0xcb;
        bytes.writeDoubleBE(value.value, 1);
        if (value.short && Math.fround(value.value) === value.value) {
            const four = Buffer.alloc(5);
            four[0] = 0xca;
            four.writeFloatBE(value.value, 1);
            out.push(four);
        } else out.push(bytes);
    } else if (typeof value === "string") {
        const text = Buffer.from(value, "utf8");
        head(out, 0xa0, 32, [0xd9, 0xda, 0xdb], text.length);
        out.push(text);
    } else if (value instanceof Uint8Array) {
        head(out, 0, 0, [0xc4, 0xc5, 0xc6], value.length);
        out.push(value);
    } else if (Array.isArray(value)) {
        head(out, 0x90, 16, [null, 0xdc, 0xdd], value.length);
        for (const item of value) write(out, item);
    } else {
        const keys = Object.keys(value);
        head(out, 0x80, 16, [null, 0xde, 0xdf], keys.length);
        for (const key of keys) {
            write(out, key);
            write(out, value[key]);
        }
    }
}

export function pack(value) {
    const out = [];
    write(out, value);
    return Buffer.concat(out);
}

// ---- reading

class Reader {
    constructor(bytes) {
        this.bytes = bytes;
        this.at = 0;
        this.maps = 0;
        this.depth = 0;
    }

    take(n) {
        if (this.at + n > this.bytes.length) throw bad("breaks off");
        this.at += n;
        return this.bytes.subarray(this.at - n, this.at);
    }

    number(size) {
        return this.take(size).readUIntBE(0, size);
    }

    text(n) {
        try {
            return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(this.take(n));
        } catch (error) {
            throw error instanceof Refused ? error : bad("no UTF-8");
        }
    }

    items(n) {
        if (n > 32) throw bad("too many items");
        if (++this.depth > 32) throw bad("too deep");
        const list = [];
        for (let i = 0; i < n; i++) list.push(this.value());
        this.depth--;
        return list;
    }

    map(n) {
        if (n > 32) throw bad("too many items");
        if (++this.maps > 8) throw bad("too many maps");
        if (++this.depth > 32) throw bad("too deep");
        const map = new Map();
        for (let i = 0; i < n; i++) {
            const key = this.value();
            if (typeof key !== "string") throw bad("a key that is no text");
            if (map.has(key)) throw bad("a key twice");
            map.set(key, this.value());
        }
        this.depth--;
        return map;
    }

    value() {
        const code = this.number(1);
        if (code < 0x80) return code;
        if (code >= 0xe0) return code - 256;
        if (code < 0x90) return this.map(code & 15);
        if (code < 0xa0) return this.items(code & 15);
        if (code < 0xc0) return this.text(code & 31);
        const small = (big) => (big <= SAFE && big >= -SAFE ? Number(big) : big);
        switch (code) {
            case 0xc0: return null;
            case 0xc2: return false;
            case 0xc3: return true;
            case 0xc4: return this.take(this.number(1));
            case 0xc5: return this.take(this.number(2));
            case 0xc6: return this.take(this.number(4));
            case 0xca: return new Float(this.take(4).readFloatBE());
            case 0xcb: return new Float(this.take(8).readDoubleBE());
            case 0xcc: return this.number(1);
            case 0xcd: return this.number(2);
            case 0xce: return this.number(4);
            case 0xcf: return small(this.take(8).readBigUInt64BE());
            case 0xd0: return this.take(1).readInt8();
            case 0xd1: return this.take(2).readInt16BE();
            case 0xd2: return this.take(4).readInt32BE();
            case 0xd3: return small(this.take(8).readBigInt64BE());
            case 0xd9: return this.text(this.number(1));
            case 0xda: return this.text(this.number(2));
            case 0xdb: return this.text(this.number(4));
            case 0xdc: return this.items(this.number(2));
            case 0xdd: return this.items(this.number(4));
            case 0xde: return this.map(this.number(2));
            case 0xdf: return this.map(this.number(4));
            default: throw bad("an extension type");
        }
    }
}

/** Reads one msgpack value and nothing behind it; maps become Map, bin becomes Buffer, floats become Float. */
export function unpack(bytes) {
    const reader = new Reader(Buffer.isBuffer(bytes) ? bytes : Buffer.from(bytes));
    const value = reader.value();
    if (reader.at !== reader.bytes.length) throw bad("bytes behind the value");
    return value;
}

// ---- what the keys of a message hold: each check returns the value as the rest of the program wants it

const isInt = (value) => typeof value === "number" || typeof value === "bigint";
const int = (low, high) => (value) => {
    if (!isInt(value) || value < low || value > high) throw bad("an int out of range");
    return value;
};
const count = int(0, Number.MAX_SAFE_INTEGER);
const reached = int(-1, Number.MAX_SAFE_INTEGER);
const LONG = (1n << 63n) - 1n;
const bool = (value) => {
    if (typeof value !== "boolean") throw bad("no bool");
    return value;
};
const bin = (low, high) => (value) => {
    if (!Buffer.isBuffer(value) || value.length < low || value.length > high) throw bad("no bytes of this length");
    return Buffer.from(value);
};
const text = (value) => {
    if (typeof value !== "string" || !value.length || [...value].length > 128) throw bad("no text of 1 to 128");
    return value;
};
const maybe = (check) => (value) => (value === null ? null : check(value));
const list = (low, high, check) => (value) => {
    if (!Array.isArray(value) || value.length < low || value.length > high) throw bad("no array of this length");
    return value.map(check);
};
const map = (spec) => (value) => {
    if (!(value instanceof Map) || value.size !== Object.keys(spec).length) throw bad("other keys");
    return fields(spec, value);
};
function fields(spec, value) {
    const result = {};
    for (const [key, check] of Object.entries(spec)) {
        if (!value.has(key)) throw bad(`no ${key}`);
        result[key] = check(value.get(key));
    }
    return result;
}
const amount = (value) => {
    const number = value instanceof Float ? value.value : isInt(value) ? Number(value) : NaN;
    if (!Number.isFinite(number) || number < 0) throw bad("no finite number from 0");
    return new Float(number);
};
const output = (value) => {
    if (!(value instanceof Float)) throw bad("no float");
    return value;
};
const reason = (value) => {
    if (typeof value !== "string" || !/^[a-z][a-z_]{0,31}$/.test(value) || value.endsWith("\n")) throw bad("no reason");
    return value;
};
const plainReport = map({ closed_through: reached, merged: list(0, 16, count), confirmed: reached, settled: reached });
const report = (value) => {
    const r = plainReport(value);
    if (r.confirmed > r.settled || r.settled > r.closed_through) throw bad("a report out of order");
    r.merged.forEach((e, i) => {
        if (e <= r.confirmed || e > r.closed_through || (i && e <= r.merged[i - 1])) throw bad("merged out of order");
    });
    return r;
};
const stop = map({ agreed_for: count, stop_round: maybe(count) });
const channel = (value) => {
    if (!Array.isArray(value) || value.length !== 3) throw bad("no channel");
    return [text(value[0]), text(value[1]), int(1, LONG)(value[2])];
};
const marks = (value) => {
    if (!Array.isArray(value) || value.length !== 2) throw bad("no marks");
    return [maybe(bin(8, 8))(value[0]), bin(8, 8)(value[1])];
};
const digest = bin(32, 32);

const MESSAGES = {
    1: ["Hello", {
        member: text, study: digest, layout: digest, start: digest, incarnation: int(1, LONG), echo: int(0, LONG), is_open: bool, anew: count,
        remembered: map({ anew: count, report }), exchange: count, report, stop,
    }],
    2: ["Update", {
        exchange: count, channels: list(1, 16, channel), size_bytes: int(1, LONG), digest, marks: maybe(marks), report, stop, pad: bin(0, 255),
    }],
    3: ["Chunk", { exchange: count, offset: int(1, LONG) }],
    4: ["ResendRequest", { exchange: count, whole: bool, lost: bool, offset: int(0, LONG), digest: maybe(digest) }],
    5: ["Heartbeat", { exchange: count, report, stop }],
    6: ["Closing", { exchange: count, report, stop, reason }],
    7: ["Goodbye", { reason }],
    8: ["Busy", { exchange: count }],
    9: ["Records", { sealed: list(1, 32, bin(65, 512)) }],
    10: ["PushSum", { round: count, step: count, sum: amount, weight: amount, low: maybe(amount), high: maybe(amount), outage: count, hops: count, void: bool }],
    11: ["Sent", { exchange: count, whole: bool }],
    12: ["Ready", { sealed: list(0, 16, bin(65, 2048)), receipts: list(0, 16, bin(8, 8)) }],
    13: ["ProofRequest", { relayed: bool }],
    14: ["DoctorQuestion", { number: int(0, LONG), pad: bin(0, 60000) }],
    15: ["DoctorAnswer", {
        number: int(0, LONG), clock: count, version: text, torch: text, arithmetic: int(0, LONG), study: digest, layout: digest, start: digest,
        forward: maybe(digest), outputs: list(0, 8, output), pad: bin(0, 60000),
    }],
};
const CODES = Object.fromEntries(Object.entries(MESSAGES).map(([code, [name]]) => [name, Number(code)]));
const schemaOf = (code) => (code >= 14 ? 5 : 4);
const hasPayload = (code) => code === 2 || code === 3;

/** The header's bytes of a message; `values` may have further keys, which are left out. */
export function encodeHeader(name, values) {
    const code = CODES[name];
    const whole = { v: schemaOf(code), t: code };
    for (const key of Object.keys(MESSAGES[code][1])) {
        if (values[key] === undefined) throw new Error(`${name} without ${key}`);
        whole[key] = values[key];
    }
    return pack(whole);
}

/** Reads the frames of a message; throws Refused. The result has the message's keys, and `name` and `payload`. */
export function decode(frames) {
    if (frames.length < 1 || frames.length > 2) throw bad("one or two frames");
    if (frames[0].length > MAX_HEADER || (frames[1]?.length ?? 0) > PIECE) throw bad("a frame that is too large");
    const value = unpack(frames[0]);
    if (!(value instanceof Map)) throw bad("no map");
    const [v, t] = [value.get("v"), value.get("t")];
    const known = isInt(t) && MESSAGES[t] !== undefined;
    if (isInt(v)) {
        const expected = known ? v === schemaOf(t) : isInt(t) ? v === 4 : v === 4 || v === 5;
        if (!expected) throw new Refused("wrong_schema");
    }
    if (!isInt(v) || !known) throw bad("no v or no known t");
    const [name, spec] = MESSAGES[t];
    if (value.size !== 2 + Object.keys(spec).length) throw bad("other keys");
    const result = fields(spec, value);
    if (hasPayload(t) !== (frames.length === 2)) throw bad("a payload missing or too many");
    return { ...result, name, payload: frames[1] ?? null };
}

/** The pad that fills an update's header up to the length that follows from its exchange. */
export function padOf(update) {
    const t = update.exchange + 12;
    const large = t < 2 ** 7 ? 2n ** 7n - 1n : t < 2 ** 8 ? 2n ** 8n - 1n : t < 2 ** 16 ? 2n ** 16n - 1n : t < 2 ** 32 ? 2n ** 32n - 1n : 2n ** 64n - 1n;
    const longest = {
        ...update, exchange: large, pad: Buffer.alloc(0),
        report: { closed_through: large, merged: [large - 2n, large - 1n, large], confirmed: large - 3n, settled: large },
        stop: { agreed_for: large, stop_round: 2 ** 32 - 1 },
    };
    const short = encodeHeader("Update", { ...update, pad: Buffer.alloc(0) });
    return Buffer.alloc(Math.max(0, encodeHeader("Update", longest).length - short.length));
}

// ---- numbers of a payload

const SIZES = { float16: 2, float32: 4, float64: 8, int8: 1, uint8: 1, int16: 2, uint16: 2, int32: 4, uint32: 4 };

export const channelBytes = (channels) => channels.reduce((sum, [, dtype, n]) => sum + SIZES[dtype] * Number(n), 0);

/** Whether every float of a payload is finite. */
export function allFinite(channels, payload) {
    let at = 0;
    for (const [, dtype, n] of channels) {
        const size = SIZES[dtype];
        if (dtype.startsWith("float")) {
            for (let i = 0; i < n; i++, at += size) {
                // the highest bits of the number: all ones in the exponent mean an infinity or NaN
                const top = payload.readUInt16LE(at + size - 2);
                const mask = { 2: 0x7c00, 4: 0x7f80, 8: 0x7ff0 }[size];
                if ((top & mask) === mask) return false;
            }
        } else at += size * n;
    }
    return true;
}
