#!/usr/bin/env bash
# Runs tests/brokers.rs, the rules of pub/sub, against Mosquitto and other real brokers
# that it installs from their registries, and prints the table of docs/brokers.md.
#
#   scripts/brokers.sh                  all of them
#   scripts/brokers.sh mochi hivemq     some (ejabberd, hivemq, mochi, mosquitto)
#   scripts/brokers.sh 1883             one that runs already, on this port of 127.0.0.1
#
# Needs Go for mochi, Java 11 and Maven for HiveMQ CE, Debian and root for ejabberd. Not
# part of CI.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin"
work=$PWD/target/brokers
mkdir -p "$work"
broker=
stop() {
    if [ -z "$broker" ]; then return; fi
    if [ -n "${folder:-}" ]; then
        ejabberd stop >/dev/null 2>&1 || true
    else
        kill "$broker" 2>/dev/null || true
    fi
    wait "$broker" 2>/dev/null || true
    if [ -n "${folder:-}" ]; then rm -rf "$folder"; fi
    broker='' folder=''
}
trap stop EXIT

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
listens() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
await() {
    for _ in $(seq 600); do
        if listens "$1"; then return; fi
        kill -0 "$broker" 2>/dev/null || break
        sleep 0.1
    done
    echo "the broker does not listen; its log:" >&2
    tail -n 20 "$work/broker.log" >&2
    exit 1
}

start_mochi() {
    (cd scripts/brokers/mochi && go build -o "$work/mochi" .)
    "$work/mochi" "$1" >"$work/broker.log" 2>&1 &
    broker=$!
}

start_hivemq() {
    cp -r scripts/brokers/hivemq "$work/"
    (cd "$work/hivemq" && mvn -q -B org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy-dependencies \
        -DoutputDirectory=lib >"$work/maven.log" 2>&1) || { tail -n 20 "$work/maven.log" >&2; exit 1; }
    rm -rf "$work/hivemq/run"
    java -cp "$work/hivemq/lib/*" "$work/hivemq/Broker.java" "$1" "$work/hivemq/run" >"$work/broker.log" 2>&1 &
    broker=$!
}

# Its own user reads and writes all it needs in a folder outside of ours.
ejabberd() {
    ejabberdctl --config "$folder/ejabberd.yml" --ctl-config "$folder/ctl.cfg" \
        --logs "$folder" --spool "$folder" "$@"
}

start_ejabberd() {
    if ! command -v ejabberdctl >/dev/null; then
        DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends ejabberd >&2
    fi
    folder=$(mktemp -d)
    sed "s/PORT/$1/" scripts/brokers/ejabberd/ejabberd.yml >"$folder/ejabberd.yml"
    echo "ERLANG_NODE=exproto-test@localhost" >"$folder/ctl.cfg"
    chown -R ejabberd "$folder"
    ejabberd foreground >"$work/broker.log" 2>&1 &
    broker=$!
}

names=("$@")
if [ "${#names[@]}" -eq 0 ]; then names=(mosquitto hivemq ejabberd mochi); fi
cargo test --locked --test brokers --no-run
for name in "${names[@]}"; do
    echo "== $name" >&2
    url=
    case "$name" in
        mosquitto) ;;
        mochi | hivemq | ejabberd)
            port=$(free_port)
            "start_$name" "$port"
            await "$port"
            url=mqtt://127.0.0.1:$port
            ;;
        *[!0-9]*) echo "no such broker: $name" >&2; exit 2 ;;
        *) url=mqtt://127.0.0.1:$name ;;
    esac
    # What fails is what the table is for.
    (if [ -n "$url" ]; then export EXPROTO_TEST_BROKER=$url; fi
        if [ "$name" = ejabberd ]; then export EXPROTO_TEST_LOGIN=gateway:any; fi
        cargo test --locked --test brokers 2>/dev/null) >"$work/$name.out" || true
    stop
    sed -n '/^failures:$/,/^test result/p' "$work/$name.out" >&2
done

{
    printf '| rule |'; printf ' %s |' "${names[@]}"; printf '\n|---|'; printf -- '---|%.0s' "${names[@]}"; printf '\n'
    sed -n 's/^test \([a-z_0-9]*\) \.\.\. .*/\1/p' "$work/${names[0]}.out" | sort | while read -r rule; do
        printf '| %s |' "$rule"
        for name in "${names[@]}"; do
            grep -q "^test $rule \.\.\. ok" "$work/$name.out" && printf ' yes |' || printf ' no |'
        done
        printf '\n'
    done
}
