// msgpack as the protocol wants it: an int is told from a float, a key that comes twice and bytes behind the value are found.

export class Float {
  constructor(value) {
    this.value = value
  }
}

export class Malformed extends Error {}

const MOST_ITEMS = 32
const MOST_MAPS = 8
const text = new TextDecoder('utf-8', { fatal: true })

export function pack(value) {
  const parts = []
  write(value, parts)
  return Buffer.concat(parts)
}

function head(parts, code, size, number) {
  const buffer = Buffer.alloc(1 + size)
  buffer[0] = code
  if (size === 8) buffer.writeBigUInt64BE(BigInt.asUintN(64, BigInt(number)), 1)
  else if (size) buffer.writeUIntBE(number, 1, size)
  parts.push(buffer)
}

function write(value, parts) {
  if (value === null) return head(parts, 0xc0, 0)
  if (value === false) return head(parts, 0xc2, 0)
  if (value === true) return head(parts, 0xc3, 0)
  if (value instanceof Float) {
    const buffer = Buffer.alloc(9)
    buffer[0] = 0xcb
    buffer.writeDoubleBE(value.value, 1)
    return parts.push(buffer)
  }
  if (typeof value === 'number' || typeof value === 'bigint') return writeInt(value, parts)
  if (typeof value === 'string') {
    const bytes = Buffer.from(value, 'utf8')
    const n = bytes.length
    if (n < 32) head(parts, 0xa0 | n, 0)
    else if (n < 2 ** 8) head(parts, 0xd9, 1, n)
    else if (n < 2 ** 16) head(parts, 0xda, 2, n)
    else head(parts, 0xdb, 4, n)
    return parts.push(bytes)
  }
  if (value instanceof Uint8Array) {
    const n = value.length
    if (n < 2 ** 8) head(parts, 0xc4, 1, n)
    else if (n < 2 ** 16) head(parts, 0xc5, 2, n)
    else head(parts, 0xc6, 4, n)
    return parts.push(Buffer.from(value))
  }
  if (Array.isArray(value)) {
    if (value.length < 16) head(parts, 0x90 | value.length, 0)
    else head(parts, 0xdc, 2, value.length)
    return value.forEach((each) => write(each, parts))
  }
  const entries = Object.entries(value)
  if (entries.length < 16) head(parts, 0x80 | entries.length, 0)
  else head(parts, 0xde, 2, entries.length)
  for (const [key, each] of entries) {
    write(key, parts)
    write(each, parts)
  }
}

function writeInt(value, parts) {
  if (typeof value === 'number' && !Number.isSafeInteger(value)) throw new Error(`${value} is no int`)
  if (value >= 0) {
    if (value < 128) return head(parts, Number(value), 0)
    if (value < 2 ** 8) return head(parts, 0xcc, 1, Number(value))
    if (value < 2 ** 16) return head(parts, 0xcd, 2, Number(value))
    if (value < 2 ** 32) return head(parts, 0xce, 4, Number(value))
    return head(parts, 0xcf, 8, value)
  }
  if (value >= -32) return head(parts, 256 + Number(value), 0)
  return head(parts, 0xd3, 8, value)
}

// Ints come as BigInt, floats as Float, bytes as Buffer.
export function unpack(buffer) {
  const reader = { buffer, at: 0, maps: 0 }
  const value = read(reader)
  if (reader.at !== buffer.length) throw new Malformed('bytes behind the value')
  return value
}

function take(reader, size) {
  if (reader.at + size > reader.buffer.length) throw new Malformed('it breaks off')
  reader.at += size
  return reader.buffer.subarray(reader.at - size, reader.at)
}

const uint = (reader, size) => (size === 8 ? take(reader, 8).readBigUInt64BE() : BigInt(take(reader, size).readUIntBE(0, size)))
const int = (reader, size) => (size === 8 ? take(reader, 8).readBigInt64BE() : BigInt(take(reader, size).readIntBE(0, size)))

function read(reader) {
  const code = take(reader, 1)[0]
  if (code < 0x80) return BigInt(code)
  if (code < 0x90) return readMap(reader, code & 15)
  if (code < 0xa0) return readArray(reader, code & 15)
  if (code < 0xc0) return readText(reader, code & 31)
  if (code >= 0xe0) return BigInt(code - 256)
  switch (code) {
    case 0xc0: return null
    case 0xc2: return false
    case 0xc3: return true
    case 0xc4: return Buffer.from(take(reader, Number(uint(reader, 1))))
    case 0xc5: return Buffer.from(take(reader, Number(uint(reader, 2))))
    case 0xc6: return Buffer.from(take(reader, Number(uint(reader, 4))))
    case 0xca: return new Float(take(reader, 4).readFloatBE())
    case 0xcb: return new Float(take(reader, 8).readDoubleBE())
    case 0xcc: return uint(reader, 1)
    case 0xcd: return uint(reader, 2)
    case 0xce: return uint(reader, 4)
    case 0xcf: return uint(reader, 8)
    case 0xd0: return int(reader, 1)
    case 0xd1: return int(reader, 2)
    case 0xd2: return int(reader, 4)
    case 0xd3: return int(reader, 8)
    case 0xd9: return readText(reader, Number(uint(reader, 1)))
    case 0xda: return readText(reader, Number(uint(reader, 2)))
    case 0xdb: return readText(reader, Number(uint(reader, 4)))
    case 0xdc: return readArray(reader, Number(uint(reader, 2)))
    case 0xdd: return readArray(reader, Number(uint(reader, 4)))
    case 0xde: return readMap(reader, Number(uint(reader, 2)))
    case 0xdf: return readMap(reader, Number(uint(reader, 4)))
  }
  throw new Malformed('an extension type')
}

function readText(reader, size) {
  try {
    return text.decode(take(reader, size))
  } catch (error) {
    throw error instanceof Malformed ? error : new Malformed('text that is not UTF-8')
  }
}

function readArray(reader, size) {
  if (size > MOST_ITEMS) throw new Malformed('too many items')
  return Array.from({ length: size }, () => read(reader))
}

function readMap(reader, size) {
  reader.maps += 1
  if (size > MOST_ITEMS || reader.maps > MOST_MAPS) throw new Malformed('too many items')
  const found = new Map()
  for (let i = 0; i < size; i++) {
    const key = read(reader)
    if (typeof key !== 'string' || found.has(key)) throw new Malformed('a key twice, or not text')
    found.set(key, read(reader))
  }
  return Object.fromEntries(found)
}
