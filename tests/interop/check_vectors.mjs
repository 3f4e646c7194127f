// docs/vectors.json held against this implementation: node check_vectors.mjs FILE prints how many examples there were, by group.

import fs from 'node:fs'
import assert from 'node:assert/strict'
import { Float, pack } from './msgpack.mjs'
import { Refused, decode, encode, isSigned, keysOf, publicKey, sha256, unseal } from './wire.mjs'
import { Ledger, Link, add, announced, believes, bytesOf, counter, earliest, flow, formatOf, least, numbersOf, passes } from './rules.mjs'

const vectors = JSON.parse(fs.readFileSync(process.argv[2], 'utf8'))
const NOTHING = { closed_through: -1, merged: [], confirmed: -1, settled: -1 }
const hex = (text) => Buffer.from(text, 'hex')
const seen = {}
const count = (group) => (seen[group] = (seen[group] ?? 0) + 1)

// fields as the file has them
const plain = (value) => {
  if (value instanceof Uint8Array) return Buffer.from(value).toString('hex')
  if (typeof value === 'bigint') return value > 2n ** 53n ? { int: String(value) } : Number(value)
  if (Array.isArray(value)) return value.map(plain)
  if (value !== null && typeof value === 'object') return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, plain(each)]))
  return value
}
const reasonOf = (action) => {
  try {
    return action().dropped ?? null
  } catch (error) {
    if (error instanceof Refused) return error.reason
    throw error
  }
}

for (const given of vectors.keys) {
  const keys = keysOf(given.private_pem)
  assert.equal(keys.curveSecret, given.curve_secret)
  assert.equal(keys.curvePublic, given.curve_public)
  assert.equal(keys.identity, given.card.identity)
  assert.equal(keys.sign(hex(given.signed)).toString('hex'), given.card.signature)
  count('keys')
}

for (const given of vectors.messages.each) {
  const frames = [hex(given.header), ...(given.payload ? [hex(given.payload)] : [])]
  const { kind, payload, ...fields } = decode(frames)
  assert.equal(kind, given.message)
  assert.deepEqual(plain(fields), given.fields)
  if (kind === 'PushSum') for (const key of ['sum', 'weight', 'low', 'high']) if (fields[key] !== null) fields[key] = new Float(fields[key])
  if (kind === 'DoctorAnswer') fields.outputs = fields.outputs.map((each) => new Float(each))
  const ordered = Object.fromEntries(Object.keys(given.fields).map((key) => [key, fields[key]]))
  assert.equal(encode(kind, ordered)[0].toString('hex'), given.header)
  count('messages')
}
for (const given of vectors.messages.other_encodings) {
  assert.deepEqual(decode([hex(given.header)]), decode([hex(given.same_as)]))
  count('messages')
}

const TERMS = { study: Buffer.alloc(32, 0xaa), layout: Buffer.alloc(32, 0xbb), start: Buffer.alloc(32, 0xcc) }
const linkOf = (incarnation, formats = []) => new Link({ peer: 'hospital-1', terms: TERMS, incarnation: BigInt(incarnation), formats })
const byRule = (size, from) => Buffer.from(Uint8Array.from({ length: size }, (_, i) => (7 * (i + from) + 3) % 251))
const frame = (shown) => (typeof shown === 'string' ? hex(shown) : byRule(shown.bytes_by_rule, shown.from))

for (const given of vectors.refused.each) {
  const { channels, full } = vectors.refused.formats[given.format]
  const link = linkOf(11, [formatOf(channels, full)])
  for (const before of given.before) assert.equal(reasonOf(() => link.receive(before.map(frame), vectors.refused.exchange)), null)
  assert.equal(reasonOf(() => link.receive(given.frames.map(frame), vectors.refused.exchange)), given.reason, given.what)
  count('refused')
}

{
  const { large } = vectors.messages
  const link = linkOf(11, [formatOf([['x', 'uint8', large.size_bytes]])])
  link.state = 'open'
  let from = 0
  let last
  for (const piece of large.pieces) {
    last = link.receive([hex(piece.header), byRule(piece.payload_bytes, from)], large.exchange)
    from += piece.payload_bytes
  }
  assert.equal(sha256(last.update.payload).toString('hex'), large.sha256)
  count('messages')
}

for (const given of vectors.pad) {
  const t = given.exchange
  const L = [2n ** 7n, 2n ** 8n, 2n ** 16n, 2n ** 32n, 2n ** 64n].map((each) => each - 1n).find((each) => BigInt(t + 12) <= each)
  const news = { exchange: L, report: { closed_through: L, merged: [L - 2n, L - 1n, L], confirmed: L - 3n, settled: L }, stop: { agreed_for: L, stop_round: 2 ** 32 - 1 } }
  const rest = { channels: [['x', 'float32', 4]], size_bytes: 16, digest: Buffer.alloc(32), marks: null, pad: Buffer.alloc(0) }
  const length = (fields) => pack({ v: 4, t: 2, ...rest, ...fields }).length
  assert.equal(Math.max(0, length(news) - length({ exchange: t, report: given.report, stop: given.stop })), given.pad_bytes)
  count('pad')
}

for (const given of vectors.greeting) {
  const link = linkOf(given.own_incarnation)
  for (const step of given.steps) {
    assert.equal(link.state, step.state)
    const hello = { member: 'hospital-1', ...TERMS, anew: 0, remembered: { anew: 0, report: NOTHING }, exchange: 7, report: NOTHING, stop: { agreed_for: 0, stop_round: null } }
    const fields = step.message === 'Hello' ? { ...hello, incarnation: step.incarnation, echo: step.echo, is_open: step.is_open, study: hex(step.study) } : step.message === 'Busy' ? { exchange: 7 } : { reason: 'pausing' }
    let answer = null
    const reason = reasonOf(() => {
      const heard = link.receive(encode(step.message, fields), 7)
      if (heard.needsAnswer) answer = { message: 'Hello', echo: Number(link.echo), is_open: link.state === 'open' }
      return heard
    })
    if (reason?.startsWith('wrong_')) answer = { message: 'Goodbye', reason }
    assert.equal(reason, step.refused)
    assert.equal(link.state, step.then)
    assert.deepEqual(answer, step.answer)
  }
  count('greeting')
}

for (const [what, steps] of Object.entries(vectors.ledger)) {
  const sides = { a: new Ledger(), b: new Ledger() }
  const saved = { a: sides.a.saved(), b: sides.b.saved() }
  for (const step of steps) {
    const side = sides[step.side]
    let back = null
    if (step.do === 'close') back = side.close(step.exchange, step.merged)
    if (step.do === 'hear') back = side.hear(step.report ?? sides[step.side === 'a' ? 'b' : 'a'].report)
    if (step.do === 'keep') {
      side.keep()
      saved[step.side] = side.saved()
    }
    if (step.do === 'kill') sides[step.side] = new Ledger(saved[step.side])
    const { closed_through, open, merged, confirmed, settled, report } = sides[step.side]
    assert.deepEqual({ closed_through, open, merged, confirmed, settled }, step.state, what)
    assert.deepEqual(report, step.durable_report, what)
    assert.equal(back, step.rolls_back, what)
    assert.equal(sides[step.side].lostHistory, step.lost_history, what)
  }
  count('ledger')
}

for (const [what, given] of Object.entries(vectors.stop.networks)) {
  let h = given.neighbours.map(() => 0)
  let stops = given.neighbours.map(() => null)
  assert.equal(earliest(given.rule, given.training_rounds), given.earliest)
  for (const row of given.rounds) {
    const away = new Set(row.away ?? [])
    const next = h.map((own, i) => {
      if (away.has(i)) return 0
      if (row.round < given.training_rounds) return own
      const missed = new Set([...(row.skipped?.[i] ?? []), ...given.neighbours[i].filter((each) => away.has(each))])
      const heard = given.neighbours[i].filter((each) => !missed.has(each)).map((each) => h[each])
      return counter(passes(given.rule, row.d[i], row.norm[i]) && missed.size === 0, own, heard)
    })
    stops = stops.map((own, i) => {
      if (away.has(i) || row.round < given.training_rounds) return own
      const heard = given.neighbours[i].filter((each) => !away.has(each) && !(row.skipped?.[i] ?? []).includes(each)).map((each) => stops[each])
      return least(own, announced(given.rule, row.round, next[i]), ...heard)
    })
    h = next
    assert.deepEqual(h, row.agreed_for, what)
    assert.deepEqual(stops, row.stop_round, what)
  }
  count('stop')
}
for (const each of vectors.stop.claims.each) {
  assert.equal(believes(vectors.stop.claims.rule, each.stop_round, vectors.stop.claims.own_counters), each.believed)
  count('stop')
}

for (const [what, given] of Object.entries(vectors.averaging)) {
  let x = Object.fromEntries(Object.entries(given.first).map(([name, each]) => [name, numbersOf(hex(each), given.dtype)]))
  let owed = {}
  const isLost = (round, from, to) => given.lost.some(([r, a, b]) => r === round && a === from && b === to)
  for (let round = 0; round < Math.max(...given.after); round++) {
    const after = {}
    const next = {}
    for (const [name, row] of Object.entries(given.weights)) {
      let total = x[name]
      for (const other of Object.keys(row).sort()) {
        if (isLost(round, other, name)) continue
        const amount = flow(row[other], x[other], x[name])
        total = add(total, amount)
        if (isLost(round, name, other)) next[name] = amount.map((each) => -each)
      }
      after[name] = name in owed ? add(total, owed[name]) : total
    }
    x = after
    owed = next
    for (const [name, each] of Object.entries(given.vectors[round + 1] ?? {})) assert.equal(bytesOf(x[name]).toString('hex'), each, what)
  }
  count('averaging')
}

{
  const { record, keys } = vectors
  const own = keysOf(keys.find((each) => each.ed25519_secret === record.ed25519_secret).private_pem)
  for (const given of record.records) {
    const kind = given.domain.split(' ')[1]
    const sealed = hex(given.sealed)
    assert.ok(isSigned(kind, sealed, publicKey(record.identity), hex(record.study)))
    const fields = unseal(kind, sealed)
    assert.deepEqual({ update: null, ...plain(fields) }, { update: null, ...given.fields })
    assert.equal(sha256(sealed).subarray(0, 8).toString('hex'), given.receipt)
    assert.equal(own.sign(Buffer.concat([Buffer.from(`${given.domain}\0`), hex(record.study), hex(given.array)])).toString('hex'), given.sealed.slice(0, 128))
    count('record')
  }
}

// every message of the conversation can be read, and belongs to what its sender said before
for (const row of vectors.scenario.conversation.filter((each) => 'header' in each)) {
  assert.equal(decode([hex(row.header), ...(row.payload ? [hex(row.payload)] : [])]).kind, row.message)
  count('scenario')
}

console.log(JSON.stringify(seen))
