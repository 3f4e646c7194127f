// Rules without sockets and without a clock: ledger, handshake, updates coming in, stopping, mixing; sections 4 to 7 of docs/protocol.md.

import { CHUNK_BYTES, Refused, decode, sha256 } from './wire.mjs'

// ---- section 6: the ledger of one edge

export const NOTHING_CLOSED = { closed_through: -1, merged: [], confirmed: -1, settled: -1 }
const order = (report) => [report.closed_through, report.settled, report.confirmed]
export const isNewer = (one, other) => {
  const [a, b] = [order(one), order(other)]
  const i = a.findIndex((each, k) => each !== b[k])
  return i >= 0 && a[i] > b[i]
}
export const goesBack = (before, now) =>
  now.anew !== before.anew ? now.anew < before.anew : order(before.report).some((each, i) => each > order(now.report)[i])

export class Ledger {
  constructor(saved = {}) {
    Object.assign(this, { closed_through: -1, open: null, merged: [], confirmed: -1, settled: -1, heard: null, anew: 0, lostHistory: 0 }, structuredClone(saved))
    this.keep()
  }

  // What is on the disk from now on is what is reported.
  keep() {
    const { closed_through, merged, confirmed, settled } = this
    this.report = { closed_through, merged: [...merged], confirmed, settled }
  }

  saved() {
    const { closed_through, open, merged, confirmed, settled, heard, anew } = this
    return structuredClone({ closed_through, open, merged, confirmed, settled, heard, anew })
  }

  admits(t) {
    return t > this.closed_through && this.heard !== null && this.heard.closed_through >= t - 1 && this.merged.length < 16
  }

  refuses(t) {
    const heard = this.heard
    return heard !== null && heard.confirmed < t && t <= heard.closed_through && !heard.merged.includes(t)
  }

  // Both return the exchange whose flow is to be rolled back, or null.
  close(t, merged) {
    this.closed_through = t
    if (merged) {
      this.merged.push(t)
      this.open = t
    }
    return this.settle()
  }

  hear(report) {
    if (this.heard === null || isNewer(report, this.heard)) this.heard = report
    return this.settle()
  }

  settle() {
    const R = this.heard
    if (R === null) return null
    let back = null
    if (this.open !== null && this.open <= R.closed_through) {
      if (this.open <= R.confirmed) this.lostHistory += 1
      else if (!R.merged.includes(this.open)) back = this.open
      this.open = null
    }
    this.settled = Math.max(this.settled, Math.min(this.closed_through, R.closed_through))
    this.confirmed = Math.max(this.confirmed, Math.min(this.closed_through, R.settled))
    this.merged = this.merged.filter((e) => e > this.confirmed && (e > R.closed_through || R.merged.includes(e)))
    return back
  }

  remembered() {
    if (this.heard !== null) return { anew: this.anew, report: this.heard }
    if (this.anew !== 0) return { anew: this.anew, report: NOTHING_CLOSED }
    return { anew: 0, report: { closed_through: this.settled, merged: [], confirmed: -1, settled: this.confirmed } }
  }

  isSettled() {
    return this.open === null && this.report.closed_through === this.closed_through && this.report.merged.length === 0
  }

  neighbourIsSettled() {
    return this.heard !== null && this.heard.closed_through >= this.closed_through && this.heard.merged.length === 0
  }
}

// ---- sections 4 and 5: one link, and the update that is coming in over it

export class Link {
  // format: {channels: [[name, dtype, count]], size_bytes, full: the same or null, itemsize and isFloat by channel}
  constructor({ peer, terms, incarnation, formats, ahead = 1 }) {
    Object.assign(this, { peer, terms, incarnation, formats, ahead, state: 'unknown', echo: 0n })
    this.forgetUpdates()
  }

  forgetUpdates() {
    this.complete = new Map()
    this.coming = null
  }

  refuse() {
    this.state = 'unknown'
    this.echo = 0n
    this.coming = null
  }

  hello(message) {
    const fault =
      message.member !== this.peer ? 'wrong_name' : ['study', 'layout', 'start'].map((key) => (message[key].equals(this.terms[key]) ? null : `wrong_${key}`)).find((each) => each)
    if (fault) {
      this.refuse()
      throw new Refused(fault)
    }
    const isNew = message.incarnation !== this.echo
    const echoes = message.echo === this.incarnation
    if (isNew) {
      this.echo = message.incarnation
      this.coming = null
    }
    if (echoes) this.state = 'open'
    else if (isNew) this.state = 'half_open'
    return { needsAnswer: !(echoes && message.is_open) }
  }

  // The message, with `update` where one is complete, or `dropped`.
  receive(frames, t) {
    const message = decode(frames)
    if (message.kind === 'Hello') return { ...message, ...this.hello(message) }
    if (message.kind === 'Goodbye') {
      this.refuse()
      return message
    }
    if (message.kind === 'DoctorQuestion' || message.kind === 'DoctorAnswer') return message // a node may leave out the answer
    if (this.state !== 'open') throw new Refused('not_greeted')
    if (message.kind === 'Update') return { ...message, ...this.begin(message, t) }
    if (message.kind === 'Chunk') return { ...message, ...this.go_on(message, t) }
    return message
  }

  useless(of, t) {
    for (const key of this.complete.keys()) if (Number(key.split(' ')[0]) < t) this.complete.delete(key)
    if (this.coming && this.coming.message.exchange < t) this.coming = null
    return of < t ? 'stale_round' : of > t + this.ahead ? 'far_round' : null
  }

  begin(message, t) {
    if (message.report.closed_through < message.exchange - 1) throw new Refused('wrong_report')
    const isFull = message.marks !== null && message.marks[0] === null
    const key = `${message.exchange} ${isFull}`
    const before = this.complete.get(key)
    const dropped = this.useless(message.exchange, t) ?? (before ? (before.equals(message.digest) ? 'duplicate' : 'contradiction') : null)
    if (dropped) return { dropped }
    this.coming = null
    const ours = this.formats[message.exchange % this.formats.length]
    if ((message.marks === null) !== (ours.full === null)) throw new Refused('wrong_format')
    const format = isFull ? ours.full : ours
    if (message.size_bytes !== BigInt(format.size_bytes)) throw new Refused('wrong_size')
    const same = message.channels.length === format.channels.length && message.channels.every(([name, dtype, count], i) =>
      name === format.channels[i][0] && dtype === format.channels[i][1] && count === BigInt(format.channels[i][2]))
    if (!same) throw new Refused('wrong_format')
    this.coming = { message, key, format, parts: [], size: 0 }
    return this.take(message.payload)
  }

  go_on(message, t) {
    const dropped = this.useless(message.exchange, t)
    if (dropped) return { dropped }
    if (this.coming === null || this.coming.message.exchange !== message.exchange) {
      const known = [...this.complete.keys()].some((key) => Number(key.split(' ')[0]) === message.exchange)
      return { dropped: known ? 'duplicate' : 'stray_chunk' }
    }
    if (message.offset !== BigInt(this.coming.size)) return { dropped: 'out_of_order' }
    return this.take(message.payload)
  }

  take(payload) {
    const { coming } = this
    if (payload.length !== Math.min(CHUNK_BYTES, coming.format.size_bytes - coming.size)) {
      this.coming = null
      throw new Refused('bad_message')
    }
    coming.parts.push(Buffer.from(payload))
    coming.size += payload.length
    if (coming.size < coming.format.size_bytes) return {}
    this.coming = null
    const whole = Buffer.concat(coming.parts)
    if (!sha256(whole).equals(coming.message.digest)) throw new Refused('wrong_digest')
    if (!isFinite(whole, coming.format)) throw new Refused('not_finite')
    this.complete.set(coming.key, coming.message.digest)
    return { update: { exchange: coming.message.exchange, payload: whole, report: coming.message.report, stop: coming.message.stop } }
  }
}

const SIZES = { float16: 2, float32: 4, float64: 8, int8: 1, uint8: 1, int16: 2, uint16: 2, int32: 4, uint32: 4 }

export function formatOf(channels, full = null) {
  const size_bytes = channels.reduce((sum, [, dtype, count]) => sum + SIZES[dtype] * count, 0)
  return { channels, size_bytes, full: full === null ? null : formatOf(full.channels) }
}

function isFinite(payload, format) {
  let at = 0
  for (const [, dtype, count] of format.channels) {
    for (let i = 0; i < count; i++, at += SIZES[dtype]) {
      if (dtype === 'float64' && !Number.isFinite(payload.readDoubleLE(at))) return false
      if (dtype === 'float32' && !Number.isFinite(payload.readFloatLE(at))) return false
      if (dtype === 'float16' && (payload.readUInt16LE(at) & 0x7c00) === 0x7c00) return false
    }
  }
  return true
}

// ---- section 7: agreeing to stop

export const passes = (rule, d, norm) => d <= rule.lambda_2 * (rule.tolerance * norm) ** 2
export const counter = (passed, own, heard) => (passed ? 1 + Math.min(own, ...heard) : 0)
export const announced = (rule, round, h) => (h >= rule.patience + rule.diameter ? round + 2 * rule.diameter : null)
export const earliest = (rule, rounds) => rounds + rule.patience + rule.diameter - 1 + 2 * rule.diameter
export const least = (...rounds) => rounds.reduce((a, b) => (a === null ? b : b === null ? a : Math.min(a, b)), null)

export function believes(rule, stopRound, counters) {
  const h = counters[stopRound - 3 * rule.diameter]
  return h === undefined ? 'cannot tell' : h >= rule.patience ? 'yes' : 'implausible_stop'
}

// ---- section 1: the merge of D-PSGD

export const numbersOf = (payload, dtype) =>
  dtype === 'float32'
    ? Float32Array.from({ length: payload.length / 4 }, (_, i) => payload.readFloatLE(4 * i))
    : Float64Array.from({ length: payload.length / 8 }, (_, i) => payload.readDoubleLE(8 * i))
export const bytesOf = (x) => Buffer.from(x.buffer, x.byteOffset, x.byteLength)

// In float32 every operation is rounded by itself: the array does that where a result is put into it.
export function flow(weight, theirs, own) {
  const difference = own.slice().map((each, i) => theirs[i] - each)
  const w = own instanceof Float32Array ? Math.fround(weight) : weight
  return difference.map((each) => w * each)
}

export function add(x, y) {
  return x.map((each, i) => each + y[i])
}

export const normOf = (x) => Math.sqrt(x.reduce((sum, each) => sum + each * each, 0))
