// Links over ZeroMQ with CURVE (section 2): one DEALER for each neighbour that is dialled, one ROUTER for the one that dials.
// The zeromq package shows no `User-Id`, so a listener is for one neighbour only ("What a library may lack").
import { Dealer, Reply, Router } from "zeromq";
import { z85 } from "./sealed.mjs";

const COMMON = {
    linger: 500, receiveHighWaterMark: 8, sendHighWaterMark: 4, sendTimeout: 0, maxMessageSize: 1048576 + 65536 + 33,
    tcpKeepalive: 1, tcpKeepaliveIdle: 5, tcpKeepaliveInterval: 5, tcpKeepaliveCount: 4, tcpMaxRetransmitTimeout: 25000,
};
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Messages that wait for a link, sent one after the other. `events`: connected, disconnected, message, sent. */
class Link {
    constructor(name, events) {
        Object.assign(this, { name, events, isConnected: false, queue: [], isPumping: false, isClosed: false });
    }

    up() {
        if (this.isConnected) return;
        this.isConnected = true;
        this.events.connected(this.name);
    }

    down() {
        this.queue = [];
        if (!this.isConnected) return;
        this.isConnected = false;
        this.events.disconnected(this.name);
    }

    /** make() gives the frames at the moment of sending, or null; tag is told back when they have gone out. */
    send(make, tag = null) {
        if (!this.isConnected || this.isClosed) return;
        this.queue.push({ make, tag });
        this.pump();
    }

    async pump() {
        if (this.isPumping) return;
        this.isPumping = true;
        while (this.queue.length && this.isConnected && !this.isClosed) {
            const item = this.queue[0];
            try {
                const frames = item.make();
                if (frames !== null) await this.socket.send([...this.prefix(), ...frames]);
                if (this.queue[0] === item) this.queue.shift();
                if (frames !== null && item.tag !== null) this.events.sent(this.name, item.tag);
            } catch (error) {
                if (error.code === "EAGAIN") await pause(5);
                else if (error.code === "EHOSTUNREACH") this.down();
                else if (this.isClosed) break;
                else throw error;
            }
        }
        this.isPumping = false;
    }

    beat() {
        if (this.isConnected && !this.queue.length) this.send(() => [Buffer.alloc(0)]);
    }

    async drain(ms) {
        for (let i = 0; i < ms / 5 && this.queue.length && this.isConnected; i++) await pause(5);
    }
}

export class Dialled extends Link {
    constructor(name, address, theirKey, keys, events) {
        super(name, events);
        this.socket = new Dealer({
            ...COMMON, curvePublicKey: keys.curvePublic, curveSecretKey: keys.curveSecret, curveServerKey: theirKey, immediate: true, probeRouter: true,
            reconnectInterval: 100, reconnectMaxInterval: 2000, connectTimeout: 10000,
        });
        this.socket.events.on("handshake", () => this.up());
        this.socket.events.on("disconnect", () => this.down());
        this.socket.connect(address);
        this.read();
    }

    prefix() {
        return [];
    }

    async read() {
        try {
            for await (const frames of this.socket) {
                if (frames.length === 1 && frames[0].length === 0) this.events.alive?.(this.name);
                else this.events.message(this.name, frames);
            }
        } catch (error) {
            if (!this.isClosed) throw error;
        }
    }

    close() {
        this.isClosed = true;
        this.socket.close();
    }
}

export class Listening extends Link {
    /** theirKey: the only key that may connect (Z85). */
    static async open(name, address, theirKey, keys, events) {
        const link = new Listening(name, events);
        link.id = null;
        link.seen = new Set();
        link.zap = new Reply({ linger: 0 });
        await link.zap.bind("inproc://zeromq.zap.01");
        link.answer(theirKey);
        link.socket = new Router({ ...COMMON, mandatory: true, curveServer: true, curveSecretKey: keys.curveSecret, zapDomain: "p2pfl" });
        link.socket.events.on("disconnect", () => link.probe());
        await link.socket.bind(address);
        link.read();
        return link;
    }

    async answer(theirKey) {
        try {
            for await (const [version, request, , , , mechanism, credential] of this.zap) {
                const isHers = mechanism.toString() === "CURVE" && credential?.length === 32 && z85(credential) === theirKey;
                await this.zap.send([version, request, isHers ? "200" : "400", "", isHers ? theirKey : "", ""]);
            }
        } catch (error) {
            if (!this.isClosed) throw error;
        }
    }

    prefix() {
        return [this.id];
    }

    /** A connection has ended: whether it was this one shows when something is sent. */
    async probe() {
        for (const ms of [0, 100, 500]) {
            await pause(ms);
            this.beat();
        }
    }

    async read() {
        try {
            for await (const [id, ...frames] of this.socket) {
                if (id.length !== 5 || id[0] !== 0) continue;
                if (!this.seen.has(id.toString("hex"))) {
                    // a new connection; an older one that speaks again is read, and not answered
                    this.seen.add(id.toString("hex"));
                    this.down();
                    this.id = Buffer.from(id);
                }
                this.up();
                if (frames.length === 1 && frames[0].length === 0) this.events.alive?.(this.name);
                else this.events.message(this.name, frames);
            }
        } catch (error) {
            if (!this.isClosed) throw error;
        }
    }

    close() {
        this.isClosed = true;
        this.socket.close();
        this.zap.close();
    }
}
