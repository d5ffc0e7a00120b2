#!/usr/bin/env bash
# Runs tests/brokers.rs, the rules of pub/sub, with MQTT 5 and 3.1.1 against Mosquitto and
# other real brokers that it installs from their registries, and prints the tables of
# docs/brokers.md: one for each version.
#
#   scripts/brokers.sh                  all of them
#   scripts/brokers.sh mochi hivemq     some (aedes, ejabberd, hivemq, mochi, moquette,
#                                       mosquitto, rabbitmq)
#   scripts/brokers.sh 1883             one that runs already, on this port of 127.0.0.1
#
# Needs Go for mochi, Java 11 and Maven for HiveMQ CE and Moquette, Node.js for aedes, Debian
# and root for ejabberd and RabbitMQ. Not part of CI.
set -euo pipefail
export RUST_BACKTRACE=0
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin"
work=$PWD/target/brokers
mkdir -p "$work"
# What runs now: its name, its process, and a folder for all that it keeps.
name='' broker='' folder=''

stop() {
    if [ -n "$broker" ]; then
        if [ "$name" = ejabberd ]; then ejabberd stop >/dev/null 2>&1 || true; fi
        kill "$broker" 2>/dev/null || true
        for _ in $(seq 200); do
            kill -0 "$broker" 2>/dev/null || break
            sleep 0.1
        done
        kill -9 "$broker" 2>/dev/null || true
        wait "$broker" 2>/dev/null || true
    fi
    # Erlang starts one by itself and leaves it behind; it ends only after its nodes.
    if [ -n "${ERL_EPMD_PORT:-}" ]; then
        for _ in $(seq 50); do
            if epmd -kill >/dev/null 2>&1; then break; fi
            sleep 0.1
        done
    fi
    if [ -n "$folder" ]; then rm -rf "$folder"; fi
    broker='' folder=''
    unset ERL_EPMD_PORT
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
    tail -n 20 "$work/$name.log" >&2
    exit 1
}

debian() {
    if ! command -v "$1" >/dev/null; then
        DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$2" >&2
    fi
}

start_mochi() {
    (cd scripts/brokers/mochi && go build -o "$work/mochi" .)
    "$work/mochi" "$1" >"$work/$name.log" 2>&1 &
}

start_aedes() {
    cp -r scripts/brokers/aedes "$work/"
    (cd "$work/aedes" && npm install --no-audit --no-fund --no-package-lock >&2)
    node "$work/aedes/broker.js" "$1" >"$work/$name.log" 2>&1 &
}

# Broker.java beside a pom.xml that says what it needs.
start_java() {
    cp -r "scripts/brokers/$name" "$work/"
    (cd "$work/$name" && mvn -q -B org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy-dependencies \
        -DoutputDirectory=lib >"$work/maven.log" 2>&1) || { tail -n 20 "$work/maven.log" >&2; exit 1; }
    java -cp "$work/$name:$work/$name/lib/*" "$work/$name/Broker.java" "$1" "$folder" >"$work/$name.log" 2>&1 &
}
start_hivemq() { start_java "$1"; }
start_moquette() { start_java "$1"; }

# Its own user reads and writes all it needs in the folder.
ejabberd() {
    ejabberdctl --config "$folder/ejabberd.yml" --ctl-config "$folder/ctl.cfg" \
        --logs "$folder" --spool "$folder" "$@"
}

start_ejabberd() {
    debian ejabberdctl ejabberd
    ERL_EPMD_PORT=$(free_port)
    export ERL_EPMD_PORT
    sed "s/PORT/$1/" scripts/brokers/ejabberd/ejabberd.yml >"$folder/ejabberd.yml"
    echo "ERLANG_NODE=exproto-test@localhost" >"$folder/ctl.cfg"
    chown -R ejabberd "$folder"
    ejabberd foreground >"$work/$name.log" 2>&1 &
}

start_rabbitmq() {
    debian rabbitmqctl rabbitmq-server
    ERL_EPMD_PORT=$(free_port)
    export ERL_EPMD_PORT
    sed "s/PORT/$1/" scripts/brokers/rabbitmq/rabbitmq.conf >"$folder/rabbitmq.conf"
    echo '[rabbitmq_mqtt].' >"$folder/enabled_plugins"
    # Debian's wrapper would run it as a user that has another home.
    env HOME="$folder" RABBITMQ_NODENAME=exproto-test@localhost RABBITMQ_DIST_PORT="$(free_port)" \
        RABBITMQ_MNESIA_BASE="$folder" RABBITMQ_LOG_BASE="$folder" RABBITMQ_LOGS=- \
        RABBITMQ_CONFIG_FILE="$folder/rabbitmq" RABBITMQ_ENABLED_PLUGINS_FILE="$folder/enabled_plugins" \
        /usr/lib/rabbitmq/bin/rabbitmq-server >"$work/$name.log" 2>&1 &
}

# brokers speaks MQTT 5, brokers_v4 3.1.1.
programs() {
    case "$1" in
        aedes | rabbitmq | moquette) echo brokers_v4 ;;
        *) echo brokers brokers_v4 ;;
    esac
}

names=("$@")
if [ "${#names[@]}" -eq 0 ]; then names=(mosquitto hivemq ejabberd mochi aedes rabbitmq moquette); fi
cargo test --locked --test brokers --test brokers_v4 --no-run
for name in "${names[@]}"; do
    url=
    case "$name" in
        mosquitto) ;;
        mochi | hivemq | ejabberd | aedes | rabbitmq | moquette)
            port=$(free_port)
            folder=$(mktemp -d)
            "start_$name" "$port"
            broker=$!
            await "$port"
            url=mqtt://127.0.0.1:$port
            ;;
        *[!0-9]*) echo "no such broker: $name" >&2; exit 2 ;;
        *) url=mqtt://127.0.0.1:$name ;;
    esac
    for program in $(programs "$name"); do
        echo "== $name, $program" >&2
        skip=()
        # No message of 3.1.1 can carry it.
        if [ "$program" = brokers_v4 ]; then skip=(--skip the_publisher_is_known); fi
        # What fails is what the table is for.
        (if [ -n "$url" ]; then export EXPROTO_TEST_BROKER=$url; fi
            if [ "$name" = ejabberd ]; then export EXPROTO_TEST_LOGIN=gateway:any; fi
            timeout 480 cargo test --locked --test "$program" -- "${skip[@]}" 2>/dev/null) \
            >"$work/$name.$program.out" || true
        sed -n '/^failures:$/,/^test result/p' "$work/$name.$program.out" >&2
    done
    stop
done

for program in brokers brokers_v4; do
    columns=()
    for name in "${names[@]}"; do
        case " $(programs "$name") " in *" $program "*) columns+=("$name") ;; esac
    done
    if [ "${#columns[@]}" -eq 0 ]; then continue; fi
    printf '\n| %s |' "$program"; printf ' %s |' "${columns[@]}"
    printf '\n|---|'; printf -- '---|%.0s' "${columns[@]}"; printf '\n'
    sed -n 's/^test \(brokers::\)\?\([a-z_0-9]*\) \.\.\. .*/\2/p' "$work/${columns[0]}.$program.out" |
        sort | while read -r rule; do
        printf '| %s |' "$rule"
        for name in "${columns[@]}"; do
            grep -Eq "^test (brokers::)?$rule \.\.\. ok" "$work/$name.$program.out" && printf ' yes |' || printf ' no |'
        done
        printf '\n'
    done
done
