#!/usr/bin/env bash
# Chaos: 5,000 confirmed QoS 1 publishes a second from 200 devices while Mosquitto is
# killed with SIGKILL and restarted 20 times. Prints a line for each kill and a report;
# fails if anything confirmed is lost or out of order, if anything is not confirmed, or
# if a device waits longer than 2 s for a confirmation after the broker is back.
#
#   scripts/chaos.sh                 the full size, about two minutes after the build
#   CHAOS_KILLS=3 scripts/chaos.sh   any part of it can be set:
#     CHAOS_DEVICES=200  CHAOS_RATE=5000 (a second, of all)  CHAOS_KILLS=20
#     CHAOS_UP_MS=4000 (between kills)  CHAOS_DOWN_MS=1000  CHAOS_MAX_GAP_MS=2000
#   scripts/chaos.sh own             broker.mode = "per_client": each device has a session
#                                    of its own. The gap is printed and not judged
#
# How it judges. Devices are TCP connections to the gateway, the program itself. A
# handler publishes each line and takes the next when the answer is there; only what
# was answered SUCCESS counts as acknowledged. The witness is an MQTT subscriber at the
# same broker, outside of the gateway. Whether something is lost by the gateway and not
# by the broker's death hangs on four things:
#
# - Mosquitto writes a message to its subscribers' sockets before it writes the PUBACK.
#   A message that it confirmed is therefore in the witness's socket, which outlives
#   the process that wrote to it.
# - Nothing may wait inside of Mosquitto: the witness subscribes at QoS 0 (no window to
#   fill) and has a large receive buffer and a thread that does nothing but read.
# - The witness sends nothing: a process that is killed with unread bytes in a socket
#   resets it, and what is on its way would be lost.
# - After a restart the gateway may publish before the witness is back. Mosquitto knows
#   the witness's session from a database that it saved once, before the gateway came,
#   and keeps QoS 0 messages for it (queue_qos0_messages). The gateway's own sessions
#   are not in that database: every restart is one with its sessions lost.
#
# What the broker takes from others and loses when it is killed is no loss of the
# gateway's, so the way down is judged by its subscriptions: at the end a message to
# every device must arrive.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin"
export CHAOS_DEVICES="${CHAOS_DEVICES:-200}" CHAOS_RATE="${CHAOS_RATE:-5000}"
export CHAOS_KILLS="${CHAOS_KILLS:-20}" CHAOS_UP_MS="${CHAOS_UP_MS:-4000}"
export CHAOS_DOWN_MS="${CHAOS_DOWN_MS:-1000}" CHAOS_MAX_GAP_MS="${CHAOS_MAX_GAP_MS:-2000}"
command -v mosquitto >/dev/null || { echo "mosquitto is needed (scripts/test.sh installs it)" >&2; exit 1; }
case "${1:-}" in
    own) name=nor_is_it_where_each_device_has_a_session_of_its_own ;;
    *) name=nothing_confirmed_is_lost_while_the_broker_is_killed ;;
esac
exec cargo test --locked --release --test chaos -- --nocapture "$name"
