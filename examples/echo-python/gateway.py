"""What is around the callbacks of a Python handler: its arguments, the way to the gateway, the server for its calls."""

import argparse
import logging
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

# The stubs are made in memory at each start: none to generate by hand, none to grow stale.
sys.path.append(str(Path(__file__).resolve().parents[2] / "proto"))
pb, rpc = grpc.protos_and_services("exproto.proto")

log = logging.getLogger("handler")
CODES = {number: name for name, number in pb.ResultCode.items()}
ADAPTER_TIMEOUT = 4.0  # seconds; below the gateway's request_timeout, so that no thread works for a lost callback
# The largest callback. gRPC's default of 4 MiB is enough for the gateway's defaults: messages come in batches of at most
# 1 MiB, or alone, and one is no larger than broker.max_packet_size (3 MiB). This is for who raises that one.
MAX_CALLBACK_BYTES = 64 * 1024 * 1024


class Adapter:
    """Calls to the gateway."""

    def __init__(self, channel):
        self.stub = rpc.ConnectionAdapterStub(channel)

    def call(self, name, request):
        """Returns whether the gateway did it. A refusal is an answer with a code and a message, not an exception. An
        exception (the gateway cannot be reached) fails the callback, and then the gateway closes the connection."""
        answer = getattr(self.stub, name)(request, timeout=ADAPTER_TIMEOUT, wait_for_ready=True)
        if answer.code != pb.SUCCESS:
            code = CODES.get(answer.code, "?")
            log.warning("%s refused: %d %s %s (conn %s)", name, answer.code, code, answer.message, request.conn)
        return answer.code == pb.SUCCESS


def is_unix(address):
    return address.startswith("unix:")


def read_token(file):
    """The handler's own token: the first line that is neither empty nor a comment. The gateway's file may hold the old
    and the new one; this one has the one that is shown."""
    lines = (line.strip() for line in Path(file).read_text().splitlines())
    return next((line for line in lines if line and not line.startswith("#")), None)


def adapter_channel(address, tls, token):
    """The way to the gateway: encrypted where there are certificates, with the token in every call where there is one.
    gRPC shows a token only to whom it trusts: over TLS, or a Unix socket."""
    # By itself grpcio names a Unix socket's path as the authority, which is none and is refused by strict servers.
    options = [("grpc.default_authority", "localhost")] if is_unix(address) else []
    credentials = grpc.ssl_channel_credentials(*tls) if tls and not is_unix(address) else None
    if token:
        local = grpc.local_channel_credentials(grpc.LocalConnectionType.UDS)
        shown = grpc.access_token_call_credentials(token)
        credentials = grpc.composite_channel_credentials(credentials or local, shown)
    if credentials:
        return grpc.secure_channel(address, credentials, options)
    return grpc.insecure_channel(address, options)


def listen(server, address, tls):
    """Where the gateway comes to; with certificates it must show one too, of the same authority. Returns the address,
    with the real port where 0 was asked for."""
    if is_unix(address):  # the folder's permissions say who may connect; TLS is for ports
        server.add_insecure_port(address)
        return address
    if tls:
        ca, key, cert = tls
        credentials = grpc.ssl_server_credentials([(key, cert)], ca, require_client_auth=True)
        port = server.add_secure_port(address, credentials)
    else:
        port = server.add_insecure_port(address)
    return f"{address.rpartition(':')[0]}:{port}"


def parse(description):
    """The arguments, checked; `tls` and `token` are what is in their files."""
    parser, env = argparse.ArgumentParser(description=description), os.environ.get
    parser.add_argument("--listen", default=env("HANDLER_LISTEN", "127.0.0.1:9001"), help="[HANDLER_LISTEN]")
    parser.add_argument("--adapter", default=env("ADAPTER_ADDRESS", "127.0.0.1:9100"), help="[ADAPTER_ADDRESS]")
    parser.add_argument("--keepalive", type=int, default=env("HANDLER_KEEPALIVE", "300"), help="[HANDLER_KEEPALIVE]")
    for name, text in (("ca", "authority of both sides"), ("key", "key of the handler"), ("cert", "its certificate")):
        variable = f"HANDLER_{name.upper()}"
        parser.add_argument(f"--{name}", default=env(variable), help=f"PEM file, for TLS: {text} [{variable}]")
    parser.add_argument("--token-file", default=env("ADAPTER_TOKEN_FILE"), help="[ADAPTER_TOKEN_FILE]")
    args = parser.parse_args()
    if not 0 <= args.keepalive < 2**32:
        parser.error("--keepalive: seconds, 0 for no timer")
    files = [args.ca, args.key, args.cert]
    if any(files) and not all(files):
        parser.error("--ca, --key and --cert: all three, or none")
    try:
        args.tls = [Path(file).read_bytes() for file in files] if all(files) else None
        args.token = read_token(args.token_file) if args.token_file else None
    except (OSError, UnicodeDecodeError) as error:
        parser.error(str(error))
    if args.token_file and not args.token:
        parser.error("--token-file: it has no token; allowed: one in a line")
    if args.token and not args.tls and not is_unix(args.adapter):
        parser.error("--token-file: needs TLS (--ca, --key, --cert), or an adapter on a Unix socket")
    return args


def serve(description, handler, register):
    """Serves `handler`, which is made of the Adapter and the keepalive, until SIGTERM or SIGINT. `register` adds it to
    the server."""
    args = parse(description)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, signal.default_int_handler)  # raises KeyboardInterrupt

    # With so_reuseport a second handler on the port would start and take a part of the calls, unnoticed.
    options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", MAX_CALLBACK_BYTES)]
    with adapter_channel(args.adapter, args.tls, args.token) as channel:  # every thread shares it
        # A callback holds a thread until it is answered; so does a stream.
        server = grpc.server(ThreadPoolExecutor(max_workers=32), options=options)
        register(handler(Adapter(channel), args.keepalive), server)
        here = listen(server, args.listen, args.tls)
        server.start()
        try:
            print(f"handler listening on {here}", flush=True)
            server.wait_for_termination()
        except KeyboardInterrupt:
            server.stop(grace=ADAPTER_TIMEOUT).wait()  # callbacks in flight may finish
