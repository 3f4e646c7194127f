// Links to neighbours over ZeroMQ, section 2 of docs/protocol.md.
//
// A DEALER for each neighbour that this node dials, and a ROUTER for one that dials it. This library does not show the user id of a frame,
// so that a ROUTER that let two keys in could not tell their frames apart: this node listens for one neighbour at most.

import * as zmq from 'zeromq'
import { z85 } from './wire.mjs'

const MAX_FRAME_BYTES = 1048576 + 65536 + 33
const BEAT_MS = 2000

export class Links {
  // neighbours: [{name, address, curve, dials}], dials: whether this node dials it
  constructor({ keys, listen, neighbours, hear, changed }) {
    Object.assign(this, { keys, listen, neighbours, hear, changed, links: new Map(), sockets: [], closed: false })
    if (neighbours.filter((each) => !each.dials).length > 1) throw new Error('more than one neighbour dials this node: see the head of links.mjs')
  }

  async open() {
    const common = {
      curvePublicKey: this.keys.curvePublic, curveSecretKey: this.keys.curveSecret, maxMessageSize: MAX_FRAME_BYTES, linger: 2000,
      sendHighWaterMark: 4, receiveHighWaterMark: 8, tcpKeepalive: 1, tcpKeepaliveIdle: 5,
    }
    for (const neighbour of this.neighbours) {
      const link = { up: false, route: null, queue: [], sending: false, socket: null }
      this.links.set(neighbour.name, link)
      if (neighbour.dials) {
        link.socket = new zmq.Dealer({ ...common, curveServerKey: neighbour.curve, immediate: true, probeRouter: true, reconnectInterval: 100, reconnectMaxInterval: 2000 })
        link.socket.events.on('handshake', () => this.note(neighbour.name, true))
        link.socket.events.on('disconnect', () => this.note(neighbour.name, false))
        link.socket.connect([neighbour.address].flat()[0])
        this.read(neighbour.name, link.socket, 0)
      } else {
        await this.answerForKeys(neighbour.curve)
        link.socket = new zmq.Router({ ...common, curveServer: true, zapDomain: 'p2pfl', mandatory: true, handover: false })
        link.socket.events.on('disconnect', () => this.note(neighbour.name, false))
        await link.socket.bind(this.listen)
        this.read(neighbour.name, link.socket, 1)
      }
      this.sockets.push(link.socket)
    }
    this.beat = setInterval(() => this.links.forEach((link, name) => link.up && this.send(name, [Buffer.alloc(0)])), BEAT_MS)
  }

  // ZAP, RFC 27: who connects must be the neighbour that dials this node.
  async answerForKeys(curve) {
    const zap = new zmq.Reply()
    await zap.bind('inproc://zeromq.zap.01')
    this.sockets.push(zap)
    const answer = async () => {
      for await (const [version, id, , , , mechanism, key] of zap) {
        const known = String(mechanism) === 'CURVE' && key && z85(key) === curve
        await zap.send([version, id, known ? '200' : '400', '', known ? curve : '', ''])
      }
    }
    answer().catch((error) => this.failed(error))
  }

  read(name, socket, routing) {
    const run = async () => {
      for await (const frames of socket) {
        const link = this.links.get(name)
        if (routing) {
          if (frames[0].length !== 5 || frames[0][0] !== 0) continue // an id that the dialler chose
          link.route = frames[0] // the newest connection that has spoken
        }
        this.note(name, true)
        const message = frames.slice(routing)
        if (message.length > 1 || message[0].length) this.hear(name, message)
      }
    }
    run().catch((error) => this.failed(error))
  }

  failed(error) {
    if (this.closed) return
    console.error(error)
    process.exit(1)
  }

  note(name, up) {
    const link = this.links.get(name)
    if (link.up === up) return
    link.up = up
    if (!up) link.queue.length = 0
    this.changed(name, up)
  }

  // What cannot be sent is lost: whoever misses it asks for it.
  send(name, frames) {
    const link = this.links.get(name)
    if (!link.up || this.closed) return
    link.queue.push(frames)
    if (!link.sending) this.drain(link)
  }

  async drain(link) {
    link.sending = true
    while (link.queue.length && link.up) {
      const frames = link.queue.shift()
      try {
        await link.socket.send(link.route === null ? frames : [link.route, ...frames])
      } catch (error) {
        if (this.closed) return
      }
    }
    link.sending = false
  }

  async close() {
    for (let i = 0; i < 200 && [...this.links.values()].some((link) => link.sending && link.up); i++) await new Promise((done) => setTimeout(done, 10))
    this.closed = true
    clearInterval(this.beat)
    this.sockets.forEach((socket) => socket.close())
  }
}

