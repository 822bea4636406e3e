"""Small i3 files for tests: an encoder, written apart from the reader."""
import binascii
import math
import struct


def crc32c(data):
    "CRC-32C that starts at 0, bit by bit."
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8): crc = crc >> 1 ^ (crc & 1) * 0x82F63B78
    return crc


def text(value): return struct.pack("<I", len(value.encode())) + value.encode()


def frame(stop, objects, version=5, checksum=None):
    "A frame of key -> bytes of an object. The checksum of version 6 takes a loop over all bits."
    body = stop.encode() + struct.pack("<I", len(objects))
    for key, data in objects.items():
        body += text(key) + text("some C++ type") + struct.pack("<I", len(data)) + data
    if checksum is None: checksum = crc32c(body) if version == 6 else binascii.crc_hqx(body, 0xFFFF)
    return b"[i3]" + struct.pack("<IBB", version, 0, 0) + body + struct.pack("<I", checksum)


class Archive:
    "An object, as Boost writes it."
    def __init__(self, name, version=0, tracked=True):
        self.out, self.classes, self.numbered = bytearray(b"\0\1\2\0" + text(name)), set(), 0
        self.begin(name, version, tracked)

    def put(self, code, *values):
        self.out += struct.pack("<" + code, *values)
        return self

    def add(self, data):
        self.out += data
        return self

    def enter(self, name, version=0, tracked=False):
        if name not in self.classes: self.put("BB", tracked, version)
        self.classes.add(name)
        if tracked: self.put("I", self.numbered)
        self.numbered += tracked
        return self

    def begin(self, name, version=0, tracked=True):
        return self.enter(name, version, tracked).enter("base", 0, tracked)

    def bytes(self): return bytes(self.out)


def header(run=1, event=2, sub_event=0, stream="InIceSplit", start=(2014, 10**16), version=3):
    a = Archive("I3EventHeader", version).put("I", run)
    if version > 0: a.put("I", 7)
    a.put("I", event)
    if version > 1: a.put("i", 20)
    if version > 2: a.put("I", sub_event).add(text(stream))
    for _ in range(2): a.begin("I3Time").put("iq", *start)
    return a.bytes()


def mapping(name, code, values):
    a = Archive(name).enter("map").put("I", len(values))
    if values: a.enter("pair")
    for key, value in values.items(): a.add(text(key)).put(code, value)
    return a.bytes()


def om_key(a, key, version=2):
    a.enter("key", version, True)
    if version < 2: a.enter("base", 0, True)
    string, module, pmt = key
    a.put("iI", string, module)
    if version: a.put("B", pmt)


def pulse_map(series, version=3, tracked=True, key_version=2):
    "(string, module, PMT) -> [(time, charge, width, flags)]."
    a = Archive("I3RecoPulseSeriesMap").enter("map").put("I", len(series))
    code = "dffB" if version == 3 else "fffB"
    for key, pulses in series.items():
        a.enter("pair")
        om_key(a, key, key_version)
        a.enter("vector").put("I", len(pulses))
        for pulse in pulses: a.enter("pulse", version, tracked).put(code, *pulse)
    return a.bytes()


def bits(a, values):
    size = max(math.ceil(len(values) / 8), 1)
    number = sum(bit << k for k, bit in enumerate(values))
    a.enter("bits").put("HB", size, 8 * size - len(values)).add(number.to_bytes(size, "little"))


def mask(source, doms, pulses, version=2):
    "Which DOMs; for each chosen one, which pulses."
    a = Archive("I3RecoPulseSeriesMapMask", version).add(text(source))
    if version == 1: a.put("f", 0)
    bits(a, doms)
    a.enter("vector").put("I", len(pulses))
    for chosen in pulses: bits(a, chosen)
    return a.bytes()


def union(*keys):
    a = Archive("I3RecoPulseSeriesMapUnion").enter("vector").put("I", len(keys))
    for key in keys: a.add(text(key))
    return a.bytes()


def overflow(words, rest):
    "Words that are added up to the first that is not full."
    while rest >= 0xFFFF:
        words.append(0xFFFF)
        rest -= 0xFFFF
    words.append(rest)


def runs(values):
    "Run lengths of 4 bits, the lowest first."
    out, k = bytearray(), 0
    while k < len(values):
        n = 1
        while k + n < len(values) and values[k + n] == values[k]: n += 1
        k, rest = k + n, n
        while rest:
            out.append(values[k - 1] | (rest & 15) << 4)
            rest >>= 4
    return bytes(out)


def compact(a, name, data, size):
    n = len(data) // size
    a.enter(name).enter("size")
    if n < 247: a.put("B", n)
    else:
        length = math.ceil(n.bit_length() / 8)
        a.put("B", 255 - length).add(n.to_bytes(length, "little"))
    return a.add(data)


def super_dst(readouts, version=1):
    "[(string, module, local coincidence, [(time from -512 ns, charge code, width code)])], by first time."
    words, headers, extra, widths, before = [], [], bytearray(), [[], [], [], []], 0
    for string, module, hlc, stamps in readouts:
        top, last = module > 60, None
        for k, (time, charge, width) in enumerate(stamps):
            step, full = (time - before, 2047) if k == 0 else (time - last, 255)
            before, last = (time if k == 0 else before), time
            code = charge & 63 if top else min(charge, 63)
            words.append(min(step, full) & 255 | code << 8 | hlc << 14 | (k == len(stamps) - 1) << 15)
            if k == 0: headers.append(string << 6 | module - 1 | min(step, full) >> 8 << 13)
            if step >= full: overflow(words, step - full)
            if charge >= 63 and not top: overflow(words, charge - 63)
            if top: extra.append(charge >> 6)
            widths[2 * top + hlc].append(width)
    a = Archive("I3SuperDST", version)
    compact(a, "stamps", struct.pack(f"<{len(words)}H", *words), 2)
    compact(a, "headers", struct.pack(f"<{len(headers)}H", *headers), 2)
    for values in widths: compact(a, "bytes", runs(values), 1)
    return compact(a, "bytes", bytes(extra), 1).bytes()


def put_particle(a, pid, energy):
    "What follows the class."
    a.put("i", 3).put("Q", 2**60)
    a.put("iii", pid, 10, 0).begin("position").put("ddd", 1, 2, 3)
    a.begin("direction").put("dd", 0.5, energy / 100)
    a.put("dddd", 10, energy, math.nan, 0.3).put("i", 0)


def particle(pid=14, energy=5., version=5):
    a = Archive("I3Particle", version)
    put_particle(a, pid, energy)
    return a.bytes()


def particle_bytes(a, pid, energy, version=5):
    "A particle inside another object."
    a.begin("I3Particle", version)
    put_particle(a, pid, energy)


def tree(roots, version=1, most=65_535):
    "Nested (pid, energy, [children])."
    a = Archive("I3MCTree", version)
    if version: tree_by_bits(a, roots, most)
    else: tree_by_counts(a, roots)
    return a.bytes()


def tree_by_counts(a, roots):
    def add(node):
        particle_bytes(a, node[0], node[1])
        a.put("I", len(node[2]))
        for child in node[2]: add(child)

    a.put("I", len(roots))
    for root in roots: add(root)


def tree_by_bits(a, roots, most):
    links, particles = [], []

    def add(nodes):
        for node in nodes:
            links.append(1)
            particles.append(node)
            add(node[2])
        links.append(0)

    add(roots)
    if not roots: return a.put("I", 0)
    while True:
        part, links = links[:most], links[most:]
        words = math.ceil(len(part) / 64)
        a.put("I", len(part)).put("I", words)
        a.add(sum(bit << k for k, bit in enumerate(part)).to_bytes(8 * words, "little"))
        for _ in range(sum(part)): particle_bytes(a, *particles.pop(0)[:2])
        if len(part) < most: return a


def geometry(positions, version=1, module_version=1, key_version=2):
    "(string, module, PMT) -> position; what follows the positions is left out."
    a = Archive("I3Geometry", version)
    if version: a.begin("modules")
    a.enter("map").put("I", len(positions))
    for key, position in positions.items():
        a.enter("pair")
        om_key(a, key, key_version)
        a.enter("module", module_version, True).begin("position").put("ddd", *position)
        if module_version: a.begin("orientation").begin("quaternion").put("ddddid", 0, 1, 0, 0, 20, 0.04)
        else: a.put("iidd", -1, 20, 0.04, 0)
    return a.add(b"and so on").bytes()
