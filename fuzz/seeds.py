#!/usr/bin/env python3
"""Writes the corpora that the fuzz targets start from, out of what real programs say.

Needs openssl, gnutls-cli and mosquitto. A seed that is there stays as it is: what they
say differs from run to run, and files that change say nothing.
"""

import base64
import hmac
import os
import socket
import struct
import subprocess
import tempfile
import time
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
os.environ["PATH"] += ":/usr/sbin"


def seed(target, name, content):
    file = CORPUS / target / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        file.write_bytes(content if isinstance(content, bytes) else content.encode())


def proxy_headers():
    signature = b"\r\n\r\n\0\r\nQUIT\n"

    def v2(command, family, body, rest=b""):
        return signature + bytes([0x20 | command, family]) + struct.pack(">H", len(body)) + body + rest

    def tlv(kind, value):
        return bytes([kind]) + struct.pack(">H", len(value)) + value

    v4 = bytes([192, 0, 2, 1, 192, 0, 2, 2]) + struct.pack(">HH", 5000, 7993)
    v6 = socket.inet_pton(socket.AF_INET6, "2001:db8::1") * 2 + struct.pack(">HH", 1, 65535)
    tls = b"\x01\0\0\0\0" + tlv(0x21, b"TLSv1.3") + tlv(0x22, b"meter-1")
    for name, header in {
        "v1-tcp4": b"PROXY TCP4 192.0.2.1 192.0.2.2 5000 7993\r\nhello",
        "v1-tcp6": b"PROXY TCP6 2001:db8::1 2001:db8::2 1 65535\r\n",
        "v1-unknown": b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\nx",
        "v1-too-long": b"PROXY UNKNOWN " + b"a" * 200 + b"\r\n",
        "v1-cut": b"PROXY TCP4 192.0.2.1 192.0.",
        "v2-tcp4": v2(1, 0x11, v4, b"rest"),
        "v2-tcp6": v2(1, 0x21, v6),
        "v2-udp4": v2(1, 0x12, v4),
        "v2-unix": v2(1, 0x31, b"/run/a".ljust(108, b"\0") + b"/run/b".ljust(108, b"\0")),
        "v2-local": v2(0, 0x00, b""),
        "v2-tlvs": v2(1, 0x11, v4 + tlv(1, b"h2") + tlv(2, b"example.org") + tlv(3, b"\1\2\3\4")
                      + tlv(4, b"\0" * 3) + tlv(5, b"unique") + tlv(0x20, tls) + tlv(0x30, b"ns"), b"rest"),
        "v2-tlv-cut": v2(1, 0x11, v4 + b"\x20\xff\xff\0"),
        "v2-too-long": v2(1, 0x11, b"\0" * 5000)[:200],
    }.items():
        seed("proxy_header", name, header)


def first_datagram(command, listener):
    """What a DTLS client says first."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as client:
        try:
            return listener.recvfrom(65536)[0]
        finally:
            client.kill()


def step(what, data=b""):
    return bytes([what]) + struct.pack(">H", len(data)) + data


def fragment(hello, body):
    """The beginning of a ClientHello, as a fragment of its own."""
    cut = bytearray(hello[:25 + body])
    cut[11:13] = struct.pack(">H", 12 + body)
    cut[22:25] = struct.pack(">I", body)[1:]
    return bytes(cut)


def record(kind, epoch, number, body, version=b"\xfe\xfd"):
    return bytes([kind]) + version + struct.pack(">HHI", epoch, 0, number) + struct.pack(">H", len(body)) + body


def handshake_message(kind, number, body):
    return (bytes([kind]) + struct.pack(">I", len(body))[1:] + struct.pack(">H", number) + b"\0\0\0"
            + struct.pack(">I", len(body))[1:] + body)


def dtls(certificates):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.settimeout(10)
        port = str(listener.getsockname()[1])
        to = ["-connect", f"127.0.0.1:{port}"]
        openssl = ["openssl", "s_client", "-dtls1_2", *to]
        gnutls = ["gnutls-cli", "--udp", "--insecure", "-p", port, "127.0.0.1", "--priority"]
        hellos = {}
        for name, command in {
            "openssl": openssl,
            "openssl-psk": [*openssl, "-psk", "00", "-psk_identity", "meter-1", "-cipher", "PSK"],
            "openssl-any-version": ["openssl", "s_client", "-dtls", *to, "-cipher", "ALL:@SECLEVEL=0"],
            "openssl-name": [*openssl, "-servername", "a.example", "-alpn", "coap", "-no_ticket"],
            "gnutls": [*gnutls, "NORMAL"],
            "gnutls-ccm8": [*gnutls, "NORMAL:+ECDHE-ECDSA:+AES-128-CCM-8"],
        }.items():
            hellos[name] = first_datagram(command, listener)
    for name, hello in hellos.items():
        seed("dtls_gate", name, hello)
        seed("dtls_gate", f"{name}-fragment", fragment(hello, 60))
    hello = hellos["openssl"]
    seed("dtls_gate", "record-behind", hello + record(23, 1, 7, b"x" * 40))
    finished = record(22, 1, 0, b"\0\1" + b"\0" * 6 + b"\x5a" * 32)
    change = record(20, 0, 3, b"\1")
    identity = handshake_message(16, 2, b"\0\7meter-1")
    point = handshake_message(16, 2, b"\x41\4" + b"\x11" * 64)
    shown = handshake_message(11, 2, b"\0" + struct.pack(">H", 3 + len(certificates[0])) + b"\0"
                              + struct.pack(">H", len(certificates[0])) + certificates[0])
    alerts = record(21, 0, 9, b"\2\x28") + record(21, 0, 10, b"\1\0")
    foreign = [change, finished, record(23, 0, 9, b"in the clear"), record(22, 2, 9, b"x" * 40),
               record(22, 1, 5, b"short"), b"garbage", alerts]
    seed("dtls_wire", "flight", b"".join(step(0, d) for d in [record(22, 0, 2, identity), change, finished]))
    seed("dtls_wire", "early-finished", step(0, finished) + step(0, change) + 20 * step(0, finished))
    seed("dtls_wire", "foreign", b"".join(step(0, d) for d in foreign))
    seed("dtls_wire", "cut", step(0, change + finished[:20]) + step(0, change))
    for suite, name in enumerate(["gcm", "ccm8", "ccm", "chacha", "ecdhe"]):
        begin = bytes([suite])
        seed("dtls_handshake", f"{name}-all-goes-well", begin + step(1) + 3 * step(2))
        seed("dtls_handshake", f"{name}-changed", begin + step(1) + step(3, b"\0\x20\1") + step(2)
             + step(3, b"\0\x0d\2\0\5\1") + 3 * step(2))
        seed("dtls_session", f"{name}-messages", begin + step(1, b"\0\1\xff") + step(2) + step(3, b"down")
             + step(4, record(21, 1, 9, b"\2\x28" + b"\0" * 20)) + step(5, hello[:255]))
    seed("dtls_handshake", "foreign", b"\0" + b"".join(step(0, d) for d in foreign[:-1]) + step(1) + 3 * step(2))
    seed("dtls_handshake", "alerts", b"\1" + step(1) + step(0, alerts) + step(2))
    seed("dtls_handshake", "unknown-identity", b"\0" + step(0, record(22, 0, 2, identity)) + step(0, change))
    seed("dtls_handshake", "point", b"\4" + step(0, record(22, 0, 2, point)) + step(4))
    seed("dtls_handshake", "certificate", b"\4" + step(0, record(22, 0, 2, shown)) + step(1) + step(2))
    seed("dtls_handshake", "overlapping-fragments", b"\0" + step(0, record(22, 0, 2, fragment(b"\0" * 13 + identity, 5)[13:]))
         + step(0, record(22, 0, 3, identity)) + step(1) + step(2))
    seed("dtls_session", "foreign", b"\0" + b"".join(step(0, d) for d in foreign))
    seed("dtls_session", "lengths", b"\1" + b"".join(step(0, record(23, 1, 9, b"\x5a" * n)) for n in range(0, 36, 3)))
    seed("dtls_session", "restart", b"\2" + step(0, hello) + step(5, hello))


def certificates():
    """DER of names as devices have them, and of some that nobody should have."""
    ders = []
    with tempfile.TemporaryDirectory() as folder:
        for name, subject, options in [
            ("rsa", "/C=DE/O=Meters, Inc./CN=meter-1", ["rsa:1024"]),
            ("ecdsa", "/CN=meter-2/serialNumber=7", ["ec", "-pkeyopt", "ec_paramgen_curve:P-256"]),
            ("utf8", "/CN=mölk+1 \"a\"\\\\/O=#x", ["ed25519", "-utf8"]),
            ("several-names", "/CN=a/CN=b+OU=c/emailAddress=d@e.example", ["ed25519", "-multivalue-rdn"]),
            ("no-names", "/", ["ed25519"]),
            ("extensions", "/CN=x", ["ed25519", "-addext", "subjectAltName=DNS:a,IP:10.0.0.1,URI:urn:dev:7",
                                     "-addext", "keyUsage=digitalSignature"]),
        ]:
            file = Path(folder) / "der"
            command = ["openssl", "req", "-x509", "-batch", "-nodes", "-days", "9000", "-keyout", "/dev/null",
                       "-subj", subject, "-outform", "DER", "-out", file, "-newkey", *options]
            run = subprocess.run(command, capture_output=True)
            if run.returncode:
                raise SystemExit(f"{name}: {run.stderr.decode()}")
            ders.append(file.read_bytes())
            seed("certificate", name, ders[-1])
    seed("certificate", "cut", ders[0][:100])
    return ders


def string(text):
    return struct.pack(">H", len(text)) + text


def packet(first, body):
    length = bytearray()
    rest = len(body)
    while True:
        length.append(rest & 0x7F | (0x80 if rest > 0x7F else 0))
        rest >>= 7
        if not rest:
            return bytes([first]) + bytes(length) + body


def conversation(port, version):
    """What Mosquitto answers to a client that does all that the gateway does."""
    five = version == 5
    properties = b"\0" if five else b""
    with socket.create_connection(("127.0.0.1", port)) as broker:
        broker.settimeout(0.3)
        said = []

        def say(*packets):
            broker.sendall(b"".join(packets))
            got = b""
            try:
                while more := broker.recv(65536):
                    got += more
            except TimeoutError:
                pass
            said.append(got)

        say(packet(0x10, string(b"MQTT") + bytes([version, 2, 0, 60]) + properties + string(b"seed")))
        identifier = b"\2\x0b\7" if five else b""
        say(packet(0x82, b"\0\1" + identifier + string(b"a/#") + b"\2"))
        user = b"\x26" + string(b"from") + string(b"meter-1")
        more = bytes([len(user)]) + user if five else b""
        for qos in range(3):
            say(packet(0x30 | qos << 1, string(b"a/b") + (b"\0\2" if qos else b"") + more + b"hello"))
        say(packet(0x62, b"\0\2"), packet(0x40, b"\0\1"), packet(0x50, b"\0\2"), b"\xc0\0")
        say(packet(0xA2, b"\0\3" + properties + string(b"a/#")))
    return said


def refused(port):
    """The CONNACK for a version that nobody speaks."""
    with socket.create_connection(("127.0.0.1", port)) as broker:
        broker.sendall(packet(0x10, string(b"MQTT") + bytes([9, 2, 0, 60]) + string(b"seed")))
        return broker.recv(99)


def mqtt():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen(["mosquitto", "-p", str(port)], stderr=subprocess.DEVNULL) as mosquitto:
        try:
            time.sleep(1)
            for target, version in [("mqtt311", 4), ("mqtt5", 5)]:
                said = conversation(port, version)
                # The first byte: the limit of packets, and the size of pieces.
                for number, packets in enumerate(said):
                    seed(target, f"mosquitto-{number}", b"\x80" + packets)
                seed(target, "mosquitto-all", b"\xc6" + b"".join(said))
            seed("mqtt311", "mosquitto-refused", b"\x80" + refused(port))
        finally:
            mosquitto.kill()
    large = b"\x01" + packet(0x32, string(b"a/b") + b"\0\1" + b"x" * 200) + b"\xd0\0"
    for target in ["mqtt311", "mqtt5"]:
        seed(target, "too-large", large)
    seed("mqtt311", "too-large-without-id", b"\x01" + packet(0x32, string(b"a/b") + b"\0\0" + b"x" * 200))
    seed("mqtt311", "too-large-of-qos-3", b"\x01" + packet(0x36, string(b"a/b") + b"\0\1" + b"x" * 200))
    seed("mqtt311", "too-large-topic-too-long", b"\x01" + packet(0x30, b"\1\0" + b"x" * 200) + b"x" * 300)
    # As mochi, EMQX and RabbitMQ send them; see the tests of src/broker/wire/.
    for name, packets in {
        "identifiers": b"2\x14\0\3a/b\0\1\x0b\2\0\1Q\x80\x0b\1\x0b\2\x0b\3x",
        "properties": b"\x3b\x28\0\1t\0\7\x21\1\1\2\0\0\0\1\3\0\1c\x08\0\1r\x09\0\1d\x0b\x80\1\x26\0\1k\0\2vv\x23\0\1p",
        "disconnects": b"\xe0\1\x8e\xe0\2\x8e\0\xe0\0",
        "refusals": b"\x40\3\0\1\x87\x50\3\0\2\x97\x90\4\0\3\0\x87\xb0\4\0\4\0\x91\x70\3\0\5\x92",
        "success": b"\x40\3\0\1\1\x40\2\0\1\x40\4\0\1\x10\0",
        "answer-in-311": b"\x20\2\0\0",
        "connack": packet(0x20, b"\0\0" + packet(0, b"\x21\0\x20\x24\1\x25\0\x27\0\1\0\0\x22\0\0\x28\0\x29\0\x2a\0\x13\0\x3c\x12\0\2id")[1:]),
    }.items():
        seed("mqtt5", name, b"\x80" + packets)
    for name, packets in {
        "suback-of-5": b"\x90\3\0\7\x91\x90\3\0\x08\x87\x90\3\0\7\x80",
        "connacks": b"\x20\2\1\0\x20\2\0\5",
    }.items():
        seed("mqtt311", name, b"\x80" + packets)


def texts():
    for name, text in {
        "mosquitto": "# a fleet\n\nmeter-1:00ff\r\n urn:dev:7:A0b1 \n",
        "twice": "a:00\na:01",
        "no-key": "a:00\nb:",
        "not-hex": "a:0g",
    }.items():
        seed("psk_file", name, text)
    for name, text in {
        "list": "allow 10.1.0.0/16, deny 10.0.0.0/8, allow all",
        "array": '["allow 10.0.0.1-10.0.0.9", "deny ::1", "deny all"]',
        "mapped": "deny ::ffff:10.0.0.2",
        "mapped-network": "deny ::ffff:10.0.0.0/104",
        "wide": "deny ::/0, allow fe80::/10,deny 2001:db8::-2001:db8::ff",
    }.items():
        seed("access_rules", name, text)
    for name, text in {
        "order": '[[rules]]\npermission = "deny"\naction = "subscribe"\ntopics = ["$SYS/#", "eq #"]\n'
        '[[rules]]\npermission = "allow"\ntopics = ["${clientid}/#", "a/+"]\nqos = [0, 1]\n',
        "who": '[[rules]]\npermission = "allow"\nusername = "ann"\nipaddr = "10.0.0.0/8"\n'
        '[[rules]]\npermission = "deny"\nclientid = "c1"\nretain = true\n',
        "typo": '[[rules]]\npermission = "alow"\n',
    }.items():
        seed("acl_rules", name, text)
    acl = '[{"permission":"allow","action":"publish","topic":"a/#","qos":[0]}]'
    for name, text in {
        "json": '\0{"result":"allow","is_superuser":false,"expire_at":1700000001,"acl":%s}' % acl,
        "short-acl": '\0{"result":"allow","acl":{"pub":["a"],"sub":["b/#"]}}',
        "form": "\1result=%61llow&is_superuser=true&expire_at=1700000001&x=a+b",
        "html": "\2<html>allow</html>",
    }.items():
        seed("http_answer", name, text)
    for name, claims in {
        "valid": '{"sub":"c1","exp":1700000001,"nbf":1,"acl":%s}' % acl,
        "expired": '{"sub":"c1","exp":1,"is_superuser":true}',
        "another": '{"sub":"c2"}',
    }.items():
        part = lambda text: base64.urlsafe_b64encode(text).rstrip(b"=")
        signed = part(b'{"alg":"HS256","typ":"JWT"}') + b"." + part(claims.encode())
        key = b"a secret of thirty-two bytes...."
        seed("token", name, signed + b"." + part(hmac.digest(key, signed, "sha256")))
    for name, lines in {
        "mounted": ["t/${clientid}/${username}/", "c1", "u1", "up/1", "up/+"],
        "shared": ["t/", "", "", "down/x", "$share/g/down/#"],
        "client-called-share": ["${clientid}/", "$share", "", "g/a", "g/a/#"],
        "half-of-share": ["${clientid}", "$sha", "", "x", "re/g/a"],
        "wide-client": ["t/${clientid}/", "+", "", "a", "#"],
        "system": ["", "", "", "$SYS/x", "#"],
        "empty-levels": ["", "", "", "//", "/+/#"],
    }.items():
        seed("topics", name, "\n".join(lines))
    for name, lines in {
        "wildcards": ["+a/+/c", "+a/#", "?a/b/c", "?a", "+#", "?$SYS/x", "+$SYS/#", "?$SYS/x", "-a/#", "?a/b/c"],
        "children": [f"+a/{n}" for n in range(9)] + ["?a/3", "+a/+"] + [f"-a/{n}" for n in range(8)] + ["?a/8"],
        "shared": ["+$share/g/a/+", "+a/+", "?a/b", "-$share/h/a/+", "?a/b"],
        "empty-levels": ["+/", "+//#", "?/", "?//", "++", "?", "?a"],
        "covers": ["?a/b/c", "?a", "?$x/a", "+a/+/c", "++/#", "+a/b/#", "+#", "+$x/+", "+$x/#"],
    }.items():
        seed("topic_trie", name, "\n".join(lines))


if __name__ == "__main__":
    proxy_headers()
    dtls(certificates())
    mqtt()
    texts()
