// Messages, keys and sealed records, from sections 1 to 5 and 10 of docs/protocol.md.

import crypto from 'node:crypto'
import { Float, Malformed, pack, unpack } from './msgpack.mjs'

export const CHUNK_BYTES = 1048576
const MAX_HEADER_BYTES = 65536
const MOST = 2n ** 53n - 1n
const MOST_63 = 2n ** 63n - 1n

export class Refused extends Error {
  constructor(reason, detail = '') {
    super(`${reason}: ${detail}`)
    this.reason = reason
  }
}

// ---- types of the keys: each takes what came, and returns it or throws

const check = (ok, value) => {
  if (!ok) throw new Malformed('a value that cannot be')
  return value
}
const range = (low, high) => (value) => check(typeof value === 'bigint' && value >= low && value <= high, value)
const small = (low) => (value) => Number(range(low, MOST)(value))
const exchange = small(0n)
const flag = (value) => check(typeof value === 'boolean', value)
const bin = (low, high) => (value) => check(value instanceof Uint8Array && value.length >= low && value.length <= high, value)
const text = (value) => check(typeof value === 'string' && [...value].length >= 1 && [...value].length <= 128, value)
const reason = (value) => check(typeof value === 'string' && /^[a-z][a-z_]{0,31}$/.test(value), value)
const list = (low, high, of) => (value) => check(Array.isArray(value) && value.length >= low && value.length <= high, value).map(of)
const orNil = (of) => (value) => (value === null ? null : of(value))
const amount = (value) => {
  const number = value instanceof Float ? value.value : Number(check(typeof value === 'bigint', value))
  return check(number >= 0 && number <= 3e38, number)
}
const map = (fields) => (value) => {
  check(value !== null && typeof value === 'object' && Object.getPrototypeOf(value) === Object.prototype, value)
  const keys = Object.keys(value)
  check(keys.length === Object.keys(fields).length && keys.every((key) => key in fields), value)
  return Object.fromEntries(keys.map((key) => [key, fields[key](value[key])]))
}
const report = (value) => {
  const found = map({ closed_through: small(-1n), merged: list(0, 16, exchange), confirmed: small(-1n), settled: small(-1n) })(value)
  const bounds = [found.confirmed, ...found.merged, found.closed_through + 1]
  check(bounds.every((each, i) => i === 0 || bounds[i - 1] < each), found)
  return check(found.confirmed <= found.settled && found.settled <= found.closed_through, found)
}
const stop = map({ agreed_for: exchange, stop_round: orNil(exchange) })
const news = { exchange, report, stop }
const marks = orNil((value) => {
  check(Array.isArray(value) && value.length === 2, value)
  return [orNil(bin(8, 8))(value[0]), bin(8, 8)(value[1])]
})
const entry = (value) => {
  check(Array.isArray(value) && value.length === 3, value)
  return [text(value[0]), text(value[1]), range(1n, MOST_63)(value[2])]
}
const digest = bin(32, 32)

export const MESSAGES = {
  Hello: [1, {
    member: text, study: digest, layout: digest, start: digest, incarnation: range(1n, MOST_63), echo: range(0n, MOST_63),
    is_open: flag, anew: exchange, remembered: map({ anew: exchange, report }), ...news,
  }],
  Update: [2, { channels: list(1, 16, entry), size_bytes: range(1n, MOST_63), digest, marks, pad: bin(0, 255), ...news }],
  Chunk: [3, { exchange, offset: range(1n, MOST_63) }],
  ResendRequest: [4, { exchange, whole: flag, lost: flag, offset: range(0n, MOST_63), digest: orNil(digest) }],
  Heartbeat: [5, news],
  Closing: [6, { reason, ...news }],
  Goodbye: [7, { reason }],
  Busy: [8, { exchange }],
  Records: [9, { sealed: list(1, 32, bin(65, 512)) }],
  PushSum: [10, {
    round: exchange, step: exchange, sum: amount, weight: amount, low: orNil(amount), high: orNil(amount),
    outage: exchange, hops: exchange, void: flag,
  }],
  Sent: [11, { exchange, whole: flag }],
  Ready: [12, { sealed: list(0, 16, bin(65, 2048)), receipts: list(0, 16, bin(8, 8)) }],
  ProofRequest: [13, { relayed: flag }],
  DoctorQuestion: [14, { number: range(0n, MOST_63), pad: bin(0, 60000) }],
  DoctorAnswer: [15, {
    number: range(0n, MOST_63), clock: exchange, version: text, torch: text, arithmetic: range(0n, MOST_63), study: digest, layout: digest,
    start: digest, forward: orNil(digest), outputs: list(0, 8, (value) => check(value instanceof Float, value).value), pad: bin(0, 60000),
  }],
}
const BY_CODE = new Map(Object.entries(MESSAGES).map(([kind, [code, fields]]) => [BigInt(code), [kind, map(fields)]]))
const schemaOf = (code) => (code === 14n || code === 15n ? 5n : 4n)

export function encode(kind, fields, payload = null) {
  const header = pack({ v: schemaOf(BigInt(MESSAGES[kind][0])), t: MESSAGES[kind][0], ...fields })
  return payload === null ? [header] : [header, payload]
}

export function decode(frames) {
  try {
    check(frames.length >= 1 && frames.length <= 2, frames)
    check(frames[0].length <= MAX_HEADER_BYTES, frames)
    const header = unpack(frames[0])
    check(header !== null && typeof header === 'object' && Object.getPrototypeOf(header) === Object.prototype, header)
    const { v, t, ...fields } = header
    check(typeof v === 'bigint', v)
    if (typeof t === 'bigint' ? v !== schemaOf(t) : v !== 4n && v !== 5n) throw new Refused('wrong_schema', `schema ${v}`)
    const [kind, read] = check(BY_CODE.has(t), t) && BY_CODE.get(t)
    const message = read(fields)
    const wants = kind === 'Update' || kind === 'Chunk'
    check((frames.length === 2) === wants, frames)
    check(!wants || (frames[1].length >= 1 && frames[1].length <= CHUNK_BYTES), frames)
    return { kind, ...message, payload: frames[1] ?? null }
  } catch (error) {
    throw error instanceof Malformed ? new Refused('bad_message', error.message) : error
  }
}

// ---- keys

const LETTERS = '0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#'

export function z85(bytes) {
  let found = ''
  for (let i = 0; i < bytes.length; i += 4) {
    let number = Buffer.from(bytes).readUInt32BE(i)
    let part = ''
    for (let k = 0; k < 5; k++) {
      part = LETTERS[number % 85] + part
      number = Math.floor(number / 85)
    }
    found += part
  }
  return found
}

export function keysOf(pem) {
  const [signing, curve] = pem.match(/-----BEGIN PRIVATE KEY-----[^]*?-----END PRIVATE KEY-----/g).map((each) => crypto.createPrivateKey(each))
  const raw = (key, half) => Buffer.from(key.export({ format: 'jwk' })[half], 'base64url')
  return { sign: (data) => crypto.sign(null, data, signing), curveSecret: z85(raw(curve, 'd')), curvePublic: z85(raw(curve, 'x')), identity: raw(signing, 'x').toString('hex') }
}

export const publicKey = (hex) =>
  crypto.createPublicKey({ key: { kty: 'OKP', crv: 'Ed25519', x: Buffer.from(hex, 'hex').toString('base64url') }, format: 'jwk' })

export const sha256 = (...parts) => {
  const found = crypto.createHash('sha256')
  parts.forEach((part) => found.update(part))
  return found.digest()
}

// ---- sealed records

const DOMAIN = { round: 'p2pfl round record v1\0', ready: 'p2pfl ready record v1\0' }

export function seal(kind, fields, sign, study) {
  const array = pack(fields)
  return Buffer.concat([sign(Buffer.concat([Buffer.from(DOMAIN[kind]), study, array])), array])
}

export function isSigned(kind, sealed, key, study) {
  return crypto.verify(null, Buffer.concat([Buffer.from(DOMAIN[kind]), study, sealed.subarray(64)]), key, sealed.subarray(0, 64))
}

const places = (value) => bin(0, 2048)(value)
const figure = (value) => (value instanceof Float ? value.value : Number(check(typeof value === 'bigint', value)))
const level = (value) => Number(range(0n, 32n)(value))
const ROUND_FIELDS = {
  member: exchange, began: exchange, round: exchange, level, settles: flag, closing: flag, disagreement: orNil(amount),
  norm: orNil(amount), loss: orNil(figure), skipped: exchange, without: list(0, 16, exchange), agreed_for: exchange, sent: exchange,
  milliseconds: list(4, 4, exchange), measured: orNil(exchange), metrics: list(0, 8, orNil(figure)), rows: orNil(list(2, 2, exchange)),
  update: bin(20, 20),
}
const READY_FIELDS = { member: exchange, began: exchange, number: exchange, links: places, started: orNil(places) }

export function unseal(kind, sealed) {
  try {
    const names = Object.entries(kind === 'round' ? ROUND_FIELDS : READY_FIELDS)
    const array = unpack(sealed.subarray(64))
    const least = kind === 'round' ? names.length - 1 : names.length
    check(Array.isArray(array) && array.length >= least && array.length <= names.length, array)
    return Object.fromEntries(array.map((value, i) => [names[i][0], names[i][1](value)]))
  } catch (error) {
    throw error instanceof Malformed ? new Refused('bad_record', error.message) : error
  }
}

export function bits(set) {
  const found = Buffer.alloc(set.size ? Math.floor(Math.max(...set) / 8) + 1 : 0)
  for (const place of set) found[place >> 3] |= 1 << (place & 7)
  return found
}

export function placesOf(bytes) {
  const found = new Set()
  bytes.forEach((byte, i) => {
    for (let bit = 0; bit < 8; bit++) if (byte & (1 << bit)) found.add(8 * i + bit)
  })
  return found
}
