"""The example handler for the older, streaming service: written as handlers for EMQX 4.2 to 5.0 are."""

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
MAX_CALLBACK_BYTES = 64 * 1024 * 1024  # a batch of messages can outgrow gRPC's default of 4 MiB


class Handler(rpc.ConnectionHandlerServicer):
    """Each callback is a stream of requests, which is read to its end and answered then. It carries one request, or,
    with the gateway's handler.streaming, those of many connections."""

    def __init__(self, channel, keepalive):
        self.adapter = rpc.ConnectionAdapterStub(channel)
        self.keepalive = keepalive
        self.clients = {}  # conn -> clientid, until OnSocketClosed

    def call(self, name, request):
        """Calls the gateway. A refusal is an answer with a code and a message, not an exception. An exception (the
        gateway cannot be reached) fails the stream."""
        answer = getattr(self.adapter, name)(request, timeout=ADAPTER_TIMEOUT, wait_for_ready=True)
        if answer.code != pb.SUCCESS:
            code = CODES.get(answer.code, "?")
            log.warning("%s refused: %d %s %s (conn %s)", name, answer.code, code, answer.message, request.conn)
        return answer.code == pb.SUCCESS

    def OnSocketCreated(self, requests, context):
        for request in requests:
            conn, info = request.conn, request.conninfo
            # A real protocol reads the device's id from its first bytes and authenticates then. This one has none, so
            # the address must do. Not `conn`: whoever knows it can call the adapter with it, and client ids show in
            # topics.
            listener = f"{pb.SocketType.Name(info.socktype).lower()}{info.sockname.port}"
            clientid = f"{listener}-{info.peername.host}-{info.peername.port}"
            client = pb.ClientInfo(proto_name="echo", proto_ver="1", clientid=clientid, username="device")
            if not self.call("Authenticate", pb.AuthenticateRequest(conn=conn, clientinfo=client)):
                self.call("Close", pb.CloseSocketRequest(conn=conn))
                continue
            self.clients[conn] = clientid
            if self.keepalive:
                self.call("StartTimer", pb.TimerRequest(conn=conn, type=pb.KEEPALIVE, interval=self.keepalive))
            self.call("Subscribe", pb.SubscribeRequest(conn=conn, topic=f"devices/{clientid}/down", qos=1))
            log.info("connected: %s (devices/%s/up, devices/%s/down)", clientid, clientid, clientid)
        return pb.EmptySuccess()

    def OnReceivedBytes(self, requests, context):
        for request in requests:
            conn, clientid = request.conn, self.clients.get(request.conn)
            if clientid:
                up = f"devices/{clientid}/up"
                self.call("Publish", pb.PublishRequest(conn=conn, topic=up, qos=1, payload=request.bytes))
            else:  # older than this process: the device connects again and is then known
                log.warning("closing a connection from before the start (conn %s)", conn)
                self.call("Close", pb.CloseSocketRequest(conn=conn))
        return pb.EmptySuccess()

    def OnReceivedMessages(self, requests, context):
        for request in requests:
            for message in request.messages:  # those that arrived close together come in one request
                if not self.call("Send", pb.SendBytesRequest(conn=request.conn, bytes=message.payload)):
                    break
        return pb.EmptySuccess()

    def OnTimerTimeout(self, requests, context):
        for request in requests:
            log.info("silent for too long: %s", self.clients.get(request.conn, request.conn))
            self.call("Close", pb.CloseSocketRequest(conn=request.conn))
        return pb.EmptySuccess()

    def OnSocketClosed(self, requests, context):
        for request in requests:
            log.info("closed: %s (%s)", self.clients.pop(request.conn, request.conn), request.reason)
        return pb.EmptySuccess()


def main():
    parser, env = argparse.ArgumentParser(description=__doc__), os.environ.get
    parser.add_argument("--listen", default=env("HANDLER_LISTEN", "127.0.0.1:9001"), help="[HANDLER_LISTEN]")
    parser.add_argument("--adapter", default=env("ADAPTER_ADDRESS", "127.0.0.1:9100"), help="[ADAPTER_ADDRESS]")
    parser.add_argument("--keepalive", type=int, default=env("HANDLER_KEEPALIVE", "300"), help="[HANDLER_KEEPALIVE]")
    args = parser.parse_args()
    if not 0 <= args.keepalive < 2**32:
        parser.error("--keepalive: seconds, 0 for no timer")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, signal.default_int_handler)  # raises KeyboardInterrupt

    # With so_reuseport a second handler on the port would start and take a part of the calls, unnoticed.
    options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", MAX_CALLBACK_BYTES)]
    with grpc.insecure_channel(args.adapter) as channel:  # every thread shares it
        # A stream holds a thread until it is answered.
        server = grpc.server(ThreadPoolExecutor(max_workers=32), options=options)
        rpc.add_ConnectionHandlerServicer_to_server(Handler(channel, args.keepalive), server)
        port = server.add_insecure_port(args.listen)
        server.start()
        try:
            print(f"handler listening on {args.listen.rpartition(':')[0]}:{port}", flush=True)
            server.wait_for_termination()
        except KeyboardInterrupt:
            server.stop(grace=ADAPTER_TIMEOUT).wait()  # callbacks in flight may finish


if __name__ == "__main__":
    main()
