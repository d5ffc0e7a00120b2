"""The example handler for the older, streaming service: written as handlers for EMQX 4.2 to 5.0 are."""

import logging
import sys
from pathlib import Path

# What is around the callbacks is the same for both services.
sys.path.append(str(Path(__file__).resolve().parents[1] / "echo-python"))
from gateway import pb, rpc, serve

log = logging.getLogger("handler")


class Handler(rpc.ConnectionHandlerServicer):
    """Each callback is a stream of requests, which is read to its end and answered then. It carries one request, or,
    with the gateway's handler.streaming, those of many connections."""

    def __init__(self, adapter, keepalive):
        self.call = adapter.call
        self.keepalive = keepalive
        self.clients = {}  # conn -> clientid, until OnSocketClosed

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


if __name__ == "__main__":
    serve(__doc__, Handler, rpc.add_ConnectionHandlerServicer_to_server)
