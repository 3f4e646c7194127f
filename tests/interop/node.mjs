// A node in JavaScript, written from docs/protocol.md and docs/vectors.json: node node.mjs CONFIG.json
//
// It averages (task averaging, algorithm dpsgd, on an undirected graph that stays as it is). CONFIG has: derived (what `p2pfl study show
// --json` prints, a file), member, keys (private.pem), listen, first (its vector, hexadecimal), state (a folder), deadline_s, linger_s.
// It ends with state/result.json.

import crypto from 'node:crypto'
import fs from 'node:fs'
import path from 'node:path'
import { Float } from './msgpack.mjs'
import { CHUNK_BYTES, Refused, bits, encode, isSigned, keysOf, placesOf, publicKey, seal, sha256, unseal } from './wire.mjs'
import { Ledger, Link, NOTHING_CLOSED, add, announced, believes, bytesOf, counter, earliest, flow, formatOf, goesBack, least, normOf, numbersOf, passes } from './rules.mjs'
import { Links } from './links.mjs'

const HELLO_MS = 500
const PROOF_MS = 500
const LEVEL = 3 // it speaks of every eighth round
const BEHIND = 4

class Node {
  constructor(config) {
    const said = JSON.parse(fs.readFileSync(config.derived, 'utf8'))
    const of = said.derived
    this.config = config
    this.me = config.member
    this.keys = keysOf(fs.readFileSync(config.keys, 'utf8'))
    this.roster = of.roster
    this.place = of.roster.indexOf(this.me)
    const cards = new Map(said.members.map((each) => [each.name, each]))
    this.publicKeys = of.roster.map((name) => publicKey(of.keys[name].identity))
    const row = of.weights[0][this.me]
    this.weights = row.from
    this.names = of.roster.filter((name) => name in row.from)
    this.study = Buffer.from(said.digest, 'hex')
    this.terms = { study: this.study, layout: Buffer.from(of.parameters.digest, 'hex'), start: Buffer.from(of.start.digest, 'hex') }
    this.rule = of.stop_rule
    this.rounds = of.training_rounds
    this.last = of.last_exchange + 1
    this.ahead = of.ahead
    this.guard = of.largest_norm
    this.format = formatOf(of.channels[0].channels)
    this.dtype = of.channels[0].channels[0][1]
    this.start = of.start_agreement
    this.steps = stepsFrom(this.place, of)
    this.neighboursOf = of.roster.map((name) => of.roster.map((_, i) => i).filter((i) => of.edges.some(({ members }) => members.includes(name) && members.includes(of.roster[i]) && of.roster[i] !== name)))
    this.incarnation = crypto.randomBytes(8).readBigUInt64BE() % (2n ** 63n - 1n) + 1n
    this.took = [] // milliseconds of the last exchanges
    this.events = []
    this.neighbours = new Map(this.names.map((name) => [name, {
      link: new Link({ peer: name, terms: this.terms, incarnation: this.incarnation, formats: [this.format], ahead: this.ahead }),
      ledger: new Ledger(), flow: null, updates: new Map(), heard: -1, missed: false, left: false, opened: 0n, accepted: 0n, askAt: 0, askPause: 500,
      handed: new Set(), ready: new Map(), receipts: [], records: new Map(), converged: false, said: null, seen: false,
    }]))
    this.ready = new Map() // by place: {record, sealed}
    this.newest = new Map() // round records, by place
    this.readyNumber = 0
    this.readyBegan = Date.now()
    this.upBefore = null
    this.sentOf = null
    Object.assign(this, { t: 0, x: numbersOf(Buffer.from(config.first, 'hex'), this.dtype), h: 0, counters: {}, stopRound: null, owed: null, company: null, closing: null, finished: false, passed: false, began: Date.now(), previous: null, anew: 0 })
    this.restore()
    this.links = new Links({
      keys: this.keys, listen: config.listen,
      neighbours: this.names.map((name) => ({ name, address: cards.get(name).address, curve: of.keys[name].curve, dials: of.edges.find(({ members }) => members.includes(name) && members.includes(this.me)).dials === this.me })),
      hear: (name, frames) => this.hear(name, frames),
      changed: (name, up) => up && this.sayHello(this.neighbours.get(name), name),
    })
  }

  event(kind, detail) {
    this.events.push([Date.now(), this.t, kind, detail])
  }

  // ---- the checkpoint, which survives a crash

  get file() {
    return path.join(this.config.state, 'state.json')
  }

  keep() {
    const { t, h, counters, stopRound, company, closing, finished, passed, began, events } = this
    const hex = (x) => (x === null ? null : bytesOf(x).toString('hex'))
    const edges = {}
    for (const [name, each] of this.neighbours) edges[name] = { ledger: each.ledger.saved(), flow: hex(each.flow), missed: each.missed }
    const previous = this.previous && { ...this.previous, payload: this.previous.payload.toString('hex') }
    const content = JSON.stringify({ t, x: hex(this.x), h, counters, stopRound, owed: hex(this.owed), company, closing, finished, passed, began, events, previous, edges })
    const temporary = `${this.file}.tmp`
    const descriptor = fs.openSync(temporary, 'w')
    fs.writeSync(descriptor, content)
    fs.fsyncSync(descriptor)
    fs.closeSync(descriptor)
    fs.renameSync(temporary, this.file)
    const before = [...this.neighbours.values()].map((each) => JSON.stringify(each.ledger.report))
    this.neighbours.forEach((each) => each.ledger.keep())
    return [...this.neighbours.values()].some((each, i) => JSON.stringify(each.ledger.report) !== before[i])
  }

  restore() {
    if (!fs.existsSync(this.file)) return
    const saved = JSON.parse(fs.readFileSync(this.file, 'utf8'))
    const numbers = (text) => (text === null ? null : numbersOf(Buffer.from(text, 'hex'), this.dtype))
    for (const [name, edge] of Object.entries(saved.edges)) {
      Object.assign(this.neighbours.get(name), { ledger: new Ledger(edge.ledger), flow: numbers(edge.flow), missed: edge.missed })
    }
    const previous = saved.previous && { ...saved.previous, payload: Buffer.from(saved.previous.payload, 'hex') }
    if (previous) previous.digest = sha256(previous.payload)
    Object.assign(this, saved, { x: numbers(saved.x), owed: numbers(saved.owed), previous })
    delete this.edges
    this.event('resumed', '')
  }

  // ---- what goes out

  say(name, kind, fields, payload) {
    this.links.send(name, encode(kind, fields, payload))
  }

  news(each, h = this.h) {
    return { exchange: this.t, report: each.ledger.report, stop: { agreed_for: h, stop_round: this.stopRound } }
  }

  sayHello(each, name) {
    this.say(name, 'Hello', {
      member: this.me, ...this.terms, incarnation: this.incarnation, echo: each.link.echo, is_open: each.link.state === 'open', anew: this.anew,
      remembered: each.ledger.remembered(), ...this.news(each),
    })
  }

  whereItIs(each, name) {
    if (this.closing === null) this.say(name, 'Heartbeat', this.news(each))
    else this.say(name, 'Closing', { ...this.news(each), reason: this.closing })
  }

  sent(t) {
    if (this.sentOf?.exchange === t) return this.sentOf
    return this.previous?.exchange === t ? this.previous : null
  }

  sendUpdate(each, name, t, offset = 0) {
    const { payload, digest, h } = this.sent(t)
    if (offset === 0) {
      const fields = { channels: this.format.channels, size_bytes: payload.length, digest, marks: null, pad: Buffer.alloc(0), ...this.news(each, h), exchange: t }
      this.say(name, 'Update', fields, payload.subarray(0, CHUNK_BYTES))
    }
    for (let at = offset || CHUNK_BYTES; at < payload.length; at += CHUNK_BYTES) this.say(name, 'Chunk', { exchange: t, offset: at }, payload.subarray(at, at + CHUNK_BYTES))
    each.handed.add(t)
  }

  ask(each, name, lost) {
    const { coming } = each.link
    const here = coming !== null && coming.message.exchange === this.t
    this.say(name, 'ResendRequest', { exchange: this.t, whole: false, lost, offset: here ? coming.size : 0, digest: here ? coming.message.digest : null })
  }

  // ---- what comes in

  hear(name, frames) {
    const each = this.neighbours.get(name)
    let message
    try {
      message = each.link.receive(frames, this.t)
      if (message.stop && message.stop.stop_round !== null && (this.rule === null || message.stop.stop_round < earliest(this.rule, this.rounds))) throw new Refused('implausible_stop')
      if (message.kind === 'Ready') this.hearReady(each, name, message)
      if (message.kind === 'Records') this.hearRecords(each, message)
    } catch (error) {
      if (!(error instanceof Refused)) throw error
      this.event('refused', `${name}: ${error.reason}`)
      if (error.reason.startsWith('wrong_') && ['wrong_name', 'wrong_study', 'wrong_layout', 'wrong_start'].includes(error.reason)) this.say(name, 'Goodbye', { reason: error.reason })
      return
    }
    if (message.kind === 'Hello' && !this.stateIsWhole(each, name, message)) return
    if (message.stop) this.hearNews(each, name, message)
    switch (message.kind) {
      case 'Hello': this.hearHello(each, name, message); break
      case 'ResendRequest': this.answer(each, name, message); break
      case 'Sent': if (message.exchange === this.t && !each.updates.has(this.t) && this.closing === null) this.ask(each, name, true); break
      case 'Goodbye': if (message.reason === 'finished') each.left = each.missed = true; else this.event('goodbye', `${name}: ${message.reason}`); break
      case 'ProofRequest': this.giveProof(name); break
      case 'Update': case 'Heartbeat': if (this.closing !== null) this.whereItIs(each, name); break
    }
    if ((message.dropped === 'stray_chunk' || message.dropped === 'out_of_order') && this.closing === null) this.ask(each, name, true)
    if (message.update && this.closing === null) {
      each.missed = false
      if (!each.updates.has(message.update.exchange)) each.updates.set(message.update.exchange, message.update)
    }
    this.advance()
  }

  // Section 4, lost state.
  stateIsWhole(each, name, hello) {
    const there = { anew: hello.anew, report: hello.report }
    const refuse = (detail) => {
      each.link.refuse()
      this.event('state_lost', detail)
      this.sayHello(each, name)
      this.say(name, 'Goodbye', { reason: 'state_lost' })
      return false
    }
    if (goesBack(hello.remembered, { anew: this.anew, report: each.ledger.report })) return refuse(`${name} remembers more of this node`)
    if (hello.incarnation === each.accepted) return true
    const before = each.ledger.remembered()
    if (there.anew <= before.anew && goesBack(before, there)) return refuse(`${name} knows less of itself`)
    each.accepted = hello.incarnation
    if (there.anew > before.anew) Object.assign(each.ledger, { anew: there.anew, heard: null })
    return true
  }

  hearHello(each, name, hello) {
    each.left = false
    if (hello.needsAnswer) this.sayHello(each, name)
    if (each.link.state !== 'open' || each.opened === hello.incarnation) return
    each.opened = hello.incarnation
    each.handed.clear()
    this.event('greeted', name)
    for (const [place, { sealed }] of this.ready) each.ready.set(place, { sealed, at: 0 })
    for (const [place, { sealed, record }] of this.newest) each.records.set(`${place} ${record.closing}`, sealed)
    for (const t of [this.t - 1, this.t]) if (this.company !== null && t >= hello.exchange && this.sent(t) && this.closing === null) this.sendUpdate(each, name, t)
  }

  hearNews(each, name, { kind, exchange, report, stop, reason }) {
    if (exchange <= this.last) each.heard = Math.max(each.heard, exchange)
    this.rollBack(each, name, each.ledger.hear(report))
    each.converged = kind === 'Closing' && reason === 'converged'
    this.hearStop(each, name, stop.stop_round)
    if (each.missed && !each.left && exchange >= this.t - Math.max(this.ahead, BEHIND)) {
      each.missed = false
      this.event('returned', `${name} at ${exchange}`)
    }
  }

  rollBack(each, name, exchange) {
    if (exchange !== null && each.flow !== null) {
      const back = each.flow.map((number) => -number)
      this.owed = this.owed === null ? back : add(this.owed, back)
      this.event('rolled_back', `${name} at ${exchange}`)
    }
    if (each.ledger.open === null) each.flow = null
  }

  hearStop(each, name, stopRound) {
    each.said = null
    if (stopRound === null || (this.stopRound !== null && stopRound >= this.stopRound)) return
    let belief = believes(this.rule, stopRound, this.counters)
    if (belief === 'cannot tell') {
      const wasAway = Math.max(-1, ...Object.keys(this.counters).map(Number)) > stopRound - 3 * this.rule.diameter
      const converged = new Set([...this.neighbours].filter(([, other]) => other.converged).map(([other]) => this.roster.indexOf(other)))
      for (const [place, { record }] of this.newest) if (record.closing && place !== this.place) converged.add(place)
      if ((wasAway && this.h) || converged.size >= Math.min(2, this.roster.length - 1)) belief = 'yes'
    }
    if (belief === 'yes') this.stopRound = stopRound
    else if (belief === 'cannot tell') each.said = stopRound
    else this.event('refused', `${name}: implausible_stop ${stopRound}`)
  }

  answer(each, name, request) {
    const sent = this.sent(request.exchange)
    if (!sent || this.closing !== null) return this.whereItIs(each, name)
    if (each.ledger.heard !== null && each.ledger.heard.closed_through >= request.exchange) return
    if (!request.lost && each.handed.has(request.exchange)) return this.say(name, 'Sent', { exchange: request.exchange, whole: false })
    const offset = Number(request.offset)
    const goesOn = request.digest !== null && sent.digest.equals(request.digest) && offset % CHUNK_BYTES === 0 && offset < sent.payload.length
    this.sendUpdate(each, name, request.exchange, goesOn ? offset : 0)
  }

  // ---- the agreed start, section 4

  goodLinks() {
    return new Set(this.names.filter((name) => this.links.links.get(name).up && this.neighbours.get(name).link.state === 'open'))
  }

  publishReady() {
    const own = this.neighboursOf[this.place]
    const up = new Set([...this.goodLinks()].map((name) => own.indexOf(this.roster.indexOf(name))))
    const record = { member: this.place, began: this.readyBegan, number: this.readyNumber++, links: bits(up), started: this.company === null ? null : bits(new Set(this.company)) }
    const sealed = seal('ready', [record.member, record.began, record.number, record.links, record.started], this.keys.sign, this.study)
    this.takeReady(record, sealed)
  }

  takeReady(record, sealed) {
    this.ready.set(record.member, { record, sealed })
    this.neighbours.forEach((each) => each.ready.set(record.member, { sealed, at: 0 }))
  }

  hearReady(each, name, message) {
    const got = new Set(message.receipts.map((receipt) => receipt.toString('hex')))
    for (const [place, { sealed }] of each.ready) if (got.has(receiptOf(sealed))) each.ready.delete(place)
    for (const sealed of message.sealed) {
      const record = unseal('ready', sealed)
      if (record.member >= this.roster.length) throw new Refused('bad_record')
      const held = this.ready.get(record.member)
      const same = held && held.sealed.equals(sealed)
      if (held && !same && !(record.began > held.record.began || (record.began === held.record.began && record.number > held.record.number))) continue
      if (!same) {
        if (!isSigned('ready', sealed, this.publicKeys[record.member], this.study)) throw new Refused('wrong_signature')
        if (record.member === this.place) {
          this.readyBegan = record.began + 1
          this.publishReady()
        } else this.takeReady(record, sealed)
      }
      if (each.ready.get(record.member)?.sealed.equals(sealed)) each.ready.delete(record.member)
      each.receipts.push(sha256(sealed).subarray(0, 8))
    }
  }

  sayReady() {
    for (const [name, each] of this.neighbours) {
      if (each.link.state !== 'open') continue
      const due = [...each.ready.values()].filter(({ at }) => Date.now() - at >= HELLO_MS).slice(0, 16)
      const receipts = each.receipts.splice(0, 16)
      if (!due.length && !receipts.length) continue
      due.forEach((item) => (item.at = Date.now()))
      this.say(name, 'Ready', { sealed: due.map(({ sealed }) => sealed), receipts })
    }
  }

  decideStart() {
    const n = this.roster.length
    for (const { record } of this.ready.values()) {
      if (record.started === null) continue
      const company = placesOf(record.started)
      if (company.size >= this.start.needed && [...company].every((place) => this.ready.has(place))) return [...company]
    }
    const said = new Map([...this.ready].map(([place, { record }]) => [place, new Set([...placesOf(record.links)].map((k) => this.neighboursOf[place][k]))]))
    const linked = (a, b) => said.get(a)?.has(b) && said.get(b)?.has(a)
    const there = new Set([this.place])
    for (const place of there) for (const other of this.neighboursOf[place]) if (linked(place, other)) there.add(other)
    const whole = [...there].every((a) => this.neighboursOf[a].every((b) => !there.has(b) || linked(a, b)))
    return there.size === n && whole ? [...there] : null
  }

  // ---- records, section 10

  hearRecords(each, { sealed: all }) {
    for (const sealed of all) {
      const record = unseal('round', sealed)
      if (record.member >= this.roster.length || record.round > this.last) throw new Refused('bad_record')
      each.records.delete(`${record.member} ${record.closing}`)
      const held = this.newest.get(record.member)
      if (record.member === this.place || (held && !isLater(record, held.record))) continue
      if (!isSigned('round', sealed, this.publicKeys[record.member], this.study)) throw new Refused('wrong_signature')
      this.newest.set(record.member, { record, sealed })
      for (const other of this.neighbours.values()) if (other !== each) other.records.set(`${record.member} ${record.closing}`, sealed)
    }
    this.sayRecords()
  }

  sayRecords() {
    for (const [name, each] of this.neighbours) {
      if (each.link.state !== 'open' || !each.records.size) continue
      this.say(name, 'Records', { sealed: [...each.records.values()].slice(0, 32) })
      each.records.clear()
    }
  }

  publishRecord(closing) {
    if (this.lastRow === undefined || (!closing && this.lastRow.round % 2 ** LEVEL)) return
    const sealed = this.sealRecord(closing)
    this.newest.set(this.place, { record: { ...this.lastRow, began: this.began, closing }, sealed })
    this.neighbours.forEach((each) => each.records.set(`${this.place} ${closing}`, sealed))
    this.sayRecords()
  }

  sealRecord(closing) {
    const { round, settles, d, norm, skipped, h, sent } = this.lastRow
    // the update is left out: an earlier process may have signed another one
    const fields = [this.place, this.began, round, LEVEL, settles, closing, d === null ? null : new Float(d), norm === null ? null : new Float(norm), null, skipped.length, skipped.slice(0, 16), h, sent, [0, 0, 0, 0], null, [], null]
    return seal('round', fields, this.keys.sign, this.study)
  }

  giveProof(name) {
    const others = [...this.newest].filter(([place]) => place !== this.place && this.roster[place] !== name)
    const sealed = others.sort(([, a], [, b]) => b.record.round - a.record.round).slice(0, 3).map(([, each]) => each.sealed)
    if (this.lastRow !== undefined) sealed.unshift(this.sealRecord(false))
    if (sealed.length) this.say(name, 'Records', { sealed })
  }

  // ---- rounds

  // The furthest exchange that a second member has reached, too; section 5.
  believed() {
    const reached = new Map()
    for (const [place, { record }] of this.newest) if (place !== this.place) reached.set(place, record.round + 1)
    for (const [name, each] of this.neighbours) {
      const place = this.roster.indexOf(name)
      reached.set(place, Math.max(each.heard, reached.get(place) ?? -1))
    }
    const gone = [...reached].filter(([place, t]) => t > this.t + this.ahead * this.steps[place]).map(([, t]) => t).sort((a, b) => b - a)
    return gone.length > 1 ? gone[1] : -1
  }

  advance() {
    if (this.company === null) {
      const company = this.decideStart()
      if (company === null) return
      this.company = company
      this.event('started', company.join(' '))
      this.keep()
      this.publishReady()
    }
    while (this.closing === null && this.oneStep());
  }

  // Whether something has happened after which to look again.
  oneStep() {
    if (this.stopRound !== null && this.t > this.stopRound) return this.stop(this.passed ? 'converged' : 'rounds')
    if (this.t >= this.last) return this.stop('rounds')
    const open = [...this.neighbours.values()].filter((each) => each.link.state === 'open')
    const furthest = Math.max(-1, ...open.map((each) => each.heard))
    if (furthest > this.t + this.ahead && this.believed() > this.t + this.ahead) return this.jump(Math.min(furthest, this.believed(), this.last))
    if (this.sentOf === null) {
      const payload = Buffer.from(bytesOf(this.x))
      this.sentOf = { exchange: this.t, payload, digest: sha256(payload), h: this.h }
      this.deadline = Date.now() + Math.max(1000 * this.config.deadline_s, 5 * Math.max(0, ...this.took))
      this.exchangeBegan = Date.now()
      for (const [name, each] of this.neighbours) {
        each.askAt = Date.now() + 500
        each.askPause = 500
        if (each.link.state === 'open') this.sendUpdate(each, name, this.t)
      }
    }
    const missing = [...this.neighbours.values()].filter((each) => !each.updates.has(this.t))
    const awaited = missing.filter((each) => !each.missed && !each.ledger.refuses(this.t))
    const inCompany = missing.length < this.neighbours.size || missing.some((each) => each.ledger.refuses(this.t))
    if (Date.now() < this.deadline && (awaited.length || !inCompany)) return false
    this.merge()
    return true
  }

  merge() {
    const own = this.x
    const most = this.guard.times * Math.max(normOf(own), this.guard.first_norm, 1)
    let total = own
    let squared = 0
    const heard = []
    const skipped = []
    const merged = new Map()
    for (const [name, each] of this.neighbours) {
      const update = each.updates.get(this.t)
      const theirs = update && each.ledger.admits(this.t) ? numbersOf(update.payload, this.dtype) : null
      if (theirs === null || normOf(theirs) > most) {
        skipped.push(name)
        if (!each.ledger.refuses(this.t)) each.missed = true
        continue
      }
      const amount = flow(this.weights[name], theirs, own)
      total = add(total, amount)
      squared += theirs.reduce((sum, number, i) => sum + (number - own[i]) ** 2, 0)
      heard.push(update.stop.agreed_for)
      merged.set(name, amount)
    }
    if (this.owed !== null) total = add(total, this.owed)
    this.owed = null
    this.x = total
    if (skipped.length) this.event('skipped', skipped.join(' '))
    else this.took = [...this.took.slice(-19), Date.now() - this.exchangeBegan]
    const settles = this.t >= this.rounds
    const norm = normOf(own)
    if (merged.size) this.passed = this.rule !== null && passes(this.rule, squared / 2, norm)
    if (settles && this.rule !== null) {
      this.h = counter(this.passed && skipped.length === 0 && merged.size > 0, this.h, heard)
      this.counters[this.t] = this.h
      delete this.counters[this.t - 4 * this.rule.diameter - this.rule.patience - 17]
      this.stopRound = least(this.stopRound, announced(this.rule, this.t, this.h))
    }
    for (const [name, each] of this.neighbours) {
      if (merged.has(name)) each.flow = merged.get(name)
      this.rollBack(each, name, each.ledger.close(this.t, merged.has(name)))
      if (this.rule !== null) this.hearStop(each, name, each.said)
    }
    this.lastRow = { member: this.place, round: this.t, settles, d: merged.size ? squared / 2 : null, norm, skipped: skipped.map((name) => this.roster.indexOf(name)), h: this.h, sent: this.format.size_bytes * this.neighbours.size }
    this.go(this.t + 1)
    this.publishRecord(false)
  }

  go(t) {
    this.previous = this.sentOf && this.sentOf.exchange === t - 1 ? this.sentOf : null
    this.sentOf = null
    this.t = t
    for (const each of this.neighbours.values()) for (const old of each.updates.keys()) if (old < t) each.updates.delete(old)
    this.keep()
  }

  jump(t) {
    this.event('jumped', `from ${this.t} to ${t}`)
    for (const [name, each] of this.neighbours) this.rollBack(each, name, each.ledger.close(t - 1, false))
    this.h = 0
    this.passed = false
    this.go(t)
    for (const [name, each] of this.neighbours) if (each.link.state === 'open' && each.heard >= t) this.ask(each, name, false)
    return true // what follows sends Update(t) at once
  }

  stop(reason) {
    this.closing = reason
    this.event('stopped', reason)
    this.keep()
    this.closeBy = Date.now() + 1000 * this.config.linger_s
    this.neighbours.forEach((each, name) => this.whereItIs(each, name))
    return false
  }

  // ---- time

  tick() {
    const up = [...this.goodLinks()].join(' ')
    if (this.t === 0 && this.closing === null && up !== this.upBefore) {
      this.upBefore = up
      this.publishReady()
    }
    const now = Date.now()
    if (now >= (this.helloAt ?? 0)) {
      this.helloAt = now + HELLO_MS
      for (const [name, each] of this.neighbours) {
        if (each.link.state !== 'open') this.sayHello(each, name)
        else if (this.closing !== null) this.whereItIs(each, name)
      }
    }
    if (this.closing === null && this.sentOf !== null) {
      for (const [name, each] of this.neighbours) {
        if (each.link.state !== 'open' || each.updates.has(this.t) || now < each.askAt) continue
        each.askPause = Math.min(2 * each.askPause, 5000)
        each.askAt = now + each.askPause
        this.ask(each, name, false)
      }
      const tooFar = [...this.neighbours.values()].some((each) => each.link.state === 'open' && each.heard > this.t + this.ahead)
      if (tooFar && now >= (this.proofAt ?? 0)) {
        this.proofAt = now + PROOF_MS
        this.neighbours.forEach((each, name) => each.link.state === 'open' && this.say(name, 'ProofRequest', { relayed: false }))
      }
    }
    this.sayReady()
    this.sayRecords()
    this.advance()
    if (this.closing !== null) this.close()
  }

  // The closing exchange, section 8.
  async close() {
    if (this.finished) return
    if (this.keep()) this.neighbours.forEach((each, name) => this.whereItIs(each, name))
    const open = [...this.neighbours.values()].filter((each) => !each.left && !(each.ledger.isSettled() && each.ledger.neighbourIsSettled()))
    this.closeBy ??= Date.now() + 1000 * this.config.linger_s
    if (open.length && Date.now() < this.closeBy) return
    this.publishRecordOnce()
    const ended = this.roster.every((_, place) => this.newest.get(place)?.record.closing)
    this.spreadBy ??= Date.now() + Math.min(5000, 1000 * this.config.linger_s)
    if (!ended && Date.now() < this.spreadBy && [...this.neighbours.values()].some((each) => each.link.state === 'open' && !each.left)) return
    if (this.owed !== null) this.x = add(this.x, this.owed)
    this.owed = null
    this.finished = true
    this.keep()
    this.neighbours.forEach((each, name) => this.say(name, 'Goodbye', { reason: 'finished' }))
    const result = { reason: this.closing, round: this.t, x: bytesOf(this.x).toString('hex'), unsettled: open.length, events: this.events }
    fs.writeFileSync(path.join(this.config.state, 'result.json'), JSON.stringify(result))
    clearInterval(this.timer)
    await this.links.close()
  }

  publishRecordOnce() {
    if (this.closingSaid) return
    this.closingSaid = true
    this.publishRecord(true)
  }

  async run() {
    if (this.finished) return
    await this.links.open()
    this.timer = setInterval(() => this.tick(), 50)
  }
}

const receiptOf = (sealed) => sha256(sealed).subarray(0, 8).toString('hex')

const isLater = (a, b) => a.began > b.began || (a.began === b.began && (a.round > b.round || (a.round === b.round && a.closing && !b.closing)))

// How many links away each member is.
function stepsFrom(place, { roster, edges }) {
  const steps = roster.map(() => Infinity)
  steps[place] = 0
  for (let round = 0; round < roster.length; round++) {
    for (const { members } of edges) {
      const [a, b] = members.map((name) => roster.indexOf(name))
      steps[a] = Math.min(steps[a], steps[b] + 1)
      steps[b] = Math.min(steps[b], steps[a] + 1)
    }
  }
  return steps
}

const config = JSON.parse(fs.readFileSync(process.argv[2], 'utf8'))
fs.mkdirSync(config.state, { recursive: true })
new Node(config).run()
